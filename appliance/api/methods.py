"""The method protocol: how methods are published, and how a call's arguments are read.

A request that names a method (`data.metadata._method_name`) carries its arguments as parts, by name; one that does not
is of the old form, its content at the top of `data`. Both reach the same task (PROTOCOL 4).
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from clarifai_grpc.grpc.api import resources_pb2
from google.protobuf import json_format, struct_pb2

from appliance.api import values
from appliance.api.contents import HERE, NOTHING, Contents, Fields
from appliance.api.limits import Asked
from appliance.core.errors import InvalidArgument, InvalidInput
from appliance.core.types import FieldType, Method, MethodField, Value
from appliance.tasks.classifier import MAX_CONCEPTS, MIN_VALUE, SELECT_CONCEPTS, limit_arguments

METHOD_KEY = "_method_name"
GET_SIGNATURES = "_GET_SIGNATURES"

_TYPES: dict[FieldType, int] = {kind: resources_pb2.ModelTypeField.DataType.Value(kind.value) for kind in FieldType}


def signature(method: Method) -> resources_pb2.MethodSignature:
    """The method as clients read it."""
    return resources_pb2.MethodSignature(
        name=method.name,
        method_type=resources_pb2.RunnerMethodType.Value(method.kind.value),
        description=method.description,
        input_fields=[_field(argument, is_input=True) for argument in method.arguments],
        output_fields=[_field(method.returns, is_input=False)],
    )


def signatures_json(methods: Iterable[Method]) -> str:
    """What `_GET_SIGNATURES` answers: a JSON object of method name → signature in camelCase proto-JSON."""
    return json.dumps({method.name: json_format.MessageToDict(signature(method)) for method in methods})


def _field(field: MethodField, *, is_input: bool) -> resources_pb2.ModelTypeField:
    message = resources_pb2.ModelTypeField(
        name=field.name,
        type=_TYPES[field.type],
        description=field.description,
        required=is_input and field.default is None,
        type_args=[_field(item, is_input=False) for item in field.items],
        iterator=field.iterator,
        model_type_enum_options=[resources_pb2.ModelTypeEnumOption(id=choice) for choice in field.choices],
    )
    if field.default is not None:
        message.default = field.default
    if field.range is not None:
        message.model_type_range_info.min, message.model_type_range_info.max = field.range
    return message


def method_name(data: resources_pb2.Data) -> str:
    """The method that an input names, "" when it is of the old form."""
    if not data.HasField("metadata") or METHOD_KEY not in data.metadata.fields:
        return ""
    return data.metadata.fields[METHOD_KEY].string_value


def is_pythonic(data: resources_pb2.Data) -> bool:
    """Whether an input is of the method protocol: it names a method, or brings arguments as parts (PROTOCOL 4.3)."""
    return bool(data.parts) or bool(method_name(data))


def arguments(method: Method, data: resources_pb2.Data) -> Mapping[str, resources_pb2.Data]:
    """A pythonic call's arguments by name, as many as there are.

    Raises: InvalidInput: one is unknown, or is there twice.
    """
    # Some clients send an empty part where there are no arguments.
    parts = [part for part in data.parts if part.id or part.data.ListFields()]
    given = {part.id: part.data for part in parts}
    inlined = {descriptor.name for descriptor, _ in data.ListFields()} - {"metadata", "parts"}
    if not given and inlined and method.arguments:
        return {method.arguments[0].name: data}  # the first argument may stand in data itself
    known = {argument.name for argument in method.arguments}
    for name in given:
        if name not in known:
            takes = ", ".join(sorted(known)) or "none"
            raise InvalidInput(f"Method {method.name!r} has no argument {name[:80]!r}; it takes {takes}.")
    if len(given) < len(parts):
        raise InvalidInput(f"Method {method.name!r} was given an argument twice; give each one once.")
    return given


def check_complete(method: Method, given: Mapping[str, resources_pb2.Data]) -> None:
    """Raises: InvalidInput: an argument without a default is missing."""
    for argument in method.arguments:
        if argument.default is None and argument.name not in given:
            raise InvalidInput(f"Missing required field: {argument.name}; method {method.name!r} takes it.")


def contents_of(
    method: Method, data: resources_pb2.Data, given: Mapping[str, resources_pb2.Data], contents: Contents
) -> Mapping[str, Fields]:
    """What was left out of the arguments, by their names; `given` is what `arguments` found in `data`."""
    named = {data.parts[part].id: found for part, found in contents.items() if part != HERE}
    if HERE in contents and method.arguments and given.get(method.arguments[0].name) is data:
        named[method.arguments[0].name] = contents[HERE]
    return named


def read_arguments(
    method: Method,
    given: Mapping[str, resources_pb2.Data],
    contents: Mapping[str, Fields] = NOTHING,
) -> dict[str, Value]:
    """Their values, defaults filled in.

    Args:    contents: what was left out of them, by their names.
    Raises:  InvalidInput: one is of another type than the signature says.
    """
    return {
        argument.name: values.read(argument, given[argument.name], contents.get(argument.name, NOTHING))
        if argument.name in given
        else values.default_of(argument)
        for argument in method.arguments
    }


def read_old_form(
    method: Method, data: resources_pb2.Data, params: struct_pb2.Struct, contents: Contents = NOTHING
) -> dict[str, Value]:
    """The values of an input of the old form: each argument takes what is of its type, `params` the rest.

    Args:    contents: what was left out of `data`.
    Raises: InvalidInput: a required argument is not there.
    """
    left = {descriptor.name for descriptor, _ in data.ListFields()} - {"metadata"}
    sent = set(left)
    read: dict[str, Value] = {}
    for argument in method.arguments:
        source = next((name for name in values.sources(argument) if name in left), None)
        if source is not None:
            left.discard(source)
            read[argument.name] = values.read_from(argument, data, source, contents.get(HERE, NOTHING))
        elif argument.name in params.fields:
            read[argument.name] = values.from_json(argument, _param(params, argument.name))
        elif argument.default is not None:
            read[argument.name] = values.default_of(argument)
        else:
            fields = " or ".join(f"data.{name}" for name in values.sources(argument))
            raise InvalidInput(
                f"Field {argument.name} is required but not set; method {method.name!r} takes "
                + (f"it from {fields}." if fields else f"it as a part with the id {argument.name!r}.")
            )
    # What more an input carries is let be, as the platform does; where nothing of it was of use, it was a mistake.
    if sent and left == sent:
        raise InvalidInput(f"Method {method.name!r} takes nothing from data.{min(sent)}; see its signature.")
    return read


def check_params(method: Method, params: struct_pb2.Struct) -> None:
    """See that `inference_params` names arguments of the method, and gives them such values.

    Raises: InvalidArgument.
    """
    known = {argument.name: argument for argument in method.arguments}
    for name in params.fields:
        if name not in known:
            raise InvalidArgument(
                f"inference_params: the model has no parameter {name[:80]!r}; it has {', '.join(sorted(known))}."
            )
        try:
            values.from_json(known[name], _param(params, name))
        except InvalidInput as error:
            raise InvalidArgument(f"inference_params: {error}") from error


def _param(params: struct_pb2.Struct, name: str) -> Any:
    field = params.fields[name]
    try:
        return json_format.MessageToDict(field)
    except (ValueError, RecursionError) as error:  # not finite, say
        raise InvalidArgument(f"inference_params: {name} is not finite.") from error


def asked_by_params(params: struct_pb2.Struct) -> Asked:
    """The limits among `inference_params`, which are checked. Raises: InvalidArgument: one is out of range."""
    found = {
        argument.name: values.from_json(argument, _param(params, argument.name))
        for argument in limit_arguments(1)
        if argument.name in params.fields
    }
    select = [(text, text) for text in found.get(SELECT_CONCEPTS, ())]
    return _asked(found.get(MAX_CONCEPTS), found.get(MIN_VALUE), select)


def asked_by_arguments(given: Mapping[str, resources_pb2.Data]) -> Asked:
    """The limits that a pythonic call gives as arguments.

    Raises: InvalidArgument: one has the wrong type, or max_concepts is 0 said out loud.
    """
    max_concepts = _integer(given, MAX_CONCEPTS)
    return _asked(max_concepts, _number(given, MIN_VALUE), _texts(given, SELECT_CONCEPTS))


def _asked(max_concepts: int | None, min_value: float | None, select: list[tuple[str, str]]) -> Asked:
    if max_concepts is not None and max_concepts < 1:
        raise InvalidArgument(f"max_concepts is {max_concepts}; it must be at least 1.")
    return Asked(max_concepts or 0, min_value or 0.0, tuple(select))


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
