"""What a client said to the centre, in a form that two runs, and two clients, can be compared by.

Ids that are made anew each time, times and the machine's CPUs become placeholders; so do a client's versions.
"""

import json
import re
from pathlib import Path
from typing import Any

from orchestrator.centre.recorder import Event

DATA = Path(__file__).parent / "data"

_ID = re.compile(r"\b[0-9a-f]{32}\b")
_TIME = re.compile(r"^\d{4}-\d\d-\d\dT[\d:.]+Z$")
_OF_THE_MACHINE = ("cpu_limit", "cpu_memory", "architecture", "appliance_version")
_METADATA = ("authorization", "x-clarifai-request-id-prefix", "x-request-id")


def compare(name: str, found: list[dict[str, Any]]) -> None:
    """Hold a transcript against the committed one; where it differs it is written anew, to be read and committed."""
    file = DATA / name
    text = json.dumps(found, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    if text != before:
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert found == (json.loads(before) if before else []), f"{file.name} was written anew: read it and commit it"


def transcript(events: list[Event]) -> list[dict[str, Any]]:
    """One entry a call, in the order of their first events: rpc, metadata, what was sent, how it was answered.

    Streams of runners are opened side by side, in any order; theirs are sorted: the control stream, then workers.
    """
    calls: dict[int, dict[str, Any]] = {}
    for event in events:
        if event.what == "open":
            metadata = {name: event.content[name] for name in _METADATA if name in event.content}
            calls[event.call] = {"rpc": event.rpc, "metadata": metadata, "sent": []}
        elif event.what == "request" and event.call in calls:
            calls[event.call]["sent"].append(event.content)
        elif event.what == "reply" and event.call in calls:
            calls[event.call].setdefault("answered", event.content.get("status", {}).get("code", ""))
    unary = [call for call in calls.values() if call["rpc"] != "ProcessRunnerItems"]
    streams = [call for call in calls.values() if call["rpc"] == "ProcessRunnerItems"]
    streams.sort(key=lambda call: "control" not in call["metadata"]["x-request-id"])
    return [_plain(call) for call in _Names().applied(unary + streams)]


class _Names:
    """Gives every id that a client or the centre made up a name, in order of appearance."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def applied(self, calls: list[dict[str, Any]]) -> Any:
        """The calls with names for ids."""
        text = json.dumps(calls, sort_keys=True)  # maps have no order of their own
        return json.loads(_ID.sub(self._name, text))

    def _name(self, match: "re.Match[str]") -> str:
        return self._names.setdefault(match.group(), f"<id {len(self._names) + 1}>")


def _plain(value: Any) -> Any:
    """Times, CPUs and versions as placeholders."""
    if isinstance(value, dict):
        return {name: _named(name, _plain(inner)) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, str) and _TIME.match(value):
        return "<time>"
    return value


def _named(name: str, value: Any) -> Any:
    if name in _OF_THE_MACHINE:
        return f"<{name}>"
    if name == "x-request-id":
        return value.removesuffix("-p")  # one of a few streams has it; what it means is not known
    if name == "x-clarifai-request-id-prefix":
        return re.sub(r"\d[\w.]*$", "<version>", value)
    return value
