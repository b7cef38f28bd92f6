"""What one prediction may ask: how many inputs, how many concepts, which ones. Checked before anything is decoded."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from appliance.core.config import Limits
from appliance.core.errors import InvalidArgument, NoInputs, TooManyInputs
from appliance.core.types import Concept, PredictOptions


@dataclass(frozen=True, slots=True)
class Asked:
    """What a caller asked of a classifier; zero and empty mean "not said" (proto3).

    Attributes:
        select: (id, name) pairs; either may be empty.
    """

    max_concepts: int = 0
    min_value: float = 0.0
    select: tuple[tuple[str, str], ...] = ()


def check_input_count(count: int, limits: Limits) -> None:
    """Raises: NoInputs, TooManyInputs."""
    if count == 0:
        raise NoInputs(limits.inputs_per_request)
    if count > limits.inputs_per_request:
        raise TooManyInputs(count, limits.inputs_per_request)


def options_for(asked: Asked, concepts: Sequence[Concept], limits: Limits) -> tuple[PredictOptions, list[str]]:
    """The checked options, and the names of selected concepts that the model does not have.

    Raises: InvalidArgument: out of range, or none of the selected concepts is known.
    """
    if asked.max_concepts and not 1 <= asked.max_concepts <= limits.concepts_max:
        raise InvalidArgument(f"max_concepts is {asked.max_concepts}; it must be from 1 to {limits.concepts_max}.")
    if math.isnan(asked.min_value) or not 0.0 <= asked.min_value <= 1.0:
        raise InvalidArgument(f"min_value is {asked.min_value:g}; it must be from 0 to 1.")
    selected, unknown = _select(asked.select, concepts)
    if asked.select and not selected:
        raise InvalidArgument(
            f"select_concepts: the model has none of {', '.join(unknown[:20])}; GetModelOutputInfo names its concepts."
        )
    options = PredictOptions(
        max_concepts=asked.max_concepts or limits.concepts_default,
        min_value=np.float32(asked.min_value),
        selected=selected if asked.select else None,
    )
    return options, unknown


@lru_cache(maxsize=16)
def usual_options(concepts_default: int) -> PredictOptions:
    """What `options_for` makes of a request that asks for nothing."""
    return PredictOptions(max_concepts=concepts_default)


def _select(wanted: Sequence[tuple[str, str]], concepts: Sequence[Concept]) -> tuple[tuple[int, ...], list[str]]:
    """Indices by id or name, exact and case-sensitive; duplicates collapse."""
    if not wanted:
        return (), []
    by_id = {concept.id: index for index, concept in reversed(list(enumerate(concepts)))}
    by_name = {concept.name: index for index, concept in reversed(list(enumerate(concepts)))}
    found: dict[int, None] = {}
    unknown = []
    for concept_id, name in wanted:
        index = by_id.get(concept_id) if concept_id else None
        index = by_name.get(name) if index is None and name else index
        if index is None:
            unknown.append(repr(concept_id or name))
        else:
            found[index] = None
    return tuple(found), unknown
