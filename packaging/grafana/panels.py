"""What our dashboards are made of: expressions, panels, variables and links, each in one way.

A panel says what it shows and in which unit, has a sentence for its reader, and leads to the runbook's page where there
is one. Expressions see the appliances that the reader chose (`$instance`). Nothing in here is about a single dashboard.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    timeseries,
)
from grafana_foundation_sdk.builders import table as tables
from grafana_foundation_sdk.models import common as kinds
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import heatmap as heat
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

TAG = "inference-appliance"
SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
WIDTH = 24
"""Columns of Grafana's grid."""

READY, FAILED = 'state="ready"', 'result="failed"'
"""Matchers of a version's state, and of what became of something."""
STATES = {"ready": "green", "loading": "blue", "settling": "light-blue", "failed": "red", "held": "orange"}
"""A version's states, and their colours."""
RESULTS = {"failed": "red"}

# ---- expressions -----------------------------------------------------------------------------------------------------


def of(name: str, *matchers: str) -> str:
    """The series of one of our metrics, of the appliances that were chosen."""
    selector = ", ".join(('instance=~"$instance"', *matchers))
    return f"inference_appliance_{name}{{{selector}}}"


def rate(name: str, *matchers: str) -> str:
    """How fast a counter grows, a second; over as long as the picture needs."""
    return f"rate({of(name, *matchers)}[$__rate_interval])"


def grown(name: str, *matchers: str) -> str:
    """By how much a counter grew in all the time that is shown."""
    return f"increase({of(name, *matchers)}[$__range])"


def total(by: str, expression: str) -> str:
    """The sum; Args: by: labels to keep apart, "" for none."""
    return f"sum by ({by}) ({expression})"


def share(part: str, whole: str) -> str:
    """A quotient, where there is something to divide by: without calls there is no mean, not one that is no number."""
    return f"{part} / ({whole} > 0)"


def mean(by: str, name: str, *matchers: str) -> str:
    """The mean of what a histogram saw."""
    return share(total(by, rate(f"{name}_sum", *matchers)), total(by, rate(f"{name}_count", *matchers)))


def quantile(part: float, by: str, name: str, *matchers: str) -> str:
    """A quantile of what a histogram saw, where it saw something (nothing has a quantile that is no number)."""
    counts = total(f"{by}, le" if by else "le", rate(f"{name}_bucket", *matchers))
    return f"histogram_quantile({part:g}, {counts}) >= 0"


def days_until(name: str) -> str:
    """Days from now to the moment that a metric tells."""
    return f"({of(name)} - time()) / 86400"


def failed(by: str, *matchers: str) -> str:
    """Which part of the calls did not end with success; 0 where all did."""
    calls = total(by, rate("requests_total", *matchers))
    wrong = total(by, rate("requests_total", 'code!="10000"', *matchers))
    return share(f"({wrong} or 0 * {calls})", calls)


# ---- queries ---------------------------------------------------------------------------------------------------------


def query(
    expression: str, legend: str = "", *, now: bool = False, kind: str = "time_series", exemplars: bool = False
) -> prometheus.Dataquery:
    """What a panel asks.

    Args:
        now: one value each, not a course.
        kind: "time_series", "table" or "heatmap".
        exemplars: calls that were noted beside, with their ids.
    """
    made = prometheus.Dataquery().expr(expression).legend_format(legend).format(PromQueryFormat(kind))
    made = made.datasource(SOURCE).exemplar(exemplars)
    return made.instant() if now else made.range()


# ---- panels ----------------------------------------------------------------------------------------------------------


def steps(*pairs: tuple[str, float | None]) -> dashboard.ThresholdsConfig:
    """Colours by value, ascending; the first has no bound."""
    made = [models.Threshold(color=colour, value=value) for colour, value in pairs]
    return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(made)


PLAIN = steps(("blue", None))
GOOD_AT_NOUGHT = steps(("green", None), ("red", 1e-9))
PART_FAILED = steps(("green", None), ("orange", 0.01), ("red", 0.05))
DAYS_LEFT = steps(("red", None), ("orange", 2), ("green", 14))
"""As the alerts ApplianceCertificateExpires and ApplianceCertificateExpiresSoon have it."""
FILLING = steps(("green", None), ("orange", 0.8), ("red", 0.92))
"""The last one as the alert ApplianceGpuMemory has it."""


def lines(
    title: str,
    text: str,
    unit: str,
    *queries: prometheus.Dataquery,
    span: int = 8,
    height: int = 8,
    stacked: bool = False,
    colours: Mapping[str, str] = {},
    runbook: str = "",
    leads: Sequence[str] = (),
) -> timeseries.Panel:
    """Courses over time, from 0.

    Args:
        unit: one of Grafana's.
        colours: of lines with these names; others have any.
        leads: labels of a line with which a click on it leads to the model's dashboard.
    """
    panel = (
        timeseries.Panel()
        .line_width(1)
        .fill_opacity(60 if stacked else 10)
        .show_points(kinds.VisibilityMode.NEVER)
        .min(0)
        .legend(
            common.VizLegendOptions()
            .display_mode(kinds.LegendDisplayMode.LIST)
            .placement(kinds.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(common.VizTooltipOptions().mode(kinds.TooltipDisplayMode.MULTI).sort(kinds.SortOrder.DESCENDING))
    )
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(kinds.StackingMode.NORMAL))
    for name, colour in colours.items():
        fixed = models.DynamicConfigValue(id_val="color", value={"mode": "fixed", "fixedColor": colour})
        panel = panel.with_override(models.MatcherConfig(id_val="byName", options=name), [fixed])
    return _finished(panel, title, text, unit, queries, span, height, runbook, leads)


def number(
    title: str,
    text: str,
    unit: str,
    expression: str,
    *,
    colours: dashboard.ThresholdsConfig = PLAIN,
    span: int = 3,
    height: int = 4,
    decimals: int | None = None,
    runbook: str = "",
) -> stat.Panel:
    """One number, as it is now, in the colour that it deserves."""
    panel = (
        stat.Panel()
        .thresholds(colours)
        .color_mode(kinds.BigValueColorMode.VALUE)
        .graph_mode(kinds.BigValueGraphMode.NONE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
    )
    if decimals is not None:
        panel = panel.decimals(decimals)
    return _finished(panel, title, text, unit, [query(expression, now=True)], span, height, runbook)


def bars(
    title: str,
    text: str,
    unit: str,
    ask: prometheus.Dataquery,
    *,
    colours: dashboard.ThresholdsConfig = PLAIN,
    span: int = 8,
    height: int = 8,
    runbook: str = "",
) -> bargauge.Panel:
    """A bar for each series, as it is now."""
    panel = (
        bargauge.Panel()
        .thresholds(colours)
        .min(0)
        .orientation(kinds.VizOrientation.HORIZONTAL)
        .display_mode(kinds.BarGaugeDisplayMode.BASIC)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
    )
    return _finished(panel, title, text, unit, [ask], span, height, runbook)


def buckets(title: str, text: str, unit: str, name: str, *matchers: str, span: int = 8, height: int = 8) -> Any:
    """How the values of a histogram are spread, over time: a heat map of its buckets."""
    ask = query(total("le", f"increase({of(f'{name}_bucket', *matchers)}[$__rate_interval])"), "{{le}}", kind="heatmap")
    panel = (
        heatmap.Panel()
        .calculate(False)
        .color(heatmap.HeatmapColorOptions().mode(heat.HeatmapColorMode.SCHEME).scheme("Blues").steps(64))
        .cell_gap(1)
        .y_axis(heatmap.YAxisConfig().unit(unit).axis_placement(kinds.AxisPlacement.LEFT))
        .mode(kinds.TooltipDisplayMode.SINGLE)
    )
    return _finished(panel, title, text, "short", [ask], span, height, "")


def states(
    title: str, text: str, ask: prometheus.Dataquery, names: dict[int, tuple[str, str]], *, span: int, runbook: str = ""
) -> statetimeline.Panel:
    """Which state each series was in, over time. Args: names: value → name and colour."""
    mapping = {
        str(value): models.ValueMappingResult(text=name, color=colour, index=place)
        for place, (value, (name, colour)) in enumerate(names.items())
    }
    panel = statetimeline.Panel().mappings([models.ValueMap(options=mapping)]).merge_values(True)
    return _finished(panel, title, text, "none", [ask], span, 8, runbook)


@dataclass(frozen=True)
class Column:
    """A column of a table: an expression with a value for each row.

    Attributes:
        name: what stands above it; "" hides the value, where the expression is there for its labels.
    """

    expression: str
    name: str = ""
    unit: str = "short"
    colours: dashboard.ThresholdsConfig | None = None
    decimals: int | None = None


def table(
    title: str,
    text: str,
    columns: Sequence[Column],
    *,
    labels: Sequence[str],
    span: int = WIDTH,
    height: int = 8,
    runbook: str = "",
    leads: Sequence[str] = (),
) -> tables.Panel:
    """A row for each set of labels, a column for each expression.

    Args:
        labels: what the expressions keep apart, in the order of their columns.
        leads: labels of a row with which a click on the first of them leads to the model's dashboard.
    """
    panel = tables.Panel()
    renamed, hidden = {}, {"Time": True}
    queries = []
    for place, column in enumerate(columns):
        mark = chr(ord("A") + place)
        # With a single query there is no mark behind "Value".
        field = f"Value #{mark}" if len(columns) > 1 else "Value"
        queries.append(query(column.expression, column.name, now=True, kind="table"))
        if not column.name:
            hidden[field] = True
            continue
        renamed[field] = column.name
        properties = [models.DynamicConfigValue(id_val="unit", value=column.unit)]
        if column.decimals is not None:
            properties.append(models.DynamicConfigValue(id_val="decimals", value=column.decimals))
        if column.colours is not None:
            properties.append(models.DynamicConfigValue(id_val="thresholds", value=column.colours.build()))
            properties.append(models.DynamicConfigValue(id_val="custom.cellOptions", value={"type": "color-text"}))
        panel = panel.with_override(models.MatcherConfig(id_val="byName", options=column.name), properties)
    if leads:
        to = models.DynamicConfigValue(id_val="links", value=[_to_model(leads, "__data.fields").build()])
        panel = panel.with_override(models.MatcherConfig(id_val="byName", options=leads[0]), [to])
    order = {name: place for place, name in enumerate([*labels, *renamed])}
    panel = panel.with_transformation(models.DataTransformerConfig(id_val="merge", options={}))
    panel = panel.with_transformation(
        models.DataTransformerConfig(
            id_val="organize", options={"excludeByName": hidden, "renameByName": renamed, "indexByName": order}
        )
    )
    return _finished(panel, title, text, "short", queries, span, height, runbook)


def _finished(
    panel: Any,
    title: str,
    text: str,
    unit: str,
    queries: Sequence[prometheus.Dataquery],
    span: int,
    height: int,
    runbook: str,
    leads: Sequence[str] = (),
) -> Any:
    panel = panel.title(title).description(text).unit(unit).span(span).height(height).datasource(SOURCE)
    for place, ask in enumerate(queries):
        panel = panel.with_target(ask.ref_id(chr(ord("A") + place)))
    if runbook:
        to = dashboard.DashboardLink("Runbook").type(models.DashboardLinkType.LINK)
        panel = panel.links([to.url(f"${{runbook}}/{runbook}.md").target_blank(True)])
    if leads:
        panel = panel.data_links([_to_model(leads, "__field.labels")])
    return panel


def _to_model(labels: Sequence[str], where: str) -> dashboard.DashboardLink:
    """To the model's dashboard, for the same source and time. Args: where: Grafana's name for what was clicked."""
    chosen = "".join(f"&var-{label}=${{{where}.{label}}}" for label in labels)
    url = f"/d/{TAG}-model?${{datasource:queryparam}}{chosen}&${{__url_time_range}}"
    return dashboard.DashboardLink("Show the model").url(url)


# ---- dashboards ------------------------------------------------------------------------------------------------------


def chosen(name: str, metric: str, *matchers: str, label: str = "") -> dashboard.QueryVariable:
    """A variable with the values of a label: one, several, or all of them."""
    inner = f"{{{', '.join(matchers)}}}" if matchers else ""
    return (
        dashboard.QueryVariable(name)
        .label(label or name.capitalize())
        .query(f"label_values(inference_appliance_{metric}{inner}, {name})")
        .datasource(SOURCE)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .current(models.VariableOption(selected=True, text="All", value="$__all"))
    )


def sheet(name: str, title: str, text: str, *variables: dashboard.QueryVariable) -> dashboard.Dashboard:
    """An empty dashboard with what all have: source, appliances, where the runbook is, and the way to the others."""
    made = (
        dashboard.Dashboard(f"Inference appliance / {title}")
        .uid(f"{TAG}-{name}")
        .description(text)
        .tags([TAG])
        .editable()
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .refresh("30s")
        .time("now-1h", "now")
        .timezone("browser")
        .link(
            dashboard.DashboardLink("Inference appliance")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .as_dropdown(True)
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(chosen("instance", "build_info", label="Appliance"))
    )
    for variable in variables:
        made = made.with_variable(variable)
    runbook = dashboard.TextBoxVariable("runbook").label("Runbook at")
    return made.with_variable(runbook.default_value("/public/inference-appliance/runbook"))


def section(made: dashboard.Dashboard, title: str, *panels: Any) -> None:
    """Put panels under a heading, behind what is there."""
    made.with_row(dashboard.Row(title))
    for panel in panels:
        made.with_panel(panel)
