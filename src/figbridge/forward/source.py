"""The replication connection: COPY BOTH over psycopg, and the only file that knows psycopg.pq.

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
from psycopg import conninfo, pq, sql

from figbridge.change import Lsn
from figbridge.errors import BridgeError, SlotInUse, SlotLost, SourceDisconnected, SourceError

XLOG_DATA: Final = ord("w")
KEEPALIVE: Final = ord("k")
PAYLOAD: Final = 25  # where the payload of an XLogData begins: type, start LSN, end LSN, send time

_KEEPALIVE: Final = struct.Struct(">xQqB")  # end LSN, send time, reply requested
_STATUS: Final = struct.Struct(">cQQQqB")  # 'r', written, flushed, applied, time, reply requested
_EPOCH_SECONDS: Final = 946_684_800  # 2000-01-01, the protocol's epoch

# What `values` relies on. The walsender prints values under these settings of its session.
_SETTINGS: Final = (
    "-c datestyle=ISO -c intervalstyle=postgres -c extra_float_digits=3 -c bytea_output=hex -c timezone=UTC "
    "-c statement_timeout=0 -c idle_session_timeout=0"
)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who the server is, and its history: (timeline, the LSN where it ended), oldest first, without the current one."""

    system_identifier: str
    timeline: int
    ended: tuple[tuple[int, Lsn], ...]

    def timeline_of(self, lsn: Lsn) -> int:
        """The timeline on which a record that starts at `lsn` was written."""
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
        self.identity = Identity("", 0, ())
        self.sender_timeout = 60.0

    def connect(self, start: Lsn) -> None:
        """Open the stream behind `start`, or where the slot stands if that is further.

        The server never goes back behind the slot's confirmed_flush_lsn, and skips nothing but transactions that
        ended at or before `start`.
        Raises SourceDisconnected or SlotInUse (try again), SlotLost or SourceError.
        """
        self.disconnect()
        try:
            own = conninfo.conninfo_to_dict(self._dsn).get("options") or ""
            self._connection = psycopg.connect(
                self._dsn,
                replication="database",
                autocommit=True,
                application_name=f"figbridge-{self._slot}",
                connect_timeout=10,
                client_encoding="UTF8",
                options=f"{own} {_SETTINGS}".strip(),
            )
            self.identity = self._identify(self._connection)
            self.sender_timeout = self._sender_timeout(self._connection)
            self._start(self._connection, start)
        except psycopg.Error as error:
            self.disconnect()
            raise self._translate(error.sqlstate, str(error)) from error

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

    @staticmethod
    def _sender_timeout(connection: psycopg.Connection) -> float:
        row = connection.execute("SELECT setting::int FROM pg_settings WHERE name = 'wal_sender_timeout'").fetchone()
        return row[0] / 1000 if row and row[0] else 60.0  # 0 is "never"

    def _start(self, connection: psycopg.Connection, start: Lsn) -> None:
        names = ",".join('"' + name.replace('"', '""') + '"' for name in self._publications)
        command = sql.SQL("START_REPLICATION SLOT {} LOGICAL {} (proto_version '1', publication_names {})").format(
            sql.Identifier(self._slot), sql.SQL(str(start)), sql.Literal(names)
        )
        connection.execute(command)
        self._streaming = True
        if connection.pgconn.transaction_status != pq.TransactionStatus.ACTIVE:
            raise SourceError("the server answered START_REPLICATION without starting a stream")

    @property
    def _pgconn(self) -> "pq.abc.PGconn":
        if self._connection is None:
            raise SourceDisconnected("there is no replication connection")
        return self._connection.pgconn

    def receive(self) -> bytes | None:
        """The next message that has already arrived, an XLogData or a keepalive; None when there is none yet.

        Raises SourceDisconnected when the stream is over, SlotLost or SourceError when the server ended it with one.
        """
        try:
            size, data = self._pgconn.get_copy_data(1)
        except psycopg.Error as error:
            raise self._translate(error.sqlstate, str(error)) from error
        if size > 0:
            return bytes(data)
        if size == 0:
            return None
        raise self._ended()

    def wait(self, timeout: float, *, reading: bool) -> None:
        """Return when data arrived (only if `reading`), `wake` was called, or after `timeout` seconds.

        With `reading` False the socket is left alone: TCP then pushes back on the walsender, while status updates
        still reach it. Raises SourceDisconnected.
        """
        pgconn = self._pgconn
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        events = (select.POLLIN if reading else 0) | (select.POLLOUT if self._unsent else 0)
        if events:
            poll.register(pgconn.socket, events)
        ready = dict(poll.poll(max(0.0, timeout) * 1000))
        if self._wake_read in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_read, 65536)
        try:
            if ready.get(pgconn.socket, 0) & ~select.POLLOUT:
                pgconn.consume_input()
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
        message = _STATUS.pack(b"r", max(written, flushed), flushed, flushed, now, 0)
        try:
            self._pgconn.put_copy_data(message)
            self._unsent = self._pgconn.flush() != 0
        except psycopg.Error as error:
            raise self._translate(error.sqlstate, str(error)) from error

    def finish(self, *, timeout: float = 5.0) -> None:
        """Say CopyDone and wait until the server has read all we said; then the last status is surely in the slot."""
        deadline = time.monotonic() + timeout
        try:
            self._pgconn.put_copy_end()
            self._unsent = self._pgconn.flush() != 0
            while (left := deadline - time.monotonic()) > 0:
                while self.receive() is not None:
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

    def _ended(self) -> SourceError:
        result = self._pgconn.get_result()
        if result is None or result.status != pq.ExecStatus.FATAL_ERROR:
            return SourceDisconnected("the server ended the stream", hint="it is probably shutting down")
        state = result.error_field(pq.DiagnosticField.SQLSTATE)
        return self._translate(state.decode() if state else None, result.error_message.decode(errors="replace"))

    def _translate(self, state: str | None, message: str) -> SourceError:
        """SQLSTATE → what the caller must do. https://www.postgresql.org/docs/current/errcodes-appendix.html"""
        text = message.strip()
        match state:
            case "55006":
                return SlotInUse(
                    f"replication slot {self._slot!r} is in use: {text}",
                    hint="one bridge at a time reads a slot; this one waits and takes over when the other is gone",
                )
            case "42704" if self._streaming:  # the slot was there to start with: pgoutput misses its publication
                return SourceError(
                    text,
                    hint="the publication must be older than the slot. If it was dropped, create it again with "
                    "`figbridge init`; if the slot is older, only a new slot helps, and a gap must be filled",
                )
            case "42704" | "55000" | "58P01":
                return SlotLost(
                    f"replication slot {self._slot!r} cannot be read: {text}",
                    hint="if it never existed: `figbridge init`. If it was dropped or invalidated, changes since its "
                    "last confirmed position are gone from the WAL: create it again and reload the tables",
                )
            case "0A000" | "42501" | "42601" | "22023":
                return SourceError(text, hint="`figbridge check` says what is missing")
            case _:
                return SourceDisconnected(f"no replication connection: {text}", hint="the slot keeps our place")


def read_keepalive(message: bytes) -> tuple[Lsn, bool]:
    """(the server's end of WAL, whether it wants a status update at once) of a keepalive."""
    end, _, reply = _KEEPALIVE.unpack(message)
    return Lsn(end), bool(reply)


def _as_text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
