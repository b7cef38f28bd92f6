"""What travels with one request through the handlers."""

from collections import Counter
from dataclasses import dataclass, field

from appliance.api.auth import Grant
from appliance.core.memory import Reservation
from appliance.core.types import Call


@dataclass(slots=True)
class Context:
    """One accepted request.

    Attributes:
        req_id: what users quote; in every status.
        deadline: `time.monotonic()` seconds, never None: clients set none, so the appliance does.
        memory: what the request holds.
        model: (model id, version) once known, for metrics.
        inputs: outputs by Clarifai code, for metrics.
    """

    call: Call
    grant: Grant
    req_id: str
    deadline: float
    memory: Reservation
    model: tuple[str, str] = ("", "")
    inputs: Counter[int] = field(default_factory=Counter)
