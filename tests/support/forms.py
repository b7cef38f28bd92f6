"""What the forms of a client give: the raw stub's answer, a value, or an error that its user reads."""

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Of:
    """What the raw stub reads from a model for the first sample or the text; with `best` so many of its concepts."""

    model: str
    best: int | None = None


@dataclass(frozen=True)
class Says:
    """The user reads something with all of these words; with `why` the client cannot do it at all.

    Attributes: words: regular expressions.
    """

    words: tuple[str, ...]
    why: str = ""


@dataclass(frozen=True)
class Instead:
    """What the client gives instead, and why its user cannot have what was asked for."""

    value: Any
    why: str


DIGIT, TOPIC = Of("digits"), Of("ml-topics")


def says(*words: str, why: str = "") -> Says:
    """What the appliance, or the client, means its user to read."""
    return Says(words, why)


def check(given: Any, expected: Any, truth: dict[str, list[str]]) -> None:
    """Compare what a form gave with what it should; None: any list will do."""
    if isinstance(expected, Says):
        for words in expected.words:
            assert re.search(words, str(given), re.DOTALL), given
    elif expected is None:
        assert isinstance(given, list), given
    else:
        assert given == _filled(expected.value if isinstance(expected, Instead) else expected, truth)


def why(expected: Any) -> str:
    """Why the form is not possible, "" when it is."""
    reason: str = getattr(expected, "why", "")
    return reason


def _filled(expected: Any, truth: dict[str, list[str]]) -> Any:
    if isinstance(expected, Of):
        return truth[expected.model][: expected.best]
    return [_filled(one, truth) for one in expected] if isinstance(expected, list) else expected
