"""What `appliance check` and `appliance doctor` say: lines of `ok`, `warn` or `fail`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import click

from appliance.core.errors import ApplianceError
from appliance.core.files import one_line, printable

T = TypeVar("T")

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that was looked at; the text of one that is not ok says what to do."""

    state: State
    what: str
    text: str

    def __str__(self) -> str:
        return f"{self.state:<5} {self.what:<14} {printable(self.text)}"


class Report:
    """Lines, printed as they come unless they are kept for JSON."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.lines: list[Line] = []
        self._quiet = quiet

    @property
    def failed(self) -> bool:
        """Whether any line says fail."""
        return any(line.state == "fail" for line in self.lines)

    def line(self, state: State, what: str, text: str) -> None:
        """Say one thing."""
        self.lines.append(Line(state, what, text))
        if not self._quiet:
            click.echo(self.lines[-1])

    def ok(self, what: str, text: str) -> None:
        """Something is as it should be."""
        self.line("ok", what, text)

    def warn(self, what: str, text: str) -> None:
        """Something keeps nobody from being served, and deserves a look."""
        self.line("warn", what, text)

    def fail(self, what: str, text: str) -> None:
        """Something keeps the appliance or a model from serving."""
        self.line("fail", what, text)

    def attempt(self, what: str, make: Callable[[], T]) -> T | None:
        """The result, or None and a line that says why not."""
        try:
            return make()
        except ApplianceError as error:
            self.fail(what, one_line(error))
            return None
