"""The first of the forward path's two loops: from the slot into the bounded `buffer`; `publish` has the second.

It never blocks on the buffer. When that is full, the loop stops reading the socket but keeps sending status updates:
TCP pushes back on the walsender while wal_sender_timeout stays satisfied. (A blocking put in that place is the classic
bug: the server cuts the connection of a client that is merely waiting for its sink.)
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import structlog

from figbridge.change import (
    Begin,
    Change,
    Commit,
    LogicalMessage,
    Lsn,
    Operation,
    Origin,
    Relation,
    TypeName,
    timestamp,
)
from figbridge.errors import BridgeError, DecodeError, SlotInUse
from figbridge.event import Event, Rejection
from figbridge.forward.buffer import Buffer
from figbridge.forward.checkpoint import Checkpoint
from figbridge.forward.decode import Decoder, Message
from figbridge.forward.echo import EchoFilter
from figbridge.forward.handover import Handover
from figbridge.forward.heartbeat import Heartbeats
from figbridge.forward.interruption import Interruptions
from figbridge.forward.messages import Messages
from figbridge.forward.pingpong import held
from figbridge.forward.shape import Shaper
from figbridge.forward.snapshot import PREFIX as SNAPSHOT
from figbridge.forward.snapshot.moved import Moves
from figbridge.forward.snapshot.window import Windows
from figbridge.forward.source import KEEPALIVE, PAYLOAD, XLOG_DATA, ReplicationSource, read_keepalive
from figbridge.forward.status import Status
from figbridge.forward.unroll import HEAD
from figbridge.forward.versions import VersionStore
from figbridge.metrics import Metrics
from figbridge.retry import persist

_log = structlog.get_logger()

_BATCH = 500  # events, about, that are handed over while more keep coming; fewer would wake the other loop too often
_STOP_LATENCY = 0.5  # at most this long until a quiet loop sees that it is to stop
_LOOK_AGAIN = 2.0  # seconds between two failures to connect, at most: an application comes back from a failover as soon


@dataclass(slots=True)
class _Open:
    """What one connection knows: its decoder and its open transaction."""

    identity: str
    decoder: Decoder = field(default_factory=Decoder)
    begin: Begin | None = None


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
        messages: Messages,
        heartbeats: Heartbeats | None,
        versions: VersionStore | None = None,
        windows: Windows | None = None,
        moves: Moves | None = None,
        buffer: Buffer,
        checkpoint: Checkpoint,
        metrics: Metrics,
        halt: threading.Event,
        let_go: Callable[[], None] | None = None,
    ) -> None:
        self._let_go = let_go
        self._windows = windows or Windows()
        self._source = source
        self._slot = slot
        self._echo = echo
        self._shaper = shaper
        self._messages = messages
        self._heartbeats = heartbeats
        self._versions = versions
        self._moves = moves
        self._buffer = buffer
        self._checkpoint = checkpoint
        self._metrics = metrics
        self._halt = halt
        self._handover = Handover(shaper, echo, buffer, checkpoint, metrics)
        self._status = Status(source, checkpoint, heartbeats, metrics)
        self._interruptions = Interruptions()
        self._ready = metrics.ready.labels("forward")

    def run(self, stop: threading.Event) -> None:
        """Stream until `stop`, through any number of connections; then drain, acknowledge and end.

        A new connection goes on behind the last commit that was handed over, so what waits in the buffer is not read
        twice; the slot alone decides what a new process reads.
        """
        ready, interruptions = self._ready, self._interruptions
        try:
            while True:
                while self._source.in_danger and self._buffer.full and not stop.is_set():
                    stop.wait(_STOP_LATENCY)  # a connection that is not read would hold up the server's checkpoints
                persist(
                    self._connect, what="start replication", stop=stop, longest=_LOOK_AGAIN, on_retry=self._stand_by
                )
                self._metrics.reconnects.inc()
                _log.info(
                    "replication started",
                    slot=self._slot,
                    timeline=self._source.identity.timeline,
                    after=str(self._checkpoint.tracked),
                )
                ready.set(not interruptions.stuck)
                interruptions.opened(self._checkpoint.tracked, time.monotonic())
                if self._heartbeats:
                    self._heartbeats.opened()
                self._windows.streaming = True
                try:
                    self._stream(stop)
                except BridgeError as error:
                    if not error.retryable:
                        raise
                    ready.set(0)
                    self._closed()
                    stop.wait(interruptions.seconds(error, self._checkpoint.tracked, time.monotonic()))
                else:
                    return
        finally:
            ready.set(0)
            self._closed()
            self._buffer.close()

    def _connect(self) -> None:
        self._source.connect(self._checkpoint.tracked)
        if self._shaper.history and self._versions:  # now that nobody else can meet any
            self._shaper.history.learn(self._versions.load())
        if self._moves:
            self._moves.load()

    def _stand_by(self, error: BridgeError) -> None:
        """Another replica has the stream: what is held here it may be waiting for."""
        if isinstance(error, SlotInUse) and self._let_go and not self._checkpoint.pending:
            self._let_go()

    def _closed(self) -> None:
        self._windows.streaming = False
        if self._heartbeats:
            self._heartbeats.closed()

    def _stream(self, stop: threading.Event) -> None:
        identity = self._source.identity
        opened = _Open(f"{identity.system_identifier}-{self._slot}")
        # What the last connection had read and not handed over comes again: forget that it was seen, or its commits
        # would be acknowledged before its events are durable.
        self._handover.forget()
        self._shaper.rewind()
        self._windows.interrupted()
        status = self._status
        status.opened()
        while not stop.is_set():
            asked = self._read_what_arrived(opened)
            status.send(at_once=asked)
            if self._interruptions.moved(self._checkpoint.tracked):
                self._ready.set(1)
            self._source.wait(min(_STOP_LATENCY, status.until_due()), reading=not self._buffer.full)
        self._buffer.close()
        _log.info("stopped reading, draining", batches=self._checkpoint.pending)
        while self._checkpoint.pending and not self._buffer.abandoned and not self._halt.is_set():
            status.send()
            self._source.wait(min(_STOP_LATENCY, status.until_due()), reading=False)
        status.send(at_once=True)
        self._source.finish()

    def _read_what_arrived(self, opened: _Open) -> bool:
        """Read until nothing is there, the buffer is full or a status is due; whether the server wants one at once.

        A server that is faster than we are always has more, and ends a client of which it hears nothing.
        """
        asked = False
        while not asked and not self._buffer.full and self._status.until_due() > 0:
            messages = self._source.receive()
            if not messages:
                break
            asked = self._take(messages, opened)
            if len(self._handover.events) >= _BATCH:
                self._handover.give()
        self._handover.give()
        return asked

    def _take(self, messages: Sequence[bytes], opened: _Open) -> bool:
        """The inner loop: what is written here, each change of the legacy database pays for."""
        asked = False
        lanes, rest, handover = self._shaper.lanes, iter(messages), self._handover
        noting, unkeyed, watched = self._windows.open, self._windows.unkeyed, self._echo.watched
        message = next(rest, b"")
        while message:
            lane = lanes.get(message[HEAD])
            if (
                lane is not None
                and opened.begin is not None
                and not self._echo.ours
                and lane[1] not in unkeyed
                and lane[1] not in watched
            ):
                operation, table, run = lane
                first, append = opened.decoder.ordinal, handover.events.append
                before = len(handover.events)
                message, opened.decoder.ordinal = run(message, rest, first, self._shaper.stamp, append)
                if taken := opened.decoder.ordinal - first:
                    handover.counts[operation][table] += taken
                    if (window := noting.get(table)) is not None:
                        window.events(handover.events[before:])
                    continue
            asked = self._one(message, opened) or asked
            message = next(rest, b"")
        return asked

    def _one(self, message: bytes, opened: _Open) -> bool:
        """One message that no lane takes; whether the server wants a status at once."""
        kind = message[0]
        if kind == KEEPALIVE:
            return self._keepalive(message, opened)
        if kind != XLOG_DATA:
            raise DecodeError("neither XLogData nor keepalive", kind=chr(kind), offset=0)
        try:
            decoded = opened.decoder.feed(message, PAYLOAD)
            self._shaper.message = message
            # not as cases of `match`, which would cost each small transaction as much as a column
            if type(decoded) is Change:
                self._row(decoded, opened)
            elif type(decoded) is Begin:
                self._begun(decoded, opened)
            elif type(decoded) is Commit:
                self._committed(decoded.end_lsn, opened)
            else:
                self._between_rows(decoded, message, opened)
        except DecodeError as error:
            lsn = str(Lsn(int.from_bytes(message[1:9])))
            raise DecodeError(error.what, kind=error.kind, offset=error.offset, lsn=lsn) from error
        except (IndexError, ValueError, OverflowError) as error:
            # what an encoder makes of a text that its type cannot have, such as a number without digits
            lsn, what = str(Lsn(int.from_bytes(message[1:9]))), f"a value that its type cannot have ({error})"
            raise DecodeError(what, kind=chr(message[PAYLOAD]), offset=0, lsn=lsn) from error
        return False

    def _row(self, change: Change, opened: _Open) -> None:
        handover = self._handover
        handover.counts[change.operation][change.relation.oid] += 1
        dropped = self._echo.drops(change)
        if self._windows.open:
            self._windows.row(change, dropped=dropped)
        if dropped:
            handover.echoes += 1
            return
        if self._echo.ours:
            self._attribute(opened)
        event = self._shaped(change)
        if change.unsent or self._shaper.announced or change.operation is Operation.TRUNCATE:
            handover.partial.add(change.relation.oid)
            moves = change.before_is_key or change.operation is Operation.INSERT
            if moves and self._moves and opened.begin and event is not None:
                handover.moved += filter(None, [self._moves.note(change, opened.begin.commit_lsn)])
        if self._shaper.announced:
            handover.events += self._shaper.announced
            self._shaper.announced = []
        if isinstance(event, Event):
            handover.events.append(event)
        elif event is not None:
            handover.refuse(event)

    def _shaped(self, change: Change) -> Event | Rejection | None:
        event = self._shaper.event(change)
        if self._windows.open and self._shaper.table:
            self._windows.named(change.relation.oid, self._shaper.table.keys)
        if self._echo.holds(change) and isinstance(event, Event):
            self._metrics.ping_pongs.labels("forward").inc()
            return held(event)
        return event

    def _begun(self, begin: Begin, opened: _Open) -> None:
        self._echo.begin(begin.committed_at)
        opened.begin = begin
        self._windows.begun(begin.xid)
        self._shaper.begin(begin, self._identity(opened, begin.commit_lsn))

    def _committed(self, end: Lsn, opened: _Open) -> None:
        if self._windows.closing:
            self._windows.close(lambda window: self._handover.give_read(window, end), end)
        opened.begin = None
        self._handover.commit_end = end
        self._status.server_end = max(self._status.server_end, end)

    def _between_rows(self, decoded: Message, message: bytes, opened: _Open) -> None:
        match decoded:
            case Relation():
                self._handover.tables[decoded.oid] = str(decoded)
                self._shaper.described()
            case TypeName():
                self._shaper.type_name(decoded)
            case LogicalMessage():
                self._logical(decoded, message, opened)
            case list():  # the tables of one TRUNCATE
                for change in decoded:
                    self._row(change, opened)
            case Origin(_, name):
                self._echo.came_from(name)

    def _attribute(self, opened: _Open) -> None:
        """What leaves from here on has the cause that the transaction of ours names."""
        begin, cause = opened.begin, self._echo.cause
        if begin is not None and cause is not None and begin.cause != cause:
            opened.begin = begin = begin._replace(cause=cause)
            self._shaper.begin(begin, self._identity(opened, begin.commit_lsn))

    def _logical(self, logical: LogicalMessage, message: bytes, opened: _Open) -> None:
        """A logical message; within a transaction of ours an echo, like its rows.

        One that belongs to no transaction may be acknowledged as a commit's end may.
        """
        if opened.begin is not None and logical.transactional and self._echo.hears(logical, opened.decoder.ordinal):
            return
        if opened.begin is not None and self._echo.ours:
            if not self._echo.passes:
                self._handover.echoes += 1
                return
            self._attribute(opened)
        begin = opened.begin
        if logical.prefix == SNAPSHOT and begin is not None:
            self._windows.mark(logical.content)
            return
        identity = self._identity(opened, begin.commit_lsn if begin else logical.lsn)
        left = self._messages.event(logical, begin, identity, timestamp(int.from_bytes(message[17:25])))
        if isinstance(left, Event):
            self._handover.events.append(left)
        elif left is not None:
            self._handover.refuse(left)
        if begin is None:
            self._handover.commit_end = max(self._handover.commit_end, logical.lsn)

    def _identity(self, opened: _Open, lsn: Lsn) -> str:
        return f"{opened.identity}-{self._source.identity.timeline_of(lsn)}"

    def _keepalive(self, message: bytes, opened: _Open) -> bool:
        end, asked = read_keepalive(message)
        self._status.server_end = max(self._status.server_end, end)
        if not opened.decoder.in_transaction:
            # everything before `end` has been sent, so with nothing left of it in our hands it is delivered
            self._handover.give()
            self._handover.commit_end = max(self._handover.commit_end, end)
            self._checkpoint.advance(end)
        return asked
