"""What an operator asks of a running appliance: doctor and support bundle see it as clients do."""

import json
import tarfile
from pathlib import Path

import pytest
from support.appliance import Appliance, Pki, run


@pytest.fixture(scope="session")
def transport() -> str:
    """The commands ask the daemon, whichever wire it has."""
    return "native"


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
