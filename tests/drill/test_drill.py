"""A drill: seven faults, one after the other, on a running appliance with a real Prometheus and the rules as shipped.

Each must be seen within half a minute in four places: a metric in Prometheus, an alert (pending is seen; most wait
before they fire), the log, and the status page. Faults stay until their alerts fire; then the page of the runbook is
followed, and at the end nothing may be left of any of them. `make drill`, as root; UPDATE_DOCS=1 writes the tables of
docs/drill.md.
"""

import math
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from drill.faults import FAULTS, Fault, patience_s
from drill.scene import SCRAPE_S, Scene, opened
from support.appliance import ROOT
from support.documents import table, with_part
from support.prometheus import needs_prometheus

pytestmark = needs_prometheus

PAGE = ROOT / "docs" / "drill.md"
TABLES = ROOT / "build" / "drill.md"

SEEN_S = 30.0
"""Within this every fault is seen everywhere."""

QUIET_S = 840.0
"""When nothing is left of any of them after the last was mended: what is remembered longest is a process that was
replaced, for 15 minutes, and that was the first one. pytest ends a test after 900 s."""


@dataclass
class Course:
    """What became of a fault.

    Attributes:
        begun, mended: when, by the monotonic clock.
        log_from: characters of the log that were there before.
        seen, fired, gone: seconds, by place; of `gone` since it was mended.
        words: what was seen there first.
    """

    begun: float = math.nan
    mended: float = math.nan
    log_from: int = 0
    seen: dict[str, float] = field(default_factory=dict)
    fired: dict[str, float] = field(default_factory=dict)
    gone: dict[str, float] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)


@dataclass
class Drill:
    """The faults that there were, and what became of each."""

    scene: Scene
    courses: dict[str, Course] = field(default_factory=dict)

    def observe(self) -> None:
        """Look at all four places for every fault that there was."""
        scene = self.scene
        page, alerts, log = scene.page(), scene.alerts(), scene.appliance.log
        for name, course in self.courses.items():
            visible = self._visible(FAULTS[name], page, alerts, log[course.log_from :])
            now = time.monotonic()
            for place, words in visible.items():
                course.seen.setdefault(place, now - course.begun)
                course.words.setdefault(place, words)
                course.gone.pop(place, None)
                if alerts.get(place, {}).get("state") == "firing":
                    course.fired.setdefault(place, now - course.begun)
            for place in FAULTS[name].places - visible.keys():
                if not math.isnan(course.mended):
                    course.gone.setdefault(place, now - course.mended)

    def _visible(self, fault: Fault, page: dict[str, Any], alerts: dict[str, Any], log: str) -> dict[str, str]:
        """What tells of the fault now, by place."""
        found = {name: str(alerts[name]["state"]) for name in fault.alerts if name in alerts}
        if self.scene.prometheus.ask("/query", query=fault.metric)["result"]:
            found["metric"] = fault.metric
        if line := re.search(rf"^\S+ (?:WARNING|ERROR|CRITICAL) +(.*{fault.log}.*)$", log, re.M):
            found["log"] = line[1]
        for reason in page["reasons"]:
            if (reason["what"], reason["runbook"]) == fault.reason:
                found["page"] = f"{reason['what']}: {reason['why']}"
        return found

    def until(self, condition: Callable[[], object], within_s: float) -> bool:
        """Whether it became true in time; everything is observed meanwhile."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            self.observe()
            if condition():
                return True
            time.sleep(0.2)
        return False


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drill]:
    """All is well."""
    with opened(tmp_path_factory.mktemp("drill")) as scene:
        yield Drill(scene)


@pytest.mark.parametrize("name", FAULTS)
def test_it_is_seen_within_half_a_minute(drill: Drill, name: str) -> None:
    """In all four places, which lead to the same page."""
    fault = FAULTS[name]
    course = drill.courses[name] = Course(time.monotonic(), log_from=len(drill.scene.appliance.log))
    fault.inject(drill.scene)
    everywhere = {"log", *fault.places}
    drill.until(lambda: course.seen.keys() >= everywhere, 3 * SEEN_S)
    assert course.seen.keys() >= everywhere, f"not seen: {everywhere - course.seen.keys()}\n{drill.scene.appliance.log}"
    assert max(course.seen.values()) <= SEEN_S, course.seen
    runbook = drill.scene.alerts()[fault.alerts[0]]["annotations"]["runbook"]
    assert runbook == f"docs/runbook/{fault.reason[1]}.md"


@pytest.mark.parametrize("name", sorted(FAULTS, key=lambda name: FAULTS[name].waits_s))
def test_its_alert_fires_and_the_runbook_leads_to_the_fix(drill: Drill, name: str) -> None:
    fault, course = FAULTS[name], drill.courses[name]
    fire = {alert for alert in fault.alerts if patience_s(alert) < 3600}
    assert drill.until(lambda: course.fired.keys() >= fire, fault.waits_s + 60), course.fired
    fault.mend(drill.scene)
    course.mended = time.monotonic()
    drill.until(lambda: course.gone.keys() >= fault.places, 75)
    fault.proof(drill.scene)


def test_nothing_is_left_of_any_of_them(drill: Drill) -> None:
    """No alert, no reason on the page; what was measured is written down."""
    quiet = drill.until(
        lambda: all(course.gone.keys() >= FAULTS[name].places for name, course in drill.courses.items()), QUIET_S
    )
    left = {name: FAULTS[name].places - course.gone.keys() for name, course in drill.courses.items()}
    assert quiet, left
    assert drill.scene.alerts() == {}
    assert (drill.scene.page()["health"], drill.scene.page()["reasons"]) == ("healthy", [])
    assert drill.courses.keys() == FAULTS.keys(), "all of them, else the table would not be whole"
    TABLES.parent.mkdir(exist_ok=True)
    TABLES.write_text(_tables(drill), encoding="utf-8")
    if os.environ.get("UPDATE_DOCS") == "1":
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(with_part(page, "measured by make drill", f"\n{_tables(drill)}"), encoding="utf-8")


def _tables(drill: Drill) -> str:
    """Where each fault was seen and after how long; and when it was gone."""
    seen, gone = [], []
    for name, fault in FAULTS.items():
        course = drill.courses[name]
        alerts = "<br>".join(_alert(alert, course) for alert in fault.alerts)
        page = fault.reason[1]
        seen.append(
            [
                name,
                f"`{fault.metric}` {_s(course.seen['metric'])}",
                alerts,
                f"{_plain(course.words['log'], drill.scene)} {_s(course.seen['log'])}",
                f"{_plain(course.words['page'], drill.scene)} {_s(course.seen['page'])}",
                f"[{page}](runbook/{page}.md)",
                fault.fixed_by,
            ]
        )
        last = max(course.gone[alert] for alert in fault.alerts)
        gone.append([name, _s(course.gone["metric"]), _s(last), _s(course.gone["page"])])
    day = time.strftime("%Y-%m-%d", time.gmtime())
    run = f"Run of {day}, {len(os.sched_getaffinity(0))} CPUs: scraped and evaluated every {SCRAPE_S} s."
    after = "After the fix all of it went, after so many seconds:"
    places = ["metric", "alert", "status page"]
    first = table(["fault", "metric", "alert", "log", "status page", "runbook", "fixed by"], seen)
    return f"{run}\n\n{first}\n{after}\n\n{table(['fault', *places], gone)}"


def _alert(alert: str, course: Course) -> str:
    waits_s = patience_s(alert)
    if not waits_s:
        return f"{alert}: firing {_s(course.seen[alert])}"
    fired = f"fired {_s(course.fired[alert])}" if alert in course.fired else "mended before that"
    return f"{alert}: pending {_s(course.seen[alert])}; the rule waits {waits_s / 60:.0f} min, {fired}"


def _s(seconds: float) -> str:
    return f"**{seconds:.1f} s**" if seconds < 100 else f"**{seconds:.0f} s**"


def _plain(text: str, scene: Scene) -> str:
    """Without what is different on every machine."""
    return re.sub(r":\d{4,5}\b", ":…", text.replace(str(scene.appliance.home), "…"))
