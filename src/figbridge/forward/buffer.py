"""What lies between the two loops of the forward path: batches of events, bounded by their bytes.

INVARIANT. The writer never waits, or the server would cut the connection of a client that is merely waiting for its
sink. It asks `Buffer.full` before it reads more.

The stream goes first. What a snapshot has read lies beside it (`put_reads`) and leaves in slices, each after all
batches that were put before it, and when no other waits; or when the stream had `_SHARE` times as long as the last
slice took, or a stream that never rests would hold up the snapshot for ever. A batch that was put later goes first only
where a read cannot undo it: the rows that it is about do not leave as reads any more, and one
with an event that does not say all of its row (`Batch.partial`) waits until all reads of its table have left.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from figbridge.event import Event, Rejection
from figbridge.forward.checkpoint import Ticket
from figbridge.forward.snapshot.moved import Moved
from figbridge.forward.snapshot.reads import Reads, Slice
from figbridge.forward.versions import Version
from figbridge.metrics import Metrics

_SHARE: Final = 2


@dataclass(slots=True)
class Batch:
    """Events on their way, and the ticket to resolve when they are durable; a part of something has none.

    ``refused`` has events that no sink shall see: they go to the dead letters, in the place where they stand.
    ``versions`` were met in it, and are to be kept before the ticket is resolved; so is ``moved``. ``partial`` has the
    OIDs of tables of which an event does not say all of one row: a value was not sent, or it is about all rows.
    ``reads``: what it is a slice of.
    """

    ticket: Ticket | None
    events: Sequence[Event]
    size: int
    refused: Sequence[Rejection] = ()
    versions: Sequence[Version] = ()
    partial: frozenset[int] = frozenset()
    reads: Reads | None = None
    moved: Sequence[Moved] = ()


class Buffer:
    """A queue that is bounded by bytes, whose writer never waits: it asks `full` before it reads more."""

    def __init__(self, limit: int, metrics: Metrics) -> None:
        self._limit = limit
        self._metrics = metrics
        self._batches: deque[Batch] = deque()
        self._reads: list[Reads] = []
        # by the monotonic clock: when reads are next, if both wait, and when what was taken last was taken
        self._reads_due = self._taken_at = 0.0
        self._put = self._taken = 0  # batches of the stream
        self._condition = threading.Condition()
        self._bytes = self._read_bytes = self._events = 0
        self._closed = False
        self.abandoned = False

    @property
    def full(self) -> bool:
        """Whether the writer should stop reading. What it has read already still fits: `put` never refuses.

        Reads do not count: of each table there are at most two chunks, whatever the stream does.
        """
        return self._bytes >= self._limit

    def put(self, batch: Batch) -> None:
        """Append; returns at once."""
        with self._condition:
            self._batches.append(batch)
            self._put += 1
            self._account(batch, 1)
            self._condition.notify()

    def put_reads(self, reads: Reads) -> None:
        """Append what a snapshot has read; returns at once."""
        with self._condition:
            reads.behind = self._put
            self._reads.append(reads)
            self._read_bytes += reads.size
            self._condition.notify()

    def take(self, most: int, rows: int = 500, size: float = math.inf) -> list[Batch]:
        """The oldest batches, or a slice of about `rows` rows.

        Of batches at least one, and together about `most` events and `size` bytes. Waits for the first. Empty once the
        buffer is closed and drained.
        """
        overtaken: list[tuple[Reads, Batch]] = []
        with self._condition:
            self._condition.wait_for(lambda: self._batches or self._reads or self._closed)
            reads = self._due()
            taken = [] if reads else self._oldest(most, size, overtaken)
            self._taken_at = time.monotonic()
        # what follows looks at each row, which the writer must not wait for; no other thread does it
        for late, batch in overtaken:
            late.overtaken(batch.events)
        return [self._slice(reads, rows)] if reads else taken

    def _oldest(self, most: int, size: float, overtaken: list[tuple[Reads, Batch]]) -> list[Batch]:
        taken: list[Batch] = []
        count = 0
        while self._batches and not (taken and self._blocking(self._batches[0])):
            if taken and (count + len(self._batches[0].events) > most or self._batches[0].size > size):
                break
            batch = self._batches.popleft()
            overtaken += [(reads, batch) for reads in self._reads if self._taken >= reads.behind]
            self._taken += 1
            taken.append(batch)
            count += len(batch.events)
            size -= batch.size
        return taken

    def _due(self) -> Reads | None:
        """The reads that are next; None when a batch of the stream is."""
        waiting = [reads for reads in self._reads if self._taken >= reads.behind]
        if waiting and (not self._batches or time.monotonic() >= self._reads_due):
            return waiting[0]
        return self._blocking(self._batches[0]) if self._batches else None

    def _blocking(self, batch: Batch) -> Reads | None:
        """Reads that must leave before `batch`."""
        for reads in self._reads:
            after = self._taken >= reads.behind
            if after and (reads.whole or batch.refused or reads.table in batch.partial):
                return reads
        return None

    def _slice(self, reads: Reads, rows: int) -> Batch:
        def hurried() -> bool:  # of the thread that takes, so what waits now waits as long
            return bool(self._batches) and self._blocking(self._batches[0]) is None

        events, size = reads.slice(rows, hurried)
        return Batch(None, events, size, reads=reads)

    def left(self, batch: Batch) -> None:
        """A slice is durable, as far as it went; the last of its reads has the ticket from now on."""
        reads = batch.reads
        if reads is None:
            return
        now = time.monotonic()
        self._reads_due = now + _SHARE * (now - self._taken_at)
        if isinstance(batch.events, Slice):
            batch.size -= reads.back(batch.events)
        with self._condition:
            self._reads.remove(reads)
            if not reads.ended:
                self._reads.append(reads)  # behind those of other tables
        if reads.ended:
            batch.ticket, batch.versions = reads.ticket, reads.versions

    def settle(self, batch: Batch) -> None:
        """Free the room of a batch that was taken: only when it is durable does its memory count as free."""
        with self._condition:
            if batch.reads:
                self._read_bytes -= batch.size
            self._account(batch, -1)

    def close(self) -> None:
        """No more will be put."""
        with self._condition:
            self._closed = True
            self._condition.notify()

    def _account(self, batch: Batch, sign: int) -> None:
        if not batch.reads:
            self._bytes += sign * batch.size
            self._events += sign * (len(batch.events) + len(batch.refused))
        self._metrics.buffered_bytes.set(self._bytes + self._read_bytes)
        self._metrics.buffered_events.set(self._events)
