"""The dashboards that the packages install: made by what is beside them, read by Grafana, of use to their readers."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support import dashboards, documents
from support.appliance import ROOT
from support.dashboards import SHEETS, panels
from support.programs import need

from appliance.core.metrics import COUNTER, HISTOGRAM, PREFIX, Metrics

CHECK = ROOT / "tests" / "grafana" / "check.ts"
SCHEMA = ROOT / ".clients" / "schema" / "node_modules"
RUNBOOK = ROOT / "docs" / "runbook"
FILES = (ROOT / "packaging" / "stage" / "files.txt").read_text(encoding="utf-8")

PANELS = [pytest.param(sheet, panel, id=f"{sheet}-{panel['title']}") for sheet in SHEETS for panel in panels(sheet)]


def test_what_is_committed_is_what_the_generator_makes(tmp_path: Path) -> None:
    """If this fails: make dashboards"""
    need(dashboards.MAKE.exists(), str(dashboards.MAKE), "make .clients/grafana/ready")
    subprocess.run([str(dashboards.MAKE), str(dashboards.GRAFANA / "generate.py"), str(tmp_path)], check=True)
    made = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_text(encoding="utf-8") for path in dashboards.FOLDER.iterdir()}
    assert made.keys() == {f"{sheet}.json" for sheet in SHEETS}


# ---- by Grafana's own types ------------------------------------------------------------------------------------------


WRONG: dict[str, tuple[tuple[Any, ...], Any]] = {
    "a number for a text": (("refresh",), 30),
    "no value of an enumeration": (("graphTooltip",), 7),
    "an unknown name": (("nonsense",), 1),
    "an unknown kind of variable": (("templating", "list", 0, "type"), "guess"),
    "an unknown kind of panel": (("panels", 1, "type"), "graph"),
    "no value of an option": (("panels", 1, "options", "colorMode"), "loud"),
    "an unknown option": (("panels", 1, "options", "nonsense"), 1),
    "no mode of thresholds": (("panels", 1, "fieldConfig", "defaults", "thresholds", "mode"), "relative"),
    "no format of a query": (("panels", 1, "targets", 0, "format"), "csv"),
    "an unknown part of a query": (("panels", 1, "targets", 0, "nonsense"), 1),
    "a text for a number": (("panels", 1, "gridPos", "w"), "wide"),
}
"""Where something wrong is put into a dashboard, and what."""


def wrong(path: tuple[Any, ...], value: Any) -> Any:
    """A dashboard with this in it."""
    made = json.loads(json.dumps(SHEETS["overview"]))
    place = made
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return made


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the compiler says of each dashboard, ours and wrong ones; nothing of those in which it finds no fault."""
    need((SCHEMA / "@grafana" / "schema").is_dir(), "@grafana/schema", "make .clients/schema/ready, with Node.js 20")
    folder = tmp_path_factory.mktemp("types")
    (folder / "node_modules").symlink_to(SCHEMA)
    (folder / "check.ts").write_bytes(CHECK.read_bytes())
    contents = SHEETS | {name: wrong(*what) for name, what in WRONG.items()}
    files = {name: f"{name.replace(' ', '-')}.ts" for name in contents}
    for name, content in contents.items():
        head = "import type { Dashboard } from './check';\nexport const dashboard: Dashboard ="
        (folder / files[name]).write_text(f"{head} {json.dumps(content, indent=1)};\n", encoding="utf-8")
    options = ["--noEmit", "--strict", "--skipLibCheck", "--target", "es2022"]
    # The package tells newer resolvers of its index only; types of panels are beside it.
    options += ["--module", "commonjs", "--moduleResolution", "node10"]
    command = ["node", str(SCHEMA / "typescript" / "bin" / "tsc"), *options, "check.ts", *files.values()]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert "check.ts(" not in done.stdout, done.stdout
    return {name: done.stdout for name, file in files.items() if f"{file}(" in done.stdout}


@pytest.mark.parametrize("sheet", SHEETS)
def test_grafanas_own_types_agree(sheet: str, faults: dict[str, str]) -> None:
    assert faults.get(sheet, "") == ""


@pytest.mark.parametrize("name", WRONG)
def test_grafanas_own_types_would_find(name: str, faults: dict[str, str]) -> None:
    """So that they are known to look at all of it."""
    assert "error TS" in faults[name]


# ---- what is in them -------------------------------------------------------------------------------------------------


def test_each_is_found_at_a_place_of_its_own() -> None:
    """Which links and bookmarks keep; all have the tag by which they find each other."""
    assert {sheet: content["uid"] for sheet, content in SHEETS.items()} == {
        sheet: f"inference-appliance-{sheet}" for sheet in SHEETS
    }
    assert all(content["tags"] == ["inference-appliance"] for content in SHEETS.values())


@pytest.mark.parametrize("sheet", SHEETS)
def test_panels_stand_beside_each_other(sheet: str) -> None:
    """Nothing lies over anything, rows are full, titles and numbers are each panel's own."""
    taken: set[tuple[int, int]] = set()
    for panel in SHEETS[sheet]["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
    assert all((x, y) in taken for y in {y for _, y in taken} for x in range(24)), "a row is not full"
    for name in ("title", "id"):
        values = [panel[name] for panel in panels(sheet)]
        assert len(values) == len(set(values))


@pytest.mark.parametrize(("sheet", "panel"), PANELS)
def test_a_panel_is_of_use(sheet: str, panel: Any) -> None:
    """It says what it shows and in which unit; it reads series that there are, of the appliances that are chosen."""
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    defined = {variable["name"] for variable in SHEETS[sheet]["templating"]["list"]}
    for target in panel["targets"]:
        assert set(re.findall(r"\$(\w+)", target["expr"])) <= defined | {"__rate_interval", "__range"}
        selectors = re.findall(r"\b(?:up|ALERTS|inference_appliance_\w+)\b(?:\{([^}]*)\})?", target["expr"])
        assert selectors
        assert all('instance=~"$instance"' in selector for selector in selectors), target["expr"]
        assert set(re.findall(rf"{PREFIX}_\w+", target["expr"])) <= series(), target["expr"]
        bounds = {f"{bound:g}" if bound % 1 else f"{bound:.1f}" for bound in Metrics().request_seconds.bounds}
        assert set(re.findall(r'le="([^"]*)"', target["expr"])) <= bounds


def series() -> set[str]:
    """All names that the metrics page may have."""
    suffixes = {COUNTER: ("_total",), HISTOGRAM: ("_bucket", "_count", "_sum")}
    own = {
        f"{PREFIX}_{name}{suffix}"
        for name, family in Metrics().families.items()
        for suffix in suffixes.get(family.kind, ("",))
    }
    process = ("cpu_seconds_total", "resident_memory_bytes", "start_time_seconds")
    return own | {f"{PREFIX}_build_info", *(f"{PREFIX}_process_{name}" for name in process)}


def links(value: Any) -> list[str]:
    """All links in it, of panels and of fields."""
    if isinstance(value, dict):
        own = [value["url"]] if isinstance(value.get("url"), str) else []
        return own + [link for each in value.values() for link in links(each)]
    return [link for each in value for link in links(each)] if isinstance(value, list) else []


def test_links_lead_somewhere() -> None:
    """To pages of the runbook; to dashboards, with variables that these have."""
    pages = set()
    for sheet, content in SHEETS.items():
        for link in filter(None, links(content)):
            if page := re.fullmatch(r"\$\{runbook\}/([a-z-]+)\.md", link):
                pages.add(page[1])
                continue
            found = re.fullmatch(
                r"/d/inference-appliance-(\w+)\?\$\{datasource:queryparam\}(.*)&\$\{__url_time_range\}", link
            )
            assert found, (sheet, link)
            variables = {variable["name"] for variable in SHEETS[found[1]]["templating"]["list"]}
            assert set(re.findall(r"&var-(\w+)=", found[2])) <= variables
    assert pages
    assert pages <= {page.stem for page in RUNBOOK.glob("*.md")}


@pytest.mark.parametrize(("sheet", "panel"), PANELS)
def test_links_say_what_was_clicked(sheet: str, panel: Any) -> None:
    """A label that goes with a link is one that the panel's series have."""
    for label in set(re.findall(r"__(?:field\.labels|data\.fields)\.(\w+)", json.dumps(panel))):
        assert all(re.search(rf"by \([^)]*\b{label}\b|^{PREFIX}\w+{{", target["expr"]) for target in panel["targets"])


# ---- where they are --------------------------------------------------------------------------------------------------


def test_the_packages_install_them_and_what_they_lead_to() -> None:
    """Dashboards where the page says, and the page with its pictures."""
    installed = dict(line.split()[:2] for line in FILES.splitlines() if line and not line.startswith("#"))
    assert installed["packaging/grafana/dashboards/"] == "usr/share/inference-appliance/grafana/"
    assert installed["docs/dashboards.md"] == "usr/share/doc/inference-appliance/dashboards.md"
    page = dashboards.PAGE.read_text(encoding="utf-8")
    assert "/usr/share/inference-appliance/grafana" in page
    for picture in re.findall(r"!\[[^]]*\]\(([^)]*)\)", page):
        assert (dashboards.PAGE.parent / picture).is_file(), picture


def test_the_page_has_a_row_for_each_panel() -> None:
    """Of the dashboards as they are. If this fails: UPDATE_DOCS=1 pytest tests/integration/test_dashboards.py"""
    made = documents.part(dashboards.PAGE.read_text(encoding="utf-8"), dashboards.MADE)
    rows = [line.split(" | ")[0].removeprefix("| ") for line in made.splitlines() if line.startswith("| ")]
    names = [each.name for each in dashboards.asked()]
    assert [row for row in rows if row in names] == names


def test_only_what_is_between_the_markers_is_made_anew() -> None:
    begin, end = documents.marks(dashboards.MADE)
    page = f"# Title\n\nText.\n\n{begin}\n{end}\n"
    once = documents.with_part(page, dashboards.MADE, "\none\n")
    assert once == f"# Title\n\nText.\n\n{begin}\none\n{end}\n"
    assert documents.with_part(once, dashboards.MADE, "\n") == page
