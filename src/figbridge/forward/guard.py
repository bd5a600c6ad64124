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
from collections.abc import Iterator, Mapping

import psycopg
import structlog
from psycopg import conninfo, pq

from figbridge import legacy
from figbridge.change import Lsn
from figbridge.errors import LegacyUnavailable, SlotGap, SlotLost
from figbridge.forward.bound import UNBOUND, Bound
from figbridge.forward.incarnation import Incarnation, Note, Place
from figbridge.forward.source import Identity
from figbridge.preflight import catalogue, membership, stream
from figbridge.preflight.catalogue import Slot
from figbridge.preflight.membership import Held

_log = structlog.get_logger()


class SlotGuard:
    """What is known of one slot, by heart and, with `table`, in figbridge.slot_guard."""

    def __init__(self, dsn: str, slot: str, *, table: bool) -> None:
        self._dsn = dsn
        self.slot = slot
        self._table = table
        self._incarnation = Incarnation(slot, table=table)
        self._held: dict[str, Held] = {}  # without the table
        self._moving = threading.Lock()
        self.in_danger = False  # of being lost at the next checkpoint, when it was looked at last
        self.shutting_down = False  # the server of the stream lets nobody in any more, and waits for us
        self.bound = Bound()
        self.streaming = False
        self.taken = 0  # how often this process has begun to stream
        self.wanted = threading.Event()  # the bound should be raised now

    @property
    def identity(self) -> Identity | None:
        """The server that this process streams from, or last did."""
        return self._incarnation.identity

    @property
    def acceptance(self) -> str:
        """The statement by which a human accepts the publications as they are; empty: it is enough to start again."""
        return membership.accepting(self.slot) if self._table else ""

    def outdone(self) -> None:
        """Somebody else was seen to hold the slot."""
        self._incarnation.others = True

    def connect(self) -> psycopg.Connection:
        """An ordinary connection for this guard. Raises LegacyUnavailable or BridgeError."""
        return legacy.connect(self._dsn, purpose="slot-guard", autocommit=True, patience=legacy.BRIEF)

    def turned_away(self) -> bool:
        """Whether the server says of itself that it lets nobody in now (57P03): it stops, or starts.

        libpq alone knows: while a connection is being opened it gives no SQLSTATE away, and the text may be in any
        language. https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PQPING
        """
        dsn = conninfo.make_conninfo(self._dsn, **legacy.socket_settings(self._dsn))
        return pq.PGconn.ping(dsn.encode()) == pq.Ping.REJECT

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
            self.streaming, self.shutting_down = True, False
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

    def held(self, connection: psycopg.Connection) -> dict[str, Held]:
        """Publication → what is remembered of it."""
        return membership.read(connection, self.slot) if self._table else self._held

    def remember(self, connection: psycopg.Connection, held: Mapping[str, Held]) -> None:
        """Instead of what was remembered; in the table only while our name is in it."""
        self._held = dict(held)
        if self._table:
            with _durable(connection):
                connection.execute(
                    "UPDATE figbridge.slot_guard SET published = %s WHERE slot = %s AND holder = %s",
                    [membership.dump(held), self.slot, self._incarnation.holder],
                )

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
        with _durable(connection):
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


@contextlib.contextmanager
def _durable(connection: psycopg.Connection) -> Iterator[None]:
    with connection.transaction():
        # an application that is kept from writing, by default_transaction_read_only, still has changes to deliver
        connection.execute("SET TRANSACTION READ WRITE")
        # flushed here, whatever the role's default is; a synchronous standby that is away must not hold us up
        connection.execute("SET LOCAL synchronous_commit = 'local'")
        connection.execute("SET LOCAL lock_timeout = '2s'; SET LOCAL statement_timeout = '5s'")
        yield


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
