"""Errors: the tree in the module's opening is the tree of classes, and sentences say what to do."""

import inspect
import re

import pytest

from appliance.core import errors
from appliance.core.errors import ApplianceError


def classes() -> dict[str, type[ApplianceError]]:
    return {
        name: kind
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, ApplianceError) and kind.__module__ == errors.__name__
    }


def written_tree() -> dict[str, str]:
    """Class → its parent, by indentation in the module's opening."""
    parents: dict[str, str] = {}
    stack: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.fullmatch(r"( {4,})([A-Z][A-Za-z]+)( {2,}.+)?", line)
        if not match:
            continue
        depth = len(match[1])
        while stack and stack[-1][0] >= depth:
            stack.pop()
        parents[match[2]] = stack[-1][1] if stack else "Exception"
        stack.append((depth, match[2]))
    return parents


def test_the_tree_that_is_written_down_is_the_tree_there_is() -> None:
    assert written_tree() == {name: kind.__bases__[0].__name__ for name, kind in classes().items()}


def test_every_error_says_in_its_docstring_who_or_what() -> None:
    assert all(kind.__doc__ for kind in classes().values())


def test_what_the_caller_reads_and_what_happened_are_two_things() -> None:
    error = errors.InferenceFailed("The model failed on this input.", detail="Gather: index 7 of 4")
    assert str(error) == "The model failed on this input."
    assert error.detail == "Gather: index 7 of 4"
    assert "Gather" not in str(error)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.NoInputs(128), ["no inputs", "128"]),
        (errors.TooManyInputs(129, 128), ["129", "128", "several requests"]),
        (errors.UnknownMethod("fly", ("predict", "generate")), ["'fly'", "predict, generate"]),
        (
            errors.PlacementUnknown("nodepool", "pool-1"),
            ["nodepool", "pool-1", "ListNodepools", "leave the selector out"],
        ),
        (errors.PlacementUnknown("compute_cluster", "c", "bob"), ["compute cluster 'c' of user 'bob'"]),
        (errors.PlacementMismatch("runner", "r", "a/b/c", "a/b/d"), ["serves model a/b/c", "not a/b/d", "name that"]),
        (errors.NodeNotRun("b", "a", "It is bad."), ["'b' was not run", "'a'", "It is bad."]),
        (errors.DeadlineExceeded(2.5), ["2.5 s"]),
        (errors.DeadlineExceeded(), ["deadline"]),
        (errors.Draining(), ["shutting down", "try again"]),
        (errors.Cancelled(), ["cancelled"]),
    ],
)
def test_a_sentence_names_the_limit_and_what_to_do(error: ApplianceError, words: list[str]) -> None:
    assert all(word in str(error) for word in words)


@pytest.mark.parametrize("quoted", ["x" * 20_000, "\U0001f600" * 5_000, "ü" * 3_000, "\ud800" * 2_000])
def test_what_callers_sent_does_not_make_a_sentence_unreadable(quoted: str) -> None:
    """Its end, which says what to do, is kept; gRPC carries it in headers, which have little room."""
    sentence = str(errors.UnknownModel(f"There is no model {quoted}; ask ListModels."))
    assert len(sentence.encode("utf-8", "replace")) < 1100
    assert sentence.startswith("There is no model")
    assert sentence.endswith("; ask ListModels.")
    assert "ListNodepools names" in str(errors.PlacementUnknown("nodepool", quoted))


def test_a_sentence_of_usual_length_is_left_alone() -> None:
    assert str(errors.InvalidInput("ü" * 500)) == "ü" * 500


def test_a_sentence_can_be_written_whatever_it_quotes() -> None:
    """JSON can name half of a surrogate pair; a status that holds one cannot be sent, and its call would be lost."""
    assert str(errors.UnknownModel("There is no model \udc00x.")) == "There is no model ?x."
