"""One model in depth: what it is asked, how long that takes and where the time goes, and how well it is batched."""

from grafana_foundation_sdk.builders import dashboard
from panels import (
    FAILED,
    GOOD_AT_NOUGHT,
    PART_FAILED,
    READY,
    STATES,
    Column,
    bars,
    buckets,
    chosen,
    failed,
    grown,
    lines,
    mean,
    number,
    of,
    quantile,
    query,
    rate,
    section,
    share,
    sheet,
    states,
    steps,
    table,
    total,
)

MODEL = ('model=~"$model"', 'version=~"$version"')
PARTS = {"decode": "decode", "queue": "queue", "batch_wait": "batch wait", "compute": "compute", "encode": "encode"}
"""Where the time of a call goes: metric → name, in the order in which a call meets them."""
SATISFIED_S, TOLERATED_S = "0.25", "1.0"
"""Bounds of the Apdex: a call within the first counts whole, one within the second half. Each is one of a bucket."""


def build() -> dashboard.Dashboard:
    """The dashboard."""
    made = sheet(
        "model",
        "Model",
        "One model in depth, or several together: what it is asked, how long that takes, where the time goes.",
        chosen("model", "model_state", 'instance=~"$instance"').all_value(".+"),
        chosen("version", "model_state", 'instance=~"$instance"', 'model=~"$model"').all_value(".+"),
    )
    for part in (glance, calls, time, batches, life):
        part(made)
    return made


def glance(made: dashboard.Dashboard) -> None:
    """The numbers that others ask for."""
    bucket = "request_seconds_bucket"
    within = [total("", rate(bucket, *MODEL, f'le="{bound}"')) for bound in (SATISFIED_S, TOLERATED_S)]
    section(
        made,
        "At a glance",
        number(
            "Ready on",
            "Appliances that have a version of it ready.",
            "short",
            f"count({total('instance', of('model_state', *MODEL, READY))})",
        ),
        number("Calls", "Calls that ended, a second.", "reqps", total("", rate("requests_total", *MODEL)), decimals=1),
        number(
            "Inputs",
            "Inputs that were answered, a second.",
            "reqps",
            total("", rate("inputs_total", *MODEL)),
            decimals=1,
        ),
        number(
            "Failed",
            "Part of the calls that did not end with success.",
            "percentunit",
            failed("", *MODEL),
            colours=PART_FAILED,
            decimals=2,
        ),
        number("Mean time", "From call to reply.", "s", mean("", "request_seconds", *MODEL)),
        number("99 % within", "99 of 100 calls take at most this.", "s", quantile(0.99, "", "request_seconds", *MODEL)),
        number(
            "Apdex",
            f"1: all calls within {SATISFIED_S} s; those within {TOLERATED_S} s count half.",
            "none",
            share(f"({' + '.join(within)}) / 2", total("", rate("request_seconds_count", *MODEL))),
            colours=steps(("red", None), ("orange", 0.7), ("green", 0.9)),
            decimals=3,
            runbook="slow",
        ),
        number("Waiting now", "Rows that wait for a run.", "short", total("", of("queue_rows", *MODEL))),
    )


def calls(made: dashboard.Dashboard) -> None:
    """What it is asked, and how long that takes."""
    section(
        made,
        "Calls",
        lines(
            "Calls by code",
            "Calls that ended, by Clarifai's status code, a second; 10000 is success.",
            "reqps",
            query(total("code", rate("requests_total", *MODEL)), "{{code}}"),
            stacked=True,
        ),
        lines(
            "Calls by method",
            "By which RPC, or by which other protocol, a second.",
            "reqps",
            query(total("method", rate("requests_total", *MODEL)), "{{method}}"),
            stacked=True,
        ),
        lines(
            "Calls by appliance and version",
            "A second. During a switch the old version's line goes down as the new one's comes up.",
            "reqps",
            query(total("instance, version", rate("requests_total", *MODEL)), "{{instance}} {{version}}"),
        ),
        lines(
            "Time of a call",
            "From call to reply: the mean, and what 50, 75, 90 and 99 of 100 calls are within.",
            "s",
            query(mean("", "request_seconds", *MODEL), "mean"),
            *(
                query(
                    quantile(part, "", "request_seconds", *MODEL),
                    f"{part:.0%}".replace("%", " %"),
                    exemplars=part == 0.99,
                )
                for part in (0.5, 0.75, 0.9, 0.99)
            ),
            runbook="slow",
        ),
        buckets(
            "Times of calls",
            "How many calls took how long: two bands are two kinds of calls, a hit of the cache and a run, say.",
            "s",
            "request_seconds",
            *MODEL,
        ),
        bars(
            "Distribution of times",
            "Calls in the time shown, by the bucket that they fell into: at most so many seconds.",
            "short",
            query(total("le", grown("request_seconds_bucket", *MODEL)), "{{le}}", now=True, kind="heatmap"),
        ),
    )


def time(made: dashboard.Dashboard) -> None:
    """Where the time of a call goes."""
    section(
        made,
        "Where the time goes",
        lines(
            "Mean time by part, stacked",
            "Queue: rows wait for a run. Batch wait: they were taken, and the device computes others. Compute: the run "
            "itself. Decode and encode: inputs to tensors, results to the reply. What is missing to the whole call is "
            "credentials, parsing, downloads and the way between processes.",
            "s",
            *(query(mean("", f"{part}_seconds", *MODEL), name) for part, name in PARTS.items()),
            span=12,
            height=9,
            stacked=True,
            runbook="slow",
        ),
        lines(
            "99 % by part, and the whole",
            "Each part by itself: 99 of 100 are within this. The part that grows with the whole is the one to look at.",
            "s",
            *(query(quantile(0.99, "", f"{part}_seconds", *MODEL), name) for part, name in PARTS.items()),
            query(quantile(0.99, "", "request_seconds", *MODEL), "whole call"),
            span=12,
            height=9,
            runbook="slow",
        ),
    )


def batches(made: dashboard.Dashboard) -> None:
    """How well requests share runs."""
    section(
        made,
        "Batches",
        buckets(
            "Rows in a run",
            "How many runs had at most so many rows. Under load the band should be high: many requests share a run.",
            "short",
            "batch_rows",
            *MODEL,
        ),
        lines(
            "Mean rows",
            "In one run of the model, and brought by one request.",
            "short",
            query(mean("", "batch_rows", *MODEL), "a run"),
            query(mean("", "request_rows", *MODEL), "a request"),
        ),
        lines(
            "Runs and rows",
            "Runs of the model, and rows that they had, a second.",
            "short",
            query(total("", rate("batch_rows_count", *MODEL)), "runs"),
            query(total("", rate("batch_rows_sum", *MODEL)), "rows"),
        ),
        lines(
            "Rows waiting",
            "In the queue, by appliance; engine.queue_rows bounds it.",
            "short",
            query(total("instance", of("queue_rows", *MODEL)), "{{instance}}"),
            runbook="rejects",
        ),
        lines(
            "Device in use",
            "Seconds of runs in a second: at 1 one run after the other fills the device.",
            "short",
            query(total("instance", rate("compute_seconds_sum", *MODEL)), "{{instance}}"),
        ),
        lines(
            "Answers from the cache",
            "Inputs with use_predict_cache, a second.",
            "reqps",
            query(total("", rate("cache_hits_total", *MODEL)), "answered from it"),
            query(total("", rate("cache_misses_total", *MODEL)), "had to be run"),
            stacked=True,
        ),
    )


def life(made: dashboard.Dashboard) -> None:
    """Versions: which are where, and what became of them."""
    names = dict(enumerate(STATES.items(), start=1))
    parts = [f"{value} * " + of("model_state", *MODEL, f'state="{state}"') for value, (state, _) in names.items()]
    by = "instance, model, version"
    section(
        made,
        "Versions",
        states(
            "States",
            "Of each version on each appliance.",
            query(f"max by (instance, model, version) ({' or '.join(parts)})", "{{instance}} {{model}} {{version}}"),
            names,
            span=12,
            runbook="model-not-ready",
        ),
        table(
            "Versions that are loaded",
            "The same version should have the same sha256 everywhere; the fleet's sheet counts those that differ.",
            [
                Column(total(f"{by}, task, providers, sha256", of("model_info", *MODEL))),
                Column(total(by, of("model_load_seconds", *MODEL)), "loaded in", "s"),
                Column(total(by, of("gpu_model_memory_bytes", *MODEL)), "GPU memory", "bytes"),
                Column(
                    total(by, of("model_loads_total", *MODEL, FAILED)),
                    "failed loads",
                    colours=GOOD_AT_NOUGHT,
                    decimals=0,
                ),
            ],
            labels=["model", "version", "instance", "task", "providers", "sha256"],
            span=12,
            runbook="model-not-ready",
        ),
    )
