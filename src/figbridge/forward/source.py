"""The replication connection: COPY BOTH over psycopg.

psycopg enters COPY BOTH with an ordinary ``execute`` since 3.3 but offers nothing beyond, so the conversation after it
is held on the `pgconn` itself: non-blocking reads, status updates, one thread.

https://www.postgresql.org/docs/current/protocol-replication.html

What it does not do: decode, or decide what may be acknowledged.
"""

import contextlib
import os
import re
import select
import struct
import time
from dataclasses import dataclass
from typing import Final

import psycopg
import structlog
from psycopg import conninfo, pq, sql

from figbridge import legacy
from figbridge.change import Lsn
from figbridge.errors import BridgeError, DecodeError, SourceDisconnected, SourceError
from figbridge.forward.interruption import meaning
from figbridge.forward.liveness import Liveness
from figbridge.preflight import catalogue

_log = structlog.get_logger()

XLOG_DATA: Final = ord("w")
KEEPALIVE: Final = ord("k")
CHUNK_MESSAGES: Final = 1000
CHUNK_BYTES: Final = 512 * 1024
PAYLOAD: Final = 25  # where the payload of an XLogData begins: type, start LSN, end LSN, send time

_KEEPALIVE: Final = struct.Struct(">xQqB")  # end LSN, send time, reply requested
_STATUS: Final = struct.Struct(">cQQQqB")  # 'r', written, flushed, applied, time, reply requested
_EPOCH_SECONDS: Final = 946_684_800  # 2000-01-01, the protocol's epoch

# What `values` and `_hear` rely on. The walsender prints values under these settings of its session.
SETTINGS: Final = (
    "-c datestyle=ISO -c intervalstyle=postgres -c extra_float_digits=3 -c bytea_output=hex -c timezone=UTC "
    "-c statement_timeout=0 -c idle_session_timeout=0 -c client_min_messages=warning"
)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who the server is, and its history: (timeline, the LSN where it ended), oldest first, without the current one."""

    system_identifier: str
    timeline: int
    ended: tuple[tuple[int, Lsn], ...]

    def timeline_of(self, lsn: Lsn) -> int:
        """The timeline on which a record that starts at `lsn` was written."""
        if not self.ended:  # asked for each transaction
            return self.timeline
        return next((timeline for timeline, end in self.ended if lsn < end), self.timeline)


class ReplicationSource:
    """One replication slot's stream. All methods belong to one thread, except `wake`."""

    def __init__(self, dsn: str, slot: str, publications: tuple[str, ...]) -> None:
        self._dsn = dsn
        self._slot = slot
        self._publications = publications
        self._connection: psycopg.Connection | None = None
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._unsent = False
        self._streaming = False
        self._over = False  # the server has ended the stream
        self._left_out = ""  # what the server said when it left changes out
        self._dry = True  # the last `receive` took all that had arrived
        self.in_danger = False  # whether the slot will be lost at the next checkpoint, as far as somebody has looked
        self.acknowledged = Lsn(0)  # what the server was told last that it may forget
        self.server_end = Lsn(0)  # of its WAL, as far as others have asked; a client that does not read is not told
        self.identity = Identity("", 0, ())
        self._liveness = Liveness()

    @property
    def sender_timeout(self) -> float:
        """Seconds after which the server ends this session if no status update comes; infinite when it never does."""
        return self._liveness.sender_timeout

    def connect(self, start: Lsn) -> None:
        """Open the stream behind `start`, or where the slot stands if that is further.

        The server never goes back behind the slot's confirmed_flush_lsn, and skips nothing but transactions that
        ended at or before `start`.
        Raises LegacyUnavailable, SourceDisconnected or SlotInUse (try again), SlotLost or SourceError.
        """
        self.disconnect()
        self.server_end = Lsn(0)
        try:
            self._connection = connection = self._opened()
            self.identity = self._identify(connection)
            self._limit(connection, start)
            self._start(connection, start)
        except psycopg.Error as error:
            self.disconnect()
            # without an SQLSTATE nobody got as far as a slot
            raise (
                self._translate(error.sqlstate, str(error)) if error.sqlstate else legacy.translate(error)
            ) from error

    def _opened(self) -> psycopg.Connection:
        own = conninfo.conninfo_to_dict(self._dsn).get("options") or ""
        connection = legacy.Connection.connect(
            self._dsn,
            replication="database",
            autocommit=True,
            application_name=f"figbridge-{self._slot}",
            client_encoding="UTF8",
            options=f"{own} {SETTINGS}".strip(),
            **legacy.socket_settings(self._dsn),  # type: ignore[arg-type]  # libpq's own parameters
        )
        connection.add_notice_handler(self._hear)
        connection.patience = legacy.BRIEF  # whoever lets us in and then says nothing must not hold us for ever
        return connection

    def identify(self) -> Identity:
        """Who the server is at this moment, without a stream. Raises LegacyUnavailable, SourceError."""
        try:
            with self._opened() as connection:
                return self._identify(connection)
        except psycopg.Error as error:
            raise legacy.translate(error) from error

    @staticmethod
    def _identify(connection: psycopg.Connection) -> Identity:
        row = connection.execute("IDENTIFY_SYSTEM").fetchone()
        if row is None:
            raise SourceError("IDENTIFY_SYSTEM returned nothing: this is not a PostgreSQL walsender")
        system, timeline = str(row[0]), int(row[1])
        ended: tuple[tuple[int, Lsn], ...] = ()
        if timeline > 1:  # the first timeline has no history file
            history = connection.execute(sql.SQL("TIMELINE_HISTORY {}").format(sql.Literal(timeline))).fetchone()
            content = history[1] if history else b""
            lines = re.findall(r"^(\d+)\s+([0-9A-F]+/[0-9A-F]+)", _as_text(content), re.MULTILINE)
            ended = tuple((int(number), Lsn.parse(lsn)) for number, lsn in lines)
        return Identity(system, timeline, ended)

    def _limit(self, connection: psycopg.Connection, start: Lsn) -> None:
        configured, chosen = catalogue.sender_timeout(connection)
        wanted = self._liveness.opened(start, configured, chosen=chosen)
        if wanted is not None:
            milliseconds = sql.Literal(int(wanted * 1000))
            connection.execute(sql.SQL("SET wal_sender_timeout = {}").format(milliseconds))

    def _start(self, connection: psycopg.Connection, start: Lsn) -> None:
        names = ",".join('"' + name.replace('"', '""') + '"' for name in self._publications)
        # by hand: of a backslash psycopg makes an E'…', which the walsender's grammar does not have, nor needs
        quoted = sql.SQL("'" + names.replace("'", "''") + "'")
        # logical messages since 14; an older server would refuse the option
        messages = sql.SQL(", messages 'true'" if connection.info.server_version >= 140000 else "")
        command = sql.SQL("START_REPLICATION SLOT {} LOGICAL {} (proto_version '1', publication_names {}{})").format(
            sql.Identifier(self._slot), sql.SQL(str(start)), quoted, messages
        )
        self._left_out = ""
        connection.execute(command)
        self._streaming, self._over, self._dry = True, False, True
        self._liveness.streaming(time.monotonic())
        if connection.pgconn.transaction_status != pq.TransactionStatus.ACTIVE:
            raise SourceError("the server answered START_REPLICATION without starting a stream")

    @property
    def _pgconn(self) -> "pq.abc.PGconn":
        if self._connection is None:
            raise SourceDisconnected("there is no replication connection")
        return self._connection.pgconn

    def receive(self) -> list[bytes]:
        """The messages that have already arrived, each an XLogData or a keepalive; none when there is none yet.

        At most `CHUNK_MESSAGES`, and no more after `CHUNK_BYTES`: a call for each would cost as much as what is done
        with it, and a chunk without an end would have no bound in memory.
        Raises SourceDisconnected when the stream is over, SlotLost or SourceError when the server ended it with one.
        """
        if self._over:
            raise self._ended()
        get, room, size = self._pgconn.get_copy_data, CHUNK_BYTES, 0
        messages: list[bytes] = []
        append = messages.append
        self._dry = False
        try:
            for _ in range(CHUNK_MESSAGES):
                size, data = get(1)
                if size == 0:  # nothing whole in libpq's buffer; what has come meanwhile needs no poll
                    self._pgconn.consume_input()
                    size, data = get(1)
                if size <= 0:
                    self._dry = True
                    break
                append(bytes(data))
                room -= size
                if room <= 0:
                    break
        except psycopg.Error as error:
            raise self._translate(error.sqlstate, str(error)) from error
        if self._left_out:  # whatever came with it is not acknowledged, so the next stream is told the same
            raise self._translate("42704", self._left_out)
        if size < 0:
            self._over = True  # why, only the first question is told; what came before it is whole
            if not messages:
                raise self._ended()
        return messages

    def wait(self, timeout: float, *, reading: bool) -> None:
        """Return when `receive` has something (only if `reading`), `wake` was called, or after `timeout` seconds.

        With `reading` False the socket is left alone: TCP then pushes back on the walsender, while status updates
        still reach it. Raises SourceDisconnected, also when the server has been silent for too long.

        It reads nothing itself: libpq would double its buffer, and keep it so, for what nobody takes out of it.
        """
        more = reading and not self._dry  # in libpq's buffer, where poll cannot see it
        pgconn, timeout = self._pgconn, 0.0 if more else max(0.0, timeout)
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        events = (select.POLLIN if reading else 0) | (select.POLLOUT if self._unsent else 0)
        if events:
            poll.register(pgconn.socket, events)
        ready = dict(poll.poll(timeout * 1000))
        if self._wake_read in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_read, 65536)
        try:
            if more or not reading or ready.get(pgconn.socket, 0) & select.POLLIN:
                self._liveness.heard()
            if not reading and ready.get(pgconn.socket, 0) & ~select.POLLOUT:
                pgconn.consume_input()  # says why the connection has ended, which is all that poll tells unasked
            elif reading and not ready and self._liveness.is_dead(timeout):
                raise self._translate(None, "the server is silent")
            if self._unsent:
                self._unsent = pgconn.flush() != 0
        except psycopg.Error as error:
            raise self._translate(error.sqlstate, str(error)) from error

    def wake(self) -> None:
        """Make `wait` return now. The only method that other threads may call; also after `close`."""
        with contextlib.suppress(BlockingIOError, OSError):  # a full pipe wakes as well as an empty one
            os.write(self._wake_write, b"\0")

    def send_status(self, *, written: Lsn, flushed: Lsn) -> None:
        """A standby status update. The server may forget everything up to `flushed`. Raises SourceDisconnected."""
        now = int((time.time() - _EPOCH_SECONDS) * 1_000_000)
        message = _STATUS.pack(b"r", max(written, flushed), flushed, flushed, now, self._liveness.asks)
        self._liveness.said(time.monotonic())
        try:
            self._pgconn.put_copy_data(message)
            self._unsent = self._pgconn.flush() != 0
        except psycopg.Error as error:
            raise self._translate(error.sqlstate, str(error)) from error
        self.acknowledged = flushed

    def finish(self, *, timeout: float = 5.0) -> None:
        """Say CopyDone and wait until the server has read all we said; then the last status is surely in the slot."""
        deadline = time.monotonic() + timeout
        try:
            self._pgconn.put_copy_end()
            self._unsent = self._pgconn.flush() != 0
            while (left := deadline - time.monotonic()) > 0:
                while self.receive():
                    pass  # what the server had sent before it read our CopyDone; unacknowledged, so it comes again
                self.wait(left, reading=True)
        except (BridgeError, psycopg.Error):
            pass  # the end of the stream is what we are waiting for, in whichever words it comes
        finally:
            self.disconnect()

    def disconnect(self) -> None:
        """Drop the connection; the slot keeps our place."""
        self._streaming = False
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def close(self) -> None:
        """Drop the connection and the wake pipe. May be called twice."""
        self.disconnect()
        if self._wake_read >= 0:
            os.close(self._wake_read)
            os.close(self._wake_write)
            self._wake_read = self._wake_write = -1

    def _hear(self, said: psycopg.errors.Diagnostic) -> None:
        """What the server says beside the stream, such as that it waits for a standby (synchronized_standby_slots).

        From 18 on it warns of a publication that is missing and leaves changes out, where an older one ends the stream.
        The function is what names the warning in every language; its SQLSTATE is that of a standby's warnings, too.
        """
        if said.severity_nonlocalized == "WARNING":
            text, detail, hint = said.message_primary, said.message_detail, said.message_hint
            _log.warning("the server warns", message=text, detail=detail, hint=hint)
            if said.source_function == "LoadPublications":
                self._left_out = f"{text} ({detail})"

    def _ended(self) -> SourceError:
        result = self._pgconn.get_result()
        if result is None or result.status != pq.ExecStatus.FATAL_ERROR:
            return SourceDisconnected("the server ended the stream", hint="it is probably shutting down")
        state = result.error_field(pq.DiagnosticField.SQLSTATE)
        return self._translate(state.decode() if state else None, result.error_message.decode(errors="replace"))

    def _translate(self, state: str | None, message: str) -> SourceError:
        why = self._liveness.ended(time.monotonic()) if self._streaming else ""
        return meaning(state, message.strip(), slot=self._slot, streaming=self._streaming, why=why)


def read_keepalive(message: bytes) -> tuple[Lsn, bool]:
    """(the server's end of WAL, whether it wants a status update at once) of a keepalive. Raises DecodeError."""
    if len(message) != _KEEPALIVE.size:
        raise DecodeError(f"a keepalive has {_KEEPALIVE.size} bytes", kind="k", offset=len(message))
    end, _, reply = _KEEPALIVE.unpack(message)
    return Lsn(end), bool(reply)


def _as_text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
