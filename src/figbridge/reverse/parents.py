"""Which row is missing, when a foreign key says that one is.

The server's message says it in words of the server's language; the catalogue says it in columns. Of a partitioned table
an error names the partition.
"""

from collections.abc import Iterable
from typing import Final

import psycopg

from figbridge.reverse.message import read, write
from figbridge.reverse.outcome import Awaited

# the columns of the constraint, here and in the table that it refers to, in the same order
_CONSTRAINT: Final = """
    SELECT n.nspname::text, f.relname::text,
           ARRAY(SELECT a.attname::text FROM unnest(c.conkey) WITH ORDINALITY AS k (number, place)
                 JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = k.number ORDER BY k.place),
           ARRAY(SELECT a.attname::text FROM unnest(c.confkey) WITH ORDINALITY AS k (number, place)
                 JOIN pg_attribute a ON a.attrelid = c.confrelid AND a.attnum = k.number ORDER BY k.place)
    FROM pg_constraint c
    JOIN pg_class t ON t.oid = c.conrelid JOIN pg_namespace s ON s.oid = t.relnamespace
    JOIN pg_class f ON f.oid = c.confrelid JOIN pg_namespace n ON n.oid = f.relnamespace
    WHERE c.contype = 'f' AND c.conname = $1 AND s.nspname = $2 AND t.relname = $3
"""

_ABOVE: Final = """
    WITH RECURSIVE above (oid) AS (
        SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = $1 AND c.relname = $2
        UNION SELECT i.inhparent FROM above a JOIN pg_inherits i ON i.inhrelid = a.oid)
    SELECT n.nspname::text, c.relname::text
    FROM above a JOIN pg_class c ON c.oid = a.oid JOIN pg_namespace n ON n.oid = c.relnamespace
"""


def tables_of(connection: psycopg.Connection, diag: psycopg.errors.Diagnostic) -> set[tuple[str, str]]:
    """The tables that a statement may have named to meet an error: its own, and those that it is a part of."""
    return set(psycopg.RawCursor(connection).execute(_ABOVE, [diag.schema_name, diag.table_name]).fetchall())


def missing_parent(
    connection: psycopg.Connection, error: psycopg.Error, documents: Iterable[tuple[tuple[str, str], str]]
) -> Awaited | None:
    """The row that foreign key violation `error` misses, by the event's own values; None when those do not tell.

    `documents` are (table, JSON object of the columns) that the event writes. They do not tell when a trigger wrote the
    row, or when the row that is referred to is the one being deleted.
    """
    diag = error.diag
    names = [diag.constraint_name, diag.schema_name, diag.table_name]
    row = psycopg.RawCursor(connection).execute(_CONSTRAINT, names).fetchone()
    if row is None:
        return None
    schema, table, columns, referred = row
    tables = tables_of(connection, diag)
    for written, document in documents:
        if written not in tables:
            continue
        values = read(document, "the columns")
        if all(values.get(column) is not None for column in columns):
            named = {there: values[here] for here, there in zip(columns, referred, strict=True)}
            return Awaited((schema, table), tuple(referred), write(named, "the key of the parent"))
    return None
