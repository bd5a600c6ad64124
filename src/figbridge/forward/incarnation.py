"""One slot, one history: what a process knows by heart, what a row remembers, and the judgement; pure.

    same cluster? ─▶ same timeline, or one that grew out of it? ─▶ nothing read beyond its end? ─▶ confirmed by us only?

It refuses to guess: whatever cannot be told apart from a gap is one, and a human decides.
"""

import secrets
from dataclasses import dataclass

import structlog

from figbridge.change import Lsn
from figbridge.errors import LegacyUnavailable, SlotGap, SlotLost, SourceError
from figbridge.forward.source import Identity

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Note:
    """A row of figbridge.slot_guard."""

    system_identifier: str
    timeline: int
    holder: str
    acknowledged: Lsn
    bound: Lsn


@dataclass(frozen=True, slots=True)
class Place:
    """Which server an ordinary connection has reached, and the flushed end of its WAL."""

    system_identifier: str
    timeline: int
    end: Lsn

    def require(self, identity: Identity | None) -> None:
        """Raise LegacyUnavailable when the server of `identity` is another one.

        A name that moves, or several hosts in the DSN, may lead one connection here and the other there.
        """
        if identity is None or (self.system_identifier, self.timeline) != (
            identity.system_identifier,
            identity.timeline,
        ):
            raise LegacyUnavailable("two connections led to two servers", hint="a failover is under way")


class Incarnation:
    """What one process knows of the slot. `table` says whether there is a row to remember more."""

    def __init__(self, slot: str, *, table: bool) -> None:
        self.holder = secrets.token_hex(8)  # this process, in the row
        self.identity: Identity | None = None  # of the server that this process streams from, or last did
        self.others = False  # whether somebody else was seen to hold the slot since we did
        self._slot = slot
        self._table = table

    def judge(
        self, now: Identity, *, end: Lsn, confirmed: Lsn, note: Note | None, start: Lsn, acknowledged: Lsn
    ) -> None:
        """Say nothing when nobody but a bridge can have moved the slot. Call while this process holds it.

        `end` is the flushed end of the server's WAL, `confirmed` where the slot stands; `start` is the furthest that
        this process has read, `acknowledged` the furthest that it knows to be confirmed. Raises SlotLost, SourceError.
        """
        if self.identity:
            self._compare_memory(self.identity, now, end, max(start, acknowledged))
        mine = note.holder == self.holder if self._table and note else not self.others
        if self.identity and mine and self.identity.timeline == now.timeline:
            if confirmed > acknowledged:
                raise self._moved(confirmed, acknowledged, acknowledged)
        elif note:
            self._compare(note, now, confirmed)
        elif self.identity and mine:
            # a standby may keep what a primary forgot in a crash, so `acknowledged` says nothing over there
            known = self.identity
            by_heart = Note(known.system_identifier, known.timeline, self.holder, acknowledged, acknowledged)
            self._compare(by_heart, now, confirmed)

    def require_ours(self, now: Identity, *, end: Lsn, note: Note | None, reached: Lsn) -> None:
        """Say nothing when a new slot on that server would go on in the history of the old one.

        `reached` is the furthest that this process has read or acknowledged. Raises SlotLost, SourceError.
        """
        if self.identity:
            self._compare_memory(self.identity, now, end, reached)
        if note and note.system_identifier != now.system_identifier:
            raise self._other_cluster(note.system_identifier, now.system_identifier)
        if note and note.timeline != now.timeline and _end_of(note.timeline, now) is None:
            raise self._other_history(note.timeline, now)

    def _compare_memory(self, before: Identity, now: Identity, end: Lsn, reached: Lsn) -> None:
        """What only a process that was connected before can know."""
        if before.system_identifier != now.system_identifier:
            raise self._other_cluster(before.system_identifier, now.system_identifier)
        if before.timeline == now.timeline:
            if end < reached:
                raise SlotLost(
                    f"the server's WAL ends at {end}, and we have read up to {reached}",
                    hint="the server was restored from a copy of its disks: what was published since is not in it. "
                    "Compare its consumers with it; then start the bridge again, it goes on from the slot",
                )
            return
        left = _end_of(before.timeline, now)
        if left is None:
            raise self._other_history(before.timeline, now)
        if reached > left:
            raise SourceError(
                f"timeline {now.timeline} left ours at {left}, and we have read up to {reached}",
                hint="changes that were committed between the two may have been published, and the new primary does "
                "not have them: compare its consumers with it. Start the bridge again, it goes on from the slot. "
                "synchronized_standby_slots prevents this (docs/failover.md)",
            )
        _log.warning("the server was promoted; the slot came along", timeline=now.timeline, promoted_at=str(left))

    def _compare(self, note: Note, now: Identity, confirmed: Lsn) -> None:
        """Against a note that may be older than what the slot of a promoted standby knows."""
        most = note.bound
        if note.system_identifier != now.system_identifier:
            raise self._other_cluster(note.system_identifier, now.system_identifier)
        if note.timeline != now.timeline:
            if _end_of(note.timeline, now) is None:
                raise self._other_history(note.timeline, now)
            # On this timeline no bridge has acknowledged anything yet. Before it one may have, on a timeline between
            # whose note was not in the WAL that the standby had: only where this timeline began is certain.
            most = now.ended[-1][1]
        if confirmed > most:
            raise self._moved(confirmed, note.acknowledged, most)

    def _accept(self) -> str:
        if not self._table:
            return "then start the bridge again"
        return f"then accept the slot as it stands: DELETE FROM figbridge.slot_guard WHERE slot = '{self._slot}';"  # noqa: S608 (for a human)

    def _moved(self, confirmed: Lsn, least: Lsn, most: Lsn) -> SlotGap:
        return SlotGap(
            f"replication slot {self._slot!r} is confirmed up to {confirmed}, and figbridge confirmed nothing beyond "
            f"{most}: somebody else moved it, or made it anew",
            hint=f"changes between {least} and {confirmed} may be in no event (pg_recvlogical, "
            "pg_replication_slot_advance, a slot that was dropped and created, another bridge without slot-guard). "
            f"Copy or compare the tables; {self._accept()}",
        )

    def _other_cluster(self, before: str, now: str) -> SlotLost:
        return SlotLost(
            f"legacy.dsn leads to another cluster: system identifier {now}, it was {before}",
            hint="mend legacy.dsn. If the database was moved there on purpose, changes between may be in no event: "
            f"compare the tables (after pg_upgrade with a carried slot nothing is missing); {self._accept()}",
        )

    def _other_history(self, timeline: int, now: Identity) -> SlotLost:
        return SlotLost(
            f"legacy.dsn leads to a server on timeline {now.timeline} that never was on timeline {timeline}",
            hint="it is an old primary, or a copy restored to an earlier time. Name the real primary in legacy.dsn; if "
            f"this is the one now, compare the tables; {self._accept()}",
        )


def _end_of(timeline: int, history: Identity) -> Lsn | None:
    """Where `timeline` ended in that history; None when it was never part of it."""
    return next((end for number, end in history.ended if number == timeline), None)
