"""Probes of standbys as snapshots see them: the one that is read from, and those that are waited for.

Nothing here keeps a bridge from running: the stream does not need the standby, and a snapshot waits until it can be
read. So what is an error in `figbridge check` is one in the log of a running bridge.
"""

from collections.abc import Iterator
from typing import Final

import psycopg
from psycopg import conninfo

from figbridge import refusal
from figbridge.config import Config
from figbridge.preflight import catalogue
from figbridge.preflight.catalogue import quote, spell
from figbridge.preflight.finding import Finding, error, ok, warning
from figbridge.preflight.server import setting

PLACE: Final = "forward.snapshot-standby"
ANOTHER: Final = (
    "name another standby of legacy.dsn (of several hosts libpq finds one: host=a,b port=5432,5432 "
    "target_session_attrs=standby), or take the setting out to read from legacy.dsn; then start the bridge anew"
)
_PATIENCE: Final = 3  # seconds until it counts as away
_CHUNK: Final = 5000  # milliseconds: the reading of a chunk is broken off after 2 s, and its server may be busy
_BLIND: Final = """
SELECT NOT pg_has_role('pg_read_all_stats', 'USAGE') AND EXISTS (
    SELECT FROM pg_stat_replication r
    WHERE NOT EXISTS (SELECT FROM pg_replication_slots s WHERE s.active_pid = r.pid AND s.slot_type = 'logical')
)
"""


def probe(connection: psycopg.Connection, config: Config) -> Iterator[Finding]:
    """Whether chunks could be read there, and lag be seen. `connection` is to the primary."""
    if config.forward is None or not config.takes_snapshots:
        return
    if config.forward.snapshot_standby_lag:
        yield from _lag(connection)
    if config.forward.snapshot_standby is None:
        return
    given = conninfo.conninfo_to_dict(config.forward.snapshot_standby.get_secret_value())
    dsn = conninfo.make_conninfo(**({"connect_timeout": str(_PATIENCE)} | given))  # type: ignore[arg-type]
    try:
        with psycopg.connect(dsn, autocommit=True, application_name="figbridge-check", prepare_threshold=None) as it:
            it.execute("SET client_encoding TO 'UTF8'")
            found = [*_identity(connection, it)] or [*_rights(it, config), *_replay(it)]
    except psycopg.OperationalError as failure:
        text = str(failure).strip()
        remedy = refusal.remedy(text) or "start it; no snapshot is read until it answers, and the stream does not wait"
        found = [warning(PLACE, f"does not answer: {text}", remedy)]
    yield from found or [ok(PLACE, "is a standby of legacy.dsn, and its tables may be read")]


def _lag(connection: psycopg.Connection) -> Iterator[Finding]:
    """A role without the right reads NULL, and a snapshot would never wait."""
    row = connection.execute(_BLIND).fetchone()
    if row and row[0]:
        yield warning(
            f"{PLACE}-lag",
            f"role {spell(connection.info.user)} may not see how far a standby is behind: no snapshot waits for it",
            f"GRANT pg_monitor TO {quote(connection.info.user)};",
        )


def _identity(primary: psycopg.Connection, standby: psycopg.Connection) -> Iterator[Finding]:
    query = "SELECT (SELECT system_identifier::text FROM pg_control_system()), current_database()::text"
    (ours, database), (theirs, other) = (it.execute(query).fetchone() or ("", "") for it in (primary, standby))
    recovers = standby.execute("SELECT pg_is_in_recovery()").fetchone()
    if ours != theirs:
        yield error(PLACE, f"is a server of another cluster: system identifier {theirs}, not {ours}", ANOTHER)
    elif not (recovers and recovers[0]):
        yield error(PLACE, "is no standby (any more): what is written there is another history", ANOTHER)
    elif database != other:
        yield error(
            PLACE,
            f"names database {spell(other)}, and legacy.dsn {spell(database)}: its rows would be others",
            f"write dbname={database} there",
        )


def _rights(standby: psycopg.Connection, config: Config) -> Iterator[Finding]:
    """A role of its own has rights of its own."""
    found = catalogue.tables(standby, config.snapshot_tables)
    if closed := [table for table in found.values() if not table.readable]:
        role = quote(standby.info.user)
        schemas = ", ".join(dict.fromkeys(quote(table.schema) for table in closed))
        yield error(
            PLACE,
            f"role {spell(standby.info.user)} may not SELECT {', '.join(map(str, closed))}: their snapshots would fail",
            f"on the primary: GRANT USAGE ON SCHEMA {schemas} TO {role}; "
            f"GRANT SELECT ON {', '.join(table.quoted for table in closed)} TO {role};",
        )
    if policed := [table for table in found.values() if table.readable and table.policed]:
        yield error(
            PLACE,
            f"row-level security is in force for role {spell(standby.info.user)} on {', '.join(map(str, policed))}: "
            "their snapshots would fail",
            f"on the primary: ALTER ROLE {quote(standby.info.user)} BYPASSRLS;",
        )


def _replay(standby: psycopg.Connection) -> Iterator[Finding]:
    row = standby.execute("SELECT pg_is_wal_replay_paused()").fetchone()
    if row and row[0]:
        yield warning(
            PLACE,
            "its replay is paused, and a chunk waits until it has the primary's changes",
            "there: SELECT pg_wal_replay_resume();",
        )
    row = standby.execute(
        "SELECT setting::bigint FROM pg_settings WHERE name = 'max_standby_streaming_delay'"
    ).fetchone()
    delay = row[0] if row else -1
    if setting(standby, "hot_standby_feedback") != "on" and 0 <= delay < _CHUNK:
        yield warning(
            PLACE,
            f"max_standby_streaming_delay is {delay} ms and hot_standby_feedback is off: replay may cancel the reading "
            "of the same chunk again and again",
            f"there: ALTER SYSTEM SET max_standby_streaming_delay = '{_CHUNK // 1000}s' (or more), or "
            "hot_standby_feedback = on; SELECT pg_reload_conf();",
        )
