"""The unit's limits where the kernel enforces them, and the packages on an old CPU: one emulated machine, one run.

PACKAGES=FOLDER names where the packages lie, as for tests/packaging. `make release` runs this; it takes some minutes.
"""

import os
from pathlib import Path
from typing import Any

import pytest
from support.machines import roots, virtual
from support.machines.installed import ETC, SERVICE

_MEMORY, _TASKS = 2**30, 300
_PREPARE = f"""
appliance setup --yes --base-url https://localhost:8443 --device cpu --pat-file /root/pat
cat > {ETC}/conf.d/50-test.toml <<'END'
[processes]
mode = "processes"
fronts = 1
END
chgrp inference-appliance {ETC}/conf.d/50-test.toml
mkdir /etc/systemd/system/{SERVICE}.d
cat > /etc/systemd/system/{SERVICE}.d/50-test.conf <<'END'
[Service]
MemoryMax={_MEMORY}
MemorySwapMax=0
CPUQuota=100%
TasksMax={_TASKS}
END
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What was found in the machine, by name."""
    folder = os.environ.get("PACKAGES")
    if not folder:
        pytest.skip("PACKAGES names no folder of packages; `make packages` makes dist/")
    debs = sorted(Path(folder).glob("inference-appliance_*_amd64.deb"), key=lambda each: each.stat().st_mtime)
    assert debs, f"no inference-appliance_*_amd64.deb in {folder}"
    remedy = virtual.missing()
    assert not remedy, remedy
    recipe = roots.RECIPES["debian12"]
    roots.make(recipe)
    found = virtual.boot(recipe, debs[-1], _PREPARE, tmp_path_factory.mktemp("limits"))
    for name, value in found.items():
        print(f"{name}: {value}")
    return found


def test_this_kernel_enforces_limits(report: dict[str, Any]) -> None:
    """Tried with and without: too much memory ends a unit, and too many tasks cannot be made."""
    assert {"cpu", "memory", "pids"} <= set(report["controllers"].split())
    for probe in ("memory_probe", "tasks_probe"):
        without, with_limit = report[probe]
        assert (without, with_limit != 0) == (0, True), probe


def test_it_serves_on_a_cpu_of_2008(report: dict[str, Any]) -> None:
    """No AVX: what was compiled for a newer CPU would have died of it."""
    flags = report["cpu"].split()
    assert "sse4_2" in flags
    assert "avx" not in flags
    assert report["state"] == "active", report["journal"]
    assert report["predict"].startswith("two")
    assert report["failed"] == ""


def test_the_unit_has_its_limits(report: dict[str, Any]) -> None:
    group = report["group"]
    assert (group["memory.max"], group["pids.max"]) == (str(_MEMORY), str(_TASKS))
    assert group["cpu.max"].split()[0] == group["cpu.max"].split()[1], "one CPU"
    rows = {line[:25].strip(): line[25:].split()[:2] for line in report["limits"].splitlines()}
    assert rows["Max open files"] == ["65536", "65536"]
    assert rows["Max core file size"] == ["0", "0"]


def test_the_appliance_reckons_with_what_the_unit_may_use(report: dict[str, Any]) -> None:
    """Not with what the machine has: two CPUs and 3 GiB."""
    assert report["seen"].split() == ["1", str(_MEMORY)]


def test_cpu_time_beyond_the_quota_is_withheld(report: dict[str, Any]) -> None:
    throttled = dict(line.split() for line in report["cpu.stat"].splitlines())["nr_throttled"]
    assert int(throttled) > 0


def test_an_engine_that_the_kernel_ends_for_memory_is_replaced_alone(report: dict[str, Any]) -> None:
    """OOMPolicy=continue: the service goes on, with another engine."""
    events = dict(line.split() for line in report["memory.events"].splitlines())
    assert int(events["oom_kill"]) >= 1
    before, after = report["engines"]
    assert after not in ("", before), report["journal"]
    assert report["predict_again"].startswith("two"), report["predict_again"]
    assert report["state_again"] == ["active", "0"]
