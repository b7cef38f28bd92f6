"""What travels with one request through the handlers."""

from dataclasses import dataclass, field

from appliance.api.auth import Grant
from appliance.api.contents import Contents
from appliance.core.types import Call
from appliance.tasks.servable import Ticket


@dataclass(slots=True)
class Context(Ticket):
    """One accepted request; what it brings along to the model, and more.

    Attributes:
        req_id: what users quote; in every status.
        deadline: `time.monotonic()` seconds, never None: clients set none, so the appliance does.
        model: (model id, version) once known, for metrics.
        inputs: outputs by Clarifai code, for metrics.
        contents: what was left out of the request's message, by input.
    """

    deadline: float
    call: Call
    grant: Grant
    req_id: str
    model: tuple[str, str] = ("", "")
    inputs: dict[int, int] = field(default_factory=dict)
    contents: dict[int, Contents] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.priority = self.grant.priority

    def count(self, code: int, outputs: int = 1) -> None:
        """One more output with that code, or so many."""
        self.inputs[code] = self.inputs.get(code, 0) + outputs
