"""What the capture loop gives to the publishing one: batches of events, each with the ticket that acknowledges it.

INVARIANT. A batch's ticket is the end of the last commit before it or in it, never of a transaction that is still
open. A large transaction leaves in many batches, and none of them acknowledges more than the one before it.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Final

from figbridge.change import Lsn, Operation
from figbridge.event import Event, Rejection
from figbridge.forward.buffer import Batch, Buffer
from figbridge.forward.checkpoint import Checkpoint
from figbridge.forward.echo import EchoFilter
from figbridge.forward.shape import Shaper
from figbridge.forward.snapshot.moved import Moved
from figbridge.forward.snapshot.reads import Reads
from figbridge.forward.snapshot.window import Window
from figbridge.forward.versions import Version
from figbridge.metrics import Metrics

_MOVED: Final = 1024  # bytes of a `Moved`, about
_EVENT_OVERHEAD: Final = 520  # bytes of one buffered event beside its detail: measured with tracemalloc, rounded up


class Handover:
    """The batch that is being filled, and what is counted of it. One thread, that of the capture loop.

    That loop appends to `events` and adds to `counts`, `echoes` and `partial` itself, as it does so for each row. What
    it appends to `moved` belongs to an event that comes next.
    """

    __slots__ = (
        "_buffer",
        "_checkpoint",
        "_echo",
        "_metrics",
        "_shaper",
        "commit_end",
        "counts",
        "echoes",
        "events",
        "moved",
        "partial",
        "tables",
    )

    def __init__(
        self, shaper: Shaper, echo: EchoFilter, buffer: Buffer, checkpoint: Checkpoint, metrics: Metrics
    ) -> None:
        self._shaper = shaper
        self._echo = echo
        self._buffer = buffer
        self._checkpoint = checkpoint
        self._metrics = metrics
        self.commit_end = Lsn(0)  # of the last commit that was read
        self.events: list[Event] = []
        self.partial: set[int] = set()  # as `Batch.partial`
        self.moved: list[Moved] = []  # as `Batch.moved`
        self.tables: dict[int, str] = {}  # OID → name, of the tables that the server has described
        # rows since the last batch, by operation and table: two lookups of small keys, as this is done for each row
        self.counts: dict[Operation, defaultdict[int, int]] = {it: defaultdict(int) for it in Operation}
        self.echoes = 0

    def forget(self) -> None:
        """Begin behind what was given last: a new connection sends the rest again."""
        self.commit_end = self._checkpoint.tracked
        self.events, self.partial, self.moved, self.tables, self.echoes = [], set(), [], {}, 0
        for tables in self.counts.values():
            tables.clear()

    def give(self) -> None:
        """What there is, to the buffer; without events only the acknowledgement of what made none."""
        events = self.events
        if events:
            ticket = self._checkpoint.track(self.commit_end)
            size = sum([len(event.detail) for event in events]) + _EVENT_OVERHEAD * len(events)
            batch = Batch(ticket, events, size, versions=self._versions(), partial=frozenset(self.partial))
            batch.moved, batch.size = self.moved, size + _MOVED * len(self.moved)
            self._buffer.put(batch)
            self.events, self.partial, self.moved = [], set(), []
        else:
            self._checkpoint.advance(self.commit_end)
        for operation, table, count in self._counted():
            self._metrics.captured.labels(self.tables[table], operation).inc(count)
        if self.echoes:
            self._metrics.echoes.inc(self.echoes)
            self._metrics.late_marks.inc(self._echo.late_marks)
            self.echoes = self._echo.late_marks = 0

    def refuse(self, rejection: Rejection) -> None:
        """Into the buffer, in its place in the order, for the dead letters."""
        self.give()
        size = len(rejection.event.detail) + _EVENT_OVERHEAD
        batch = Batch(self._checkpoint.track(self.commit_end), (), size, (rejection,), moved=self.moved)
        self.moved = []
        self._buffer.put(batch)

    def give_read(self, window: Window, end: Lsn) -> Reads:
        """A snapshot's rows, to the buffer, with the ticket that acknowledges `end`."""
        self.events += self._shaper.read(window.layout.table)
        self.give()
        reads = Reads(window, self._shaper.stamp, self._checkpoint.track(end), self._versions())
        self._buffer.put_reads(reads)
        return reads

    def _versions(self) -> Sequence[Version]:
        return self._shaper.history.take() if self._shaper.history else ()

    def _counted(self) -> Iterator[tuple[Operation, int, int]]:
        for operation, tables in self.counts.items():
            for table, count in tables.items():
                yield operation, table, count
            tables.clear()
