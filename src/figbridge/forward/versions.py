"""Where in the WAL each table's schema changed, and what it was then: so that a change is announced once, in one place.

    a row under a description ─▶ History.meet ─▶ the version before, if this row is the first under another one

INVARIANT. The answer for a position is the same whenever it is asked, so a change of schema that comes again, after a
lost connection or a kill, is announced again in its place under the same id, and never elsewhere. For that a version
that was met is in figbridge.table_version before anything at or behind it is acknowledged; and what lies behind the
slot's place is kept, with the last version before.

Without the table (as without that of the slot's guard) a process knows what it met itself: a schema that changed while
no bridge ran is noticed by ``schema_version`` alone.

The first version of a table that is met at all is none that changed. What another cluster wrote there, before a dump
was restored, is left alone: its positions mean nothing here.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any, Final, NamedTuple

from psycopg.types.json import Json

from figbridge import legacy
from figbridge.change import Lsn


class Version(NamedTuple):
    """A version of the table `relation` (its OID), and the row that first bore it. `described` is for JSON."""

    relation: int
    commit_lsn: Lsn
    ordinal: int
    described: dict[str, Any]

    @property
    def position(self) -> tuple[int, int]:
        """Orders as the stream does."""
        return self.commit_lsn, self.ordinal


_POSITION: Final = attrgetter("position")


class History:
    """The versions of all tables that this process knows of. One thread."""

    def __init__(self) -> None:
        self._of: defaultdict[int, list[Version]] = defaultdict(list)
        self._met: list[Version] = []

    def learn(self, versions: Iterable[Version]) -> None:
        """What was met before, by this process or another."""
        for version in versions:
            known = self._of[version.relation]
            index = bisect_right(known, version.position, key=_POSITION)
            if not index or known[index - 1].position != version.position:
                known.insert(index, version)

    def meet(self, version: Version) -> dict[str, Any] | None:
        """A row came under a description. What was in force before, if that was another one and this row the first."""
        known = self._of[version.relation]
        index = bisect_right(known, version.position, key=_POSITION)
        last = known[index - 1] if index else None
        if last is None or (last.position != version.position and not _equal(last, version)):
            known.insert(index, version)
            self._met.append(version)
            return last and last.described
        if last.position != version.position:
            return None
        self._met.append(last)  # it comes again; whether it was noted the first time, nobody here knows
        return known[index - 2].described if index > 1 else None

    def until(self, relation: int, position: tuple[int, int]) -> list[Version]:
        """The versions of a table that began at or before a row, the newest first."""
        known = self._of.get(relation, [])
        return known[: bisect_right(known, position, key=_POSITION)][::-1]

    def newest(self, relation: int) -> Version | None:
        """The last version of a table that is known."""
        known = self._of.get(relation)
        return known[-1] if known else None

    def take(self) -> Sequence[Version]:
        """What was met since, for `VersionStore.add`."""
        met, self._met = self._met, []
        return met

    def forget(self) -> None:
        """What was met since `take` is met again."""
        self._met = []


def _equal(one: Version, other: Version) -> bool:
    return bool(one.described["schema_version"] == other.described["schema_version"])


class VersionStore:
    """figbridge.table_version, the part of one slot. Opens a connection for each call: calls are rare."""

    def __init__(self, dsn: str, slot: str) -> None:
        self._dsn = dsn
        self._slot = slot

    def load(self) -> list[Version]:
        """All that is kept. Raises LegacyUnavailable or BridgeError."""
        opened = legacy.connect(self._dsn, purpose="schema", autocommit=True, patience=legacy.BRIEF)
        with opened as connection, legacy.translated():
            rows = connection.execute(_SELECT, [self._slot]).fetchall()
        return [Version(relation, Lsn.parse(lsn), ordinal, described) for relation, lsn, ordinal, described in rows]

    def add(self, versions: Sequence[Version], flushed: Lsn) -> None:
        """Keep `versions`, durably when this returns, and drop what nothing behind `flushed` can need.

        Raises LegacyUnavailable or BridgeError.
        """
        with legacy.connect(self._dsn, purpose="schema") as connection, legacy.translated():
            connection.execute("SET TRANSACTION READ WRITE")  # what was written before a cut-over still has to leave
            connection.execute("SET LOCAL synchronous_commit = 'local'")  # a standby that is away must not hold us up
            with connection.cursor() as cursor:
                cursor.executemany(
                    _INSERT,
                    [(self._slot, it.relation, str(it.commit_lsn), it.ordinal, Json(it.described)) for it in versions],
                )
            connection.execute(_PRUNE, [self._slot, [it.relation for it in versions], str(flushed)])


_SELECT: Final = """
SELECT relation, commit_lsn::text, ordinal, described FROM figbridge.table_version
WHERE slot = %s AND system_identifier = (SELECT system_identifier::text FROM pg_control_system())
ORDER BY relation, commit_lsn, ordinal
"""
_INSERT: Final = """
INSERT INTO figbridge.table_version (system_identifier, slot, relation, commit_lsn, ordinal, described)
VALUES ((SELECT system_identifier::text FROM pg_control_system()), %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING
"""
_PRUNE: Final = """
DELETE FROM figbridge.table_version AS old USING figbridge.table_version AS later
WHERE old.slot = %s AND old.relation = ANY (%s) AND later.commit_lsn <= %s
  AND (later.slot, later.system_identifier, later.relation) = (old.slot, old.system_identifier, old.relation)
  AND (later.commit_lsn, later.ordinal) > (old.commit_lsn, old.ordinal)
"""
