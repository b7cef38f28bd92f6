"""Methods that a bundle declares: a name, typed arguments ↔ graph inputs, a return value ↔ graph outputs.

So `model.analyze(image=…, threshold=0.3)` is configuration, not code. Which array each type becomes, and which value is
made of an output, is told in models/README.md; `tasks/declared.py` does it.
"""

import json
import keyword
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from appliance.catalog.sections import Finite, InsidePath, Part, Picture, TextInput
from appliance.core.types import FieldType

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_RESERVED = frozenset({"with_proto", "self", "cls"})
"""Names that the stock SDK keeps for itself (PROTOCOL 4.2)."""

_SDK_NAMES = """
STUB async_client async_stub auth_helper available_methods base client convert_string_to_timestamp create_version
create_version_by_file create_version_by_url delete_version deployment_user_id evaluate export fetch from_auth_helper
from_current_context from_env from_local_grpc generate_by_bytes generate_by_filepath generate_by_url
generate_client_script get_eval_by_dataset get_eval_by_id get_latest_eval get_param_info get_params get_raw_eval
input_types kwargs list_evaluations list_pages_generator list_training_templates list_versions load_info
load_input_types logger method_signature model_info pat patch_version predict_by_bytes predict_by_filepath
predict_by_url process_response_keys request_template root_certificates_path stream_by_bytes stream_by_filepath
stream_by_url token train training_params training_status update_params userDataObject user_app_id
"""
"""What the stock SDK's Model and its client have of their own; `generate` and `stream` may be declared, see below."""

_MODEL_FIELDS = """
app_id billing_type bookmark_origin check_consents created_at creator default_eval_info deploy_restriction description
display_name featured_order id image is_starred languages languages_full license_type metadata model_type_id
model_version modified_at name notes open_router_info output_info presets replica_count source star_count task toolkits
use_cases user_id version_count visibility workflow_recommended
"""
"""Fields of Clarifai's Model message, which the SDK's Model looks at before its methods."""

_TAKEN = frozenset((*_SDK_NAMES.split(), *_MODEL_FIELDS.split()))
"""Names that no method could be called by; a test holds them against the stock SDK."""

LIMITS = frozenset({"max_concepts", "min_value", "select_concepts"})
"""Arguments that every method returning concepts has by itself: what `output_config` says in the old form."""

_LIST = re.compile(r"list\[(.+)\]")
_TYPES = {kind.value.lower(): kind for kind in FieldType} | {"json": FieldType.JSON}
_TYPES = {name: kind for name, kind in _TYPES.items() if name not in ("json_data", "list")}
_NESTED = 4
"""Lists in lists in lists: more axes than any graph has."""

_NUMBERS = (FieldType.INT, FieldType.FLOAT)
_TEXTS = (FieldType.STR, FieldType.TEXT)
_PICTURES = (FieldType.IMAGE, FieldType.FRAME)
_GROUPS = (FieldType.TUPLE, FieldType.NAMED_FIELDS)
_WITH_DEFAULT = (*_NUMBERS, FieldType.BOOL, FieldType.STR, FieldType.JSON)

_ARGUMENT_KEYS = {
    "image": _PICTURES,
    "text": _TEXTS,
    "choices": _TEXTS,
    "range": _NUMBERS,
    "box": (FieldType.REGION,),
    "sample_rate": (FieldType.AUDIO,),
    "items": _GROUPS,
    "default": _WITH_DEFAULT,
}
_RETURN_KEYS = {
    "activation": (FieldType.CONCEPT,),
    "scores": (FieldType.REGION,),
    "labels": (FieldType.REGION,),
    "box": (FieldType.REGION,),
    "box_size": (FieldType.REGION,),
    "min_score": (FieldType.REGION,),
    "choices": _TEXTS,
    "layout": _PICTURES,
    "scale": _PICTURES,
    "sample_rate": (FieldType.AUDIO,),
    "items": _GROUPS,
}
"""Key → the types that it means something for."""


def _type(value: str) -> str:
    parse_type(value)
    return value


def parse_type(text: str) -> tuple[FieldType, int]:
    """`list[list[float]]` → FLOAT, 2. Raises: ValueError: no such type."""
    depth = 0
    inner = text.replace(" ", "")
    while match := _LIST.fullmatch(inner):
        inner, depth = match[1], depth + 1
    if inner not in _TYPES or depth > _NESTED:
        raise ValueError(f"{text[:80]!r} is not a type; there are {', '.join(sorted(_TYPES))} and list[…] of them")
    if depth and _TYPES[inner] in _GROUPS:
        raise ValueError(f"{text[:80]!r}: a list of {inner} is not served; give each item its own list")
    return _TYPES[inner], depth


TypeName = Annotated[str, AfterValidator(_type)]


def _identifier(value: str) -> str:
    if not _IDENTIFIER.fullmatch(value) or keyword.iskeyword(value) or value in _RESERVED:
        raise ValueError(f"{value[:80]!r} cannot be a name in Python, or is kept for the SDK; use another one")
    return value


def _method_name(value: str) -> str:
    _identifier(value)
    if value in _TAKEN or value.startswith(("async_", "_")):
        raise ValueError(f"{value!r} is a name that the stock SDK has for something else; use another one")
    return value


MethodName = Annotated[str, AfterValidator(_method_name)]


class _Typed(Part):
    """What arguments, return values and their items have in common."""

    type: TypeName
    description: str = ""

    @property
    def kind(self) -> FieldType:
        """The type, without the lists around it."""
        return parse_type(self.type)[0]

    @property
    def depth(self) -> int:
        """How many lists are around it."""
        return parse_type(self.type)[1]

    def _check_keys(self, label: str, keys: Mapping[str, tuple[FieldType, ...]]) -> None:
        """Raises: ValueError: a key is there that means nothing for this type."""
        for key, kinds in keys.items():
            if self.kind not in kinds and getattr(self, key) != type(self).model_fields[key].default:
                names = ", ".join(kind.value.lower().removesuffix("_data") for kind in kinds)
                raise ValueError(f"{label}: {key} is for {names}; {self.type} has none, so remove it")


class ArgumentSection(_Typed):
    """One argument of a declared method, or an item of one."""

    name: str = ""
    input: str = ""
    default: Any = None
    range: tuple[Finite, Finite] | None = None
    choices: tuple[str, ...] = ()
    iterator: bool = False
    image: Picture | None = None
    text: TextInput | None = None
    box: Literal["xyxy", "yxyx"] = "xyxy"
    sample_rate: Annotated[int, Field(ge=1, le=768_000)] | None = None
    items: tuple["ArgumentSection", ...] = ()

    @property
    def fed(self) -> str:
        """The graph input it goes to."""
        return self.input or self.name

    @model_validator(mode="after")
    def _check(self) -> Self:
        kind, label = self.kind, self.name or self.input or "an item"
        self._check_keys(label, _ARGUMENT_KEYS)
        if kind in _GROUPS and not self.items:
            raise ValueError(f"{label}: {self.type} needs items")
        if kind in _GROUPS and self.input:
            raise ValueError(f"{label}: input belongs to each of its items")
        if kind in _PICTURES and self.image is None:
            raise ValueError(f"{label}: {self.type} needs image, which says how the graph wants its picture")
        if kind in _TEXTS:
            if bool(self.choices) == bool(self.text):
                raise ValueError(f"{label}: {self.type} needs text (a tokenizer) or choices, one of them")
            if self.text and self.depth:
                raise ValueError(f"{label}: the graph takes one text an input; use {kind.value.lower()}, no list")
            if self.text and self.input:
                raise ValueError(f"{label}: text.inputs says where token ids go; remove input")
        if kind is FieldType.AUDIO and self.sample_rate is None:
            raise ValueError(f"{label}: {self.type} needs sample_rate, the samples a second that the graph takes")
        if kind is FieldType.CONCEPT and self.depth > 1:
            raise ValueError(f"{label}: concepts are concept (one) or list[concept]")
        if self.range is not None and self.range[0] > self.range[1]:
            raise ValueError(f"{label}: range is [least, largest], and {list(self.range)} is not")
        if self.default is not None:
            if self.iterator:
                raise ValueError(
                    f"{label}: each message brings an item of an iterator, so it has no default; remove it"
                )
            self._check_default(self.default, self.depth, label)
        return self

    def _check_default(self, value: Any, depth: int, label: str) -> None:
        if depth:
            if not isinstance(value, list):
                raise ValueError(f"{label}: default must be a list, as the type is {self.type}")
            for item in value:
                self._check_default(item, depth - 1, label)
            return
        if not _FITS[self.kind](value):
            raise ValueError(f"{label}: default {str(value)[:80]!r} is not of type {self.type}")
        if self.range is not None and not self.range[0] <= value <= self.range[1]:
            raise ValueError(f"{label}: default {value} is not in range {list(self.range)}")
        if self.choices and value not in self.choices:
            raise ValueError(f"{label}: default {value[:80]!r} is not one of choices")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):  # a date, say, which YAML has
        return False
    return isinstance(value, dict | list)


_FITS: dict[FieldType, Callable[[Any], bool]] = {
    FieldType.INT: lambda value: _is_number(value) and isinstance(value, int) and abs(value) < 2**63,
    FieldType.FLOAT: _is_number,
    FieldType.BOOL: lambda value: isinstance(value, bool),
    FieldType.STR: lambda value: isinstance(value, str),
    FieldType.JSON: _is_json,
}
"""Type that may have a default → whether a value of YAML is of that type."""


class ReturnSection(_Typed):
    """What a declared method returns, or an item of it."""

    name: str = ""
    output: str = ""
    iterator: bool = False
    activation: Literal["softmax", "sigmoid", "none"] = "none"
    scores: str = ""
    labels: str = ""
    box: Literal["xyxy", "yxyx", "cxcywh"] = "xyxy"
    box_size: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] | None = None
    min_score: Finite | str | None = None
    choices: tuple[str, ...] = ()
    layout: Literal["nchw", "nhwc"] = "nchw"
    scale: Finite = 255.0
    sample_rate: Annotated[int, Field(ge=1, le=768_000)] | None = None
    items: tuple["ReturnSection", ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        kind, label = self.kind, self.name or "returns"
        self._check_keys(label, _RETURN_KEYS)
        if kind in _GROUPS and not self.items:
            raise ValueError(f"{label}: {self.type} needs items")
        if kind in _GROUPS and self.output:
            raise ValueError(f"{label}: output belongs to each of its items")
        if kind is FieldType.REGION and not (self.output and self.scores):
            raise ValueError(f"{label}: region needs output (the boxes) and scores, and labels where there are classes")
        if kind is FieldType.REGION and self.depth != 1:
            raise ValueError(f"{label}: regions are a list: write list[region]")
        if kind is FieldType.CONCEPT and self.depth > 1:
            raise ValueError(f"{label}: concepts are concept (the best one) or list[concept]")
        if kind is FieldType.AUDIO and self.sample_rate is None:
            raise ValueError(f"{label}: {self.type} needs sample_rate, the samples a second that the graph gives")
        return self


class MethodSection(Part):
    """One declared method: `onnx.methods` of config.yaml."""

    name: MethodName
    description: str = ""
    file: InsidePath | None = None
    arguments: tuple[ArgumentSection, ...] = ()
    returns: ReturnSection

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_names([argument.name for argument in self.arguments], f"{self.name}: the argument")
        optional = ""
        for argument in self.arguments:
            _check_items(argument, f"{self.name}: {argument.name}")
            if argument.default is None and not argument.iterator and optional:
                raise ValueError(
                    f"{self.name}: {argument.name} has no default; put it before {optional}, which has one"
                )
            optional = argument.name if argument.default is not None else optional
        _check_returned_items(self.returns, f"{self.name}: returns")
        self._check_stream()
        self._check_limits()
        return self

    def _check_stream(self) -> None:
        streamed = [argument.name for argument in self.arguments if argument.iterator]
        if len(streamed) > 1:
            raise ValueError(f"{self.name}: only one argument may be an iterator; {' and '.join(streamed)} are")
        if streamed and not self.returns.iterator:
            raise ValueError(f"{self.name}: {streamed[0]} is an iterator, so returns must be one (iterator: true)")
        if self.name == "generate" and (streamed or not self.returns.iterator):
            raise ValueError("generate: the stock SDK expects it to return an iterator and to take none; rename it")
        if self.name == "stream" and not streamed:
            raise ValueError("stream: the stock SDK expects it to take and to return an iterator; rename it")

    def _check_limits(self) -> None:
        arguments = {argument.name: argument for argument in self.arguments}
        if self.returns.kind is FieldType.CONCEPT and self.returns.depth:
            for name in sorted(LIMITS & arguments.keys()):
                raise ValueError(f"{self.name}: every method that returns concepts has {name}; do not declare it")
        score = self.returns.min_score
        if isinstance(score, str) and (score not in arguments or arguments[score].type != "float"):
            raise ValueError(f"{self.name}: returns.min_score must be a number or name a float argument, not {score!r}")


def _check_names(names: Sequence[str], what: str) -> None:
    for name in names:
        _identifier(name)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{what} {twice[0]} is there twice")


def _check_items(argument: ArgumentSection, place: str) -> None:
    if argument.kind is FieldType.NAMED_FIELDS:
        _check_names([item.name for item in argument.items], f"{place}: the item")
    for item in argument.items:
        if item.kind in _GROUPS or item.iterator or item.default is not None:
            raise ValueError(f"{place}: an item is no group, no iterator, and has no default")
        if not item.fed and not item.text:
            raise ValueError(f"{place}: each item names its graph input")


def _check_returned_items(returned: ReturnSection, place: str) -> None:
    if returned.kind is FieldType.NAMED_FIELDS:
        _check_names([item.name for item in returned.items], f"{place}: the item")
    for item in returned.items:
        if item.kind in (*_GROUPS, FieldType.REGION, FieldType.CONCEPT) or item.iterator:
            raise ValueError(f"{place}: an item of what is returned is no group, no iterator, no concept and no region")
        if not item.output:
            raise ValueError(f"{place}: each item names its graph output")


def place_of(loc: Sequence[str | int], document: Any) -> str:
    """Where a problem of a config is, methods and arguments by name: `onnx.methods.analyze.arguments.threshold`."""
    words = []
    for part in loc:
        try:
            document = document[part]
        except (KeyError, IndexError, TypeError):
            document = None
        name = document.get("name") if isinstance(document, dict) and isinstance(part, int) else None
        words.append(name if isinstance(name, str) and name else str(part))
    return ".".join(words)
