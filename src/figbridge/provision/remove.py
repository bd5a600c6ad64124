"""`figbridge teardown`: remove what `init` made, and nothing else."""

from typing import Final

import psycopg
from psycopg import sql

from figbridge import canary, legacy
from figbridge.config import Config, LegacySection
from figbridge.errors import Problem, SetupError
from figbridge.preflight import catalogue
from figbridge.preflight.catalogue import quote, spell
from figbridge.preflight.own import OWN
from figbridge.provision import statements

_GUARD: Final = (legacy.SCHEMA, "slot_guard")


def teardown(config: Config, *, keep_schema: bool) -> list[str]:
    """Drop the slot, the publications and, unless `keep_schema`, our schema; a line for each.

    The schema holds which events were applied already: without it a repeated one is applied again.
    Raises SetupError, before anything is dropped, while the slot is read, when it is not ours, or when another bridge
    uses the schema; LegacyUnavailable or BridgeError otherwise.
    """
    section, dsn = config.legacy, config.legacy.dsn.get_secret_value()
    with legacy.translated(), legacy.connect(dsn, purpose="teardown", autocommit=True) as connection:
        _may_go(connection, section, keep_schema=keep_schema)
        lines = [_drop_slot(connection, section.slot)]
        if catalogue.tables(connection, [_GUARD]):
            connection.execute(statements.forget_sql(section.slot))
        lines += _drop_origin(connection, section.slot)
        with connection.transaction():
            connection.execute(statements.LOCK_TIMEOUT)
            lines += [_drop_publication(connection, name) for name in (section.publication, section.inbox_publication)]
            lines.append(f"schema {legacy.SCHEMA}: kept" if keep_schema else _drop_schema(connection))
    return lines


def _may_go(connection: psycopg.Connection, section: LegacySection, *, keep_schema: bool) -> None:
    problems = []
    if slot := catalogue.slot(connection, section.slot):
        if slot.holder:
            problems.append(_in_use(section.slot, slot.holder))
        if slot.kind != "logical" or slot.plugin != "pgoutput" or not slot.here:
            what = f"is somebody else's: {slot.kind}, plugin {slot.plugin}, database {slot.database}"
            problems.append(Problem(f"slot {slot.name}", what, "mend legacy.slot or legacy.dsn"))
    others = connection.execute(
        # not by to_regclass, which raises where the role may not use the schema
        "SELECT p.pubname::text FROM pg_publication p WHERE p.pubname <> ALL (%s) AND EXISTS (SELECT FROM "
        "pg_publication_rel r JOIN pg_class c ON c.oid = r.prrelid WHERE r.prpubid = p.oid "
        "AND c.relnamespace = to_regnamespace(%s) AND c.relname = %s) ORDER BY 1",
        [[section.publication, section.inbox_publication], *canary.INBOX],
    ).fetchall()
    if others and not keep_schema:
        what = f"another bridge's publication {', '.join(spell(name) for (name,) in others)} reads it"
        problems.append(
            Problem(f"schema {legacy.SCHEMA}", what, "keep the schema, or tear the other bridge down first")
        )
    if problems:
        raise SetupError("nothing was torn down", problems)


def _drop_origin(connection: psycopg.Connection, slot: str) -> list[str]:
    """Nothing depends on it, so the rest goes also where the role may not drop it."""
    name = canary.origin(slot)
    # looked for first: that a function may be called is checked before there is a row to call it for
    if not connection.execute("SELECT 1 FROM pg_replication_origin WHERE roname = %s", [name]).fetchone():
        return []
    drop = sql.SQL("SELECT pg_replication_origin_drop({})").format(name)
    try:
        connection.execute(drop)
    except psycopg.errors.InsufficientPrivilege:
        what = "kept, for this role may not drop it. As a superuser"
        return [f"replication origin {name}: {what}: {drop.as_string(connection)};"]
    return [f"replication origin {name}: dropped"]


def _in_use(slot: str, holder: str) -> Problem:
    return Problem(f"slot {slot}", f"is being read ({holder})", "stop that bridge first, then tear down")


def _drop_slot(connection: psycopg.Connection, slot: str) -> str:
    try:
        dropped = connection.execute(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots "
            "WHERE slot_name = %s AND database = current_database()",
            [slot],
        ).fetchall()
    except psycopg.errors.ObjectInUse as error:  # a replica came between our look and this
        raise SetupError("nothing was torn down", [_in_use(slot, str(error).strip())]) from error
    return f"slot {slot}: {'dropped' if dropped else 'was not there'}"


def _drop_publication(connection: psycopg.Connection, name: str) -> str:
    if catalogue.publication(connection, name) is None:
        return f"publication {spell(name)}: was not there"
    connection.execute(f"DROP PUBLICATION {quote(name)}")
    return f"publication {spell(name)}: dropped"


def _drop_schema(connection: psycopg.Connection) -> str:
    found = catalogue.tables(connection, [(legacy.SCHEMA, name) for name in OWN])
    there = connection.execute("SELECT to_regnamespace(%s) IS NOT NULL", [legacy.SCHEMA]).fetchone()
    if not (there and there[0]):
        return f"schema {legacy.SCHEMA}: was not there"
    letters = 0
    if (legacy.SCHEMA, "dead_letter") in found:
        row = connection.execute("SELECT count(*) FROM figbridge.dead_letter").fetchone()
        letters = row[0] if row else 0
    try:
        for table in found.values():  # not CASCADE: what else somebody has put there is not ours to drop
            connection.execute(f"DROP TABLE {table.quoted}")
        connection.execute(f"DROP SCHEMA {quote(legacy.SCHEMA)}")
    except psycopg.errors.DependentObjectsStillExist as error:
        what = f"holds or is used by what figbridge did not make: {error.diag.message_detail or error}"
        problem = Problem(f"schema {legacy.SCHEMA}", what, "move that away, or keep the schema")
        raise SetupError("slot is dropped; publications and schema are as they were", [problem]) from error
    return f"schema {legacy.SCHEMA}: dropped, with {letters} dead letters"
