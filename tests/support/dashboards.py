"""The dashboards that the packages install, as a test asks what they ask: read, filled in as Grafana does, shown."""

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from support.appliance import ROOT

GRAFANA = ROOT / "packaging" / "grafana"
sys.path.insert(0, str(GRAFANA))
try:
    import values
finally:
    del sys.path[0]

FOLDER = GRAFANA / "dashboards"
MAKE, DRAW = (ROOT / ".clients" / name / "bin" / "python" for name in ("grafana", "draw"))
"""Of the environments that have what makes dashboards, and what draws them."""
PAGE = ROOT / "docs" / "dashboards.md"
MADE = "made by the test"
"""The part of the page that is."""

SHEETS: dict[str, Any] = {
    name: json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    for name in ("overview", "model", "gpu", "fleet", "security")
}


@dataclass(frozen=True)
class Asked:
    """One query of a panel.

    Attributes:
        sheet: the dashboard's file, without suffix.
        panel: the panel's number in it.
        name: the panel's title, with the query's name where it has several.
        now: one value for each series, not a course.
    """

    sheet: str
    panel: int
    name: str
    legend: str
    expression: str
    unit: str
    decimals: int | None
    now: bool


def panels(sheet: str) -> Iterator[Any]:
    """All that shows something, headings left out."""
    return (panel for panel in SHEETS[sheet]["panels"] if panel["type"] != "row")


def asked() -> list[Asked]:
    """Every query of every dashboard."""
    found = []
    for sheet in SHEETS:
        for panel in panels(sheet):
            config = panel["fieldConfig"]
            columns = {
                each["matcher"]["options"]: {about["id"]: about["value"] for about in each["properties"]}
                for each in config.get("overrides", ())
            }
            for target in panel["targets"]:
                legend = target.get("legendFormat", "")
                several = len(panel["targets"]) > 1
                about = columns.get(legend, config["defaults"])
                found.append(
                    Asked(
                        sheet,
                        panel["id"],
                        f"{panel['title']}: {legend or 'rows'}" if several else panel["title"],
                        legend,
                        target["expr"],
                        about.get("unit", "short"),
                        about.get("decimals"),
                        target.get("instant", False),
                    )
                )
    return found


def filled(expression: str, rate_interval_s: float, range_s: float, chosen: Mapping[str, Sequence[str] | str]) -> str:
    """The expression as Grafana's Prometheus source sends it.

    Args:    chosen: variable → the values that were chosen, or the text that stands for all of them.
    Source:  Grafana's documentation, "Template variables" of the Prometheus data source: several values of one become
             a regular expression, each with its special characters escaped.
    """
    texts = {"__rate_interval": f"{rate_interval_s:g}s", "__range": f"{range_s:.0f}s"}
    for name, value in chosen.items():
        texts[name] = value if isinstance(value, str) else "|".join(map(_escaped, value))
    return re.sub(r"\$(\w+)", lambda found: texts[found[1]], expression)


def _escaped(value: str) -> str:
    """As text in a regular expression within quotes, where a backslash is written twice."""
    return re.sub(r"([\\^$.|?*+()\[\]{}])", r"\\\\\1", value)


def shown(found: Sequence[float], unit: str = "", decimals: int | None = None) -> str:
    """What a panel would show, in a few words: "0.21 s", "3 series, 0 /s – 41.2 /s"."""
    low, high = (values.shown(value, unit, decimals) for value in (min(found), max(found)))
    if len(found) == 1:
        return low
    return f"{len(found)} series, {low if low == high else f'{low} – {high}'}"
