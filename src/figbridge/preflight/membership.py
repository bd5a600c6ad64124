"""Whether a publication is still what it was at an earlier look: a gap that is over leaves no other trace.

A table is in a publication by a row of pg_publication_rel, whose OID is remembered. Measured on 14, 15 and 17: DROP
TABLE and ADD TABLE make a new row; so does, from 15 on, a row filter or a column list that changes. SET TABLE with what
is there already, VACUUM FULL, ALTER TABLE and RENAME keep it. That an operation was left out for a while shows only in
the xmin of the publication's own row, and that changes with any SET, RENAME and OWNER TO.

WHAT IT CANNOT NOTICE. What came and went between two looks and was never remembered: a table or a schema that nobody
named. Nor what was changed before the first look, of the first process or after a human accepted what is there.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import psycopg

from figbridge import canary, legacy
from figbridge.preflight import catalogue
from figbridge.preflight.catalogue import Member, Name, Publication, literal, spell
from figbridge.preflight.finding import Finding, error, warning

TABLE = (legacy.SCHEMA, "slot_guard")


@dataclass(frozen=True, slots=True)
class Held:
    """What a publication held: its OID, its `version`, and its tables.

    A configured table that is not there any more stays among them, to be known when it comes back.
    """

    oid: int
    version: str
    tables: dict[Name, Member]


def held(found: Publication, tables: Sequence[Name], before: Held | None) -> Held:
    """What to remember of `found`, whose configured tables are `tables`."""
    gone = {name: before.tables[name] for name in tables if name in before.tables} if before else {}
    return Held(found.oid, found.version, gone | found.members)


def dump(remembered: Mapping[str, Held]) -> str:
    """As text, in ASCII, which any encoding of a database can hold."""
    return json.dumps(
        {
            name: {"oid": it.oid, "xmin": it.version, "tables": [[*table, *oids] for table, oids in it.tables.items()]}
            for name, it in remembered.items()
        }
    )


def read(connection: psycopg.Connection, slot: str) -> dict[str, Held]:
    """Publication → what was remembered of it in this cluster beside figbridge.slot_guard; empty where nothing is."""
    row = connection.execute(
        # to_jsonb, because an older figbridge made the table without the column
        "SELECT to_jsonb(g) ->> 'published' FROM figbridge.slot_guard g "
        "WHERE slot = %s AND system_identifier = (SELECT system_identifier::text FROM pg_control_system())",
        [slot],
    ).fetchone()
    tree = json.loads(row[0]) if row and row[0] else {}
    return {
        name: Held(
            it["oid"],
            it["xmin"],
            {(schema, table): Member(relation, row) for schema, table, relation, row in it["tables"]},
        )
        for name, it in tree.items()
    }


def probe(
    connection: psycopg.Connection, slot: str, published: Mapping[str, tuple[Sequence[Name], Publication | None]]
) -> Iterator[Finding]:
    """What changed since a bridge looked last; `published` is publication → its configured tables, and what it is."""
    table = catalogue.tables(connection, [TABLE]).get(TABLE)
    if table is None or not table.readable:
        return  # which is a finding already
    remembered = read(connection, slot)
    for name, (tables, found) in published.items():
        if found and name in remembered:
            yield from gaps(name, found, tables, remembered[name], slot=slot, accept=accepting(slot))


def accepting(slot: str) -> str:
    """How a human accepts the publications as they are."""
    return f"UPDATE figbridge.slot_guard SET published = NULL WHERE slot = {literal(slot)};"  # noqa: S608 (for a human)


def gaps(
    name: str, found: Publication, tables: Sequence[Name], before: Held, *, slot: str, accept: str
) -> Iterator[Finding]:
    """An error for each kind of change behind which events may be missing. `accept` is as in `remedy`.

    A table that came in since is none: it was not configured before, or it is still to be read.
    """
    place = f"publication {spell(name)}"
    if found.oid != before.oid:
        yield error(place, "was dropped and made anew", renewed(slot))
        return
    changed = [table for table in tables if table in found.members and _changed(table, found.members[table], before)]
    narrowed = [table for table in changed if table in found.narrowed]
    others = [table for table in changed if table not in found.narrowed]
    if narrowed:
        yield error(
            place,
            f"has another row filter or column list for {_listed(narrowed)} than before: what it leaves out is in no "
            "event",
            "if that is not meant: ALTER PUBLICATION … SET TABLE … with every table and no filter. "
            f"{remedy(tables, accept, narrowed)}",
        )
    if others:
        yield error(
            place,
            f"did not publish all changes of {_listed(others)} for a while, or had another table of that name: it was "
            "taken out and added again, had a row filter or a column list, or was made anew",
            remedy(tables, accept, others),
        )


def renewed(slot: str) -> str:
    """What to do about a publication that is gone, or was."""
    return (
        "changes since it was dropped are in no event. Drop the slot, which is older than any made since: "
        f"SELECT pg_drop_replication_slot({literal(slot)}); then `figbridge init`, and copy the tables anew"
    )


def remedy(tables: Sequence[Name], accept: str, gapped: Sequence[Name]) -> str:
    """What to do about changes of `gapped`, of the publication's `tables`, that were not published for a while.

    `accept` is the statement by which a human accepts the publication as it is; empty where none is needed.
    """
    what = consequence(tables, "that table" if len(gapped) == 1 else "those tables")
    return f"{f'Accept it as it is: {accept} Then start' if accept else 'Start'} the bridge again. {what}"


def consequence(tables: Sequence[Name], gapped: str) -> str:
    """What follows for consumers where a publication of `tables` left something of `gapped` out, and what to do."""
    if canary.INBOX in tables:
        return (
            "What the reverse path wrote since then may have left as events, as if it were the application's: look for "
            "these in the new system"
        )
    return f"Changes since then may be in no event: copy {gapped} anew (`figbridge snapshot`)"


def altered(name: str, found: Publication, before: Held) -> Iterator[Finding]:
    """A warning for what may be harmless: PostgreSQL 14 needs such a SET for ATTACH PARTITION."""
    if found.version != before.version:
        yield warning(
            f"publication {spell(name)}",
            "was altered (SET, RENAME or OWNER TO) since the last look; what it publishes now is right",
            "if an operation was left out for a while, its changes are in no event: copy the tables anew "
            "(`figbridge snapshot`)",
        )


def _changed(name: Name, now: Member, before: Held) -> bool:
    earlier = before.tables.get(name)
    if earlier and earlier.relation == now.relation:
        return earlier.row != now.row
    rows = {it.relation: it.row for it in before.tables.values()}
    if now.relation in rows:  # under another name
        return rows[now.relation] != now.row
    return earlier is not None


def _listed(names: Sequence[Name]) -> str:
    return ", ".join(spell(*name) for name in names)
