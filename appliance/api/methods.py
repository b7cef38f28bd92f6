"""The method protocol: how a task's method is published, and how a pythonic call's arguments are read.

A request that names a method (`data.metadata._method_name`) carries its arguments as parts, by name; one that does not
is of the old form, its content at the top of `data`. Both reach the same task (PROTOCOL 4).
"""

import json
import math
from collections.abc import Mapping

from clarifai_grpc.grpc.api import resources_pb2
from google.protobuf import json_format

from appliance.api.limits import Asked
from appliance.core.errors import InvalidArgument, InvalidInput, UnknownMethod
from appliance.core.types import FieldType, Method, MethodField
from appliance.tasks.classifier import MAX_CONCEPTS, MIN_VALUE, SELECT_CONCEPTS

METHOD_KEY = "_method_name"
GET_SIGNATURES = "_GET_SIGNATURES"

_TYPES: dict[FieldType, int] = {kind: resources_pb2.ModelTypeField.DataType.Value(kind.value) for kind in FieldType}


def signature(method: Method) -> resources_pb2.MethodSignature:
    """The method as clients read it."""
    return resources_pb2.MethodSignature(
        name=method.name,
        method_type=resources_pb2.RunnerMethodType.UNARY_UNARY,
        description=method.description,
        input_fields=[_field(argument, is_input=True) for argument in method.arguments],
        output_fields=[_field(method.returns, is_input=False)],
    )


def signatures_json(method: Method) -> str:
    """What `_GET_SIGNATURES` answers: a JSON object of method name → signature in camelCase proto-JSON."""
    return json.dumps({method.name: json_format.MessageToDict(signature(method))})


def _field(field: MethodField, *, is_input: bool) -> resources_pb2.ModelTypeField:
    message = resources_pb2.ModelTypeField(
        name=field.name,
        type=_TYPES[field.type],
        description=field.description,
        required=is_input and field.default is None,
        type_args=[_field(item, is_input=False) for item in field.items],
    )
    if field.default is not None:
        message.default = field.default
    return message


def method_name(data: resources_pb2.Data) -> str:
    """The method that an input names, "" when it is of the old form."""
    if not data.HasField("metadata") or METHOD_KEY not in data.metadata.fields:
        return ""
    return data.metadata.fields[METHOD_KEY].string_value


def arguments(method: Method, name: str, data: resources_pb2.Data) -> Mapping[str, resources_pb2.Data]:
    """A pythonic call's arguments by name.

    Raises: UnknownMethod. InvalidInput: a required argument is missing, or one is unknown.
    """
    if name != method.name:
        raise UnknownMethod(name, (method.name,))
    given = {part.id: part.data for part in data.parts}
    required = [argument for argument in method.arguments if argument.default is None]
    if not given and len(required) == 1:
        return {required[0].name: data}  # the first argument may stand in data itself
    known = {argument.name for argument in method.arguments}
    for argument in required:
        if argument.name not in given:
            raise InvalidInput(f"Missing required field: {argument.name}; method {name!r} takes it.")
    for extra in given:
        if extra not in known:
            raise InvalidInput(f"Method {name!r} has no argument {extra!r}; it takes {', '.join(sorted(known))}.")
    return given


def asked_by_arguments(given: Mapping[str, resources_pb2.Data]) -> Asked:
    """The limits that a pythonic call gives as arguments.

    Raises: InvalidArgument: one has the wrong type, or max_concepts is 0 said out loud.
    """
    max_concepts = _integer(given, MAX_CONCEPTS)
    if max_concepts is not None and max_concepts < 1:
        raise InvalidArgument(f"max_concepts is {max_concepts}; it must be at least 1.")
    return Asked(
        max_concepts=max_concepts or 0,
        min_value=_number(given, MIN_VALUE) or 0.0,
        select=tuple(_texts(given, SELECT_CONCEPTS)),
    )


def _integer(given: Mapping[str, resources_pb2.Data], name: str) -> int | None:
    if name not in given:
        return None
    data = given[name]
    if data.float_value and not data.int_value:
        if not math.isfinite(data.float_value) or data.float_value != int(data.float_value):
            raise InvalidArgument(f"{name} is {data.float_value:g}; it must be a whole number.")
        return int(data.float_value)
    _check_kind(data, name, "int_value", "a whole number")
    return data.int_value


def _number(given: Mapping[str, resources_pb2.Data], name: str) -> float | None:
    if name not in given:
        return None
    data = given[name]
    if data.int_value:
        return float(data.int_value)
    _check_kind(data, name, "float_value", "a number")
    return data.float_value


def _texts(given: Mapping[str, resources_pb2.Data], name: str) -> list[tuple[str, str]]:
    if name not in given:
        return []
    wanted = []
    for part in given[name].parts:
        _check_kind(part.data, name, "string_value", "a list of texts")
        wanted.append((part.data.string_value, part.data.string_value))
    if not given[name].parts and given[name].ListFields():
        raise InvalidArgument(f"{name} must be a list of texts.")
    return wanted


def _check_kind(data: resources_pb2.Data, name: str, field: str, words: str) -> None:
    """A value of zero is not on the wire, so an empty message is that; anything else set is a wrong type."""
    others = [descriptor.name for descriptor, _ in data.ListFields() if descriptor.name != field]
    if others:
        raise InvalidArgument(f"{name} must be {words}; it came as {others[0]}.")
