"""What names a row under REPLICA IDENTITY FULL, where the RELATION message flags every column and so says nothing.

The catalogue is of now and the row is of then, so this is asked, in this order:

* the version that was in force for the row, if it is known that another came after it: what comes again has the key
  that it had
* the catalogue, for each new RELATION message, as a primary key may move while the columns stay as they are
* the last version that fits, if the table is gone by now, or a column of its key has another name

INVARIANT. A key is whole or there is none: part of it would give several rows one name.

An answer of the catalogue is about all tables, and is good for every row that was committed before it was asked. So a
backlog costs one question, however many its tables, and what comes again after a lost connection costs none: a stream
that begins anew always gets further than it was.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from figbridge import legacy
from figbridge.change import Lsn, Relation
from figbridge.forward.versions import History


@dataclass(frozen=True, slots=True)
class PrimaryKeys:
    """The columns of primary keys, by the OIDs of their tables: of a table without one there are none.

    Whatever was committed at or before the LSN `until` has been seen.
    """

    until: int
    columns: Mapping[int, Sequence[str]]


# Asks the catalogue. Raises LegacyUnavailable, BridgeError.
Ask = Callable[[Relation], PrimaryKeys]

_WAL_END: Final = """
SELECT (CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END
        - '0/0')::int8
"""
# behind the key's own columns stand those of INCLUDE
_KEYS: Final = """
WITH asked AS (
    SELECT coalesce((SELECT c.oid FROM pg_class c WHERE c.oid = %(oid)s),
                    (SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                     WHERE n.nspname = %(schema)s AND c.relname = %(table)s)) AS oid
)
SELECT CASE WHEN t.oid = (SELECT oid FROM asked) THEN %(oid)s ELSE t.oid::int8 END,
       ARRAY(SELECT a.attname::pg_catalog.text
             FROM pg_index i CROSS JOIN LATERAL unnest(i.indkey) WITH ORDINALITY AS k(attnum, position)
             JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
             WHERE i.indrelid = t.oid AND i.indisprimary AND k.position <= i.indnkeyatts)
FROM pg_class t
WHERE t.oid = (SELECT oid FROM asked) OR t.relreplident = 'f'
"""


def primary_keys(dsn: str, relation: Relation) -> PrimaryKeys:
    """Those of all tables with REPLICA IDENTITY FULL, and of `relation`, or of what has its name if it is gone.

    A table that is not there is not in the answer. Raises as `legacy.connect`.
    """
    of = {"oid": relation.oid, "schema": relation.schema, "table": relation.name}
    opened = legacy.connect(dsn, purpose="catalogue", autocommit=True, patience=legacy.BRIEF)
    with opened as connection, legacy.translated():
        # a statement of its own: what was committed by then, the snapshot of the next one sees
        (until,) = connection.execute(_WAL_END).fetchone() or (0,)
        return PrimaryKeys(until, dict(connection.execute(_KEYS, of).fetchall()))


class FullKeys:
    """The keys of one bridge's tables. `withholds`: whether not all of a table's columns leave. One thread."""

    def __init__(self, ask: Ask, history: History | None, withholds: Callable[[Relation], bool]) -> None:
        self._ask = ask
        self._history = history
        self._withholds = withholds
        self._known = PrimaryKeys(0, {})

    def of(self, relation: Relation, commit_lsn: Lsn, ordinal: int) -> frozenset[str]:
        """The names of the columns that name a row of `relation`, whose place this is; none if nothing does.

        Raises LegacyUnavailable when the catalogue does not answer.
        """
        names = [column.name for column in relation.columns]
        # of a column that stays, no version says whether it is of the key
        history = None if self._withholds(relation) else self._history
        versions = history.until(relation.oid, (commit_lsn, ordinal)) if history else []
        if history and versions and versions[0] is not history.newest(relation.oid):
            described = versions[0].described
            if described["identity"] == "full" and _names(described["columns"]) == names:
                return _key(described)
        key = self._now(relation, commit_lsn)
        if key is not None and key <= set(names):
            return key
        fitting = (_key(it.described) for it in versions if it.described["identity"] == "full")
        return next((key for key in fitting if key and key <= set(names)), frozenset())

    def _now(self, relation: Relation, commit_lsn: Lsn) -> frozenset[str] | None:
        """By the catalogue, as fresh as the row; None without such a table."""
        if commit_lsn > self._known.until or relation.oid not in self._known.columns:
            self._known = self._ask(relation)
        key = self._known.columns.get(relation.oid)
        return None if key is None else frozenset(key)


def _names(columns: Iterable[dict[str, Any]]) -> list[str]:
    return [column["name"] for column in columns]


def _key(described: dict[str, Any]) -> frozenset[str]:
    return frozenset(_names(column for column in described["columns"] if column["key"]))
