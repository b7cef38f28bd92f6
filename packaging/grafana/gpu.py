"""GPUs, in the shape that people know from DCGM's dashboard (12239): temperature, power, clocks, load, memory."""

from grafana_foundation_sdk.builders import dashboard
from panels import (
    FILLING,
    GOOD_AT_NOUGHT,
    bars,
    chosen,
    grown,
    lines,
    number,
    of,
    query,
    rate,
    section,
    share,
    sheet,
    steps,
    total,
)

GPU = ('device=~"$device"',)
NAME = "{{instance}} {{device}}"


def build() -> dashboard.Dashboard:
    """The dashboard."""
    made = sheet(
        "gpu",
        "GPU",
        "What the sensors of the GPUs say, and which models have their memory. uuid joins them with DCGM's exporter.",
        chosen("device", "gpu_memory_total_bytes", 'instance=~"$instance"', label="GPU").all_value(".+"),
    )
    used, whole = of("gpu_memory_used_bytes", *GPU), of("gpu_memory_total_bytes", *GPU)
    section(
        made,
        "Sensors",
        lines(
            "Temperature",
            "Above some 85 °C most GPUs lower their clock.",
            "celsius",
            query(of("gpu_temperature_celsius", *GPU), NAME),
            span=18,
            runbook="gpu-fault",
        ),
        number(
            "Mean temperature",
            "Of all that are chosen.",
            "celsius",
            f"avg({of('gpu_temperature_celsius', *GPU)})",
            colours=steps(("green", None), ("orange", 75), ("red", 85)),
            span=6,
            height=8,
            runbook="gpu-fault",
        ),
        lines("Power", "What each draws.", "watt", query(of("gpu_power_watts", *GPU), NAME), span=18),
        number(
            "Total power",
            "Of all that are chosen.",
            "watt",
            total("", of("gpu_power_watts", *GPU)),
            span=6,
            height=8,
        ),
        lines(
            "SM clock",
            "Of the processors. Falls without load; under load a fall means heat, or a power limit.",
            "hertz",
            query(of("gpu_sm_clock_hertz", *GPU), NAME),
            span=12,
            runbook="gpu-fault",
        ),
        lines(
            "Utilisation",
            "Part of the time in which something ran on it.",
            "percentunit",
            query(of("gpu_utilization_ratio", *GPU), NAME),
            span=12,
        ),
    )
    section(
        made,
        "Memory",
        lines(
            "Memory in use",
            "By anybody on the machine. Above 92 % an alert comes.",
            "percentunit",
            query(share(used, whole), NAME),
            span=9,
            runbook="gpu-memory",
        ),
        lines("Memory in use, bytes", "By anybody on the machine.", "bytes", query(used, NAME), span=9),
        number(
            "Fullest",
            "The GPU with the least room.",
            "percentunit",
            f"max({share(used, whole)})",
            colours=FILLING,
            span=6,
            height=8,
            runbook="gpu-memory",
        ),
        lines(
            "Memory by model",
            "What a version takes, as measured at its last undisturbed load.",
            "bytes",
            query(total("model, version", of("gpu_model_memory_bytes")), "{{model}} {{version}}"),
            span=12,
            stacked=True,
            runbook="gpu-memory",
            leads=["model"],
        ),
        lines(
            "Runs by model",
            "Who computes most: seconds of runs in a second, on whichever device the model runs.",
            "short",
            query(total("model", rate("compute_seconds_sum")), "{{model}}"),
            span=12,
            stacked=True,
            leads=["model"],
        ),
    )
    section(
        made,
        "Faults",
        bars(
            "Engines replaced, by reason",
            "In the time shown. device: its GPU was lost to it; canary: a small run failed or took far too long.",
            "short",
            query(
                total("instance, process, reason", grown("worker_restarts_total", 'process=~"engine.*"')),
                "{{instance}} {{process}}: {{reason}}",
                now=True,
            ),
            colours=GOOD_AT_NOUGHT,
            span=24,
            runbook="gpu-fault",
        ),
    )
    return made
