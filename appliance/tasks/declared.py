"""Methods that a bundle declares over its graphs: values in, values out, by `catalog/methods.py`.

Each argument has a feed, which makes arrays for graph inputs of its value; the return value has a maker, which makes it
of the graph's outputs. Both are put together once, at load, and whatever does not fit the graph is said then.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from appliance.tasks.classifier import best, cut, limit_arguments, probabilities
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
        finds_rows: bool = False,
    ) -> None:
        """Fit a method to a graph.

        Args:
            folder: of the version, where tokenizers lie.
            finds_rows: see `Plan.finds_rows`.
        Raises:  BundleInvalid: an argument, or what is returned, does not fit the graph's inputs and outputs.
        """
        self._place = f"onnx.methods, {section.name}"
        known = {spec.name: spec for spec in inputs}
        cuts = str(section.returns.min_score)  # an argument that may only say how the answer is cut
        self._feeds = {a.name: _feed(a, known, concepts, folder, self._place, cuts) for a in section.arguments}
        self._inputs = inputs
        self._check_inputs()
        returned = {spec.name: spec for spec in outputs}
        self._maker = _maker(section.returns, returned, concepts, self._place)
        streams = any(argument.iterator for argument in section.arguments)
        self._one_by_one = section.returns.iterator and not streams
        self._ranks = {n: rank if rank == _ANY else rank + self._one_by_one for n, rank in self._maker.outputs}
        rows = [(known[name], rank) for feed in self._feeds.values() for name, rank in feed.ranks]
        rows += [(returned[name], rank) for name, rank in self._ranks.items()]
        aligned = all(spec.dynamic_batch and _is_row(spec, rank) for spec, rank in rows)
        self.merges = bool(inputs) and aligned and not (finds_rows and _ANY in self._ranks.values())
        self.method = _method(section, default_concepts)
        score = section.returns.min_score
        self._min_score = None if score is None or isinstance(score, str) else np.float32(score)

    def _check_inputs(self) -> None:
        ranks = [pair for feed in self._feeds.values() for pair in feed.ranks]
        fed = [name for name, _ in ranks]
        twice = sorted({name for name in fed if fed.count(name) > 1})
        if twice:
            raise BundleInvalid(f"{self._place}: the graph input {twice[0]!r} is fed by two arguments.")
        for spec in self._inputs:
            if spec.name not in fed:
                raise BundleInvalid(
                    f"{self._place}: the graph input {spec.name!r} is fed by no argument; declare one for it."
                )
            if dict(ranks)[spec.name] > len(spec.shape):
                raise BundleInvalid(
                    f"{self._place}: the graph input {spec.name!r} is {describe(spec)}; what its argument makes has "
                    f"{dict(ranks)[spec.name]} axes."
                )

    def cost(self, payload: Payload, limits: Limits) -> int:
        """Bytes that the arguments' arrays and their decoding take."""
        return sum([feed.cost(payload.arguments[name], limits) for name, feed in self._feeds.items()])

    def decode(self, payload: Payload) -> Decoded:
        """One row: the arguments as arrays, with a batch axis where the graph has one."""
        given = [feed.arrays(payload.arguments[name]) for name, feed in self._feeds.items()]
        feeds = {target: array for arrays in given for target, array in arrays}
        return Decoded({spec.name: self._placed(feeds[spec.name], spec) for spec in self._inputs})

    def _placed(self, array: Array, spec: TensorSpec) -> Array:
        """An array in the graph's dtype, with axes of length 1 where the graph has more axes than the value.

        Raises: InvalidInput: its shape is another one, or a value would change.
        """
        if self.merges and array.ndim == len(spec.shape) and len(array) != 1:
            raise InvalidInput(
                f"The array {spec.name!r} has {len(array)} rows; one input is one row. Send several inputs."
            )
        return fitted(array.reshape(_shape(array.shape, spec.shape)), spec)

    def outputs(self, options: PredictOptions) -> tuple[str, ...]:
        """What the return value is made of."""
        return tuple(self._ranks)

    def compared(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(self._ranks)

    def examples(self) -> Sequence[Sequence[dict[str, Array]]]:
        """Rows within what the arguments allow; none where rows are not merged, or a length is only the caller's."""
        if not self.merges:
            return []
        texts = [feed.side.examples() for feed in self._feeds.values() if isinstance(feed, _Texts)]
        if len(texts) > 1:
            return []  # each has buckets of its own
        covered = set(texts[0][0][0]) if texts else set()
        others = [spec for spec in self._inputs if spec.name not in covered]
        if any(None in spec.shape[1:] for spec in others):
            return []
        bounds = {name: bound for feed in self._feeds.values() for name, bound in feed.bounds.items()}
        rows = _within(noise(others)[0], bounds) if others else [{}, {}, {}, {}]
        return [[{**row, **text} for row, text in zip(rows, bucket, strict=True)] for bucket in (texts or [[rows]])[0]]

    def encode(
        self, arrays: Mapping[str, Array], count: int, options: PredictOptions
    ) -> Sequence[Result | ApplianceError]:
        """The return value of each row."""
        if self._min_score is not None:
            least = max(self._min_score, options.min_value) if options.min_value else self._min_score
            options = dataclasses.replace(options, min_value=least)
        rows = [{n: a[i] for n, a in arrays.items()} for i in range(count)] if self.merges else [dict(arrays)]
        return [self._answer(row, options) for row in rows]

    def _answer(self, row: dict[str, Array], options: PredictOptions) -> Result | ApplianceError:
        try:
            row = {n: a if (rank := self._ranks[n]) == _ANY else _reduced(a, rank, n) for n, a in row.items()}
            if self._one_by_one:
                return Returned([self._maker.make(element, options) for element in _elements(row)])
            made = self._maker.make(row, options)
        except InferenceFailed as error:
            return error
        return made if isinstance(made, ConceptScores) else Returned(made)


def _shape(given: tuple[int, ...], wanted: tuple[int | None, ...]) -> tuple[int, ...]:
    """`given` with ones for the axes that it lacks: the batch's, and such as the graph itself says are 1."""
    left = list(given)
    shape: list[int] = []
    for axis in wanted:
        missing = len(wanted) - len(shape) - len(left)
        shape.append(1 if (missing > 0 and axis in (1, None)) or not left else left.pop(0))
    return (*shape, *left)


def _is_row(spec: TensorSpec, rank: int) -> bool:
    """Whether a value of so many axes stands for one row of a graph's input or output: behind the batch, ones apart."""
    return rank == _ANY or rank in (len(spec.shape) - 1, sum(axis != 1 for axis in spec.shape[1:]))


def _within(rows: Sequence[Mapping[str, Array]], bounds: Mapping[str, tuple[float, float]]) -> list[dict[str, Array]]:
    """Noise brought into the bounds that some inputs have; the outlier to the upper one."""
    made = [dict(row) for row in rows]
    random = np.random.default_rng(1)
    for place, row in enumerate(made):
        for name, (least, most) in bounds.items():
            shares = random.random(row[name].shape) if place < len(made) - 1 else 1.0
            row[name] = np.broadcast_to(least + shares * (most - least), row[name].shape).astype(row[name].dtype)
    return made


def _elements(row: Mapping[str, Array]) -> list[dict[str, Array]]:
    """A row's outputs cut along their first axis. Raises: InferenceFailed: they are not equally long."""
    lengths = {len(array) if array.ndim else -1 for array in row.values()}
    if len(lengths) != 1 or -1 in lengths:
        raise InferenceFailed("The model's outputs are not equally long lists, so they cannot be streamed.")
    return [{n: a[i] for n, a in row.items()} for i in range(lengths.pop())]


def _method(section: MethodSection, default_concepts: int) -> Method:
    arguments = tuple(_field(argument, argument.name) for argument in section.arguments)
    if section.returns.kind is FieldType.CONCEPT and section.returns.depth:
        arguments += limit_arguments(default_concepts)
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
    names = [name + "_item" * level for level in range(depth + 1)]
    default, bounds, choices = None, None, section.choices
    if isinstance(section, ArgumentSection):
        default, bounds = section.default, section.range
    published = MethodField(names.pop(), kind, items=items, range=bounds, choices=choices)
    while names:
        published = MethodField(names.pop(), FieldType.LIST, items=(published,))
    text = None if default is None else default if isinstance(default, str) else json.dumps(default)
    return dataclasses.replace(published, description=section.description, default=text, iterator=section.iterator)


# ---- arguments -> arrays ---------------------------------------------------------------------------------------------


class _Feed(Protocol):
    """What makes arrays of one argument's value."""

    ranks: tuple[tuple[str, int], ...]
    """Graph inputs it feeds, and how many axes each array has without the batch axis; `_ANY`: the caller knows."""

    bounds: Mapping[str, tuple[float, float]]
    """Graph input → least and largest number that it is fed, where that is known."""

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
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
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
    bounds: Mapping[str, tuple[float, float]] = field(init=False)
    ranks: tuple[tuple[str, int], ...] = field(init=False)

    def __post_init__(self) -> None:
        rank = self.inner.rank
        self.bounds = self.inner.bounds
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
    bounds: Mapping[str, tuple[float, float]] = field(init=False)
    ranks: tuple[tuple[str, int], ...] = field(init=False)

    def __post_init__(self) -> None:
        self.bounds = {name: bound for _, feed in self.members for name, bound in feed.bounds.items()}
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
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def cost(self, value: Value, limits: Limits) -> int:
        return self.side.cost(Payload(text=_text(value)), limits)

    def arrays(self, value: Value) -> Iterator[tuple[str, Array]]:
        for name, array in self.side.decode(Payload(text=_text(value))).feeds.items():
            yield name, array[0]


class _Nothing:
    """An argument that feeds no graph input: it says how the answer is cut."""

    ranks: tuple[tuple[str, int], ...] = ()
    bounds: Mapping[str, tuple[float, float]] = {}

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
    cuts: str = "",
) -> _Feed:
    """The feed of an argument; the one named `cuts` may feed nothing.

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
    if section.name == cuts and section.fed not in inputs:
        return _Nothing()
    plain = _plain(section, inputs, concepts, place)
    feed: _Plain | _Listed = plain
    for _ in range(0 if section.kind is FieldType.CONCEPT else section.depth):  # concepts are one vector already
        if isinstance(feed, _Listed):
            feed = _Listed(_Plain(plain.target, feed.ranks[0][1], feed.stacked, feed.cost, plain.bounds))
        else:
            feed = _Listed(feed)
    return feed


def _plain(
    section: ArgumentSection, inputs: Mapping[str, TensorSpec], concepts: Sequence[Concept], place: str
) -> _Plain:
    kind, target = section.kind, section.fed

    def plain(
        allowed: str,
        rank: int,
        make: Callable[[Value], Array],
        sizes: Any = None,
        bounds: tuple[float, float] | None = None,
    ) -> _Plain:
        _dtype(target, inputs, allowed, section, place)
        return _Plain(target, rank, make, sizes or (lambda value, limits: 16), {target: bounds} if bounds else {})

    if kind is FieldType.INT:
        return plain("iuf", 0, lambda value: np.asarray(value), bounds=section.range)
    if kind is FieldType.FLOAT:
        return plain("f", 0, lambda value: np.asarray(value, np.float64), bounds=section.range)
    if kind is FieldType.BOOL:
        return plain("biuf", 0, lambda value: np.asarray(value, np.bool_), bounds=(0, 1))
    if kind in (FieldType.STR, FieldType.TEXT):
        last = len(section.choices) - 1
        return plain("iu", 0, lambda value: np.asarray(_choice(_text(value), section)), bounds=(0, last))
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
        _check_width(inputs.get(target), len(concepts), "concepts are listed", section, place)
        places = {concept.id: place for place, concept in enumerate(concepts)}
        places |= {concept.name: place for place, concept in enumerate(concepts) if concept.name not in places}
        return plain("f", 1, lambda value: _vector(value if section.depth else [value], places, len(concepts)))
    if kind is FieldType.REGION:
        _check_width(inputs.get(target), 4, "numbers make a box", section, place)
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


def _check_width(
    spec: TensorSpec | None, width: int, what: str, section: ArgumentSection | ReturnSection, place: str
) -> None:
    """Raises: BundleInvalid: the last axis of an input or output has another length."""
    if not width:
        raise BundleInvalid(f"{place}: {section.type} needs concepts; list them in config.yaml or in labels.txt.")
    if spec is not None and spec.shape and spec.shape[-1] not in (None, width):
        raise BundleInvalid(f"{place}: {section.type}: {width} {what}, and {spec.name!r} is {describe(spec)}.")


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
    """Numbers in lists of lists; counted without recursion, as a caller may nest them deeply."""
    count, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting += item
        count += 1
    return count


def _numbers(value: Value, name: str) -> Array:
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError) as error:  # lists of different lengths, or nested too deeply
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
    """What makes the return value, or an item of it, of one row's outputs.

    Attributes:
        outputs: graph outputs it needs, and how many axes each has without the batch axis; `_ANY`: as the graph says.
    """

    outputs: tuple[tuple[str, int], ...]
    make: Callable[[Mapping[str, Array], PredictOptions], Value]


def _maker(
    section: ReturnSection, outputs: Mapping[str, TensorSpec], concepts: Sequence[Concept], place: str
) -> _Maker:
    """Raises: BundleInvalid: the graph has no such output, or one that cannot become this type."""
    kind = section.kind
    if section.items:
        makers = [_maker(item, outputs, concepts, place) for item in section.items]
        needed = _once(pair for maker in makers for pair in maker.outputs)
        if kind is FieldType.TUPLE:
            return _Maker(needed, lambda row, options: tuple(maker.make(row, options) for maker in makers))
        keys = [item.name for item in section.items]
        return _Maker(needed, lambda row, options: {k: m.make(row, options) for k, m in zip(keys, makers, strict=True)})
    if kind is FieldType.REGION:
        return _regions(section, outputs, concepts, place)
    if kind is FieldType.JSON and not section.output and not section.depth:
        names = [_output(name, outputs, "biuf", _ANY, section, place) for name in outputs]
        return _Maker(
            tuple((name, _ANY) for name in names),
            lambda row, options: {name: _finite(row[name], name).tolist() for name in names},
        )
    name = section.output or next(iter(outputs), "")
    if not section.output and len(outputs) > 1:
        raise BundleInvalid(f"{place}: returns: the graph has several outputs; name one of {', '.join(outputs)}.")
    rank, make = _of_one(section, name, outputs, concepts, place)
    return _Maker(((name, rank),), lambda row, options: make(row[name], options))


def _once(pairs: Iterable[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    """Each output once; one that several items read in different ways is left as it is."""
    ranks: dict[str, int] = {}
    for name, rank in pairs:
        ranks[name] = rank if ranks.get(name, rank) == rank else _ANY
    return tuple(ranks.items())


def _of_one(
    section: ReturnSection, name: str, outputs: Mapping[str, TensorSpec], concepts: Sequence[Concept], place: str
) -> tuple[int, Callable[[Array, PredictOptions], Value]]:
    """How many axes one output has, and how it becomes a value."""
    kind, depth = section.kind, section.depth
    allowed, rank = _TAKES[kind]
    if section.choices:
        allowed, rank = "iuf", 0
    rank = rank if rank == _ANY else rank + (0 if kind is FieldType.CONCEPT else depth)
    _output(name, outputs, allowed, rank, section, place)
    spec = outputs[name]
    if kind is FieldType.CONCEPT:
        _check_width(spec, len(concepts), "concepts are listed", section, place)
        return rank, lambda array, options: _concepts(_reduced(array, 1, name), section, concepts, options)
    if section.choices and spec.dtype is not None and spec.dtype.kind == "f":  # scores: the best one
        return rank + 1, lambda array, options: _nested(
            _best_choice(_reduced(array, rank + 1, name), name), depth, lambda item: _SINGLE[kind](item, section)
        )

    def make(array: Array, options: PredictOptions) -> Value:
        if rank != _ANY:
            array = _reduced(array, rank, name)
        elif array.ndim < depth:
            raise InferenceFailed(f"The model's output {name!r} has {array.ndim} axes; at least {depth} are needed.")
        return _nested(array, depth, lambda item: _SINGLE[kind](item, section))

    return rank, make


def _best_choice(scores: Array, name: str) -> Array:
    if not scores.shape[-1]:
        raise InferenceFailed(f"The model's output {name!r} has no scores to choose by.")
    return np.asarray(_finite(scores, name).argmax(axis=-1))


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
        return array.tobytes().partition(b"\0")[0].decode("utf-8", "replace")
    index = int(array)
    if not 0 <= index < len(section.choices):
        raise InferenceFailed(f"The model answered choice {index}; there are {len(section.choices)}.")
    return section.choices[index]


def _picture(array: Array, section: ReturnSection) -> Media:
    if array.dtype.kind == "f":
        array = np.clip(np.rint(_finite(array, section.output) * section.scale), 0, 255)
    if section.layout == "nchw":
        array = array.transpose(1, 2, 0)
    if array.shape[2] not in (1, 3, 4) or not array.size:
        raise InferenceFailed(
            f"The model's output {section.output!r} has shape {list(array.shape)} as a picture; height, width and 1, 3 "
            "or 4 channels are needed."
        )
    return Media(images.encode_png(np.ascontiguousarray(array, np.uint8)))


def _whole_number(array: Array, section: ReturnSection) -> int:
    number = int(array)
    if number >= 2**63:
        raise InferenceFailed(f"The model answered {number}, which is more than 64 bits can say with a sign.")
    return number


_SINGLE: dict[FieldType, Callable[[Array, ReturnSection], Value]] = {
    FieldType.STR: _chosen,
    FieldType.TEXT: lambda array, section: Media(_chosen(array, section).encode()),
    FieldType.BYTES: lambda array, section: array.tobytes(),
    FieldType.VIDEO: lambda array, section: Media(array.tobytes()),
    FieldType.INT: _whole_number,
    FieldType.FLOAT: lambda array, section: float(array),
    FieldType.BOOL: lambda array, section: bool(array),
    FieldType.NDARRAY: lambda array, section: array,
    FieldType.JSON: lambda array, section: _listed(_finite(array, section.output)),
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
    boxes_spec = outputs[_output(section.output, outputs, "f", 2, section, place)]
    scores_spec = outputs[_output(section.scores, outputs, "f", 1, section, place)]
    _check_width(boxes_spec, 4, "numbers make a box", section, place)
    by_class = not section.labels and len(scores_spec.shape) >= len(boxes_spec.shape)
    ranks = [(section.output, 2), (section.scores, 1 + by_class)]
    if section.labels:
        ranks.append((_output(section.labels, outputs, "iuf", 1, section, place), 1))

    def make(row: Mapping[str, Array], options: PredictOptions) -> list[Region]:
        boxes, scores, *more = [_finite(_reduced(row[name], rank, name), name) for name, rank in ranks]
        if by_class and not scores.shape[1]:
            raise InferenceFailed(f"The model's output {section.scores!r} has no classes.")
        labels = more[0] if more else scores.argmax(axis=1) if by_class else np.zeros(len(scores), np.int64)
        scores = scores.max(axis=1) if by_class else scores
        if boxes.shape[1] != 4 or not len(boxes) == len(scores) == len(labels):
            raise InferenceFailed(
                f"The model gave boxes {list(boxes.shape)}, {len(scores)} scores, {len(labels)} labels; boxes of four "
                "numbers, and equally many, are needed."
            )
        order = np.argsort(-scores, kind="stable")
        kept = [int(i) for i in order if scores[i] >= options.min_value]
        if options.selected is not None:
            kept = [i for i in kept if int(labels[i]) in options.selected]
        return [_region(_unit(boxes[i], section), int(labels[i]), float(scores[i]), concepts) for i in kept]

    return _Maker(_once(ranks), make)


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


def _output(
    name: str, outputs: Mapping[str, TensorSpec], allowed: str, rank: int, section: ReturnSection, place: str
) -> str:
    spec = outputs.get(name)
    if spec is None:
        raise BundleInvalid(
            f"{place}: returns: the graph has no output {name!r}; it has {', '.join(map(repr, outputs))}."
        )
    if spec.dtype is None or spec.dtype.kind not in allowed:
        raise BundleInvalid(f"{place}: returns: {section.type} cannot be made of {name!r}, which is {describe(spec)}.")
    bytewise = allowed == "u" or section.kind in (FieldType.IMAGE, FieldType.FRAME)
    if bytewise and spec.dtype.kind == "u" and spec.dtype.itemsize != 1:
        raise BundleInvalid(f"{place}: returns: {section.type} is made of uint8; {name!r} is {describe(spec)}.")
    if spec.shape and rank > len(spec.shape):
        raise BundleInvalid(f"{place}: returns: {section.type} needs {rank} axes; {name!r} is {describe(spec)}.")
    return name


def _reduced(array: Array, rank: int, name: str) -> Array:
    """The array without axes of length 1 around it. Raises: InferenceFailed: it has other axes than it should."""
    while array.ndim > rank and array.shape[0] == 1:
        array = array[0]
    while array.ndim > rank and array.shape[-1] == 1:
        array = array[..., 0]
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
