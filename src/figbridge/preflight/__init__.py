"""The preflight: probes, not assumptions; every finding with its remedy.

    inspect ─▶ server   version, settings, and a replication connection opened for real
            ─▶ tables   what is to be published, and whether the application can still UPDATE it then
            ─▶ stream   publications, slot, and what guards it
            ─▶ failover whether a standby would have the slot
            ─▶ reverse  our schema; each mapping held against the catalogue
            ─▶ ends     the sink and the queue, asked themselves                        (stage run only)

INVARIANT. It reads. Nothing is created, locked or changed, so it may run beside a working bridge and as often as one
likes. All findings are reported, not the first one: a DBA is asked once.

A configuration without `forward` needs no slot, no publication and no logical WAL, and is not asked for them.

What it does not do: repair (that is `figbridge.provision`, and a human), or wait. A database that cannot be reached is
no finding but LegacyUnavailable, because the caller knows whether trying again makes sense.
"""

from collections.abc import Callable, Iterator
from typing import Any

from figbridge import legacy, transports
from figbridge.config import Config, Direction, split_table
from figbridge.errors import BridgeError, Problem, QueueUnavailable, SetupError, SinkUnavailable
from figbridge.preflight import failover, reverse, server, stream, tables
from figbridge.preflight.finding import Finding, Level, Stage, error, ok, warning

__all__ = ["Finding", "Level", "Stage", "inspect", "require"]


def inspect(config: Config, stage: Stage, only: Direction | None = None) -> list[Finding]:
    """Everything worth knowing, in the order in which one would mend it.

    `only` names the direction that this process will run; the end of the other one is another process's business.
    Stage ``init`` asks whether `figbridge init` may begin and would do no harm; ``run`` asks whether all is there.
    Raises LegacyUnavailable when the database does not answer.
    """
    dsn = config.legacy.dsn.get_secret_value()
    names = [split_table(name) for name in config.legacy.tables]
    with legacy.translated(), legacy.connect(dsn, purpose="check", autocommit=True) as connection:
        # under SQL_ASCII psycopg would hand out bytes; names are UTF-8 wherever they are anything
        connection.execute("SET client_encoding TO 'UTF8'")
        findings = [*server.probe(connection)]
        if config.forward:
            findings += server.probe_replication(connection, dsn, config.legacy.slot)
            findings += tables.probe(connection, names)
            findings += stream.probe(connection, config.legacy, names, config.reverse is not None, stage)
            findings += failover.probe(connection, config.legacy)
            findings += stream.probe_guard(config)
        findings += reverse.probe(connection, config, names, stage)
    return findings if stage == "init" else [*findings, *_ends(config, only)]


def require(config: Config, stage: Stage, only: Direction | None = None) -> list[Finding]:
    """The findings, when none of them is an error. Raises SetupError with every error otherwise."""
    findings = inspect(config, stage, only)
    if problems := [Problem(it.where, it.what, it.remedy) for it in findings if it.level == "error"]:
        database = legacy.describe(config.legacy.dsn.get_secret_value())
        raise SetupError(f"the bridge cannot {'be set up' if stage == 'init' else 'run'} ({database})", problems)
    return findings


def _ends(config: Config, only: Direction | None) -> Iterator[Finding]:
    if config.forward and only != "reverse":
        sink = config.forward.sink
        yield _end("forward.sink", sink.type, lambda: transports.open_sink(sink))
    if config.reverse and only != "forward":
        source = config.reverse.source
        yield _end("reverse.source", source.type, lambda: transports.open_source(source))


def _end(where: str, kind: str, opened: Callable[[], Any]) -> Finding:
    """Open it, let it check itself, close it. Any: a Sink or a Source; of both only check and close are needed."""
    try:
        end = opened()
        try:
            end.check()
        finally:
            end.close()
    except (SinkUnavailable, QueueUnavailable) as failure:
        return warning(where, f"did not answer now: {failure}", failure.hint or "the bridge tries again until it does")
    except BridgeError as failure:
        return error(where, str(failure), failure.hint)
    except OSError as failure:
        return error(where, str(failure), "mend the path, or its permissions")
    return ok(where, f"{kind} answers and may be used")
