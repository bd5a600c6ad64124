"""Ordinary connections to the legacy database, the polite way.

Everything that is not the replication stream goes through `connect`: it names itself in pg_stat_activity, fails fast
when the server is gone, and never leaves a transaction idle.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import psycopg
from psycopg import conninfo

from figbridge.errors import BridgeError, LegacyUnavailable

SCHEMA: Final = "figbridge"

# SQLSTATE classes whose cause passes by itself: connection, serialization and deadlock, resources, object in use
# or lock not available, operator intervention. https://www.postgresql.org/docs/current/errcodes-appendix.html
_PASSING: Final = ("08", "40", "53", "55", "57")


def connect(dsn: str, *, purpose: str, autocommit: bool = False) -> psycopg.Connection:
    """A connection that names itself ``figbridge-<purpose>``. Raises LegacyUnavailable (retryable) or BridgeError."""
    try:
        return psycopg.connect(
            dsn,
            autocommit=autocommit,
            application_name=f"figbridge-{purpose}",
            connect_timeout=conninfo.conninfo_to_dict(dsn).get("connect_timeout") or 10,
            prepare_threshold=None,  # PgBouncer's transaction mode hands a prepared statement to nobody
        )
    except psycopg.OperationalError as error:
        raise translate(error) from error


def describe(dsn: str) -> str:
    """The DSN without its password, for logs and messages."""
    try:
        parts = conninfo.conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:
        return "(a DSN that libpq cannot read)"
    return " ".join(f"{key}={parts[key]}" for key in ("host", "port", "dbname", "user") if parts.get(key))


def translate(error: psycopg.Error) -> BridgeError:
    """The psycopg error as one of ours: LegacyUnavailable when its SQLSTATE says that it passes."""
    state = error.sqlstate
    text = str(error).strip()
    if state is None or state.startswith(_PASSING):
        return LegacyUnavailable(
            f"the legacy database is not available: {text}", hint="nothing is lost; the bridge tries again"
        )
    return BridgeError(f"the legacy database refused: {text} (SQLSTATE {state})")


@contextmanager
def translated() -> Iterator[None]:
    """Raise psycopg's errors inside as ours."""
    try:
        yield
    except psycopg.Error as error:
        raise translate(error) from error


def primary_key(dsn: str, schema: str, table: str) -> tuple[str, ...]:
    """The columns of a table's primary key, in the key's order; empty without one. Raises as `connect`."""
    with connect(dsn, purpose="catalogue", autocommit=True) as connection, translated():
        rows = connection.execute(
            """
            SELECT a.attname
            FROM pg_index i
            JOIN pg_class c ON c.oid = i.indrelid
            JOIN pg_namespace n ON n.oid = c.relnamespace
            CROSS JOIN LATERAL unnest(i.indkey) WITH ORDINALITY AS k(attnum, position)
            JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.attnum
            WHERE i.indisprimary AND n.nspname = %s AND c.relname = %s
            ORDER BY k.position
            """,
            [schema, table],
        ).fetchall()
        return tuple(name for (name,) in rows)


@dataclass(frozen=True, slots=True)
class TypeDescription:
    """What a type is made of, as far as that never changes while the type exists.

    base        a domain's type, which may be a domain again; None for every other type
    element     an array's element type; None for every other type
    delimiter   what stands between the elements of its literal; only box has another than a comma
    """

    base: int | None
    element: int | None
    delimiter: str


def type_description(dsn: str, type_oid: int) -> TypeDescription | None:
    """A type of the catalogue as it is now; None when there is no such type (any more). Raises as `connect`.

    https://www.postgresql.org/docs/current/catalog-pg-type.html
    """
    with connect(dsn, purpose="catalogue", autocommit=True) as connection, translated():
        row = connection.execute(
            """
            -- typelem is also set for name, point and their like: an array is what is another type's typarray
            SELECT nullif(t.typbasetype, 0)::int8, e.oid::int8, coalesce(e.typdelim, ',')::text
            FROM pg_catalog.pg_type t
            LEFT JOIN pg_catalog.pg_type e ON e.typarray = t.oid
            WHERE t.oid = %s
            """,
            [type_oid],
        ).fetchone()
        return TypeDescription(*row) if row else None
