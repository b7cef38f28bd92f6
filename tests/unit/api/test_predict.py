"""What a declared method returns may be large: it is paid for, and written beside the loop."""

from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from support import graphs
from support.api_world import World
from support.http_client import http_client

from appliance.api import replies, values
from appliance.api.kserve_http import kserve_routes
from appliance.core.types import FieldType, MethodField, Returned

COUNT = 3000
KSERVE = "/kserve/v2/models/numbers"
NUMBERS = MethodField("return", FieldType.LIST, items=(MethodField("item", FieldType.FLOAT),))


@pytest_asyncio.fixture
async def numbers(tmp_path: Any) -> AsyncIterator[World]:
    """A bundle `numbers` whose method gives its array back as a list."""
    made = World(tmp_path)
    section = {
        "name": "predict",
        "arguments": [{"name": "x", "type": "ndarray"}],
        "returns": {"type": "list[float]", "output": "y"},
    }
    config = graphs.bundle_config(made.root / "numbers", "any-to-any", {"methods": [section]})
    graphs.write_bundle(made.root / "numbers", graphs.identity_model(("batch", COUNT)), config)
    await made.look()
    yield made
    await made.close()


def asking() -> service_pb2.PostModelOutputsRequest:
    """For the numbers 0 to COUNT."""
    array = np.arange(COUNT, dtype=np.float32)
    ndarray = resources_pb2.NDArray(buffer=array.tobytes(), shape=array.shape, dtype="float32")
    given = resources_pb2.Input(data=resources_pb2.Data(ndarray=ndarray))
    return service_pb2.PostModelOutputsRequest(model_id="numbers", inputs=[given])


async def test_many_numbers_are_returned_and_paid_for(numbers: World) -> None:
    client = numbers.api()
    reply = await client.ask("PostModelOutputs", asking())
    assert [part.data.float_value for part in reply.outputs[0].data.parts] == list(range(COUNT))
    assert client.budget.used == 0
    poor = await numbers.api(memory=512 * 1024).ask("PostModelOutputs", asking())
    assert "limits.memory_in_flight" in poor.status.details


async def test_a_declared_predict_has_no_form_in_tensors(numbers: World) -> None:
    """KServe's door says so, and who can call it."""
    client = numbers.api()
    async with http_client(kserve_routes(client.api.kserve, client.api), client.keys[0]) as made:
        for answer in (await made.get(KSERVE), await made.post(f"{KSERVE}/infer", json={"inputs": []})):
            assert (answer.status_code, "Clarifai's API" in answer.json()["error"]) == (400, True)


@pytest.mark.parametrize("pythonic", [True, False])
def test_what_is_written_beforehand_is_what_would_be_written(pythonic: bool) -> None:
    for kind, value in ((NUMBERS, [1.0, 2.5]), (MethodField("return", FieldType.STR), "a text")):
        writer: Any = replies.ReplyWriter.__new__(replies.ReplyWriter)
        given = resources_pb2.Input(id="a")
        written = replies.written(Returned(value), kind, pythonic=pythonic)
        texts = []
        for answer in (written, Returned(value)):
            body = b"".join(writer.output(b"", given, answer, kind, pythonic=pythonic))
            (output,) = service_pb2.MultiOutputResponse.FromString(body).outputs
            texts.append(str(output.data))
        assert texts[0] == texts[1] != ""


@pytest.mark.parametrize(
    ("value", "small"),
    [
        (1.5, True),
        ([1.0] * 100, True),
        ({"a": [1, 2], "b": ("c",)}, True),
        (np.zeros(10**6), True),  # an array is written as it is
        ([1.0] * 10**6, False),
        ([[1.0] * 30] * 30, False),
        ({str(n): n for n in range(1000)}, False),
    ],
)
def test_small_is_what_has_few_parts(value: Any, small: bool) -> None:
    assert values.is_small(value) is small
