"""The replication connection behind the tripwire: looks before it reads, acknowledges no more than `guard` permits.

What it does not do: judge. That is `figbridge.forward.guard`.
"""

import contextlib
import time
from collections.abc import Callable
from typing import Final

import psycopg
import structlog

from figbridge import legacy
from figbridge.change import Lsn
from figbridge.errors import BridgeError, SlotGap, SlotInUse, SlotLost, SourceDisconnected
from figbridge.forward.guard import SlotGuard, place_of
from figbridge.forward.incarnation import Place
from figbridge.forward.source import ReplicationSource
from figbridge.preflight import catalogue

_log = structlog.get_logger()

_UNREAD: Final = 10.0  # seconds without reading; a sink that is merely slow makes room again sooner
_LAST: Final = 5.0  # seconds to take and confirm what a server that shuts down has still to send

# Makes a slot in the place of one that is lost and orders the backfill; where the slot begins. Raises BridgeError.
Recreate = Callable[[SlotGap], Lsn]


class GuardedSource(ReplicationSource):
    """A replication source whose place is compared when it connects, and which acknowledges within the bound.

    With `recreate` a gap in this database's own history is none to stop for.
    """

    def __init__(
        self,
        dsn: str,
        slot: str,
        publications: tuple[str, ...],
        guard: SlotGuard,
        *,
        recreate: Recreate | None = None,
    ) -> None:
        super().__init__(dsn, slot, publications)
        self._guard = guard
        self._recreate = recreate
        self._asked = (Lsn(0), Lsn(0))
        self._sent = Lsn(0)
        self._unread_since = 0.0
        self._ending_since = 0.0

    @property
    def recreates(self) -> bool:
        """Whether `connect` makes a lost slot anew."""
        return self._recreate is not None

    def connect(self, start: Lsn) -> None:
        """As `ReplicationSource.connect`. Raises LegacyUnavailable too, and SlotLost for a slot that was moved."""
        try:
            self._connect(start)
        except SlotGap as gap:
            if self._recreate is None:
                raise
            identity = self.identify()
            with self._guard.connect() as connection, legacy.translated():
                self._guard.require_ours(connection, identity, start)
            self._guard.renewed(identity, self._recreate(gap))
            self._connect(start)

    def _connect(self, start: Lsn) -> None:
        self.disconnect()  # the slot must not be held by ourselves, nor while we try to get through
        self._unread_since = time.monotonic()
        with self._guard.connect() as connection, legacy.translated():
            self._guard.look(connection)
            try:
                self._require_free(connection)
                super().connect(start)
                self._guard.take(connection, self.identity, start)
            except SlotInUse:
                self._guard.outdone()
                raise
            except BaseException as error:
                self.disconnect()  # whoever waits for the slot must not wait for our next try
                if isinstance(error, SlotLost) and not isinstance(error, SlotGap):
                    self._guard.look(connection)  # it may have been lost between the look and the stream
                raise

    def _require_free(self, connection: psycopg.Connection) -> None:
        """Name who is in the way, at the price of one statement; START_REPLICATION would only name its pid.

        Nobody is terminated: a walsender with our name may belong to a replica in good health, and if its client is
        dead or frozen the server ends it after its session's wal_sender_timeout.
        """
        if holder := catalogue.holder(connection, self._guard.slot):
            pid, who = holder
            raise SlotInUse(
                f"replication slot {self._guard.slot!r} is in use by {who}",
                hint="one bridge at a time reads a slot; this one waits and takes over when the other is gone, or has "
                "been silent for its wal_sender_timeout. Only if you know that it is no bridge of yours: "
                f"SELECT pg_terminate_backend({pid})",
            )

    def send_status(self, *, written: Lsn, flushed: Lsn) -> None:
        """As `ReplicationSource.send_status`, within the bound. What it holds back, `wait` sends as soon as it may."""
        self._asked = (written, flushed)
        self._sent = self._guard.permit(flushed)
        super().send_status(written=written, flushed=self._sent)

    def wait(self, timeout: float, *, reading: bool) -> None:
        """As `ReplicationSource.wait`."""
        if self._asked[1] > self._sent and self._guard.permit(self._asked[1]) > self._sent:
            self.send_status(written=self._asked[0], flushed=self._asked[1])
        self._let_go(reading=reading)
        super().wait(timeout, reading=reading)

    def _let_go(self, *, reading: bool) -> None:
        """Close a connection that is not read while the slot is about to be lost, and one that holds up a shutdown.

        The checkpoint that takes the slot away waits until its walsender has ended, and a walsender whose client reads
        nothing cannot end: it has a last message to send. No checkpoint of the legacy server may wait for our sink.
        Nor may its shutdown: that waits, without an end, until we have confirmed all that there is.
        """
        now, self.in_danger = time.monotonic(), self._guard.in_danger
        if not self._guard.shutting_down:
            self._ending_since = now
        elif now - self._ending_since > _LAST:
            self.disconnect()
            raise SourceDisconnected(
                "the server shuts down, and waits for what the sink has not taken yet",
                hint="nothing is lost: the slot keeps our place. The bridge comes back with the server",
            )
        if reading:
            self._unread_since = now
        elif self.in_danger and now - self._unread_since > _UNREAD:
            self.disconnect()
            raise SourceDisconnected(
                "the slot is about to be lost, and nothing is read because the sink takes nothing: a checkpoint would "
                "wait for this connection",
                hint="mend the sink. The bridge comes back when there is room for what it reads",
            )

    def finish(self, *, timeout: float = 5.0) -> None:
        """As `ReplicationSource.finish`; what was held is sent first, and the bound is exact afterwards."""
        if self._asked[1] > self._sent:
            self._note(self._guard.move)
            with contextlib.suppress(BridgeError):  # the end has come anyway; it is repeated, not lost
                self.send_status(written=self._asked[0], flushed=self._asked[1])
        super().finish(timeout=timeout)
        self._note(self._guard.settle)

    def disconnect(self) -> None:
        """As `ReplicationSource.disconnect`."""
        self._guard.streaming = False
        super().disconnect()

    def _note(self, write: Callable[[psycopg.Connection, Place], None]) -> None:
        try:
            with self._guard.connect() as connection, legacy.translated():
                write(connection, place_of(connection))
        except BridgeError as error:
            _log.warning("the slot's guard was not written", error=str(error), hint="a wider bound stays in force")
