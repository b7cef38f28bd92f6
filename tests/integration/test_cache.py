"""The predict cache of a real appliance: a hit runs no model, and what was swapped away answers nobody."""

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from clarifai_grpc.grpc.api.status.status_code_pb2 import StatusCode
from google.protobuf import json_format
from onnx import TensorProto, helper
from support import graphs
from support.appliance import MODELS, PATIENCE_S, Appliance, Client, Load, Pki, array_input, image_input, request_for

ONE_FRONT = {"fronts": 1}
"""Each has a cache of its own: with more of them, which one a connection meets decides what it knows."""

DIGITS = [path.read_bytes() for path in sorted((MODELS / "digits" / "samples").glob("*.png"))[:2]]

Make = Callable[..., Appliance]


def cached(request: Any) -> Any:
    """The same request, for the cache."""
    request.use_predict_cache = True
    return request


def runs(appliance: Appliance, model: str = "digits") -> tuple[float, float]:
    """How often the model ran, and rows that it ran on."""
    labels = f'{{model="{model}",version="1"}}'
    return tuple(appliance.metric(f"inference_appliance_batch_rows_{what}{labels}") for what in ("count", "sum"))  # type: ignore[return-value]


def count(appliance: Appliance, name: str) -> float:
    """A metric of the cache, all its series together."""
    lines = [line for line in appliance.metrics().splitlines() if line.startswith(f"inference_appliance_cache_{name}")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def test_a_hit_runs_no_model_and_says_the_same(make_appliance: Make, pki: Pki) -> None:
    """Counted by the batcher itself; without the flag the model runs as ever."""
    appliance = make_appliance("digits", cache={"size": "1MiB"}, processes=ONE_FRONT)
    with appliance, Client(appliance.port(), pki.ca, appliance.new_key()) as client:
        request = request_for("digits", [image_input(digit) for digit in DIGITS])
        plain = client.predict(request)
        before = runs(appliance)
        assert before[1] == 2
        first = client.predict(cached(request))
        assert runs(appliance)[1] == 4
        again = [client.predict(request) for _ in range(5)]
        assert runs(appliance)[1] == 4
        for reply in (first, *again):
            assert reply.status.code == StatusCode.SUCCESS
            assert [output.data for output in reply.outputs] == [output.data for output in plain.outputs]
            assert [output.model for output in reply.outputs] == [output.model for output in plain.outputs]
        request.use_predict_cache = False
        client.predict(request)
        assert runs(appliance)[1] == 6
        assert [count(appliance, name) for name in ("hits_total", "misses_total", "entries")] == [10, 2, 2]
        assert 0 < count(appliance, "bytes") < count(appliance, "limit_bytes") == 2**20


def test_rest_and_grpc_share_what_is_kept(make_appliance: Make, pki: Pki, transport: str) -> None:
    if transport != "native":
        return  # no REST there
    appliance = make_appliance("digits", cache={"size": "1MiB"}, processes=ONE_FRONT)
    with appliance, Client(appliance.port(), pki.ca, key := appliance.new_key()) as client:
        request = cached(request_for("digits", [image_input(DIGITS[0])]))
        asked = json_format.MessageToDict(request, preserving_proto_field_name=True)
        said = client.predict(request).outputs[0].data.concepts
        for flag, rows in ((True, 1), (False, 2)):
            answer = httpx.post(
                f"https://localhost:{appliance.port()}/v2/models/digits/outputs",
                json={**asked, "use_predict_cache": flag},
                headers={"authorization": f"Key {key}"},
                verify=ssl.create_default_context(cafile=str(pki.ca)),
                timeout=PATIENCE_S,
            )
            assert [c["id"] for c in answer.json()["outputs"][0]["data"]["concepts"]] == [c.id for c in said]
            assert runs(appliance)[1] == rows


def test_it_is_off_by_default(make_appliance: Make, pki: Pki) -> None:
    appliance = make_appliance("digits")
    with appliance, Client(appliance.port(), pki.ca, appliance.new_key()) as client:
        request = cached(request_for("digits", [image_input(DIGITS[0])]))
        for _ in range(3):
            assert client.predict(request).status.code == StatusCode.SUCCESS
        assert runs(appliance)[1] == 3
        assert [count(appliance, name) for name in ("hits_total", "misses_total", "limit_bytes")] == [0, 0, 0]


def test_a_reload_turns_it_on_and_off(make_appliance: Make, pki: Pki) -> None:
    appliance = make_appliance("digits")
    with appliance, Client(appliance.port(), pki.ca, appliance.new_key()) as client:
        request = cached(request_for("digits", [image_input(DIGITS[0])]))
        appliance.write_config(cache={"size": "1MiB", "ttl_s": 3600})
        assert "taken over" in appliance.command("reload").stdout
        for _ in range(3):
            client.predict(request)
        assert runs(appliance)[1] == 1
        appliance.write_config(cache={"size": "1000TiB"})
        appliance.command("reload")
        assert "cache.size and limits.memory_in_flight together are more than the memory" in appliance.log
        appliance.write_config(cache={"size": 0})
        appliance.command("reload")
        assert count(appliance, "entries") == 0
        client.predict(request)
        assert runs(appliance)[1] == 2


def times(factor: int) -> Any:
    """`x` float32 (batch, 3) → `y` = factor · x."""
    shape = (TensorProto.FLOAT, ["batch", 3])
    adds = [helper.make_node("Sum", ["x"] * factor, ["y"])]
    return graphs.make(adds, {"x": shape}, {"y": shape})


def replace_graph(folder: Path, model: Any) -> None:
    """Put another graph in place, in one step."""
    new = folder / ".new"
    new.write_bytes(model.SerializeToString())
    new.replace(folder / "1" / "model.onnx")


def test_a_version_that_is_swapped_under_load_leaves_no_answer_behind(make_appliance: Make, pki: Pki) -> None:
    """The same version with other content: from the moment of the swap on nobody hears the old one."""
    appliance = make_appliance(cache={"size": "1MiB"}, processes=ONE_FRONT)
    graphs.write_raw(appliance.models / "scale", times(1))
    appliance.key = appliance.new_key()
    row = np.array([1, 2, 3], np.float32)
    request = cached(request_for("scale", [array_input(row)], user=graphs.USER, app=graphs.APP))
    with appliance, Client(appliance.port(), pki.ca, appliance.key) as client:

        def ask() -> list[float]:
            return np.frombuffer(client.predict(request).outputs[0].data.ndarray.buffer, np.float32).tolist()

        assert ask() == [1, 2, 3]
        with Load(appliance.port(), pki.ca, appliance.key, request, callers=4) as load:
            for factor in (2, 3):
                load.wait_for(50)
                swaps = appliance.metric("inference_appliance_model_swaps_total")
                replace_graph(appliance.models / "scale", times(factor))
                appliance.wait(lambda swaps=swaps: appliance.metric("inference_appliance_model_swaps_total") > swaps)
                heard = [ask() for _ in range(50)]
                assert heard == [[factor, 2 * factor, 3 * factor]] * 50
        assert set(load.ends) == {"answered"}, f"{load.ends} {load.odd}"
        assert count(appliance, "evictions_total") == 2
        assert count(appliance, "hits_total") > 100
        assert count(appliance, "entries") == 1
        appliance.command("models", "remove", "scale")
        appliance.wait(lambda: not count(appliance, "entries"), "the removed model's answers are forgotten")
        assert count(appliance, "bytes") == 0
        assert "inference_appliance_requests_lost_total 0.0" in appliance.metrics()
