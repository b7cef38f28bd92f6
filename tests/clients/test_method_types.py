"""Every type of the method protocol, both ways, held against the stock SDK's own serializers (PROTOCOL 4.2, 4.3).

The SDK is imported from its own environment: what its client would send is read here, what is written here its client
reads.
"""

import json
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from clarifai_grpc.grpc.api import resources_pb2
from google.protobuf import struct_pb2
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from support.appliance import ROOT

from appliance.api import methods, values
from appliance.api.replies import ReplyWriter
from appliance.catalog.methods import _TAKEN, MethodSection
from appliance.core.errors import InvalidInput
from appliance.core.types import (
    FieldType,
    Frame,
    Media,
    Method,
    MethodField,
    MethodKind,
    Region,
    Returned,
    ScoredConcept,
)

sys.path += map(str, (ROOT / ".clients" / "sdk-12" / "lib").glob("python3.*/site-packages"))
sdk = pytest.importorskip("clarifai.runners.utils.method_signatures", reason="`make test` makes .clients/sdk-12")
code_script = pytest.importorskip("clarifai.runners.utils.code_script")
data_types = pytest.importorskip("clarifai.runners.utils.data_types")
data_utils = pytest.importorskip("clarifai.runners.utils.data_utils")

pytestmark = pytest.mark.clients
Data = resources_pb2.Data
T = FieldType

many = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])

# ---- values as the SDK's users have them, and the same as ours -------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SINGLES = st.floats(width=32, allow_nan=False, allow_infinity=False)
PARTS = st.floats(0, 1, width=32)
JSONS = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,6}", fullmatch=True).filter(lambda name: name not in ("return", "with_proto"))


def media(kind: Any) -> st.SearchStrategy[Any]:
    """A picture, sound or film of the SDK."""
    return st.builds(
        lambda body, url: kind(bytes=body, url=url), st.binary(max_size=8), st.sampled_from(["", "https://a.example/b"])
    )


CONCEPTS = st.builds(data_types.Concept, name=TEXTS, value=SINGLES, id=st.sampled_from([None, "an-id"]))
REGIONS = st.builds(
    data_types.Region,
    box=st.none() | st.lists(PARTS, min_size=4, max_size=4),
    concepts=st.none() | st.lists(CONCEPTS, max_size=2),
    mask=st.none() | media(data_types.Image),
    point=st.none() | st.tuples(SINGLES, SINGLES, SINGLES),
    track_id=st.none() | TEXTS,
    text=st.none() | TEXTS,
    id=st.none() | TEXTS,
)
FRAMES = st.builds(
    data_types.Frame,
    image=st.none() | media(data_types.Image),
    regions=st.none() | st.lists(REGIONS, max_size=2),
    time=st.none() | st.integers(0, 10**6).map(lambda ms: ms / 1000),
    index=st.none() | st.integers(0, 2**31 - 1),
)
NUMBERS = st_numpy.integer_dtypes() | st_numpy.unsigned_integer_dtypes() | st_numpy.floating_dtypes(sizes=(16, 32, 64))
ARRAYS = st_numpy.arrays(NUMBERS, st_numpy.array_shapes(min_dims=0, max_dims=3, min_side=1, max_side=3))

ATOMS: dict[FieldType, st.SearchStrategy[Any]] = {
    T.STR: TEXTS,
    T.BYTES: st.binary(max_size=12),
    T.INT: st.integers(-(2**63), 2**63 - 1),
    T.FLOAT: st.floats(allow_nan=False),
    T.BOOL: st.booleans(),
    T.NDARRAY: ARRAYS,
    T.JSON: st.dictionaries(TEXTS.filter(lambda key: key != "_list"), JSONS, max_size=3) | st.lists(JSONS, max_size=3),
    T.TEXT: st.builds(data_types.Text, TEXTS),
    T.IMAGE: media(data_types.Image),
    T.AUDIO: media(data_types.Audio),
    T.VIDEO: media(data_types.Video),
    T.CONCEPT: CONCEPTS,
    T.REGION: REGIONS,
    T.FRAME: FRAMES,
}


def atoms(name: str) -> st.SearchStrategy[MethodField]:
    """A field of a type without items."""
    return st.sampled_from(list(ATOMS)).map(lambda kind: MethodField(name, kind))


def fields(name: str = "x", depth: int = 2) -> st.SearchStrategy[MethodField]:
    """Fields of all types: lists, tuples and named fields of each other too."""
    if not depth:
        return atoms(name)
    inner = fields(f"{name}_item", depth - 1)
    lists = inner.map(lambda item: MethodField(name, T.LIST, items=(item,)))
    tuples = st.lists(inner, min_size=1, max_size=3).map(lambda items: MethodField(name, T.TUPLE, items=tuple(items)))
    keys = st.lists(NAMES, min_size=1, max_size=3, unique=True)
    named = keys.flatmap(lambda found: st.tuples(*(fields(key, depth - 1) for key in found))).map(
        lambda items: MethodField(name, T.NAMED_FIELDS, items=items)
    )
    return atoms(name) | lists | tuples | named


def values_of(field: MethodField) -> st.SearchStrategy[Any]:
    """Values of a field's type, as the SDK has them."""
    if field.type is T.LIST:
        return st.lists(values_of(field.items[0]), max_size=3)
    if field.type is T.TUPLE:
        return st.tuples(*map(values_of, field.items))
    if field.type is T.NAMED_FIELDS:
        return st.fixed_dictionaries({item.name: values_of(item) for item in field.items}).map(
            lambda found: data_types.NamedFields(**found)
        )
    return ATOMS[field.type]


ASKED = fields().flatmap(lambda field: st.tuples(st.just(field), values_of(field)))


def ours(field: MethodField, value: Any) -> Any:
    """A value of the SDK as ours, arrays as something that can be compared."""
    kind = field.type
    if kind is T.LIST:
        return [ours(field.items[0], item) for item in value]
    if kind is T.TUPLE:
        return tuple(ours(item, inner) for item, inner in zip(field.items, value, strict=True))
    if kind is T.NAMED_FIELDS:
        return {item.name: ours(item, getattr(value, item.name)) for item in field.items}
    if kind is T.TEXT:
        return Media(value.text.encode(), value.url or "")
    if kind in (T.IMAGE, T.AUDIO, T.VIDEO):
        return Media(value.bytes, value.url)
    if kind is T.CONCEPT:
        return concept(value)
    if kind is T.REGION:
        return region(value)
    if kind is T.FRAME:
        image = Media(value.image.bytes, value.image.url)
        return Frame(image, value.index, round(value.time * 1000), (), tuple(map(region, value.regions)))
    return value


def concept(value: Any) -> ScoredConcept:
    return ScoredConcept(value.id, value.name, value.value)


def region(value: Any) -> Region:
    info = value.proto.region_info
    return Region(
        box=tuple(value.box) if info.HasField("bounding_box") else None,
        concepts=tuple(map(concept, value.concepts)),
        value=value.proto.value,
        id=value.id,
        text=value.text,
        track_id=value.track_id,
        mask=Media(value.mask.bytes, value.mask.url) if info.HasField("mask") else None,
        point=value.point if info.HasField("point") else None,
    )


def comparable(value: Any) -> Any:
    """Arrays by their dtype, shape and bytes in the machine's order."""
    if isinstance(value, np.ndarray | np.generic):
        native = value.astype(value.dtype.newbyteorder("="))
        return str(native.dtype), native.shape, native.tobytes()
    if isinstance(value, list | tuple):
        return type(value)(map(comparable, value))
    return {key: comparable(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def method(*arguments: MethodField, returns: MethodField | None = None, name: str = "ask") -> Method:
    return Method(name, "Asks.", arguments, returns or MethodField("return", T.STR))


# ---- both ways -------------------------------------------------------------------------------------------------------


@many
@given(ASKED)
def test_what_the_sdk_sends_is_read(asked: tuple[MethodField, Any]) -> None:
    """Its client's `serialize`, over the signature that is published."""
    field, value = asked
    signature = methods.signature(method(field))
    data = sdk.serialize({field.name: value}, signature.input_fields)
    given_arguments = methods.arguments(method(field), data)
    read = methods.read_arguments(method(field), given_arguments)
    assert comparable(read[field.name]) == comparable(ours(field, value))


@many
@given(fields("return").flatmap(lambda field: st.tuples(st.just(field), values_of(field))))
def test_what_is_written_the_sdk_reads(asked: tuple[MethodField, Any]) -> None:
    """Its client's `deserialize`, of the reply's data."""
    field, value = asked
    expected = ours(field, value)
    writer = ReplyWriter(SimpleNamespace(concepts=(), key=SimpleNamespace(app_id="main")))  # type: ignore[arg-type]
    data = Data.FromString(b"".join(writer._returned(Returned(expected), field)))
    signature = methods.signature(method(returns=field))
    read = sdk.deserialize(data, signature.output_fields, is_output=True)
    assert comparable(ours(field, read)) == comparable(expected)


@many
@given(st.lists(ASKED, min_size=2, max_size=3))
def test_several_arguments_keep_their_names(asked: list[tuple[MethodField, Any]]) -> None:
    """In any order: they are parts by name."""
    named = [
        (MethodField(f"x{index}", field.type, items=field.items), value) for index, (field, value) in enumerate(asked)
    ]
    called = method(*(field for field, _ in named))
    data = sdk.serialize({f.name: v for f, v in reversed(named)}, methods.signature(called).input_fields)
    read = methods.read_arguments(called, methods.arguments(called, data))
    assert comparable(read) == comparable({field.name: ours(field, value) for field, value in named})


# ---- signatures ------------------------------------------------------------------------------------------------------


@many
@given(fields("first"), fields("return"), st.sampled_from(MethodKind))
def test_the_sdk_reads_every_signature(argument: MethodField, returns: MethodField, kind: MethodKind) -> None:
    """As text, as JSON, as a script, and as the serializers it chooses by it."""
    made = Method("ask", "Asks.", (argument,), returns, kind)
    signature = methods.signature(made)
    assert sdk.get_method_signature(signature).startswith("def ask(first: ")
    assert "model.ask(" in code_script.generate_client_script([signature], "u", "a", "m")
    assert sdk.signatures_from_json(methods.signatures_json([made])) == {"ask": signature}
    sdk.serializer_from_signature(signature.input_fields[0])
    sdk.serializer_from_signature(signature.output_fields[0])


def _annotation(field: MethodField) -> Any:
    """The Python type that a model's author writes for a field."""
    kinds = {T.STR: str, T.BYTES: bytes, T.INT: int, T.FLOAT: float, T.BOOL: bool, T.NDARRAY: np.ndarray}
    kinds |= {T.JSON: data_types.JSON, T.TEXT: data_types.Text, T.IMAGE: data_types.Image, T.AUDIO: data_types.Audio}
    kinds |= {T.VIDEO: data_types.Video, T.CONCEPT: data_types.Concept, T.REGION: data_types.Region}
    kinds |= {T.FRAME: data_types.Frame}
    if field.type is T.LIST:
        return list[_annotation(field.items[0])]  # type: ignore[misc]
    if field.type is T.TUPLE:
        return tuple[tuple(map(_annotation, field.items))]  # type: ignore[misc]
    if field.type is T.NAMED_FIELDS:
        return data_types.NamedFields(**{item.name: _annotation(item) for item in field.items})
    return kinds[field.type]


@many
@given(fields("x", 2).filter(lambda field: field.type is not T.NAMED_FIELDS))
def test_a_signature_is_what_the_sdk_makes_of_the_same_types(field: MethodField) -> None:
    """Field for field: names of items, numbers of types, what is required."""
    assume("NAMED_FIELDS" not in repr(field))  # the SDK takes those as instances only
    theirs, _, _ = sdk.build_variable_signature("x", _annotation(field))
    assert methods.signature(method(field)).input_fields[0] == theirs


DEFAULTS: dict[FieldType, st.SearchStrategy[Any]] = {
    T.INT: st.integers(-(2**53), 2**53),
    T.FLOAT: st.floats(allow_nan=False, allow_infinity=False),
    T.BOOL: st.booleans(),
    T.STR: TEXTS,
    T.JSON: st.dictionaries(TEXTS, JSONS, max_size=2) | st.lists(JSONS, max_size=2),
}


@many
@given(st.sampled_from(list(DEFAULTS)).flatmap(lambda kind: st.tuples(st.just(kind), DEFAULTS[kind])))
def test_the_sdk_reads_every_default(case: tuple[FieldType, Any]) -> None:
    """As the value it stands for; the appliance reads the same when the argument is left out."""
    kind, default = case
    text = default if kind is T.STR else json.dumps(default)
    field = MethodField("x", kind, default=text)
    (published,) = methods.signature(method(field)).input_fields
    assert not published.required
    found = data_utils.Param.get_default(published)
    assert found == default or (kind is T.STR and found == json.loads(text))  # "5" it takes for a number
    assert methods.read_arguments(method(field), {}) == {"x": default}


def test_no_method_can_have_a_name_that_the_sdk_keeps() -> None:
    """Model looks at its own attributes and at the fields of the Model message first."""
    model = pytest.importorskip("clarifai.client.model").Model
    client = pytest.importorskip("clarifai.client.model_client").ModelClient
    names = {name for kind in (model, client) for name in dir(kind) if not name.startswith(("_", "async_"))}
    names |= set(resources_pb2.Model.DESCRIPTOR.fields_by_name)
    assert names - {"predict", "generate", "stream"} <= _TAKEN
    for name in _TAKEN:
        with pytest.raises(ValueError, match="stock SDK"):
            MethodSection(name=name, returns={"type": "int"})


# ---- the old form ----------------------------------------------------------------------------------------------------

OLD = {
    "text": st.builds(lambda text: {"text": resources_pb2.Text(raw=text)}, TEXTS.filter(bool)),
    "string_value": st.dictionaries(TEXTS, TEXTS, max_size=2).map(lambda found: {"string_value": json.dumps(found)}),
    "image": st.just({"image": resources_pb2.Image(base64=b"i")}),
    "audio": st.just({"audio": resources_pb2.Audio(base64=b"a")}),
    "video": st.just({"video": resources_pb2.Video(base64=b"v")}),
    "int_value": st.integers(-5, 5).map(lambda number: {"int_value": number}),
    "float_value": st.sampled_from([0.0, 0.5]).map(lambda number: {"float_value": number}),
    "bytes_value": st.binary(max_size=2).map(lambda body: {"bytes_value": body}),
    "bool_value": st.booleans().map(lambda flag: {"bool_value": flag}),
    "ndarray": st.just({"ndarray": resources_pb2.NDArray(buffer=b"\0\0\0\0", shape=[1], dtype="float32")}),
    "concepts": st.just({"concepts": [resources_pb2.Concept(id="c", name="c", value=0.5)]}),
    "regions": st.just({"regions": [resources_pb2.Region(id="r")]}),
    "frames": st.just({"frames": [resources_pb2.Frame(id="f")]}),
}
OLD_DATA = st.lists(st.sampled_from(list(OLD)), max_size=4, unique=True).flatmap(
    lambda names: st.tuples(*(OLD[name] for name in names)).map(
        lambda found: Data(**{k: v for f in found for k, v in f.items()})
    )
)
OLD_FIELDS = st.lists(st.tuples(st.sampled_from(sorted(ATOMS, key=str)), st.booleans()), min_size=1, max_size=3).map(
    lambda found: tuple(
        MethodField(f"x{i}", kind, default={T.INT: "7", T.STR: "d", T.FLOAT: "7.5"}[kind])
        if optional and kind in (T.INT, T.STR, T.FLOAT)
        else MethodField(f"x{i}", kind)
        for i, (kind, optional) in enumerate(found)
    )
)


@many
@given(OLD_FIELDS, OLD_DATA)
def test_an_input_of_the_old_form_is_understood_as_the_sdk_does(
    arguments: tuple[MethodField, ...], data: resources_pb2.Data
) -> None:
    """Its server's DataConverter fills the same arguments, and misses the same ones."""
    called = method(*arguments)
    copy = Data.FromString(data.SerializeToString())
    try:
        parts = data_utils.DataConverter.convert_input_data_to_new_format(copy, methods.signature(called).input_fields)
        given_arguments = {part.id: part.data for part in parts.parts}
        expected = methods.read_arguments(called, given_arguments)
    except ValueError:  # a required one is not set
        with pytest.raises(InvalidInput, match="is required but not set"):
            methods.read_old_form(called, data, struct_pb2.Struct())
        return
    assume(given_arguments or not data.ListFields())  # nothing fits: we say so, the SDK calls with defaults
    assert comparable(methods.read_old_form(called, data, struct_pb2.Struct())) == comparable(expected)


@many
@given(OLD_DATA, st.booleans())
def test_the_form_is_told_as_the_sdk_tells_it(data: resources_pb2.Data, parts: bool) -> None:
    """By parts; an input with nothing in it is neither."""
    if parts:
        data.parts.add(id="x")
    assume(data.ListFields())
    assert data_utils.DataConverter.is_old_format(data) is not methods.is_pythonic(data)


@many
@given(fields("return").flatmap(lambda field: st.tuples(st.just(field), values_of(field))))
def test_a_reply_in_the_old_form_is_what_the_sdk_would_make_of_it(asked: tuple[MethodField, Any]) -> None:
    """What was in the part stands in data itself, and a text is in text.raw too."""
    field, value = asked
    writer = ReplyWriter(SimpleNamespace(concepts=(), key=SimpleNamespace(app_id="main")))  # type: ignore[arg-type]
    result = Returned(ours(field, value))
    pythonic = Data.FromString(b"".join(writer._returned(result, field)))
    assert Data.FromString(
        b"".join(writer._data(result, field))
    ) == data_utils.DataConverter.convert_output_data_to_old_format(pythonic)


@many
@given(ATOMS[T.JSON])
def test_json_of_old_clients_is_a_text(value: Any) -> None:
    """Before 11.11 the SDK wrote `string_value`; a list came as it is."""
    field = MethodField("x", T.JSON)
    assert values.read(field, Data(string_value=json.dumps(value))) == value


@given(TEXTS)
def test_a_text_of_old_clients_is_in_text_raw(text: str) -> None:
    """For str and for Text."""
    data = Data(text=resources_pb2.Text(raw=text))
    assert values.read(MethodField("x", T.STR), data) == text
    assert values.read(MethodField("x", T.TEXT), data) == Media(text.encode())
