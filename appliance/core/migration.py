"""Keys of the configuration that have another name now, or none: read for one more version, with a warning.

Files of the operator are never rewritten. A row is added with the version that renames or drops a key, and taken out
with the one named in `until`; from then on the old key is a problem like any unknown one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Change:
    """A key that is no more.

    Attributes:
        old: "section.key" as it was; of [[principal]] and the like without a number.
        new: as it is now; "" when nothing took its place.
        since: the version that changed it.
        until: the first version that does not know it any more.
        why: for a key that is gone, a sentence on what to do without it.
    """

    old: str
    new: str
    since: str
    until: str
    why: str = ""

    def warning(self, origin: str) -> str:
        """What the operator reads. Args: origin: the file or variable that has the old key."""
        if self.new:
            now = f"is called {self.new} since {self.since}; rename it"
        else:
            now = f"means nothing since {self.since}; remove it. {self.why}".rstrip(" .")
        return f"{self.old} ({origin}) {now}. It is an error from {self.until} on."


CHANGES: tuple[Change, ...] = ()
"""What changed since the version before this one."""


def bring_up_to_date(layer: dict[str, Any], origin: str, changes: Sequence[Change] = ()) -> list[str]:
    """Give the keys of one file, or one variable, their names of today; returns a warning for each that had another.

    Where a layer has a key by both names, the new one counts.
    """
    warnings = []
    for change in changes or CHANGES:
        section, _, key = change.old.partition(".")
        holders = [table for table in _tables(layer.get(section)) if key in table]
        for holder in holders:
            value = holder.pop(key)
            if change.new:
                target, _, name = change.new.partition(".")
                into = holder if target == section else layer.setdefault(target, {})
                if isinstance(into, dict):
                    into.setdefault(name, value)
        if holders:
            warnings.append(change.warning(origin))
    return warnings


def _tables(content: object) -> Iterable[dict[str, Any]]:
    entries = content if isinstance(content, list) else [content]
    return [entry for entry in entries if isinstance(entry, dict)]
