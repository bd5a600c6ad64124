"""`figbridge init`: make what is missing, and say what was found."""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Final

import psycopg
import structlog

from figbridge import canary, legacy, preflight
from figbridge.change import Lsn
from figbridge.config import Config, LegacySection, split_table
from figbridge.errors import BridgeError, Problem, SetupError
from figbridge.preflight import alone, catalogue, failover, reverse, stream
from figbridge.preflight.catalogue import Name, Publication, Slot, spell
from figbridge.preflight.own import own_tables
from figbridge.provision import backfill, statements

_log = structlog.get_logger()

_PATIENCE: Final = 3.0  # seconds of waiting for the slot after which the log says for whom
# "does not have a replica identity", "must not contain unpublished generated columns"
_WOULD_BREAK: Final = ("55000", "42P10")


def initialise(config: Config) -> list[str]:
    """Make what is missing; a line for each thing made, found, or worth a warning. Running it again is harmless.

    Raises SetupError with every problem before anything is done, LegacyUnavailable, or BridgeError.
    """
    found = preflight.require(config, "init")
    others = [f"warning: {it.where}: {it.what}; {it.remedy}" for it in found if it.where == alone.PLACE]
    dsn = config.legacy.dsn.get_secret_value()
    wanted = statements.publications(config)
    with legacy.translated(), legacy.connect(dsn, purpose="init") as connection:
        connection.execute(statements.LOCK_TIMEOUT)
        # two `init` at once (replicas with an init container) would both find nothing and both make it
        connection.execute("SELECT pg_advisory_xact_lock(hashtext('figbridge init'))")
        lines = _make_schema(connection, config)
        before = {name: catalogue.publication(connection, name) for name in wanted}
        for name, (tables, operations) in wanted.items():
            connection.execute(statements.publication_sql(name, tables, operations))
        _prove_harmless(connection, config, before)
        if statements.wants_origin(config):
            name = canary.origin(config.legacy.slot)
            there = catalogue.has_origin(connection, name)
            connection.execute(statements.origin_sql(config.legacy.slot))
            lines.append(f"replication origin {name}: {'there already' if there else 'made'}")
        slot_was_there = catalogue.slot(connection, config.legacy.slot) is not None
        for name in wanted:
            made = catalogue.publication(connection, name)
            lines += _told(connection, config, name, before[name], made)
            if made and made.made_at and before[name] is None and slot_was_there:
                lines.append(_too_young(config.legacy, name, made))
    return [*lines, *others, *_make_slot(config)] if config.forward else [*lines, *others]


def _make_schema(connection: psycopg.Connection, config: Config) -> list[str]:
    names = [(legacy.SCHEMA, table) for table in own_tables(config)]
    if not names:
        return []
    missing = [table for schema, table in names if (schema, table) not in catalogue.tables(connection, names)]
    if not missing and not reverse.outdated(connection, config):
        # not even IF NOT EXISTS: it wants CREATE on the database, which the bridge's own role need not have
        return [f"schema {legacy.SCHEMA}: there already"]
    connection.execute(statements.schema_sql())
    done = f"made {', '.join(missing)}" if missing else "brought up to date"
    return [f"schema {legacy.SCHEMA}: {done}"]


def _prove_harmless(connection: psycopg.Connection, config: Config, before: Mapping[str, Publication | None]) -> None:
    """Ask the server, not our knowledge of its rules, whether the new tables can still be written.

    It checks a table's replica identity when it plans a DELETE; since 18 also its generated columns. Raises SetupError.
    """
    if not config.forward:
        return
    old = before[config.legacy.publication]
    for name in config.legacy.tables:
        table = split_table(name)
        if old and table in old.tables:
            continue
        try:
            connection.execute(statements.harmless_sql(table))
        except psycopg.Error as error:
            if error.sqlstate not in _WOULD_BREAK:
                raise
            what = f"once published, the application could not UPDATE or DELETE any more: {str(error).strip()}"
            remedy = "give the table a replica identity; nothing was changed"
            raise SetupError("the bridge cannot be set up", [Problem(f"table {name}", what, remedy)]) from error


def _told(
    connection: psycopg.Connection, config: Config, name: str, before: Publication | None, after: Publication | None
) -> list[str]:
    """What became of a publication, in words."""
    tables, _ = statements.publications(config)[name]
    place = f"publication {spell(name)}"
    if before is None:
        return [f"{place}: made for {', '.join(spell(*table) for table in tables)}"]
    lines = [
        f"{place}: added {spell(*table)}; its changes leave from now on, {_rows_of(connection, config, table)}"
        for table in tables
        if table not in before.tables
    ] or [f"{place}: there already"]
    for table in sorted(after.tables.difference(tables) if after else ()):
        finding = stream.unconfigured(name, table)
        lines.append(f"warning: {finding.where} {finding.what}; {finding.remedy}")
    return lines


def _rows_of(connection: psycopg.Connection, config: Config, table: Name) -> str:
    """What becomes of the rows of a table that is added."""
    if config.forward and config.forward.snapshot != "never" and table in config.snapshot_tables:
        had = connection.execute(
            "SELECT FROM figbridge.snapshot WHERE (slot, schema_name, table_name) = (%s, %s, %s) "
            "AND system_identifier = (SELECT system_identifier::text FROM pg_control_system()) AND state <> 'waiting'",
            [config.legacy.slot, *table],
        )
        if had.rowcount:
            return (
                "the rows that are there already do not, because a table of that name had a snapshot before: "
                f"`figbridge snapshot {spell(*table)}` reads them"
            )
        return "and the bridge reads the rows that are there already once it is started again"
    return "the rows that are there already do not"


def _too_young(section: LegacySection, name: str, made: Publication) -> str:
    return (
        f"warning: slot {section.slot} is older than publication {spell(name)}: leave the bridge running with its "
        f"present configuration until restart_lsn of the slot in pg_replication_slots is at least {made.made_at}, "
        "then restart it with the new one (`figbridge check` says when)"
    )


def _make_slot(config: Config) -> list[str]:
    section, dsn = config.legacy, config.legacy.dsn.get_secret_value()
    opened = legacy.connect(dsn, purpose="init", autocommit=True, patience=None)
    with legacy.translated(), opened as connection:
        if found := catalogue.slot(connection, section.slot):
            return [f"slot {section.slot}: there already", *_no_failover(section, found)]
        # first, and committed: a new slot that is judged by the old one's note would be taken for a stranger's
        with connection.transaction():
            lines = _forget(connection, config)
        made = make_slot(connection, section)
    if made is None:  # a second `init` was faster
        return [f"slot {section.slot}: there already"]
    return [*lines, f"slot {section.slot}: made, changes leave from {made} on"]


def _forget(connection: psycopg.Connection, config: Config) -> list[str]:
    """Notes about an earlier slot, which tell of a gap; with forward.on-slot-loss, order what makes up for it."""
    slot, gap = config.legacy.slot, False
    if config.recreates_slot or config.guards_slot:
        found = connection.execute(f"SELECT {statements.gap_sql(config)}").fetchone()
        gap = found == (True,)
    if config.guards_slot:
        connection.execute(statements.forget_sql(slot))
    if config.takes_snapshots:
        connection.execute(statements.forget_snapshots_sql(config))
    if not gap:
        return []
    told = "warning: there was a slot before, and changes since then are in no event: "
    if config.recreates_slot:
        why = f"replication slot {slot!r} did not exist, and `figbridge init` made it anew"
        backfill.order(connection, slot, config.snapshot_tables, why)
    elif not (config.forward and config.forward.snapshot == "when-needed"):
        return [f"{told}copy the tables anew (`figbridge snapshot`)"]
    return [f"{told}every table will be read again"]


def make_slot(connection: psycopg.Connection, section: LegacySection) -> Lsn | None:
    """Make the slot, however long the server waits for the transactions that are open; None if it is there meanwhile.

    `connection` is in autocommit mode and has no patience. https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-REPLICATION
    """
    create = statements.create_slot(section, connection.info.server_version)
    try:
        with (
            _telling_for_whom(section.dsn.get_secret_value(), connection.info.backend_pid, section.slot),
            connection.transaction(),
        ):
            connection.execute(statements.NO_TIMEOUTS)
            row = connection.execute(f"SELECT lsn::text FROM {create}").fetchone()  # noqa: S608 (quoted)
    except psycopg.errors.DuplicateObject:
        return None
    return Lsn.parse(row[0]) if row else None


def _no_failover(section: LegacySection, slot: Slot) -> list[str]:
    """An old slot is never altered: its reader would have to be stopped, and that is for a human to time."""
    if not section.failover or slot.failover is not False:
        return []
    return [f"warning: slot {slot.name} is not kept by a standby; {failover.alter(slot.name)}"]


@contextlib.contextmanager
def _telling_for_whom(dsn: str, pid: int, slot: str) -> Iterator[None]:
    """While the block runs, log every few seconds which transactions backend `pid` waits for."""
    done = threading.Event()

    def tell() -> None:
        while not done.wait(_PATIENCE):
            with contextlib.suppress(BridgeError):  # what matters is the slot, not the talk about it
                _log.warning(
                    "the slot waits for transactions to end",
                    slot=slot,
                    blocked_by=_blockers(dsn, pid),
                    hint="it begins when all that were open have ended; end the ones nobody needs, or wait",
                )

    teller = threading.Thread(target=tell, name="init-waits", daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()


def _blockers(dsn: str, pid: int) -> list[str]:
    with legacy.translated(), legacy.connect(dsn, purpose="init-waits", autocommit=True) as connection:
        rows = connection.execute(
            """
            SELECT coalesce(concat_ws(', ', 'pid ' || a.pid, nullif(a.application_name, ''), a.usename),
                            'a prepared transaction')
            FROM unnest(pg_blocking_pids(%s)) AS b (pid) LEFT JOIN pg_stat_activity a ON a.pid = b.pid
            """,
            [pid],
        ).fetchall()
    return [who for (who,) in rows]
