"""Messages as JSON: what is written is read again as the same message, by us and by protobuf's own code."""

import base64
import contextlib
import json
import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from clarifai_grpc.grpc.api.status import status_pb2
from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.api import jsonbody, protojson
from appliance.core.errors import InputTooLarge, InvalidInput, InvalidRequest, RequestError

F = FieldDescriptor
LIMIT = 2**24
Request = service_pb2.PostModelOutputsRequest


def read(content: Any, kind: Any = Request, limit: int = LIMIT) -> Any:
    message = kind()
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    protojson.fill(message, jsonbody.parse(body), limit)
    return message


# ---- any message -----------------------------------------------------------------------------------------------------

FLOAT32_MAX = 3.4028234663852886e38
SCALARS: Mapping[int, st.SearchStrategy[Any]] = {
    F.CPPTYPE_STRING: st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    F.CPPTYPE_BOOL: st.booleans(),
    F.CPPTYPE_INT32: st.integers(-(2**31), 2**31 - 1),
    F.CPPTYPE_INT64: st.integers(-(2**63), 2**63 - 1),
    F.CPPTYPE_UINT32: st.integers(0, 2**32 - 1),
    F.CPPTYPE_UINT64: st.integers(0, 2**64 - 1),
    # The largest one apart: protobuf's own reader refuses the text that its own writer gives it.
    F.CPPTYPE_FLOAT: st.floats(width=32, allow_nan=False).filter(lambda value: abs(value) != FLOAT32_MAX),
    F.CPPTYPE_DOUBLE: st.floats(allow_nan=False),
}


def value_of(draw: st.DrawFn, field: Any, depth: int) -> Any:
    if field.enum_type is not None:
        return draw(st.sampled_from([value.number for value in field.enum_type.values]))
    if field.type == F.TYPE_BYTES:
        return draw(st.binary(max_size=6))
    return draw(SCALARS[field.cpp_type])


def fill_any(draw: st.DrawFn, message: Any, depth: int) -> None:
    name = message.DESCRIPTOR.full_name
    if name == "google.protobuf.Timestamp":
        message.FromNanoseconds(draw(st.integers(0, 2**61)))
        return
    if name == "google.protobuf.Struct":
        message.update(
            {draw(st.text("ab", max_size=2)): draw(st.one_of(st.text("cd"), st.booleans(), st.integers(0, 9)))}
        )
        return
    if name.startswith("google.protobuf.") or not message.DESCRIPTOR.fields:
        return
    for field in draw(st.lists(st.sampled_from(list(message.DESCRIPTOR.fields)), max_size=3)):
        inner = field.message_type
        if inner is not None and (depth == 0 or inner.full_name in ("google.protobuf.Value", "google.protobuf.Any")):
            continue
        if inner is not None and inner.GetOptions().map_entry:
            continue
        if inner is not None:
            target = getattr(message, field.name)
            target = target.add() if field.is_repeated else target
            if not field.is_repeated:
                target.SetInParent()
            fill_any(draw, target, depth - 1)
        elif field.is_repeated:
            getattr(message, field.name).append(value_of(draw, field, depth))
        else:
            setattr(message, field.name, value_of(draw, field, depth))


@st.composite
def messages(draw: st.DrawFn) -> Any:
    kinds = [Request, service_pb2.MultiOutputResponse, service_pb2.MultiModelResponse, resources_pb2.Data]
    message = draw(st.sampled_from(kinds))()
    fill_any(draw, message, 4)
    return message


@settings(max_examples=300)
@given(messages())
def test_what_is_written_is_read_as_the_same_message(message: Any) -> None:
    """By us, and by protobuf's own code; and we read what that writes, in either case of names."""
    kind, text = type(message), protojson.text(message)
    assert json_format.Parse(text, kind()) == message
    assert read(text, kind) == message
    for snake in (True, False):
        for numbers in (True, False):
            theirs = json_format.MessageToJson(
                message, preserving_proto_field_name=snake, use_integers_for_enums=numbers
            )
            assert read(theirs.encode(), kind) == message


WORDS = """inputs data image base64 url text raw id model model_version output_info outputConfig min_value max_concepts
parts metadata user_app_id modelId concepts value ndarray shape buffer regions x created_at select_concepts"""
NAMES = st.sampled_from(WORDS.split())
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from(["QQ==", "1", "NaN", "2020-01-01T00:00:00Z", "\ud800"]),
)
ANY_JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=12
)


@settings(max_examples=500)
@given(st.dictionaries(NAMES, ANY_JSON, max_size=4))
def test_any_json_is_a_message_or_the_callers_fault(content: Any) -> None:
    """No other error comes through, whatever stands where."""
    try:
        message = Request()
        protojson.fill(message, content, LIMIT)
    except RequestError:
        return
    Request.FromString(message.SerializeToString())


@settings(max_examples=300)
@given(st.binary(max_size=40) | st.text(alphabet='{}[]",:0eE+-.\\unltrfas ', max_size=40).map(str.encode))
def test_any_bytes_are_json_or_the_callers_fault(body: bytes) -> None:
    with contextlib.suppress(RequestError):
        jsonbody.parse(body)


# ---- writing ---------------------------------------------------------------------------------------------------------


@given(st.floats(width=32))
def test_a_float_is_the_shortest_text_of_the_same_float32(value: float) -> None:
    shown = json.loads(protojson.text(resources_pb2.Concept(value=value)))["value"]
    if math.isfinite(value):
        assert np.float32(shown) == np.float32(value)
        assert len(repr(shown)) <= len(repr(float(f"{value:.9g}")))
    else:
        assert shown == {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[str(value)]
    vector = json.loads(protojson.text(resources_pb2.Embedding(vector=[value, 0.5])))["vector"]
    assert vector == [shown, 0.5]


def test_floats_look_as_people_write_them() -> None:
    vector = [0.1, 1.0, 0.93423086, 1e-9]
    assert protojson.text(resources_pb2.Embedding(vector=vector)) == b'{"vector":[0.1,1.0,0.93423086,1e-09]}'


def test_a_value_of_zero_and_a_code_are_always_there() -> None:
    assert protojson.plain(resources_pb2.Concept(id="a")) == {"id": "a", "value": 0.0}
    assert protojson.plain(status_pb2.Status()) == {"code": 0}


def test_enums_are_numbers_bytes_base64_long_integers_text_and_times_rfc_3339() -> None:
    output = resources_pb2.Output(id="ü")
    output.created_at.FromNanoseconds(1_700_000_000_123_456_789)
    output.data.image.base64 = b"\0\xff\xfe"
    output.status.code = 10000
    plain = protojson.plain(output)
    assert plain["created_at"] == "2023-11-14T22:13:20.123456789Z"
    assert plain["data"]["image"]["base64"] == "AP/+"
    assert plain["status"] == {"code": 10000}
    assert '"ü"'.encode() in protojson.text(output)


# ---- reading ---------------------------------------------------------------------------------------------------------


def picture(text: object) -> dict[str, Any]:
    return {"inputs": [{"data": {"image": {"base64": text}}}]}


@pytest.mark.parametrize(
    "text",
    ["AP/+", "AP_-", base64.b64encode(b"\0\xff\xfe").decode().rstrip("="), "AP/\n+", " AP/+\r\n"],
)
def test_base64_may_be_urlsafe_unpadded_or_broken_into_lines(text: str) -> None:
    assert read(picture(text)).inputs[0].data.image.base64 == b"\0\xff\xfe"


@pytest.mark.parametrize(("text", "content"), [("QQ", b"A"), ("QQ==", b"A"), ("QUI", b"AB"), ("", b"")])
def test_base64_without_its_padding_is_read(text: str, content: bytes) -> None:
    assert read(picture(text)).inputs[0].data.image.base64 == content


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (picture("A"), "inputs[0].data.image.base64 is not base64."),
        (picture("§§§§"), "inputs[0].data.image.base64 is not base64."),
        (picture("QQ==QQ=="), "inputs[0].data.image.base64 is not base64."),
        (picture("data:image/png;base64,QQ=="), "is a data: URL; send only the base64 that follows its comma"),
        (picture(5), "inputs[0].data.image.base64 must be base64 text; it is a number."),
        ({"model_id": 5}, "model_id must be text; it is a number."),
        ({"model_id": "\ud800"}, "model_id has half of a surrogate pair."),
        ({"inputs": {}}, "inputs must be a list; it is an object."),
        ({"inputs": [None]}, "inputs[0] must be an object; it is null."),
        ({"inputs": ["x"]}, "inputs[0] must be an object; it is text."),
        ({"user_app_id": []}, "user_app_id must be an object; it is a list."),
        ({"model_id": "a", "modelId": "a"}, "modelId is given twice, under both of its names."),
        ({"usePredictCache": "yes"}, "usePredictCache must be true or false; it is text."),
        (b"[1]", "The body must be a JSON object; it is a list."),
        (b"null", "The body must be a JSON object; it is null."),
        (b"\xff", "The body is not UTF-8: byte 0 cannot be read."),
        (b'{"model_id": "a"', "The body is not JSON: Expecting ',' delimiter (line 1, column 17)."),
        (b"model", "The body is not JSON: Expecting value (line 1, column 1)."),
        (b'{"model_id": "a", "model_id": "b"}', "The body names 'model_id' twice in one object."),
        (b'{"model_id": NaN}', "The body has the number NaN, which is not JSON."),
        (b'{"model_id": ' + b"1" * 5000 + b"}", "a whole number of more than 400 digits"),
        (b'{"inputs":' + b"[" * 100_000, "The JSON of the body is nested too deeply."),
        (b"{" * 5, "The body is not JSON"),
        (b'{"inputs": ' + b"[" * 1000 + b"]" * 1000 + b"}", "nested too deeply"),
        ({"inputs": [{"data": {"metadata": 5}}]}, "inputs[0].data.metadata is not a Struct in protobuf's JSON form."),
    ],
)
def test_what_is_no_message_is_refused_with_its_place(content: Any, sentence: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(content)
    assert sentence in str(caught.value)


def config(**values: Any) -> dict[str, Any]:
    return {"model": {"output_info": {"output_config": values}}}


@pytest.mark.parametrize(
    ("values", "number"),
    [({"max_concepts": 5}, 5), ({"maxConcepts": 5.0}, 5), ({"max_concepts": "5"}, 5), ({"max_concepts": None}, 0)],
)
def test_whole_numbers_come_as_numbers_or_text(values: Any, number: int) -> None:
    assert read(config(**values)).model.output_info.output_config.max_concepts == number


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"max_concepts": 5.5}, "must be a whole number; it is a number"),
        ({"max_concepts": True}, "must be a whole number; it is true or false"),
        ({"max_concepts": -1}, "must be from 0 to 4294967295"),
        ({"max_concepts": 10**30}, "must be from 0 to 4294967295"),
        ({"min_value": 1e39}, "is too large a number for its field"),
        ({"min_value": 10**399}, "is too large a number for its field"),
        ({"min_value": "0.5x"}, "must be a number; it is text"),
        ({"min_value": [0.5]}, "must be a number; it is a list"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(values: Any, sentence: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(config(**values))
    assert sentence in str(caught.value)
    assert "model.output_info.output_config." in str(caught.value)


def test_the_largest_number_of_a_field_is_read_from_its_shortest_text() -> None:
    """Which is a little more than the number."""
    assert read(config(min_value=3.4028235e38)).model.output_info.output_config.min_value == FLOAT32_MAX


def test_numbers_that_overflow_while_they_are_read_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="too large a number"):
        read(b'{"model":{"output_info":{"output_config":{"min_value":1e999}}}}')


def test_objects_nested_beyond_protobufs_depth_are_refused() -> None:
    content: Any = {}
    for _ in range(60):
        content = {"parts": [{"data": content}]}
    with pytest.raises(InvalidRequest, match="nested too deeply"):
        read({"inputs": [{"data": content}]})


def test_fields_that_nobody_knows_are_passed_over() -> None:
    """A client may be newer than our messages."""
    content = {
        "model_id": "m",
        "of_tomorrow": {"a": [1]},
        "inputs": [{"id": "a", "data": {"text": {"raw": "x"}, "new": 1}}],
    }
    assert read(content) == Request(
        model_id="m", inputs=[resources_pb2.Input(id="a", data=resources_pb2.Data(text=resources_pb2.Text(raw="x")))]
    )


def test_an_enum_name_that_nobody_knows_is_passed_over() -> None:
    found = read({"id": "m", "visibility": {"gettable": "OF_TOMORROW"}}, resources_pb2.Model)
    assert found.visibility.gettable == 0


def test_what_an_input_carries_is_not_lost_in_silence() -> None:
    """Clarifai's own Node sample says `img` (PROTOCOL 2.5)."""
    with pytest.raises(InvalidInput) as caught:
        read({"inputs": [{"data": {}}, {"data": {"img": {"url": "https://x"}}}]})
    assert str(caught.value) == (
        "inputs[1].data has nothing that is known here: there is no field 'img' in it; did you mean 'image'?"
    )
    with pytest.raises(InvalidRequest, match="did you mean 'inputs'"):
        read({"input": []})


def test_errors_never_say_what_a_value_is() -> None:
    """It may be a key."""
    for content in ({"user_app_id": "secret-key"}, {"inputs": "secret-key"}, picture("secret key")):
        with pytest.raises(InvalidRequest) as caught:
            read(content)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b'{"%b": 1}' % (b"k" * 10_000_000), InvalidRequest),
        (b'{"inputs": [{"data": {"image": {"base64": "%b"}}}]}' % (b"AAAA\\n" * 4_000_000), None),
        (b'{"zzz": [%b]}' % b",".join([b"1" * 4000] * 10_000), InvalidRequest),
    ],
    ids=["a long name", "base64 in short lines", "long numbers"],
)
def test_reading_takes_no_more_time_than_a_texts_length(body: bytes, kind: type[Exception] | None) -> None:
    """No other thread runs meanwhile, so the whole appliance would wait."""
    before = time.process_time()
    with pytest.raises(kind) if kind else contextlib.nullcontext():
        read(body, limit=2**28)
    assert time.process_time() - before < 1


def test_a_message_over_the_limit_is_refused() -> None:
    with pytest.raises(InputTooLarge, match=r"limits\.request_size, 1000 bytes"):
        read(picture(base64.b64encode(bytes(1500)).decode()), limit=1000)
    assert read(picture(base64.b64encode(bytes(900)).decode()), limit=1000)


def test_a_byte_order_mark_is_forgiven() -> None:
    assert read(b'\xef\xbb\xbf{"model_id": "m"}').model_id == "m"
