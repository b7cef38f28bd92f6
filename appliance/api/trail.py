"""What calls there were since somebody asked, for the audit log: counts of each use, and refusals one by one.

A count costs a quarter of a microsecond, so that every call can have one. Written on the event loop's thread, and taken
there once a second.
"""

from typing import Any, NamedTuple, TypeAlias

from appliance.core.ledger import OTHER
from appliance.core.logs import without_keys

_USES = 10_000
"""Uses that are counted by themselves in a second; more are counted as OTHER."""

_REFUSALS = 100
"""Refusals that are told one by one in a second; more are only counted."""


class Use(NamedTuple):
    """Who used what, with which end.

    Attributes:
        principal, credential: "" where they are not known.
        model: user/app/id of a model, or "workflow:" and that of a workflow; "" where a call reached none.
        code: Clarifai's number.
    """

    principal: str
    credential: str
    model: str
    version: str
    code: int


Told: TypeAlias = dict[str, Any]
"""What `take` gives, as plain data: `uses` (a use and its count each), `first` and `refused` (a use and where it came
from each), and `left_out`: how many refusals are only counted."""


class Trail:
    """Counts calls."""

    def __init__(self) -> None:
        self._counts: dict[Use, int] = {}
        self._known: set[Use] = set()
        self._first: list[tuple[Use, Told]] = []
        self._refused: list[tuple[Use, Told]] = []
        self._left_out = 0

    def count(self, use: Use, method: str, peer: str, req_id: str) -> None:
        """A call has ended so."""
        counts = self._counts
        if use in counts:
            counts[use] += 1
            return
        if len(counts) >= _USES:
            use = Use(OTHER, "", "", "", use.code)
        counts[use] = counts.get(use, 0) + 1
        if use not in self._known:
            if len(self._known) >= _USES:
                self._known.clear()  # whoever is told of one a second time knows it
            self._known.add(use)
            self._first.append((use, {"method": method, "peer": peer, "req_id": req_id}))

    def refused(self, use: Use, method: str, peer: str, req_id: str, why: str) -> None:
        """Somebody may not do what they asked for; that is counted besides."""
        if len(self._refused) >= _REFUSALS:
            self._left_out += 1
            return
        self._refused.append((use, {"method": method, "peer": peer, "req_id": req_id, "why": without_keys(why)}))

    def take(self) -> Told | None:
        """What there was since the last time; None when there was nothing."""
        if not self._counts and not self._refused:
            return None
        told: Told = {
            "uses": [(*use, count) for use, count in self._counts.items()],
            "first": self._first,
            "refused": self._refused,
            "left_out": self._left_out,
        }
        self._counts, self._first, self._refused, self._left_out = {}, [], [], 0
        return told
