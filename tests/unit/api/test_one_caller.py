"""Work that somebody else has let in: one principal for all of it, behind everybody else."""

import pytest

from appliance.api.auth import OneCaller
from appliance.core.config import Config, Principal
from appliance.core.errors import NotPermitted, RateLimited
from appliance.core.types import Call, ModelKey

CALL = Call(method="/clarifai.api.V2/PostModelOutputs", metadata={}, peer="test")
MODEL = ModelKey("u", "a", "m")


def config(**more: object) -> Config:
    """One with a principal of that name, or with none."""
    return Config(principal=(Principal(name="orchestrator", **more),) if more else ())


def test_it_may_use_every_model_and_goes_behind_everybody() -> None:
    grant = OneCaller(config(), "orchestrator").grant(CALL)
    grant.check_model(MODEL)
    assert (grant.name, grant.priority) == ("orchestrator", -1)


def test_a_configured_principal_bounds_it_and_cannot_raise_it() -> None:
    caller = OneCaller(config(models=("other",), concurrency=1, priority="high"), "orchestrator")
    grant = caller.grant(CALL)
    assert grant.priority == -1
    with pytest.raises(NotPermitted):
        grant.check_model(MODEL)
    with grant.admitted(), pytest.raises(RateLimited):
        grant.check()


def test_a_reload_takes_over_what_changed_and_keeps_the_counts_of_what_did_not() -> None:
    caller = OneCaller(config(concurrency=1), "orchestrator")
    with caller.grant(CALL).admitted():
        caller.configure(config(concurrency=1))
        with pytest.raises(RateLimited):
            caller.grant(CALL).check()
        caller.configure(config(concurrency=2))
        caller.grant(CALL).check()
