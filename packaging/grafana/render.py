"""Draws the dashboards from what their queries were answered, for docs/dashboards.md.

    python packaging/grafana/render.py build/dashboards/data.json docs/dashboards

The data are those of a run of tests/integration/test_dashboards.py. The pictures show which panels there are and what
is in them; Grafana draws them otherwise, and each picture says so.
"""

import io
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from PIL import Image
from values import shown

HERE = Path(__file__).parent
LABEL = "Rendered by our own script from what a test run measured; not a Grafana screenshot."
COLUMNS, INCHES = 24, 15.0
"""Grafana's grid, and how wide it is drawn."""
ROW = 0.3
"""Inches of one row of the grid."""
PALETTE = ("#3274d9", "#ff780a", "#56a64b", "#e02f44", "#a352cc", "#f2cc0c", "#37872d", "#8ab8ff", "#705da0", "#6d1f62")
COLOURS = {"green": "#37872d", "orange": "#e0701a", "red": "#c4162a", "blue": "#1f60c4", "light-blue": "#8ab8ff"}
LETTER = 0.05
"""Inches of a letter in a legend."""
LINES = 9
"""Rows of a table, or names of a legend, that have room."""


def legend(text: str, labels: dict[str, str]) -> str:
    """The name of a series."""
    for name, value in labels.items():
        text = text.replace(f"{{{{{name}}}}}", value)
    return text


def short(name: str) -> str:
    """A name that has room beside a chart; its end says most."""
    return name if len(name) <= 30 else f"…{name[-29:]}"


def colour(value: float, thresholds: Any) -> str:
    """What its steps give a value."""
    name = "blue"
    for step in (thresholds or {}).get("steps", ()):
        if step.get("value") is None or value >= step["value"]:
            name = step["color"]
    return COLOURS[name]


def last(series: Any) -> float:
    """The value that a series has now."""
    return float(series["value"][1] if "value" in series else series["values"][-1][1])


def each(answers: Any) -> list[tuple[str, Any]]:
    """All series with their names."""
    return [(legend(a["legend"], s["metric"]), s) for a in answers for s in a["series"]]


def apart(answers: Any) -> list[tuple[str, Any]]:
    """Buckets by their upper bounds, ascending; they count what the ones before do, too."""
    return sorted(each(answers), key=lambda pair: float(pair[1]["metric"]["le"]))


# ---- panels ----------------------------------------------------------------------------------------------------------


def lines(axes: Axes, panel: Any, answers: Any, begun: float) -> None:
    unit = panel["fieldConfig"]["defaults"]["unit"]
    custom = panel["fieldConfig"]["defaults"].get("custom", {})
    found = each(answers)
    courses = [{float(t) - begun: float(v) for t, v in series["values"]} for _, series in found]
    names = [name for name, _ in found]
    fixed = {
        override["matcher"]["options"]: COLOURS[about["value"]["fixedColor"]]
        for override in panel["fieldConfig"].get("overrides", ())
        for about in override["properties"]
        if about["id"] == "color"
    }
    shades = [fixed.get(name, PALETTE[place % len(PALETTE)]) for place, name in enumerate(names)]
    if custom.get("stacking", {}).get("mode") == "normal":
        times = sorted(set().union(*courses))
        axes.stackplot(
            times, [[course.get(t, 0.0) for t in times] for course in courses], labels=names, colors=shades, alpha=0.7
        )
    else:
        for name, course, shade in zip(names, courses, shades, strict=True):
            axes.plot(list(course), list(course.values()), label=name, color=shade, linewidth=1)
    axes.set_ylim(0, None if any(any(course.values()) for course in courses) else 1)
    axes.yaxis.set_major_formatter(lambda value, _: shown(value, unit))
    over_time(axes)
    beside = 0.9 * panel["gridPos"]["w"] / COLUMNS * INCHES / (0.3 + LETTER * max(map(len, names)))
    axes.legend(
        loc="upper left", bbox_to_anchor=(0, -0.6 / (panel["gridPos"]["h"] - 3.1)), ncols=int(beside), fontsize=6,
        frameon=False, handlelength=1, handles=axes.get_legend_handles_labels()[0][:LINES],
    )  # fmt: skip


def one(axes: Axes, panel: Any, answers: Any, begun: float) -> None:
    axes.axis("off")
    defaults = panel["fieldConfig"]["defaults"]
    value = last(answers[0]["series"][0])
    text = shown(value, defaults["unit"], defaults.get("decimals"))
    shade = colour(value, defaults.get("thresholds"))
    axes.text(0.5, 0.45, text, ha="center", va="center", fontsize=17, color=shade)


def bars(axes: Axes, panel: Any, answers: Any, begun: float) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    if panel["targets"][0].get("format") == "heatmap":
        counts = [last(series) for _, series in apart(answers)]
        values = [b - a for a, b in zip([0, *counts], counts, strict=False)]
        names = [name for name, _ in apart(answers)]
    else:
        names, values = [name for name, _ in each(answers)], [last(series) for _, series in each(answers)]
    axes.barh(range(len(values)), values, color=[colour(value, defaults.get("thresholds")) for value in values])
    named = slice(None, None, 1 if len(names) < 12 else 2)
    axes.set_yticks(range(len(names))[named], [short(name) for name in names[named]])
    axes.set_xlim(0, max(values) or 1)
    axes.xaxis.set_major_formatter(lambda value, _: shown(value, defaults["unit"]))
    axes.invert_yaxis()
    plain(axes)


def heat(axes: Axes, panel: Any, answers: Any, begun: float) -> None:
    buckets = apart(answers)
    times = sorted({float(t) for _, series in buckets for t, _ in series["values"]})
    before, rows = dict.fromkeys(times, 0.0), []
    for _, series in buckets:
        counts = {float(t): float(v) for t, v in series["values"]}
        rows.append([max(0.0, counts.get(t, 0.0) - before[t]) ** 0.5 for t in times])
        before = {t: counts.get(t, 0.0) for t in times}
    axes.pcolormesh([t - begun for t in times], range(len(rows)), rows, cmap="Blues", shading="nearest")
    axes.set_yticks(range(0, len(rows), 2), [name for name, _ in buckets][::2])
    over_time(axes)


def states(axes: Axes, panel: Any, answers: Any, begun: float) -> None:
    names = panel["fieldConfig"]["defaults"]["mappings"][0]["options"]
    found = each(answers)
    for place, (_, series) in enumerate(found):
        moments = [float(t) - begun for t, _ in series["values"]]
        width = moments[1] - moments[0] if len(moments) > 1 else 1.0
        shades = [COLOURS[names[f"{float(value):g}"]["color"]] for _, value in series["values"]]
        axes.broken_barh([(moment, width) for moment in moments], (place - 0.4, 0.8), facecolors=shades)
    axes.set_yticks(range(len(found)), [short(name) for name, _ in found])
    axes.invert_yaxis()
    over_time(axes)
    axes.legend(
        handles=[mpl.patches.Patch(color=COLOURS[state["color"]], label=state["text"]) for state in names.values()],
        loc="upper left", bbox_to_anchor=(0, -0.12), ncols=5, fontsize=6, frameon=False,
    )  # fmt: skip


def table(axes: Axes, panel: Any, answers: Any, begun: float) -> None:
    axes.axis("off")
    options = next(t["options"] for t in panel["transformations"] if t["id"] == "organize")
    units = {
        each["matcher"]["options"]: {p["id"]: p["value"] for p in each["properties"]}
        for each in panel["fieldConfig"]["overrides"]
    }
    shared = set.intersection(*(set(s["metric"]) for a in answers for s in a["series"]))
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for answer in answers:
        for series in answer["series"]:
            row = rows.setdefault(tuple(series["metric"][name] for name in sorted(shared)), {})
            row |= {name: value[:12] if name == "sha256" else value for name, value in series["metric"].items()}
            about = units.get(answer["legend"], {})
            row[answer["legend"]] = shown(last(series), about.get("unit", "short"), about.get("decimals"))
    heads = sorted(options["indexByName"], key=options["indexByName"].get)
    heads = [options["renameByName"].get(head, head) for head in heads]
    cells = [[row.get(head, "") for head in heads] for _, row in sorted(rows.items())][:LINES]
    drawn = axes.table(cells, colLabels=heads, loc="upper left", cellLoc="left", edges="horizontal")
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(6)
    drawn.auto_set_column_width(list(range(len(heads))))


def plain(axes: Axes) -> None:
    """No frame, small letters."""
    axes.tick_params(labelsize=6, length=2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.3)


def over_time(axes: Axes) -> None:
    """The same, with seconds since the beginning from left to right."""
    plain(axes)
    axes.xaxis.set_major_formatter(lambda value, _: shown(value, "s"))


KINDS = {
    "timeseries": lines,
    "stat": one,
    "bargauge": bars,
    "heatmap": heat,
    "state-timeline": states,
    "table": table,
}


# ---- dashboards ------------------------------------------------------------------------------------------------------


def draw(sheet: Any, answers: dict[str, Any], begun: float, note: str) -> bytes:
    """A dashboard as PNG. Args: note: what its readers have to know of the data."""
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in sheet["panels"]) + 2
    figure = pyplot.figure(figsize=(INCHES, rows * ROW), dpi=80)
    figure.text(0.01, 1 - 0.7 / rows, sheet["title"], fontsize=13, weight="bold", va="center")
    figure.text(0.99, 1 - 0.7 / rows, f"{LABEL} {note}", fontsize=9, color="#a33", ha="right", va="center")
    for panel in sheet["panels"]:
        place = panel["gridPos"]
        left, width = place["x"] / COLUMNS, place["w"] / COLUMNS
        top = 1 - (place["y"] + 2) / rows
        if panel["type"] == "row":
            figure.text(0.01, top, panel["title"], fontsize=9, weight="bold", va="top", color="#444")
            continue
        figure.text(left + 0.008, top, panel["title"], fontsize=7.5, va="top")
        chart = panel["type"] in ("timeseries", "bargauge", "heatmap", "state-timeline")
        below = 2.0 if panel["type"] in ("timeseries", "state-timeline") else 0.9 if chart else 0.2
        named = panel["type"] in ("bargauge", "state-timeline")
        before = 0.11 if named else 0.045 if chart else 0.008
        inner = (
            left + before,
            top - (place["h"] - below) / rows,
            width - before - 0.01,
            (place["h"] - below - 1.1) / rows,
        )
        axes = figure.add_axes(inner)
        found = answers.get(str(panel["id"]), [])
        if any(answer["series"] for answer in found):
            KINDS[panel["type"]](axes, panel, found, begun)
        else:
            axes.axis("off")
            axes.text(0.5, 0.5, "no data", ha="center", va="center", fontsize=9, color="#999")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    pyplot.close(figure)
    # Few colours: a picture for a repository.
    small = io.BytesIO()
    Image.open(drawn).convert("RGB").quantize(64, Image.Quantize.FASTOCTREE).save(small, format="png", optimize=True)
    return small.getvalue()


if __name__ == "__main__":
    data = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for file in sorted((HERE / "dashboards").glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        picture = draw(content, data["sheets"].get(file.stem, {}), data["begun"], data["notes"].get(file.stem, ""))
        (Path(sys.argv[2]) / f"{file.stem}.png").write_bytes(picture)
