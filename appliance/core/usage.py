"""What callers used, counted in every process for usage reports: in its ledger, beside the metrics and on no page.

Who used what is told by a `UsageKey`. Its parts come from configuration, the catalog and fixed tables; a caller cannot
make new ones by inventing names.
"""

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from appliance.core.ledger import OTHER, Cells, Ledger

_log = logging.getLogger(__name__)

FAMILY = KIND = "usage"
"""Family and kind of our entries in a ledger."""

MOST_KEYS = 10_000
"""Keys that one process counts by themselves until it ends: every version that was ever served has some."""

MOST_AT_ONCE = 2.0**50
"""More than anybody uses of anything between two readings: a cell that grew by more was not written by us."""


class UsageKey(NamedTuple):
    """Who used what; ids of a model are empty for calls that reached none.

    Attributes:
        method: the RPC, or `openai.*` and `kserve.*`.
    """

    principal: str
    user_id: str
    app_id: str
    model: str
    version: str
    method: str


class Amounts(NamedTuple):
    """How much: the cells of a key, in this order.

    Attributes:
        calls_failed: of the calls, those that ended with another status than success, or without one.
        inputs_failed: of the inputs, those that were answered with an error.
        bytes_in, bytes_out: of messages, without what HTTP and TLS add.
        seconds: from call to reply.
    """

    calls: float = 0
    calls_failed: float = 0
    inputs: float = 0
    inputs_failed: float = 0
    bytes_in: float = 0
    bytes_out: float = 0
    seconds: float = 0

    def plus(self, other: Sequence[float]) -> "Amounts":
        """Both together."""
        return Amounts(*(one + more for one, more in zip(self, other, strict=True)))


CALLS, CALLS_FAILED, INPUTS, INPUTS_FAILED, BYTES_IN, BYTES_OUT, SECONDS = range(len(Amounts._fields))

EVERYBODY_ELSE = UsageKey(*[OTHER] * len(UsageKey._fields))
"""Who is counted together when there is no room for more keys."""


class UsageCounts:
    """What one process counts. Written by the event loop's thread only."""

    def __init__(self, ledger: Ledger | None, most: int = MOST_KEYS) -> None:
        """Args: ledger: where the cells are, for the supervisor to read; None: in this process alone."""
        self._ledger, self._most = ledger, most
        self._cells: dict[UsageKey, Cells] = {}
        self._others = self._new(EVERYBODY_ELSE) or [0.0] * len(Amounts._fields)
        self._said_full = False
        self.cells = lru_cache(maxsize=2 * most)(self._find)
        """The cells of the key with these parts, found once; see `Amounts`."""

    def counted(self) -> dict[UsageKey, Amounts]:
        """All amounts now, sums since the process began; on any thread."""
        return {key: Amounts(*cells) for key, cells in tuple(self._cells.items())}

    def _find(self, principal: str, user_id: str, app_id: str, model: str, version: str, method: str) -> Cells:
        key = UsageKey(principal, user_id, app_id, model, version, method)
        cells = self._cells.get(key)
        if cells is None and len(self._cells) <= self._most:
            cells = self._new(key)
        if cells is None and not self._said_full:
            self._said_full = True
            _log.warning("usage has %d keys, no room for more: new ones count as %r until a restart", self._most, OTHER)
        return self._others if cells is None else cells

    def _new(self, key: UsageKey) -> Cells | None:
        """Cells for one more key; None when the ledger is full."""
        cells: Cells = [0.0] * len(Amounts._fields)
        if self._ledger is not None:
            room = self._ledger.add(FAMILY, KIND, key, 0.0, len(cells))
            if room is None:
                return None
            cells = room[0]
        self._cells[key] = cells
        return cells
