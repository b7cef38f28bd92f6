"""Methods that a bundle declares over its graphs: values in, values out, by `catalog/methods.py`.

Each argument has a feed, which makes arrays for graph inputs of its value; the return value has a maker, which makes it
of the graph's outputs. Both are put together once, at load, and whatever does not fit the graph is said then.
"""

import dataclasses
import json
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from appliance.catalog.methods import ArgumentSection, MethodSection, ReturnSection
from appliance.catalog.sections import ImageInput, Picture
from appliance.core.config import Limits
from appliance.core.errors import ApplianceError, BundleInvalid, InferenceFailed, InputTooLarge, InvalidInput
from appliance.core.types import (
    Array,
    Concept,
    ConceptScores,
    FieldType,
    Frame,
    Media,
    Method,
    MethodField,
    MethodKind,
    Payload,
    PredictOptions,
    Region,
    Result,
    Returned,
    ScoredConcept,
    Value,
)
from appliance.engine.session import TensorSpec
from appliance.media import images, sound
from appliance.media.text import TextTokenizer
from appliance.tasks.base import Decoded, ImageSide, TextSide
from appliance.tasks.classifier import LIMITS, best, cut, limit_arguments, probabilities
from appliance.tasks.tensors import describe, fitted, noise

_ANY = -1
"""Axes of a value that only the caller knows."""


class Declared:
    """A declared method over one graph; implements `Task`."""

    kind = "values"

    def __init__(
        self,
        section: MethodSection,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        concepts: tuple[Concept, ...],
        folder: Path,
        default_concepts: int,
    ) -> None:
        """Fit a method to a graph.

        Args:    folder: of the version, where tokenizers lie.
        Raises:  BundleInvalid: an argument, or what is returned, does not fit the graph's inputs and outputs.
        """
        self._place = f"onnx.methods, {section.name}"
        known = {spec.name: spec for spec in inputs}
        # Arguments that may only say how the answer is cut.
        cuts = LIMITS if section.returns.kind is FieldType.CONCEPT else {str(section.returns.min_score)}
        self._feeds = {a.name: _feed(a, known, concepts, folder, self._place, cuts) for a in section.arguments}
        self._inputs = inputs
        self._check_inputs(section)
        returned = {spec.name: spec for spec in outputs}
        self._maker = _maker(section.returns, returned, concepts, self._place)
        self._outputs = [returned[name] for name in dict.fromkeys(self._maker.outputs)]
        self.merges = all(spec.dynamic_batch for spec in (*inputs, *self._outputs)) and all(
            rank in (_ANY, len(known[name].shape) - 1) for feed in self._feeds.values() for name, rank in feed.ranks
        )
        streams = [argument for argument in section.arguments if argument.iterator]
        self._one_by_one = section.returns.iterator and not streams
        self.method = _method(section, default_concepts)
        score = section.returns.min_score
        self._min_score = None if score is None or isinstance(score, str) else np.float32(score)

    def _check_inputs(self, section: MethodSection) -> None:
        fed = [name for feed in self._feeds.values() for name, _ in feed.ranks]
        twice = sorted({name for name in fed if fed.count(name) > 1})
        if twice:
            raise BundleInvalid(f"{self._place}: the graph input {twice[0]!r} is fed by two arguments.")
        left = [spec.name for spec in self._inputs if spec.name not in fed]
        if left:
            raise BundleInvalid(
                f"{self._place}: the graph input {left[0]!r} is fed by no argument; declare one for it."
            )

    def cost(self, payload: Payload, limits: Limits) -> int:
        """Bytes that the arguments' arrays and their decoding take."""
        return sum([feed.cost(payload.arguments[name], limits) for name, feed in self._feeds.items()])

    def decode(self, payload: Payload) -> Decoded:
        """One row: the arguments as arrays, with a batch axis where the graph has one."""
        given = [feed.arrays(payload.arguments[name]) for name, feed in self._feeds.items()]
        feeds = {target: array for arrays in given for target, array in arrays}
        return Decoded({spec.name: self._placed(feeds, spec) for spec in self._inputs})

    def _placed(self, feeds: Mapping[str, Array], spec: TensorSpec) -> Array:
        """An array in the graph's dtype and with its batch axis."""
        array = feeds.get(spec.name)
        if array is None:
            raise InvalidInput(f"Nothing was given for the graph input {spec.name!r}.")
        if array.ndim == len(spec.shape) - 1:
            array = array[None]
        elif self.merges and array.ndim == len(spec.shape) and len(array) != 1:
            raise InvalidInput(
                f"The array {spec.name!r} has {len(array)} rows; one input is one row. Send several inputs."
            )
        return fitted(array, spec)

    def outputs(self, options: PredictOptions) -> tuple[str, ...]:
        """What the return value is made of."""
        return tuple(spec.name for spec in self._outputs)

    def compared(self) -> tuple[str, ...]:
        """All of them."""
        return self.outputs(PredictOptions())

    def examples(self) -> Sequence[Sequence[dict[str, Array]]]:
        """Noise where every shape is known; else nothing, and each input is a run of its own."""
        if not self.merges or any(None in spec.shape[1:] for spec in self._inputs):
            return []
        return noise(self._inputs)

    def encode(
        self, arrays: Mapping[str, Array], count: int, options: PredictOptions
    ) -> Sequence[Result | ApplianceError]:
        """The return value of each row."""
        if self._min_score is not None:
            options = dataclasses.replace(options, min_value=self._min_score)
        rows = [{n: a[i] for n, a in arrays.items()} for i in range(count)] if self.merges else [dict(arrays)]
        return [self._answer(row, options) for row in rows]

    def _answer(self, row: dict[str, Array], options: PredictOptions) -> Result | ApplianceError:
        try:
            if self._one_by_one:
                lengths = {len(array) if array.ndim else 0 for array in row.values()}
                if len(lengths) != 1:
                    raise InferenceFailed("The model's outputs are not equally long, so they cannot be streamed.")
                elements = [{n: a[i] for n, a in row.items()} for i in range(lengths.pop())]
                return Returned([self._maker.make(element, options) for element in elements])
            made = self._maker.make(row, options)
        except InferenceFailed as error:
            return error
        return made if isinstance(made, ConceptScores) else Returned(made)


def _method(section: MethodSection, default_concepts: int) -> Method:
    arguments = tuple(_field(argument, argument.name) for argument in section.arguments)
    if section.returns.kind is FieldType.CONCEPT:
        names = {argument.name for argument in arguments}
        arguments += tuple(extra for extra in limit_arguments(default_concepts) if extra.name not in names)
    streams = any(argument.iterator for argument in section.arguments)
    kind = MethodKind.STREAM if streams else MethodKind.GENERATE if section.returns.iterator else MethodKind.UNARY
    score = section.returns.min_score
    least = score if isinstance(score, str) else ""
    return Method(section.name, section.description, arguments, _field(section.returns, "return"), kind, least)


def _field(section: ArgumentSection | ReturnSection, name: str) -> MethodField:
    """What is published of an argument or a return value."""
    kind, depth = section.kind, section.depth
    named = kind is FieldType.NAMED_FIELDS
    items = tuple(_field(item, item.name if named else f"{name}_item") for item in section.items)
    default, bounds, choices = None, None, section.choices
    if isinstance(section, ArgumentSection):
        default, bounds = section.default, section.range
    published = MethodField(f"{name}_item" if depth else name, kind, items=items, range=bounds, choices=choices)
    for level in range(depth):
        published = MethodField(f"{name}_item" if level < depth - 1 else name, FieldType.LIST, items=(published,))
    text = None if default is None else default if isinstance(default, str) else json.dumps(default)
    return dataclasses.replace(published, description=section.description, default=text, iterator=section.iterator)


# ---- arguments -> arrays ---------------------------------------------------------------------------------------------


class _Feed(Protocol):
    """What makes arrays of one argument's value."""

    ranks: tuple[tuple[str, int], ...]
    """Graph inputs it feeds, and how many axes each array has without the batch axis; `_ANY`: the caller knows."""

    def cost(self, value: Value, limits: Limits) -> int:
        """Bytes that making them takes. Raises: InputError."""

    def arrays(self, value: Value) -> Iterator[tuple[str, Array]]:
        """Graph input and array, without the batch axis. Raises: InputError."""


@dataclass(slots=True)
class _Plain:
    """One array of one value."""

    target: str
    rank: int
    make: Callable[[Value], Array]
    sizes: Callable[[Value, Limits], int]
    ranks: tuple[tuple[str, int], ...] = field(init=False)

    def __post_init__(self) -> None:
        self.ranks = ((self.target, self.rank),)

    def cost(self, value: Value, limits: Limits) -> int:
        return self.sizes(value, limits)

    def arrays(self, value: Value) -> Iterator[tuple[str, Array]]:
        yield self.target, self.make(value)


@dataclass(slots=True)
class _Listed:
    """Several values of one type, one behind the other along a new first axis."""

    inner: _Plain
    ranks: tuple[tuple[str, int], ...] = field(init=False)

    def __post_init__(self) -> None:
        rank = self.inner.rank
        self.ranks = ((self.inner.target, rank if rank == _ANY else rank + 1),)

    def cost(self, value: Value, limits: Limits) -> int:
        return sum([self.inner.cost(item, limits) for item in value])

    def arrays(self, value: Value) -> Iterator[tuple[str, Array]]:
        yield self.inner.target, self.stacked(value)

    def stacked(self, value: Value) -> Array:
        made = [self.inner.make(item) for item in value]
        if not made:
            raise InvalidInput(f"The list for {self.inner.target!r} is empty; give at least one element.")
        if len({array.shape for array in made}) > 1:
            raise InvalidInput(f"The elements of the list for {self.inner.target!r} have different shapes.")
        return np.stack(made)


@dataclass(slots=True)
class _Group:
    """A tuple's or named fields' items, each with a feed of its own."""

    members: tuple[tuple[int | str, _Feed], ...]
    ranks: tuple[tuple[str, int], ...] = field(init=False)

    def __post_init__(self) -> None:
        self.ranks = tuple(pair for _, feed in self.members for pair in feed.ranks)

    def cost(self, value: Value, limits: Limits) -> int:
        return sum([feed.cost(value[key], limits) for key, feed in self.members])

    def arrays(self, value: Value) -> Iterator[tuple[str, Array]]:
        for key, feed in self.members:
            yield from feed.arrays(value[key])


@dataclass(slots=True)
class _Texts:
    """Token ids, mask and type ids of one text."""

    side: TextSide
    ranks: tuple[tuple[str, int], ...]

    def cost(self, value: Value, limits: Limits) -> int:
        return self.side.cost(Payload(text=_text(value)), limits)

    def arrays(self, value: Value) -> Iterator[tuple[str, Array]]:
        for name, array in self.side.decode(Payload(text=_text(value))).feeds.items():
            yield name, array[0]


class _Nothing:
    """An argument that feeds no graph input: it says how the answer is cut."""

    ranks: tuple[tuple[str, int], ...] = ()

    def cost(self, value: Value, limits: Limits) -> int:
        return 0

    def arrays(self, value: Value) -> Iterator[tuple[str, Array]]:
        return iter(())


def _feed(
    section: ArgumentSection,
    inputs: Mapping[str, TensorSpec],
    concepts: Sequence[Concept],
    folder: Path,
    place: str,
    cuts: Container[str] = (),
) -> _Feed:
    """The feed of an argument; one named in `cuts` may feed nothing.

    Raises: BundleInvalid: the graph has no such input, or one that this type cannot feed.
    """
    kind = section.kind
    if section.items:
        keys: Sequence[int | str] = (
            [item.name for item in section.items] if kind is FieldType.NAMED_FIELDS else range(len(section.items))
        )
        return _Group(
            tuple(
                (key, _feed(item, inputs, concepts, folder, place))
                for key, item in zip(keys, section.items, strict=True)
            )
        )
    if section.text is not None:
        names = [
            name for name in (section.text.inputs.ids, section.text.inputs.mask, section.text.inputs.types) if name
        ]
        dtypes = {name: _dtype(name, inputs, "i", section, place) for name in names}
        path = folder / section.text.tokenizer
        side = TextSide(section.text, TextTokenizer(path, section.text.max_tokens), dtypes)
        return _Texts(side, tuple((name, 1) for name in names))
    if section.name in cuts and section.fed not in inputs:
        return _Nothing()
    plain = _plain(section, inputs, concepts, place)
    feed: _Plain | _Listed = plain
    for _ in range(0 if section.kind is FieldType.CONCEPT else section.depth):  # concepts are one vector already
        if isinstance(feed, _Listed):
            feed = _Listed(_Plain(plain.target, feed.ranks[0][1], feed.stacked, feed.cost))
        else:
            feed = _Listed(feed)
    return feed


def _plain(
    section: ArgumentSection, inputs: Mapping[str, TensorSpec], concepts: Sequence[Concept], place: str
) -> _Plain:
    kind, target = section.kind, section.fed

    def plain(allowed: str, rank: int, make: Callable[[Value], Array], sizes: Any = None) -> _Plain:
        _dtype(target, inputs, allowed, section, place)
        return _Plain(target, rank, make, sizes or (lambda value, limits: 16))

    if kind is FieldType.INT:
        return plain("iuf", 0, lambda value: np.asarray(value))
    if kind is FieldType.FLOAT:
        return plain("f", 0, lambda value: np.asarray(value, np.float64))
    if kind is FieldType.BOOL:
        return plain("biuf", 0, lambda value: np.asarray(value, np.bool_))
    if kind in (FieldType.STR, FieldType.TEXT):
        return plain("iu", 0, lambda value: np.asarray(_choice(_text(value), section)))
    if kind is FieldType.BYTES:
        return plain("u", 1, lambda value: np.frombuffer(value, np.uint8), lambda value, limits: len(value))
    if kind is FieldType.VIDEO:
        return plain("u", 1, lambda value: np.frombuffer(value.content, np.uint8), _video_size)
    if kind is FieldType.NDARRAY:
        return plain("biuf", _ANY, lambda value: value, lambda value, limits: value.nbytes)
    if kind is FieldType.JSON:
        return plain(
            "biuf", _ANY, lambda value: _numbers(value, section.name), lambda value, limits: 64 * _count(value)
        )
    if kind is FieldType.CONCEPT:
        places = {concept.id: place for place, concept in enumerate(concepts)}
        places |= {concept.name: place for place, concept in enumerate(concepts) if concept.name not in places}
        return plain("f", 1, lambda value: _vector(value if section.depth else [value], places, len(concepts)))
    if kind is FieldType.REGION:
        return plain("f", 1, lambda value: _box(value, section.box))
    if kind is FieldType.AUDIO:
        rate = section.sample_rate or 0
        return plain(
            "f",
            1,
            lambda value: sound.decode_wav(value.content),
            lambda value, limits: sound.read_header(value.content, limits.audio_size, rate),
        )
    assert section.image is not None  # IMAGE and FRAME, by the section's own check
    return _pixels(section.image, section, inputs, place)


def _pixels(picture: Picture, section: ArgumentSection, inputs: Mapping[str, TensorSpec], place: str) -> _Plain:
    dtype = _dtype(section.fed, inputs, "uf", section, place)
    side = ImageSide(ImageInput(input=section.fed, **picture.model_dump()), False, dtype)

    def content(value: Value) -> bytes:
        body: bytes = (value.image if isinstance(value, Frame) else value).content
        return body

    def make(value: Value) -> Array:
        pixels: Array = side.decode(Payload(image=content(value))).feeds[section.fed][0]
        return pixels

    return _Plain(section.fed, 3, make, lambda value, limits: side.cost(Payload(image=content(value)), limits))


def _dtype(
    name: str, inputs: Mapping[str, TensorSpec], allowed: str, section: ArgumentSection, place: str
) -> "np.dtype[Any]":
    spec = inputs.get(name)
    if spec is None:
        names = ", ".join(map(repr, inputs)) or "none"
        raise BundleInvalid(f"{place}: {section.name}: the graph has no input {name!r}; it has {names}.")
    if spec.dtype is None or spec.dtype.kind not in allowed:
        raise BundleInvalid(f"{place}: {section.name}: {section.type} cannot feed {name!r}, which is {describe(spec)}.")
    return spec.dtype


def _text(value: Value) -> str:
    if not isinstance(value, Media):
        return str(value)
    try:
        return value.content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"The text is not UTF-8 (byte {error.start}).") from error


def _choice(text: str, section: ArgumentSection) -> int:
    if text not in section.choices:
        raise InvalidInput(f"{section.name} is {text[:80]!r}; it must be one of {', '.join(section.choices)}.")
    return section.choices.index(text)


def _video_size(value: Media, limits: Limits) -> int:
    size = len(value.content)
    if size > limits.video_size:
        raise InputTooLarge(f"The video has {size} bytes; the limit is {limits.video_size} (limits.video_size).")
    return size


def _count(value: object) -> int:
    return sum(map(_count, value)) if isinstance(value, list) else 1


def _numbers(value: Value, name: str) -> Array:
    try:
        array = np.asarray(value)
    except ValueError as error:  # lists of different lengths
        raise InvalidInput(f"{name} must be a list of numbers, or of equally long lists of them.") from error
    if not isinstance(value, list) or array.dtype.kind not in "biuf":
        raise InvalidInput(f"{name} must be a list of numbers, or of equally long lists of them.")
    return array


def _vector(values: Sequence[ScoredConcept], places: Mapping[str, int], count: int) -> Array:
    """The concepts' values in the model's order, float32 (concepts,); 0 for those that are not given."""
    vector = np.zeros(count, np.float32)
    for value in values:
        index = places.get(value.id, places.get(value.name))
        if index is None:
            raise InvalidInput(
                f"The model has no concept {value.id or value.name!r}; GetModelOutputInfo names its concepts."
            )
        vector[index] = value.value
    return vector


def _box(value: Region, order: str) -> Array:
    if value.box is None:
        raise InvalidInput("The region has no bounding box; set region_info.bounding_box.")
    left, top, right, bottom = value.box
    return np.array([left, top, right, bottom] if order == "xyxy" else [top, left, bottom, right], np.float32)


# ---- arrays -> what is returned --------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Maker:
    """What makes the return value, or an item of it, of one row's outputs."""

    outputs: tuple[str, ...]
    make: Callable[[Mapping[str, Array], PredictOptions], Value]


def _maker(
    section: ReturnSection, outputs: Mapping[str, TensorSpec], concepts: Sequence[Concept], place: str
) -> _Maker:
    """Raises: BundleInvalid: the graph has no such output, or one that cannot become this type."""
    kind = section.kind
    if section.items:
        makers = [_maker(item, outputs, concepts, place) for item in section.items]
        names = tuple(name for maker in makers for name in maker.outputs)
        if kind is FieldType.TUPLE:
            return _Maker(names, lambda row, options: tuple(maker.make(row, options) for maker in makers))
        keys = [item.name for item in section.items]
        return _Maker(names, lambda row, options: {k: m.make(row, options) for k, m in zip(keys, makers, strict=True)})
    if kind is FieldType.REGION:
        return _regions(section, outputs, concepts, place)
    if kind is FieldType.JSON and not section.output:
        names = tuple(_output(name, outputs, "biuf", section, place) for name in outputs)
        return _Maker(names, lambda row, options: {name: _finite(row[name], name).tolist() for name in names})
    name = section.output or next(iter(outputs), "")
    if not section.output and len(outputs) > 1:
        raise BundleInvalid(f"{place}: returns: the graph has several outputs; name one of {', '.join(outputs)}.")
    make = _of_one(section, name, outputs, concepts, place)
    return _Maker((name,), lambda row, options: make(row[name], options))


def _of_one(
    section: ReturnSection, name: str, outputs: Mapping[str, TensorSpec], concepts: Sequence[Concept], place: str
) -> Callable[[Array, PredictOptions], Value]:
    """How one output becomes a value."""
    kind, depth = section.kind, section.depth
    allowed, rank = _TAKES[kind]
    if section.choices:
        allowed, rank = "iuf", 0
    _output(name, outputs, allowed, section, place)
    if kind is FieldType.NDARRAY and not depth:
        return lambda array, options: array
    if kind is FieldType.JSON:
        return lambda array, options: _listed(_finite(array, name))
    if kind is FieldType.CONCEPT:
        width = outputs[name].shape[-1] if outputs[name].shape else None
        if width is not None and width != len(concepts):
            raise BundleInvalid(
                f"{place}: returns: {name!r} has {width} scores; the bundle lists {len(concepts)} concepts."
            )
        return lambda array, options: _concepts(_reduced(array, 1, name), section, concepts, options)
    single = _SINGLE[kind]

    def make(array: Array, options: PredictOptions) -> Value:
        if section.choices and array.dtype.kind == "f":  # scores: the best one
            array = np.asarray(array.argmax(axis=-1))
        return _nested(_reduced(array, rank + depth, name), depth, lambda item: single(item, section))

    return make


def _nested(array: Array, depth: int, single: Callable[[Array], Value]) -> Value:
    return single(array) if not depth else [_nested(item, depth - 1, single) for item in array]


_TAKES = {
    FieldType.STR: ("u", 1),
    FieldType.TEXT: ("u", 1),
    FieldType.BYTES: ("u", 1),
    FieldType.VIDEO: ("u", 1),
    FieldType.INT: ("iu", 0),
    FieldType.FLOAT: ("iuf", 0),
    FieldType.BOOL: ("biu", 0),
    FieldType.NDARRAY: ("biuf", _ANY),
    FieldType.JSON: ("biuf", _ANY),
    FieldType.CONCEPT: ("f", 1),
    FieldType.IMAGE: ("uf", 3),
    FieldType.FRAME: ("uf", 3),
    FieldType.AUDIO: ("f", 1),
}
"""Type → kinds of dtype that its output may have, and its axes without the batch axis."""


def _chosen(array: Array, section: ReturnSection) -> str:
    if not section.choices:
        return array.astype(np.uint8).tobytes().partition(b"\0")[0].decode("utf-8", "replace")
    index = int(array)
    if not 0 <= index < len(section.choices):
        raise InferenceFailed(f"The model answered choice {index}; there are {len(section.choices)}.")
    return section.choices[index]


def _picture(array: Array, section: ReturnSection) -> Media:
    if array.dtype.kind == "f":
        array = np.clip(np.rint(_finite(array, section.output) * section.scale), 0, 255)
    if section.layout == "nchw":
        array = array.transpose(1, 2, 0)
    return Media(images.encode_png(array.astype(np.uint8)))


_SINGLE: dict[FieldType, Callable[[Array, ReturnSection], Value]] = {
    FieldType.STR: _chosen,
    FieldType.TEXT: lambda array, section: Media(_chosen(array, section).encode()),
    FieldType.BYTES: lambda array, section: array.astype(np.uint8).tobytes(),
    FieldType.VIDEO: lambda array, section: Media(array.astype(np.uint8).tobytes()),
    FieldType.INT: lambda array, section: int(array),
    FieldType.FLOAT: lambda array, section: float(array),
    FieldType.BOOL: lambda array, section: bool(array),
    FieldType.NDARRAY: lambda array, section: array,
    FieldType.IMAGE: _picture,
    FieldType.FRAME: lambda array, section: Frame(_picture(array, section)),
    FieldType.AUDIO: lambda array, section: Media(sound.encode_wav(_finite(array, "audio"), section.sample_rate or 0)),
}


def _concepts(
    scores: Array, section: ReturnSection, concepts: Sequence[Concept], options: PredictOptions
) -> ConceptScores | ScoredConcept:
    if scores.size != len(concepts):
        raise InferenceFailed(f"The model gave {scores.size} scores; the bundle lists {len(concepts)} concepts.")
    values, indices = best(probabilities(scores[None], section.activation), options.selected)
    if section.depth:
        (answer,) = cut(values, indices, options)
        if isinstance(answer, ApplianceError):
            raise answer
        assert isinstance(answer, ConceptScores)
        return answer
    _finite(values, "scores")
    concept = concepts[int(indices[0, 0])]
    return ScoredConcept(concept.id, concept.name, float(values[0, 0]))


def _regions(
    section: ReturnSection, outputs: Mapping[str, TensorSpec], concepts: Sequence[Concept], place: str
) -> _Maker:
    """Boxes (n, 4), scores (n,) or (n, classes), labels (n,) where there are: the best first."""
    names = [
        _output(section.output, outputs, "f", section, place),
        _output(section.scores, outputs, "f", section, place),
    ]
    if section.labels:
        names.append(_output(section.labels, outputs, "iuf", section, place))

    def make(row: Mapping[str, Array], options: PredictOptions) -> list[Region]:
        boxes = _reduced(row[section.output], 2, section.output).reshape(-1, 4).astype(np.float64)
        scores = row[section.scores]
        labels = None
        if section.labels:
            labels = _reduced(row[section.labels], 1, section.labels).astype(np.int64)
            scores = _reduced(scores, 1, section.scores)
        else:
            wide = _reduced(scores, 2 if scores.ndim > 1 and scores.shape[-1] != len(boxes) else 1, section.scores)
            labels = wide.argmax(axis=1) if wide.ndim == 2 else np.zeros(len(wide), np.int64)
            scores = wide.max(axis=1) if wide.ndim == 2 else wide
        if not len(boxes) == len(scores) == len(labels):
            raise InferenceFailed(f"The model gave {len(boxes)} boxes, {len(scores)} scores, {len(labels)} labels.")
        order = np.argsort(-scores, kind="stable")
        kept = [int(i) for i in order if np.isfinite(scores[i]) and scores[i] >= options.min_value]
        return [_region(_unit(boxes[i], section), int(labels[i]), float(scores[i]), concepts) for i in kept]

    return _Maker(tuple(names), make)


def _unit(box: Array, section: ReturnSection) -> tuple[float, float, float, float]:
    """Left, top, right, bottom as parts of the picture."""
    one, two, three, four = box.tolist()
    if section.box == "cxcywh":
        left, top, right, bottom = one - three / 2, two - four / 2, one + three / 2, two + four / 2
    elif section.box == "yxyx":
        left, top, right, bottom = two, one, four, three
    else:
        left, top, right, bottom = one, two, three, four
    height, width = section.box_size or (1.0, 1.0)
    sides = (left / width, top / height, right / width, bottom / height)
    return tuple(min(1.0, max(0.0, side)) for side in sides)


def _region(box: tuple[float, float, float, float], label: int, score: float, concepts: Sequence[Concept]) -> Region:
    concept = concepts[label] if 0 <= label < len(concepts) else Concept(str(label), str(label))
    return Region(box, (ScoredConcept(concept.id, concept.name, score),), score)


def _output(name: str, outputs: Mapping[str, TensorSpec], allowed: str, section: ReturnSection, place: str) -> str:
    spec = outputs.get(name)
    if spec is None:
        raise BundleInvalid(
            f"{place}: returns: the graph has no output {name!r}; it has {', '.join(map(repr, outputs))}."
        )
    if spec.dtype is None or spec.dtype.kind not in allowed:
        raise BundleInvalid(f"{place}: returns: {section.type} cannot be made of {name!r}, which is {describe(spec)}.")
    return name


def _reduced(array: Array, rank: int, name: str) -> Array:
    """The array without leading axes of length 1. Raises: InferenceFailed: it has other axes than it should."""
    while array.ndim > rank and array.shape[0] == 1:
        array = array[0]
    if array.ndim != rank:
        raise InferenceFailed(f"The model's output {name!r} has shape {list(array.shape)}; {rank} axes were declared.")
    return array


def _finite(array: Array, name: str) -> Array:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InferenceFailed(f"The model's output {name!r} is not finite, which this type cannot say.")
    return array


def _listed(array: Array) -> list[Any]:
    found = array.tolist()
    return found if isinstance(found, list) else [found]
