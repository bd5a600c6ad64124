"""Probes of the loop guard: may the reverse path mark its transactions, over the connection that it will use?"""

from collections.abc import Iterator
from typing import Final

import psycopg

from figbridge import canary, legacy
from figbridge.config import Config
from figbridge.preflight import catalogue
from figbridge.preflight.catalogue import quote, spell
from figbridge.preflight.finding import Finding, Stage, error, ok, warning

_PLACE: Final = "legacy.loop-guard"
_ORIGIN: Final = ("pg_replication_origin_session_setup",)
_MAKING: Final = ("pg_replication_origin_create",)
_MESSAGE: Final = ("pg_logical_emit_message",)
# one function for each number of parameters, in some versions with a default: the catalogue knows which there are
_LACKING: Final = """
    SELECT p.oid::regprocedure::text FROM pg_proc p
    WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.proname = ANY (%s)
      AND NOT has_function_privilege(p.oid, 'EXECUTE')
"""


def probe(connection: psycopg.Connection, config: Config, stage: Stage) -> Iterator[Finding]:
    """Over a connection of the reverse path, in autocommit mode."""
    kind = config.legacy.loop_guard
    if stage == "run":
        yield from _pooler(connection, config)
    if config.forward is None:
        return  # nothing can loop
    yield from _rights(connection, config, stage)
    if kind == "origin":
        yield from _origin(connection, config, stage)
    elif kind == "message":
        yield warning(
            _PLACE,
            "message: whoever may connect may also write such a message, and hide a transaction from the bridge",
            "prefer inbox, whose mark takes a right on a table of ours; or trust all who may connect",
        )


def _pooler(connection: psycopg.Connection, config: Config) -> Iterator[Finding]:
    if legacy.direct(connection):
        return
    place = "legacy.reverse-dsn" if config.legacy.reverse_dsn else "legacy.dsn"
    if config.legacy.loop_guard == "origin" and config.forward:
        yield error(
            place,
            "a pooler is between us and the server, and an origin outlives ROLLBACK and DISCARD ALL: it would mark, "
            "and so hide, what other clients write over the same connection",
            "connect the reverse path without the pooler, or use legacy.loop-guard: inbox",
        )
    else:
        yield ok(place, "goes through a pooler, which the reverse path passes")


def _rights(connection: psycopg.Connection, config: Config, stage: Stage) -> Iterator[Finding]:
    functions: tuple[str, ...] = ()
    if config.legacy.loop_guard == "origin":
        functions += _ORIGIN
    if config.legacy.loop_guard == "message" or (config.forward and config.forward.echo == "touched_rows"):
        functions += _MESSAGE
    lacking = [*_lacking(connection, functions)] if stage == "run" else []
    yield from lacking
    if functions and not lacking:
        yield ok(_PLACE, f"{config.legacy.loop_guard}: may be written")


def _lacking(connection: psycopg.Connection, functions: tuple[str, ...]) -> Iterator[Finding]:
    role = connection.info.user
    if lacking := [name for (name,) in connection.execute(_LACKING, [list(functions)])]:
        grants = [f"GRANT EXECUTE ON FUNCTION {name} TO {quote(role)};" for name in lacking]
        yield error(_PLACE, f"role {spell(role)} may not call {', '.join(lacking)}", " ".join(grants))


def _origin(connection: psycopg.Connection, config: Config, stage: Stage) -> Iterator[Finding]:
    name = canary.origin(config.legacy.slot)
    if not catalogue.has_origin(connection, name):
        if stage == "run":
            yield error(_PLACE, f"there is no replication origin {name}", "run `figbridge init`")
        else:
            yield from _lacking(connection, _MAKING)
    yield warning(
        _PLACE,
        "origin: one session at a time has it, so a second replica of the reverse path waits for the first",
        "use inbox where several replicas are to share the work, or anything pools connections",
    )
