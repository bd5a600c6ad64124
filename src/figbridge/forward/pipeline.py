"""The two loops of the forward path, and the bounded buffer between them.

The capture loop never blocks on the buffer. When it is full, the loop stops reading the socket but keeps sending
status updates: TCP pushes back on the walsender while wal_sender_timeout stays satisfied. (A blocking put in that
place is the classic bug: the server cuts the connection of a client that is merely waiting for its sink.)
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import structlog

from figbridge.change import Begin, Change, Commit, Lsn, Relation
from figbridge.errors import BridgeError, DecodeError
from figbridge.event import Event
from figbridge.forward.checkpoint import Checkpoint, Ticket
from figbridge.forward.decode import Decoder, Message
from figbridge.forward.echo import EchoFilter
from figbridge.forward.publish import Publisher
from figbridge.forward.shape import Shaper
from figbridge.forward.source import KEEPALIVE, PAYLOAD, XLOG_DATA, ReplicationSource, read_keepalive
from figbridge.metrics import Metrics
from figbridge.retry import persist

_log = structlog.get_logger()

_BATCH_EVENTS = 1000  # a batch goes to the buffer at this size, or as soon as the socket is empty
_EVENT_OVERHEAD = 500  # bytes of one buffered event beside its detail: measured with tracemalloc, rounded up
_STATUS_INTERVAL = 10.0  # PostgreSQL's own wal_receiver_status_interval
_STOP_LATENCY = 0.5  # at most this long until a quiet loop sees that it is to stop
_RECONNECT = 0.2  # seconds before a new connection after a lost one; failures to connect back off further
_STATUS_PROGRESS = 0.2  # at most this long after an acknowledgement the server learns of it


@dataclass(slots=True)
class Batch:
    """Events on their way, and the ticket to resolve when they are durable."""

    ticket: Ticket
    events: Sequence[Event]
    size: int


class Buffer:
    """A queue that is bounded by bytes, whose writer never waits: it asks `full` before it reads more."""

    def __init__(self, limit: int, metrics: Metrics) -> None:
        self._limit = limit
        self._metrics = metrics
        self._batches: deque[Batch] = deque()
        self._condition = threading.Condition()
        self._bytes = self._events = 0
        self._closed = False
        self.abandoned = False

    @property
    def full(self) -> bool:
        """Whether the writer should stop reading. What it has read already still fits: `put` never refuses."""
        return self._bytes >= self._limit

    def put(self, batch: Batch) -> None:
        """Append; returns at once."""
        with self._condition:
            self._batches.append(batch)
            self._account(batch, 1)
            self._condition.notify()

    def take(self, most: int) -> list[Batch]:
        """The oldest batches, at least one, of about `most` events together; waits for the first.

        Empty once the buffer is closed and drained.
        """
        with self._condition:
            self._condition.wait_for(lambda: self._batches or self._closed)
            taken: list[Batch] = []
            count = 0
            while self._batches and (not taken or count + len(self._batches[0].events) <= most):
                taken.append(self._batches.popleft())
                count += len(taken[-1].events)
            return taken

    def settle(self, batch: Batch) -> None:
        """Free the room of a batch that was taken: only when it is durable does its memory count as free."""
        with self._condition:
            self._account(batch, -1)

    def close(self) -> None:
        """No more will be put."""
        with self._condition:
            self._closed = True
            self._condition.notify()

    def _account(self, batch: Batch, sign: int) -> None:
        self._bytes += sign * batch.size
        self._events += sign * len(batch.events)
        self._metrics.buffered_bytes.set(self._bytes)
        self._metrics.buffered_events.set(self._events)


class Publish:
    """The loop that empties the buffer into the sink and resolves the tickets."""

    name = "publish"

    def __init__(
        self, buffer: Buffer, publisher: Publisher, checkpoint: Checkpoint, source: ReplicationSource, metrics: Metrics
    ) -> None:
        self._buffer = buffer
        self._publisher = publisher
        self._checkpoint = checkpoint
        self._source = source
        self._metrics = metrics

    def run(self, _stop: threading.Event) -> None:
        """Until the capture loop has closed the buffer and it is empty: a soft stop drains."""
        try:
            while batches := self._buffer.take(5 * _BATCH_EVENTS):
                events = [event for batch in batches for event in batch.events]
                self._publisher.publish(events)
                for batch in batches:
                    self._checkpoint.resolve(batch.ticket)
                    self._buffer.settle(batch)
                self._source.wake()
                age = (datetime.now(UTC) - events[-1].time).total_seconds()
                self._metrics.lag_seconds.set(max(0.0, age))
        finally:
            self._buffer.abandoned = True
            self._source.wake()


@dataclass(slots=True)
class _Open:
    """What one connection knows: its decoder, and the batch that is being filled."""

    identity: str
    decoder: Decoder = field(default_factory=Decoder)
    events: list[Event] = field(default_factory=list)
    size: int = 0
    tables: dict[int, str] = field(default_factory=dict)
    server_end: int = 0


class Capture:
    """The loop that owns the replication connection: read, decode, drop echoes, shape, hand over, acknowledge."""

    name = "capture"

    def __init__(
        self,
        source: ReplicationSource,
        *,
        slot: str,
        echo: EchoFilter,
        shaper: Shaper,
        buffer: Buffer,
        checkpoint: Checkpoint,
        metrics: Metrics,
        halt: threading.Event,
    ) -> None:
        self._source = source
        self._slot = slot
        self._echo = echo
        self._shaper = shaper
        self._buffer = buffer
        self._checkpoint = checkpoint
        self._metrics = metrics
        self._halt = halt
        self._counts: Counter[tuple[int, str]] = Counter()
        self._echoes = 0
        self._commit_end = Lsn(0)
        self._reported = Lsn(0)
        self._last_status = 0.0

    def run(self, stop: threading.Event) -> None:
        """Stream until `stop`, through any number of connections; then drain, acknowledge and end.

        A new connection goes on behind the last commit that was handed over, so what waits in the buffer is not read
        twice; the slot alone decides what a new process reads.
        """
        ready = self._metrics.ready.labels("forward")
        try:
            while True:
                persist(lambda: self._source.connect(self._checkpoint.tracked), what="start replication", stop=stop)
                self._metrics.reconnects.inc()
                _log.info(
                    "replication started",
                    slot=self._slot,
                    timeline=self._source.identity.timeline,
                    after=str(self._checkpoint.tracked),
                )
                ready.set(1)
                try:
                    self._stream(stop)
                except BridgeError as error:
                    if not error.retryable:
                        raise
                    ready.set(0)
                    _log.warning("replication interrupted", error=str(error), hint=error.hint or None)
                    stop.wait(_RECONNECT)  # a server that accepts and cuts at once must not be hammered
                else:
                    return
        finally:
            ready.set(0)
            self._buffer.close()

    def _stream(self, stop: threading.Event) -> None:
        identity = self._source.identity
        opened = _Open(f"{identity.system_identifier}-{self._slot}")
        self._last_status = time.monotonic()
        interval = min(_STATUS_INTERVAL, self._source.sender_timeout / 4)
        while not stop.is_set():
            reading = not self._buffer.full
            asked = self._read_what_arrived(opened) if reading else False
            self._status(opened, interval, at_once=asked)
            self._source.wait(min(_STOP_LATENCY, self._until_status(interval)), reading=reading)
        self._buffer.close()
        _log.info("stopped reading, draining", batches=self._checkpoint.pending)
        while self._checkpoint.pending and not self._buffer.abandoned and not self._halt.is_set():
            self._status(opened, interval, at_once=False)
            self._source.wait(min(_STOP_LATENCY, self._until_status(interval)), reading=False)
        self._status(opened, interval, at_once=True)
        self._source.finish()

    def _read_what_arrived(self, opened: _Open) -> bool:
        """Read until nothing is there or the buffer is full; whether the server wants a status at once."""
        asked = False
        receive, decoder = self._source.receive, opened.decoder
        while not self._buffer.full:
            message = receive()
            if message is None:
                break
            if message[0] == XLOG_DATA:
                decoded = self._decode(message, decoder)
                if type(decoded) is Change:
                    self._row(decoded, opened)
                else:
                    self._between_rows(decoded, opened)
                if len(opened.events) >= _BATCH_EVENTS:
                    self._hand_over(opened)
            elif message[0] == KEEPALIVE:
                asked = self._keepalive(message, opened) or asked
            else:
                raise DecodeError("neither XLogData nor keepalive", kind=chr(message[0]), offset=0)
        self._hand_over(opened)
        return asked

    def _row(self, change: Change, opened: _Open) -> None:
        self._counts[change.relation.oid, change.operation] += 1
        if self._echo.drops(change):
            self._echoes += 1
            return
        event = self._shaper.event(change)
        opened.events.append(event)
        opened.size += len(event.detail) + _EVENT_OVERHEAD

    def _between_rows(self, decoded: Message, opened: _Open) -> None:
        match decoded:
            case Begin():
                self._echo.begin()
                timeline = self._source.identity.timeline_of(decoded.commit_lsn)
                self._shaper.begin(decoded, f"{opened.identity}-{timeline}")
            case Commit():
                self._commit_end = decoded.end_lsn
                opened.server_end = max(opened.server_end, decoded.end_lsn)
            case Relation():
                opened.tables[decoded.oid] = str(decoded)
            case list():  # the tables of one TRUNCATE
                for change in decoded:
                    self._row(change, opened)
            case _:
                pass  # an origin, a type's name, a logical message: nothing to tell the world yet

    def _decode(self, message: bytes, decoder: Decoder) -> Message:
        try:
            return decoder.feed(message[PAYLOAD:])
        except DecodeError as error:
            lsn = str(Lsn(int.from_bytes(message[1:9])))
            raise DecodeError(error.what, kind=error.kind, offset=error.offset, lsn=lsn) from error

    def _hand_over(self, opened: _Open) -> None:
        """Give the batch to the buffer. Its ticket is the last commit before or in it, never an open transaction's."""
        if opened.events:
            ticket = self._checkpoint.track(self._commit_end)
            self._buffer.put(Batch(ticket, opened.events, opened.size))
            opened.events, opened.size = [], 0
        else:
            self._checkpoint.advance(self._commit_end)
        for (table, operation), count in self._counts.items():
            self._metrics.captured.labels(opened.tables[table], operation).inc(count)
        self._counts.clear()
        if self._echoes:
            self._metrics.echoes.inc(self._echoes)
            self._metrics.late_marks.inc(self._echo.late_marks)
            self._echoes = self._echo.late_marks = 0

    def _keepalive(self, message: bytes, opened: _Open) -> bool:
        end, asked = read_keepalive(message)
        opened.server_end = max(opened.server_end, end)
        if not opened.decoder.in_transaction:
            # everything before `end` has been sent, so with nothing left of it in our hands it is delivered
            self._hand_over(opened)
            self._commit_end = max(self._commit_end, end)
            self._checkpoint.advance(end)
        return asked

    def _status(self, opened: _Open, interval: float, *, at_once: bool) -> None:
        flushed, since = self._checkpoint.flushed, time.monotonic() - self._last_status
        due = since >= (_STATUS_PROGRESS if flushed > self._reported else interval)
        if due or at_once:
            self._source.send_status(written=self._checkpoint.tracked, flushed=flushed)
            self._last_status, self._reported = time.monotonic(), flushed
            self._metrics.flushed_lsn.set(flushed)
            self._metrics.lag_bytes.set(max(0, opened.server_end - flushed))

    def _until_status(self, interval: float) -> float:
        wanted = _STATUS_PROGRESS if self._checkpoint.flushed > self._reported else interval
        return self._last_status + wanted - time.monotonic()
