"""What may go wrong inside the centre, on demand. What goes wrong between machines is `orchestrator.link`."""

from dataclasses import dataclass, field


@dataclass
class Fault:
    """One thing that goes wrong.

    Attributes:
        rpc: which one; "*" for any.
        at: "open": before anything is done · "request": when message number `nth` came · "reply": before message number
            `nth` goes; a unary call has done its work by then, and nobody hears of it.
        nth: which message, from 1.
        delay_s: how long it is kept waiting first.
        grpc: the gRPC code it ends with ("UNAVAILABLE", "UNKNOWN", …); "" for none.
        status: the code in a reply's status that it is answered with, instead; 0 for none.
        times: how often; None: until it is cleared.
    """

    rpc: str
    at: str = "open"
    nth: int = 1
    delay_s: float = 0.0
    grpc: str = ""
    status: int = 0
    times: int | None = 1


@dataclass
class Faults:
    """All that goes wrong at the moment."""

    active: list[Fault] = field(default_factory=list)
    duplicates: int = 0
    """How many of the next items are handed to two streams."""

    def take(self, rpc: str, at: str, nth: int = 1) -> list[Fault]:
        """What happens to this call now; it is counted."""
        chosen = [fault for fault in self.active if fault.rpc in ("*", rpc) and fault.at == at and fault.nth == nth]
        for fault in chosen:
            if fault.times is not None:
                fault.times -= 1
        self.active = [fault for fault in self.active if fault.times is None or fault.times > 0]
        return chosen

    def take_duplicate(self) -> bool:
        """True when the next item goes to two streams."""
        if self.duplicates <= 0:
            return False
        self.duplicates -= 1
        return True

    def clear(self) -> None:
        """Nothing goes wrong any more."""
        self.active.clear()
        self.duplicates = 0
