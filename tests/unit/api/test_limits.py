"""What one prediction may ask, checked before anything is decoded."""

import numpy as np
import pytest

from appliance.api.limits import Asked, check_input_count, options_for
from appliance.core.config import Limits
from appliance.core.errors import InvalidArgument, NoInputs, TooManyInputs
from appliance.core.types import Concept

LIMITS = Limits()
CONCEPTS = (
    Concept("c-cat", "cat"),
    Concept("c-dog", "dog"),
    Concept("dog", "hound"),
    Concept("c-cat-2", "cat"),
    Concept("c-Cat", "Cat"),
)


def options(**asked: object) -> object:
    """The checked options."""
    return options_for(Asked(**asked), CONCEPTS, LIMITS)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 2, 128])
def test_up_to_128_inputs_are_taken(count: int) -> None:
    """The documented number."""
    check_input_count(count, LIMITS)


@pytest.mark.parametrize(("count", "limit"), [(129, 128), (5000, 128), (5, 4)])
def test_more_inputs_are_refused_with_both_numbers(count: int, limit: int) -> None:
    """How many came, and how many may."""
    with pytest.raises(TooManyInputs, match=rf"has {count} inputs; the limit is {limit}"):
        check_input_count(count, Limits(inputs_per_request=limit))


def test_no_inputs_are_refused_with_the_limit() -> None:
    """Nothing to answer."""
    with pytest.raises(NoInputs, match="no inputs; send between 1 and 128"):
        check_input_count(0, LIMITS)


@pytest.mark.parametrize(("asked", "given"), [(0, 20), (1, 1), (20, 20), (200, 200)])
def test_max_concepts_zero_is_the_default(asked: int, given: int) -> None:
    """proto3's zero means not said."""
    assert options(max_concepts=asked).max_concepts == given  # type: ignore[attr-defined]


@pytest.mark.parametrize("asked", [201, 1000, 2**32 - 1, -1])
def test_max_concepts_out_of_range_is_refused(asked: int) -> None:
    """With the range."""
    with pytest.raises(InvalidArgument, match=rf"max_concepts is {asked}; it must be from 1 to 200"):
        options(max_concepts=asked)


def test_lower_limits_of_the_operator_hold() -> None:
    """The API's own maxima are never exceeded, and may be lowered."""
    with pytest.raises(InvalidArgument, match="from 1 to 50"):
        options_for(Asked(max_concepts=51), CONCEPTS, Limits(concepts_max=50, concepts_default=5))
    chosen, _ = options_for(Asked(), CONCEPTS, Limits(concepts_max=50, concepts_default=5))
    assert chosen.max_concepts == 5


@pytest.mark.parametrize("asked", [0.0, 0.5, 1.0, float(np.float32(0.6)), -0.0])
def test_min_value_is_kept_as_single_precision(asked: float) -> None:
    """As it came over the wire."""
    value = options(min_value=asked).min_value  # type: ignore[attr-defined]
    assert isinstance(value, np.float32)
    assert value == np.float32(asked)


@pytest.mark.parametrize("asked", [-0.1, 1.0001, float("nan"), float("inf"), float("-inf"), 1e30])
def test_min_value_out_of_range_is_refused(asked: float) -> None:
    """Nothing compares with NaN."""
    with pytest.raises(InvalidArgument, match=r"min_value is .*; it must be from 0 to 1"):
        options(min_value=asked)


@pytest.mark.parametrize(
    ("select", "found"),
    [
        ((("c-dog", ""),), (1,)),
        ((("", "dog"),), (1,)),
        ((("c-dog", "cat"),), (1,)),
        ((("nothing", "dog"),), (1,)),
        ((("dog", ""),), (2,)),
        ((("", "cat"),), (0,)),
        ((("", "Cat"),), (4,)),
        ((("c-Cat", ""),), (4,)),
        ((("c-dog", ""), ("", "dog"), ("c-dog", "dog")), (1,)),
        ((("c-dog", ""), ("c-cat", "")), (1, 0)),
    ],
    ids=[
        "id",
        "name",
        "id wins",
        "name when the id is unknown",
        "an id that is a name too",
        "first of equal names",
        "case of a name",
        "case of an id",
        "duplicates collapse",
        "several",
    ],
)
def test_concepts_are_selected_by_id_or_name(select: tuple[tuple[str, str], ...], found: tuple[int, ...]) -> None:
    """Either alone, exact and case-sensitive."""
    chosen, unknown = options_for(Asked(select=select), CONCEPTS, LIMITS)
    assert chosen.selected == found
    assert unknown == []


def test_nothing_selected_is_everything() -> None:
    """The default."""
    assert options().selected is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("select", [(("c-DOG", ""),), (("", "Dog"),), (("", ""),), (("", "do"),)])
def test_when_no_selected_concept_is_known_the_request_is_refused(select: tuple[tuple[str, str], ...]) -> None:
    """With their names, and where the model's are."""
    with pytest.raises(InvalidArgument, match=r"the model has none of .*GetModelOutputInfo"):
        options(select=select)


def test_when_some_selected_concepts_are_unknown_the_others_are_returned() -> None:
    """And the unknown ones are named."""
    chosen, unknown = options_for(Asked(select=(("c-dog", ""), ("", "unicorn"), ("c-x", "y"))), CONCEPTS, LIMITS)
    assert chosen.selected == (1,)
    assert unknown == ["'unicorn'", "'c-x'"]


def test_a_refusal_does_not_repeat_a_thousand_names() -> None:
    """The caller knows them."""
    with pytest.raises(InvalidArgument) as error:
        options(select=tuple((f"unknown-{n}", "") for n in range(1000)))
    assert len(str(error.value)) < 1000


def test_selecting_from_a_model_without_concepts_is_refused() -> None:
    """An embedder has none."""
    with pytest.raises(InvalidArgument):
        options_for(Asked(select=(("c-dog", ""),)), (), LIMITS)
