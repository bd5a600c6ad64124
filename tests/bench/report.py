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
    latency: Latency | None = None
    skipped: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def promises(self) -> list[Promise]:
        """Those of the figures that were measured."""
        found: list[Promise] = []
        for line in self.lines:
            where = f"{line.reader}, {line.backlog}"
            if line.reader.startswith("figbridge"):
                if line.ratio is not None:
                    found.append(Promise(f"rate / pg_recvlogical, {where}", line.ratio, 0.6, at_least=True))
                if line.cpu is not None:
                    found.append(Promise(f"CPU µs a change, {where}", line.cpu, 9))
                found.append(Promise(f"peak RSS MB, {where}", line.peak, 150))
                if line.thirds:
                    grown = line.thirds[-1] / line.thirds[0]
                    found.append(Promise(f"memory in the last third / in the first, {where}", grown, _FLAT))
        if self.latency:
            found.append(Promise("commit to durable, p50 ms", self.latency.p50, 10))
            found.append(Promise("commit to durable, p99 ms", self.latency.p99, 50))
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
        if it := self.latency:
            text += f"commit to durable at {it.commits:,.0f} commits/s, {it.rows:,} rows: "
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


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown, aligned, so that it is read as it is and pasted as it is. Words to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    words = 2
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
