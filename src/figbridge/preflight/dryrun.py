"""Probes of a dry run: whether it may read the rows that it compares, and a word on what it does to the queue."""

from collections.abc import Iterator, Sequence

import psycopg

from figbridge.config import MappingSection, split_table
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
    for table in dict.fromkeys(split_table(part.into) for it in mappings for part in it.parts if part.into):
        name = quote(*table)
        row = connection.execute(
            "SELECT to_regclass(%(name)s) IS NULL OR has_table_privilege(to_regclass(%(name)s), 'SELECT')",
            {"name": name},
        ).fetchone()
        if not (row and row[0]):
            role = connection.info.user
            yield error(
                _PLACE,
                f"role {spell(role)} may not read the rows of {'.'.join(table)} before and after",
                f"GRANT SELECT ON {name} TO {quote(role)};",
            )
