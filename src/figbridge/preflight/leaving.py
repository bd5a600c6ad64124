"""Which columns of which tables leave the database, and as what: the report for whoever answers for the data.

One finding a table, in the order of the file; `figbridge check` prints them and `figbridge run` logs them at its start.
A publication's own column lists and row filters may keep back more, never less.
"""

import difflib
from collections.abc import Iterator, Sequence
from typing import Final

import psycopg

from figbridge.config import ForwardSection, SelectSection, split_table
from figbridge.preflight import catalogue
from figbridge.preflight.catalogue import Name, spell
from figbridge.preflight.finding import Finding, error, ok

LEAVING: Final = "columns of "  # begins the place of these findings
_WORDS: Final = {"hash": "hashed", "mask": "masked", "truncate": "truncated", "replace": "replaced"}


def probe(connection: psycopg.Connection, section: ForwardSection, names: Sequence[Name]) -> Iterator[Finding]:
    """A finding for each table that is there; errors where a rule does not fit."""
    selects = {split_table(it.table): it for it in section.select}
    tables = catalogue.tables(connection, names)
    for name in names:
        if name not in tables:
            continue  # which is a finding already
        columns, keys = _columns(connection, name)
        place, select = f"{LEAVING}{spell(*name)}", selects.get(name)
        if select is None:
            yield ok(place, f"leave as they are: {_listed(columns)}")
            continue
        problems = [*_problems(place, section, select, columns, keys)]
        yield from problems or [ok(place, _told(section, select, columns))]


def _told(section: ForwardSection, select: SelectSection, columns: Sequence[str]) -> str:
    treated = {name: how for name, how in select.treatments.items() if name in columns}
    parts = [f"leave as they are: {_listed([it for it in columns if it not in treated and not select.stays(it)])}"]
    for how, word in _WORDS.items():
        if found := [name for name, it in treated.items() if it == how]:
            by = f" (key {section.hash.id})" if how == "hash" and section.hash else ""
            parts.append(f"{word}{by}: {_listed(found)}")
    if stay := [it for it in columns if select.stays(it)]:
        parts.append(f"stay: {_listed(stay)}")
    if select.where is not None:
        parts.append(f"only rows where {select.where}")
    return "; ".join(parts)


def _problems(
    place: str, section: ForwardSection, select: SelectSection, columns: Sequence[str], keys: Sequence[str]
) -> Iterator[Finding]:
    for name in select.missing(columns) if select.missing_columns == "stop" else ():
        near = difflib.get_close_matches(name, columns, n=1)
        yield error(
            place,
            f"forward.select names {name!r}, and the table has no such column",
            f"did you mean {near[0]!r}?"
            if near
            else "mend the name; if it was renamed, list both names, with missing-columns: ignore",
        )
    told_by = keys or columns
    lost = [it for it in told_by if select.stays(it) or select.treatments.get(it, "hash") != "hash"]
    outbox = section.outbox is not None and section.outbox.table is not None
    is_outbox = outbox and split_table(section.outbox.table) == split_table(select.table)  # type: ignore[union-attr, arg-type]
    if lost and section.hash is None and not is_outbox:
        what = "a column of its key" if keys else "it has no key, and a column"
        yield error(
            place,
            f"{what}, {lost[0]!r}, stays or is masked: what leaves does not tell its rows apart",
            "set forward.hash, by which order is then kept; or hash the column instead",
        )


def _columns(connection: psycopg.Connection, name: Name) -> tuple[list[str], list[str]]:
    """(the columns that a publication can carry, those of them that are the replica identity or the primary key)."""
    rows = connection.execute(
        """
        SELECT a.attname::text, coalesce(a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1]), false)
        FROM pg_attribute a
        JOIN pg_class c ON c.oid = a.attrelid
        JOIN pg_namespace n ON n.oid = c.relnamespace
        LEFT JOIN pg_index i ON i.indrelid = c.oid
             AND CASE c.relreplident WHEN 'i' THEN i.indisreplident ELSE i.indisprimary END
        WHERE n.nspname = %s AND c.relname = %s AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
        ORDER BY a.attnum
        """,
        name,
    ).fetchall()
    return [column for column, _ in rows], [column for column, is_key in rows if is_key]


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(map(spell, columns)) or "none"
