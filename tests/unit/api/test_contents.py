"""What is left out of a request's body and what is parsed of it are together what protobuf reads in the whole."""

import asyncio
import sys
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from clarifai_grpc.grpc.api import service_pb2
from clarifai_grpc.grpc.api.resources_pb2 import Audio, Data, Image, Input, NDArray, Part, Text, Video
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from support import graphs, pictures
from support.api_world import World
from support.waiting import eventually_async

from appliance.api import contents, parsing
from appliance.api.contents import HERE, taken_out
from appliance.api.parsing import parsed
from appliance.api.varints import varint
from appliance.core.errors import InvalidRequest
from appliance.core.memory import MemoryBudget

Request = service_pb2.PostModelOutputsRequest
MIB = 2**20
LARGE = bytes(range(256)) * 300
"""More than is left in a message, and together with little else more than a small body."""


@pytest.fixture
def every_content(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contents of three bytes are large."""
    monkeypatch.setattr(contents, "_LEAST", 3)


def whole(rest: bytes, found: dict[int, contents.Contents]) -> Any:
    """The message with its contents back in it."""
    message = Request.FromString(rest)
    for number, parts in found.items():
        data = message.inputs[number].data
        for part, fields in parts.items():
            place = data if part == HERE else data.parts[part].data
            for field, content in fields.items():
                holder = getattr(place, field)
                assert place.HasField(field)
                setattr(holder, "buffer" if field == "ndarray" else "base64", bytes(content))
    return message


def check(body: bytes) -> str:
    """Both ways to read a body agree; says what became of it."""
    found = taken_out(body)
    try:
        wanted = Request.FromString(body)
    except DecodeError:
        if found is None:
            return "refused"
        with pytest.raises(DecodeError):
            Request.FromString(found[0])
        return "refused without its contents"
    if found is None:
        return "parsed as it is"
    # Bytes, as a message that holds NaN is not equal to itself.
    assert whole(*found).SerializeToString(deterministic=True) == wanted.SerializeToString(deterministic=True)
    return "taken apart"


# ---- messages as clients write them ----------------------------------------------------------------------------------


def test_each_content_is_found_where_it_is(every_content: None) -> None:
    """Of every kind, in `data` and in parts; small ones stay, and so does what is deeper inside."""
    inner = Part(id="list", data=Data(parts=[Part(data=Data(image=Image(base64=b"deeper")))]))
    request = Request(
        model_id="m",
        inputs=[
            Input(id="a", data=Data(image=Image(base64=b"picture", url="u"), audio=Audio(base64=b"sound"))),
            Input(id="b", data=Data(image=Image(base64=b"xx"), text=Text(raw="a text"))),
            Input(
                data=Data(
                    video=Video(base64=b"film"),
                    parts=[
                        Part(id="x", data=Data(string_value="one")),
                        Part(id="y", data=Data(ndarray=NDArray(buffer=b"array", shape=[5], dtype="uint8"))),
                        inner,
                    ],
                )
            ),
        ],
    )
    body = request.SerializeToString()
    found = taken_out(body)
    assert found is not None
    rest, apart = found
    assert {
        (number, part, field): bytes(content)
        for number, parts in apart.items()
        for part, fields in parts.items()
        for field, content in fields.items()
    } == {
        (0, HERE, "image"): b"picture",
        (0, HERE, "audio"): b"sound",
        (2, HERE, "video"): b"film",
        (2, 1, "ndarray"): b"array",
    }
    assert all(view.obj is body for parts in apart.values() for fields in parts.values() for view in fields.values())
    message = Request.FromString(rest)
    assert message.inputs[0].data.image == Image(url="u")
    assert message.inputs[1] == request.inputs[1]
    assert message.inputs[2].data.parts[2] == inner
    assert whole(rest, apart) == request


media = st.builds(Image, base64=st.binary(max_size=9), url=st.text(max_size=3))
array = st.builds(NDArray, buffer=st.binary(max_size=9), shape=st.lists(st.integers(0, 9), max_size=2))


def data_of(parts: Any) -> Any:
    return st.builds(
        Data,
        image=st.none() | media,
        ndarray=st.none() | array,
        text=st.none() | st.builds(Text, raw=st.text(max_size=5)),
        float_value=st.floats(width=64),
        parts=parts,
    )


part = st.builds(Part, id=st.text(max_size=3), data=st.none() | data_of(st.just([])))
request = st.builds(
    Request,
    model_id=st.text(max_size=5),
    inputs=st.lists(
        st.builds(Input, id=st.text(max_size=3), data=st.none() | data_of(st.lists(part, max_size=3))), max_size=4
    ),
)
settled = settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])


@settled
@given(message=request)
def test_any_request_is_the_same_taken_apart(every_content: None, message: Any) -> None:
    became = check(message.SerializeToString())
    event(became)
    large = any(
        len(content) >= 3
        for each in message.inputs
        for data in (each.data, *[part.data for part in each.data.parts])
        for content in (data.image.base64, data.ndarray.buffer)
    )
    assert became == ("taken apart" if large else "parsed as it is")


@settled
@given(
    message=request,
    changes=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=3), st.integers(0, 3)), max_size=4
    ),
)
def test_any_changed_request_is_read_or_refused_alike(every_content: None, message: Any, changes: Any) -> None:
    """Bytes exchanged, put in and left out: lengths, tags, texts that are no UTF-8, ends too early."""
    body = bytearray(message.SerializeToString())
    for share, new, count in changes:
        place = int(share * len(body))
        body[place : place + count] = new
    event(check(bytes(body)))


# ---- messages as nobody writes them ----------------------------------------------------------------------------------


NOISE = [
    b"\x08\x01",  # of the wrong type, or unknown
    b"\x10\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
    b"\x10\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\x10\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01",
    b"\xf9\x07" + bytes(8),
    b"\xfd\x07" + bytes(4),
    b"\xfa\x07\x03abc",
    b"\xfb\x07\x08\x01\xfc\x07",  # a group
    b"\xfb\x07\xa2\x06\x03abc\xfc\x07",
    b"\xfb\x07",  # that does not end
    b"\xfc\x07",  # that did not begin
    b"\x02\x00",  # field 0
    b"\x00\x00",
    b"\x0f",  # wire type 7
    b"\xfa\xff\xff\xff\x0f\x01x",  # the largest number of a field, and a larger one
    b"\xfa\xff\xff\xff\x1f\x01x",
    b"\xfa\x07\xff\xff\xff\xff\x0f",
]
CONTENT = [b"", b"ab", *[b"content", bytes(200)] * 8, b"\xff" * 5]
Shape = dict[int, Any]
MEDIA: Shape = {1: None, 2: None}
ARRAY: Shape = {1: None, 2: None, 3: None}
IN_DATA: Shape = {1: MEDIA, 2: MEDIA, 13: {1: None}, 14: MEDIA, 20: ARRAY}
REQUEST: Shape = {2: None, 4: {1: None, 2: {**IN_DATA, 19: {1: IN_DATA, 2: None}}}}


def message_as_nobody_writes_it(random: Random, shape: Shape) -> bytes:
    """Fields of a message in any order, some twice; now and then something odd."""
    odd = random.choice([0.0, 0.0, 0.02, 0.1])
    made = b""
    for _ in range(random.choice([1, 1, 2, 3])):
        if random.random() < odd:
            made += random.choice(NOISE)
        tag = random.choice([*shape, *[tag for tag, inner in shape.items() if inner]])
        inner = shape[tag]
        content = random.choice(CONTENT) if inner is None else message_as_nobody_writes_it(random, inner)
        size = len(content) + (random.choice([-1, 1, 300]) if random.random() < odd / 2 else 0)
        for number in (tag << 3 | 2, max(0, size)):
            longer = random.choice([1, 4, 9]) if random.random() < odd / 2 else 0
            written = varint(number)
            made += written[:-1] + bytes([written[-1] | 128]) + b"\x80" * (longer - 1) + b"\0" if longer else written
        made += content
    return made


@settled
@given(seed=st.integers(0, 2**64))
def test_any_bytes_are_read_or_refused_alike(every_content: None, seed: int) -> None:
    """Fields twice, out of order, of wrong types, unknown, groups; numbers too long; texts that are no UTF-8."""
    random = Random(seed)
    for _ in range(20):
        event(check(message_as_nobody_writes_it(random, REQUEST)))


PICTURE = b"\x12\x07picture"


@pytest.mark.parametrize(
    "data",
    [
        b"\x0a\x09" + PICTURE + b"\x0a\x09" + PICTURE,
        b"\x0a\x12" + PICTURE * 2,
        b"\x0a\x0a\x12\x87\x00picture",
        b"\x0a\x0d" + PICTURE + b"\xfb\x07\xfc\x07",
    ],
    ids=["merged messages", "the last one counts", "a length of two bytes", "a group"],
)
def test_what_is_unusual_on_the_way_is_left_to_the_parser(every_content: None, data: bytes) -> None:
    """The control is read apart."""
    for sound, inside in ((True, b"\x0a\x09" + PICTURE), (False, data)):
        given = b"\x12" + varint(len(inside)) + inside
        body = b"\x22" + varint(len(given)) + given
        assert check(body) == ("taken apart" if sound else "parsed as it is")


def test_a_request_of_many_fields_is_left_to_the_parser(every_content: None) -> None:
    """It would keep the loop busy twice."""
    body = Request(inputs=[Input(data=Data(image=Image(base64=b"picture")))]).SerializeToString()
    assert taken_out(body + b"\x38\x01" * 9000) is not None
    assert taken_out(body + b"\x38\x01" * 10_000) is None


def test_a_request_of_which_much_remains_is_left_to_the_parser() -> None:
    """Nothing large is parsed on the loop, and nothing is copied that is not held."""
    given = Input(data=Data(image=Image(base64=LARGE)))
    for size, apart in ((100_000, True), (300_000, False)):
        body = Request(inputs=[given], model_id="x" * size).SerializeToString()
        assert (taken_out(body) is not None) is apart


# ---- parsed ----------------------------------------------------------------------------------------------------------


def read(body: bytes) -> tuple[Any, dict[int, Any], int]:
    """The message, what was left out of it, and what is held."""
    memory = MemoryBudget(1024 * MIB).hold(len(body))
    apart: dict[int, Any] = {}
    found = []

    async def main() -> None:  # `asyncio.run` makes a text of what it returns
        found.append(await parsed(Request, body, memory, apart))

    asyncio.run(main())
    return found[0], apart, memory.count


def resident() -> int:
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * 4096


def test_large_contents_are_not_copied() -> None:
    """Nor held a second time."""
    body = Request(inputs=[Input(data=Data(image=Image(base64=bytes([n]) * (20 * MIB)))) for n in range(4)])
    body = body.SerializeToString()
    before = resident()
    message, apart, held = read(body)
    assert resident() - before < 8 * MIB
    assert held - len(body) < 8192
    assert [len(apart[n][HERE]["image"]) for n in range(4)] == [20 * MIB] * 4
    assert message.ByteSize() < 200


def test_what_remains_of_a_body_is_held() -> None:
    """And what it becomes in memory."""
    inputs = [Input(data=Data(image=Image(base64=LARGE)))] + [Input(data=Data(concepts=[{}] * 100))] * 400  # type: ignore[list-item]
    body = Request(inputs=inputs).SerializeToString()
    message, apart, held = read(body)
    assert set(apart) == {0}
    assert held - len(body) > message.ByteSize() + 40_000 * 64


@pytest.mark.parametrize("size", [100_000, MIB])
def test_what_is_no_message_is_refused_with_large_contents_too(size: int) -> None:
    body = Request(inputs=[Input(data=Data(image=Image(base64=bytes(size))))]).SerializeToString()
    with pytest.raises(InvalidRequest, match="not a PostModelOutputsRequest"):
        read(body + b"\x12\x01\xff")


# ---- answered --------------------------------------------------------------------------------------------------------


def picture(seed: int) -> bytes:
    """A file of more than 64 kB."""
    pixels = np.random.default_rng(seed).integers(0, 256, (160, 160, 3), np.uint8)
    return pictures.png(pixels)


def array_of(shape: tuple[int, ...]) -> NDArray:
    values = np.arange(np.prod(shape), dtype=np.float32)
    return NDArray(buffer=values.tobytes(), shape=shape, dtype="float32")


ROWS = 20_000


def asked(case: str) -> Any:
    """A large request of one form for one kind of model."""
    named = Data(metadata={"_method_name": "predict"})  # type: ignore[arg-type]
    if case == "tensors":
        return Request(model_id="tensor", inputs=[Input(data=Data(ndarray=array_of((ROWS, 3))))])
    if case == "tensor argument":
        part = Part(id="x", data=Data(ndarray=array_of((ROWS, 3))))
        return Request(model_id="tensor", inputs=[Input(data=Data(parts=[part]))])
    if case == "named tensors":
        parts = [Part(id=name, data=Data(ndarray=array_of((ROWS, 2)))) for name in ("b", "a")]
        return Request(model_id="pair", inputs=[Input(data=Data(parts=parts))])
    model = {"embedder": "vector", "texts": "topic"}.get(case, "colours")
    inputs = [Input(id=str(seed), data=Data(image=Image(base64=picture(seed)))) for seed in range(3)]
    if case == "picture arguments":
        inputs = [Input(data=Data(parts=[Part(id="image", data=each.data)])) for each in inputs]
    if case == "picture in data of a named method":
        for each in inputs:
            each.data.MergeFrom(named)
    if case == "one bad":
        inputs[1].data.image.base64 = b"x" * 70_000
        inputs.append(Input(data=Data(image=Image(base64=pictures.png()))))
        inputs.append(Input(data=Data(ndarray=array_of((ROWS, 3)))))
    if case == "picture beside":
        inputs = [Input(data=Data(image=inputs[0].data.image, parts=[Part(id="max_concepts", data=Data(int_value=1))]))]
    return Request(model_id=model, inputs=inputs)


@pytest.mark.parametrize(
    "case",
    [
        "tensors",
        "tensor argument",
        "named tensors",
        "pictures",
        "picture arguments",
        "picture in data of a named method",
        "picture beside",
        "embedder",
        "texts",
        "one bad",
    ],
)
@pytest.mark.asyncio(loop_scope="module")
async def test_the_answer_is_that_to_the_whole_message(
    world: World, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks, in whichever form; errors too."""
    body = asked(case).SerializeToString()
    client = world.api()
    taken = []
    monkeypatch.setattr(parsing, "taken_out", lambda body: taken.append(taken_out(body)) or taken[-1])
    found = service_pb2.MultiOutputResponse.FromString(await client.raw("PostModelOutputs", body))
    assert len(taken) == 1
    assert taken[0] is not None
    monkeypatch.setattr(parsing, "taken_out", lambda body: None)
    wanted = service_pb2.MultiOutputResponse.FromString(await client.raw("PostModelOutputs", body))
    for reply in (found, wanted):
        reply.status.req_id = ""
        for output in reply.outputs:
            output.id = output.status.req_id = ""
            output.ClearField("created_at")
            if len(output.input.id) == 32:
                output.input.id = ""
    assert found == wanted
    assert client.budget.used == 0


@pytest.mark.parametrize("case", ["pictures", "tensors", "one bad"])
@pytest.mark.asyncio(loop_scope="module")
async def test_a_body_is_let_go_with_its_request(world: World, case: str) -> None:
    """Also where answers are kept, and where an input is bad."""
    request = asked(case)
    request.use_predict_cache = True
    body = request.SerializeToString()
    before = sys.getrefcount(body)
    client = world.api(cache={"size": MIB})
    await client.raw("PostModelOutputs", body)
    # A thread that decoded lets go of its work a moment after it has told its result.
    await eventually_async(lambda: sys.getrefcount(body) == before)


async def test_a_declared_method_reads_large_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In both forms."""
    made = World(tmp_path)
    section = {
        "name": "predict",
        "arguments": [{"name": "x", "type": "ndarray"}],
        "returns": {"type": "ndarray", "output": "y"},
    }
    config = graphs.bundle_config(made.root / "same", "any-to-any", {"methods": [section]})
    graphs.write_bundle(made.root / "same", graphs.identity_model(("batch", 40_000)), config)
    await made.look()
    client = made.api()
    taken = []
    monkeypatch.setattr(parsing, "taken_out", lambda body: taken.append(taken_out(body)) or taken[-1])
    array = array_of((40_000,))
    for data in (Data(ndarray=array), Data(parts=[Part(id="x", data=Data(ndarray=array))])):
        reply = await client.ask("PostModelOutputs", Request(model_id="same", inputs=[Input(data=data)]))
        output = reply.outputs[0].data
        assert (output.parts[0].data if output.parts else output).ndarray.buffer == array.buffer
    assert [found is not None for found in taken] == [True, True]
    await made.close()
