"""The OpenAPI document of the REST twin, made of the descriptors that its routes are made of.

It tells what is public anyway, Clarifai's messages and which of its RPCs are served, and nothing of this installation;
so it needs no credentials, as the tools that read it have none.

Source: OpenAPI Specification 3.1.1, JSON Schema 2020-12; protobuf.dev/programming-guides/json for the types.
"""

from collections.abc import Iterable
from typing import Any

from clarifai_grpc.grpc.api.status import status_pb2
from google.protobuf.descriptor import FieldDescriptor

from appliance import __version__
from appliance.api.bindings import Binding, bindings_of

_F = FieldDescriptor

Schema = dict[str, Any]

_SCALARS: dict[int, Schema] = {
    _F.TYPE_DOUBLE: {"type": "number", "format": "double"},
    _F.TYPE_FLOAT: {"type": "number", "format": "float"},
    _F.TYPE_BOOL: {"type": "boolean"},
    _F.TYPE_STRING: {"type": "string"},
    _F.TYPE_BYTES: {"type": "string", "contentEncoding": "base64"},
    _F.TYPE_INT32: {"type": "integer", "format": "int32"},
    _F.TYPE_SINT32: {"type": "integer", "format": "int32"},
    _F.TYPE_SFIXED32: {"type": "integer", "format": "int32"},
    _F.TYPE_UINT32: {"type": "integer", "minimum": 0, "maximum": 2**32 - 1},
    _F.TYPE_FIXED32: {"type": "integer", "minimum": 0, "maximum": 2**32 - 1},
}
_LONG: Schema = {"type": "string", "pattern": "^-?[0-9]+$"}
"""64-bit integers: JSON's numbers do not reach so far."""

_WELL_KNOWN: dict[str, Schema] = {
    "google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    "google.protobuf.Duration": {"type": "string", "pattern": r"^-?[0-9]+(\.[0-9]{1,9})?s$"},
    "google.protobuf.FieldMask": {"type": "string"},
    "google.protobuf.Struct": {"type": "object"},
    "google.protobuf.ListValue": {"type": "array"},
    "google.protobuf.Value": {},
    "google.protobuf.Empty": {"type": "object"},
    "google.protobuf.Any": {"type": "object"},
    "google.protobuf.BoolValue": {"type": ["boolean", "null"]},
    "google.protobuf.StringValue": {"type": ["string", "null"]},
    "google.protobuf.BytesValue": {"type": ["string", "null"], "contentEncoding": "base64"},
    "google.protobuf.DoubleValue": {"type": ["number", "null"]},
    "google.protobuf.FloatValue": {"type": ["number", "null"]},
    "google.protobuf.Int32Value": {"type": ["integer", "null"]},
    "google.protobuf.UInt32Value": {"type": ["integer", "null"]},
    "google.protobuf.Int64Value": {"type": ["string", "null"]},
    "google.protobuf.UInt64Value": {"type": ["string", "null"]},
}

_ERRORS = {
    "400": "The request is at fault; status.details says what to change.",
    "401": "No credentials, or ones that are not valid.",
    "403": "The caller may not do this.",
    "404": "There is no such model, version, type or user.",
    "409": "The deployment's model is held back, or not here.",
    "413": "The request, or an input of it, is too large.",
    "415": "The body is compressed; send it as it is.",
    "429": "Over the caller's rate or concurrency; see Retry-After.",
    "500": "The appliance or the model failed.",
    "503": "Loading, busy or stopping; see Retry-After.",
    "504": "The time for the call was over.",
}
_TITLE = "Clarifai's predict API, served by inference-appliance"


def document(rpcs: Iterable[Any]) -> Schema:
    """The document that describes these RPCs: descriptors of methods of Clarifai's service."""
    schemas = _Schemas()
    paths: dict[str, Schema] = {}
    for rpc in rpcs:
        for number, binding in enumerate(bindings_of(rpc)):
            operations = paths.setdefault(binding.template, {})
            operations.setdefault(binding.verb.lower(), _operation(binding, number, schemas))
    errors = {http: _error(text, schemas) for http, text in _ERRORS.items()}
    return {
        "openapi": "3.1.1",
        "info": {"title": _TITLE, "version": __version__},
        "servers": [{"url": "/"}],
        "security": [{"key": []}],
        "tags": [{"name": "V2"}],
        "paths": paths,
        "components": {
            "schemas": schemas.complete(),
            "responses": errors,
            "securitySchemes": {
                "key": {
                    "type": "apiKey",
                    "in": "header",
                    "name": "Authorization",
                    "description": "`Key <PAT>` or `Bearer <PAT>`; or a client certificate, where those are taken.",
                }
            },
        },
    }


def _operation(binding: Binding, number: int, schemas: "_Schemas") -> Schema:
    rpc = binding.rpc
    operation: Schema = {
        # One a document: the primary binding has the RPC's own name.
        "operationId": f"{rpc.name}{number + 1}" if number else rpc.name,
        "tags": ["V2"],
        "parameters": [_path_parameter(binding, names) for names in binding.variables],
        "responses": {"200": _reply(rpc, schemas), **_references(_ERRORS)},
    }
    if binding.body == "*":
        operation["requestBody"] = _body(schemas.reference(rpc.input_type), streamed=rpc.client_streaming)
    else:
        taken = set(binding.variables)
        query = [
            {"name": ".".join(names), "in": "query", "schema": schema}
            for names, schema in _query(rpc.input_type, schemas)
            if names not in taken and names[0] != binding.body
        ]
        operation["parameters"] += query
        if binding.body:
            field = rpc.input_type.fields_by_name[binding.body]
            operation["requestBody"] = _body(schemas.of_field(field), streamed=False)
    if not rpc.server_streaming and not rpc.client_streaming and "outputs" in rpc.output_type.fields_by_name:
        operation["responses"]["207"] = _reply(rpc, schemas, "Some of the inputs failed; each output has a status.")
    return operation


def _path_parameter(binding: Binding, names: tuple[str, ...]) -> Schema:
    message = binding.rpc.input_type
    for name in names[:-1]:
        message = message.fields_by_name[name].message_type
    schema = dict(_SCALARS.get(message.fields_by_name[names[-1]].type, {"type": "string"}))
    return {"name": ".".join(names), "in": "path", "required": True, "schema": schema}


def _query(
    message: Any, schemas: "_Schemas", names: tuple[str, ...] = ()
) -> "Iterable[tuple[tuple[str, ...], Schema]]":
    """What can be said of a message in a query: its single values, and those of messages in it, two levels deep."""
    for field in message.fields:
        inner = field.message_type
        if inner is None or inner.full_name in _WELL_KNOWN:
            yield (*names, field.name), schemas.of_field(field)
        elif not field.is_repeated and len(names) < 1:
            yield from _query(inner, schemas, (*names, field.name))


def _body(schema: Schema, *, streamed: bool) -> Schema:
    content = {"application/x-ndjson" if streamed else "application/json": {"schema": schema}}
    return {"required": True, "content": content}


def _reply(rpc: Any, schemas: "_Schemas", text: str = "The reply; status.code is 10000.") -> Schema:
    schema = schemas.reference(rpc.output_type)
    if not rpc.server_streaming:
        return {"description": text, "content": {"application/json": {"schema": schema}}}
    line = {"type": "object", "properties": {"result": schema, "error": {"type": "object"}, "status": {}}}
    return {"description": "A line of JSON a message.", "content": {"application/x-ndjson": {"schema": line}}}


def _error(text: str, schemas: "_Schemas") -> Schema:
    schema = schemas.reference(status_pb2.BaseResponse.DESCRIPTOR)
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def _references(names: Iterable[str]) -> Schema:
    return {name: {"$ref": f"#/components/responses/{name}"} for name in names}


class _Schemas:
    """The schemas of all messages that were referred to."""

    def __init__(self) -> None:
        self._made: dict[str, Schema] = {}
        self._waiting: list[Any] = []
        self._known: set[str] = set()

    def complete(self) -> dict[str, Schema]:
        """All of them, and those that they refer to, by name."""
        while self._waiting:
            message = self._waiting.pop()
            properties = {field.name: self.of_field(field) for field in message.fields}
            self._made[message.full_name] = {"type": "object", "properties": properties}
        return dict(sorted(self._made.items()))

    def reference(self, message: Any) -> Schema:
        """A message where it is used: a reference, so that messages may contain themselves."""
        known = _WELL_KNOWN.get(message.full_name)
        if known is not None:
            return dict(known)
        if message.full_name not in self._known:
            self._known.add(message.full_name)
            self._waiting.append(message)
        return {"$ref": f"#/components/schemas/{message.full_name}"}

    def of_field(self, field: Any) -> Schema:
        """A field's schema."""
        inner = field.message_type
        if inner is not None and inner.GetOptions().map_entry:
            return {"type": "object", "additionalProperties": self._of_value(inner.fields_by_name["value"])}
        value = self._of_value(field)
        schema = {"type": "array", "items": value} if field.is_repeated else value
        # A reference has no neighbours that every tool reads.
        return {**schema, "deprecated": True} if field.GetOptions().deprecated and "$ref" not in schema else schema

    def _of_value(self, field: Any) -> Schema:
        if field.message_type is not None:
            return self.reference(field.message_type)
        if field.enum_type is not None:
            return _enum(field.enum_type)
        return dict(_SCALARS.get(field.type, _LONG))


def _enum(enum: Any) -> Schema:
    """A number; requests may name it instead. What the numbers mean is said where there are few of them."""
    schema: Schema = {"type": ["integer", "string"]}
    if len(enum.values) <= 32:
        schema["description"] = ", ".join(f"{value.number} {value.name}" for value in enum.values)
    return schema
