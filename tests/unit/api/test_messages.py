"""Between Clarifai's messages and ours: inputs in both forms, arrays that lie, answers in their places."""

import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from clarifai_grpc.grpc.api import resources_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.api import messages
from appliance.api.messages import UrlInput, payload_of, payload_of_arguments
from appliance.core.errors import InferenceFailed, InvalidInput
from appliance.core.types import Payload

Data, Image, Text, NDArray = resources_pb2.Data, resources_pb2.Image, resources_pb2.Text, resources_pb2.NDArray


# ---- inputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "data", "payload"),
    [
        ("image", Data(image=Image(base64=b"png")), Payload(image=b"png")),
        ("image", Data(image=Image(base64=b"png", url="http://x/")), Payload(image=b"png")),
        ("image", Data(image=Image()), Payload(image=b"")),
        ("image", Data(text=Text(raw="hi")), Payload(text="hi")),
        ("image", Data(), Payload()),
        ("text", Data(text=Text(raw="hi")), Payload(text="hi")),
        ("text", Data(text=Text(raw="hi", url="http://x/")), Payload(text="hi")),
        ("text", Data(string_value="hi"), Payload(text="hi")),
        ("text", Data(text=Text(raw="")), Payload(text="")),
        ("text", Data(image=Image(base64=b"png")), Payload(image=b"png")),
        ("text", Data(), Payload()),
        ("ndarray", Data(), Payload()),
    ],
)
def test_an_input_of_the_old_form_is_read_from_its_field(kind: str, data: Any, payload: Payload) -> None:
    """Bytes before URLs; what else there is, so that a refusal can name it."""
    assert payload_of(kind, data) == payload


@pytest.mark.parametrize(
    ("kind", "data", "payload"),
    [
        ("image", Data(image=Image(url="https://h/cat.png")), Payload(image=b"body")),
        ("text", Data(text=Text(url="https://h/a.txt")), Payload(text="body")),
    ],
)
def test_a_url_is_left_to_be_fetched(kind: str, data: Any, payload: Payload) -> None:
    """Nothing is opened here."""
    found = payload_of(kind, data)
    assert isinstance(found, UrlInput)
    assert found.url.startswith("https://h/")
    assert found.finish(b"body") == payload


def test_a_text_behind_a_url_must_be_utf8() -> None:
    """Said with the byte."""
    found = payload_of("text", Data(text=Text(url="https://h/a.txt")))
    assert isinstance(found, UrlInput)
    with pytest.raises(InvalidInput, match=r"not UTF-8 \(byte 1\)"):
        found.finish(b"a\xff")


def ndarray(array: Any, **changes: Any) -> Any:
    """An array as a message, with some of it changed."""
    array = np.asarray(array)
    fields = {"buffer": array.tobytes(), "shape": array.shape, "dtype": str(array.dtype), **changes}
    return NDArray(**fields)


def read(message: Any) -> Any:
    """The array that comes out."""
    payload = payload_of("ndarray", Data(ndarray=message))
    assert isinstance(payload, Payload)
    return payload.arrays[""]


@pytest.mark.parametrize(
    "name",
    ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"],
)
def test_every_number_is_read(name: str) -> None:
    """By its NumPy name, bit for bit."""
    array = np.array([[0, 1, 1], [1, 0, 1]], name)
    found = read(ndarray(array))
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("dtype", [">f4", "<f4", "f4", ">i2", "=i8", "float", "int", "e", "?"])
def test_other_ways_to_name_a_number_are_read(dtype: str) -> None:
    """What str(array.dtype) says of arrays in another byte order."""
    array = np.array([1, 0, 1], dtype)
    np.testing.assert_array_equal(read(ndarray(array, dtype=dtype)), array)


@pytest.mark.parametrize(
    "dtype",
    [
        *("", "object", "O", "O8", "U10", "S3", "a", "V8", "str", "bytes", "void", "T"),
        *("complex64", "c8", "c16", "g", "float128", "M8[ns]", "m8", "datetime64"),
        *("f4,f4", "(2,)f4", "3f4", "1000000000f4", "i1,", "f4," * 2_000_000, "{'names':['a']}"),
        *("float33", "f99999999999", "V99999999999999999999", "f4 ", "|", ">", "ф4", "nonsense"),
    ],
    ids=lambda dtype: dtype[:20] or "empty",
)
def test_what_is_no_number_is_refused_by_name(dtype: str) -> None:
    """At once, and without repeating a megabyte of it."""
    begun = time.monotonic()
    with pytest.raises(InvalidInput, match="has dtype") as error:
        read(NDArray(buffer=b"\0" * 8, shape=[1], dtype=dtype))
    assert time.monotonic() - begun < 1
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ([2], 4),
        ([2], 9),
        ([2, 2], 8),
        ([], 0),
        ([], 8),
        ([0], 4),
        ([2**32 - 1], 4),
        ([2**32 - 1] * 4, 4),
        ([2**16, 2**16, 2**16, 2**16], 0),
        ([2**32 - 1, 2**32 - 1, 0], 4),
    ],
)
def test_a_buffer_that_does_not_fit_the_shape_is_refused_with_both_sizes(shape: list[int], size: int) -> None:
    """Products that overflow 64 bits are no way around it."""
    with pytest.raises(InvalidInput, match=rf"needs \d+ bytes; its buffer has {size}"):
        read(NDArray(buffer=b"\0" * size, shape=shape, dtype="float32"))


@pytest.mark.parametrize("shape", [[0, *[2**32 - 1] * 3], [2**32 - 1, 2**32 - 1, 0], [2**31, 2**31, 2**31, 0]])
def test_an_empty_array_with_impossible_axes_is_refused(shape: list[int]) -> None:
    """Zero bytes are needed and zero came, but no array can be that."""
    with pytest.raises(InvalidInput, match="larger than any array"):
        read(NDArray(buffer=b"", shape=shape, dtype="float32"))


def test_an_empty_array_is_an_array() -> None:
    """What it means is the task's business."""
    assert read(NDArray(buffer=b"", shape=[0, 3], dtype="float32")).shape == (0, 3)


def test_too_many_axes_are_refused() -> None:
    """Before anybody loops over them."""
    with pytest.raises(InvalidInput, match="33 axes; the limit is 32"):
        read(NDArray(buffer=b"\0", shape=[1] * 33, dtype="int8"))
    assert read(NDArray(buffer=b"\1", shape=[1] * 32, dtype="int8")).ndim == 32


def test_arrays_come_by_the_names_of_their_parts() -> None:
    """For graphs with several inputs; parts of other kinds are left out."""
    data = Data()
    data.parts.add(id="a").data.ndarray.CopyFrom(ndarray([1.0, 2.0]))
    data.parts.add(id="b").data.ndarray.CopyFrom(ndarray([3]))
    data.parts.add(id="c").data.string_value = "no array"
    payload = payload_of("ndarray", data)
    assert isinstance(payload, Payload)
    assert {name: array.tolist() for name, array in payload.arrays.items()} == {"a": [1.0, 2.0], "b": [3]}


def test_an_array_that_lies_is_named() -> None:
    """By its part."""
    data = Data()
    data.parts.add(id="left").data.ndarray.CopyFrom(ndarray([1.0], shape=[7]))
    with pytest.raises(InvalidInput, match=r"The array 'left' of shape \[7\] and dtype float64 needs 56 bytes"):
        payload_of("ndarray", data)


def test_a_pythonic_call_gives_arrays_by_argument() -> None:
    """And pictures by the task's own."""
    given = {"a": Data(ndarray=ndarray([1])), "b": Data(ndarray=ndarray([2]))}
    payload = payload_of_arguments("ndarray", "a", given)
    assert isinstance(payload, Payload)
    assert {name: array.tolist() for name, array in payload.arrays.items()} == {"a": [1], "b": [2]}
    assert payload_of_arguments("image", "a", {"a": Data(image=Image(base64=b"x"))}) == Payload(image=b"x")


def test_an_argument_that_is_no_array_is_named() -> None:
    """A text where an array belongs."""
    with pytest.raises(InvalidInput, match="The array 'a' has dtype ''"):
        payload_of_arguments("ndarray", "a", {"a": Data(string_value="no")})


@given(
    dtype=st.one_of(st.sampled_from(["float32", "int8", "bool", ">f8", "O", "U4", "f4,f4"]), st.text(max_size=20)),
    shape=st.lists(st.one_of(st.integers(0, 4), st.integers(0, 2**32 - 1)), max_size=34),
    buffer=st.binary(max_size=64),
)
@settings(max_examples=300)
def test_any_array_is_read_or_refused(dtype: str, shape: list[int], buffer: bytes) -> None:
    """Never anything else, whatever somebody writes into the message."""
    try:
        array = read(NDArray(buffer=buffer, shape=shape, dtype=dtype))
    except InvalidInput:
        return
    assert array.nbytes == len(buffer)
    assert array.shape == tuple(shape)
    assert array.dtype.kind in "biuf"


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_an_input_is_echoed_without_its_bytes() -> None:
    """Its id and its URL; a missing id is made up, 32 hex digits."""
    output = resources_pb2.Output()
    messages.fill_input(output, resources_pb2.Input(id="mine", data=Data(image=Image(url="http://x/", base64=b"png"))))
    assert (output.input.id, output.input.data.image.url) == ("mine", "http://x/")
    assert not output.input.data.image.base64
    messages.fill_input(output, resources_pb2.Input())
    assert len(bytes.fromhex(output.input.id)) == 16


@pytest.mark.parametrize(("good", "note", "code"), [(3, "", 10000), (3, "note", 10010), (2, "", 10010), (0, "", 10020)])
def test_the_top_status_sums_the_outputs_up(good: int, note: str, code: int) -> None:
    """All, some, none; a note makes success mixed."""
    failures = [InferenceFailed("The model failed."), InvalidInput("Another one.")][: 3 - good]
    failures += [InvalidInput("Another one.")] * (3 - good - len(failures))
    found = messages.conclusion(3, failures, note, "r")
    assert (found.code, found.req_id) == (code, "r")
    if good < 3:
        assert f"{3 - good} of 3 inputs failed" in found.details
        assert "The model failed." in found.details
    else:
        assert found.details == note


def test_a_failed_output_has_its_input_id_and_no_data() -> None:
    """PROTOCOL 3.2."""
    output = resources_pb2.Output()
    messages.fill_error(output, resources_pb2.Input(id="mine"), InferenceFailed("no", detail="secret"), "r-1")
    assert (output.input.id, output.status.code, output.status.req_id) == ("mine", 21313, "r-1")
    assert not output.HasField("data")
    assert "secret" not in str(output)


def test_times_are_exact() -> None:
    """Nanoseconds fit their field."""
    for seconds in (0.0, 1.5, 1_800_000_000.999999999):
        stamp = messages.timestamp(seconds)
        assert 0 <= stamp.nanos < 10**9
        assert abs(stamp.seconds + stamp.nanos / 1e9 - seconds) < 1e-6
    assert abs(messages.now().seconds - time.time()) < 5


def test_a_process_that_is_forked_off_makes_ids_of_its_own() -> None:
    """It does not go on with those that its parent had made in advance."""
    program = (
        "import os\n"
        "from appliance.api.messages import new_id\n"
        "def tell(): os.write(1, new_id().encode() + b'\\n')  # in one piece: two processes write\n"
        "tell()\n"
        "child = os.fork()\n"
        "tell()\n"
        "if child: os.waitpid(child, 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    ids = done.stdout.split()
    assert len(set(ids)) == len(ids) == 3
    assert all(len(bytes.fromhex(text)) == 16 for text in ids)
