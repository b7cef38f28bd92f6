"""Arrays between Clarifai's `NDArray` message and NumPy."""

import math
from functools import lru_cache
from typing import Any

import numpy as np
from clarifai_grpc.grpc.api import resources_pb2

from appliance.core.errors import InvalidInput
from appliance.core.types import Array

_NDARRAY_LIMIT = 32
"""Axes an array may have: NumPy's own bound in its older releases, far beyond any graph."""

_DTYPE_LIMIT = 16
"""Characters a dtype's name may have; NumPy reads a long list of field types for minutes."""


def array(message: resources_pb2.NDArray, name: str, content: memoryview | None = None) -> Array:
    """Bytes, shape and dtype as an array (C order, the machine's byte order).

    Args:    content: the bytes, where they were left out of the message; they are copied, as they may lie at any
        address, and the array may outlive the request.
    Raises: InvalidInput: they contradict each other, or the dtype is not numeric.
    """
    buffer = message.buffer if content is None else content
    try:
        dtype, itemsize = _dtype(message.dtype)
    except Exception as error:  # its parser raises TypeError, ValueError, SyntaxError, warnings and more
        raise InvalidInput(
            f"{_label(name)} has dtype {message.dtype[:40]!r}; use a NumPy name such as float32."
        ) from error
    if not itemsize:
        raise InvalidInput(f"{_label(name)} has dtype {message.dtype[:40]!r}; numbers are needed, of 64 bits at most.")
    shape = tuple(message.shape[:])  # a slice is read at once, an iterator step by step
    if len(shape) > _NDARRAY_LIMIT:
        raise InvalidInput(f"{_label(name)} has {len(shape)} axes; the limit is {_NDARRAY_LIMIT}.")
    # Python's integers: a product that overflowed could agree with the buffer by accident.
    size = math.prod(shape) * itemsize
    if size != len(buffer):
        raise InvalidInput(
            f"{_label(name)} of shape {list(shape)} and dtype {dtype} needs {size} bytes; its buffer has {len(buffer)}."
        )
    try:
        return np.ndarray(shape, dtype, buffer if content is None else bytes(buffer))
    except ValueError as error:  # nothing in it, and axes whose product is too large all the same
        raise InvalidInput(f"{_label(name)} of shape {list(shape)} is larger than any array can be.") from error


def _label(name: str) -> str:
    return f"The array {name[:80]!r}" if name else "The array"


@lru_cache(maxsize=256)
def _dtype(name: str) -> tuple["np.dtype[Any]", int]:
    """The dtype and bytes of a number; 0 bytes when it is none that we take."""
    if not 0 < len(name) <= _DTYPE_LIMIT:
        raise ValueError("no name of a number's type is that long")
    dtype = np.dtype(name)
    return dtype, dtype.itemsize if dtype.kind in "biuf" and dtype.itemsize <= 8 else 0


def fill(message: resources_pb2.NDArray, value: Array) -> None:
    """Write an array into a message: C order, the machine's byte order."""
    message.buffer = value.astype(value.dtype.newbyteorder("="), copy=False).tobytes()
    message.shape.extend(value.shape)
    message.dtype = value.dtype.name
    message.SetInParent()
