"""The preflight: probes, not assumptions; every finding with its remedy.

    inspect ─▶ server   version, settings, and a replication connection opened for real
            ─▶ tables   what is to be published, and whether the application can still UPDATE it then
            ─▶ leaving  which columns of which tables leave, and as what
            ─▶ stream   publications, slot, and what guards it
            ─▶ failover whether a standby would have the slot
            ─▶ standby  whether snapshots can be read from the one that is named for that
            ─▶ reverse  our schema; each mapping held against the catalogue
            ─▶ loops    may the reverse path mark its transactions?
            ─▶ alone    has another bridge its reverse path here?
            ─▶ split    of a file with one direction: is the other at work here by another file?
            ─▶ ends     the sink and the queue, asked themselves                        (stage run only)

INVARIANT. It reads. Nothing is created, locked or changed, so it may run beside a working bridge and as often as one
likes. All findings are reported, not the first one: a DBA is asked once.

A configuration without `forward` needs no slot, no publication and no logical WAL, and is not asked for them.

What it does not do: repair (that is `figbridge.provision`, and a human), or wait. A database that cannot be reached is
no finding but LegacyUnavailable, because the caller knows whether trying again makes sense. A way to it that only the
reverse path takes (`legacy.reverse-dsn`) is a finding: the forward path does not wait for a pooler.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import psycopg

from figbridge import legacy, transports
from figbridge.config import Config, DeadLettersSection, Direction, RelaySection, split_table
from figbridge.contracts import Contracts
from figbridge.errors import (
    BridgeError,
    ConfigError,
    LegacyUnavailable,
    Problem,
    QueueUnavailable,
    SetupError,
    SinkUnavailable,
)
from figbridge.preflight import (
    alone,
    catalogue,
    failover,
    leaving,
    loops,
    reverse,
    server,
    split,
    standby,
    stream,
    tables,
)
from figbridge.preflight.finding import Finding, Level, Stage, error, ok, warning
from figbridge.preflight.leaving import LEAVING
from figbridge.preflight.own import forward_tables

__all__ = ["LEAVING", "WRITING", "Finding", "Level", "Stage", "inspect", "require", "require_writing"]

WRITING: Final = "legacy.reverse-dsn"

# not `figbridge check`: that is this
_GRANTS: Final = (
    "grant what the message says is denied; `figbridge init --print-sql` has every right that the role needs"
)


def inspect(config: Config, stage: Stage, only: Direction | None = None) -> list[Finding]:
    """Everything worth knowing, in the order in which one would mend it.

    `only` names the direction that this process will run; the end of the other one is another process's business.
    Stage ``init`` asks whether `figbridge init` may begin and would do no harm; ``run`` asks whether all is there.
    Raises LegacyUnavailable when the database does not answer.
    """
    if only == "relay" or config.database is None:  # no database is asked
        return [] if stage == "init" else [*_ends(config, only)]
    dsn = config.legacy.dsn.get_secret_value()
    names = [split_table(name) for name in config.legacy.tables]
    with legacy.translated(_GRANTS), legacy.connect(dsn, purpose="check", autocommit=True) as connection:
        # under SQL_ASCII psycopg would hand out bytes; names are UTF-8 wherever they are anything
        connection.execute("SET client_encoding TO 'UTF8'")
        findings = [*server.probe(connection)]
        if config.forward:
            findings += server.probe_replication(connection, dsn, config.legacy.slot)
            findings += tables.probe(connection, names)
            findings += leaving.probe(connection, config.forward, names)
            findings += stream.probe(connection, config, names, stage)
            findings += failover.probe(connection, config.legacy)
            findings += standby.probe(connection, config)
            findings += stream.probe_guard(config)
        findings += _writing(connection, config, names, stage, only)
        findings += alone.probe(connection, config)
        if stage == "run":
            findings += split.probe(connection, config)
    return findings if stage == "init" else [*findings, *_ends(config, only)]


def _writing(
    connection: psycopg.Connection,
    config: Config,
    names: Sequence[catalogue.Name],
    stage: Stage,
    only: Direction | None,
) -> list[Finding]:
    """Of the reverse path, over a connection such as it will use; `connection` is to legacy.dsn.

    Where another DSN leads to it, nothing behind that one may keep the forward path from running.
    """
    if config.legacy.reverse_dsn is None or config.reverse is None or stage == "init":  # which goes by legacy.dsn alone
        findings = [*reverse.probe(connection, config, names, stage)]
        return [*findings, *loops.probe(connection, config, stage)] if config.reverse else findings
    if only != "forward":
        try:
            return _writing_itself(config, names)
        except LegacyUnavailable as failure:
            remedy = failure.hint or "the reverse path waits for it, and the forward path does not"
            away = [warning(WRITING, f"does not answer: {failure}", remedy)]
    else:
        away = []
    return [*reverse.probe_tables(connection, forward_tables(config), stage), *away]


def _writing_itself(config: Config, names: Sequence[catalogue.Name]) -> list[Finding]:
    with (
        legacy.translated(_GRANTS),
        legacy.connect(config.legacy.write_dsn, purpose="check", autocommit=True) as connection,
    ):
        connection.execute("SET client_encoding TO 'UTF8'")
        return [*reverse.probe(connection, config, names, "run"), *loops.probe(connection, config, "run")]


def require_writing(config: Config) -> None:
    """Make up for what `require` could not ask of legacy.reverse-dsn. Raises SetupError, LegacyUnavailable."""
    names = [split_table(name) for name in config.legacy.tables]
    _refuse(_writing_itself(config, names), config, "run")


def require(config: Config, stage: Stage, only: Direction | None = None) -> list[Finding]:
    """The findings, when none of them stands in the way. Raises SetupError with every error otherwise.

    A mapping that does not fit its table stands in nobody's way but its own: `figbridge.reverse.drift`. A standby that
    snapshots cannot be read from stands in their way, and not in the stream's: `figbridge.forward.snapshot.standby`.
    """
    findings = inspect(config, stage, only)
    _refuse(findings, config, stage)
    return findings


def _refuse(findings: Sequence[Finding], config: Config, stage: Stage) -> None:
    if problems := [Problem(it.where, it.what, it.remedy) for it in findings if it.level == "error" and _fatal(it)]:
        database = f" ({legacy.describe(config.database.dsn.get_secret_value())})" if config.database else ""
        raise SetupError(f"the bridge cannot {'be set up' if stage == 'init' else 'run'}{database}", problems)


def _fatal(finding: Finding) -> bool:
    if finding.where == standby.PLACE:
        return False
    return not finding.where.startswith("reverse.mappings.") or finding.where.endswith(".match.source")


def _ends(config: Config, only: Direction | None) -> Iterator[Finding]:
    if config.forward and only in {None, "forward"}:
        sink = config.forward.sink
        yield _end("forward.sink", sink.type, lambda: transports.open_sink(sink))
        if standard := config.forward.contracts:
            yield _contracts("forward.contracts.path", standard.path)
            if aside := standard.quarantine:
                yield _end("forward.contracts.quarantine", aside.type, lambda: transports.open_sink(aside))
        if claims := config.forward.claim_check:
            yield _end("forward.claim-check", "s3", lambda: transports.open_deposit(claims))
        if letters := config.forward.dead_letters:
            yield from _store("forward.dead-letters", letters, "")
    if config.reverse and only in {None, "reverse"}:
        source, days = config.reverse.source, config.reverse.inbox_retention
        yield from _ended("reverse.source", source.type, lambda: transports.open_source(source), days)
    if config.relay and only in {None, "relay"}:
        yield from _relay_ends(config.relay, config.dsn_for(config.relay.dead_letters))


def _store(where: str, section: DeadLettersSection, dsn: str) -> Iterator[Finding]:
    """Without `dsn` the table is left out: it is among our own tables."""
    if section.type != "table" or dsn:
        yield _end(where, section.type, lambda: transports.open_dead_letters(section, dsn))


def _relay_ends(relay: RelaySection, dsn: str) -> Iterator[Finding]:
    yield _contracts("relay.contracts", relay.contracts)
    if queue := relay.source:
        yield _end("relay.source", queue.type, lambda: transports.open_source(queue))
    yield _end("relay.sink", relay.sink.type, lambda: transports.open_sink(relay.sink))
    if quarantine := relay.quarantine:
        yield _end("relay.quarantine", quarantine.type, lambda: transports.open_sink(quarantine))
    if letters := relay.dead_letters:
        yield from _store("relay.dead-letters", letters, dsn)


def _contracts(where: str, directory: Path) -> Finding:
    try:
        contracts = Contracts.load(directory, where)
    except ConfigError as failure:
        told = "; ".join(f"{it.where}: {it.what}" if it.where != where else it.what for it in failure.problems)
        return error(where, told, failure.problems[0].remedy)
    return ok(where, f"{len(contracts)} of them, all of them JSON Schemas")


def _ended(where: str, kind: str, opened: Callable[[], Any], days: float) -> Iterator[Finding]:
    """As `_end`, of a source whose idempotency keys are known for so many days."""
    ends: list[Any] = []

    def kept() -> Any:
        ends.append(opened())
        return ends[0]

    yield _end(where, kind, kept)
    # of SQS the file itself says enough: 14 days at most
    if kind == "kinesis" and ends and days * 86400 <= ends[0].kept < math.inf:
        yield warning(
            "reverse.inbox-retention",
            f"a key is known for {days:g} days, and the stream keeps a record for {ends[0].kept / 86400:g}: one that "
            "is read again (by another subscriber, or from a checkpoint that was set back) could be applied twice",
            "give more days, or let the mappings have a version, which outlives the key",
        )


def _end(where: str, kind: str, opened: Callable[[], Any]) -> Finding:
    """Open it, let it check itself, close it. Any: a Sink or a Source; of both only check and close are needed."""
    try:
        end = opened()
        try:
            end.check()
        finally:
            end.close()
    except (SinkUnavailable, QueueUnavailable, LegacyUnavailable) as failure:
        return warning(where, f"did not answer now: {failure}", failure.hint or "the bridge tries again until it does")
    except BridgeError as failure:
        return error(where, str(failure), failure.hint)
    except OSError as failure:
        return error(where, str(failure), "mend the path, or its permissions")
    return ok(where, f"{kind} answers and may be used")
