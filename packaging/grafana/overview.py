"""All appliances at a glance: is everything well, and if not, where?"""

from grafana_foundation_sdk.builders import dashboard
from panels import (
    DAYS_LEFT,
    FILLING,
    GOOD_AT_NOUGHT,
    PART_FAILED,
    READY,
    RESULTS,
    STATES,
    Column,
    bars,
    days_until,
    failed,
    grown,
    lines,
    number,
    of,
    quantile,
    query,
    rate,
    section,
    share,
    sheet,
    steps,
    table,
    total,
)

ALERTS = 'ALERTS{alertname=~"Appliance.+", alertstate="firing", instance=~"$instance"}'
REACHED = 'model!=""'
"""Calls that reached a model; others have no name there."""
NOT_READY = 'state=~"failed|loading|settling"'
DAYS = days_until("certificate_expiry_timestamp_seconds")


def build() -> dashboard.Dashboard:
    """The dashboard."""
    made = sheet("overview", "Overview", "All appliances: what they do, how they are, and what is wrong.")
    for part in (health, calls, models, machines):
        part(made)
    return made


def health(made: dashboard.Dashboard) -> None:
    """What tells at once whether somebody has to act."""
    by = "instance"
    section(
        made,
        "Is everything well?",
        number(
            "Do not answer",
            "Appliances that Prometheus cannot scrape: machine off, service stopped, or no way through the network.",
            "short",
            'count(up{instance=~"$instance"} == 0) or vector(0)',
            colours=GOOD_AT_NOUGHT,
        ),
        number(
            "Alerts",
            "Alerts of our rules that are firing for these appliances. Needs the rules of packaging/prometheus.",
            "short",
            f"count({ALERTS}) or vector(0)",
            colours=GOOD_AT_NOUGHT,
        ),
        number(
            "Models not ready",
            "Versions that failed, load, or whose files still change.",
            "short",
            f"count({of('model_state', NOT_READY)} == 1) or vector(0)",
            colours=GOOD_AT_NOUGHT,
            runbook="model-not-ready",
        ),
        number(
            "Lost calls",
            "Accepted calls that ended with neither a result nor a status, in the time shown. Stays 0.",
            "short",
            total("", grown("requests_lost_total")),
            colours=GOOD_AT_NOUGHT,
            decimals=0,
            runbook="requests-lost",
        ),
        number(
            "Processes replaced",
            "Fronts and engines that ended and were replaced, in the time shown.",
            "short",
            total("", grown("worker_restarts_total")) + " or vector(0)",
            colours=GOOD_AT_NOUGHT,
            decimals=0,
            runbook="worker-restarts",
        ),
        number(
            "Next certificate ends",
            "Days until the first certificate of any of these appliances ends.",
            "d",
            f"min({DAYS})",
            colours=DAYS_LEFT,
            decimals=1,
            runbook="certificate-expires",
        ),
        number(
            "Calls failed",
            "Part of the calls that did not end with success, whoever is to blame.",
            "percentunit",
            failed(""),
            colours=PART_FAILED,
            decimals=2,
        ),
        number(
            "Calls",
            "Calls that ended, a second, on all of these appliances together.",
            "reqps",
            total("", rate("requests_total")),
            decimals=1,
        ),
        table(
            "Appliances",
            "One row for each. A click on its name shows its models.",
            [
                Column(total("instance, version", of("build_info"))),
                Column(
                    'sum by (instance) (up{instance=~"$instance"})', "up", colours=steps(("red", None), ("green", 1))
                ),
                Column(total(by, f"time() - {of('process_start_time_seconds')}"), "running for", "s"),
                Column(total(by, of("catalog_versions", READY)), "models ready"),
                Column(
                    total(by, of("catalog_versions", NOT_READY)), "models not ready", colours=GOOD_AT_NOUGHT, decimals=0
                ),
                Column(total(by, rate("requests_total")), "calls", "reqps", decimals=1),
                Column(failed(by), "failed", "percentunit", PART_FAILED, 2),
                Column(quantile(0.99, by, "request_seconds"), "99 % within", "s"),
                Column(f"min by (instance) ({DAYS})", "certificate ends in", "d", DAYS_LEFT, 1),
                Column(
                    f"max by (instance) ({of('gpu_memory_used_bytes')} / {of('gpu_memory_total_bytes')})",
                    "GPU memory",
                    "percentunit",
                    FILLING,
                    0,
                ),
            ],
            labels=["instance", "version"],
            span=16,
            leads=["instance"],
        ),
        table(
            "Alerts that are firing",
            "Each has a page in the runbook, docs/runbook; its annotation `runbook` names it.",
            [Column(f"sum by (alertname, instance, severity) ({ALERTS})")],
            labels=["alertname", "instance", "severity"],
            span=8,
        ),
    )


def calls(made: dashboard.Dashboard) -> None:
    """What comes, what fails, and how long it takes."""
    section(
        made,
        "Calls",
        lines(
            "Calls by appliance",
            "Calls that ended, a second. Lines far apart: the balancer does not share the load.",
            "reqps",
            query(total("instance", rate("requests_total")), "{{instance}}"),
            leads=["instance"],
        ),
        lines(
            "Failed calls by code",
            "Calls that did not end with success, by Clarifai's status code, a second.",
            "reqps",
            query(total("code", rate("requests_total", 'code!="10000"')), "{{code}}"),
            stacked=True,
        ),
        lines(
            "Refused by reason",
            "Calls that were refused before they reached a model, and inputs refused by themselves, a second. "
            "queue_full and deadline: there is more to do than the appliances can.",
            "reqps",
            query(f"{total('reason', rate('rejected_total'))} > 0", "{{reason}}"),
            stacked=True,
            runbook="rejects",
        ),
        lines(
            "Time of a call",
            "From call to reply: half of the calls, and 99 of 100, are within these.",
            "s",
            query(quantile(0.5, "instance", "request_seconds"), "50 % {{instance}}"),
            query(quantile(0.99, "instance", "request_seconds"), "99 % {{instance}}"),
            runbook="slow",
            leads=["instance"],
        ),
        lines(
            "Calls being worked on",
            "By appliance. What grows without end is a queue that fills.",
            "short",
            query(total("instance", of("in_flight_requests")), "{{instance}}"),
        ),
        lines(
            "Memory that requests hold",
            "Part of limits.memory_in_flight; at 100 % calls are told to try again.",
            "percentunit",
            query(f"{of('memory_in_flight_bytes')} / {of('memory_in_flight_limit_bytes')}", "{{instance}}"),
            runbook="rejects",
        ),
    )


def models(made: dashboard.Dashboard) -> None:
    """What is served."""
    hits, misses = total("instance", rate("cache_hits_total")), total("instance", rate("cache_misses_total"))
    section(
        made,
        "Models",
        lines(
            "Calls by model",
            "The ten models that are called most, calls a second. A click on a line shows that model.",
            "reqps",
            query(f"topk(10, {total('model', rate('requests_total', REACHED))})", "{{model}}"),
            leads=["model"],
        ),
        lines(
            "Slowest models",
            "The ten models whose calls take longest: 99 of 100 are within this.",
            "s",
            query(f"topk(10, {quantile(0.99, 'model', 'request_seconds', REACHED)})", "{{model}}"),
            runbook="slow",
            leads=["model"],
        ),
        lines(
            "Versions by state",
            "Versions in all catalogs. failed and held need somebody; loading and settling pass.",
            "short",
            query(f"{total('state', of('catalog_versions'))} > 0", "{{state}}"),
            stacked=True,
            colours=STATES,
            runbook="model-not-ready",
        ),
        bars(
            "Bundles that cannot be read",
            "By appliance. `appliance models list` says why.",
            "short",
            query(of("catalog_unreadable_bundles"), "{{instance}}", now=True),
            colours=GOOD_AT_NOUGHT,
            span=6,
            height=6,
            runbook="model-not-ready",
        ),
        lines(
            "Versions switched",
            "A new version took the place of a running one: how often since the start, by model.",
            "short",
            query(total("model", of("model_swaps_total")), "{{model}}"),
            span=6,
            height=6,
            leads=["model"],
        ),
        lines(
            "Answers from the cache",
            "Part of the inputs with use_predict_cache that were answered from it.",
            "percentunit",
            query(share(hits, f"({hits} + {misses})"), "{{instance}}"),
            span=6,
            height=6,
        ),
        lines(
            "Downloads by outcome",
            "Inputs by URL, a second.",
            "reqps",
            query(f"{total('outcome', rate('downloads_total'))} > 0", "{{outcome}}"),
            span=6,
            height=6,
        ),
    )


def machines(made: dashboard.Dashboard) -> None:
    """What it takes. More of a machine is in node_exporter's dashboard, number 1860."""
    section(
        made,
        "Machines and processes",
        lines(
            "CPU by process",
            "CPUs in use by each process of ours. The supervisor's own, or all of it in one process, is `process`.",
            "short",
            query(total("instance, process", rate("worker_cpu_seconds_total")), "{{instance}} {{process}}"),
            query(total("instance", rate("process_cpu_seconds_total")), "{{instance}} process"),
        ),
        lines(
            "Memory by process",
            "Resident memory; pages that several processes share count in each.",
            "bytes",
            query(total("instance, process", of("worker_resident_memory_bytes")), "{{instance}} {{process}}"),
            query(total("instance", of("process_resident_memory_bytes")), "{{instance}} process"),
        ),
        lines(
            "Free disk",
            "Where models and state lie. Below 10 % an alert comes.",
            "percentunit",
            query(f"{of('disk_free_bytes')} / {of('disk_size_bytes')}", "{{instance}} {{folder}}"),
            runbook="disk-full",
        ),
        lines(
            "Processes at work",
            "1: at work; 0: it ended, or is being replaced.",
            "short",
            query(of("worker_up"), "{{instance}} {{process}}"),
            runbook="worker-restarts",
        ),
        lines(
            "Memory of the cache",
            "Part of cache.size; a full one is no fault: what was asked longest ago makes room.",
            "percentunit",
            query(share(of("cache_bytes"), of("cache_limit_bytes")), "{{instance}}"),
        ),
        lines(
            "Traces by outcome",
            "Of calls that were traced, a second. failed: the collector did not take them; dropped: too many waited.",
            "reqps",
            query(total("outcome", rate("traces_total")), "{{outcome}}"),
            stacked=True,
            colours=RESULTS,
        ),
    )
