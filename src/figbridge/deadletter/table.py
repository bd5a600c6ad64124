"""figbridge.dead_letter in the legacy database: letters of both directions, in the order in which they came.

A letter is there because of a value that the database refused, and its texts may quote that. So they are written in the
database's own encoding by us, and what that lacks stands there as an escape; whoever looks for it need not know.
"""

import json
from collections.abc import Generator, Sequence
from typing import Any, Final

import psycopg
from psycopg import sql
from psycopg.rows import TupleRow

from figbridge import legacy
from figbridge.deadletter.letter import DeadLetter, Kept, Wanted, writable
from figbridge.errors import BridgeError

_PAGE: Final = 500  # letters looked up at once
_PAGE_BYTES: Final = 4 * 1024 * 1024  # of bodies read at once, and one more letter

_INSERT: Final = """
    INSERT INTO figbridge.dead_letter (id, direction, event_id, reason, message, attempts, body, statement, table_name,
        position, key, old_key, whole_table, created_at)
    VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s) ON CONFLICT (id) DO NOTHING
"""
# under its old place, by a role that need not have the right to UPDATE
_EXCHANGE: Final = """
    INSERT INTO figbridge.dead_letter (id, direction, event_id, reason, message, attempts, body, statement, table_name,
        position, key, old_key, whole_table, created_at, place) OVERRIDING SYSTEM VALUE
    VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
"""
# The sizes are summed up before a body is read: bodies lie beside the table (TOAST), and one may be a megabyte.
_SCAN: Final = """
    SELECT l.place, l.direction, l.event_id, l.reason, l.message, l.attempts, l.body, coalesce(l.statement, ''),
           l.table_name, l.position::text, l.key, l.old_key, l.whole_table, l.created_at
    FROM (
        SELECT place, sum(size) OVER (ORDER BY place) - size AS before FROM (
            SELECT place, octet_length(body) AS size FROM figbridge.dead_letter
            WHERE place > %(after)s
              AND (%(direction)s::text IS NULL OR direction = %(direction)s)
              AND (%(reason)s::text IS NULL OR reason = %(reason)s)
              AND (%(table)s::text IS NULL OR table_name = %(table)s)
              AND (%(since)s::timestamptz IS NULL OR created_at >= %(since)s)
              AND (cardinality(%(ids)s::text[]) = 0 OR event_id = ANY (%(ids)s)
                   OR EXISTS (SELECT FROM unnest(%(ids)s::text[]) AS i WHERE starts_with(id, i)))
            ORDER BY place LIMIT %(page)s
        ) AS sized
    ) AS page
    JOIN figbridge.dead_letter l USING (place)
    WHERE page.before < %(bytes)s
    ORDER BY place
"""


class TableDeadLetterStore:
    """The table at `dsn`; a connection for each call, because letters are rare."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self.name = "figbridge.dead_letter"

    def add(self, letters: Sequence[DeadLetter]) -> None:
        """See `DeadLetters.add`. Raises LegacyUnavailable, BridgeError."""
        with legacy.connect(self._dsn, purpose="dead-letters") as connection, legacy.translated():
            codec = legacy.speak_its_encoding(connection)
            insert_letters(connection, letters, codec)

    def check(self) -> None:
        """The table is there and may be written to. Raises LegacyUnavailable, BridgeError."""
        with legacy.connect(self._dsn, purpose="dead-letters", autocommit=True) as connection, legacy.translated():
            row = connection.execute(
                # not by to_regclass, which raises where the role may not use the schema
                "SELECT has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'INSERT') "
                "AND has_table_privilege(c.oid, 'SELECT') "
                "FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
                "WHERE n.nspname = 'figbridge' AND c.relname = 'dead_letter'"
            ).fetchone()
            role = sql.Identifier(connection.info.user).as_string(None)
        if row is None:
            raise BridgeError("there is no table figbridge.dead_letter", hint="run `figbridge init`")
        if not row[0]:
            raise BridgeError(
                "the role may not write to figbridge.dead_letter",
                hint=f"GRANT USAGE ON SCHEMA figbridge TO {role}; "
                f"GRANT SELECT, INSERT, DELETE ON figbridge.dead_letter TO {role};",
            )

    def scan(self, wanted: Wanted) -> Generator[Kept, None, None]:
        """See `DeadLetterStore.scan`: in the order of their arrival, each once."""
        after = 0
        # no transaction stays open while the letters are worked on: it would hold back VACUUM everywhere
        with legacy.connect(self._dsn, purpose="dead-letters", autocommit=True) as connection:
            while True:
                with legacy.translated(), connection.transaction():
                    codec = legacy.speak_its_encoding(connection)
                    page = connection.execute(_SCAN, {**_question(wanted, codec), "after": after}).fetchall()
                yield from map(_read, page)
                if not page:
                    return
                after = page[-1][0]

    def remove(self, kept: Sequence[Kept]) -> None:
        """See `DeadLetterStore.remove`."""
        with legacy.connect(self._dsn, purpose="dead-letters") as connection, legacy.translated():
            places = [it.place for it in kept]
            connection.execute("DELETE FROM figbridge.dead_letter WHERE place = ANY (%s)", [places])

    def update(self, kept: Sequence[Kept]) -> None:
        """See `DeadLetterStore.update`."""
        with legacy.connect(self._dsn, purpose="dead-letters") as connection, legacy.translated():
            codec = legacy.speak_its_encoding(connection)
            gone = connection.execute(
                "DELETE FROM figbridge.dead_letter WHERE place = ANY (%s) RETURNING place", [[it.place for it in kept]]
            )
            there = {place for (place,) in gone}
            rows = [(*_row(it.letter, codec), it.place) for it in kept if it.place in there]
            with connection.cursor() as cursor:
                cursor.executemany(_EXCHANGE, rows)

    def close(self) -> None:
        """Nothing is held."""


def _read(row: TupleRow) -> Kept:
    place, direction, event_id, reason, message, attempts, body, statement, table, position, *rest = row
    where: dict[str, Any] | None = json.loads(position) if position else None
    letter = DeadLetter(direction, event_id, reason, message, attempts, bytes(body), statement, table, where, *rest)
    return Kept(letter, place)


def _question(wanted: Wanted, codec: str) -> dict[str, Any]:
    return {
        "direction": wanted.direction,
        "reason": _text(wanted.reason, codec),
        "table": _text(wanted.table, codec),
        "since": wanted.since,
        "ids": [_text(it, codec) for it in wanted.ids],
        "page": _PAGE,
        "bytes": _PAGE_BYTES,
    }


def insert_letters(connection: psycopg.Connection, letters: Sequence[DeadLetter], codec: str) -> None:
    """Write `letters` in the connection's current transaction; what is there already stays as it is.

    `codec` is what `legacy.speak_its_encoding` says.
    """
    with connection.cursor() as cursor:
        cursor.executemany(_INSERT, [_row(letter, codec) for letter in letters])


def _row(it: DeadLetter, codec: str) -> tuple[Any, ...]:
    position = json.dumps(it.position) if it.position else None
    # a text column cannot hold NUL, and a message may quote the event
    texts = [_text(text, codec) for text in (it.event_id, it.reason, it.message)]
    keys = [_text(it.table, codec), position, _text(it.key, codec), _text(it.old_key, codec), it.whole_table]
    return (
        *(it.id, it.direction, *texts, it.attempts, it.body, _text(it.statement or None, codec)),
        *(*keys, it.created_at),
    )


def _text(value: str | None, codec: str) -> str | None:
    return writable(value.replace("\0", "\\0"), codec) if value is not None else None
