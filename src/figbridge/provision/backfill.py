"""The order to read tables again because changes of them are in no event: rows of figbridge.snapshot."""

from collections.abc import Iterable
from typing import Final

import psycopg

from figbridge.preflight.catalogue import Name


def order(connection: psycopg.Connection, slot: str, tables: Iterable[Name], why: str) -> None:
    """Order that `tables` are read from their beginning, whatever was ordered before. Raises psycopg.Error."""
    for schema, table in tables:
        connection.execute(_ORDER, {"slot": slot, "schema": schema, "table": table, "why": why})


_ORDER: Final = """
INSERT INTO figbridge.snapshot AS s (slot, system_identifier, schema_name, table_name, run, state, gap)
VALUES (%(slot)s, (SELECT system_identifier::text FROM pg_control_system()), %(schema)s, %(table)s,
        (extract(epoch FROM clock_timestamp()) * 1000000)::bigint, 'waiting', %(why)s)
ON CONFLICT (slot, system_identifier, schema_name, table_name) DO UPDATE
SET run = greatest(excluded.run, s.run + 1), state = excluded.state, gap = excluded.gap, condition = NULL,
    cursor = NULL, rows = 0, estimate = NULL, message = NULL, since = NULL, requested_at = now(), started_at = NULL,
    updated_at = now()
"""
