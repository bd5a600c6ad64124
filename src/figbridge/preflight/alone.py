"""Is the reverse path of another bridge on this database? What waits and the dead letters are shared by all of them.

Replicas are of one file, so of one slot and one publication. Another file's bridge takes up what this one has parked,
redrives its letters and knows its marks, though it has other mappings and other tables. Of another bridge there is to
see: a publication of the inbox, which its `init` made; its replication origin; its canaries, which are kept for a day.
"""

from collections.abc import Iterator
from typing import Final

import psycopg

from figbridge import canary
from figbridge.config import Config
from figbridge.preflight.catalogue import spell
from figbridge.preflight.finding import Finding, warning

PLACE: Final = "reverse"
# not by to_regclass, which raises where the role may not use the schema
_PUBLICATIONS: Final = """
    SELECT p.pubname::text FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid
    JOIN pg_class c ON c.oid = r.prrelid
    WHERE c.relname = 'inbox' AND c.relnamespace = to_regnamespace('figbridge') AND p.pubname <> ALL (%s) ORDER BY 1
"""
_ORIGINS: Final = """
    SELECT s.slot_name::text FROM pg_replication_slots s JOIN pg_replication_origin o ON o.roname = %s || s.slot_name
    WHERE s.database = current_database() AND s.slot_name <> %s
"""
_CANARIES: Final = """
    SELECT DISTINCT slot FROM figbridge.canary WHERE slot <> %s AND written_at > now() - interval '1 day'
"""
_READABLE: Final = """
    SELECT coalesce(has_schema_privilege(c.relnamespace, 'USAGE') AND has_table_privilege(c.oid, 'SELECT'), false)
    FROM pg_class c WHERE c.relname = 'canary' AND c.relnamespace = to_regnamespace('figbridge')
"""


def probe(connection: psycopg.Connection, config: Config) -> Iterator[Finding]:
    """Of a configuration with a reverse path; a dry run parks nothing and writes no letters."""
    if config.reverse is None or config.reverse.mode == "dry-run":
        return
    section = config.legacy
    ours = [section.publication, section.inbox_publication]
    publications = [name for (name,) in connection.execute(_PUBLICATIONS, [ours])]
    slots = {name for (name,) in connection.execute(_ORIGINS, [canary.origin(""), section.slot])}
    readable = connection.execute(_READABLE).fetchone()
    if readable and readable[0]:
        slots |= {name for (name,) in connection.execute(_CANARIES, [section.slot])}
    signs = [f"the publication {spell(name)} has figbridge.inbox" for name in publications]
    signs += [f"the slot {spell(name)} is of one" for name in sorted(slots)]
    if signs:
        yield warning(
            PLACE,
            f"another bridge's reverse path is, or was, on this database ({'; '.join(signs)}): each would take up what "
            "the other one has parked and its dead letters, and would never publish what the other one writes",
            "give one database one reverse path: one file with all mappings, of which as many replicas as you like may "
            "run. If the other bridge was given up, run `figbridge teardown` with its file, or drop its publication",
        )
