"""Fixtures: one site for all tests of the fleet, what was seen there, and the tables of it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from fleet import quota
from fleet.site import WHO
from support.appliance import ROOT
from support.programs import need_programs

from bench.common import between_markers, table

PAGE = ROOT / "docs" / "fleet.md"
KEPT = ROOT / "build" / "fleet"
_LONG_S = 1800.0

_INSIDE = """
set -e
ip link set lo up
mkdir -p /run/netns
mount -t tmpfs none /run/netns
exec "$@"
"""
"""Names of network namespaces are mounts: they are gone with ours."""

_NAMESPACES = [
    *("setpriv", "--pdeathsig", "KILL"),
    *("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"),
    *("sh", "-c", _INSIDE, "sh"),
]
"""However this run ends, nothing that runs inside outlives it, nor do the networks."""


@pytest.fixture(scope="session")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `fleet.site` saw; FLEET_PARTS: a pattern, which is in the names of those parts that are wanted."""
    if os.geteuid() != 0:
        pytest.skip("networks of their own, with machines in them, can be made by root only")
    need_programs("iproute2", "ip", "tc")
    need_programs("haproxy", "haproxy")
    made = subprocess.run([*_NAMESPACES, "true"], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"no network namespace can be made here: {made.stderr.strip()}")
    folder = tmp_path_factory.mktemp("fleet")
    KEPT.mkdir(parents=True, exist_ok=True)
    out = KEPT / "seen.json"
    out.unlink(missing_ok=True)
    site = [sys.executable, "-m", "fleet.site", str(folder), str(out), os.environ.get("FLEET_PARTS", "")]
    try:
        done = subprocess.run(
            [*_NAMESPACES, *site],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=_LONG_S,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        )
    finally:
        quota.remove(folder)
    sys.stderr.write(done.stderr)
    assert done.returncode == 0, "see what it said"
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def _table(name: str, *head: str) -> Iterator[list[list[str]]]:
    """Rows to be filled; what they make is in build/ when the run ends, and with UPDATE_DOCS=1 in docs/fleet.md."""
    rows: list[list[str]] = []
    yield rows
    if not rows:
        return
    text = table(head, sorted(rows, key=lambda row: row[0]))
    (KEPT / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    if os.environ.get("UPDATE_DOCS") == "1":
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(between_markers(page, f"the fleet's {name}", text), encoding="utf-8")


@pytest.fixture(scope="session")
def rows() -> Iterator[list[list[str]]]:
    """The table of failures."""
    yield from _table("failures", "balancer", "edge-1 was", "noticed after", *WHO)


@pytest.fixture(scope="session")
def costs() -> Iterator[list[list[str]]]:
    """The table of costs."""
    each = ("CPU of appliances, ms a call", "CPU of HAProxy, ms a call", "CPU of callers, ms a call")
    yield from _table("costs", "appliances", "calls/s", "to one", *each)
