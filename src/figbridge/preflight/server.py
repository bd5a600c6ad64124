"""Probes of the server and the role: version, settings, and a replication connection opened for real."""

from collections.abc import Iterator
from typing import Final

import psycopg

from figbridge import legacy
from figbridge.preflight.catalogue import quote, sender_timeout, spell
from figbridge.preflight.finding import Finding, error, ok, warning

_OLDEST: Final = 140000  # 13 is out of support since 2025-11; probed on 15, 16 and 18
_TAKEN_OVER: Final = 10.0  # seconds that a stand-by replica may wait for a machine that vanished
_LONG_TRANSACTION: Final = 300.0  # seconds after which a transaction is worth a word

_RESTART: Final = "restart the server (on Amazon RDS and Aurora: set it in the parameter group, then reboot)"


def probe(connection: psycopg.Connection) -> Iterator[Finding]:
    """What either direction needs of the server."""
    yield version(connection.info.server_version)
    yield _primary(connection)
    yield _encoding(connection)


def probe_replication(connection: psycopg.Connection, dsn: str, slot: str) -> Iterator[Finding]:
    """What the forward path needs of the server and the role."""
    yield _wal_level(connection)
    yield _slots_left(connection, slot)
    yield from _senders_left(connection)
    yield _replication(connection, dsn)
    yield from _retention(connection)
    yield _sender_timeout(connection)
    yield from _long_transactions(connection)


def version(number: int) -> Finding:
    """Judge a server_version_num."""
    text = f"PostgreSQL {number // 10000}.{number % 10000}"
    if number < _OLDEST:
        return error("server", f"{text} is too old", "figbridge needs PostgreSQL 14 or newer: upgrade the server")
    return ok("server", text)


def setting(connection: psycopg.Connection, name: str) -> str:
    """A setting in the server's own words; empty when this version does not know it."""
    row = connection.execute("SELECT current_setting(%s, true)", [name]).fetchone()
    return (row and row[0]) or ""


def _primary(connection: psycopg.Connection) -> Finding:
    row = connection.execute("SELECT pg_is_in_recovery()").fetchone()
    if row and row[0]:
        return error(
            "server",
            "this is a standby: it takes no publication and no row of ours",
            "name the primary in legacy.dsn; with several hosts add target_session_attrs=primary",
        )
    return ok("server", "is the primary")


def _wal_level(connection: psycopg.Connection) -> Finding:
    level = setting(connection, "wal_level")
    if level != "logical":
        return error(
            "server",
            f"wal_level is {level}, so the WAL does not hold what logical decoding needs",
            "ALTER SYSTEM SET wal_level = 'logical'; then restart the server (on Amazon RDS and Aurora: set "
            "rds.logical_replication = 1 in the parameter group, then reboot)",
        )
    return ok("server", "wal_level is logical")


def _encoding(connection: psycopg.Connection) -> Finding:
    encoding = setting(connection, "server_encoding")
    if encoding == "SQL_ASCII":
        return error(
            "server",
            "the database's encoding is SQL_ASCII: the server does not know what its bytes mean, and events are UTF-8",
            "move the data into a database with a real encoding (pg_dump --encoding, then CREATE DATABASE … ENCODING)",
        )
    return ok("server", f"encoding {encoding}")


def _slots_left(connection: psycopg.Connection, slot: str) -> Finding:
    row = connection.execute(
        "SELECT count(*), count(*) FILTER (WHERE slot_name = %s) > 0, current_setting('max_replication_slots')::int "
        "FROM pg_replication_slots",
        [slot],
    ).fetchone()
    used, ours, most = row or (0, False, 0)
    if used >= most and not ours:
        return error(
            "server",
            f"all {most} replication slots are taken (max_replication_slots)",
            f"drop a slot that nobody uses (pg_replication_slots shows them all), or ALTER SYSTEM SET "
            f"max_replication_slots = {most + 5}; then {_RESTART}",
        )
    return ok("server", f"{used} of {most} replication slots are taken")


def _senders_left(connection: psycopg.Connection) -> Iterator[Finding]:
    row = connection.execute(
        "SELECT count(*), current_setting('max_wal_senders')::int FROM pg_stat_replication"
    ).fetchone()
    used, most = row or (0, 0)
    if used >= most:
        yield error(
            "server",
            f"all {most} walsenders are busy (max_wal_senders)",
            f"ALTER SYSTEM SET max_wal_senders = {most + 5}; then {_RESTART}",
        )


def _replication(connection: psycopg.Connection, dsn: str) -> Finding:
    """Open what the bridge will open: attributes alone do not show a pooler in between, or RDS's own rule.

    pg_hba.conf cannot be the reason: a walsender of a database matches the same lines as any other connection to it.

    https://www.postgresql.org/docs/current/protocol-replication.html
    """
    role = connection.info.user
    try:
        with legacy.Connection.connect(
            dsn,
            replication="database",
            autocommit=True,  # a walsender knows BEGIN, but there is nothing to undo
            application_name="figbridge-check",
            prepare_threshold=None,
            **legacy.socket_settings(dsn),  # type: ignore[arg-type]  # libpq's own parameters
        ) as walsender:
            walsender.patience = legacy.PATIENCE
            row = walsender.execute("IDENTIFY_SYSTEM").fetchone()
    except psycopg.Error as refusal:
        row, reason = None, str(refusal).strip()
    else:
        reason = "IDENTIFY_SYSTEM was answered with nothing"
    if row is None:
        return error(f"role {spell(role)}", f"no replication connection: {reason}", _replication_remedy(connection))
    return ok(f"role {spell(role)}", f"may open a replication connection (system identifier {row[0]})")


def _replication_remedy(connection: psycopg.Connection) -> str:
    role = quote(connection.info.user)
    row = connection.execute(
        """
        SELECT me.rolreplication OR me.rolsuper OR coalesce(pg_has_role(rds.oid, 'MEMBER'), false), rds.oid IS NOT NULL
        FROM pg_roles me LEFT JOIN pg_roles rds ON rds.rolname = 'rds_replication' WHERE me.rolname = current_user
        """
    ).fetchone()
    privileged, on_rds = row or (False, False)
    if on_rds and not privileged:
        return f"GRANT rds_replication TO {role};"
    if not privileged:
        return f"ALTER ROLE {role} WITH REPLICATION; (on Amazon RDS: GRANT rds_replication TO {role};)"
    return (
        "the role may replicate, so either all walsenders are busy (max_wal_senders), or something in between refuses: "
        "name the server itself in legacy.dsn, not a pooler (PgBouncer before 1.23 and most proxies do not pass "
        "replication connections on)"
    )


def _retention(connection: psycopg.Connection) -> Iterator[Finding]:
    cap = setting(connection, "max_slot_wal_keep_size")
    if cap == "-1":
        yield warning(
            "server",
            "max_slot_wal_keep_size is -1: while the bridge stands still, its slot keeps WAL until the disk is full",
            "watch figbridge_forward_slot_retained_bytes, or trade the risk: ALTER SYSTEM SET "
            "max_slot_wal_keep_size = '100GB'; SELECT pg_reload_conf(); (beyond the cap the slot is lost, and with it "
            "changes)",
        )
    else:
        yield ok("server", f"a slot keeps at most {cap} of WAL (max_slot_wal_keep_size); beyond that it is lost")
    idle = setting(connection, "idle_replication_slot_timeout")  # since 18
    if idle not in {"", "0"}:
        yield warning(
            "server",
            f"idle_replication_slot_timeout is {idle}: a bridge that is stopped for longer loses its slot, and changes",
            "ALTER SYSTEM SET idle_replication_slot_timeout = 0; SELECT pg_reload_conf();",
        )


def _sender_timeout(connection: psycopg.Connection) -> Finding:
    """Only a choice made for us is worth a word: otherwise the bridge's session sets its own."""
    seconds, chosen = sender_timeout(connection)
    if chosen and not 0 < seconds <= _TAKEN_OVER:
        after = f"for {seconds:g} s" if seconds else "until TCP gives up"
        return warning(
            "server",
            f"wal_sender_timeout is {setting(connection, 'wal_sender_timeout')} for this role, database or DSN: when "
            f"the bridge's machine vanishes, the slot stays taken {after}",
            "take it out of the DSN's options, and ALTER ROLE … RESET wal_sender_timeout; ALTER DATABASE … RESET "
            "wal_sender_timeout; the bridge then sets 5 s for its own session",
        )
    ours = "" if chosen else "; in the bridge's session at most 5s"
    return ok("server", f"wal_sender_timeout is {setting(connection, 'wal_sender_timeout')}{ours}")


def _long_transactions(connection: psycopg.Connection) -> Iterator[Finding]:
    """Transactions that have written and stay open: the slot waits for them to begin, and keeps WAL for them after.

    Without pg_read_all_stats other roles' start times are hidden, and with them the finding.
    """
    rows = connection.execute(
        """
        SELECT concat_ws(', ', 'pid ' || pid, nullif(application_name, ''), usename), now() - xact_start
        FROM pg_stat_activity
        WHERE backend_xid IS NOT NULL AND pid <> pg_backend_pid()
          AND xact_start < now() - make_interval(secs => %(age)s)
        UNION ALL
        SELECT concat_ws(', ', 'prepared transaction ' || gid, owner), now() - prepared
        FROM pg_prepared_xacts WHERE prepared < now() - make_interval(secs => %(age)s)
        ORDER BY 2 DESC
        """,
        {"age": _LONG_TRANSACTION},
    ).fetchall()
    for who, age in rows:
        yield warning(
            "server",
            f"a transaction is open for {str(age).partition('.')[0]} ({who}): a new slot waits for its end, "
            "and an old one keeps all WAL since its start",
            "end it: COMMIT or ROLLBACK [PREPARED], or SELECT pg_terminate_backend(pid);",
        )
