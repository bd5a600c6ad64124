"""Connections to the legacy database, the polite way.

Everything that is not a replication connection goes through `connect`: it names itself in pg_stat_activity, fails fast
when the server is gone, and never leaves a transaction idle. It speaks UTF-8, whatever the encoding of the database is,
or what a role's settings ask for: values are what the walsender's are, and the server converts.

Who is dead is found out by three clocks, because each sees what the others do not: ``connect_timeout`` while a
connection is opened; the kernel (`SOCKET`) when the host or the network is gone, however busy the server was; and
`patience`, the only one to notice a proxy or a firewall that keeps the connection and passes nothing on.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, TypeVar

import psycopg
from psycopg import conninfo
from psycopg.abc import PQGen

from figbridge import refusal
from figbridge.errors import BridgeError, LegacyUnavailable

SCHEMA: Final = "figbridge"

# SQLSTATE classes whose cause passes by itself: connection, serialization and deadlock, resources, object in use
# or lock not available, operator intervention; a database that takes no writes for now (25006), as in a failover or a
# cut-over; and a transaction that was idle or took too long (25P03, 25P04), whose connection the server has ended.
# https://www.postgresql.org/docs/current/errcodes-appendix.html
_PASSING: Final = ("08", "25006", "25P03", "25P04", "40", "53", "55", "57")
_AWAY: Final = ("08", "57P")  # of connections, and of servers that stop or start
_LOOK: Final = "look whether it runs, and whether host and port in the DSN are right; then "
_CHECK: Final = "`figbridge check` says what is missing"
_AGAIN: Final = "run the command again. `figbridge run` tries again by itself, and nothing is lost"

# libpq's names; all of them may be set in the DSN. Together: a peer that is gone is noticed after 20 to 25 s, whether
# there is something to send (tcp_user_timeout, milliseconds) or not. Without them Linux takes a quarter of an hour, and
# two hours when idle. https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS
SOCKET: Final[dict[str, int]] = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
PATIENCE: Final = 60.0  # seconds a statement may take when nobody says otherwise
BRIEF: Final = 10.0  # seconds for an answer that needs no lock and little work; the capture loop waits for these
REFUSED: Final = 5.0  # seconds: at most this long after the human has acted; oftener would fill the server's log

T = TypeVar("T")


class Connection(psycopg.Connection[Any]):
    """A connection that ends when an answer does not come within `patience` seconds. Opening it is another clock's."""

    patience: float | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """As psycopg's; an error of its COMMIT is one of ours, for a `translated` in the block has ended by then."""
        try:
            with translated():
                super().__exit__(kind, error, trace)
        finally:
            self.close()

    def wait(self, gen: PQGen[T], *arguments: Any, **options: Any) -> T:
        """As psycopg's, which every statement goes through."""
        if self.patience is None:
            return super().wait(gen, *arguments, **options)
        try:
            return super().wait(_within(gen, self.patience), *arguments, **options)
        except TimeoutError as error:
            self.pgconn.finish()  # an answer that came now would be taken for the next statement's
            raise psycopg.OperationalError(
                f"no answer for {self.patience:g} s: the server, or something on the way to it, hangs"
            ) from error


def _within(gen: PQGen[T], seconds: float) -> PQGen[T]:
    """`gen`, which psycopg resumes at least every 0.1 s. Raises TimeoutError in the place of one more wait."""
    deadline = time.monotonic() + seconds
    try:
        wanted = next(gen)
        while True:
            ready = yield wanted
            if not ready and time.monotonic() > deadline:
                gen.close()
                raise TimeoutError
            wanted = gen.send(ready)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]  # what `gen` returned, as `yield from` would


def connect(
    dsn: str, *, purpose: str, autocommit: bool = False, patience: float | None = PATIENCE, prepares: bool = False
) -> psycopg.Connection:
    """A connection that names itself ``figbridge-<purpose>``. Raises LegacyUnavailable (retryable) or BridgeError.

    A statement that has no answer after `patience` seconds closes the connection and raises psycopg.OperationalError,
    which `translated` makes LegacyUnavailable: what it did is unknown. None waits as long as it takes.

    `prepares`: statements with ``prepare=True`` are prepared, for a `dsn` that names no pooler. Without it none is:
    PgBouncer's transaction mode hands a prepared statement to nobody.
    """
    try:
        connection = Connection.connect(
            dsn,
            autocommit=autocommit,
            application_name=f"figbridge-{purpose}",
            client_encoding="UTF8",
            prepare_threshold=sys.maxsize if prepares else None,  # executions until one is prepared that did not ask
            **socket_settings(dsn),  # type: ignore[arg-type]  # libpq's own parameters, which psycopg passes on
        )
    except psycopg.OperationalError as error:
        raise translate(error) from error
    connection.patience = patience
    return connection


def with_settings(dsn: str, settings: str) -> str:
    """`dsn`, for a session with these settings, ``-c name=value …``."""
    own = conninfo.conninfo_to_dict(dsn).get("options") or ""
    return conninfo.make_conninfo(dsn, options=f"{own} {settings}".strip())


def direct(connection: psycopg.Connection) -> bool:
    """Whether each statement reaches the same backend, so that it may keep something for us. No pooler is in between.

    PgBouncer answers the start-up itself, with a process id that it makes up. Raises psycopg.Error.
    """
    row = connection.execute("SELECT pg_backend_pid()").fetchone()
    return row is not None and row[0] == connection.info.backend_pid


def speak_its_encoding(connection: psycopg.Connection) -> str:
    """Until the current transaction ends, exchange text in the database's own encoding. Its Python codec.

    Whoever writes what the codec can encode is refused nothing for its characters. ``utf-8`` for SQL_ASCII, which takes
    bytes of any encoding, and for two that Python does not know. Raises psycopg.Error.
    """
    connection.execute(
        "SELECT set_config('client_encoding', CASE WHEN e IN ('SQL_ASCII', 'EUC_TW', 'MULE_INTERNAL') THEN 'UTF8' "
        "ELSE e END, true) FROM current_setting('server_encoding') AS e"
    )
    return connection.info.encoding


def socket_settings(dsn: str) -> dict[str, int]:
    """Those of `SOCKET` that the DSN leaves open."""
    given = conninfo.conninfo_to_dict(dsn)
    return {name: value for name, value in SOCKET.items() if given.get(name) is None}


def describe(dsn: str) -> str:
    """The DSN without its password, for logs and messages."""
    try:
        parts = conninfo.conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:
        return "(a DSN that libpq cannot read)"
    return " ".join(f"{key}={parts[key]}" for key in ("host", "port", "dbname", "user") if parts.get(key))


def translate(error: psycopg.Error, missing: str = _CHECK) -> BridgeError:
    """The psycopg error as one of ours: LegacyUnavailable when its SQLSTATE says that it passes.

    `missing` is the remedy where the server lacks an object or the role a right.

    A connection that was refused has no SQLSTATE. It is tried again too, at ERROR (`figbridge.refusal` says why).
    """
    state = error.sqlstate
    text = str(error).strip()
    if state is None and (remedy := refusal.remedy(text)):
        refused = LegacyUnavailable(f"the legacy database refuses the connection: {text}", hint=remedy)
        refused.urgent = True
        refused.retry_after = REFUSED
        return refused
    if state is None or state.startswith(_PASSING):
        look = _LOOK if state is None or state.startswith(_AWAY) else ""
        return LegacyUnavailable(f"the legacy database is not available: {text}", hint=f"{look}{_AGAIN}")
    hint = missing if state.startswith(("3F", "42")) else ""
    return BridgeError(f"the legacy database refused: {text} (SQLSTATE {state})", hint=hint)


@contextmanager
def translated(missing: str = _CHECK) -> Iterator[None]:
    """Raise psycopg's errors inside as ours. `missing` as in `translate`."""
    try:
        yield
    except psycopg.Error as error:
        raise translate(error, missing) from error


@contextmanager
def every_digit(connection: psycopg.Connection) -> Iterator[None]:
    """Let the transaction print floats to the last digit inside, whatever the database or the role says.

    Not outside: what triggers print of our writes is to look like what they print of anybody's. Raises psycopg.Error.
    """
    connection.execute("SET LOCAL extra_float_digits TO 3")
    yield
    connection.execute("SET LOCAL extra_float_digits TO DEFAULT")  # after an error the transaction is over anyway


def primary_key_of(connection: psycopg.Connection, schema: str, table: str) -> tuple[str, ...]:
    """The columns of a table's primary key, in the key's order; empty without one. Raises psycopg.Error."""
    rows = connection.execute(
        """
        SELECT a.attname
        FROM pg_index i
        JOIN pg_class c ON c.oid = i.indrelid
        JOIN pg_namespace n ON n.oid = c.relnamespace
        CROSS JOIN LATERAL unnest(i.indkey) WITH ORDINALITY AS k(attnum, position)
        JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.attnum
        -- behind the key's own columns stand those of INCLUDE
        WHERE i.indisprimary AND k.position <= i.indnkeyatts AND n.nspname = %s AND c.relname = %s
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
    with connect(dsn, purpose="catalogue", autocommit=True, patience=BRIEF) as connection, translated():
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
