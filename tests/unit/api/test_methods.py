"""The method protocol: what is published, and how a pythonic call's arguments are read."""

import json
from typing import Any

import pytest
from clarifai_grpc.grpc.api import resources_pb2
from google.protobuf import json_format

from appliance.api import methods
from appliance.api.limits import Asked
from appliance.catalog.sections import EmbeddingOutput, ImageInput, ScoresOutput
from appliance.core.errors import InvalidArgument, InvalidInput
from appliance.core.types import FieldType, Method, MethodField
from appliance.engine.session import TensorSpec
from appliance.tasks.base import ImageSide
from appliance.tasks.classifier import Classifier
from appliance.tasks.embedder import Embedder
from appliance.tasks.tensors import RawTensors

Data = resources_pb2.Data
SIDE = ImageSide(ImageInput(input="image", size=(1, 1)), True)
CLASSIFIER = Classifier(SIDE, ScoresOutput(output="y", activation="none"), True, 20).method
EMBEDDER = Embedder(SIDE, EmbeddingOutput(output="y"), True).method


def raw(*outputs: str) -> Method:
    """A raw model with inputs a and b and these outputs."""

    def spec(name: str) -> TensorSpec:
        import numpy as np

        return TensorSpec(name, np.dtype(np.float32), (None, 2))

    return RawTensors((spec("a"), spec("b")), tuple(spec(name) for name in outputs)).method


def data(**parts: Any) -> Any:
    """A pythonic input's data: argument name → its value as Data fields."""
    message = Data()
    message.metadata[methods.METHOD_KEY] = "predict"
    for name, value in parts.items():
        message.parts.add(id=name).data.CopyFrom(value if isinstance(value, Data) else Data(**value))
    return message


# ---- what is published -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [CLASSIFIER, EMBEDDER, raw("sum"), raw("sum", "product")])
def test_a_signature_has_the_numbers_of_the_protocol(method: Method) -> None:
    """Unary, named predict, one output named return; only arguments are required (PROTOCOL 4.1)."""
    message = methods.signature(method)
    assert message.name == "predict"
    assert message.method_type == 1
    assert message.description
    assert [field.name for field in message.output_fields] == ["return"]
    assert not message.output_fields[0].required
    assert not any(field.iterator for field in (*message.input_fields, *message.output_fields))
    for field in message.input_fields:
        assert field.required == (not field.default)


def test_the_signature_of_a_classifier() -> None:
    """The picture, then what output_config would say; defaults as JSON, a list of concepts comes back."""
    message = methods.signature(CLASSIFIER)
    described = [
        (f.name, f.type, f.required, f.default, [(a.name, a.type) for a in f.type_args]) for f in message.input_fields
    ]
    assert described == [
        ("image", 9, True, "", []),
        ("max_concepts", 3, False, "20", []),
        ("min_value", 4, False, "0.0", []),
        ("select_concepts", 17, False, "[]", [("select_concepts_item", 1)]),
    ]
    (returned,) = message.output_fields
    assert (returned.type, [(a.name, a.type) for a in returned.type_args]) == (17, [("return_item", 10)])
    for field in message.input_fields[1:]:
        json.loads(field.default)


def test_the_signature_of_an_embedder_is_an_array() -> None:
    """Number 6."""
    message = methods.signature(EMBEDDER)
    assert [(f.name, f.type) for f in message.input_fields] == [("image", 9)]
    assert message.output_fields[0].type == 6


def test_the_signature_of_a_raw_model_names_its_tensors() -> None:
    """One array, or named fields of arrays (15)."""
    assert [(f.name, f.type) for f in methods.signature(raw("sum")).input_fields] == [("a", 6), ("b", 6)]
    assert methods.signature(raw("sum")).output_fields[0].type == 6
    (returned,) = methods.signature(raw("sum", "product")).output_fields
    assert (returned.type, [(a.name, a.type) for a in returned.type_args]) == (15, [("sum", 6), ("product", 6)])


@pytest.mark.parametrize("kind", list(FieldType))
def test_every_type_has_its_number(kind: FieldType) -> None:
    """By Clarifai's own name."""
    method = Method("m", "", (MethodField("x", kind),), MethodField("return", kind))
    number = resources_pb2.ModelTypeField.DataType.Value(kind.value)
    assert methods.signature(method).input_fields[0].type == number


def test_get_signatures_answers_proto_json() -> None:
    """Method name → the same signature, in camelCase (PROTOCOL 2.2)."""
    content = json.loads(methods.signatures_json([CLASSIFIER]))
    assert list(content) == ["predict"]
    assert "inputFields" in content["predict"]
    parsed = json_format.ParseDict(content["predict"], resources_pb2.MethodSignature())
    assert parsed == methods.signature(CLASSIFIER)


# ---- which form ------------------------------------------------------------------------------------------------------


def test_an_input_that_names_a_method_is_pythonic() -> None:
    """By the metadata key, whatever else is there."""
    assert methods.method_name(data()) == "predict"
    assert methods.method_name(Data()) == ""
    other = Data()
    other.metadata["source"] = "camera 3"
    assert methods.method_name(other) == ""


@pytest.mark.parametrize("value", [1.0, True, None, [], {}])
def test_a_method_name_that_is_no_text_is_none(value: Any) -> None:
    """Somebody's own metadata, by accident."""
    message = Data()
    message.metadata[methods.METHOD_KEY] = value
    assert methods.method_name(message) == ""


# ---- arguments -------------------------------------------------------------------------------------------------------

IMAGE = Data(image=resources_pb2.Image(base64=b"png"))


def test_arguments_come_by_name() -> None:
    """In any order."""
    given = methods.arguments(CLASSIFIER, data(max_concepts={"int_value": 3}, image=IMAGE))
    assert set(given) == {"image", "max_concepts"}
    assert given["image"] == IMAGE


def test_the_first_argument_may_stand_in_data_itself() -> None:
    """Inlined, without parts (PROTOCOL 4.2)."""
    message = Data(image=resources_pb2.Image(base64=b"png"))
    message.metadata[methods.METHOD_KEY] = "predict"
    assert methods.arguments(CLASSIFIER, message)["image"].image.base64 == b"png"


def check(method: Method, message: Any) -> None:
    """See whether a call is complete."""
    methods.check_complete(method, methods.arguments(method, message))


def test_a_missing_argument_is_named() -> None:
    """In Clarifai's own words."""
    with pytest.raises(InvalidInput, match="Missing required field: image"):
        check(CLASSIFIER, data(max_concepts={"int_value": 3}))
    with pytest.raises(InvalidInput, match="Missing required field: b"):
        check(raw("sum"), data(a={}))
    with pytest.raises(InvalidInput, match="Missing required field: a"):
        check(raw("sum"), data())


def test_an_unknown_argument_is_named_with_the_known_ones() -> None:
    """A typo must not be ignored."""
    with pytest.raises(
        InvalidInput, match="no argument 'max_concept'; it takes image, max_concepts, min_value, select"
    ):
        methods.arguments(CLASSIFIER, data(image=IMAGE, max_concept={"int_value": 3}))


# ---- limits as arguments ---------------------------------------------------------------------------------------------


def asked(**parts: Any) -> Asked:
    """What these arguments ask for."""
    return methods.asked_by_arguments(methods.arguments(CLASSIFIER, data(image=IMAGE, **parts)))


def texts(*values: str) -> Any:
    """A list of texts."""
    message = Data()
    for value in values:
        message.parts.add().data.string_value = value
    return message


def test_without_arguments_nothing_is_asked() -> None:
    """The defaults hold."""
    assert asked() == Asked()


@pytest.mark.parametrize("value", [{"int_value": 7}, {"float_value": 7.0}])
def test_whole_numbers_may_come_as_floats(value: Any) -> None:
    """As everything does that went through JSON."""
    assert asked(max_concepts=value).max_concepts == 7


@pytest.mark.parametrize("value", [{"float_value": 0.25}, {"int_value": 1}, {}, {"float_value": 0.0}])
def test_numbers_may_come_as_integers(value: Any) -> None:
    """And a zero is not on the wire."""
    wanted = value.get("float_value", value.get("int_value", 0))
    assert asked(min_value=value).min_value == wanted


@pytest.mark.parametrize("value", [{}, {"int_value": 0}, {"int_value": -3}, {"float_value": -3.0}])
def test_zero_concepts_said_out_loud_are_refused(value: Any) -> None:
    """An argument that is given means what it says."""
    with pytest.raises(InvalidArgument, match="must be at least 1"):
        asked(max_concepts=value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_concepts", {"float_value": 2.5}),
        ("max_concepts", {"float_value": float("nan")}),
        ("max_concepts", {"float_value": float("inf")}),
        ("max_concepts", {"string_value": "3"}),
        ("max_concepts", {"bool_value": True}),
        ("max_concepts", {"int_value": 3, "float_value": 4.0}),
        ("min_value", {"string_value": "0.5"}),
        ("min_value", {"bool_value": True}),
        ("select_concepts", {"string_value": "cat"}),
        ("select_concepts", {"int_value": 3}),
    ],
)
def test_an_argument_of_the_wrong_type_is_named(name: str, value: Any) -> None:
    """With what it must be."""
    with pytest.raises(InvalidArgument, match=rf"^{name} (is .*; it )?must be a"):
        asked(**{name: value})


def test_a_list_of_numbers_is_no_list_of_texts() -> None:
    """Ids and names are texts."""
    message = Data()
    message.parts.add().data.int_value = 3
    with pytest.raises(InvalidArgument, match="select_concepts must be a list of texts; it came as int_value"):
        asked(select_concepts=message)


def test_selected_concepts_are_ids_or_names() -> None:
    """Each may be either; an empty list selects nothing, so everything."""
    assert asked(select_concepts=texts("cat", "c-dog")).select == (("cat", "cat"), ("c-dog", "c-dog"))
    assert asked(select_concepts=texts()).select == ()
