"""Write the bundles of all models that are measured into bench/out/ (600 MB); the others do so when they need one."""

import argparse

from bench.workload import WORKLOADS


def main(arguments: list[str]) -> None:
    """Write, and say where."""
    argparse.ArgumentParser(prog="python -m bench models", description=__doc__).parse_args(arguments)
    for make in WORKLOADS.values():
        workload = make()
        print(f"{workload.bundle.name:<10} {workload.title}")
