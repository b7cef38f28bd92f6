"""Inputs by URL through a real appliance, a real name server and the system's own resolver: no way in for a caller."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.appliance import PATIENCE_S, ROOT, Appliance, Pki

_SCRIPT = """
ip link set lo up && mount --bind "$1" /etc/resolv.conf && shift && exec "$@"
"""
"""Only our name server is asked there; nothing outside the namespace changes."""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, pki: Pki) -> dict[str, Any]:
    """What `support.own_internet` saw, in a network namespace."""
    inside = ["unshare", "--mount", "--net", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
    folder = tmp_path_factory.mktemp("internet")
    (folder / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    shell = [*inside, "sh", "-c", _SCRIPT, "sh", str(folder / "resolv.conf")]
    try:
        tried = subprocess.run([*shell, "ip", "link"], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    except FileNotFoundError as error:
        pytest.skip(f"needs util-linux and iproute2: {error}")
    if tried.returncode:
        pytest.skip(f"no network namespace can be made here: {tried.stderr.strip()}")
    command = [sys.executable, "-m", "support.own_internet", str(folder / "appliance"), str(pki.folder)]
    places = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    done = subprocess.run(
        [*shell, *command],
        capture_output=True,
        text=True,
        timeout=3 * PATIENCE_S,
        check=False,
        env={**os.environ, "PYTHONPATH": places},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


FETCHED = ("steady", "six", "rebind")


@pytest.mark.parametrize("name", FETCHED)
def test_what_lies_on_the_open_internet_is_answered_as_if_it_had_been_sent(seen: dict[str, Any], name: str) -> None:
    code, details, same = seen["found"][name]
    assert (code, same) == (10000, True), details


def test_nothing_inside_was_ever_asked(seen: dict[str, Any]) -> None:
    """Loopback, private and link-local addresses of the appliance's own network, by whatever way they were named."""
    assert {address for address, _, _ in seen["asked"]} == {"93.184.216.34", "2606:2800:220:1::1"}


def test_everything_else_is_refused_with_its_own_code(seen: dict[str, Any]) -> None:
    codes = {name: code for name, (code, _, _) in seen["found"].items() if name not in FETCHED}
    assert len(codes) > 20
    assert codes == {name: 30002 if name == "silent" else 30106 for name in codes}


def test_a_name_is_looked_up_once_a_hop(seen: dict[str, Any]) -> None:
    """`steady` stood in six URLs, `rebind` in two, `hop` in one that led to itself."""
    assert seen["names"] == {"steady": 6, "rebind": 2, "hop": 2}


def test_callers_do_not_learn_which_names_there_are_inside(seen: dict[str, Any]) -> None:
    """A name that is unknown is refused in the words for one that leads inside; no sentence has an address in it."""
    sentences = {name: details.replace(f"{name}.test", "NAME") for name, (_, details, _) in seen["found"].items()}
    same = {
        sentences[name] for name in ("inside", "mixed", "both", "mapped", "translated", "inside6", "zero", "nothing")
    }
    assert len(same) == 1
    for details in sentences.values():
        assert "127.0.0.1" not in details
        assert "10.0.0.5" not in details


def test_the_callers_key_and_the_services_proxies_stay_here(seen: dict[str, Any]) -> None:
    assert not seen["key_seen"]
    for _, path, headers in seen["asked"]:
        assert path.startswith("/")  # a proxy would be asked for a whole URL
        assert set(headers) == {"host", "user-agent", "accept", "accept-encoding", "connection"}


def test_the_log_says_why_and_names_no_query(seen: dict[str, Any]) -> None:
    assert "it leads to 10.0.0.5" in seen["log"]
    assert "sig=1" not in seen["log"]


def test_authorities_that_cannot_be_read_are_found_before_they_are_needed(
    make_appliance: Callable[..., Appliance], tmp_path: Path
) -> None:
    """By `appliance check`, at the start, and at a reload, which leaves everything as it was."""
    ca = tmp_path / "urls-ca.pem"
    appliance = make_appliance("digits", urls={"hosts": ["images.example.com"], "ca": str(ca)})
    checked = appliance.command("check", "--skip-models", check=False)
    assert checked.returncode == 1
    assert f"fail  urls           urls.ca {ca} cannot be used: No such file or directory" in checked.stdout
    assert appliance.spawn().wait(PATIENCE_S) != 0
    assert f"urls.ca {ca} cannot be used" in appliance.log
    shutil.copy(appliance.tls / "ca.crt", ca)
    assert appliance.command("check", "--skip-models", check=False).returncode == 0
    with appliance:
        ca.write_text("no certificate")
        refused = appliance.command("reload", check=False)
        assert refused.returncode != 0
        assert "it is not a PEM file of certificates" in refused.stderr + refused.stdout
        assert appliance.admin("/readyz")["ready"] is True
