"""Probes of a file with one direction: is the other one at work on this database by another file?

Two containers may share the work, with one file and ``--only``. With a file each, the forward path knows of no reverse
path, looks for no mark, and publishes what the reverse path wrote: a loop.
"""

from collections.abc import Iterator
from typing import Final

import psycopg

from figbridge import canary
from figbridge.config import Config
from figbridge.preflight import catalogue
from figbridge.preflight.finding import Finding, error, warning

_ONE_FILE: Final = "give both processes one file with both sections, and run each with --only"
# names of applications are shown to every role
_APPLYING: Final = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = 'figbridge-apply' AND pid <> pg_backend_pid()
"""
_LAST: Final = """
    SELECT max(applied_at)::text FROM figbridge.inbox WHERE applied_at > now() - interval '1 day' AND source <> %s
"""


def probe(connection: psycopg.Connection, config: Config) -> Iterator[Finding]:
    """Of a configuration that has one of the two sections, at stage run."""
    if config.forward and not config.reverse:
        yield from _forward_alone(connection)
    elif config.reverse and not config.forward:
        yield from _reverse_alone(connection, config)


def _forward_alone(connection: psycopg.Connection) -> Iterator[Finding]:
    row = connection.execute(_APPLYING).fetchone()
    if row and row[0]:
        yield error(
            "reverse",
            f"this file has no such section, and {row[0]} sessions of a reverse path are connected to this database: "
            "what they write would leave as events of the legacy application, and loop",
            _ONE_FILE,
        )
        return
    # to_regclass would raise where the role may not use the schema, which a path without tables of ours need not
    inbox = catalogue.tables(connection, [canary.INBOX]).get(canary.INBOX)
    last = connection.execute(_LAST, [canary.SOURCE]).fetchone() if inbox and inbox.readable else None
    if last and last[0]:
        yield warning(
            "reverse",
            f"this file has no such section, and a reverse path wrote to this database, at {last[0]} for the last "
            "time: should it go on, its writes would leave as events of the legacy application, and loop",
            f"if it was given up for good, do nothing; otherwise {_ONE_FILE}",
        )


def _reverse_alone(connection: psycopg.Connection, config: Config) -> Iterator[Finding]:
    section = config.legacy
    slot = catalogue.slot(connection, section.slot)
    if slot is None or not slot.here:
        return
    unmarked = section.loop_guard == "inbox" and catalogue.publication(connection, section.inbox_publication) is None
    if unmarked:
        yield error(
            "forward",
            f"this file has no such section, and a forward path has the slot {section.slot} and does not read our "
            f"marks (there is no publication {section.inbox_publication}): what we write would loop",
            f"{_ONE_FILE}; `figbridge init` makes what is missing. Or name another legacy.slot, if that one is not of "
            "this bridge",
        )
    else:
        yield warning(
            "forward",
            f"this file has no such section, and a forward path has the slot {section.slot}: nobody proves at the "
            "start that it recognises our marks",
            _ONE_FILE,
        )
