"""Predict replies, joined from pieces that were serialised beforehand.

All outputs of a reply share their status, time and model; a concept's id, name and app id never change. So those are
serialised once, and an output is a handful of pieces, where building and serialising it as messages takes three times
as long and more. All pieces of a reply are joined once, so that an array is copied once. What comes out parses to the
message that would have been built; a test compares the two.

Source of the encoding: protobuf.dev/programming-guides/encoding. Field numbers are read from Clarifai's descriptors.
"""

import itertools
import math
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from clarifai_grpc.grpc.api.status import status_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from appliance.api import messages, status, values
from appliance.api.varints import SMALL, Pieces, varint
from appliance.catalog.bundle import BundleConfig
from appliance.catalog.view import Version
from appliance.core.errors import ApplianceError
from appliance.core.types import Array, ConceptScores, Embedding, MethodField, Result, Returned, Tensors
from appliance.tasks.servable import Answer, Servable

_FIXED32 = 5
_LENGTH = 2
"""Wire types: four bytes, and a length with as many bytes."""

_LARGE = 4096
"""Bytes of an array from which it is dearer to copy it once more than to look into it."""

_MANY = 64
"""Concepts in a reply from which their values are written all at once."""

_FLOAT: Callable[[float], bytes] = struct.Struct("<f").pack


@dataclass(slots=True)
class Written:
    """An answer as the bytes of its `Data`."""

    data: bytes | memoryview


@dataclass(slots=True)
class Reply:
    """A reply message, serialised, and the Clarifai code in its status."""

    body: bytes
    code: int


def _key(message: Any, field: str, wire_type: int = _LENGTH) -> bytes:
    """What stands before a field's content."""
    return varint(message.DESCRIPTOR.fields_by_name[field].number << 3 | wire_type)


_RESPONSE_STATUS = _key(service_pb2.MultiOutputResponse, "status")
_RESPONSE_OUTPUT = _key(service_pb2.MultiOutputResponse, "outputs")
_NEW_OUTPUT_ID = _key(resources_pb2.Output, "id") + varint(len(messages.new_id()))
_OUTPUT_STATUS = _key(resources_pb2.Output, "status")
_OUTPUT_CREATED_AT = _key(resources_pb2.Output, "created_at")
_OUTPUT_MODEL = _key(resources_pb2.Output, "model")
_OUTPUT_INPUT = _key(resources_pb2.Output, "input")
_OUTPUT_DATA = _key(resources_pb2.Output, "data")
_INPUT_ID = _key(resources_pb2.Input, "id")
_NEW_INPUT_ID = _INPUT_ID + varint(len(messages.new_id()))
_DATA_CONCEPT = _key(resources_pb2.Data, "concepts")
_DATA_EMBEDDING = _key(resources_pb2.Data, "embeddings")
_DATA_NDARRAY = _key(resources_pb2.Data, "ndarray")
_DATA_PART = _key(resources_pb2.Data, "parts")
_PART_DATA = _key(resources_pb2.Part, "data")
_CONCEPT_VALUE = _key(resources_pb2.Concept, "value", _FIXED32)
_EMBEDDING_VECTOR = _key(resources_pb2.Embedding, "vector")
_NDARRAY_BUFFER = _key(resources_pb2.NDArray, "buffer")
_STATUS_REQ_ID = _key(status_pb2.Status, "req_id")

_SUCCESS = status.success().SerializeToString()
_SUCCESS_CODE = int(status.SUCCESS.code)
_LAST_FOUR = np.arange(-4, 0)
_RETURN = resources_pb2.Part(id="return").SerializeToString()
_now = Timestamp()
"""Used over and over, on the loop's thread: to set two numbers is cheaper than to make a message."""


def _field(key: bytes, content: bytes) -> bytes:
    """A field with its length."""
    size = len(content)
    return key + (SMALL[size] if size < 1024 else varint(size)) + content


def length_head(number: int, size: int) -> bytes:
    """What stands before `size` bytes of a field with that number."""
    return varint(number << 3 | _LENGTH) + varint(size)


def _enclosed(key: bytes, pieces: Pieces) -> Pieces:
    """A field with these pieces in it."""
    size = 0
    for piece in pieces:
        size += len(piece)
    return [key + (SMALL[size] if size < 1024 else varint(size)), *pieces]


def _present(key: bytes, pieces: Pieces) -> Pieces:
    """A field that is left out when nothing is in it: no concept passed the filter, say."""
    return _enclosed(key, pieces) if any(pieces) else []


class ReplyWriter:
    """Writes the replies of one servable."""

    def __init__(self, servable: Servable) -> None:
        self._concepts = [
            _concept(resources_pb2.Concept(id=concept.id, name=concept.name, app_id=servable.key.app_id))
            for concept in servable.concepts
        ]
        self._sizes = np.array([len(concept) + 4 for concept in self._concepts], np.int64)
        self._brief: tuple[BundleConfig, float, bytes] | None = None

    def brief(self, version: Version[Servable] | None) -> bytes:
        """The model as each output names it; b"" when the version is not in the catalog any more."""
        if version is None:
            return b""
        return self.brief_of_ready(version) if version.ready else _brief(version)

    def brief_of_ready(self, version: Version[Servable]) -> bytes:
        """The same for a version that is known to be ready."""
        known = self._brief
        if known is None or known[0] is not version.config or known[1] != version.first_seen:
            known = self._brief = (version.config, version.first_seen, _brief(version))
        return known[2]

    @staticmethod
    def head(brief: bytes, success: bytes) -> bytes:
        """What all good outputs of a reply share; `success` is their status."""
        _now.seconds, _now.nanos = divmod(time.time_ns(), 10**9)
        created_at = _now.SerializeToString()
        return _field(_OUTPUT_STATUS, success) + _field(_OUTPUT_CREATED_AT, created_at) + brief

    def scored(self, answers: Sequence[Answer | Written]) -> Sequence[Answer | Written]:
        """The answers; where there are many concepts in them, those as bytes already: together that takes a third."""
        scores = [answer for answer in answers if isinstance(answer, ConceptScores)]
        if sum([len(each.indices) for each in scores]) < _MANY:
            return answers
        data = iter(self._all_scores(scores))
        return [Written(next(data)) if isinstance(answer, ConceptScores) else answer for answer in answers]

    def output(
        self,
        head: bytes,
        given: resources_pb2.Input,
        result: Result | Written,
        returns: MethodField | None = None,
        *,
        pythonic: bool = False,
    ) -> Pieces:
        """An output with an answer, as a field of the reply.

        Args:    returns: the type of what a declared method returned.
        """
        shared = _NEW_OUTPUT_ID + messages.new_id().encode() + head + _field(_OUTPUT_INPUT, _echo(given))
        data = self._returned(result, returns) if pythonic else self._data(result, returns)
        return _enclosed(_RESPONSE_OUTPUT, [shared, *_present(_OUTPUT_DATA, data)])

    def _data(self, result: Result | Written, returns: MethodField | None) -> Pieces:
        """The answer where callers of the old form look for it: concepts, embeddings, ndarray, text.raw, …"""
        if isinstance(result, Written):
            return [result.data]
        if isinstance(result, ConceptScores):
            return [self._scores(result)]
        if isinstance(result, Embedding):
            return _embedding(result.vector)
        if isinstance(result, Returned):
            return [written(result, returns, pythonic=False).data]
        return _tensors(result)

    def _returned(self, result: Result | Written, returns: MethodField | None) -> Pieces:
        """The answer where pythonic callers look for it: `parts[0]` with id `return`, of the signature's type."""
        if isinstance(result, Embedding):
            data = _ndarray(result.vector)
        elif isinstance(result, Returned):
            data = [written(result, returns, pythonic=True).data]
        else:
            data = self._data(result, returns)
        return _enclosed(_DATA_PART, [_RETURN, *_present(_PART_DATA, data)])

    def _scores(self, scores: ConceptScores) -> bytes:
        concepts = self._concepts
        pairs = zip(scores.indices.tolist(), scores.values.tolist(), strict=True)
        return b"".join([concepts[index] + _FLOAT(value) for index, value in pairs])

    def _all_scores(self, scores: Sequence[ConceptScores]) -> list[memoryview]:
        """The concepts of each answer: all are joined with room for their values, then all values are put there."""
        indices = np.concatenate([each.indices for each in scores])
        values = np.concatenate([each.values for each in scores]).astype("<f4", copy=False)
        concepts = self._concepts
        joined = bytearray(4).join([*[concepts[index] for index in indices.tolist()], b""])
        ends = self._sizes[indices].cumsum()
        np.frombuffer(joined, np.uint8)[ends[:, None] + _LAST_FOUR] = values[:, None].view(np.uint8)
        places = [0, *ends.tolist()]
        counts = [0, *itertools.accumulate([len(each.indices) for each in scores])]
        data = memoryview(joined)
        return [data[places[first] : places[last]] for first, last in itertools.pairwise(counts)]


def written(result: Returned, returns: MethodField | None, *, pythonic: bool) -> Written:
    """What a declared method returned, where callers of either form look for it; on any thread."""
    assert returns is not None, "what a declared method returns has a type"
    data = values.write(returns, result.value)
    if data.string_value and not pythonic:
        data.text.raw = data.string_value
    return Written(data.SerializeToString())


def error_output(given: resources_pb2.Input, error: ApplianceError, req_id: str) -> Pieces:
    """An output with an error, as a field of the reply."""
    output = resources_pb2.Output()
    messages.fill_error(output, given, error, req_id)
    return [_field(_RESPONSE_OUTPUT, output.SerializeToString())]


def reply(outputs: Pieces, count: int, failures: Sequence[ApplianceError], note: str, req_id: str) -> Reply:
    """The whole reply of `count` outputs; `failures` are the errors among them, the first one first."""
    if not failures and not note:
        return good_reply(outputs, success(req_id))
    conclusion = messages.conclusion(count, failures, note, req_id)
    return Reply(b"".join((_field(_RESPONSE_STATUS, conclusion.SerializeToString()), *outputs)), conclusion.code)


def good_reply(outputs: Pieces, success: bytes) -> Reply:
    """The whole reply when every output is good and there is nothing to note."""
    return Reply(b"".join((_field(_RESPONSE_STATUS, success), *outputs)), _SUCCESS_CODE)


def success(req_id: str) -> bytes:
    """The status of what is good."""
    return _SUCCESS + _field(_STATUS_REQ_ID, req_id.encode())


def _echo(given: resources_pb2.Input) -> bytes:
    """The input as it is sent back: its id (or a new one) and its URL."""
    data = given.data
    if (data.HasField("image") and data.image.url) or (data.HasField("text") and data.text.url):
        output = resources_pb2.Output()
        messages.fill_input(output, given)
        return bytes(output.input.SerializeToString())
    return _field(_INPUT_ID, given.id.encode()) if given.id else _NEW_INPUT_ID + messages.new_id().encode()


def _brief(version: Version[Servable]) -> bytes:
    return _field(_OUTPUT_MODEL, messages.model_brief(version).SerializeToString())


def _concept(concept: resources_pb2.Concept) -> bytes:
    """A concept up to its value, which is the last of its fields; the length counts that too."""
    content = concept.SerializeToString()
    return _DATA_CONCEPT + varint(len(content) + len(_CONCEPT_VALUE) + 4) + content + _CONCEPT_VALUE


def _tensors(tensors: Tensors) -> Pieces:
    """A single array as such, several as parts with their names."""
    if len(tensors.arrays) == 1:
        return _ndarray(next(iter(tensors.arrays.values())))
    pieces: Pieces = []
    for name, array in tensors.arrays.items():
        pieces += _enclosed(_DATA_PART, [_part(name), *_enclosed(_PART_DATA, _ndarray(array))])
    return pieces


@lru_cache(maxsize=1024)
def _part(name: str) -> bytes:
    return resources_pb2.Part(id=name).SerializeToString()


def _ndarray(array: Array) -> Pieces:
    before, after = _around(array.shape, array.dtype)
    return _between(before, array, after)


def _embedding(vector: Array) -> Pieces:
    before, after = _around_vector(len(vector))
    return _between(before, vector.astype("<f4", copy=False), after)


def _between(before: bytes, array: Array, after: bytes) -> Pieces:
    """An array's bytes in C order, between those two."""
    if array.nbytes < _LARGE:
        return [before + array.tobytes() + after]
    return [before, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, after]


@lru_cache(maxsize=64)
def _around_vector(count: int) -> tuple[bytes, bytes]:
    """What stands before and after the floats of an embedding, which are packed: the bytes of the array."""
    start = _EMBEDDING_VECTOR + varint(4 * count)
    after = resources_pb2.Embedding(num_dimensions=count).SerializeToString()
    return _DATA_EMBEDDING + varint(len(start) + 4 * count + len(after)) + start, after


@lru_cache(maxsize=1024)
def _around(shape: tuple[int, ...], dtype: "np.dtype[Any]") -> tuple[bytes, bytes]:
    """What stands before and after an array's bytes: shape and dtype are a few in a model's answers."""
    size = math.prod(shape) * dtype.itemsize
    start = _NDARRAY_BUFFER + varint(size)
    after = resources_pb2.NDArray(shape=shape, dtype=dtype.name).SerializeToString()
    return _DATA_NDARRAY + varint(len(start) + size + len(after)) + start, after
