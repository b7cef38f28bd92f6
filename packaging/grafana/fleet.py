"""Orchestrator and fleet: is the link to the centre well, are all appliances alike, who does the work, who asks?"""

from grafana_foundation_sdk.builders import dashboard
from panels import (
    FAILED,
    GOOD_AT_NOUGHT,
    READY,
    RESULTS,
    Column,
    grown,
    lines,
    number,
    of,
    quantile,
    query,
    rate,
    section,
    sheet,
    table,
    total,
)


def build() -> dashboard.Dashboard:
    """The dashboard."""
    made = sheet(
        "fleet", "Orchestrator and fleet", "The link to the orchestrator, and all appliances beside each other."
    )
    for part in (orchestrator, alike, work, principals, usage):
        part(made)
    return made


def orchestrator(made: dashboard.Dashboard) -> None:
    """The agent's side of it. Only of appliances with `orchestrator.api_base`."""
    section(
        made,
        "Orchestrator (of appliances that it knows)",
        number(
            "Not connected",
            "Appliances whose orchestrator does not answer, or where what is registered is not right yet.",
            "short",
            f"sum(1 - {of('orchestrator_connected')})",
            colours=GOOD_AT_NOUGHT,
            height=8,
            runbook="orchestrator-silent",
        ),
        lines(
            "Silence",
            "Since the orchestrator last answered, by appliance. From five minutes an alert comes.",
            "s",
            query(of("orchestrator_heartbeat_age_seconds"), "{{instance}}"),
            span=7,
            runbook="orchestrator-silent",
        ),
        lines(
            "Registrations",
            "How often what is registered was compared and mended since the start; failed: it was refused.",
            "short",
            query(total("result", of("orchestrator_registrations_total")), "{{result}}"),
            span=7,
            colours=RESULTS,
            runbook="orchestrator-silent",
        ),
        lines(
            "Streams",
            "That wait for work, or have some. All of them busy: more work waits in the centre than is done here.",
            "short",
            query(total("state", of("orchestrator_streams")), "{{state}}"),
            span=7,
            stacked=True,
        ),
        lines(
            "Work from the orchestrator",
            "Items by what became of them, a second.",
            "reqps",
            query(total("outcome", rate("orchestrator_items_total")), "{{outcome}}"),
            span=12,
            stacked=True,
        ),
        lines(
            "Work by model",
            "Items that were taken, by model, a second.",
            "reqps",
            query(total("model", rate("orchestrator_items_total")), "{{model}}"),
            span=12,
            stacked=True,
            leads=["model"],
        ),
    )


def usage(made: dashboard.Dashboard) -> None:
    """What callers used: written down by each appliance, and reported where there is an `orchestrator.usage_url`."""
    section(
        made,
        "Usage",
        lines(
            "Usage written",
            "To the disk, times a second; failed: it waits in memory.",
            "short",
            query(total("result", rate("usage_writes_total")), "{{result}}"),
            height=6,
            colours=RESULTS,
            runbook="disk-full",
        ),
        lines(
            "Usage reports",
            "Attempts to post one, by what became of them, a second.",
            "reqps",
            query(total("result", rate("usage_reports_total")), "{{result}}"),
            height=6,
            colours=RESULTS,
        ),
        lines(
            "Usage not reported yet",
            "Records that the receiver at orchestrator.usage_url does not have yet, by appliance.",
            "short",
            query(of("usage_unreported_records"), "{{instance}}"),
            height=6,
        ),
    )


def alike(made: dashboard.Dashboard) -> None:
    """What should be the same on all."""
    contents = f"count by (model, version, sha256) ({of('model_info')})"
    section(
        made,
        "Are they alike?",
        number(
            "How many", "Appliances that were seen in the time shown.", "short", f"count({of('build_info')})", span=4
        ),
        number(
            "Releases",
            "Of the appliance that are in use: more than one during an upgrade only.",
            "short",
            f"count(count by (version) ({of('build_info')}))",
            span=4,
        ),
        number(
            "Versions that differ",
            "The same model and version with different content on different appliances.",
            "short",
            f"sum(count by (model, version) ({contents}) - 1)",
            colours=GOOD_AT_NOUGHT,
            span=4,
        ),
        number(
            "Not everywhere",
            "Models that some of these appliances have ready and others have not.",
            "short",
            f"count(count by (model) (count by (instance, model) ({of('model_info')})) "
            f"< scalar(count({of('build_info')}))) or vector(0)",
            span=4,
        ),
        number(
            "Largest difference of clocks",
            "Between an appliance and Prometheus. From 5 s an alert comes.",
            "s",
            f"max(abs({of('clock_seconds')} - timestamp({of('clock_seconds')})))",
            span=4,
            runbook="clock-skew",
        ),
        number(
            "Failed reloads",
            "Changed configurations that were not taken over, in the time shown.",
            "short",
            total("", grown("config_reloads_total", FAILED)),
            colours=GOOD_AT_NOUGHT,
            span=4,
            decimals=0,
            runbook="reload-failed",
        ),
        table(
            "Appliances",
            "Releases of the appliance, of onnxruntime, and of the metrics as an interface.",
            [
                Column(f"sum by (instance, version, onnxruntime, metrics) ({of('build_info')})"),
                Column(total("instance", f"time() - {of('process_start_time_seconds')}"), "running for", "s"),
                Column(total("instance", grown("config_reloads_total")), "reloads", decimals=0),
                Column(total("instance", of("catalog_versions", READY)), "versions ready"),
                Column(total("instance", of("catalog_versions", 'state="held"')), "versions held"),
            ],
            labels=["instance", "version", "onnxruntime", "metrics"],
            span=12,
            leads=["instance"],
        ),
        table(
            "Models",
            "On how many appliances each content of a version is ready.",
            [Column(contents, "appliances")],
            labels=["model", "version", "sha256"],
            span=12,
            leads=["model"],
        ),
    )


def work(made: dashboard.Dashboard) -> None:
    """Who does how much."""
    inputs = total("instance", rate("inputs_total"))
    section(
        made,
        "Do they share the work?",
        lines(
            "Part of the inputs",
            "Of all that the fleet answers, by appliance.",
            "percentunit",
            query(f"{inputs} / on () group_left () ({total('', rate('inputs_total'))} > 0)", "{{instance}}"),
            stacked=True,
            leads=["instance"],
        ),
        lines(
            "Rows waiting",
            "By appliance: work for one that another could do.",
            "short",
            query(total("instance", of("queue_rows")), "{{instance}}"),
            runbook="rejects",
            leads=["instance"],
        ),
        lines(
            "99 % of the calls within",
            "By appliance. One that is slower than its like has less of a machine, or a neighbour on it.",
            "s",
            query(quantile(0.99, "instance", "request_seconds"), "{{instance}}"),
            runbook="slow",
            leads=["instance"],
        ),
    )


def principals(made: dashboard.Dashboard) -> None:
    """Who asks. Only with `metrics.principals`."""
    section(
        made,
        "Who calls? (needs metrics.principals)",
        lines(
            "Calls by principal",
            "A second; those that are not counted by themselves are `other`.",
            "reqps",
            query(total("principal", rate("principal_requests_total")), "{{principal}}"),
            span=12,
            stacked=True,
        ),
        lines(
            "Inputs by principal",
            "Answered, a second.",
            "reqps",
            query(total("principal", rate("principal_inputs_total")), "{{principal}}"),
            span=12,
            stacked=True,
        ),
    )
