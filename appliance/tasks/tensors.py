"""Raw tensors: arrays in, arrays out; for every graph that has no task of its own."""

from collections.abc import Mapping, Sequence

import numpy as np

from appliance.core.config import Limits
from appliance.core.errors import ApplianceError, BundleInvalid, InvalidInput
from appliance.core.types import Array, FieldType, Method, MethodField, Payload, PredictOptions, Result, Tensors
from appliance.engine.session import TensorSpec
from appliance.tasks.base import Decoded


class RawTensors:
    """The graph's own inputs and outputs as a method; implements `Task`."""

    kind = "ndarray"
    merges = False

    def __init__(self, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        """Raises: BundleInvalid: an input is not a numeric tensor, or no output is."""
        odd = [spec.name for spec in inputs if spec.dtype is None]
        if odd:
            raise BundleInvalid(f"The inputs {', '.join(odd)} are not numeric tensors; export the model without them.")
        self._inputs = inputs
        self._itemsizes = [(spec.name, spec.dtype.itemsize) for spec in inputs if spec.dtype is not None]
        self._outputs = tuple(spec for spec in outputs if spec.dtype is not None)
        self._names = tuple(spec.name for spec in self._outputs)
        if not self._outputs:
            raise BundleInvalid("No output is a numeric tensor; export the model with zipmap=False or the like.")
        self.batched = all(spec.dynamic_batch for spec in (*inputs, *self._outputs))
        items = tuple(MethodField(spec.name, FieldType.NDARRAY, describe(spec)) for spec in self._outputs)
        self.method = Method(
            name="predict",
            description="Runs the graph on its own inputs and returns its own outputs.",
            arguments=tuple(MethodField(spec.name, FieldType.NDARRAY, describe(spec)) for spec in inputs),
            returns=MethodField("return", FieldType.NDARRAY, items[0].description)
            if len(items) == 1
            else MethodField("return", FieldType.NAMED_FIELDS, "One array for each output.", items=items),
        )

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The graph's inputs; all are numeric."""
        return self._inputs

    @property
    def output_specs(self) -> tuple[TensorSpec, ...]:
        """The graph's numeric outputs."""
        return self._outputs

    def cost(self, payload: Payload, limits: Limits) -> int:
        """Bytes of the arrays as the graph takes them."""
        arrays = self._named(payload)
        return sum([arrays[name].size * itemsize for name, itemsize in self._itemsizes])

    def decode(self, payload: Payload) -> Decoded:
        """The arrays in the graph's dtypes. One axis fewer than the graph has: a single row, answered as such."""
        arrays = self._named(payload)
        feeds: dict[str, Array] = {}
        rows: set[int] = set()
        squeeze = False
        for spec in self._inputs:
            array = arrays[spec.name]
            if self.batched and array.ndim == len(spec.shape) - 1:
                array = array[None]
                squeeze = True
            feeds[spec.name] = array = fitted(array, spec)
            rows.add(len(array) if self.batched else 1)
        if len(rows) > 1 or 0 in rows:
            raise InvalidInput(f"The arrays have {sorted(rows)} rows; give all inputs equally many, at least one.")
        return Decoded(feeds, rows.pop(), squeeze)

    def outputs(self, options: PredictOptions) -> tuple[str, ...]:
        """All numeric outputs."""
        return self._names

    def compared(self) -> tuple[str, ...]:
        """All numeric outputs."""
        return self._names

    def examples(self) -> Sequence[Sequence[dict[str, Array]]]:
        """Small noise of each dtype, and large values as the outlier; none when an axis beside the batch is dynamic."""
        if not self.batched or any(None in spec.shape[1:] for spec in self._inputs):
            return []
        return noise(self._inputs)

    def encode(
        self, arrays: Mapping[str, Array], count: int, options: PredictOptions
    ) -> Sequence[Result | ApplianceError]:
        """One answer: the arrays as they are; the servable cuts them when rows of several inputs shared a run."""
        return [Tensors(arrays)]

    def _named(self, payload: Payload) -> dict[str, Array]:
        """The input's arrays by graph input name; a single unnamed array is meant for a single input."""
        arrays = payload.arrays
        if len(arrays) == len(self._inputs) == 1 and "" in arrays:
            return {self._inputs[0].name: arrays[""]}
        missing = [spec.name for spec in self._inputs if spec.name not in arrays]
        if missing:
            raise InvalidInput(
                f"This model takes arrays, and {', '.join(map(repr, missing))} is missing; set data.ndarray, or one "
                "part for each input with its name as id."
            )
        return arrays


def noise(inputs: Sequence[TensorSpec]) -> Sequence[Sequence[dict[str, Array]]]:
    """Rows to probe with, for inputs whose shapes are known: small noise of each dtype, large values as the outlier."""
    random = np.random.default_rng(0)

    def row(scale: float) -> dict[str, Array]:
        return {
            spec.name: (random.random((1, *spec.shape[1:])) * scale).astype(spec.dtype)  # type: ignore[arg-type]
            for spec in inputs
        }

    return [[row(1.0), row(1.0), row(1.0), row(100.0)]]


def fitted(array: Array, spec: TensorSpec) -> Array:
    """The array in the graph's dtype. Raises: InvalidInput: its shape is another one, or a value would change."""
    assert spec.dtype is not None
    if not _fits(array.shape, spec.shape):
        raise InvalidInput(f"The array {spec.name!r} has shape {list(array.shape)}; {describe(spec)} is needed.")
    if array.dtype == spec.dtype:
        return array
    if array.dtype.kind not in "biuf" or (array.dtype.kind == "f" and spec.dtype.kind != "f"):
        raise InvalidInput(f"The array {spec.name!r} is {array.dtype}; {describe(spec)} is needed.")
    with np.errstate(over="ignore"):  # a float too large for a narrower one is infinite, as everywhere
        changed: Array = array.astype(spec.dtype)
    if spec.dtype.kind in "biu" and not np.array_equal(changed, array):
        raise InvalidInput(f"The array {spec.name!r} has values that {spec.dtype} cannot hold.")
    return changed


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    if len(shape) != len(wanted):
        return False
    for have, want in zip(shape, wanted, strict=True):  # noqa: SIM110  # `all` takes three times as long
        if have != want and want is not None:
            return False
    return True


def describe(spec: TensorSpec) -> str:
    """`float32 (?, 3)`."""
    shape = ", ".join("?" if axis is None else str(axis) for axis in spec.shape)
    return f"{spec.dtype} ({shape})"
