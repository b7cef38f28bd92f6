"""What an operator asks of a running appliance: doctor and support bundle see it as clients do."""

import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.appliance import MODELS, Appliance, Pki, run


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, pki: Pki) -> Iterator[Appliance]:
    """One of our own, on the native wire: what is asked goes over HTTP."""
    appliance = Appliance(tmp_path_factory.mktemp("operator"), pki, transport="native")
    for bundle in ("digits", "ml-topics"):
        shutil.copytree(MODELS / bundle, appliance.models / bundle)
    appliance.key = appliance.new_key()
    with appliance:
        yield appliance


def doctor(appliance: Appliance) -> tuple[int, dict[str, tuple[str, str]]]:
    done = run("doctor", "--json", config=appliance.file, check=False)
    return done.returncode, {line["what"]: (line["state"], line["text"]) for line in json.loads(done.stdout)}


def test_a_running_appliance_is_seen_as_its_clients_see_it(shared: Appliance) -> None:
    code, found = doctor(shared)
    assert code == 0, found
    assert found["daemon"][0] == "ok"
    assert found["handshake"] == ("ok", f"port {shared.port()} answers as localhost with TLSv1.3")
    assert found["device"][0] == "ok"
    assert found["port"][0] == "ok"


def test_a_certificate_that_clients_would_refuse_is_told(shared: Appliance, pki: Pki, tmp_path: Path) -> None:
    """The files on disk are of another root than what clients have."""
    ca = shared.tls / "ca.crt"
    good = ca.read_bytes()
    run("certs", "init", "--dir", tmp_path)
    ca.write_bytes((tmp_path / "ca.crt").read_bytes())
    try:
        _, found = doctor(shared)
    finally:
        ca.write_bytes(good)
    assert found["handshake"][0] == "warn"
    assert "a client refuses it" in found["handshake"][1]


PICTURE = MODELS / "digits" / "samples" / "held-out-000-label-2.png"


def predict(appliance: Appliance, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    url = f"https://localhost:{appliance.port()}"
    return run("predict", *arguments, "--base-url", url, config=appliance.file, check=False)


def test_a_prediction_is_asked_for_as_a_client_asks(shared: Appliance, tmp_path: Path) -> None:
    key = tmp_path / "pat"
    key.write_text(shared.key + "\n")
    done = predict(shared, "digits", PICTURE, "--key-file", key)
    assert done.stdout.splitlines()[0].split()[0] == "two", done.stderr
    text = tmp_path / "post.txt"
    text.write_text("The shuttle was launched into its orbit this morning.")
    done = predict(shared, "appliance/main/ml-topics", text, "--key-file", key, "--json")
    reply = json.loads(done.stdout)
    assert reply["outputs"][0]["data"]["concepts"][0]["value"] > 0.1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("digits", PICTURE), "11102"),
        (("digits", "none.png"), "none.png cannot be read"),
        (("none", PICTURE), "Model does not exist"),
        (("a/b", PICTURE), "neither MODEL nor USER/APP/MODEL"),
        (("digits", PICTURE, "--ca", "/none"), "--ca"),
        (("digits", PICTURE, "--as", "text"), "text"),
    ],
)
def test_what_keeps_it_from_an_answer_is_said(
    shared: Appliance, tmp_path: Path, arguments: tuple[str | Path, ...], said: str
) -> None:
    key = tmp_path / "pat"
    key.write_text(shared.key)
    flags = () if said == "11102" else ("--key-file", key)
    done = predict(shared, *arguments, *flags)
    assert done.returncode == 2
    if said != "11102":
        assert said in done.stderr
    else:
        assert "key" in done.stderr.lower()


def test_the_bundle_of_a_running_appliance_has_status_and_metrics(shared: Appliance, tmp_path: Path) -> None:
    path = tmp_path / "bundle.tar.gz"
    run("support-bundle", "-o", path, config=shared.file)
    with tarfile.open(path) as archive:
        files = {name: archive.extractfile(name) for name in archive.getnames()}
        texts = {name.rpartition("/")[2]: file.read().decode() for name, file in files.items() if file is not None}
    assert json.loads(texts["readyz.txt"])["ready"] is True
    assert {row["bundle"] for row in json.loads(texts["status.txt"])["catalog"]} == {"digits", "ml-topics"}
    assert "inference_appliance_" in texts["metrics.txt"]
    assert shared.key
    assert all(shared.key not in text for text in texts.values())
