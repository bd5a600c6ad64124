"""The forward path's figures: rate against peers, memory, latency; each on a backlog of its own, all on one server."""

import math
import re
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import peers, proc
from bench.backlog import CALM, INSERT_ONE, Backlog, Legacy
from bench.ours import Bridge, Load
from bench.report import Latency, Line, Report, say
from fixtures.clock import until

PEER = "pg_recvlogical → /dev/null"
OURS = "figbridge → file"


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured; the defaults keep the whole within five minutes on two cores."""

    rows: int
    runs: int
    large_rows: int
    admit: int
    slow_seconds: float
    latency_seconds: int
    commits: int = 1000


def rate(legacy: Legacy, size: Size, report: Report, debezium_python: str | None) -> None:
    """The backlog in 10-row transactions, then the same rows in one; peers and figbridge in turn.

    In turn, so that a slow minute of the machine hits all of them. The Debezium engine reads the first backlog, once.
    """
    if missing := peers.debezium_missing(debezium_python):
        report.skipped.append(f"the Debezium engine: {missing}")
        debezium_python = None
    for per_transaction in (10, size.rows):
        engine = debezium_python if per_transaction == 10 else None
        slots = [f"{who}_{run}" for run in range(size.runs) for who in ("peer", "ours")]
        backlog = legacy.fill([*slots, "debezium"] if engine else slots, size.rows, per_transaction)
        peer, ours = [], []
        for run in range(size.runs):
            say(f"{backlog}: run {run + 1} of {size.runs}")
            peer.append(peers.pg_recvlogical(legacy, f"peer_{run}", backlog))
            ours.append(_whole(legacy, f"ours_{run}", backlog)[0])
        best = statistics.median(it.seconds for it in peer)
        report.lines.append(Line.of(str(backlog), PEER, size.rows, peer, best=best))
        report.lines.append(Line.of(str(backlog), OURS, size.rows, ours, best=best))
        if engine:
            say(f"{backlog}: Debezium engine")
            done = peers.debezium(engine, legacy, "debezium", backlog)
            report.lines.append(Line.of(str(backlog), "Debezium engine → nothing", size.rows, [done], best=best))


def _whole(legacy: Legacy, slot: str, backlog: Backlog) -> tuple[proc.Finished, list[int]]:
    """All of `backlog` through figbridge, and its memory over time."""
    with Bridge(legacy.dsn, slot, Load()) as bridge:
        run, resident = bridge.read(backlog.rows)
    if run.rows != backlog.rows:
        raise RuntimeError(f"{run.rows} rows are in the file, {backlog.rows} in the table")
    return run.finished(), resident


def slow(legacy: Legacy, size: Size, report: Report) -> None:
    """A sink that takes less than the source gives: whatever is not bounded grows now."""
    backlog = legacy.fill(["slow"], size.rows, 10)
    say(f"{backlog}: a sink that admits {size.admit:,} rows/s, for {size.slow_seconds:g} s")
    with Bridge(legacy.dsn, "slow", Load(admit=size.admit, seconds=size.slow_seconds)) as bridge:
        run, resident = bridge.read(backlog.rows)
    if not run.filled:
        report.skipped.append(
            "the slow sink: it was not slower, the buffer was never full; more --rows or less --admit"
        )
        return
    runs = [run.finished()]
    report.lines.append(Line.of(str(backlog), "figbridge → slow file", run.rows, runs, resident=resident, paced=True))


def large(legacy: Legacy, size: Size, report: Report) -> None:
    """One transaction that is much larger than any buffer."""
    backlog = legacy.fill(["large"], size.large_rows, size.large_rows)
    say(f"{backlog}: memory")
    done, resident = _whole(legacy, "large", backlog)
    report.lines.append(Line.of(str(backlog), OURS, backlog.rows, [done], resident=resident))


def latency(legacy: Legacy, size: Size, report: Report) -> None:
    """Commit to durable: pgbench commits rows at a fixed rate, one a transaction, from a process of its own."""
    say(f"latency at {size.commits:,} commits/s, for {size.latency_seconds} s")
    legacy.begin(["latency"])
    legacy.settle(CALM)
    with Bridge(legacy.dsn, "latency", Load(timed=True)) as bridge:
        report.latency = pgbench(legacy, "latency", bridge, size)


def pgbench(legacy: Legacy, slot: str, bridge: Bridge, size: Size) -> Latency:
    """Commit rows and read them from `slot`."""
    with tempfile.TemporaryDirectory(prefix="figbridge-bench-") as directory:
        script = Path(directory) / "insert.sql"
        script.write_text(INSERT_ONE)
        command = [
            legacy.program("pgbench"), "-n", "-M", "prepared", "-f", str(script), "-R", str(size.commits),
            "-c", "4", "-T", str(size.latency_seconds), legacy.dsn,
        ]  # fmt: skip
        until(lambda: legacy.streaming(slot), 60, "the bridge reads its slot")
        written = proc.run(command, deadline=size.latency_seconds + 60)
        committed = int(_figure(written.output, r"actually processed: (\d+)"))
        run, _ = bridge.read(committed)
    if len(run.latencies) != committed:
        raise RuntimeError(f"{len(run.latencies)} latencies of {committed} commits")
    milliseconds = sorted(1000 * seconds for seconds in run.latencies)
    tps = float(_figure(written.output, r"^tps = ([\d.]+)"))
    p50, p99 = percentile(milliseconds, 50), percentile(milliseconds, 99)
    return Latency(tps, committed, p50, p99, milliseconds[-1])


def _figure(output: str, pattern: str) -> str:
    match = re.search(pattern, output, re.MULTILINE)
    if match is None:
        raise RuntimeError(f"pgbench said: {output}")
    return match[1]


def percentile(values: Sequence[float], percent: float) -> float:
    """Of sorted `values`, by nearest rank: one that occurred, at or below which `percent` of all lie."""
    return values[max(0, math.ceil(len(values) * percent / 100) - 1)]
