"""The order to read tables again because changes of them are in no event: rows of figbridge.snapshot."""

from collections.abc import Sequence
from typing import Final

import psycopg

from figbridge.preflight.catalogue import Name, literal

# An order that is not fulfilled. Until it is, the gap is still there, and a slot that is made anew makes it no smaller.
PENDING: Final = "gap IS NOT NULL AND state IN ('waiting', 'running', 'paused')"


def order(connection: psycopg.Connection, slot: str, tables: Sequence[Name], why: str) -> None:
    """Order that `tables` are read from their beginning, whatever was ordered before. Raises psycopg.Error."""
    if tables:
        connection.execute(order_sql(slot, tables, why))


def order_sql(slot: str, tables: Sequence[Name], why: str, *, only_if: str = "true") -> str:
    """The statement that orders it, for at least one table, if the SQL condition `only_if` holds."""
    names = ",\n             ".join(f"({literal(schema)}, {literal(table)})" for schema, table in tables)
    return f"""\
INSERT INTO figbridge.snapshot AS s (slot, system_identifier, schema_name, table_name, run, state, gap)
SELECT {literal(slot)}, (SELECT system_identifier::text FROM pg_control_system()), t.schema_name, t.table_name,
       (extract(epoch FROM clock_timestamp()) * 1000000)::bigint, 'waiting', {literal(why)}
FROM (VALUES {names}) AS t (schema_name, table_name)
WHERE {only_if}
ON CONFLICT (slot, system_identifier, schema_name, table_name) DO UPDATE
SET run = greatest(excluded.run, s.run + 1), state = excluded.state, gap = excluded.gap, condition = NULL,
    cursor = NULL, rows = 0, estimate = NULL, message = NULL, since = NULL, requested_at = now(), started_at = NULL,
    updated_at = now()"""  # noqa: S608 (quoted)
