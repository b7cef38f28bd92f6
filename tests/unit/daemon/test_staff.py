"""Who does the work: by the machine, unless the configuration says."""

import pytest

from appliance.core.config import Config
from appliance.core.errors import ConfigError
from appliance.core.metrics import Metrics
from appliance.daemon import staff, supervisor
from appliance.daemon.auditor import Auditor
from appliance.daemon.single import Single
from appliance.daemon.supervisor import Supervisor, how_many_fronts


def machine(monkeypatch: pytest.MonkeyPatch, cpus: int, gpus: int = 0, memory: int = 64 * 2**30) -> None:
    """Have this machine be another one."""
    for module in (staff, supervisor):
        monkeypatch.setattr(module, "usable_cpus", lambda: cpus)
        monkeypatch.setattr(module, "accelerators", lambda: ("NVIDIA H200",) * gpus)
    monkeypatch.setattr(supervisor, "usable_memory", lambda: memory)


def config(**sections: object) -> Config:
    """A configuration with these sections."""
    return Config.model_validate(sections)


ENROLLED = {"api_base": "https://api.example.com", "user_id": "acme"}


def chosen(settings: Config) -> staff.Staff:
    """Who does the work."""
    metrics = Metrics()
    return staff.choose(settings, metrics, lambda: None, Auditor(settings, metrics))


@pytest.mark.parametrize(
    ("cpus", "gpus", "sections", "kind"),
    [
        (2, 0, {}, Single),
        (3, 0, {}, Single),
        (4, 0, {}, Supervisor),
        (2, 1, {}, Supervisor),
        (2, 1, {"engine": {"device": "cpu"}}, Single),
        (2, 0, {"engine": {"device": "gpu:1"}}, Supervisor),
        (16, 0, {"processes": {"mode": "single"}}, Single),
        (2, 0, {"processes": {"mode": "processes"}}, Supervisor),
        (2, 0, {"orchestrator": ENROLLED}, Supervisor),
        (2, 0, {"orchestrator": ENROLLED | {"agent": False}}, Single),
        (2, 0, {"orchestrator": ENROLLED, "processes": {"mode": "single"}}, Single),
    ],
)
async def test_the_machine_decides_who_does_the_work(
    monkeypatch: pytest.MonkeyPatch, cpus: int, gpus: int, sections: dict[str, object], kind: type
) -> None:
    """One process on small machines without a GPU, several on all others and where there is an agent, and what is
    configured anywhere."""
    machine(monkeypatch, cpus, gpus)
    assert isinstance(chosen(config(**sections)), kind)


@pytest.mark.parametrize("device", ["auto", "gpu", "gpu:0"])
async def test_one_process_beside_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Only the end of a process frees the GPU's memory."""
    machine(monkeypatch, 2, 1)
    with pytest.raises(ConfigError, match=r"processes\.mode"):
        chosen(config(processes={"mode": "single"}, engine={"device": device}))


@pytest.mark.parametrize(
    ("cpus", "gpus", "memory", "sections", "fronts"),
    [
        (4, 0, 64, {}, 1),
        (16, 0, 64, {}, 4),
        (64, 0, 64, {}, 8),
        (16, 1, 64, {}, 8),
        (16, 1, 64, {"engine": {"device": "cpu"}}, 4),
        (16, 0, 1, {}, 2),
        (1, 0, 64, {}, 1),
        (16, 0, 64, {"processes": {"fronts": 3}}, 3),
        (16, 0, 64, {"processes": {"fronts": 3}, "server": {"transport": "grpcio"}}, 1),
    ],
)
def test_fronts_follow_cpus_gpus_and_memory(
    monkeypatch: pytest.MonkeyPatch, cpus: int, gpus: int, memory: int, sections: dict[str, object], fronts: int
) -> None:
    """Beside a GPU they have the CPUs for themselves; grpcio binds its own port, so there is one."""
    machine(monkeypatch, cpus, gpus, memory * 2**30)
    assert how_many_fronts(config(**sections)) == fronts
