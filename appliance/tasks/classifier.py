"""Classifiers, of images or texts: scores in, the best concepts out."""

from collections.abc import Mapping, Sequence

import numpy as np

from appliance.catalog.sections import ScoresOutput
from appliance.core.config import Limits
from appliance.core.errors import ApplianceError, InferenceFailed
from appliance.core.types import (
    Array,
    ConceptScores,
    FieldType,
    Method,
    MethodField,
    Payload,
    PredictOptions,
    Result,
)
from appliance.engine import plan
from appliance.tasks.base import Decoded, InputSide

MAX_CONCEPTS = "max_concepts"
MIN_VALUE = "min_value"
SELECT_CONCEPTS = "select_concepts"


class Classifier:
    """Input side + scores; implements `Task`."""

    merges = True

    def __init__(self, side: InputSide, scores: ScoresOutput, wrapped: bool, default_concepts: int) -> None:
        self._side = side
        self._scores = scores
        self._wrapped = wrapped
        self.kind = side.kind
        self.method = Method(
            name="predict",
            description=f"Concepts seen in the {side.kind}, best first.",
            arguments=(side.argument, *limit_arguments(default_concepts)),
            returns=MethodField(
                "return", FieldType.LIST, "The concepts.", items=(MethodField("return_item", FieldType.CONCEPT),)
            ),
        )

    def cost(self, payload: Payload, limits: Limits) -> int:
        """See `Task.cost`."""
        return self._side.cost(payload, limits)

    def decode(self, payload: Payload) -> Decoded:
        """See `Task.decode`."""
        return self._side.decode(payload)

    def outputs(self, options: PredictOptions) -> tuple[str, ...]:
        """The full score vector only when some concepts are asked for by name."""
        if not self._wrapped:
            return (self._scores.output,)
        return (plan.SCORES,) if options.selected is not None else (plan.TOP_VALUES, plan.TOP_INDICES)

    def compared(self) -> tuple[str, ...]:
        """The scores: the order of equal ones is nobody's business."""
        return (plan.SCORES,) if self._wrapped else (self._scores.output,)

    def examples(self) -> Sequence[Sequence[dict[str, Array]]]:
        """See `Task.examples`."""
        return self._side.examples()

    def encode(
        self, arrays: Mapping[str, Array], count: int, options: PredictOptions
    ) -> Sequence[Result | ApplianceError]:
        """Cut the scores: select → min_value → sort by value, descending → max_concepts.

        A row with a score that is no number is an error of its own, wherever that score stands.
        """
        if plan.TOP_VALUES in arrays:
            values, indices = arrays[plan.TOP_VALUES], arrays[plan.TOP_INDICES]
        else:
            scores = (
                arrays[plan.SCORES]
                if self._wrapped
                else probabilities(arrays[self._scores.output], self._scores.activation)
            )
            values, indices = best(scores, options.selected)
        return cut(values, indices, options)


def limit_arguments(default_concepts: int) -> tuple[MethodField, ...]:
    """The arguments with which a caller limits the concepts of an answer."""
    item = MethodField(f"{SELECT_CONCEPTS}_item", FieldType.STR)
    wanted = "Ids or names of the only concepts to return; empty: all."
    return (
        MethodField(MAX_CONCEPTS, FieldType.INT, "How many concepts to return, 1 to 200.", str(default_concepts)),
        MethodField(MIN_VALUE, FieldType.FLOAT, "Least value of a concept to return, 0 to 1.", "0.0"),
        MethodField(SELECT_CONCEPTS, FieldType.LIST, wanted, "[]", (item,)),
    )


def probabilities(raw: Array, activation: str) -> Array:
    """Scores as float32 (batch, concepts), after softmax, sigmoid or none."""
    with np.errstate(over="ignore"):  # infinite, and found to be so
        logits: Array = raw.reshape(len(raw), -1).astype(np.float32)
        if activation == "sigmoid":
            return (1.0 / (1.0 + np.exp(-logits))).astype(np.float32)
    return softmax(logits) if activation == "softmax" else logits


def cut(values: Array, indices: Array, options: PredictOptions) -> list[Result | ApplianceError]:
    """An answer a row of scores that are sorted: min_value, then max_concepts.

    A row with a score that is no number is an error of its own: what it was sorted by means nothing.
    """
    sound: list[bool] = np.logical_and.reduce(np.isfinite(values), axis=1).tolist()
    values, indices = values[:, : options.max_concepts], indices[:, : options.max_concepts]
    if options.min_value:  # 0 means no filter, and scores without an activation may be negative
        kept: list[int] = (values >= options.min_value).sum(axis=1).tolist()
        return [
            ConceptScores(row_indices[:keep], row_values[:keep]) if good else _not_numbers()
            for row_indices, row_values, keep, good in zip(indices, values, kept, sound, strict=True)
        ]
    return [
        ConceptScores(row_indices, row_values) if good else _not_numbers()
        for row_indices, row_values, good in zip(indices, values, sound, strict=True)
    ]


def softmax(logits: Array) -> Array:
    """Turn logits into concept probabilities; each row sums to 1.

    Args:    logits: float32 (batch, concepts).
    Source:  shift by the maximum against overflow, Goodfellow et al. 2016, section 4.1.
    """
    with np.errstate(invalid="ignore"):
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: Array = powers / powers.sum(axis=1, keepdims=True)
    return shares.astype(np.float32)


def best(scores: Array, selected: tuple[int, ...] | None) -> tuple[Array, Array]:
    """Values and concept indices of each row, best first; of equals the earlier concept first."""
    wanted = np.arange(scores.shape[1]) if selected is None else np.array(sorted(selected), np.int64)
    values = scores[:, wanted]
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(values, order, axis=1), wanted[order]


def _not_numbers() -> InferenceFailed:
    return InferenceFailed("The model's scores for this input are not finite numbers.")
