"""The SQL of the set-up, and the script for a DBA that is made of it. No connection is needed to write it.

Every name is quoted, whatever it is made of; comments too are made safe, because a name may hold a line break.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Final

from psycopg import conninfo

from figbridge import canary, legacy
from figbridge.config import Config, LegacySection, split_table
from figbridge.preflight import reverse, stream
from figbridge.preflight.catalogue import Name, literal, quote
from figbridge.preflight.own import OWN, own_tables
from figbridge.provision import backfill

# ADD TABLE takes SHARE UPDATE EXCLUSIVE: readers and writers pass, but VACUUM and DDL may hold us up.
LOCK_TIMEOUT: Final = "SET LOCAL lock_timeout = '10s'"
# The slot waits for every transaction in the cluster that has written; how long is not ours to say.
NO_TIMEOUTS: Final = (
    "SELECT set_config(name, '0', true) FROM pg_settings "
    "WHERE name IN ('statement_timeout', 'lock_timeout', 'transaction_timeout')"
)


def publications(config: Config) -> dict[str, tuple[Sequence[Name], Sequence[str]]]:
    """Name → tables and operations, of each publication that the configuration needs."""
    if not config.forward:
        return {}
    tables = [split_table(name) for name in config.legacy.tables]
    wanted: dict[str, tuple[Sequence[Name], Sequence[str]]] = {config.legacy.publication: (tables, stream.PUBLISHED)}
    if config.publishes_inbox:
        wanted[config.legacy.inbox_publication] = ((canary.INBOX, canary.CANARY), stream.MARKS)
    return wanted


def schema_sql() -> str:
    """schema.sql, as it is in the package."""
    return resources.files("figbridge").joinpath("schema.sql").read_text(encoding="utf-8")


def publication_sql(name: str, tables: Sequence[Name], operations: Sequence[str]) -> str:
    """One statement that makes the publication, or adds to it what it lacks.

    ONLY: a table that inherits from a configured one is published when it is named, not before (it may have no
    replica identity). publish_via_partition_root: an event is named after the table that was configured, also when
    that is partitioned, now or later; its price is that a TRUNCATE of a single partition makes no event.
    """
    only = ", ".join(f"ONLY {quote(*table)}" for table in tables)
    additions = "".join(
        f"""
    IF NOT EXISTS (SELECT FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid
                   WHERE p.pubname = {literal(name)} AND r.prrelid = {literal(quote(*table))}::regclass) THEN
        ALTER PUBLICATION {quote(name)} ADD TABLE ONLY {quote(*table)};
    END IF;"""
        for table in tables
    )
    body = f"""
BEGIN
    IF NOT EXISTS (SELECT FROM pg_publication WHERE pubname = {literal(name)}) THEN
        CREATE PUBLICATION {quote(name)} FOR TABLE {only}
            WITH (publish = '{", ".join(operations)}', publish_via_partition_root = true);
        -- a slot that needs older WAL cannot use this publication: figbridge check compares the two
        EXECUTE format('COMMENT ON PUBLICATION %I IS %L', {literal(name)},
                       'figbridge: made at ' || pg_current_wal_insert_lsn());
    END IF;{additions}
END
"""
    return f"DO {_dollars(body)};"


def _dollars(body: str) -> str:
    tag = "$figbridge$"
    while tag in body:  # a table may have any name
        tag = f"{tag[:-1]}_$"
    return f"{tag}{body}{tag}"


def create_slot(section: LegacySection, version: int) -> str:
    """The call that makes the slot, on a server of `version` (server_version_num).

    https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-REPLICATION
    """
    failover = ", failover => true" if section.failover and version >= 170000 else ""
    return f"pg_create_logical_replication_slot({literal(section.slot)}, 'pgoutput'{failover})"


def wants_origin(config: Config) -> bool:
    """Whether a replication origin marks our transactions."""
    return config.forward is not None and config.reverse is not None and config.legacy.loop_guard == "origin"


def origin_sql(slot: str) -> str:
    """The statement that makes the replication origin of ``loop-guard: origin``, if it is not there.

    Not one query with a condition: that asks for EXECUTE on the function also where there is nothing to make.
    """
    name = literal(canary.origin(slot))
    body = f"""
BEGIN
    IF NOT EXISTS (SELECT FROM pg_replication_origin WHERE roname = {name}) THEN
        PERFORM pg_replication_origin_create({name});
    END IF;
END
"""
    return f"DO {_dollars(body)};"


def forget_sql(slot: str) -> str:
    """The statement after which a slot that is made anew is taken as it is."""
    return f"DELETE FROM figbridge.slot_guard WHERE slot = {literal(slot)}"  # noqa: S608 (quoted)


def forget_snapshots_sql(config: Config, *, only_if: str = "") -> str:
    """The statement after which tables are read again that a slot made anew has left out changes of.

    `only_if` is more of its condition.

    It leaves alone what on-slot-loss has ordered: who ordered it may have been ended before there was a slot.
    """
    again = config.forward is not None and config.forward.snapshot == "when-needed"
    which = "" if again else " AND state NOT IN ('done', 'failed')"
    which += f" AND ({backfill.PENDING}) IS NOT TRUE" if config.recreates_slot else ""
    return f"""\
WITH forgotten AS (
    DELETE FROM figbridge.snapshot WHERE slot = {literal(config.legacy.slot)}{which}{only_if} RETURNING *
)
DELETE FROM figbridge.snapshot_moved AS m USING forgotten AS f
WHERE (m.slot, m.system_identifier, m.schema_name, m.table_name)
    = (f.slot, f.system_identifier, f.schema_name, f.table_name)"""  # noqa: S608 (quoted)


def gap_sql(config: Config) -> str:
    """The condition under which the slot that is made now begins behind a gap, as far as our tables know.

    There is a note about an earlier slot, or a backfill that another gap needed has not ended.
    """
    slot, known = literal(config.legacy.slot), []
    if config.recreates_slot:
        known.append(f"EXISTS (SELECT FROM figbridge.snapshot WHERE slot = {slot} AND {backfill.PENDING})")
    if config.guards_slot:
        known.append(f"EXISTS (SELECT FROM figbridge.slot_guard WHERE slot = {slot})")
    return f"({' OR '.join(known)})"


def harmless_sql(table: Name) -> str:
    """A statement that fails when the application could not DELETE, and UPDATE, any more; it changes nothing."""
    return f"EXPLAIN (COSTS OFF) DELETE FROM {quote(*table)};"  # noqa: S608 (quoted)


def script(config: Config) -> str:
    """The whole set-up as SQL with comments, which psql (and anything else) runs; twice is as good as once.

    No connection is made. The grants are comments, because the role may not exist yet or be named otherwise.
    """
    dsn = config.legacy.dsn.get_secret_value()
    parts = [
        _comment(
            _HEAD.format(database=legacy.describe(dsn), tables="\n".join(f"  {it}" for it in config.legacy.tables))
        )
    ]
    parts += [_comment(_ROLE.format(role=quote(_role(dsn)))), "BEGIN;", f"{LOCK_TIMEOUT};"]
    if own_tables(config):
        parts.append(schema_sql().strip())
    for name, (tables, operations) in publications(config).items():
        parts += [_comment(_PUBLICATION[operations]), publication_sql(name, tables, operations)]
    if config.forward:
        parts.append(_comment(_HARMLESS))
        parts += [harmless_sql(split_table(name)) for name in config.legacy.tables]
    if wants_origin(config):
        parts += [_comment(_ORIGIN), origin_sql(config.legacy.slot)]
    parts += ["COMMIT;"]
    if config.forward:
        parts += [_comment(f"{_SLOT}\n{_rows(config)}"), _slot_sql(config)]
    parts += [_comment("\n".join([_GRANTS, *dict.fromkeys(_grants(config, quote(_role(dsn))))]))]
    return "\n\n".join(parts) + "\n"


def _comment(text: str) -> str:
    # a name may hold a line break, and what follows it must not become SQL
    return "\n".join(f"-- {line}".rstrip() for line in re.split(r"\r\n|\r|\n", text.strip("\n")))


def _role(dsn: str) -> str:
    return str(conninfo.conninfo_to_dict(dsn).get("user") or "figbridge")


def _slot_sql(config: Config) -> str:
    section, slot = config.legacy, literal(config.legacy.slot)
    # where an earlier statement failed and psql went on, there is no publication and there must be no slot
    names = [literal(name) for name in publications(config)]
    missing = f"NOT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = {slot})"
    listed = ", ".join(names)
    made = f"(SELECT count(*) FROM pg_publication WHERE pubname IN ({listed})) = {len(names)}"  # noqa: S608 (quoted)
    # in a transaction of its own: no slot can be made in one that has written
    notes = [*_notes(config, f"\n  AND {missing}")]
    forget = "BEGIN;\n" + "".join(f"{it};\n" for it in notes) + "COMMIT;\n\n"
    new = create_slot(section, 170000)
    call = f"SELECT {new}\nWHERE {missing}\n  AND {made};"
    if section.failover:  # which function there is, only the server knows
        old = create_slot(section, 0)
        body = f"""
BEGIN
    IF current_setting('server_version_num')::int >= 170000 THEN
        PERFORM {new}
        WHERE {missing} AND {made};
    ELSE
        PERFORM {old}
        WHERE {missing} AND {made};
    END IF;
END
"""
        call = f"DO {_dollars(body)};"
    return f"""{forget if notes else ""}BEGIN;
{NO_TIMEOUTS};
{call}
COMMIT;
SELECT slot_name, plugin, database, confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = {slot};"""  # noqa: S608 (quoted)


def _rows(config: Config) -> str:
    """What becomes of the rows that are there already: nobody who runs the SQL has to order anything."""
    if config.forward and config.forward.snapshot != "never":
        again = ", and all of them again after a slot was made anew" if config.forward.snapshot == "when-needed" else ""
        return _READ.format(setting=config.forward.snapshot, again=again)
    return _NOT_READ


def _notes(config: Config, only_if: str) -> Iterator[str]:
    """What our tables say of an earlier slot of this name, as `figbridge init` sees to it."""
    if config.recreates_slot and config.snapshot_tables:
        why = f"replication slot {config.legacy.slot!r} did not exist, and the SQL of `figbridge init` made it anew"
        gap = gap_sql(config) + only_if
        order = backfill.order_sql(config.legacy.slot, config.snapshot_tables, why, only_if=gap)
        yield f"{_comment(_GAP)}\n{order}"
    if config.guards_slot:
        yield f"{_comment(_NOTES)}\n{forget_sql(config.legacy.slot)}{only_if}"
    if config.takes_snapshots:
        yield forget_snapshots_sql(config, only_if=only_if)


def _grants(config: Config, role: str) -> Iterator[str]:
    if config.forward:
        tables = [split_table(name) for name in config.legacy.tables]
        yield from (f"GRANT USAGE ON SCHEMA {quote(it)} TO {role};" for it in sorted({schema for schema, _ in tables}))
        yield from (f"GRANT SELECT ON {quote(*table)} TO {role};" for table in tables)
    for part in [part for mapping in (config.reverse.mappings if config.reverse else ()) for part in mapping.parts]:
        if part.into is not None:
            table = split_table(part.into)
            yield f"GRANT USAGE ON SCHEMA {quote(table[0])} TO {role};"
            rights = dict.fromkeys(reverse.rights(part))
            if config.reverse and config.reverse.mode == "dry-run":
                rights["SELECT"] = None
            yield f"GRANT {', '.join(rights)} ON {quote(*table)} TO {role};"
    if own := own_tables(config):
        yield f"GRANT USAGE ON SCHEMA {quote(legacy.SCHEMA)} TO {role};"
        for name in own:
            yield f"GRANT {', '.join(OWN[name].rights)} ON {quote(legacy.SCHEMA, name)} TO {role};"
    if wants_origin(config):  # at the end: it takes a superuser
        yield f"GRANT EXECUTE ON FUNCTION pg_replication_origin_session_setup(text) TO {role};"


_HEAD: Final = """\
figbridge: the set-up of a legacy database, as SQL.

Database: {database}
Tables to publish:
{tables}

Run it with   psql -v ON_ERROR_STOP=1 -f <this file>   as a role that owns these tables, has CREATE in the database,
and has REPLICATION (or as a superuser). It may be run again, after a table was added to the configuration for instance.
It alters no legacy table, and makes nothing FOR ALL TABLES.

Needs wal_level = logical:  SHOW wal_level;
    ALTER SYSTEM SET wal_level = 'logical';  and a restart
    (on Amazon RDS and Aurora: rds.logical_replication = 1 in the parameter group, and a reboot)"""
_ROLE: Final = """\
The role of the bridge: a suggestion, its rights are at the end. \\password in psql sets its password.
CREATE ROLE {role} WITH LOGIN REPLICATION;
On Amazon RDS:  CREATE ROLE {role} WITH LOGIN; GRANT rds_replication TO {role};"""
_PUBLICATION: Final[Mapping[Sequence[str], str]] = {
    stream.PUBLISHED: """\
The publication: the configured tables and no others. Rows of a partitioned table leave under its name, not under the
partition's. ONLY: a table that inherits from one of these is published when it is named itself.""",
    stream.MARKS: """\
The publication of our own marks, by which the bridge knows its own writes when it reads them back. Inserts only:
purging old marks makes no traffic.""",
}
_HARMLESS: Final = """\
The proof that the application can still UPDATE and DELETE: EXPLAIN plans the statement and runs nothing. A published
table without a replica identity fails here, and the whole transaction is rolled back."""
_ORIGIN: Final = """\
The replication origin by which the bridge marks its own transactions (loop-guard: origin). Only a superuser makes it,
or a role that one has granted, in this database, EXECUTE ON FUNCTION pg_replication_origin_create(text).
To use it takes the GRANT EXECUTE at the end, which is for a superuser, too."""
_SLOT: Final = """\
The slot, last: one that is older than its publications cannot use them. It waits until all transactions that are open
now have ended (in the whole cluster), so it may take a while. From here on the server keeps WAL for the bridge."""
_READ: Final = """\
Rows that are there already need no order here (forward.snapshot: {setting}): the bridge reads each table once, when it
runs{again}."""
_NOT_READ: Final = """\
Rows that are there already do not leave (forward.snapshot: never). docs/snapshot.md says how they can, now or later."""
_GAP: Final = """\
Only if there was a slot before: changes since then are in no event, so the bridge shall read every table again
(forward.on-slot-loss: recreate-and-backfill)."""
_NOTES: Final = "Notes about an earlier slot of this name."
_GRANTS: Final = """\
The least rights of the bridge's role, to be run once the role exists. Columns with a serial default that an insert does
not name also need:  GRANT USAGE ON SEQUENCE … ;"""
