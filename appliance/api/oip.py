"""The Open Inference Protocol (KServe V2) without its wire: a model as named tensors, and one inference over them.

A raw model has its graph's own inputs and outputs. A model of images or texts has one BYTES input, a file or a text an
element; a classifier answers with `values` and `concepts` (ids), best first, an embedder with `embedding`. The protocol
has no error for one row of many: an input at fault fails the request. `kserve` and `kserve_http` bring tensors here.
Source: kserve/open-inference-protocol, specification/protocol.
"""

import asyncio
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from appliance.api.context import Context
from appliance.api.direct import Direct, ModelName
from appliance.api.jsonbody import from_base64
from appliance.api.limits import Asked, options_for, usual_options
from appliance.core.config import Limits
from appliance.core.errors import InvalidArgument, InvalidInput, TooManyInputs
from appliance.core.types import Array, ConceptScores, Embedding, Payload, PredictOptions, Result, Tensors
from appliance.engine.session import TensorSpec
from appliance.media.text import decode_text
from appliance.tasks.classifier import MAX_CONCEPTS, Classifier
from appliance.tasks.embedder import Embedder
from appliance.tasks.servable import Servable
from appliance.tasks.tensors import RawTensors

PLATFORM = "onnxruntime_onnx"
"""What Triton calls models of ours, and its clients look for."""

BYTES = "BYTES"
DTYPES: Mapping[str, "np.dtype[Any]"] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
}
"""The protocol's datatypes that NumPy has, too; little-endian on the wire, as the machines we run on."""

_DATATYPES = {dtype: name for name, dtype in DTYPES.items()}
_AXES = 32
_LONGEST = 2**63 - 1
_LENGTH = struct.Struct("<I")
_LARGE = 256 * 1024
"""Bytes of elements from which they are decoded on a thread."""

_SMALL = 4 * 1024
"""Bytes of an array up to which to copy them is cheaper than to make a view."""

VALUES, CONCEPTS, EMBEDDING = "values", "concepts", "embedding"

Parameters = Mapping[str, bool | int | float | str]


@dataclass(frozen=True, slots=True)
class Declared:
    """An input or output as metadata tells it; -1 is an axis of any length."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(slots=True)
class Tensor:
    """A tensor with its values: an array of `shape`, or the elements of a BYTES tensor in C order.

    Attributes:
        textual: whether the elements came as texts; then files are base64.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: Array | list[bytes]
    textual: bool = False


@dataclass(slots=True)
class Understood:
    """What an inference asks of its model.

    Attributes:
        outputs: names of those asked for, in that order; all if none was.
    """

    payloads: list[Payload]
    options: PredictOptions
    outputs: Sequence[str]


@dataclass(slots=True)
class Answer:
    """What an inference gave: the outputs asked for, of that version of the model."""

    version: str
    tensors: list[Tensor]


# ---- models ----------------------------------------------------------------------------------------------------------


class Form:
    """A model as named tensors: a companion of its servable.

    Attributes:
        inputs, outputs: what it takes and gives, by name.
    """

    def __init__(self, servable: Servable) -> None:
        """Raises: InvalidArgument: it has no form in tensors."""
        task = servable.task
        inputs: Sequence[Declared]
        outputs: Sequence[Declared]
        if isinstance(task, RawTensors):
            inputs = [_declared(spec) for spec in task.inputs]
            outputs = [_declared(spec) for spec in task.output_specs]
        elif isinstance(task, Classifier):
            inputs = [Declared(task.method.arguments[0].name, BYTES, (-1,))]
            outputs = [Declared(VALUES, "FP32", (-1, -1)), Declared(CONCEPTS, BYTES, (-1, -1))]
        elif isinstance(task, Embedder):
            inputs = [Declared(task.method.arguments[0].name, BYTES, (-1,))]
            outputs = [Declared(EMBEDDING, "FP32", (-1, dimensions(servable) or -1))]
        else:
            raise InvalidArgument(
                f"Model {servable.key} has a predict method of its own, without a form in tensors; call it by "
                "Clarifai's API."
            )
        self.inputs = {declared.name: declared for declared in inputs}
        self.outputs = {declared.name: declared for declared in outputs}


def dimensions(servable: Servable) -> int:
    """The length of an embedder's vectors; 0 when the graph does not tell."""
    name = servable.task.outputs(PredictOptions())[0]
    shape = next((spec.shape for spec in servable.model.outputs if spec.name == name), ())
    known = [axis for axis in shape[1:] if axis is not None]
    return math.prod(known) if known and len(known) == len(shape) - 1 else 0


def _declared(spec: TensorSpec) -> Declared:
    assert spec.dtype is not None, "a raw task has numeric tensors only"
    return Declared(spec.name, _DATATYPES[spec.dtype], tuple(-1 if axis is None else axis for axis in spec.shape))


# ---- tensors ---------------------------------------------------------------------------------------------------------


def dtype_of(name: str, datatype: str) -> "np.dtype[Any] | None":
    """The dtype of a numeric datatype, None for BYTES. Raises: InvalidInput: it is neither."""
    if datatype == BYTES:
        return None
    found = DTYPES.get(datatype)
    if found is None:
        why = "NumPy has no such numbers: send FP32" if datatype == "BF16" else f"use {', '.join(DTYPES)} or {BYTES}"
        raise InvalidInput(f"The input {name[:80]!r} has datatype {datatype[:40]!r}; {why}.")
    return found


def count_of(name: str, shape: Sequence[int]) -> int:
    """How many elements a shape has. Raises: InvalidInput: it is none that an array can have."""
    if len(shape) > _AXES:
        raise InvalidInput(f"The input {name[:80]!r} has {len(shape)} axes; the limit is {_AXES}.")
    count = 1  # Python's integers do not overflow
    for axis in shape:
        if axis < 0:
            raise InvalidInput(f"The input {name[:80]!r} has an axis of negative length.")
        if axis > _LONGEST:  # JSON's numbers have no end
            raise InvalidInput(f"The input {name[:80]!r} has an axis longer than any array can have.")
        count *= axis
    return count


def from_bytes(name: str, datatype: str, shape: tuple[int, ...], data: bytes | memoryview, limits: Limits) -> Tensor:
    """A tensor in the protocol's binary form; an array looks into `data` and copies nothing.

    Raises: InvalidInput: datatype, shape and bytes contradict each other. TooManyInputs.
    """
    dtype, count = dtype_of(name, datatype), count_of(name, shape)
    if dtype is None:
        _check_elements(count, limits)
        return Tensor(name, datatype, shape, _elements(name, count, memoryview(data)))
    wanted = count * dtype.itemsize
    if wanted != len(data):
        raise InvalidInput(
            f"The input {name[:80]!r} of datatype {datatype} and shape {list(shape)} needs {wanted} bytes; it came "
            f"with {len(data)}."
        )
    if dtype.kind == "b" and np.frombuffer(data, np.uint8).max(initial=0) > 1:
        raise InvalidInput(f"The input {name[:80]!r} is BOOL and has bytes that are neither 0 nor 1.")
    array = np.frombuffer(data, dtype)
    if not array.flags.aligned:  # a tensor behind JSON of any length
        array = array.copy()
    return Tensor(name, datatype, shape, _shaped(name, shape, array))


def from_array(name: str, datatype: str, shape: tuple[int, ...], values: Array) -> Tensor:
    """A numeric tensor of values in C order. Raises: InvalidInput: there are more or fewer than the shape says."""
    _check_count(name, shape, len(values))
    return Tensor(name, datatype, shape, _shaped(name, shape, values))


def from_elements(name: str, shape: tuple[int, ...], elements: Sequence[bytes], limits: Limits) -> Tensor:
    """A BYTES tensor. Raises: InvalidInput, TooManyInputs."""
    _check_count(name, shape, len(elements))
    _check_elements(len(elements), limits)
    return Tensor(name, BYTES, shape, list(elements))


def from_texts(name: str, shape: tuple[int, ...], texts: Sequence[str], limits: Limits) -> Tensor:
    """A BYTES tensor from where there are no bytes. Raises: InvalidInput, TooManyInputs."""
    _check_count(name, shape, len(texts))
    _check_elements(len(texts), limits)
    try:
        return Tensor(name, BYTES, shape, [text.encode() for text in texts], textual=True)
    except UnicodeEncodeError:
        raise InvalidInput(f"The input {name[:80]!r} has half a character (a lone surrogate).") from None


def to_bytes(tensor: Tensor) -> bytes | memoryview:
    """A tensor in the protocol's binary form."""
    values = tensor.values
    if isinstance(values, list):
        return b"".join(part for element in values for part in (_LENGTH.pack(len(element)), element))
    if values.nbytes < _SMALL:
        return values.tobytes()
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


def _check_count(name: str, shape: tuple[int, ...], found: int) -> None:
    count = count_of(name, shape)
    if count != found:
        raise InvalidInput(f"The input {name[:80]!r} of shape {list(shape)} has {count} elements; {found} came.")


def _check_elements(count: int, limits: Limits) -> None:
    """Each is an input: before the first is looked at there must not be too many. Raises: TooManyInputs."""
    if count > limits.inputs_per_request:
        raise TooManyInputs(count, limits.inputs_per_request)


def _elements(name: str, count: int, data: memoryview) -> list[bytes]:
    elements = []
    place = 0
    for index in range(count):
        start = place + _LENGTH.size
        if start > len(data):
            raise InvalidInput(f"The input {name[:80]!r} ends before element {index} of {count}.")
        (length,) = _LENGTH.unpack_from(data, place)
        place = start + length
        if place > len(data):
            raise InvalidInput(
                f"The input {name[:80]!r} says that element {index} has {length} bytes; {len(data) - start} are left."
            )
        elements.append(bytes(data[start:place]))
    if place != len(data):
        raise InvalidInput(f"The input {name[:80]!r} has {len(data) - place} bytes after its last element.")
    return elements


def _shaped(name: str, shape: tuple[int, ...], values: Array) -> Array:
    try:
        return values.reshape(shape)
    except ValueError as error:  # nothing in it, and axes whose product is too large all the same
        raise InvalidInput(
            f"The input {name[:80]!r} of shape {list(shape)} is larger than any array can be."
        ) from error


# ---- inference -------------------------------------------------------------------------------------------------------


async def infer(
    direct: Direct,
    context: Context,
    name: ModelName,
    tensors: Sequence[Tensor],
    wanted: Sequence[str],
    parameters: Parameters,
) -> Answer:
    """Run a model on tensors.

    Args:   wanted: names of outputs; none for all.
    Raises: RequestError: the request is at fault, or one of its inputs. CapacityError, ModelError.
    """
    with direct.serving(context, name) as servable:
        # Texts and files are decoded now.
        large = sum(len(e) for t in tensors if isinstance(t.values, list) for e in t.values) >= _LARGE
        given = servable, tensors, wanted, parameters, direct.config.limits
        asked = await asyncio.to_thread(understood, *given) if large else understood(*given)
        return answer_of(servable, asked, await direct.results(context, servable, asked.payloads, asked.options))


def understood(
    servable: Servable, tensors: Sequence[Tensor], wanted: Sequence[str], parameters: Parameters, limits: Limits
) -> Understood:
    """What a request asks of a model; see `infer`. Raises: InvalidArgument, InvalidInput."""
    form = servable.companion(Form)
    outputs = _chosen(form, wanted)
    options = _options(servable, parameters, limits)
    return Understood(_payloads(servable, form.inputs, tensors), options, outputs)


def answer_of(servable: Servable, asked: Understood, results: Sequence[Result]) -> Answer:
    """The answer of what the payloads gave, a result each."""
    found = _given(servable, results)
    return Answer(servable.version, [found[output] for output in asked.outputs])


def _chosen(form: Form, wanted: Sequence[str]) -> Sequence[str]:
    if not wanted:
        return tuple(form.outputs)
    for name in wanted:
        if name not in form.outputs:
            raise InvalidArgument(f"The model has no output {name[:80]!r}; it has {', '.join(form.outputs)}.")
    if len(set(wanted)) < len(wanted):
        raise InvalidArgument("An output is asked for twice.")
    return wanted


def _options(servable: Servable, parameters: Parameters, limits: Limits) -> PredictOptions:
    if not parameters:
        return usual_options(limits.concepts_default)
    known = (MAX_CONCEPTS,) if isinstance(servable.task, Classifier) else ()
    check_parameters("The request", parameters, known, "this model")
    most = parameters.get(MAX_CONCEPTS, limits.concepts_default)
    if type(most) is not int or not 1 <= most <= limits.concepts_max:
        right = f"a whole number from 1 to {limits.concepts_max}"
        raise InvalidArgument(f"The parameter {MAX_CONCEPTS} is {str(most)[:20]}; it must be {right}.")
    options, _ = options_for(Asked(max_concepts=most), servable.concepts, limits)
    return options


def check_parameters(place: str, given: Parameters, known: Sequence[str], taker: str = "it") -> None:
    """Raises: InvalidArgument: a parameter that nobody here understands; to ignore it would be to answer otherwise."""
    for name in given:
        if name not in known:
            raise InvalidArgument(
                f"{place} has the parameter {name[:80]!r}; {taker} takes {', '.join(known) if known else 'none'}."
            )


def _payloads(servable: Servable, declared: Mapping[str, Declared], tensors: Sequence[Tensor]) -> list[Payload]:
    """The tensors as inputs of the task: one for a raw model, one an element for others."""
    found: dict[str, Tensor] = {}
    for tensor in tensors:
        spec = declared.get(tensor.name)
        if spec is None:
            raise InvalidInput(f"The model has no input {tensor.name[:80]!r}; it takes {', '.join(declared)}.")
        if tensor.name in found:
            raise InvalidInput(f"The input {tensor.name!r} came twice.")
        if tensor.datatype != spec.datatype:
            raise InvalidInput(
                f"The input {tensor.name!r} came as {tensor.datatype}; it is {spec.datatype} {list(spec.shape)}."
            )
        found[tensor.name] = tensor
    if len(found) < len(declared):
        missing = [name for name in declared if name not in found]
        raise InvalidInput(f"The model's input {', '.join(map(repr, missing))} is missing.")
    if isinstance(servable.task, RawTensors):
        arrays: dict[str, Array] = {}
        for name, tensor in found.items():
            _check_axes(tensor, declared[name])
            assert not isinstance(tensor.values, list)
            arrays[name] = tensor.values
        return [Payload(arrays=arrays)]
    (tensor,) = found.values()
    if any(axis != 1 for axis in tensor.shape[1:]) or not tensor.shape:
        raise InvalidInput(
            f"The input {tensor.name!r} has shape {list(tensor.shape)}; it is [n], or [n, 1]: an element an input."
        )
    assert isinstance(tensor.values, list)
    if servable.task.kind == "text":
        return [Payload(text=decode_text(element)) for element in tensor.values]
    if tensor.textual:
        return [Payload(image=_file(tensor.name, index, element)) for index, element in enumerate(tensor.values)]
    return [Payload(image=element) for element in tensor.values]


def _file(name: str, index: int, element: bytes) -> bytes:
    try:
        return from_base64(element.decode())
    except ValueError:
        raise InvalidInput(
            f"The input {name!r} has an element {index} that is not base64, as files in JSON are; or send binary data."
        ) from None


def _check_axes(tensor: Tensor, spec: Declared) -> None:
    if len(tensor.shape) == len(spec.shape):
        for have, want in zip(tensor.shape, spec.shape, strict=True):
            if have != want and want != -1:
                break
        else:
            return
    raise InvalidInput(
        f"The input {tensor.name!r} has shape {list(tensor.shape)}; it is {spec.datatype} {list(spec.shape)}, "
        "-1 for any length."
    )


def _given(servable: Servable, results: Sequence[Result]) -> dict[str, Tensor]:
    """The results as tensors by name."""
    first = results[0]
    if isinstance(first, Tensors):
        return {name: _tensor(name, array) for name, array in first.arrays.items()}
    if isinstance(first, Embedding):
        vectors = [result.vector for result in results if isinstance(result, Embedding)]
        return {EMBEDDING: _tensor(EMBEDDING, vectors[0][None] if len(vectors) == 1 else np.stack(vectors))}
    scores = [result for result in results if isinstance(result, ConceptScores)]
    values = np.array([row.values for row in scores], np.float32)
    ids = [servable.concepts[index].id.encode() for row in scores for index in row.indices.tolist()]
    return {VALUES: _tensor(VALUES, values), CONCEPTS: Tensor(CONCEPTS, BYTES, values.shape, ids)}


def _tensor(name: str, array: Array) -> Tensor:
    return Tensor(name, _DATATYPES[array.dtype], array.shape, array)
