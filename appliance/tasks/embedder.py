"""Embedders, of images or texts: one vector an input."""

from collections.abc import Mapping, Sequence

import numpy as np

from appliance.catalog.sections import EmbeddingOutput
from appliance.core.config import Limits
from appliance.core.errors import ApplianceError, InferenceFailed
from appliance.core.types import Array, Embedding, FieldType, Method, MethodField, Payload, PredictOptions, Result
from appliance.engine import plan
from appliance.tasks.base import Decoded, InputSide


class Embedder:
    """Input side + embedding; implements `Task`."""

    merges = True

    def __init__(self, side: InputSide, embedding: EmbeddingOutput, wrapped: bool) -> None:
        self._side = side
        self._output = plan.EMBEDDING if wrapped else embedding.output
        self._normalize = embedding.normalize
        self.kind = side.kind
        self.method = Method(
            name="predict",
            description=f"The embedding of the {side.kind}.",
            arguments=(side.argument,),
            returns=MethodField("return", FieldType.NDARRAY, "The vector, float32 (dimensions,)."),
        )

    def cost(self, payload: Payload, limits: Limits) -> int:
        """See `Task.cost`."""
        return self._side.cost(payload, limits)

    def decode(self, payload: Payload) -> Decoded:
        """See `Task.decode`."""
        return self._side.decode(payload)

    def outputs(self, options: PredictOptions) -> tuple[str, ...]:
        """The one output."""
        return (self._output,)

    def compared(self) -> tuple[str, ...]:
        """The one output."""
        return (self._output,)

    def examples(self) -> Sequence[Sequence[dict[str, Array]]]:
        """See `Task.examples`."""
        return self._side.examples()

    def encode(
        self, arrays: Mapping[str, Array], count: int, options: PredictOptions
    ) -> Sequence[Result | ApplianceError]:
        """Float32 vectors, of length 1 if the bundle says normalize (a zero vector stays zero)."""
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found below
            vectors: Array = arrays[self._output].reshape(count, -1).astype(np.float32)
            if self._normalize:
                # In double precision: the squares of large values overflow in single.
                lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
                vectors = (vectors / np.where(lengths == 0, 1.0, lengths)).astype(np.float32)
        finite = np.asarray(np.isfinite(vectors).all(axis=1)).tolist()
        return [
            Embedding(vector) if sound else InferenceFailed("The model's vector for this input is not finite.")
            for vector, sound in zip(vectors, finite, strict=True)
        ]
