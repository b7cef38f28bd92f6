"""`appliance doctor` on the way to the orchestrator: each step is a line, and the first that fails says what to do."""

import json
import socket
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from orchestrator.connect_proxy import ConnectProxy
from orchestrator.running import RunningCentre
from orchestrator.stock_runner import PAT, USER
from support.appliance import COMMAND, ENVIRONMENT, PATIENCE_S, Appliance

Lines = list[tuple[str, str]]


@pytest.fixture
def appliance(make_appliance: Callable[..., Appliance]) -> Appliance:
    """An appliance that does not run."""
    return make_appliance()


def enrolled(appliance: Appliance, centre: RunningCentre, pat: str = PAT, **other: Any) -> None:
    """As `appliance orchestrator enroll` leaves it, but for what is other."""
    file = appliance.home / "orchestrator.pat"
    file.write_text(f"{pat}\n", encoding="utf-8")
    section = {"api_base": centre.base_url, "user_id": USER, "pat_file": file, "root_ca": centre.pki.ca}
    appliance.write_config(orchestrator=section | other)


def doctor(appliance: Appliance) -> Lines:
    """What it says of the orchestrator: states and texts."""
    command = [str(COMMAND), "--config", str(appliance.file), "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=PATIENCE_S, check=False)
    assert PAT not in done.stdout + done.stderr
    lines = json.loads(done.stdout)
    assert done.returncode == int(any(line["state"] == "fail" for line in lines))
    return [(line["state"], line["text"]) for line in lines if line["what"] == "orchestrator"]


def only_fault(lines: Lines) -> str:
    """The last line, which is the one that fails."""
    assert [state for state, _ in lines] == ["ok"] * (len(lines) - 1) + ["fail"], lines
    return lines[-1][1]


def test_nothing_is_said_where_there_is_none(appliance: Appliance) -> None:
    assert doctor(appliance) == []


def test_every_step_is_told(centre: RunningCentre, appliance: Appliance) -> None:
    enrolled(appliance, centre)
    lines = doctor(appliance)
    assert [state for state, _ in lines] == ["ok"] * 4
    for (_, text), words in zip(lines, ("localhost is ", "with TLSv1.3", f"acts for {USER}", " s "), strict=True):
        assert words in text


def test_a_proxy_is_gone_through(centre: RunningCentre, appliance: Appliance) -> None:
    with ConnectProxy() as proxy:
        enrolled(appliance, centre, proxy=f"http://127.0.0.1:{proxy.port}")
        lines = doctor(appliance)
    assert [state for state, _ in lines] == ["ok"] * 4
    assert "127.0.0.1 is" in lines[0][1]
    assert len(proxy.asked) == 2
    assert {line.rpartition(" ")[0] for line in proxy.asked} == {f"CONNECT localhost:{centre.port}"}


def test_a_proxy_that_refuses_is_told_with_what_it_says(centre: RunningCentre, appliance: Appliance) -> None:
    """The centre itself, which speaks no HTTP/1, stands for it."""
    enrolled(appliance, centre, proxy=f"http://127.0.0.1:{centre.port}")
    text = only_fault(doctor(appliance))
    assert f"cannot be connected to through http://127.0.0.1:{centre.port}" in text
    assert "--proxy URL" in text


def test_a_name_that_nobody_knows(centre: RunningCentre, appliance: Appliance) -> None:
    enrolled(appliance, centre, api_base="https://nobody.invalid")
    assert "nobody.invalid cannot be looked up here" in only_fault(doctor(appliance))


def test_a_port_that_is_shut(centre: RunningCentre, appliance: Appliance) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    enrolled(appliance, centre, api_base=f"https://localhost:{port}")
    text = only_fault(doctor(appliance))
    assert f"https://localhost:{port} cannot be connected to from here" in text
    assert "firewall" in text


def test_a_certificate_that_nobody_vouches_for(centre: RunningCentre, appliance: Appliance) -> None:
    """Without root_ca the public authorities count, as they do for calls."""
    enrolled(appliance, centre, root_ca=None)
    text = only_fault(doctor(appliance))
    assert "certificate that the public authorities cannot vouch for" in text
    assert "--root-ca FILE" in text


def test_authorities_that_cannot_be_read(centre: RunningCentre, appliance: Appliance) -> None:
    enrolled(appliance, centre, root_ca=appliance.home / "none.pem")
    assert "none.pem" in only_fault(doctor(appliance))


@pytest.mark.parametrize(
    ("pat", "words"),
    [("somebody-elses-token", "CONN_KEY_INVALID"), ("two words", "one PAT and nothing else")],
)
def test_a_pat_that_is_not_taken(centre: RunningCentre, appliance: Appliance, pat: str, words: str) -> None:
    enrolled(appliance, centre, pat=pat)
    assert words in only_fault(doctor(appliance))


def test_a_pat_of_another_user(centre: RunningCentre, appliance: Appliance) -> None:
    enrolled(appliance, centre, user_id="somebody-else")
    state, text = doctor(appliance)[2]
    assert (state, "acts for 'acme', and orchestrator.user_id is 'somebody-else'" in text) == ("fail", True)


def test_clocks_that_differ(make_centre: Callable[..., RunningCentre], appliance: Appliance) -> None:
    enrolled(appliance, make_centre(clock_ahead_s=-90.0))
    state, text = doctor(appliance)[3]
    assert state == "warn"
    assert text.startswith(("its clock is 90 s behind this one; run chrony", "its clock is 91 s behind"))
