"""figbridge in a process of its own, measured from within: the loops of `figbridge run`, with a sink that we hold.

Within and not from outside, for two reasons: the sink must be held back and its returns be timed, which a running
bridge offers no handle for; and a running bridge acknowledges every 0.2 s, too coarse a clock for a backlog that lasts
seconds. So the loops come from the composition root itself, with every default, and only the sink is ours: a FileSink
that looks at the clock when it returns. The configuration file, the preflight and the HTTP server are left out.

The clock starts when the loops do: connecting and START_REPLICATION count, starting Python does not. It stops when the
call returned that made the last row durable. Memory is read from /proc, so Linux only.

`wire` is the only place that knows how the forward path is put together.
"""

import contextlib
import multiprocessing
import operator
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Self
from unittest import mock

from bench.backlog import PUBLICATION
from bench.proc import Finished, cpu_seconds, memory
from figbridge import log
from figbridge.config import Config
from figbridge.event import Event, Lines, Rejection
from figbridge.forward import setup
from figbridge.metrics import Metrics
from figbridge.supervise import Loop, Supervisor, tune
from figbridge.transports.file import FileSink

_DETAIL_TYPE = operator.attrgetter("detail_type")
_LOOK = 0.05  # seconds between two looks at whether the loops live and the buffer is full
_SAMPLE = 0.1  # seconds between two looks at its memory


@dataclass(frozen=True, slots=True)
class Load:
    """What one run does beside reading.

    admit    at most so many events a second get into the file (None: as many as it takes)
    seconds  end this long after the first rows, wherever it is then (None: when all rows are durable)
    timed    note commit-to-durable of every row
    row      the detail-type of the rows that count: a heartbeat or a schema event is none
    snapshot  read the table's rows, too, beside the stream
    """

    admit: int | None = None
    seconds: float | None = None
    timed: bool = False
    row: str = "orders.inserted"
    snapshot: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """What one run measured.

    `seconds` and `cpu` (seconds, user and system) are from the start of the loops to the last durable row; of a run
    with `Load.seconds` from the first durable rows on, which are then not among `rows`. `peak` is in bytes; `first`
    and `last` are the monotonic clock, which all processes share, at the first and at the last durable rows.
    `filled` says whether the buffer was ever seen full. `latencies`, in seconds, are those of every row of a timed run.
    """

    seconds: float
    cpu: float
    rows: int
    peak: int
    first: float
    last: float
    filled: bool
    latencies: Sequence[float]

    def finished(self) -> Finished:
        """As a program's."""
        return Finished(self.seconds, self.cpu, self.peak, "")


@dataclass(frozen=True, slots=True)
class Mark:
    """Rows that were durable at a moment; the monotonic clock and the CPU time of the process, seconds."""

    rows: int
    clock: float
    cpu: float


class MeasuredSink(FileSink):
    """A file sink that can be slower than its disk and knows when its calls returned."""

    def __init__(self, path: Path, load: Load) -> None:
        super().__init__(path)
        self._load = load
        self._due = 0.0
        self._returns: list[tuple[float, Sequence[Event]]] = []
        self._target: int | None = None
        self.first: Mark | None = None
        self.last = Mark(0, 0.0, 0.0)
        self.reached = threading.Event()
        self.free = threading.Event()  # set: nothing is held back any more

    def aim(self, rows: int) -> None:
        """Set `reached` when so many rows are durable. Of the process's main thread."""
        self._target = rows
        if self.last.rows >= rows:
            self.reached.set()

    def publish(self, events: Sequence[Event]) -> Sequence[Rejection]:
        if self._load.admit:  # against a schedule: the time that the disk takes is no extra wait
            self._due = (self._due or time.monotonic()) + len(events) / self._load.admit
            self.free.wait(self._due - time.monotonic())
        rejections = super().publish(events)
        read = isinstance(events, Lines)  # rows of a snapshot, all of one table, and not made into events for us
        if self._load.timed and not read:
            self._returns.append((time.time(), events))
        rows = self.last.rows  # it counts as ours
        if read:
            rows += len(events) * (self._load.row == "orders.read")
        else:
            rows += operator.countOf(map(_DETAIL_TYPE, events), self._load.row)
        self.last = Mark(rows, time.monotonic(), cpu_seconds())
        if rows and self.first is None:
            self.first = self.last
        if self._target is not None and rows >= self._target:
            self.reached.set()
        return rejections

    def latencies(self) -> list[float]:
        """Seconds from each row's commit, by the server's clock, to the return of the call that made it durable."""
        return [
            returned - event.time.timestamp()
            for returned, events in self._returns
            for event in events
            if event.detail_type == self._load.row
        ]


def wire(
    dsn: str,
    slot: str,
    sink: FileSink,
    load: Load,
    *,
    metrics: Metrics,
    supervisor: Supervisor,
    stack: contextlib.ExitStack,
) -> tuple[Sequence[Loop], int]:
    """The loops of a bridge's forward path, and how many bytes its buffer holds."""
    document = {
        "legacy": {"dsn": dsn, "slot": slot, "publication": PUBLICATION, "tables": ["public.orders"]},
        "forward": {"sink": {"type": "file", "path": "ours"}, "snapshot": "initial" if load.snapshot else "never"},
    }
    config = Config.model_validate(document)
    assert config.forward
    with mock.patch.object(setup, "open_sink", return_value=sink):
        loops = setup.open_loops(
            config,
            config.forward,
            server=setup.Server("bench", 180000, "utf-8"),
            metrics=metrics,
            halt=supervisor.halt,
            stack=stack,
        )
    return loops, config.forward.buffer_bytes


def measure(dsn: str, slot: str, load: Load, channel: Connection) -> None:
    """The process: read `slot` until as many rows are durable as `channel` says, and answer with a `Run`."""
    log.configure(level="WARNING")
    tune(answers=False)
    supervisor, metrics, failures = Supervisor(grace=60), Metrics(), list[BaseException]()
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="figbridge-bench-"))
        path = Path(directory) / "events"
        sink = MeasuredSink(path, load)
        loops, room = wire(dsn, slot, sink, load, metrics=metrics, supervisor=supervisor, stack=stack)

        def run() -> None:
            try:
                supervisor.run(loops)
            except BaseException as error:  # noqa: BLE001 (the main thread raises it)
                failures.append(error)

        def full() -> bool:
            return (metrics.registry.get_sample_value("figbridge_forward_buffered_bytes") or 0) >= room

        thread = threading.Thread(target=run)
        start = Mark(0, time.monotonic(), cpu_seconds())
        thread.start()
        filled = False
        try:
            while thread.is_alive() and not sink.reached.wait(_LOOK) and not _over(sink, load):
                filled = filled or full()
                if channel.poll():
                    sink.aim(channel.recv())
            last, peak = sink.last, memory(os.getpid()).peak
        finally:  # nothing of what comes now counts
            supervisor.halt.set()
            supervisor.stop.set()
            sink.free.set()
            thread.join(60)
        if failures:
            raise failures[0]
        first = sink.first or last
        if load.seconds is None:
            rows = _rows(path, load)
        else:
            start, rows = first, last.rows - first.rows
        latencies = sink.latencies()
        seconds, cpu = last.clock - start.clock, last.cpu - start.cpu
        channel.send(Run(seconds, cpu, rows, peak, first.clock, last.clock, filled, latencies))


def _over(sink: MeasuredSink, load: Load) -> bool:
    return bool(load.seconds and sink.first and time.monotonic() - sink.first.clock > load.seconds)


def _rows(path: Path, load: Load) -> int:
    """The rows that are in the file: what was not written was not fast."""
    with path.open("rb") as file:
        wanted = b'"detail-type":"%b"' % load.row.encode()
        return sum(wanted in line for line in file)


class Bridge:
    """A `measure` process, seen from the process that measures. A context manager: starts it, and ends it."""

    def __init__(self, dsn: str, slot: str, load: Load) -> None:
        spawn = multiprocessing.get_context("spawn")  # a fresh Python, whose memory is its own
        self._channel, self._theirs = spawn.Pipe()
        self._process = spawn.Process(target=measure, args=(dsn, slot, load, self._theirs), name=f"bench-{slot}")

    def __enter__(self) -> Self:
        self._process.start()
        self._theirs.close()  # or the end of the process would not be the end of the pipe
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        self._channel.close()
        if failed:
            self._process.terminate()
        self._process.join(90)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def read(self, rows: int) -> tuple[Run, list[int]]:
        """The run, and its resident memory ten times a second between its first and last rows, in bytes.

        Raises RuntimeError when the process failed, which has printed why, or when other rows than these arrived.
        """
        self._channel.send(rows)
        samples: list[tuple[float, int]] = []
        pid = self._process.pid
        assert pid
        try:
            while not self._channel.poll(_SAMPLE):
                with contextlib.suppress(ProcessLookupError):  # it failed; the pipe ends
                    samples.append((time.monotonic(), memory(pid).resident))
            run: Run = self._channel.recv()
        except EOFError:
            raise RuntimeError(f"the process {self._process.name} failed") from None
        return run, [size for when, size in samples if run.first <= when <= run.last]
