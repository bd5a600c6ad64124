"""Events → sink: cut to its limits, in order per key, retried, dead-lettered, never skipped.

INVARIANT: `Publisher.publish` returns only when every event is durable, at the sink or in the dead letters.

Two ways. A sink that takes a request as a whole, and one at a time, is given the events as they come: order needs no
thought, and this way is the fast one of files. A sink that can refuse single entries, or answers several requests at
once, is given what `figbridge.delivery.order` allows: never two events of one key at the same time.

`Publish` is the second of the forward path's two loops: from the `buffer` to here, then to the checkpoint.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import groupby
from typing import Final

import structlog
from prometheus_client import Counter

from figbridge.deadletter import DeadLetter, DeadLetters
from figbridge.delivery.flight import EntriesRefused, Flight, Tally
from figbridge.delivery.pack import GROUP, Packing, Packs
from figbridge.errors import SinkRefused
from figbridge.event import Event, Lines, Rejection
from figbridge.forward.buffer import Batch, Buffer
from figbridge.forward.checkpoint import Checkpoint
from figbridge.forward.snapshot.moved import Moves
from figbridge.forward.snapshot.reads import Share
from figbridge.forward.source import ReplicationSource
from figbridge.forward.standard import Standard
from figbridge.forward.versions import VersionStore
from figbridge.metrics import Metrics
from figbridge.retry import persist
from figbridge.transports import Deposit, Sink

_log = structlog.get_logger()

_GROUP: Final = 5000  # events
# Of a call, which holds each event several times over: as it is, in a pack, in the text of a request, and in its copies
# on the way out. As many small events as a group may have take less.
_BYTES: Final = 20 << 20
_SLICE: Final = 500  # rows of a snapshot
_PACKED: Final = 4  # times as many where they are packed: there are fewer entries of them


class Publisher:
    """Publishes for one thread. `halt` ends all retrying: Stopped is raised then, and nothing is acknowledged.

    `kind` is the format: events of other formats become events of that one. `packing` puts several into one entry.
    `counter`, by sink, counts what is durable; by default the series of what is published.
    """

    def __init__(
        self,
        sink: Sink,
        dead_letters: DeadLetters | None,
        metrics: Metrics,
        halt: threading.Event,
        deposit: Deposit | None = None,
        *,
        kind: type[Event] = Event,
        packing: Packing | None = None,
        counter: Counter | None = None,
    ) -> None:
        self._sink = sink
        self._deposit = deposit
        self._dead_letters = dead_letters
        self._metrics = metrics
        self._halt = halt
        self._kind = kind
        self._packing = packing
        self._packs: Packs = {}
        durable = counter or metrics.published
        self._published = durable.labels(sink.name)
        self._checked = False
        self._flight: Flight | None = None
        if sink.limits.partial or sink.limits.in_flight > 1:
            tally = Tally(durable, metrics.rejected, metrics.window)
            self._flight = Flight(sink, tally, halt, bury=self._bury_refused, shrink=self._shrink)

    def publish(self, events: Sequence[Event]) -> None:
        """Return when every one of `events` is durable.

        Raises Stopped when `halt` is set, SinkRefused when the sink never takes an event and there is no dead-letter
        store to put it in.
        """
        if not self._checked:  # the limits of a queue or stream are known only then
            persist(self._sink.check, what=f"look up {self._sink.name}", stop=self._halt)
            self._checked = True
        if self._kind is not Event:
            events = [tuple.__new__(self._kind, event) for event in events]
        if self._packing:
            events, self._packs = self._packing.pack(events)
        if self._flight:
            self._flight.publish(events, self._packs)
            return
        for request in self._requests(events):
            self._send(request)

    @property
    def group(self) -> int:
        """How many events to give to `publish` at once, if there are so many: two windows full of requests.

        With fewer the last answers of a call would be waited for with little else out.
        """
        limits = self._sink.limits
        group = _GROUP * _PACKED if self._packing else _GROUP
        return max(group, 2 * limits.entries * limits.in_flight) if self._flight else group

    @property
    def lines(self) -> int:
        """How many rows of a snapshot to give to `publish` at once while nothing else waits; 0: not many.

        They are written line by line, so they take no more memory than few, and whatever comes ends them early.
        """
        return 0 if self._flight or self._packing or self._kind is not Event else self._sink.limits.lines

    def close(self) -> None:
        """End the threads that wait for the sink. The sink itself is closed by whoever opened it."""
        if self._flight:
            self._flight.close()

    def _requests(self, events: Sequence[Event]) -> Iterator[Sequence[Event]]:
        """Cut `events` into requests within the sink's limits; what fits into none goes to the dead letters."""
        limits = self._sink.limits
        if isinstance(events, Lines) and len(events) <= limits.lines:
            yield events
            return
        sizes = list(map(self._sink.size, events))
        if 0 < len(sizes) <= limits.entries and max(sizes) <= limits.entry_bytes and sum(sizes) <= limits.batch_bytes:
            yield list(events)  # as a rule, where a batch is bytes in a file; to look at each event took a tenth of all
            return
        request: list[Event] = []
        room = limits.batch_bytes
        for event, size in zip(events, sizes, strict=True):
            if size > limits.entry_bytes:
                if request:  # what is before it goes first: its dead letter must not overtake them
                    yield request
                    request, room = [], limits.batch_bytes
                smaller = self._shrink(event, size)
                if smaller is None:
                    continue
                event, size = smaller, self._sink.size(smaller)  # noqa: PLW2901
            if request and (len(request) >= limits.entries or size > room):
                yield request
                request, room = [], limits.batch_bytes
            request.append(event)
            room -= size
        if request:
            yield request

    def _send(self, request: Sequence[Event]) -> None:
        """A request that is taken as a whole or not at all, but for entries that never will be."""
        attempts, remaining = 0, request

        def attempt() -> None:
            nonlocal attempts, remaining
            attempts += 1
            rejections = self._sink.publish(remaining)
            taken = len(remaining) - len(rejections)
            if self._packs:  # only then is an entry more than one event: each is looked at
                refused = {rejection.event.id for rejection in rejections}
                taken = sum(len(self._members(it)) for it in remaining if it.id not in refused)
            self._published.inc(taken)
            for rejection in rejections:
                self._metrics.rejected.labels(self._sink.name, rejection.code).inc()
            remaining = []  # before anything can fail: entries that were taken are never sent again
            if rejections:
                self._bury_refused(rejections, attempts)

        persist(attempt, what=f"publish to {self._sink.name}", stop=self._halt)

    def _shrink(self, event: Event, size: int) -> Event | None:
        """What is too large for the sink: the event that takes its place, or None when it is a dead letter."""
        deposit = self._deposit
        if deposit:
            smaller = persist(lambda: deposit.deposit(event), what="deposit a large event", stop=self._halt)
            if self._sink.size(smaller) <= self._sink.limits.entry_bytes:  # if not, its key alone is too large
                self._metrics.deposited.inc()
                return smaller
        what = f"{size} bytes, and the sink takes {self._sink.limits.entry_bytes}"
        self.bury([Rejection(it, "EntryTooLarge", what, retryable=False) for it in self._members(event)], attempts=0)
        return None

    def _members(self, event: Event) -> Sequence[Event]:
        pack = self._packs.get(event.id) if self._packs else None
        return pack.members if pack else (event,)

    def _bury_refused(self, rejections: Sequence[Rejection], attempts: int) -> None:
        for rejection in rejections:
            members = self._members(rejection.event)
            if len(members) > 1:
                self._take_apart(rejection.event, members)
            else:
                self.bury([replace(rejection, event=members[0])], attempts=attempts)

    def _take_apart(self, entry: Event, members: Sequence[Event]) -> None:
        """Send what was in a pack that was refused for ever one by one: as a rule one change alone is to blame.

        No other event of their keys is out meanwhile, because the pack is not settled yet. They stay in the pack's
        group, or a consumer could see what follows there before them.
        """
        for member in members:
            attempts = 0

            def attempt(member: Event = member) -> None:
                nonlocal attempts
                attempts += 1
                sent = member._replace(key=GROUP) if entry.key == GROUP else member
                rejections = self._sink.publish([sent])
                for it in rejections:
                    self._metrics.rejected.labels(self._sink.name, it.code).inc()
                    if it.retryable:
                        raise EntriesRefused(f"an entry was refused for now: {it.code}")
                    self.bury([replace(it, event=member)], attempts=attempts)
                self._published.inc(1 - len(rejections))

            persist(attempt, what=f"publish to {self._sink.name}", stop=self._halt)

    def bury(self, rejections: Sequence[Rejection], *, attempts: int) -> None:
        """Put what can never be published into the dead letters. Raises SinkRefused if there are none, and Stopped."""
        first = rejections[0]
        if self._dead_letters is None:
            raise SinkRefused(
                f"event {first.event.id} cannot be published to the sink {self._sink.name}: "
                f"{first.code}: {first.message}",
                hint="nothing is skipped, so the bridge stops here. Mend the cause, or set forward.dead-letters "
                "to keep such events aside and go on",
            )
        letters = [DeadLetter.of(it, attempts) for it in rejections]
        store = self._dead_letters
        persist(lambda: store.add(letters), what="write dead letters", stop=self._halt)
        self._metrics.forward_dead.inc(len(letters))
        for it in rejections:
            _log.error("event dead-lettered", event_id=it.event.id, code=it.code, reason=it.message)


class Publish:
    """The loop that empties the buffer into the sink and resolves the tickets."""

    name = "publish"

    def __init__(
        self,
        buffer: Buffer,
        publisher: Publisher,
        checkpoint: Checkpoint,
        source: ReplicationSource,
        *,
        versions: VersionStore | None = None,
        moves: Moves | None = None,
        standard: Standard | None = None,
        share: Share | None = None,
        metrics: Metrics,
        halt: threading.Event,
    ) -> None:
        self._standard = standard
        self._buffer = buffer
        self._publisher = publisher
        self._checkpoint = checkpoint
        self._source = source
        self._versions = versions
        self._moves = moves
        self._metrics = metrics
        self._halt = halt
        self._reads = share or Share()

    def run(self, _stop: threading.Event) -> None:
        """Until the capture loop has closed the buffer and it is empty: a soft stop drains."""
        try:
            while batches := self._buffer.take(self._publisher.group, self._rows(), _BYTES):
                for refused, group in groupby(batches, lambda batch: bool(batch.refused)):
                    self._deliver(list(group), refused=refused)
        finally:
            self._buffer.abandoned = True
            self._source.wake()

    def _rows(self) -> int:
        """Of a slice. A sink that writes lines makes as many as there are durable at once: that has its price.

        One that has several requests out is given some of them in any case.
        """
        lines = 0 if self._standard else self._publisher.lines
        if not lines:
            return max(_SLICE, self._reads.rows)
        return self._reads.rows if self._reads.flows else lines

    def _deliver(self, batches: Sequence[Batch], *, refused: bool) -> None:
        if refused:
            for batch in batches:
                self._publisher.bury(batch.refused, attempts=0)
        else:
            read = batches[0].reads is not None  # then it is alone
            events = batches[0].events if read else [event for batch in batches for event in batch.events]
            if events and self._standard:
                events = self._standard.admit(events)
            if events:
                began = time.monotonic()
                self._publisher.publish(events)
                self._reads.took(len(events), time.monotonic() - began, read=read)
            if read:
                self._buffer.left(batches[0])
            if events and not read:  # a read is as old as its chunk, which is no lag
                age = (datetime.now(UTC) - events[-1].time).total_seconds()
                self._metrics.lag_seconds.set(max(0.0, age))
        self._keep(batches)
        for batch in batches:
            if batch.ticket is not None:
                self._checkpoint.resolve(batch.ticket)
            self._buffer.settle(batch)
        self._source.wake()

    def _keep(self, batches: Sequence[Batch]) -> None:
        """What the tables of our own have to say before these may be acknowledged."""
        if self._versions and (versions := [version for batch in batches for version in batch.versions]):
            add, flushed = self._versions.add, self._checkpoint.flushed
            persist(lambda: add(versions, flushed), what="keep the versions of tables", stop=self._halt)
        if self._moves and (moved := [row for batch in batches for row in batch.moved]):
            note = self._moves.add
            persist(lambda: note(moved), what="note rows whose key changed", stop=self._halt)
