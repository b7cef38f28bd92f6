"""A model as a user of the stock runner writes it: each kind of method, one that fails, and one that can be aborted."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

from clarifai.runners.models.model_class import ModelClass
from clarifai_protocol import register_item_abort_callback


class Echo(ModelClass):
    def load_model(self) -> None:
        self.marks = Path(os.environ["ECHO_MARKS"])

    @ModelClass.method
    def predict(self, text: str) -> str:
        return text[::-1]

    @ModelClass.method
    def letters(self, text: str) -> Iterator[str]:
        yield from text

    @ModelClass.method
    def lines(self, texts: Iterator[str]) -> Iterator[str]:
        for text in texts:
            yield text.upper()

    @ModelClass.method
    def fail(self, text: str) -> str:
        raise ValueError(f"no {text} here")

    @ModelClass.method
    def wait(self, text: str) -> str:
        """Wait until somebody cancels the item; leaves a file named after the text when it was."""
        cancelled = threading.Event()
        register_item_abort_callback(lambda *_: cancelled.set())
        (self.marks / f"{text}-began").touch()
        if cancelled.wait(60):
            (self.marks / f"{text}-cancelled").touch()
        return "late"
