"""Which columns of which tables leave the database, and as what: the report for whoever answers for the data.

One finding a table, in the order of the file; `figbridge check` prints them and `figbridge run` logs them at its start.
A publication's own column lists and row filters may keep back more, never less.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import psycopg

from figbridge import predicate
from figbridge.config import ForwardSection, SelectSection, split_table
from figbridge.predicate import Kind, Predicate
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
        place, select = f"{LEAVING}{spell(*name)}", selects.get(name)
        if name not in tables:  # which is a finding already
            if select is not None:
                yield _gone(place, select)
            continue
        kinds, keys = _columns(connection, name)
        columns = list(kinds)
        if select is None:
            yield ok(place, f"leave as they are: {_listed(columns)}")
            continue
        problems = [*_problems(place, section, select, kinds, keys)]
        yield from problems or [ok(place, _told(section, select, columns))]


def _gone(place: str, select: SelectSection) -> Finding:
    return error(
        place,
        "forward.select has rules about it, and there is no such table",
        "mend the name; if the table was renamed, name it anew in legacy.tables and forward.select, there with "
        f"former-names: [{', '.join([select.table, *select.former_names])}], as rows from before come under that name",
    )


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
    place: str, section: ForwardSection, select: SelectSection, kinds: Mapping[str, Kind | None], keys: Sequence[str]
) -> Iterator[Finding]:
    columns = list(kinds)
    for name in select.missing(columns) if select.missing_columns == "stop" else ():
        near = difflib.get_close_matches(name, columns, n=1)
        yield error(
            place,
            f"forward.select names {name!r}, and the table has no such column",
            f"did you mean {near[0]!r}?"
            if near
            else "mend the name; if it was renamed, list both names, with missing-columns: ignore",
        )
    if select.where is not None:
        yield from _misfits(place, predicate.compiled(select.where), kinds)
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


def _misfits(place: str, where: Predicate, kinds: Mapping[str, Kind | None]) -> Iterator[Finding]:
    for name, kind in kinds.items():
        if where.misfits(name, kind):
            literals = " or ".join(sorted(where.kinds[name]))
            yield error(
                place,
                f"forward.select.where compares {name!r}, a {kind}, with a {literals}, to which it is never equal",
                "write numbers in backticks, strings in quotes; if its type was changed, compare it with both",
            )


def _columns(connection: psycopg.Connection, name: Name) -> tuple[dict[str, Kind | None], list[str]]:
    """(the columns that a publication can carry, those of them that are the replica identity or the primary key).

    Of each column of what kind a predicate finds its values; None: of any, as of a json column.
    """
    rows = connection.execute(
        """
        SELECT a.attname::text, coalesce(a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1]), false), (
            WITH RECURSIVE type AS (
                SELECT t.* FROM pg_type t WHERE t.oid = a.atttypid
                UNION ALL SELECT t.* FROM type JOIN pg_type t ON t.oid = type.typbasetype
            )
            SELECT CASE
                WHEN oid IN ('int2'::regtype, 'int4'::regtype, 'int8'::regtype, 'numeric'::regtype, 'float4'::regtype,
                             'float8'::regtype) THEN 'number'
                WHEN oid = 'bool'::regtype THEN 'boolean'
                WHEN oid NOT IN ('json'::regtype, 'jsonb'::regtype) AND typcategory <> 'A' THEN 'string'
            END
            FROM type WHERE typtype <> 'd'
        )
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
    return {column: kind for column, _, kind in rows}, [column for column, is_key, _ in rows if is_key]


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(map(spell, columns)) or "none"
