"""figbridge in a process of its own, measured from within: the forward path, wired to a file sink.

In this process and not as ``figbridge run``, for two reasons. The sink must be held back and its returns be timed,
which a running bridge offers no handle for; and a running bridge acknowledges every 0.2 s, too coarse a clock for a
backlog that lasts seconds. What `figbridge run` imports is imported here as well, so memory is that of a bridge.

The clock starts when the loops do: connecting and START_REPLICATION count, starting Python does not, as for
pg_recvlogical. It stops when every event is on disk. Memory is read from /proc, so Linux only.

`wire` is the only place that knows how the forward path is put together.
"""

import contextlib
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Self

from bench.backlog import PUBLICATION
from bench.proc import Finished, cpu_seconds, memory
from figbridge import (
    log,
    service,  # noqa: F401 (all that a bridge loads: its memory counts)
)
from figbridge.change import Lsn
from figbridge.config import ForwardSection
from figbridge.event import Event, Rejection
from figbridge.forward.checkpoint import Checkpoint
from figbridge.forward.echo import EchoFilter
from figbridge.forward.pipeline import Buffer, Capture, Publish
from figbridge.forward.publish import Publisher
from figbridge.forward.shape import Naming, Shaper
from figbridge.forward.source import ReplicationSource
from figbridge.metrics import Metrics
from figbridge.supervise import Loop, Supervisor
from figbridge.transports.file import FileSink

BUFFER_BYTES: int = ForwardSection.model_fields["buffer_bytes"].default
_INSERTED = "orders.inserted"  # the detail type of a row; heartbeats and schema events are no rows
_IS_ROW = b'"detail-type":"orders.inserted"'
_TICK = 0.01  # seconds between two looks at how far we are
_SAMPLE = 0.1  # seconds between two looks at its memory


@dataclass(frozen=True, slots=True)
class Load:
    """What one run does beside reading.

    admit    at most so many events a second get into the file (None: as many as it takes)
    seconds  end this long after the first event, wherever it is then (None: when all is durable)
    timed    note commit-to-durable of every row
    """

    admit: int | None = None
    seconds: float | None = None
    timed: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """What one run measured.

    `seconds` and `cpu` (seconds, user and system) are from the start of the loops to the last durable event; of a run
    with `Load.seconds` from the first durable event on. `rows` were durable by then; `peak` is in bytes; `first` and
    `last` are the monotonic clock, which all processes share, at the first durable event and at the end. `filled`
    says whether the buffer was ever full. `latencies`, in seconds, are those of every row of a timed run.
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


class MeasuredSink(FileSink):
    """A file sink that can be slower than its disk, and knows when its calls returned. Nothing is done per event."""

    def __init__(self, path: Path, load: Load) -> None:
        super().__init__(path)
        self.load = load
        self.first: float | None = None
        self.events = 0
        self.open = threading.Event()
        self._due = 0.0
        self._returns: list[tuple[float, Sequence[Event]]] = []

    def publish(self, events: Sequence[Event]) -> Sequence[Rejection]:
        if self.load.admit:  # against a schedule: the time that the disk takes is no extra wait
            self._due = max(self._due, time.monotonic()) + len(events) / self.load.admit
            self.open.wait(self._due - time.monotonic())
        rejections = super().publish(events)
        if self.load.timed:
            self._returns.append((time.time(), events))
        if self.first is None:
            self.first = time.monotonic()
        self.events += len(events)
        return rejections

    def latencies(self) -> list[float]:
        """Seconds from each row's commit, by the server's clock, to the return of the call that made it durable."""
        return [
            returned - event.time.timestamp()
            for returned, events in self._returns
            for event in events
            if event.detail_type == _INSERTED
        ]


@dataclass(slots=True)
class Forward:
    """The parts of a forward path that the benchmark looks at."""

    loops: list[Loop]
    checkpoint: Checkpoint
    buffer: Buffer
    source: ReplicationSource


def wire(dsn: str, slot: str, sink: FileSink, halt: threading.Event) -> Forward:
    """As `figbridge.service` does it, with the default envelope and buffer."""
    metrics, checkpoint = Metrics(), Checkpoint()
    source, buffer = ReplicationSource(dsn, slot, (PUBLICATION,)), Buffer(BUFFER_BYTES, metrics)
    naming = Naming("bench", "legacy.{database}", "{table}.{operation}")
    capture = Capture(
        source, slot=slot, echo=EchoFilter(), shaper=Shaper(naming, "safe", lambda _: ()), buffer=buffer,
        checkpoint=checkpoint, metrics=metrics, halt=halt,
    )  # fmt: skip
    publish = Publish(buffer, Publisher(sink, None, metrics, halt), checkpoint, source, metrics)
    return Forward([capture, publish], checkpoint, buffer, source)


def measure(dsn: str, slot: str, load: Load, channel: Connection) -> None:
    """The process: read `slot` until the LSN that comes through `channel` is durable, and answer with a `Run`."""
    log.configure(level="WARNING")
    supervisor, failures = Supervisor(grace=60), list[BaseException]()
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="figbridge-bench-"))
        path = Path(directory) / "events"
        sink = MeasuredSink(path, load)
        stack.callback(sink.close)
        forward = wire(dsn, slot, sink, supervisor.halt)
        stack.callback(forward.source.close)

        def loops() -> None:
            try:
                supervisor.run(forward.loops)
            except BaseException as error:  # noqa: BLE001 (the main thread raises it)
                failures.append(error)

        thread = threading.Thread(target=loops)
        clock = _Clock(sink)
        thread.start()
        try:
            filled = _until_done(thread, forward, clock, channel)
            seconds, cpu = clock.stop()
            last = time.monotonic()
            peak, events = memory(os.getpid()).peak, sink.events
        finally:  # nothing of what comes now counts
            supervisor.halt.set()
            supervisor.stop.set()
            sink.open.set()
            thread.join(60)
        if failures:
            raise failures[0]
        rows = events if load.seconds else _rows(path)
        channel.send(Run(seconds, cpu, rows, peak, clock.first, last, filled, sink.latencies()))


class _Clock:
    """Wall clock and CPU time since the loops started, or since the first durable event if the run is cut short."""

    def __init__(self, sink: MeasuredSink) -> None:
        self._sink = sink
        self._began, self._cpu = time.monotonic(), cpu_seconds()
        self.first = 0.0

    def look(self) -> bool:
        """Whether the time is over."""
        if not self.first and self._sink.first is not None:
            self.first = self._sink.first
            if self._sink.load.seconds:
                self._began, self._cpu = time.monotonic(), cpu_seconds()
        limit = self._sink.load.seconds
        return bool(limit and self.first and time.monotonic() - self.first > limit)

    def stop(self) -> tuple[float, float]:
        """(seconds, CPU seconds)"""
        self.look()
        return time.monotonic() - self._began, cpu_seconds() - self._cpu


def _until_done(thread: threading.Thread, forward: Forward, clock: _Clock, channel: Connection) -> bool:
    """Return when the target is durable or the time is over; whether the buffer was ever full."""
    tick, filled, target = threading.Event(), False, None
    while target is None or forward.checkpoint.flushed < target:
        if not thread.is_alive():
            break  # it failed; the caller raises what of
        if target is None and channel.poll():
            target = channel.recv()
        filled = filled or forward.buffer.full
        if clock.look():
            break
        tick.wait(_TICK)
    return filled


def _rows(path: Path) -> int:
    """The rows that are in the file: what was not written was not fast."""
    with path.open("rb") as file:
        return sum(_IS_ROW in line for line in file)


class Bridge:
    """A `measure` process, seen from the process that measures. A context manager: starts it, and ends it."""

    def __init__(self, dsn: str, slot: str, load: Load) -> None:
        spawn = multiprocessing.get_context("spawn")  # a fresh Python, whose memory is its own
        self._channel, theirs = spawn.Pipe()
        self._process = spawn.Process(target=measure, args=(dsn, slot, load, theirs), name=f"bench-{slot}")
        self._theirs = theirs

    def __enter__(self) -> Self:
        self._process.start()
        self._theirs.close()  # or the end of the process would not be the end of the pipe
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()
        self._process.join(90)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def read_until(self, end: Lsn) -> tuple[Run, list[int]]:
        """The run, and its resident memory ten times a second from the first durable event on, in bytes.

        Raises RuntimeError when the process failed; it has printed why.
        """
        self._channel.send(end)
        samples: list[tuple[float, int]] = []
        pid = self._process.pid
        assert pid
        try:
            while not self._channel.poll(_SAMPLE):
                with contextlib.suppress(ProcessLookupError):  # it failed; the pipe ends
                    samples.append((time.monotonic(), memory(pid).resident))
            run: Run = self._channel.recv()
        except EOFError:
            raise RuntimeError(f"{self._process.name} failed") from None
        return run, [size for when, size in samples if run.first <= when <= run.last]
