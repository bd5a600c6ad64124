"""What was measured: one table for people, one JSON document for scripts, and both beside the promises.

A promise that is missed is printed as such and is no failure: on a machine that others use too, only ratios of one run
mean anything, and they too have bad minutes.
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from bench.proc import Finished

_MB = 1_000_000
# What flat memory may seem to grow by: in the first third the buffer still fills, and freed memory is reused in pieces.
_FLAT = 1.2


SNAPSHOT = "figbridge, a snapshot → file"


def say(what: str) -> None:
    """Progress, on standard error: standard output is the table."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class Line:
    """One reader of one backlog: medians of its runs. `seconds` has every run.

    `ratio` is the rate over that of pg_recvlogical on the same backlog; `cpu` in µs a change; memory in MB (10⁶ bytes),
    the largest of the runs; `thirds` the largest resident memory in the first, second and last third of the time.
    """

    backlog: str
    reader: str
    rate: float
    ratio: float | None
    cpu: float | None
    peak: float
    seconds: Sequence[float]
    thirds: Sequence[float]

    @classmethod
    def of(
        cls,
        backlog: str,
        reader: str,
        rows: int,
        runs: Sequence[Finished],
        *,
        best: float | None = None,
        resident: Sequence[int] = (),
        paced: bool = False,
    ) -> Self:
        """`best` is the median time of pg_recvlogical; `resident` the samples of memory, oldest first, bytes.

        `paced`: the sink was held back, so much was read that was not written, and CPU a row says nothing.
        """
        seconds = statistics.median(run.seconds for run in runs)
        third = len(resident) // 3
        parts = (resident[:third], resident[third:-third], resident[-third:]) if third else ()
        return cls(
            backlog,
            reader,
            rate=rows / seconds,
            ratio=best / seconds if best else None,
            cpu=None if paced else 1e6 * statistics.median(run.cpu for run in runs) / rows,
            peak=max([*(run.peak for run in runs), *resident])
            / _MB,  # the kernel's own peak is exact to some pages only
            seconds=[run.seconds for run in runs],
            thirds=[max(part) / _MB for part in parts],
        )


@dataclass(frozen=True, slots=True)
class Applied:
    """One writer of the reverse path. `rate` in events/s, `ratio` over the apply worker's, `cpu` in µs an event, MB."""

    writer: str
    rate: float
    ratio: float | None
    cpu: float | None
    peak: float | None
    seconds: Sequence[float] = ()

    @classmethod
    def of(cls, writer: str, rows: int, runs: Sequence[Finished], best: float) -> Self:
        """Medians; `best` is the apply worker's rate."""
        rate = rows / statistics.median(run.seconds for run in runs)
        cpu = 1e6 * statistics.median(run.cpu for run in runs) / rows
        peak = max(run.peak for run in runs) / _MB
        return cls(writer, rate, rate / best, cpu, peak, [run.seconds for run in runs])


@dataclass(frozen=True, slots=True)
class SinkLine:
    """Events into one sink, medians of the runs: `rate` a second, `cpu` in µs of the publishing process an event.

    `least` and `most` are what is promised of the rate and the CPU, None where nothing is.
    """

    sink: str
    way: str
    rate: float
    cpu: float
    peak: float
    least: float | None
    most: float | None

    @classmethod
    def of(
        cls, sink: str, way: str, count: int, runs: Sequence[Finished], promised: tuple[float | None, float | None]
    ) -> Self:
        """`count` events in each of `runs`; `promised` are the least rate and the most CPU."""
        least, most = promised
        return cls(
            sink,
            way,
            rate=count / statistics.median(run.seconds for run in runs),
            cpu=1e6 * statistics.median(run.cpu for run in runs) / count,
            peak=max(run.peak for run in runs) / _MB,
            least=least,
            most=most,
        )


@dataclass(frozen=True, slots=True)
class CostLine:
    """CPU µs of one thing, such as the validation of an event; `most` is what is promised, None where nothing is."""

    what: str
    way: str
    cpu: float
    most: float | None


@dataclass(frozen=True, slots=True)
class Latency:
    """Commit to durable at `commits` transactions a second, of `rows` rows; milliseconds."""

    commits: float
    rows: int
    p50: float
    p99: float
    worst: float


@dataclass(frozen=True, slots=True)
class Promise:
    """What was promised of one figure, and whether this run kept it."""

    what: str
    measured: float
    limit: float
    at_least: bool = False

    @property
    def kept(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def __str__(self) -> str:
        bound = "≥" if self.at_least else "≤"
        return f"{'kept  ' if self.kept else 'MISSED'}  {self.what}: {self.measured:.3g} ({bound} {self.limit:g})"


@dataclass(slots=True)
class Report:
    """Filled by the stages, then printed and written."""

    server: str
    runs: int
    lines: list[Line] = field(default_factory=list)
    sinks: list[SinkLine] = field(default_factory=list)
    costs: list[CostLine] = field(default_factory=list)
    latency: Latency | None = None
    beside: Latency | None = None  # a snapshot
    applied: list[Applied] = field(default_factory=list)
    reverse_latency: Latency | None = None  # publish to committed
    skipped: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def promises(self) -> list[Promise]:
        """Those of the figures that were measured."""
        found = [promise for line in self.lines for promise in _line_promises(line)]
        for it in self.sinks:
            if it.least:
                found.append(Promise(f"events/s into {it.sink}, {it.way}", it.rate, it.least, at_least=True))
            if it.most:
                found.append(Promise(f"CPU µs an event into {it.sink}, {it.way}", it.cpu, it.most))
        found += [Promise(f"CPU µs a {it.what}, {it.way}", it.cpu, it.most) for it in self.costs if it.most is not None]
        if self.latency:
            found.append(Promise("commit to durable, p50 ms", self.latency.p50, 10))
            found.append(Promise("commit to durable, p99 ms", self.latency.p99, 50))
        return found + self._reverse_promises()

    def _reverse_promises(self) -> list[Promise]:
        found: list[Promise] = []
        for it in self.applied:
            if it.ratio is not None:
                ten = "10 events" in it.writer
                found.append(Promise(f"events/s, {it.writer}", it.rate, 6_000 if ten else 25_000, at_least=True))
                if not ten:
                    found.append(Promise(f"rate / apply worker, {it.writer}", it.ratio, 0.25, at_least=True))
        if self.reverse_latency:
            found.append(Promise("published to applied, p99 ms", self.reverse_latency.p99, 50))
        if self.latency and self.beside:
            found.append(Promise("p99 beside a snapshot / without", self.beside.p99 / self.latency.p99, 3))
        return found

    def __str__(self) -> str:
        rows = [("backlog", "reader", "rows/s", "ratio", "CPU µs/change", "peak RSS MB", "RSS by thirds")]
        rows += [
            (
                line.backlog,
                line.reader,
                f"{line.rate:,.0f}",
                "" if line.ratio is None else f"{line.ratio:.2f}",
                "" if line.cpu is None else f"{line.cpu:.1f}",
                f"{line.peak:.0f}",
                " ".join(f"{part:.0f}" for part in line.thirds),
            )
            for line in self.lines
        ]
        text = f"PostgreSQL {self.server}, Python {platform.python_version()}, {os.cpu_count()} cores, "
        text += f"median of {self.runs}, {self.seconds:.0f} s in all\n\n"
        if self.lines:
            text += _table(rows) + "\n"
        if self.sinks:
            table = [("sink", "publisher", "entries/s", "CPU µs/entry", "peak RSS MB")]
            table += [(it.sink, it.way, f"{it.rate:,.0f}", f"{it.cpu:.1f}", f"{it.peak:.0f}") for it in self.sinks]
            text += _table(table) + "\n"
        if self.costs:
            costs = [("what", "way", "CPU µs"), *((it.what, it.way, f"{it.cpu:.2f}") for it in self.costs)]
            text += _table(costs) + "\n"
        if it := self.latency:
            text += f"commit to durable at {it.commits:,.0f} commits/s, {it.rows:,} rows: "
            text += f"p50 {it.p50:.1f} ms, p99 {it.p99:.1f} ms, worst {it.worst:.1f} ms\n\n"
        if self.applied:
            written = [("writer", "events/s", "ratio", "CPU µs/event", "peak RSS MB")]
            written += [
                (
                    it.writer,
                    f"{it.rate:,.0f}",
                    "" if it.ratio is None else f"{it.ratio:.2f}",
                    "" if it.cpu is None else f"{it.cpu:.1f}",
                    "" if it.peak is None else f"{it.peak:.0f}",
                )
                for it in self.applied
            ]
            text += _table(written, words=1) + "\n"
        if it := self.reverse_latency:
            text += f"published to applied at {it.commits:,.0f} events/s, {it.rows:,} events: "
            text += f"p50 {it.p50:.1f} ms, p99 {it.p99:.1f} ms, worst {it.worst:.1f} ms\n\n"
        if it := self.beside:
            text += f"the same beside a snapshot, at {it.commits:,.0f} commits/s, {it.rows:,} rows: "
            text += f"p50 {it.p50:.1f} ms, p99 {it.p99:.1f} ms, worst {it.worst:.1f} ms\n\n"
        text += "".join(f"{promise}\n" for promise in self.promises())
        return text + "".join(f"left out: {why}\n" for why in self.skipped)

    def write(self, path: Path) -> None:
        """The same as JSON."""
        document = asdict(self) | {
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "promises": [asdict(promise) | {"kept": promise.kept} for promise in self.promises()],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def _line_promises(line: Line) -> list[Promise]:
    where = f"{line.reader}, {line.backlog}"
    found: list[Promise] = []
    if line.reader == SNAPSHOT:
        if line.ratio is not None:
            found.append(Promise(f"rate / psycopg, {where}", line.ratio, 0.5, at_least=True))
        found.append(Promise(f"peak RSS MB, {where}", line.peak, 200))
    elif line.reader.startswith("figbridge"):
        if line.ratio is not None:
            found.append(Promise(f"rate / pg_recvlogical, {where}", line.ratio, 0.6, at_least=True))
        if line.cpu is not None:
            found.append(Promise(f"CPU µs a change, {where}", line.cpu, 9))
        found.append(Promise(f"peak RSS MB, {where}", line.peak, 150))
        if line.thirds:
            grown = line.thirds[-1] / line.thirds[0]
            found.append(Promise(f"memory in the last third / in the first, {where}", grown, _FLAT))
    return found


def _table(rows: Sequence[Sequence[str]], words: int = 2) -> str:
    """Markdown, aligned, so that it is read as it is and pasted as it is. Words to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| "
        + " | ".join(
            cell.ljust(width) if column < words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in rows
    ]
    rule = ["-" * width if column < words else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return "\n".join([lines[0], "| " + " | ".join(rule) + " |", *lines[1:]]) + "\n"
