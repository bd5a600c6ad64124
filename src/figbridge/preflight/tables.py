"""Probes of the tables to publish. The one that matters most: can the application still UPDATE them afterwards?

A table that publishes updates and has no usable replica identity refuses the *application's* UPDATE and DELETE
("cannot update table … because it does not have a replica identity and publishes updates"). So such a table is never
published; the three remedies are named with their cost and the choice is the owner's.
https://www.postgresql.org/docs/current/logical-replication-publication.html#LOGICAL-REPLICATION-PUBLICATION-REPLICA-IDENTITY
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import psycopg

from figbridge import legacy
from figbridge.preflight import catalogue
from figbridge.preflight.catalogue import Name, Table, spell
from figbridge.preflight.finding import Finding, error, ok, warning

KINDS: Final[Mapping[str, str]] = {
    "r": "table",
    "p": "partitioned table",
    "v": "view",
    "m": "materialized view",
    "f": "foreign table",
    "S": "sequence",
    "i": "index",
    "I": "partitioned index",
    "c": "composite type",
}
_IDENTITIES: Final = {"d": "DEFAULT", "i": "USING INDEX", "f": "FULL", "n": "NOTHING"}
SYSTEM_SCHEMAS: Final = frozenset({"pg_catalog", "information_schema", "pg_toast"})


def probe(connection: psycopg.Connection, names: Sequence[Name]) -> Iterator[Finding]:
    """All findings of all tables; one that is ok gives a single line."""
    found = catalogue.tables(connection, names)
    for name in names:
        table = found.get(name)
        if table is None:
            yield missing(connection, name)
            continue
        findings = [*_kind(table)] or [*_content(connection, table, names)]
        yield from findings
        if not any(finding.level == "error" for finding in findings):
            yield ok(f"table {table}", f"{KINDS[table.kind]}, its rows can be named in events")


def missing(connection: psycopg.Connection, name: Name, where: str = "") -> Finding:
    """The table is not there; perhaps another one was meant."""
    near = catalogue.suggestion(connection, name)
    return error(
        where or f"table {spell(*name)}",
        f"there is no table {spell(*name)} in database {spell(connection.info.dbname)}",
        f"did you mean {near}?" if near else "mend the name, or create the table first",
    )


def _kind(table: Table) -> Iterator[Finding]:
    place = f"table {table}"
    if table.schema == legacy.SCHEMA:
        yield error(
            place, "is one of figbridge's own tables; publishing it would be a loop", "remove it from legacy.tables"
        )
    elif table.schema in SYSTEM_SCHEMAS:
        yield error(place, "is a system table; PostgreSQL publishes none", "remove it from legacy.tables")
    elif table.kind not in {"r", "p"}:
        yield error(
            place,
            f"is a {KINDS.get(table.kind, 'relation of kind ' + table.kind)}; only tables have changes in the WAL",
            "name the tables behind it instead",
        )
    elif table.persistence != "p":
        word = "unlogged" if table.persistence == "u" else "temporary"
        yield error(
            place,
            f"is {word}: its changes are not in the WAL",
            f"ALTER TABLE {table.quoted} SET LOGGED; (rewrites it) or remove it from legacy.tables",
        )


def _content(connection: psycopg.Connection, table: Table, names: Sequence[Name]) -> Iterator[Finding]:
    if table.kind == "p":
        yield from _partitioned(connection, table)
    else:
        yield from _identity(connection, table)
        for child in catalogue.children(connection, table):
            if child not in names:
                yield warning(
                    f"table {table}",
                    f"{spell(*child)} inherits from it and is not configured: its rows make no events",
                    f"add {spell(*child)} to legacy.tables",
                )
    if table.is_partition:
        yield _partition(connection, table, names)
    yield from _rights(connection, table)
    if table.generated:
        yield warning(
            f"table {table}",
            f"generated columns are not published: {', '.join(map(spell, table.generated))}",
            "let the consumers compute them; PostgreSQL sends no generated column by default",
        )


def _rights(connection: psycopg.Connection, table: Table, of: str = "") -> Iterator[Finding]:
    """What keeps the role from reading the rows."""
    place, role = f"table {of or table}", catalogue.quote(connection.info.user)
    whose = f" its partition {table}, and without a primary key each is read by itself" if of else ""
    if not table.readable:
        yield warning(
            place,
            f"role {spell(connection.info.user)} may not SELECT{whose}: changes leave, but rows cannot be compared or "
            "copied",
            f"GRANT USAGE ON SCHEMA {catalogue.quote(table.schema)} TO {role}; "
            f"GRANT SELECT ON {table.quoted} TO {role};",
        )
    elif table.policed:
        yield warning(
            place,
            f"row-level security is in force for role {spell(connection.info.user)}{whose and f' on{whose}'}: changes "
            "leave, but a snapshot, which reads all rows or none, fails",
            f"ALTER ROLE {role} BYPASSRLS;",
        )


def _identity(connection: psycopg.Connection, table: Table, of: str = "") -> Iterator[Finding]:
    place = f"table {of or table}"
    subject = f"its partition {table}" if of else "it"
    if not table.has_identity:
        yield error(
            place,
            f"{subject} {_lack(table)}: once it were published, the application's own UPDATE and DELETE would fail",
            f"best, ALTER TABLE {table.quoted} ADD PRIMARY KEY (…); it locks the table while the index builds, and "
            f"wants columns without NULL. Or, at no cost, name such an index that is there already: "
            f"ALTER TABLE {table.quoted} REPLICA IDENTITY USING INDEX …; Or, at the price of the whole old row in the "
            f"WAL for each UPDATE and DELETE: ALTER TABLE {table.quoted} REPLICA IDENTITY FULL;",
        )
    elif table.identity_generated and connection.info.server_version >= 180000:
        # measured on 18.4: "Replica identity must not contain unpublished generated columns"; 15 and 16 allow it
        yield error(
            place,
            f"the replica identity of {subject} contains a generated column: since PostgreSQL 18 the application's own "
            "UPDATE and DELETE would fail once it were published",
            f"give it an identity without one: ALTER TABLE {table.quoted} REPLICA IDENTITY DEFAULT; or USING INDEX …",
        )
    elif table.identity == "f":
        yield warning(
            place,
            f"{subject} has REPLICA IDENTITY FULL: each UPDATE and DELETE writes the whole old row to the WAL, "
            "and without a primary key events have no key",
            f"where it has a key: ALTER TABLE {table.quoted} REPLICA IDENTITY DEFAULT; or USING INDEX …",
        )


def _lack(table: Table) -> str:
    match table.identity:
        case "d":
            return "has no primary key (a DEFERRABLE one does not count)"
        case "i":
            return "names an index as its replica identity that is gone or not valid"
        case _:
            return "has REPLICA IDENTITY NOTHING"


def _partitioned(connection: psycopg.Connection, table: Table) -> Iterator[Finding]:
    """An UPDATE runs on the partitions, so it is their identity that counts; a new one inherits only a primary key."""
    partitions = catalogue.leaves(connection, table)
    ordered = table.identity_columns or legacy.primary_key_of(connection, table.schema, table.name)
    for leaf in partitions:
        if leaf.kind != "r" or leaf.persistence != "p":
            yield error(
                f"table {table}",
                f"its partition {leaf} is {'unlogged' if leaf.kind == 'r' else 'a ' + KINDS[leaf.kind]}: its changes "
                "are not in the WAL and would never leave",
                "name the partitions that are to be published one by one, instead of the table above them",
            )
        else:
            yield from _identity(connection, leaf, of=str(table))
            yield from _same_identity(table, leaf)
            if not ordered:
                yield from _rights(connection, leaf, of=str(table))
    if not partitions:
        yield from _identity(connection, table)
    elif table.identity != "d" or not table.has_identity:
        yield warning(
            f"table {table}",
            "a partition made later would have no replica identity (only a primary key is inherited), and the "
            "application's UPDATE and DELETE on it would fail"
            + ("" if table.has_identity else "; and events have no key: that of a DELETE does not say which row"),
            f"ALTER TABLE {table.quoted} ADD PRIMARY KEY (…), or set REPLICA IDENTITY on each partition as it is made",
        )
    if connection.info.server_version < 150000:
        # measured on 14.23: pgoutput forgets what it decided about a table only when a publication is altered
        yield warning(
            f"table {table}",
            "PostgreSQL 14 does not notice ATTACH PARTITION and DETACH PARTITION of a table that it has decoded "
            "changes of: rows of the attached table would be missing without a word",
            "in the same transaction as the ATTACH or DETACH: ALTER PUBLICATION … SET (publish = …); with the "
            "operations that it has",
        )


def _same_identity(table: Table, leaf: Table) -> Iterator[Finding]:
    """Measured on 18.4: the server writes the leaf's old key and describes it as that of the table above."""
    if not leaf.has_identity or leaf.identity == "f":
        return
    if table.identity == "f":
        lack, remedy = "has not, so its old rows would say NULL of all but the key", "REPLICA IDENTITY FULL"
    elif missing := sorted(set(table.identity_columns) - set(leaf.identity_columns)):
        lack = f"has another one, so its old keys would say NULL of {', '.join(map(spell, missing))}"
        remedy = "REPLICA IDENTITY DEFAULT" if table.identity == "d" else "REPLICA IDENTITY USING INDEX …"
    else:
        return
    yield error(
        f"table {table}",
        f"it has REPLICA IDENTITY {_IDENTITIES[table.identity]} and its partition {leaf} {lack}",
        f"ALTER TABLE {leaf.quoted} {remedy}; for each such partition (ALTER TABLE of the table above does not reach "
        "them), or give the table above the identity that they have",
    )


def _partition(connection: psycopg.Connection, table: Table, names: Sequence[Name]) -> Finding:
    if above := [name for name in catalogue.ancestors(connection, table) if name in names]:
        return warning(
            f"table {table}",
            f"{spell(*above[0])}, of which it is a partition, is configured too: its rows leave under that name",
            f"remove {table} from legacy.tables",
        )
    return warning(
        f"table {table}",
        "is a partition: events carry its own name, and rows that move to another partition leave as a delete",
        "name the partitioned table instead, if all of it is meant",
    )
