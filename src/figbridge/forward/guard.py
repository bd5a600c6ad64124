"""The tripwire on the slot: is it the one we left, and does it stand where we left it?

    connect ─▶ look: there, ours, readable? ─▶ START_REPLICATION ─▶ take: where we left it? ─▶ stream
    acknowledge F ─▶ permit: F ≤ bound ─▶ sent
                        └─ F > bound ─▶ held, until a higher bound is committed ─▶ sent

The slot is the only forward state, so a process that starts cannot know whether somebody dropped it and made it again
meanwhile, or confirmed changes that nobody published. A row of figbridge.slot_guard remembers, where our schema exists.

INVARIANT. `bound` is committed, and flushed, before anything beyond the previous one is acknowledged; so on one
timeline the slot never stands beyond the row's `bound` by our doing, whatever is killed when. Nothing is acknowledged
before `take` has put this process's name into the row, so a row that carries our name says that no other replica has
confirmed anything since, and what this process knows by heart is exact. `take` runs while we hold the slot: nobody can
move it then. `tests/unit/test_guard.py` walks through crashes, take-overs and failovers at random: never a false alarm.

WHAT IT CANNOT NOTICE. After a soft stop the bound is exact. After a kill it lies ahead of what was acknowledged by two
seconds of our own progress, at least 64 KiB, at most 64 MiB: a slot that was advanced by less, or made anew before
that much WAL was written, passes. After a failover a new process can only say that the slot does not stand behind the
promotion, because its row may be older than the slot. A slot behind our place is no alarm: a server that crashed may
have forgotten the last confirmation, and changes come again under their ids. A server that was restored from a copy of
its disks, with our row in it, is noticed only by a process that ran before and after.
Without the table all of that holds for one process, and a process that starts takes the slot as it is.

What it refuses to do: be an offset. Reading never starts from the row.
"""

import contextlib
import threading
import time
from collections.abc import Callable

import psycopg
import structlog

from figbridge import legacy
from figbridge.change import Lsn
from figbridge.errors import BridgeError, LegacyUnavailable, SlotGap, SlotInUse, SlotLost, SourceDisconnected
from figbridge.forward.bound import UNBOUND, Bound
from figbridge.forward.incarnation import Incarnation, Note, Place
from figbridge.forward.source import Identity, ReplicationSource
from figbridge.preflight import catalogue, stream
from figbridge.preflight.catalogue import Slot

_log = structlog.get_logger()

_UNREAD = 10.0  # seconds without reading; a sink that is merely slow makes room again sooner


class SlotGuard:
    """What is known of one slot, by heart and, with `table`, in figbridge.slot_guard."""

    def __init__(self, dsn: str, slot: str, *, table: bool) -> None:
        self._dsn = dsn
        self.slot = slot
        self._table = table
        self._incarnation = Incarnation(slot, table=table)
        self._moving = threading.Lock()
        self.in_danger = False  # of being lost at the next checkpoint, when it was looked at last
        self.bound = Bound()
        self.streaming = False
        self.taken = 0  # how often this process has begun to stream
        self.wanted = threading.Event()  # the bound should be raised now

    @property
    def identity(self) -> Identity | None:
        """The server that this process streams from, or last did."""
        return self._incarnation.identity

    def outdone(self) -> None:
        """Somebody else was seen to hold the slot."""
        self._incarnation.others = True

    def connect(self) -> psycopg.Connection:
        """An ordinary connection for this guard. Raises LegacyUnavailable or BridgeError."""
        return legacy.connect(self._dsn, purpose="slot-guard", autocommit=True, patience=legacy.BRIEF)

    def look(self, connection: psycopg.Connection) -> Slot:
        """The slot, if it is there, ours, and has its WAL. Raises SlotGap or SlotLost with what to do."""
        slot = catalogue.slot(connection, self.slot)
        if slot is None:
            raise SlotGap(
                f"replication slot {self.slot!r} does not exist",
                hint="if it never did: `figbridge init`. If it was dropped, or a failover led to a server that does "
                "not have it, changes since then are in no event: `figbridge init` makes a new one, then copy the "
                "tables anew; docs/failover.md says how a slot survives a failover",
            )
        findings = stream.unreadable(slot)
        self.in_danger = bool(findings)
        for finding in findings:
            if finding.level == "error":
                kind = SlotGap if stream.is_lost(slot) else SlotLost
                raise kind(f"{finding.where} {finding.what}", hint=finding.remedy)
            _log.warning("the slot is in danger", slot=self.slot, what=finding.what, hint=finding.remedy)
        return slot

    def take(self, connection: psycopg.Connection, identity: Identity, start: Lsn) -> None:
        """Compare, adopt, and write our name into the row. Call while this process holds the slot, before the stream.

        `start` is the furthest that this process has read. Raises SlotLost or SourceError with what to do;
        LegacyUnavailable when `connection` leads to another server than the stream, which passes.
        """
        place = place_of(connection)
        place.require(identity)
        confirmed = self.look(connection).confirmed or Lsn(0)
        note = self._read(connection) if self._table else None
        self._incarnation.judge(
            identity,
            end=place.end,
            confirmed=confirmed,
            note=note,
            start=start,
            acknowledged=self.bound.acknowledged,
        )
        if self._table and note is None:
            _log.info("the slot is watched from here on", slot=self.slot, confirmed=str(confirmed))
        with self._moving:
            self.bound.freeze(confirmed)
            self._incarnation.identity, self._incarnation.others = identity, False
            self._move(connection, self.bound.target(time.monotonic()), taking=True)
            self.streaming = True
            self.taken += 1

    def require_ours(self, connection: psycopg.Connection, identity: Identity, start: Lsn) -> None:
        """Say nothing when a new slot at that server is one of the same database. Raises as `take`."""
        place = place_of(connection)
        place.require(identity)
        note = self._read(connection) if self._table else None
        reached = max(start, self.bound.acknowledged)
        self._incarnation.require_ours(identity, end=place.end, note=note, reached=reached)

    def renewed(self, identity: Identity, confirmed: Lsn) -> None:
        """The slot begins anew at `confirmed`, and nothing is said of it in the table."""
        self._incarnation.identity, self._incarnation.others = identity, False
        self.bound.freeze(confirmed)

    def permit(self, lsn: Lsn) -> Lsn:
        """As `Bound.permit`; asks for a higher bound in good time. Never waits."""
        permitted = self.bound.permit(lsn)
        if self.bound.short:
            self.wanted.set()
        return permitted

    def move(self, connection: psycopg.Connection, place: Place) -> None:
        """Commit a bound that fits, then let acknowledgements up to it through.

        Raises LegacyUnavailable, also when `connection`, which is at `place`, is not to the server of the stream;
        BridgeError.
        """
        with self._moving:
            self.wanted.clear()
            place.require(self.identity)
            self._move(connection, self.bound.target(time.monotonic()))

    def settle(self, connection: psycopg.Connection, place: Place) -> None:
        """Commit what was acknowledged as the bound: nothing more will be. Raises as `move`."""
        with self._moving:
            place.require(self.identity)
            self._move(connection, self.bound.exact())

    def _move(self, connection: psycopg.Connection, target: Lsn, *, taking: bool = False) -> None:
        if not self._table:
            self.bound.lift(UNBOUND)
        elif self._write(connection, target, taking=taking):
            self.bound.lift(target)
        else:
            _log.warning("another replica has taken the slot", slot=self.slot)

    def _read(self, connection: psycopg.Connection) -> Note | None:
        row = connection.execute(
            "SELECT system_identifier, timeline, holder, acknowledged::text, bound::text "
            "FROM figbridge.slot_guard WHERE slot = %s",
            [self.slot],
        ).fetchone()
        if row is None:
            return None
        system, timeline, holder, acknowledged, bound = row
        return Note(system, timeline, holder, Lsn.parse(acknowledged), Lsn.parse(bound))

    def _write(self, connection: psycopg.Connection, bound: Lsn, *, taking: bool) -> bool:
        """Commit the row; False when another replica's name is in it and we are not `taking` the slot from it.

        A replica that lost its connection may find that out late. What it would write then is of no use and would raise
        a false alarm.
        """
        identity = self._incarnation.identity
        if identity is None:
            return False
        with connection.transaction():
            # an application that is kept from writing, by default_transaction_read_only, still has changes to deliver
            connection.execute("SET TRANSACTION READ WRITE")
            # flushed here, whatever the role's default is; a synchronous standby that is away must not hold us up
            connection.execute("SET LOCAL synchronous_commit = 'local'")
            connection.execute("SET LOCAL lock_timeout = '2s'; SET LOCAL statement_timeout = '5s'")
            mine = "" if taking else "WHERE g.holder = excluded.holder"
            written = connection.execute(
                "INSERT INTO figbridge.slot_guard AS g "  # noqa: S608 (a constant of ours)
                "(slot, system_identifier, timeline, holder, acknowledged, bound) VALUES (%s, %s, %s, %s, %s, %s) "
                "ON CONFLICT (slot) DO UPDATE SET system_identifier = excluded.system_identifier, "
                "timeline = excluded.timeline, holder = excluded.holder, acknowledged = excluded.acknowledged, "
                f"bound = excluded.bound, updated_at = now() {mine}",
                [
                    self.slot, identity.system_identifier, identity.timeline, self._incarnation.holder,
                    str(self.bound.acknowledged), str(bound),
                ],
            )  # fmt: skip
            return written.rowcount == 1


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
        """Close a connection that is not read while the slot is about to be lost.

        The checkpoint that takes the slot away waits until its walsender has ended, and a walsender whose client reads
        nothing cannot end: it has a last message to send. No checkpoint of the legacy server may wait for our sink.
        """
        now, self.in_danger = time.monotonic(), self._guard.in_danger
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


def place_of(connection: psycopg.Connection) -> Place:
    """Ask it. Raises LegacyUnavailable on a standby, which has no timeline of its own."""
    try:
        row = connection.execute(
            # the first eight digits of a WAL file's name are the timeline it was written on
            "SELECT system_identifier::text, left(pg_walfile_name(pg_current_wal_flush_lsn()), 8), "
            "pg_current_wal_flush_lsn()::text FROM pg_control_system()"
        ).fetchone()
    except psycopg.errors.ObjectNotInPrerequisiteState as error:
        raise LegacyUnavailable("the legacy database is a standby at this moment") from error
    if row is None:
        raise LegacyUnavailable("the server did not say who it is")
    return Place(row[0], int(row[1], 16), Lsn.parse(row[2]))
