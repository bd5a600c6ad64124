"""The park: events that wait for a row, kept in figbridge.parked until the row is there.

    applied in vain (no parent, no row) ──▶ parked, acknowledged at the queue
    row there? the earlier event of the entity (group) gone? ──▶ handed out again, like a delivery of any source
    park-timeout over ──▶ tried once more ──▶ dead letter

Why a table and not the queue: a queue counts deliveries and gives up after some, blocks a FIFO group, and forgets after
days; and every replica must see what waits, or it would let a later event overtake. Nothing is tried in vain: one query
for each table that is waited for asks which rows have come, whoever wrote them.

Invariant: among parked events of an entity the first goes first. One that brings the row need not wait for those that
wait for just that row, so nothing waits in a circle.

GROUPS. With ``reverse.order: group`` the same holds for a message group, and for the entity still: an entity may be in
two groups, and what comes without one (a dead letter applied again, an event parked under another setting) must not
overtake either. Whoever waits, waits for an earlier place; so there are no circles among places. What can be waited for
in vain is a row that a later event of the same group brings, behind an event of another entity: then the order that was
asked for cannot be had. After park-timeout the first becomes a dead letter, and the group goes on. Within one entity
the exception above holds in a group, too: else each update that came before its row would stop a group of one row.

An event whose turn has only just come is tried before it is called overdue: it has waited for others, not in vain. An
overdue one is tried a last time: while no bridge ran, its row may have come, or its lock may have gone.

What a constraint refuses while an earlier event of its batch waits (`search`) is tried again when that one has gone.

A parked event that was applied and not yet removed when a process died is handed out again, and is a duplicate then.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import psycopg
import structlog
from psycopg import sql

from figbridge.reverse.claim import REUSED
from figbridge.reverse.mapping import Work
from figbridge.reverse.outcome import (
    EARLIER_WAITS,
    ROW_WAITS,
    TIMEOUTS,
    UPDATE_MISSING,
    Applied,
    Outcome,
    unavailable,
    words,
)
from figbridge.reverse.statement import empty

_log = structlog.get_logger()

_MOST: Final = 500  # events handed out at once
_LONGEST: Final = 60  # seconds between two tries of an event: nobody knows what it waits for, or that did not help

_POISON: Final = ("22", "54")  # a character that the encoding has not, a key longer than an index entry may be

_ADD: Final = """
    INSERT INTO figbridge.parked AS p (source, idempotency_key, payload_hash, event_id, scope, identity, makes_row,
        row_missing, awaited_table, awaited_columns, awaited, reason, message, attempts, body, message_group, due_at)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, 1, $14, $18,
            now() + CASE WHEN $15 THEN interval '1 second' ELSE interval '0' END)
    ON CONFLICT (source, idempotency_key) DO UPDATE
    SET row_missing = EXCLUDED.row_missing, awaited_table = EXCLUDED.awaited_table,
        awaited_columns = EXCLUDED.awaited_columns, awaited = EXCLUDED.awaited, reason = EXCLUDED.reason,
        message = EXCLUDED.message, attempts = p.attempts + 1,
        message_group = coalesce(EXCLUDED.message_group, p.message_group),
        due_at = now() + CASE WHEN $17 THEN 0 ELSE least(2 ^ least(p.attempts, 10), $16) END * interval '1 second'
    WHERE p.payload_hash = EXCLUDED.payload_hash
"""
_REMOVE: Final = """
    DELETE FROM figbridge.parked p USING unnest($1::text[], $2::text[]) AS r (source, key)
    WHERE p.source = r.source AND p.idempotency_key = r.key
"""
_FREE: Final = sql.SQL("""
    SELECT p.source, p.idempotency_key, p.body, p.attempts, p.reason, p.message, p.message_group,
           {overdue} AND p.reason NOT IN ({row_waits}, {earlier_waits}) AS overdue
    FROM figbridge.parked p
    WHERE {condition} AND NOT EXISTS (
        SELECT FROM figbridge.parked e WHERE e.scope = p.scope AND e.identity = p.identity AND e.place < p.place
            AND NOT (p.makes_row AND e.row_missing))
    AND NOT EXISTS (
        SELECT FROM figbridge.parked e WHERE e.message_group = p.message_group AND e.place < p.place
            AND NOT (p.makes_row AND e.row_missing AND e.scope = p.scope AND e.identity = p.identity))
    AND NOT (p.reason = {earlier_waits} AND EXISTS (  -- what was parked with it is of its batch
        SELECT FROM figbridge.parked e WHERE e.parked_at = p.parked_at AND e.place < p.place))
    ORDER BY p.place LIMIT {most}
""")
_OVERDUE: Final = sql.SQL("p.parked_at < now() - {seconds} * interval '1 second'")
_BY_TIME: Final = sql.SQL("p.awaited_table IS NULL AND p.due_at <= now()")
_NOT_SLOW: Final = sql.SQL(" AND p.reason NOT IN ({})").format(sql.SQL(", ").join(map(sql.Literal, TIMEOUTS)))
_BY_ROW: Final = sql.SQL("""
    p.awaited_table = {names} AND p.awaited_columns = {columns} AND p.due_at <= now() AND EXISTS (
        SELECT FROM {table} AS t, json_populate_record({empty}, p.awaited::json) AS r WHERE {row})
""")


@dataclass(frozen=True, slots=True)
class Parked:
    """A parked event that may be tried again; `overdue`: it has waited for too long, and this is its last try.

    See `transports.Delivery`.
    """

    source: str
    key: str
    body: bytes
    attempts: int
    reason: str
    message: str
    group: str | None
    overdue: bool

    lost: ClassVar[bool] = False  # it is ours until it is removed


class Park:
    """figbridge.parked, over `connection`'s connection, which must be idle. `timeout` in seconds. For its thread.

    All methods raise LegacyUnavailable or BridgeError.
    """

    def __init__(self, connection: Callable[[], psycopg.Connection], *, timeout: float) -> None:
        self._connection = connection
        self._timeout = timeout

    def add(self, works: Sequence[tuple[Work, Applied, bytes]]) -> dict[Work, Applied]:
        """Park them, durably; what became of those that cannot be parked, the others are.

        That is `REUSED` for a key that is parked with another payload, and a dead letter for what no index can hold.
        """
        refused = {}
        try:
            connection = self._connection()
            with connection.transaction():
                connection.execute("SET LOCAL synchronous_commit = on")
                for work, applied, body in works:
                    try:
                        with connection.transaction():
                            added = psycopg.RawCursor(connection).execute(_ADD, _row(work, applied, body)).rowcount
                    except psycopg.Error as error:
                        if not (error.sqlstate or "").startswith(_POISON):
                            raise
                        refused[work] = Applied(Outcome.DEAD_LETTER, error.sqlstate or "", words(error))
                    else:
                        if added == 0:
                            refused[work] = REUSED
        except psycopg.Error as error:
            raise unavailable(error) from error
        return refused

    def remove(self, parked: Sequence[Parked]) -> None:
        """They are done with."""
        keys = [[it.source for it in parked], [it.key for it in parked]]
        try:
            psycopg.RawCursor(self._connection()).execute(_REMOVE, keys)
        except psycopg.Error as error:
            raise unavailable(error) from error

    def count(self) -> int:
        """How many events are parked."""
        try:
            row = self._connection().execute("SELECT count(*) FROM figbridge.parked").fetchone()
        except psycopg.Error as error:
            raise unavailable(error) from error
        return row[0] if row else 0

    def ready(self, *, slow: bool = True) -> list[Parked]:
        """Those whose row has come, whose turn it is, or who have waited for too long.

        `slow`: also those that a timeout ended the last time.
        """
        overdue = _OVERDUE.format(seconds=sql.Literal(self._timeout))
        try:
            connection = self._connection()
            found = self._free(connection, overdue if slow else overdue + _NOT_SLOW)
            found += self._free(connection, _BY_TIME if slow else _BY_TIME + _NOT_SLOW)
            awaited = connection.execute(
                "SELECT DISTINCT awaited_table, awaited_columns FROM figbridge.parked WHERE awaited_table IS NOT NULL"
            ).fetchall()
            for names, columns in awaited:
                found += self._arrived(connection, names, columns)
        except psycopg.Error as error:
            raise unavailable(error) from error
        return list({(it.source, it.key): it for it in reversed(found)}.values())[::-1]

    def _arrived(self, connection: psycopg.Connection, names: list[str], columns: list[str]) -> list[Parked]:
        row = sql.SQL(" AND ").join(sql.SQL("t.{c} = r.{c}").format(c=sql.Identifier(column)) for column in columns)
        condition = _BY_ROW.format(
            names=sql.Literal(names),
            columns=sql.Literal(columns),
            table=sql.Identifier(*names),
            empty=empty((names[0], names[1])),
            row=row,
        )
        try:
            return self._free(connection, condition)
        except psycopg.Error as error:
            if not (error.sqlstate or "").startswith(("22", "23", "42")):
                raise
            # the table has gone, may not be read, or cannot hold the key (nor its domain): then time has to do
            _log.warning("cannot ask whether an awaited row has come", table=".".join(names), error=str(error))
            connection.execute(
                "UPDATE figbridge.parked SET awaited_table = NULL WHERE awaited_table = %s AND awaited_columns = %s",
                [names, columns],
            )
            return []

    def _free(self, connection: psycopg.Connection, condition: sql.Composable) -> list[Parked]:
        overdue = _OVERDUE.format(seconds=sql.Literal(self._timeout))
        query = _FREE.format(
            overdue=overdue,
            row_waits=sql.Literal(ROW_WAITS),
            earlier_waits=sql.Literal(EARLIER_WAITS),
            condition=condition,
            most=sql.Literal(_MOST),
        )
        return [Parked(*row) for row in connection.execute(query)]


def _row(work: Work, applied: Applied, body: bytes) -> list[Any]:
    awaited = applied.awaited
    return [
        work.event.source,
        work.key,
        work.payload_hash,
        work.event.id,
        *work.entity,
        work.mapping.makes_row,
        applied.reason == UPDATE_MISSING,
        list(awaited.table) if awaited else None,
        list(awaited.columns) if awaited else None,
        awaited.document if awaited else None,
        applied.reason,
        applied.message.replace("\0", "\\0"),
        body,
        awaited is None and applied.reason not in {ROW_WAITS, UPDATE_MISSING, EARLIER_WAITS},
        _LONGEST,
        applied.reason == ROW_WAITS,
        work.group,
    ]
