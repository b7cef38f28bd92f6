"""Several appliances, one pool: what callers hear while one is drained, upgraded, killed, cut off; and who gets what.

A site in network namespaces, with a real balancer, three real appliances and the centre (`site.py`); the table that the
tests make of it is in docs/fleet.md.
"""

from collections.abc import Callable
from typing import Any

import pytest
from fleet.balancers import ENVOY, SHIPPED
from fleet.quota import reason_not
from fleet.site import NEXT_VERSION, SERVERS, WHO
from hpack import Decoder

from bench.common import number

CONFIGURATIONS = [
    ("haproxy", "pass-through.cfg"),
    ("haproxy", "re-encrypt.cfg"),
    ("envoy", "pass-through.yaml"),
    ("envoy", "re-encrypt.yaml"),
]
each_configuration = pytest.mark.parametrize(("kind", "file"), CONFIGURATIONS)
Part = Callable[[str], Any]


@pytest.fixture
def part(seen: dict[str, Any]) -> Part:
    """What was seen in a part of that name."""

    def of(name: str) -> Any:
        if name.startswith(("envoy", "weighed")) and not ENVOY.exists():
            pytest.skip(f"{ENVOY} is missing; `make .clients/envoy/ready` makes it")
        if name in ("scaled", "weighed") and reason_not():
            pytest.skip(reason_not())
        if name not in seen:
            pytest.skip("FLEET_PARTS chose others")
        if "error" in seen[name]:
            raise AssertionError(seen[name]["error"] + "\n".join(f"{k}:\n{v}" for k, v in seen[name]["logs"].items()))
        return seen[name]

    return of


def note(rows: list[list[str]], balancer: str, what: str, found: dict[str, Any]) -> None:
    """A line of the table."""
    cells = []
    for who in WHO:
        calls = found["calls"].get(who)
        failed = sum(calls["others"].values()) if calls else 0
        cells.append(f"{failed} of {failed + calls['answered']}, {calls['slowest_s']:.1f} s" if calls else "–")
    rows.append([balancer, what, f"{found['noticed_s']:.1f} s", *cells])


@each_configuration
def test_rest_goes_through_the_same_port_and_the_appliances_see_whose_call_it_is(
    part: Part, kind: str, file: str
) -> None:
    """PROXY v2."""
    found = part(f"{kind} {file} door")
    assert found["readyz"] == [200]
    assert found["saw the visitor"] == list(SERVERS)


@pytest.mark.parametrize("trouble", ["drained", "upgraded"])
@each_configuration
def test_a_drain_and_an_upgrade_cost_no_call(
    part: Part, rows: list[list[str]], kind: str, file: str, trouble: str
) -> None:
    """Nobody has a retry policy. An upgrade is to another version of us with another configuration."""
    found = part(f"{kind} {file} {trouble}")
    note(rows, f"{kind} {file}", trouble, found)
    for who, calls in found["calls"].items():
        assert calls["others"] == {}, who
        assert calls["answered"] > 100, who
    assert found["noticed_s"] < 3, "before the lame duck is over"
    assert (found["version"] == NEXT_VERSION) == (trouble == "upgraded")


@pytest.mark.parametrize("trouble", ["killed", "partitioned"])
@each_configuration
def test_with_the_sdks_own_policy_no_call_fails_when_one_is_gone(
    part: Part, rows: list[list[str]], kind: str, file: str, trouble: str
) -> None:
    """Calls in flight there are tried again, by the policy of the stock channel, and reach another one."""
    found = part(f"{kind} {file} {trouble}")
    note(rows, f"{kind} {file}", trouble, found)
    for who in ("direct", "deployment"):
        assert found["calls"][who]["others"] == {}, who
    # Who has no policy loses what was in flight, at most one call for each of the loops.
    assert sum(found["calls"]["no policy"]["others"].values()) <= 4
    assert found["noticed_s"] < 10


def test_several_appliances_share_the_items_of_the_centre(part: Part) -> None:
    found = part("shared")
    assert found["calls"]["others"] == {}
    total = sum(found["answered"].values())
    assert total >= 300
    assert all(count > total / 10 for count in found["answered"].values()), found["answered"]


def test_envoy_weighs_by_load_reports(part: Part) -> None:
    """The appliance with the least CPU is given the least."""
    found = part("weighed")
    assert found["calls"]["others"] == {}
    weights = found["weights"]
    assert min(weights, key=weights.__getitem__) == "edge-1", weights


def test_more_appliances_do_more(part: Part, costs: list[list[str]]) -> None:
    """Each has a fifth of a CPU, and the balancer what it wants."""
    found = part("scaled")
    for row in found:
        line = [
            row["per_s"],
            row["per_s"] / found[0]["per_s"],
            row["appliance_ms"],
            row["balancer_ms"],
            row["callers_ms"],
        ]
        costs.append([str(row["appliances"]), *map(number, line)])
        assert row["others"] == {}
    one, two, three = (row["per_s"] for row in found)
    assert two > 1.6 * one
    assert three > 2.2 * one


def test_the_health_check_that_haproxy_sends_is_what_its_comment_says() -> None:
    """Frames of HTTP/2: a client's preface, SETTINGS, its headers, an empty message that ends the call, GOAWAY."""
    text = (SHIPPED / "haproxy" / "pass-through.cfg").read_text(encoding="utf-8")
    lines = [line.split()[-1] for line in text.splitlines() if line.strip().startswith("tcp-check send-binary")]
    sent = bytes.fromhex("".join(lines)).removeprefix(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    frames = []
    while sent:
        size = int.from_bytes(sent[:3])
        frames.append((sent[3], sent[4], int.from_bytes(sent[5:9]), sent[9 : 9 + size]))
        sent = sent[9 + size :]
    (settings, headers, data, goaway) = frames
    assert settings == (4, 0, 0, b"")
    assert headers[:3] == (1, 4, 1)
    assert dict(Decoder().decode(headers[3])) == {
        ":method": "POST",
        ":scheme": "https",
        ":path": "/grpc.health.v1.Health/Check",
        ":authority": "health",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    assert data == (0, 1, 1, bytes(5))
    assert goaway == (7, 0, 0, bytes(8))
