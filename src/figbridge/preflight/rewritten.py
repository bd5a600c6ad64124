"""Whether the server takes a statement at all, where a view or the rules of a table make another one of it.

It says so when it plans: EXPLAIN plans the statement and runs nothing. Of a plain table this is not asked, because a
plan takes the table's lock, and there is nothing to find.
https://www.postgresql.org/docs/current/rules-update.html
https://www.postgresql.org/docs/current/sql-createview.html#SQL-CREATEVIEW-UPDATABLE-VIEWS
"""

from collections.abc import Iterable, Iterator

import psycopg
from psycopg import sql

from figbridge.config import StatementSection
from figbridge.preflight import conflict
from figbridge.preflight.catalogue import Table
from figbridge.preflight.finding import Finding, error

_REFUSALS = ("0A", "42", "55000")  # not supported; not allowed or no such key; a view that cannot be written
_RULES = "SELECT EXISTS (SELECT FROM pg_rewrite WHERE ev_class = %s)"  # a view is one by its rule
_INSERT = sql.SQL(
    "INSERT INTO {table} AS t ({columns}) OVERRIDING SYSTEM VALUE SELECT {values} "
    "FROM json_populate_recordset(NULL::{table}, '[]') AS r"
)
_ROW = sql.SQL("json_populate_recordset(NULL::{table}, '[]') AS r WHERE {row} RETURNING 1")


def probe(connection: psycopg.Connection, place: str, mapping: StatementSection, table: Table) -> Iterator[Finding]:
    """`mapping`, whose columns and rights are there, held against the rules of its table."""
    ruled = connection.execute(_RULES, [table.oid]).fetchone()
    if not (ruled and ruled[0]):
        return
    for action, statement in _statements(mapping, sql.Identifier(table.schema, table.name)):
        if refused := _refused(connection, statement):
            other = "use insert, update or delete, " if action == "upsert" else ""
            yield error(
                f"{place}.into",
                f"the server refuses to {action} {table}: {refused}",
                f"{other}name the table behind it, or write SQL of your own (sql)",
            )


def _statements(mapping: StatementSection, table: sql.Identifier) -> Iterator[tuple[str, sql.Composable]]:
    """What is sent for the mapping: (action, a statement without its values)."""
    key, values = [*mapping.key], [*(mapping.soft or mapping.set)]
    action = mapping.action
    judged_upsert = action == "upsert" and mapping.rules is not None  # one or the other, as the row is there or not
    insert = _INSERT.format(table=table, columns=_each("{c}", [*key, *values]), values=_each("r.{c}", [*key, *values]))
    rows = _ROW.format(table=table, row=_each("t.{c} = r.{c}", key, " AND "))
    if action == "insert" or judged_upsert or conflict.may_insert(mapping):
        yield "insert into", insert
    if values and (action == "update" or judged_upsert or mapping.soft):
        assignments = _each("{c} = r.{c}", values)
        yield "update", sql.SQL("UPDATE {} AS t SET {} FROM {}").format(table, assignments, rows)
    if action == "delete" and not mapping.soft:
        yield "delete from", sql.SQL("DELETE FROM {} AS t USING {}").format(table, rows)
    if action == "upsert" and not judged_upsert:
        resolution: sql.Composable = sql.SQL("NOTHING")
        if values:
            resolution = sql.SQL("UPDATE SET {}").format(_each("{c} = EXCLUDED.{c}", values))
        yield "upsert", sql.SQL("{} ON CONFLICT ({}) DO {}").format(insert, _each("{c}", key), resolution)


def _each(template: str, columns: Iterable[str], separator: str = ", ") -> sql.Composed:
    return sql.SQL(separator).join(sql.SQL(template).format(c=sql.Identifier(column)) for column in columns)


def _refused(connection: psycopg.Connection, statement: sql.Composable) -> str | None:
    try:
        with connection.transaction():
            connection.execute("SET LOCAL lock_timeout TO '1s'")
            psycopg.RawCursor(connection).execute(sql.SQL("EXPLAIN {}").format(statement))
    except psycopg.errors.LockNotAvailable:
        return None  # somebody alters it: then it is not known, and nobody is to wait for that
    except psycopg.Error as refused:
        if not (refused.sqlstate or "").startswith(_REFUSALS):
            raise
        return refused.diag.message_primary
    return None
