"""The shipped bundles on a GPU: required means used, and answers equal the CPU's. `make gpu-check` runs these alone."""

from collections.abc import Callable
from typing import Any

import pytest
from support.appliance import MODELS, Appliance, Client, Pki, image_input, request_for, text_input

from appliance.engine.session import gpu_problem

PROBLEM = gpu_problem(0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(PROBLEM is not None, reason=f"no GPU: {PROBLEM}")]

PICTURES = [path.read_bytes() for path in sorted((MODELS / "digits" / "samples").glob("*.png"))]
REQUESTS = {
    "digits": request_for("digits", [image_input(body) for body in PICTURES]),
    "ml-topics": request_for("ml-topics", [text_input("k-means " * count) for count in (1, 5, 40, 100)]),
}


def scores(client: Client, model: str) -> list[dict[str, float]]:
    """Every concept's value, of each output."""
    outputs: Any = client.predict(REQUESTS[model]).outputs
    return [{concept.id: concept.value for concept in output.data.concepts} for output in outputs]


def test_answers_equal_the_cpus(make_appliance: Callable[..., Appliance], pki: Pki) -> None:
    answers = {}
    for device in ("cpu", "gpu"):
        appliance = make_appliance(*REQUESTS, engine={"device": device})
        key = appliance.new_key()
        with appliance, Client(appliance.port(), pki.ca, key) as client:
            assert appliance.admin("/status")["device"].startswith(device)
            answers[device] = {model: scores(client, model) for model in REQUESTS}
    for model in REQUESTS:
        for on_cpu, on_gpu in zip(answers["cpu"][model], answers["gpu"][model], strict=True):
            assert on_gpu == pytest.approx(on_cpu, abs=1e-4)
