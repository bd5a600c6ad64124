"""Rows whose key changed while their table was read: a value that the update left alone may have been told to nobody.

An update that changes the key and leaves a TOASTed value alone does not tell that value. If it takes the row from
before the cursor, where no read has told it, to behind it, no read will. So such rows are read by their new keys:

    capture loop    notes the new key (`Moves.note`), while there is a snapshot of the table that has not ended
    publish loop    writes it into figbridge.snapshot_moved before the event can be acknowledged (`Moves.add`)
    snapshot loop   when all other rows were read, reads those with these keys, some at a time, each time in a window
                    of its own, and forgets them when they are durable (`Moves.turn`)

So are rows that an update moves into the publication's filter: PostgreSQL sends an INSERT without such values. Their
old key is not known, so after the end of the walk they are not noted, as they are not while there is no snapshot.

Where the cursor was does not matter: a chunk that is repeated after a kill may meet another row at a key than before,
whose read then has the id that consumers drop.

INVARIANT. From the end of the walk on, each row that consumers do not know whole is in the table, by the key that it
has where the publish loop is. Such rows came by moves before that end, all of which were noted. One that moves again is
noted again, since it is there by its old key (`Moved.was`); one that is told whole, by an event or a read, needs to be
there no more. Rows that are known whole may move as they like, with all that consumers hold of them, so they are not
noted any more, and the end comes: each turn leaves only the rows that moved or changed within its window. What is
forgotten was there before the chunk was read, and was not changed within the window without being told whole.

A read of such a row must not have the id of an earlier read of another row that had its key: its id has the commit's
LSN of the last move among the rows that were looked up with it. Whoever looks it up after a later move to its key finds
that one, as moves are written in their order.

It is told by the replica identity, so tables are walked by its index. Where that is not possible (an index that is not
in plain order, see `plan`), rows that move are not noticed, or not found again.
"""

import hashlib
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import orjson
import psycopg
from psycopg.rows import class_row
from psycopg.types.json import Json

from figbridge import legacy
from figbridge.change import UNCHANGED, Change, Lsn, Operation, Value
from figbridge.forward.snapshot.block import Block, Part
from figbridge.forward.snapshot.layout import Layout
from figbridge.forward.snapshot.progress import HERE, MINE, ONE, OPEN, Progress, Task
from figbridge.preflight.catalogue import Name

_MOST: Final = 500  # rows that are looked up at once: fewer are read where they are large


class Moved(NamedTuple):
    """An update that changed the key of a row of `table`, to `key` (column → text); not all of its values were sent.

    `name` and `was` stand for the new key and the old one: what a key is called. `was` is empty where it is not known.
    """

    table: Name
    commit_lsn: Lsn
    ordinal: int
    key: dict[str, str]
    name: str
    was: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of figbridge.snapshot_moved: `key` is to be read, for the update at this place in the stream."""

    name: str
    key: dict[str, str]
    commit_lsn: str
    ordinal: int


@dataclass(frozen=True, slots=True)
class Turn:
    """Rows that are looked up together: `keys` as the texts of the plan's key, in its order."""

    entries: Sequence[Entry]
    keys: Sequence[Sequence[str]]

    @property
    def identity(self) -> str:
        """What stands before the key in the ids of their reads."""
        return f"{max(Lsn.parse(it.commit_lsn) for it in self.entries):016X}-"

    def told(self, layout: Layout, read: Sequence[Block] | None, again: Iterable[Any]) -> list[Entry]:
        """Those of which nothing is left to read. `read`: what came, if not all did; `again`: the stream's exceptions.

        One without a row has been deleted, or has moved on and is noted by its next key.
        """
        stay = set(layout.names(Part.of(list(again))))
        parts = [] if read is None else [part for block in read for part in layout.parts(block)]
        came = None if read is None else {name for part in parts for name in layout.names(part)}
        named = [(_called(layout, it.key), it) for it in self.entries]
        return [it for name, it in named if name not in stay and (came is None or name in came)]


class Moves:
    """What the loops share of this: what is noted, and figbridge.snapshot_moved, the part of one slot.

    `note` is for the capture loop, `load` too; `add` for the publish loop; the rest for the snapshot loops, on their
    own connections. A snapshot's process alone has the stream, so memory says what is noted; a new process notes more.
    """

    def __init__(self, dsn: str, slot: str) -> None:
        self._dsn, self._slot = dsn, slot
        self._lock = threading.Lock()
        self._tables: frozenset[Name] = frozenset()  # with a snapshot that has not ended
        self._walked: dict[Name, int] = {}  # those of which all other rows were read → the run

    def look(self, tasks: Callable[[], Sequence[Task]]) -> Sequence[Task]:
        """What `tasks` finds now. A task is found here before anybody takes it up, so its moves are noted."""
        with self._lock:
            found = tasks()
            self._tables = frozenset(task.name for task in found if task.state in OPEN)
        return found

    def load(self) -> None:
        """Learn what is to be noted, before the stream is read. Raises LegacyUnavailable or BridgeError."""
        opened = legacy.connect(self._dsn, purpose="snapshot", autocommit=True, patience=legacy.BRIEF)
        with opened as connection, legacy.translated():
            self.look(lambda: Progress(self._slot).tasks(connection))

    def note(self, change: Change, commit_lsn: Lsn) -> Moved | None:
        """An update whose old key was sent, or an insert, and not all of its values; None if nobody needs to know."""
        operation, relation, ordinal, before, _, after, _ = change
        table = relation.schema, relation.name
        if table not in self._tables or after is None:
            return None
        indexes = [index for index, column in enumerate(relation.columns) if column.is_key]
        if before is None:
            if operation is not Operation.INSERT:
                return None
            new = [_text(after[it]) for it in indexes]  # sent: an old key with a TOASTed value is in the WAL
            key = dict(zip([relation.columns[it].name for it in indexes], new, strict=True))
            return Moved(table, commit_lsn, ordinal, key, _name(new), "")
        old = [_text(before[it]) for it in indexes]
        new = [_text(before[it] if after[it] is UNCHANGED else after[it]) for it in indexes]
        if old == new:
            return None  # a key with a TOASTed value is always sent
        key = dict(zip([relation.columns[it].name for it in indexes], new, strict=True))
        return Moved(table, commit_lsn, ordinal, key, _name(new), _name(old))

    def add(self, moved: Sequence[Moved]) -> None:
        """Keep what has to be read, durably when this returns; in the stream's order. Raises as `load`.

        The snapshots' rows are locked: one that ends meanwhile has nothing here when it has.
        """
        with legacy.connect(self._dsn, purpose="snapshot") as connection, legacy.translated():
            connection.execute(_DURABLE)
            names = sorted({it.table for it in moved})
            about = {"slot": self._slot, "open": list(OPEN), "schemas": [schema for schema, _ in names]}
            found = connection.execute(_STARTED, about | {"tables": [table for _, table in names]}).fetchall()
            walked = {(schema, table): self._walked.get((schema, table)) == run for schema, table, run in found}
            rows = [self._row(it) | {"walked": walked[it.table]} for it in moved if it.table in walked]
            with connection.cursor() as cursor:
                cursor.executemany(_INSERT, rows)

    def _row(self, moved: Moved) -> dict[str, object]:
        schema, table = moved.table
        about = {"slot": self._slot, "schema": schema, "table": table, "name": moved.name, "was": moved.was}
        return about | {"key": Json(moved.key), "commit_lsn": str(moved.commit_lsn), "ordinal": moved.ordinal}

    def walked(self, task: Task) -> None:
        """All other rows of its table are durable, and so are all moves before that in the stream."""
        self._walked[task.name] = task.run

    def walks(self, task: Task) -> None:
        """Its table is walked, or nobody is at it."""
        self._walked.pop(task.name, None)

    def turn(
        self,
        connection: psycopg.Connection,
        task: Task,
        columns: Sequence[str],
        last: Turn | None,
        told: Sequence[Entry],
    ) -> Turn | None:
        """What is to be read next, behind the `last` turn's, whose rows `told` are durable. None: nothing is left.

        `columns` are those of the plan's key. What was noted by others belongs to an earlier walk, and is forgotten.
        Raises psycopg.Error.
        """
        schema, table = task.name
        about = {"slot": self._slot, "schema": schema, "table": table, "most": _MOST}
        behind, forget = last.entries[-1].name if last else "", list(told)
        while True:
            if forget:
                place = {"names": [it.name for it in forget], "ordinals": [it.ordinal for it in forget]}
                connection.execute(_FORGET, about | place | {"lsns": [it.commit_lsn for it in forget]})
            with connection.cursor(row_factory=class_row(Entry)) as cursor:
                found = cursor.execute(_NEXT, about | {"behind": behind}).fetchall()
            if not found and not behind:
                return None
            fit = [it for it in found if it.key.keys() == set(columns)]
            if fit:
                return Turn(fit, [[it.key[column] for column in columns] for it in fit])
            behind, forget = found[-1].name if found else "", found


def _text(value: Value) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else ""


def _name(texts: Sequence[str]) -> str:
    return hashlib.blake2b(orjson.dumps(texts), digest_size=16).hexdigest()


def _called(layout: Layout, key: dict[str, str]) -> str:
    """What the stream's events about the row are noted under."""
    return layout.name([key[it.name].encode() if it.name in key else None for it in layout.table.relation.columns])


_DURABLE: Final = "SET TRANSACTION READ WRITE; SET LOCAL synchronous_commit = 'local'; SET LOCAL lock_timeout = '2s'"
_STARTED: Final = f"""
SELECT schema_name, table_name, run FROM figbridge.snapshot
WHERE {MINE} AND state = ANY (%(open)s) AND started_at IS NOT NULL
  AND (schema_name, table_name) IN (SELECT * FROM unnest(%(schemas)s::pg_catalog.text[], %(tables)s::pg_catalog.text[]))
ORDER BY schema_name, table_name FOR SHARE
"""  # noqa: S608 (constants)
_INSERT: Final = f"""
INSERT INTO figbridge.snapshot_moved AS m
    (slot, system_identifier, schema_name, table_name, name, key, commit_lsn, ordinal)
SELECT %(slot)s, {HERE}, %(schema)s, %(table)s, %(name)s, %(key)s, %(commit_lsn)s, %(ordinal)s
WHERE NOT %(walked)s OR EXISTS (SELECT FROM figbridge.snapshot_moved WHERE {ONE} AND name = %(was)s)
ON CONFLICT (slot, system_identifier, schema_name, table_name, name) DO UPDATE
SET key = excluded.key, commit_lsn = excluded.commit_lsn, ordinal = excluded.ordinal
WHERE (excluded.commit_lsn, excluded.ordinal) > (m.commit_lsn, m.ordinal)
"""  # noqa: S608 (constants)
_NEXT: Final = f"""
SELECT name, key, commit_lsn::pg_catalog.text, ordinal FROM figbridge.snapshot_moved
WHERE {ONE} AND name > %(behind)s ORDER BY name LIMIT %(most)s
"""  # noqa: S608 (constants)
_FORGET: Final = f"""
DELETE FROM figbridge.snapshot_moved WHERE {ONE} AND (name, commit_lsn, ordinal) IN (
    SELECT * FROM unnest(%(names)s::pg_catalog.text[], %(lsns)s::pg_catalog.pg_lsn[], %(ordinals)s::bigint[]))
"""  # noqa: S608 (constants)
