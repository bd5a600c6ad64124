"""The loop `slot-watch`: raises the guard's bound in time, and looks at slot and publication every minute.

It has an ordinary connection of its own and reads catalogues only, never a legacy table. What it finds wrong stops the
bridge with the remedy: a slot that is gone or lost, a DSN that leads elsewhere meanwhile, and a publication that was
made anew, misses a table of the file or an operation, or did since the last look (`membership`). From PostgreSQL 18 on
the server leaves the changes of such a table out without a word, and an operation on every version, so nobody else
would notice. What may be harmless, and what `figbridge check` only warns of, is in the log, once.

It is also the one to notice that the server shuts down: that ends idle connections like this loop's, but a walsender
only when its client has confirmed everything, which a sink that is away could hold up for ever (`GuardedSource`).

It judges only the server that the stream comes from. A replica that waits for the slot exports the slot's gauges too.
"""

import math
import select
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import psycopg
import structlog

from figbridge import legacy
from figbridge.change import Lsn
from figbridge.errors import LegacyUnavailable, SlotGap, SlotLost, SourceError
from figbridge.forward.guard import SlotGuard, place_of
from figbridge.forward.guarded import GuardedSource
from figbridge.forward.incarnation import Place
from figbridge.metrics import SLOT_STATUSES, Metrics
from figbridge.preflight import catalogue, membership, stream
from figbridge.preflight.catalogue import Name, Publication, Slot, Table, spell
from figbridge.preflight.finding import Finding
from figbridge.preflight.membership import Held
from figbridge.retry import persist

_log = structlog.get_logger()

EVERY: Final = 60.0  # seconds between two looks
_PACE: Final = 1.0  # seconds between two writes of the bound, at least
_TABLES: Final = ("r", "p")  # relkind of what a publication can hold


def _require(findings: Iterable[Finding], since: str = "") -> None:
    """Raise SourceError for the first one that is an error; `since` is added to its remedy."""
    for finding in findings:
        if finding.level == "error":
            raise SourceError(f"{finding.where} {finding.what}", hint=f"{finding.remedy} {since}".rstrip())


def _warn(finding: Finding) -> None:
    _log.warning("the publication was changed", what=f"{finding.where} {finding.what}", hint=finding.remedy)


class SlotWatch:
    """One loop beside the capture loop. `published` is publication → the tables and operations that must be in it."""

    name = "slot-watch"

    def __init__(
        self,
        guard: SlotGuard,
        source: GuardedSource,
        published: Mapping[str, tuple[Sequence[Name], Sequence[str]]],
        metrics: Metrics,
        *,
        every: float = EVERY,
    ) -> None:
        self._guard = guard
        self._source = source
        self._published = published
        self._metrics = metrics
        self._every = every
        self._connection: psycopg.Connection | None = None
        self._place: Place | None = None
        self._next_look = 0.0
        self._looked_at = 0
        self._seen: tuple[float, int] | None = None
        self._gone: set[Name] = set()  # tables of which the log has said so

    def run(self, stop: threading.Event) -> None:
        """Until `stop`. Raises SlotLost or SourceError with what to do."""
        try:
            while not stop.is_set():
                persist(self._round, what="watch the slot", stop=stop)
                if self._looked_at:  # what is changed before the first look is not noticed, so that one must not wait
                    stop.wait(_PACE)
                while not (stop.is_set() or self._guard.wanted.wait(0.2) or self._due()):
                    pass
        finally:
            self._drop()

    def _due(self) -> bool:
        return time.monotonic() >= self._next_look or self._guard.taken != self._looked_at or self._spoken_to()

    def _spoken_to(self) -> bool:
        """Whether the server has said something unasked over our idle connection, as when it ends it."""
        connection = self._connection
        return connection is not None and (
            connection.closed or bool(select.select([connection.pgconn.socket], [], [], 0)[0])
        )

    def _round(self) -> None:
        try:
            with legacy.translated():
                if self._due():
                    self._drop()  # its server may have been left behind: look at what the DSN means now
                    self._look(*self._connected())
                if self._guard.wanted.is_set() and self._guard.streaming:
                    self._guard.move(*self._connected())
                    self._source.wake()  # what was held back may go now
        except BaseException:
            self._drop()
            self._next_look = 0.0  # what was not seen is looked for at the next try
            raise

    def _connected(self) -> tuple[psycopg.Connection, Place]:
        if self._connection is None or self._place is None:
            try:
                self._connection = self._guard.connect()
            except LegacyUnavailable:
                if self._guard.streaming and self._guard.turned_away():
                    self._guard.shutting_down = True
                    self._source.wake()
                raise
            self._place = place_of(self._connection)
        return self._connection, self._place

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = self._place = None

    def _look(self, connection: psycopg.Connection, place: Place) -> None:
        self._next_look, self._looked_at = time.monotonic() + self._every, self._guard.taken
        self._measure(catalogue.slot(connection, self._guard.slot))
        ours = self._guard.identity
        if ours is None or not self._guard.streaming:
            return
        if place.system_identifier != ours.system_identifier:
            raise SlotLost(
                f"legacy.dsn leads to another cluster now: system identifier {place.system_identifier}, the stream is "
                f"from {ours.system_identifier}",
                hint="mend legacy.dsn, or the name it uses. If the application has moved there on purpose, its changes "
                "since then are in no event: drain the old cluster, then `figbridge init` on the new one",
            )
        if place.timeline != ours.timeline:
            _log.warning("another server was promoted", timeline=place.timeline, streaming_from=ours.timeline)
            return
        try:
            self._guard.look(connection)
        except SlotGap as gap:
            if not self._source.recreates:
                raise
            _log.warning("the stream ends: the slot is lost", error=str(gap))  # and `connect` will see to it
            return
        self._look_at_publications(connection)
        if self._guard.bound.loose:
            self._guard.move(connection, place)

    def _look_at_publications(self, connection: psycopg.Connection) -> None:
        before = self._guard.held(connection)
        now = {name: self._look_at(connection, name, before.get(name)) for name in self._published}
        if now != before:
            self._guard.remember(connection, now)

    def _look_at(self, connection: psycopg.Connection, name: str, before: Held | None) -> Held:
        """What to remember of it. Raises SourceError where changes may be in no event, or leave that must not."""
        tables, operations = self._published[name]
        with connection.transaction():  # one that is made anew meanwhile must not be seen without its tables
            connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            found = catalogue.publication(connection, name)
            there = catalogue.tables(connection, tables)
        if found is None:
            raise SourceError(f"publication {spell(name)} is gone", hint=membership.renewed(self._guard.slot))
        accept = self._guard.acceptance
        if before:
            _require(membership.gaps(name, found, tables, before, slot=self._guard.slot, accept=accept))
        _require(stream.too_wide(name, found), "Rows of tables that nobody named may have left since then.")
        _require(stream.narrow(name, found, operations), membership.consequence(tables, "the tables"))
        _require(stream.partitions(name, found, there), "Rows since then left under the names of the partitions.")
        self._look_for_missing(name, found, there, before)
        if before:
            for finding in membership.altered(name, found, before):
                _warn(finding)
            for table in sorted(found.tables.difference(tables, before.tables)):
                _warn(stream.unconfigured(name, table))
        return membership.held(found, tables, before)

    def _look_for_missing(
        self, publication: str, found: Publication, there: dict[Name, Table], before: Held | None
    ) -> None:
        tables, _ = self._published[publication]
        missing = [name for name in tables if name not in found.tables]
        names = {member.relation: spell(*name) for name, member in found.members.items()}
        left = {
            name: names[before.tables[name].relation]
            for name in missing
            if before and name in before.tables and before.tables[name].relation in names
        }
        # a table that was dropped for good has no changes; one that was made anew under its name has
        gone = {name for name in missing if name not in there}
        for name in sorted(gone - self._gone):
            _log.warning("a table of the file does not exist any more", table=spell(*name), renamed_to=left.get(name))
        self._gone = self._gone.difference(tables) | gone
        if others := [name for name in missing if name in there and there[name].kind not in _TABLES]:
            name = others[0]
            behind = f" The table that it was leaves as {left[name]}." if name in left else ""
            raise SourceError(
                f"{spell(*name)} is not a table any more, so publication {spell(publication)} does not publish it",
                hint="name the tables behind it in legacy.tables, then `figbridge init`. Changes since then of those "
                f"that were not published are in no event: copy them anew.{behind}",
            )
        if lacking := [name for name in missing if name in there]:
            raise SourceError(
                f"publication {spell(publication)} does not publish {', '.join(spell(*it) for it in lacking)} any more",
                hint="it was taken out, or the table was dropped and made anew: `figbridge init` adds it. "
                + membership.remedy(tables, self._guard.acceptance, lacking),
            )

    def _measure(self, slot: Slot | None) -> None:
        """Set the gauges. How long the slot lasts is its room by the rate of WAL since the last look."""
        metrics, now = self._metrics, time.monotonic()
        status = slot.wal_status if slot else None
        for each in SLOT_STATUSES:
            metrics.slot_status.labels(each).set(each == status)
        room = math.inf if slot is None or slot.safe is None else float(slot.safe)
        metrics.slot_retained.set(slot.retained or 0 if slot else 0)
        metrics.slot_room.set(room)
        before, self._seen = self._seen, None
        metrics.slot_seconds.set(math.inf)
        if slot and slot.restart is not None and slot.retained is not None:
            end = int(slot.restart) + slot.retained
            self._seen = (now, end)
            self._source.server_end = Lsn(end)
            if before and end > before[1] and now > before[0]:
                metrics.slot_seconds.set(max(0.0, room) * (now - before[0]) / (end - before[1]))
