"""What a transaction is going to touch, said before it does: the list that `figbridge.mark` describes.

PostgreSQL casts each value with its column's type and prints it as the walsender will: cast under the session's own
settings, as the statement itself will read it ("01/02/2026" in the session's DateStyle, a time without a zone in the
session's), and printed under those of the walsender, which are set in between. That is one statement in autocommit
mode, so the settings end with it, and behind PgBouncer nobody else ever gets them.

A value that cannot be cast spoils the list, not the event: the statement itself will say what is wrong with it.
"""

import functools
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Final

import psycopg
import structlog
from psycopg import sql

from figbridge import mark
from figbridge.mark import Entry
from figbridge.reverse.mapping import Work
from figbridge.reverse.statement import Free, Shape, Statement, empty

_log = structlog.get_logger()

_CHUNK: Final = 500  # events of one message: some 50 KB
_FORGET: Final = 60.0  # seconds for which a table's other names are known: it may get partitions

# MATERIALIZED, and the settings wait for its count: all is read before anything is printed.
# r.* is the row, whatever its columns are called; r alone would be a column of that name.
_DIGESTS: Final = sql.SQL("""
    WITH parsed AS MATERIALIZED (
        SELECT d.number, (r.*)::{table} AS r
        FROM json_array_elements($1::json) WITH ORDINALITY AS d (document, number),
             json_populate_record({empty}, d.document) AS r),
    told AS MATERIALIZED (
        SELECT count(set_config(s.name, s.setting, true)) AS settings
        FROM (SELECT count(*) AS rows FROM parsed) AS before
        CROSS JOIN json_each_text(CASE WHEN before.rows >= 0 THEN {settings}::json END) AS s (name, setting))
    SELECT {key}, {row} FROM parsed AS p, told WHERE told.settings > 0 ORDER BY p.number
""")
_DIGEST: Final = sql.SQL("left(encode(sha256(convert_to({told}, 'UTF8')), 'hex'), {digits})")
# concat prints by the type's output function, as pgoutput does; a cast to text would say true for t
_TOLD: Final = sql.SQL(
    "CASE WHEN (p.r).{c} IS NOT DISTINCT FROM NULL THEN 'n' "
    "ELSE octet_length(convert_to(concat((p.r).{c}), 'UTF8')) || ':' || concat((p.r).{c}) END"
)
_NAMES: Final = """
    WITH RECURSIVE asked AS (
        SELECT c.oid, c.relkind FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = $1 AND c.relname = $2),
    inherited (oid) AS (
        SELECT oid FROM asked
        UNION SELECT i.inhrelid FROM inherited h JOIN pg_inherits i ON i.inhparent = h.oid, asked
              WHERE asked.relkind = 'r')
    SELECT n.nspname::text, c.relname::text, (SELECT relkind = 'p' FROM asked) AS parted
    FROM (SELECT oid FROM inherited UNION SELECT relid FROM asked, pg_partition_ancestors(asked.oid)) AS found
    JOIN pg_class c ON c.oid = found.oid JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE (SELECT relkind FROM asked) IN ('r', 'p')
"""


class Touching:
    """Says what works touch, over a connection in autocommit mode. Raises psycopg.Error when the connection breaks."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, str], tuple[float, list[tuple[str, str]], bool]] = {}

    def marks(self, connection: psycopg.Connection, works: Sequence[Work]) -> Iterable[str]:
        """The contents of the `mark.MARK`s of a transaction of `works`."""
        for first in range(0, len(works), _CHUNK):
            yield self._mark(connection, works[first : first + _CHUNK])

    def _mark(self, connection: psycopg.Connection, works: Sequence[Work]) -> str:
        documents: defaultdict[Shape, list[str]] = defaultdict(list)
        for work in works:
            for statement in work.statements:
                if isinstance(statement, Statement):
                    documents[statement.shape].append(statement.document)
        told: dict[Shape, tuple[int, Iterable[tuple[str, str]]]] = {}
        shapes: list[mark.Shape] = []
        for shape, listed in documents.items():
            names, parted = self._names_of(connection, shape.table)
            digests = _digests(connection, shape, listed) if names else None
            if names and digests:
                told[shape] = len(shapes), iter(digests)
                shapes.append(mark.Shape(names, shape.action, shape.key, shape.columns, parted))
        entries = [Entry(work.event.source, work.key, work.hops, _rows(work, told)) for work in works]
        return mark.write(shapes, entries)

    def _names_of(self, connection: psycopg.Connection, table: tuple[str, str]) -> tuple[list[tuple[str, str]], bool]:
        """The names under which the WAL may show what is written to `table`, none for a view; is it partitioned?"""
        until, names, parted = self._names.get(table, (0.0, [], False))
        if time.monotonic() >= until:
            found = psycopg.RawCursor(connection).execute(_NAMES, table).fetchall()
            names, parted = [(schema, name) for schema, name, _ in found], any(it for *_, it in found)
            self._names[table] = time.monotonic() + _FORGET, names, parted
        return names, parted


def _rows(
    work: Work, told: dict[Shape, tuple[int, Iterable[tuple[str, str]]]]
) -> Sequence[tuple[int, str, str]] | None:
    rows = []
    known = True
    for statement in work.statements:
        found = None if isinstance(statement, Free) else told.get(statement.shape)
        if found is None:
            known = False
            continue
        number, digests = found
        rows.append((number, *next(iter(digests))))
    return rows if known else None


def _digests(connection: psycopg.Connection, shape: Shape, documents: Sequence[str]) -> list[tuple[str, str]] | None:
    try:
        cursor = psycopg.RawCursor(connection).execute(_compose(shape), [f"[{','.join(documents)}]"])
        return cursor.fetchall()
    except psycopg.Error as error:
        if connection.closed or error.sqlstate is None:
            raise
        _log.info("cannot say what a statement touches: all it does is an echo", code=error.sqlstate)
        return None


@functools.lru_cache(maxsize=1024)
def _compose(shape: Shape) -> bytes:
    key, row = _digest(shape.key), _digest([*shape.key, *shape.columns])
    settings = sql.Literal(json.dumps(mark.SETTINGS))
    return _DIGESTS.format(
        table=sql.Identifier(*shape.table), empty=empty(shape.table), settings=settings, key=key, row=row
    ).as_bytes(None)


def _digest(columns: Sequence[str]) -> sql.Composable:
    told: list[sql.Composable] = [_TOLD.format(c=sql.Identifier(column)) for column in columns]
    return _DIGEST.format(told=sql.SQL(" || ").join(told or [sql.SQL("''")]), digits=sql.Literal(mark.DIGITS))
