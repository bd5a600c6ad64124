"""Probes of what the replication stream stands on: the publications and the slot.

A publication may hold less than the whole truth only loudly: what it leaves out never becomes an event, and nothing
later could notice.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Final

import psycopg

from figbridge import canary
from figbridge.config import Config, LegacySection
from figbridge.preflight import catalogue, membership
from figbridge.preflight.catalogue import Name, Publication, Slot, Table, quote, spell
from figbridge.preflight.finding import Finding, Stage, error, ok, warning

PUBLISHED: Final = ("insert", "update", "delete", "truncate")
# pg_replication_slots.invalidation_reason → how it does not happen again. Before 17, which has none, one cause is left
_PREVENTION: Final = {
    "wal_removed": "; raise max_slot_wal_keep_size, so that it does not happen again",
    "idle_timeout": "; raise idle_replication_slot_timeout, so that it does not happen again",
}
_INIT: Final = "run `figbridge init`"
_ANEW: Final = "copy the tables anew (`figbridge snapshot`)"
MARKS: Final = ("insert",)  # of the inbox: a purge of old keys must not make events


def probe(connection: psycopg.Connection, config: Config, names: Sequence[Name], stage: Stage) -> Iterator[Finding]:
    """Both publications and the slot."""
    section, with_inbox = config.legacy, config.publishes_inbox
    tables = catalogue.tables(connection, names)
    publication = catalogue.publication(connection, section.publication)
    slot = catalogue.slot(connection, section.slot)
    remedy = _renewed(slot) if slot and slot.here else _INIT
    former = {name for it in (config.forward.select if config.forward else ()) for name in it.names}
    yield from _publication(section.publication, publication, names, PUBLISHED, stage, remedy=remedy, former=former)
    if publication:
        yield from partitions(section.publication, publication, tables)
    inbox = catalogue.publication(connection, section.inbox_publication) if with_inbox else None
    if with_inbox:
        yield from _publication(section.inbox_publication, inbox, (canary.INBOX, canary.CANARY), MARKS, stage)
    if stage == "init":
        wanted = {section.publication: publication} | ({section.inbox_publication: inbox} if with_inbox else {})
        yield from _may_publish(connection, wanted, tables)
    if stage == "run" and config.recreates_slot and (slot is None or is_lost(slot)):
        yield _made_anew(section, slot)
        return
    yield from _slot(section, slot, stage)
    if slot and slot.here:
        yield from _order(section, slot, publication, inbox, stage)
    if slot and slot.here and stage == "run" and config.guards_slot:  # a slot that is made anew begins with a new note
        published = {
            section.publication: (names, publication),
            section.inbox_publication: ((canary.INBOX, canary.CANARY), inbox),
        }
        yield from membership.probe(connection, section.slot, published)


def probe_guard(config: Config) -> Iterator[Finding]:
    """What nobody would notice."""
    unnoticed = (
        "that the slot is dropped and made anew, or advanced by another tool, or a table taken out of its publication "
        "for a while, when no bridge runs"
    )
    if config.forward and config.guards_slot:
        yield ok("forward.slot-guard", f"figbridge.slot_guard notices {unnoticed}")
    elif config.forward and config.forward.slot_guard == "none":
        yield ok("forward.slot-guard", f"none: nobody notices {unnoticed}")
    elif config.forward:
        yield warning(
            "forward.slot-guard",
            f"there is no table of ours, so nobody notices {unnoticed}",
            "set forward.slot-guard to table (one row in a schema of ours) and run `figbridge init`; or to none, if "
            "that is understood",
        )


def _publication(
    name: str,
    found: Publication | None,
    names: Sequence[Name],
    operations: Sequence[str],
    stage: Stage,
    *,
    remedy: str = _INIT,
    former: Collection[Name] = (),
) -> Iterator[Finding]:
    """`remedy` is what to do if it is not there. Tables may also have one of the `former` names."""
    place = f"publication {spell(name)}"
    if found is None:
        yield ok(place, "will be made") if stage == "init" else error(place, "does not exist", remedy)
        return
    findings = [*too_wide(name, found), *narrow(name, found, operations)]
    missing = [table for table in names if table not in found.tables]
    if missing and stage == "run" and not found.all_tables:
        listed = ", ".join(spell(*table) for table in missing)
        findings.append(error(place, f"does not publish {listed}: no change of it would leave", _INIT))
    findings.extend(unconfigured(name, table) for table in sorted(found.tables.difference(names, former)))
    yield from findings
    if not any(finding.level == "error" for finding in findings):
        yield ok(place, f"publishes {len(found.tables)} tables")


def unconfigured(name: str, table: Name) -> Finding:
    """A table that is published and not configured. It is never dropped by us: that would change ids.

    An id counts the rows of a transaction as they are published, so one that was delivered in part would be numbered
    anew.
    """
    return warning(
        f"publication {spell(name)}",
        f"also publishes {spell(*table)}, which the configuration does not name; with forward.select, or an outbox "
        "table, its first change stops the bridge",
        f"add it to legacy.tables; or, while the bridge has nothing left to deliver (it changes the ids of "
        f"undelivered transactions): ALTER PUBLICATION {quote(name)} DROP TABLE {quote(*table)};",
    )


def too_wide(name: str, found: Publication) -> Iterator[Finding]:
    """What it publishes beyond tables that somebody named."""
    place = f"publication {spell(name)}"
    kind = "FOR ALL TABLES" if found.all_tables else "FOR TABLES IN SCHEMA" if found.schemas else ""
    if kind:
        yield error(
            place,
            f"is {kind}: it publishes what nobody named, our own tables too, and breaks the UPDATEs of tables "
            "without a replica identity",
            f"stop what reads it, DROP PUBLICATION {quote(name)}; then drop the slot and run `figbridge init`; "
            "or name another one in legacy.publication",
        )


def narrow(name: str, found: Publication, operations: Sequence[str]) -> Iterator[Finding]:
    """What the publication leaves out of its tables' changes."""
    place = f"publication {spell(name)}"
    if found.operations != set(operations):
        words = ", ".join(operations)
        yield error(
            place,
            f"publishes {', '.join(word for word in PUBLISHED if word in found.operations) or 'nothing'}, not {words}",
            f"ALTER PUBLICATION {quote(name)} SET (publish = '{words}');",
        )
    for table in found.narrowed:
        yield warning(
            place,
            f"has a row filter or a column list for {spell(*table)}: what it leaves out is in no event",
            f"if that is not meant: ALTER PUBLICATION {quote(name)} SET TABLE … with every table and no filter",
        )


def partitions(name: str, publication: Publication, tables: dict[Name, Table]) -> Iterator[Finding]:
    """Whether rows of partitioned `tables` leave under the partitions' names."""
    roots = [str(table) for table in tables.values() if table.kind == "p"]
    if roots and not publication.via_root:
        yield error(
            f"publication {spell(name)}",
            f"would name the partitions of {', '.join(roots)} in events, not the table",
            f"ALTER PUBLICATION {quote(name)} SET (publish_via_partition_root = true);",
        )


def _may_publish(
    connection: psycopg.Connection, wanted: dict[str, Publication | None], tables: dict[Name, Table]
) -> Iterator[Finding]:
    """Rights that only `figbridge init` needs: https://www.postgresql.org/docs/current/sql-createpublication.html."""
    role = spell(connection.info.user)
    remedy = "let a DBA run what `figbridge init --print-sql` prints; the bridge itself needs fewer rights"
    allowed = connection.execute("SELECT has_database_privilege(current_database(), 'CREATE')").fetchone()
    if None in wanted.values() and not (allowed and allowed[0]):
        database = spell(connection.info.dbname)
        yield error(f"role {role}", f"may not make a publication in database {database} (CREATE)", remedy)
    published: frozenset[Name] = frozenset().union(*(it.tables for it in wanted.values() if it))
    new = [table for name, table in tables.items() if name not in published]
    for table in new:
        if not table.owned:
            yield error(f"role {role}", f"is not the owner of {table}, and only an owner may publish it", remedy)
    for name, publication in wanted.items():
        if new and publication and not publication.owned:
            yield error(f"role {role}", f"is not the owner of publication {spell(name)}", remedy)


def _slot(section: LegacySection, slot: Slot | None, stage: Stage) -> Iterator[Finding]:
    place = f"slot {section.slot}"
    if slot is None:
        yield (
            ok(place, "will be made")
            if stage == "init"
            else error(
                place,
                "does not exist",
                f"{_INIT}; if it was there before, the changes since then are lost to it: {_ANEW} afterwards",
            )
        )
        return
    problems = unreadable(slot)
    yield from problems
    if slot.holder and stage == "run":
        yield warning(
            place,
            f"is read by another process ({slot.holder}); this one will wait for it",
            "stop the other, if not meant",
        )
    if not problems:
        kept = f", {slot.retained:,} bytes of WAL are kept for it" if slot.retained is not None else ""
        yield ok(place, f"logical, pgoutput{kept}")


def _made_anew(section: LegacySection, slot: Slot | None) -> Finding:
    found = "does not exist" if slot is None else f"is lost ({slot.invalidation or 'its WAL was removed'})"
    return warning(
        f"slot {section.slot}",
        f"{found}: the bridge will make it anew and read every table again (forward.on-slot-loss)",
        "if that is not wanted, set forward.on-slot-loss to halt before the bridge starts",
    )


def is_lost(slot: Slot) -> bool:
    """Whether it is ours, and of no more use."""
    return not any(_foreign("", slot)) and (slot.wal_status == "lost" or slot.invalidation is not None)


def unreadable(slot: Slot) -> list[Finding]:
    """Why the slot is not one to read from, or soon will not be; empty when it is."""
    place = f"slot {slot.name}"
    return [*_foreign(place, slot)] or [*_health(place, slot)]


def _foreign(place: str, slot: Slot) -> Iterator[Finding]:
    """Slot names are cluster-wide: the one that is there may have nothing to do with us."""
    if slot.kind != "logical" or slot.plugin != "pgoutput" or not slot.here or slot.temporary:
        what = f"{'temporary ' if slot.temporary else ''}{slot.kind}"
        detail = f" of plugin {slot.plugin} in database {spell(slot.database or '?')}" if slot.kind == "logical" else ""
        yield error(
            place,
            f"is somebody else's: a {what} slot{detail}",
            "choose another name in legacy.slot, or drop that one if nobody needs it: "
            f"SELECT pg_drop_replication_slot('{slot.name}');",
        )


def _health(place: str, slot: Slot) -> Iterator[Finding]:
    if slot.wal_status == "lost" or slot.invalidation:
        yield error(
            place,
            f"is lost ({slot.invalidation or 'its WAL was removed'}): changes since {slot.restart or 'its last read'} "
            "cannot be read any more",
            f"SELECT pg_drop_replication_slot('{slot.name}'); then {_INIT} and {_ANEW}"
            + _PREVENTION.get(slot.invalidation or "wal_removed", ""),
        )
    elif slot.wal_status == "unreserved":
        yield warning(
            place,
            "will be lost at the next checkpoint (it needs more WAL than max_slot_wal_keep_size)",
            # to read it is not enough: its restart_lsn follows up to 15 s later, with the server's next snapshot
            "at once ALTER SYSTEM SET max_slot_wal_keep_size = -1; SELECT pg_reload_conf(); then start the bridge; "
            "limit it again when wal_status in pg_replication_slots is reserved",
        )


def _renewed(slot: Slot) -> str:
    """The remedy for a slot that is older than its publication. Whatever it had not delivered is lost with it."""
    return (
        f"SELECT pg_drop_replication_slot('{slot.name}'); then {_INIT}. If the bridge has run with this slot, changes "
        f"since the publication was dropped are in no event, nor what was not delivered yet: {_ANEW} afterwards"
    )


def _order(
    section: LegacySection, slot: Slot, publication: Publication | None, inbox: Publication | None, stage: Stage
) -> Iterator[Finding]:
    """The slot must be younger than what it is asked to publish.

    pgoutput looks the publication up as the catalogue was when a change was made: for an older change there is none.
    Up to 17 the stream fails for ever ("publication … does not exist"), from 18 on it leaves the change out.
    """
    if publication is None and stage == "init":
        yield error(
            f"slot {section.slot}",
            f"is older than publication {spell(section.publication)}, which is not there: it could never be read",
            _renewed(slot),
        )
    for name, found in ((section.publication, publication), (section.inbox_publication, inbox)):
        if stage == "run" and found and found.made_at and slot.restart and slot.restart < found.made_at:
            gap = f"; or, if it was dropped and made anew: {_renewed(slot)}" if found is publication else ""
            yield error(
                f"slot {section.slot}",
                f"still needs WAL from {slot.restart} on, and publication {spell(name)} was made at {found.made_at}: "
                "the server would not find it, or leave changes out",
                f"let the bridge read on without {spell(name)} (as the configuration was before) until restart_lsn "
                f"of slot {slot.name} in pg_replication_slots is at least {found.made_at}{gap}",
            )
