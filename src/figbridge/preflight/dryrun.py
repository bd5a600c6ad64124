"""Probes of a dry run: whether it may read the rows that it compares, and a word on what it does to the queue."""

from collections.abc import Iterator, Sequence

import psycopg

from figbridge.config import MappingSection, split_table
from figbridge.preflight import catalogue
from figbridge.preflight.catalogue import quote, spell
from figbridge.preflight.finding import Finding, error, warning

_PLACE = "reverse.mode"


def probe(connection: psycopg.Connection, mappings: Sequence[MappingSection]) -> Iterator[Finding]:
    """The tables of `mappings`; one that is not there is somebody else's finding."""
    yield warning(
        _PLACE,
        "dry-run: each event is acknowledged, and nothing of it is written",
        "give it a queue of its own; say live when what it records in figbridge.dry_run is explained",
    )
    names = dict.fromkeys(split_table(part.into) for it in mappings for part in it.parts if part.into)
    found = catalogue.tables(connection, names)
    for table in (found[name] for name in names if name in found):
        if not table.readable:
            role = quote(connection.info.user)
            yield error(
                _PLACE,
                f"role {spell(connection.info.user)} may not read the rows of {table} before and after",
                f"GRANT USAGE ON SCHEMA {quote(table.schema)} TO {role}; GRANT SELECT ON {table.quoted} TO {role};",
            )
