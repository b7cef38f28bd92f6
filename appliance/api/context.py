"""What travels with one request through the handlers."""

from dataclasses import dataclass, field

from appliance.api.auth import Grant
from appliance.api.contents import Contents
from appliance.core.ledger import Cells
from appliance.core.types import Call, ModelKey
from appliance.core.usage import UsageCounts
from appliance.tasks.servable import Ticket

_NO_MODEL = ModelKey("", "", "")


@dataclass(slots=True)
class Context(Ticket):
    """One accepted request; what it brings along to the model, and more.

    Attributes:
        req_id: what users quote; in every status.
        begun: `time.monotonic()` seconds.
        asked: the model or workflow that it is for, user/app/id, once known; for the log.
        deadline: `time.monotonic()` seconds, never None: clients set none, so the appliance does.
        model: (model id, version) once known, for metrics.
        key: whose model that is, for usage.
        inputs: outputs by Clarifai code, for metrics.
        contents: what was left out of the request's message, by input.
    """

    deadline: float
    call: Call
    grant: Grant
    req_id: str
    begun: float = 0.0
    asked: str = ""
    model: tuple[str, str] = ("", "")
    key: ModelKey = _NO_MODEL
    inputs: dict[int, int] = field(default_factory=dict)
    contents: dict[int, Contents] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.priority = self.grant.priority
        self.timing = self.call.timing

    def reach(self, key: ModelKey, version: str) -> None:
        """It is about that version of that model."""
        self.key, self.model, self.asked = key, (key.model_id, version), str(key)

    def used(self, counts: UsageCounts, method: str) -> Cells:
        """Where what it uses is counted; see `Amounts`. Of two principals it is the certificate's."""
        key = self.key
        principal = self.grant.meters[0].principal.name
        return counts.cells(principal, key.user_id, key.app_id, key.model_id, self.model[1], method)

    def count(self, code: int, outputs: int = 1) -> None:
        """One more output with that code, or so many."""
        self.inputs[code] = self.inputs.get(code, 0) + outputs
