"""One event through its mapping, for a human to look at: the statements, and what they would change.

`show` needs no database. `rehearse` runs them in a transaction that is always rolled back: the row before and after,
and what triggers did elsewhere, counted by the server's own statistics of the transaction.
https://www.postgresql.org/docs/current/monitoring-stats.html#MONITORING-PG-STAT-ALL-TABLES-VIEW
"""

from collections.abc import Iterator
from typing import Final

import psycopg

from figbridge import legacy
from figbridge.errors import ConfigError, Problem
from figbridge.reverse import difference
from figbridge.reverse.mapping import Mappings, Work
from figbridge.reverse.message import Enveloping, parse
from figbridge.reverse.outcome import words
from figbridge.reverse.statement import Free, Statement

_TOUCHED: Final = """
    SELECT schemaname || '.' || relname, n_tup_ins, n_tup_upd, n_tup_del FROM pg_stat_xact_user_tables
    WHERE n_tup_ins + n_tup_upd + n_tup_del > 0 AND schemaname <> 'figbridge' ORDER BY 1
"""


def prepare(mappings: Mappings, body: bytes, bare: Enveloping | None = None) -> Work:
    """What `body` becomes. Raises Malformed when it cannot become anything, ConfigError when nobody asked for it."""
    event = parse(body, bare)
    mapping = mappings.find(event)
    if mapping is None:
        what = f"source {event.source!r} with detail-type {event.detail_type!r} matches no mapping: it would be ignored"
        raise ConfigError("the event is not mapped", [Problem("reverse.mappings", what, "add a mapping for it")])
    return mapping.prepare(event)


def show(work: Work) -> Iterator[str]:
    """The keys and the statements with their values."""
    yield f"idempotency key  {work.event.source} / {work.key}"
    yield f"entity           {work.entity[0]} / {work.entity[1]}"
    yield f"version          {work.version or 'none: a late event overwrites a newer one'}"
    for number, statement in enumerate(work.statements, 1):
        query = statement.query if isinstance(statement, Free) else statement.query.decode()
        values = statement.parameters if isinstance(statement, Free) else statement.document
        yield f"statement {number}      {query}"
        yield f"                 {values}"


def rehearse(dsn: str, work: Work) -> Iterator[str]:
    """Run the statements and roll back; the rows before and after, or the error. Raises LegacyUnavailable."""
    with legacy.connect(dsn, purpose="mapping-test") as connection, legacy.translated():
        connection.execute("SET client_encoding TO 'UTF8'")
        try:
            for number, statement in enumerate(work.statements, 1):
                yield from _run(connection, number, statement)
            for table, *counts in connection.execute(_TOUCHED).fetchall():
                inserted, updated, deleted = counts
                yield f"in all           {table}: {inserted} inserted, {updated} updated, {deleted} deleted"
            connection.execute(difference.CHECKED)
        except psycopg.Error as error:
            if error.sqlstate is None:
                raise
            yield f"refused          {words(error)} (SQLSTATE {error.sqlstate})"
        finally:
            connection.rollback()
    yield "rolled back      nothing was changed"


def _run(connection: psycopg.Connection, number: int, statement: Statement | Free) -> Iterator[str]:
    if isinstance(statement, Free):
        rows = connection.execute(statement.query, statement.parameters).rowcount
        yield f"statement {number}      {rows} rows"
        return
    (before,) = difference.rows(connection, statement.shape, [statement.document])
    cursor = psycopg.RawCursor(connection).execute(statement.query, statement.parameters)
    yield f"statement {number}      {cursor.rowcount} rows"
    (after,) = difference.rows(connection, statement.shape, [statement.document])
    if statement.shape.action == "update" and not before:
        yield "                 no such row: the event would wait for it"
    for row in [it for it in before if it not in after]:
        yield f"               - {row}"
    for row in [it for it in after if it not in before]:
        yield f"               + {row}"
