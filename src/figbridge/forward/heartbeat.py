"""The heartbeat: a logical message of ours that goes the whole way of a change, to show that the way is open.

    written (an ordinary connection) ──WAL──▶ seen (by the capture loop) ──▶ acknowledged (all before it is durable)

Acknowledged means: confirmed to the server, so every event of every transaction before the heartbeat is at the sink or
in the dead letters. The age of the newest such heartbeat therefore bounds how far the world is behind the legacy
system, also when nobody writes to a published table, when "no event for an hour" says nothing.
It also gives an idle publication a position of its own to confirm, so that the server can drop WAL.

What it costs the legacy database: one WAL record of about 160 bytes an interval, and one connection.
It is not transactional, so it takes no transaction id; it needs no table and no privilege (PUBLIC may execute
pg_logical_emit_message), and pgoutput delivers it from PostgreSQL 14 on.

What it refuses to do: stop or restart anything. Where it cannot be written (a standby, a revoked privilege, a server
that does not answer) the forward path works as without it, and the log says so once.
"""

import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final

import orjson
import psycopg
import structlog
from psycopg import conninfo

from figbridge import legacy
from figbridge.change import LogicalMessage, Lsn
from figbridge.errors import BridgeError, LegacyUnavailable
from figbridge.metrics import Metrics

_log = structlog.get_logger()

PREFIX: Final = "figbridge.heartbeat"

_UNACKNOWLEDGED: Final = 1000  # at most so many wait for their acknowledgement: the sink may be away for days
_LOOK: Final = 0.5  # seconds between two looks whether the stream is open
_SILENCE: Final = 10_000  # milliseconds without an answer of the other host until the connection is given up

# A standby writes no WAL and would fail with an internal error. 17 can flush, which makes `seen` a measure of the
# stream; without it the WAL writer does it within wal_writer_delay (200 ms).
_WRITE: Final = "SELECT CASE WHEN NOT pg_is_in_recovery() THEN pg_logical_emit_message(false, %s::text, %s::text) END"
_WRITE_17: Final = _WRITE.replace("%s::text)", "%s::text, true)")


class Heartbeats:
    """The round trips of this process, and their metrics.

    `content` is for the thread that writes; `opened`, `closed`, `seen` and `acknowledged` are for the capture loop;
    `age` may be called by anyone. Nothing is shared but single values, so there is no lock.

    The content carries the time of writing, by this process's monotonic clock, so a heartbeat that is seen before its
    writer has returned is no special case. Heartbeats of other bridges, of other slots and of an earlier life of this
    one pass by in the same stream: they are not counted.
    """

    def __init__(self, slot: str, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self.streaming = False
        self._slot = slot
        self._instance = secrets.token_hex(8)
        self._clock = clock
        self._sequence = self._seen = 0
        self._waiting: deque[tuple[Lsn, float]] = deque()
        self._newest: dict[str, float] = {}  # stage → when the newest heartbeat that passed it was written
        self._seconds = {stage: metrics.heartbeat_seconds.labels(stage) for stage in ("seen", "acknowledged")}
        for stage in self._seconds:
            metrics.heartbeat_age.labels(stage).set_function(partial(self.age, stage))

    def content(self) -> str:
        """What the next heartbeat says: JSON, about 100 bytes."""
        self._sequence += 1
        beat = {
            "slot": self._slot,
            "instance": self._instance,
            "sequence": self._sequence,
            "written": self._clock(),
        }
        return orjson.dumps(beat).decode()

    def opened(self) -> None:
        """The stream is open: from now on heartbeats are written, and must come."""
        now = self._clock()
        for stage in self._seconds:
            self._newest.setdefault(stage, now)
        self.streaming = True

    def closed(self) -> None:
        """The stream is not open; the age goes on growing."""
        self.streaming = False

    def seen(self, message: LogicalMessage) -> None:
        """A message with our prefix has arrived."""
        beat = self._ours(message.content)
        if beat is None or beat[0] <= self._seen:
            return  # a new connection may begin before what the last one had read
        self._seen, written = beat
        self._passed("seen", written)
        if len(self._waiting) < _UNACKNOWLEDGED:
            self._waiting.append((message.lsn, written))

    def acknowledged(self, flushed: Lsn) -> None:
        """Everything up to `flushed` was confirmed to the server."""
        while self._waiting and self._waiting[0][0] <= flushed:
            self._passed("acknowledged", self._waiting.popleft()[1])

    def age(self, stage: str) -> float:
        """Seconds since the newest heartbeat that passed `stage` was written, or since the stream opened first.

        NaN, which no alert rule matches, while this process never had the stream: a replica that waits for the slot.
        """
        newest = self._newest.get(stage)
        return math.nan if newest is None else max(0.0, self._clock() - newest)

    def _passed(self, stage: str, written: float) -> None:
        self._seconds[stage].observe(max(0.0, self._clock() - written))
        self._newest[stage] = max(written, self._newest.get(stage, written))

    def _ours(self, content: bytes) -> tuple[int, float] | None:
        """(sequence, written) of a heartbeat of this process."""
        try:
            beat = orjson.loads(content)
            return (int(beat["sequence"]), float(beat["written"])) if beat["instance"] == self._instance else None
        except (ValueError, TypeError, LookupError):
            return None  # anyone may emit a message with any prefix


class Heartbeat:
    """The loop that writes a heartbeat every `interval` seconds while the stream is open.

    A replica that waits for the slot writes none: it could not see them.
    """

    name = "heartbeat"

    def __init__(self, dsn: str, beats: Heartbeats, interval: float) -> None:
        # a connection that a firewall forgot would otherwise hang for a quarter of an hour, and the soft stop with it
        given = conninfo.conninfo_to_dict(dsn)
        self._dsn = conninfo.make_conninfo(dsn, tcp_user_timeout=given.get("tcp_user_timeout") or _SILENCE)
        self._beats = beats
        self._interval = interval
        self._connection: psycopg.Connection | None = None
        self._trouble = ""

    def run(self, stop: threading.Event) -> None:
        """Until `stop`; a heartbeat that cannot be written is no reason to end."""
        try:
            while not stop.is_set():
                streaming = self._beats.streaming
                if streaming:
                    self._beat()
                stop.wait(self._interval if streaming else min(_LOOK, self._interval))
        finally:
            self._drop()

    def _beat(self) -> None:
        reused = self._connection is not None
        try:
            try:
                written = self._write()
            except LegacyUnavailable:
                if not reused:
                    raise
                written = self._write()  # the old connection had ended: an idle timeout, a failover
        except BridgeError as error:
            self._say(str(error), error.hint)
        else:
            self._say("" if written else "the server is a standby", "connect to the primary to have heartbeats")

    def _write(self) -> bool:
        """Whether the server could write it. Raises LegacyUnavailable or BridgeError."""
        try:
            if self._connection is None:
                self._connection = legacy.connect(self._dsn, purpose="heartbeat", autocommit=True)
            with legacy.translated():
                statement = _WRITE_17 if self._connection.info.server_version >= 170000 else _WRITE
                row = self._connection.execute(statement, [PREFIX, self._beats.content()]).fetchone()
                return row is not None and row[0] is not None
        except BridgeError:
            self._drop()
            raise

    def _say(self, trouble: str, hint: str) -> None:
        """Log a change of state, not each of its heartbeats."""
        if trouble and not self._trouble:
            _log.warning("no heartbeat can be written; the forward path goes on", reason=trouble, hint=hint or None)
        elif self._trouble and not trouble:
            _log.info("heartbeats are written again")
        self._trouble = trouble

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
