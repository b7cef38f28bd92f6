"""The ceiling: ONNX Runtime alone, on the CPUs that the server would have."""

from statistics import median

from bench import charts, ort
from bench.common import Run, number, of_workloads, parser, table
from bench.workload import WORKLOADS


def main(arguments: list[str]) -> None:
    """Measure, print, write."""
    made = of_workloads(parser("raw", __doc__, seconds=1.0), tuple(WORKLOADS))
    run = Run(made.parse_args(arguments))
    run.expect(run.repeat * sum(15 if WORKLOADS[name]().heavy else 3 for name in run.options.models))
    found: dict[str, list[dict[str, object]]] = {}
    for _ in range(run.repeat):
        for name in run.options.models:
            figures = ort.measure(WORKLOADS[name](), run.cpus.server, run.seconds / 2)
            figures.pop("answers")
            found.setdefault(name, []).append(figures)
            run.say(name)
    rows, drawn = [], {}
    for name, repetitions in found.items():
        workload = WORKLOADS[name]()
        for batch in workload.batches:
            cells = [name, str(batch)]
            for graph in ("plain", "wrapped"):
                speeds = [figures[graph][str(batch)] for figures in repetitions]  # type: ignore[index]
                cells.append(number(median(speed["items_per_s"] for speed in speeds)))
                cells.append(number(median(speed["cpu_us"] for speed in speeds)))
            rows.append([*cells, str(speeds[0]["sessions"])])
        best = max(median(f["plain"][str(b)]["items_per_s"] for f in repetitions) for b in workload.batches)  # type: ignore[index]
        drawn[name] = [
            (b, median(f["plain"][str(b)]["items_per_s"] for f in repetitions) / best)  # type: ignore[index]
            for b in workload.batches
        ]
    decode = [
        [name, number(median(f["decode"]["items_per_s"] for f in repetitions))]  # type: ignore[index]
        for name, repetitions in found.items()
    ]
    head = ["model", "batch", "plain items/s", "CPU µs/item", "wrapped items/s", "CPU µs/item", "sessions"]
    lines = run.head("ONNX Runtime alone", "Plain: the bundle's graph on floats. Wrapped: as the appliance serves it.")
    lines += ["", table(head, rows), "", "Decoding alone:", "", table(["model", "inputs/s"], decode)]
    chart = charts.lines("Raw items/s by batch, to the best batch", "batch", "of the best", drawn, log_x=True)
    run.write("\n".join(lines), {"raw": found}, {"batches": chart})
