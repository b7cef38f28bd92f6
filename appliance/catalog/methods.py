"""Methods that a bundle declares: a name, typed arguments ↔ graph inputs, a return value ↔ graph outputs.

So `model.analyze(image=…, threshold=0.3)` is configuration, not code. Which array each type becomes, and which value is
made of an output, is told in models/README.md; `tasks/declared.py` does it.
"""

import json
import keyword
import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from appliance.catalog.sections import Finite, InsidePath, Part, Picture, TextInput
from appliance.core.types import FieldType

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_RESERVED = frozenset({"with_proto", "self", "cls"})
"""Names that the stock SDK keeps for itself (PROTOCOL 4.2)."""

_TAKEN = frozenset(
    {
        "available_methods",
        "method_signature",
        "generate_client_script",
        "generate",
        "stream",
        "list_versions",
        "load_info",
        "export",
        "train",
    }
)
"""Names that the stock SDK's Model has methods of its own for. `generate` and `stream` are what it calls by default, so
they are let be where they fit: see `MethodSection`."""

_LIST = re.compile(r"list\[(.+)\]")
_TYPES = {kind.value.lower(): kind for kind in FieldType} | {"json": FieldType.JSON}
_TYPES = {name: kind for name, kind in _TYPES.items() if name not in ("json_data", "list")}
_NESTED = 4
"""Lists in lists in lists: more axes than any graph has."""

_NUMBERS = (FieldType.INT, FieldType.FLOAT)
_GROUPS = (FieldType.TUPLE, FieldType.NAMED_FIELDS)


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


Identifier = Annotated[str, AfterValidator(_identifier)]


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

    @field_validator("default")
    @classmethod
    def _check_default(cls, value: Any) -> Any:
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError("must be a number, a text, true, false, or a list of them") from error
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        kind = self.kind
        if kind in _GROUPS:
            if not self.items:
                raise ValueError(f"{self.name}: {self.type} needs items")
            if self.image or self.text or self.input:
                raise ValueError(f"{self.name}: image, text and input belong to its items")
        elif self.items:
            raise ValueError(f"{self.name}: items are for tuple and named_fields")
        if (kind in (FieldType.IMAGE, FieldType.FRAME)) != (self.image is not None):
            raise ValueError(f"{self.name}: image says how a picture is fed; {self.type} needs it or must not have it")
        if kind in (FieldType.STR, FieldType.TEXT):
            if bool(self.choices) == bool(self.text):
                raise ValueError(f"{self.name}: {self.type} needs text (a tokenizer) or choices")
            if self.text and self.depth:
                raise ValueError(f"{self.name}: several texts are several inputs; use {self.kind.value.lower()}")
            if self.text and self.input:
                raise ValueError(f"{self.name}: text.inputs says where token ids go; remove input")
        elif self.choices or self.text:
            raise ValueError(f"{self.name}: choices and text are for str and text")
        if (kind is FieldType.AUDIO) != (self.sample_rate is not None):
            raise ValueError(f"{self.name}: audio needs sample_rate (Hz), and nothing else has it")
        if self.range is not None and (kind not in _NUMBERS or self.range[0] > self.range[1]):
            raise ValueError(f"{self.name}: range is [least, largest], for int and float")
        if self.default is not None and kind not in (*_NUMBERS, FieldType.BOOL, FieldType.STR, FieldType.JSON):
            raise ValueError(f"{self.name}: only int, float, bool, str, json and lists of them may have a default")
        return self


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
        kind = self.kind
        label = self.name or "returns"
        if kind in _GROUPS:
            if not self.items:
                raise ValueError(f"{label}: {self.type} needs items")
            if self.output:
                raise ValueError(f"{label}: output belongs to its items")
        elif self.items:
            raise ValueError(f"{label}: items are for tuple and named_fields")
        if kind is FieldType.REGION and not (self.output and self.scores):
            raise ValueError(f"{label}: region needs output (the boxes) and scores, and labels where there are classes")
        if kind is not FieldType.REGION and (self.scores or self.labels or self.min_score is not None):
            raise ValueError(f"{label}: scores, labels and min_score are for region")
        if kind is FieldType.REGION and self.depth != 1:
            raise ValueError(f"{label}: regions are a list: write list[region]")
        if kind is FieldType.CONCEPT and self.depth > 1:
            raise ValueError(f"{label}: concepts are concept (the best one) or list[concept]")
        if (kind is FieldType.AUDIO) != (self.sample_rate is not None):
            raise ValueError(f"{label}: audio needs sample_rate (Hz), and nothing else has it")
        return self


class MethodSection(Part):
    """One declared method: `onnx.methods` of config.yaml."""

    name: Identifier
    description: str = ""
    file: InsidePath | None = None
    arguments: tuple[ArgumentSection, ...] = ()
    returns: ReturnSection

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [argument.name for argument in self.arguments]
        for argument in self.arguments:
            _identifier(argument.name)
            _check_items(argument, argument.name)
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{self.name}: the argument {twice[0]} is there twice")
        optional = False
        for argument in self.arguments:
            if argument.default is None and optional:
                raise ValueError(f"{self.name}: {argument.name} has no default and stands behind one that has")
            optional = optional or argument.default is not None
        streamed = [argument.name for argument in self.arguments if argument.iterator]
        if len(streamed) > 1:
            raise ValueError(f"{self.name}: only one argument may be an iterator; {' and '.join(streamed)} are")
        if streamed and not self.returns.iterator:
            raise ValueError(f"{self.name}: {streamed[0]} is an iterator, so returns must be one (iterator: true)")
        if self.name in _TAKEN and not (self.name in ("generate", "stream") and self._is_what_sdk_means()):
            raise ValueError(f"{self.name}: the stock SDK's Model has a method of that name; use another one")
        score = self.returns.min_score
        if isinstance(score, str) and not any(a.name == score and a.kind is FieldType.FLOAT for a in self.arguments):
            raise ValueError(
                f"{self.name}: returns.min_score is a number or names a float argument; {score!r} is not one"
            )
        _check_returned_items(self.returns, self.name)
        return self

    def _is_what_sdk_means(self) -> bool:
        streams = any(argument.iterator for argument in self.arguments)
        return self.returns.iterator and streams == (self.name == "stream")


def _check_items(argument: ArgumentSection, place: str) -> None:
    for item in argument.items:
        if argument.kind is FieldType.NAMED_FIELDS:
            _identifier(item.name)
        if item.kind in _GROUPS or item.iterator or item.default is not None:
            raise ValueError(f"{place}: an item is no group, no iterator, and has no default")
        if not item.fed and not item.text:
            raise ValueError(f"{place}: each item names its graph input")


def _check_returned_items(returned: ReturnSection, place: str) -> None:
    for item in returned.items:
        if returned.kind is FieldType.NAMED_FIELDS:
            _identifier(item.name)
        if item.kind in (*_GROUPS, FieldType.REGION, FieldType.CONCEPT) or item.iterator:
            raise ValueError(f"{place}: an item of what is returned is no group, no iterator, no concept and no region")
