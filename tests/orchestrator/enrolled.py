"""An appliance of the tests' orchestrator: how it is enrolled, what it serves there, and how users ask for it."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from clarifai_grpc.grpc.api import resources_pb2
from orchestrator.running import RunningCentre
from orchestrator.stock_runner import PAT, USER
from support import graphs
from support.appliance import array_input, request_for

STREAMS = 4
SLOW = [1.0] * 1024


def enrolled_with(base_url: str, centre: RunningCentre, home: Path, **more: Any) -> dict[str, Any]:
    """An [orchestrator] section, and its PAT in a file."""
    (home / "orchestrator.pat").write_text(PAT, encoding="ascii")
    return {
        "api_base": base_url,
        "user_id": USER,
        "pat_file": home / "orchestrator.pat",
        "root_ca": centre.pki.ca,
        "streams": STREAMS,
        **more,
    }


def at_deployment(request: Any, deployment: str) -> Any:
    """The request, as the user of a deployment sends it."""
    request.user_app_id.user_id = USER
    request.runner_selector.deployment.CopyFrom(resources_pb2.Deployment(id=deployment, user_id=USER))
    return request


def slow(folder: Path, rounds: int = 1500) -> None:
    """A bundle whose runs take most of a second; its rows are `SLOW`."""
    graphs.write_raw(folder, graphs.slow_model(rounds, len(SLOW)), batching={"max_rows": 1})


def row(model: str, *numbers: float) -> Any:
    """A request of one row for a bundle of tensors."""
    request = request_for(model, [array_input(np.array(numbers, np.float32))], app=graphs.APP)
    return at_deployment(request, deployment_of(model))


def deployment_of(model: str) -> str:
    """The deployment of a bundle that the tests' graphs write: its user or app is not the usual one."""
    return f"{model}-{hashlib.sha256(f'{graphs.USER}/{graphs.APP}'.encode()).hexdigest()[:8]}"
