"""Probes of the reverse path: our schema, and each mapping held against the catalogue.

What is found here at the start is a dead letter less at night: a column that is not there, an upsert whose key is not
unique, a right that is missing.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import psycopg
from psycopg.rows import class_row

from figbridge import canary, legacy
from figbridge.config import Config, MappingSection, StatementSection, split_table
from figbridge.preflight import catalogue, conflict, dryrun, rewritten, unreached
from figbridge.preflight.catalogue import Name, Table, quote, spell
from figbridge.preflight.finding import Finding, Stage, error, ok, warning
from figbridge.preflight.own import OWN, own_tables
from figbridge.preflight.tables import KINDS, missing


@dataclass(frozen=True, slots=True)
class Column:
    """A column as a writer sees it. `needed`: NOT NULL without a default.

    `rights` are those of INSERT, UPDATE and SELECT that the role has. `sequence` is one the default reads and the role
    may not.
    """

    name: str
    generated: bool
    identity_always: bool
    needed: bool
    rights: list[str]
    sequence: str | None


def rights(mapping: StatementSection) -> dict[str, set[str]]:
    """The rights that a statement takes, each with the columns it is about (none: the whole table).

    WHERE and ON CONFLICT read the key, and EXCLUDED counts as reading the column of the same name:
    https://www.postgresql.org/docs/current/sql-insert.html
    """
    asked = _written(mapping)
    if mapping.rules is None or not asked:
        return asked
    # SELECT … FOR UPDATE takes the right to update, whatever is done to the row later:
    # https://www.postgresql.org/docs/current/sql-select.html#SQL-FOR-UPDATE-SHARE
    compared = conflict.compared(mapping)
    asked |= {"SELECT": compared | asked.get("SELECT", set()), "UPDATE": asked.get("UPDATE") or compared}
    return asked | ({"INSERT": {*mapping.key, *mapping.set}} if conflict.may_insert(mapping) else {})


def _written(mapping: StatementSection) -> dict[str, set[str]]:
    key, values = set(mapping.key), set(mapping.set)
    match mapping.action:
        case "insert":
            return {"INSERT": values}
        case "update":
            return {"SELECT": key, "UPDATE": values}
        case "upsert":
            return {"SELECT": key | values, "INSERT": key | values} | ({"UPDATE": values} if values else {})
        case "delete":
            return {"SELECT": key} | ({"UPDATE": set(mapping.soft)} if mapping.soft else {"DELETE": set()})
    return {}  # SQL of the user's own: nobody knows


def probe(connection: psycopg.Connection, config: Config, names: Sequence[Name], stage: Stage) -> Iterator[Finding]:
    """Our schema at both stages; the mappings when the bridge is about to run."""
    yield from probe_tables(connection, own_tables(config), stage)
    if not config.reverse or stage == "init":
        return
    if config.reverse.mode == "dry-run":
        yield from dryrun.probe(connection, config.reverse.mappings)
    forward = _forward_sources(config, connection.info.dbname, names)
    for index, mapping in enumerate(config.reverse.mappings):
        yield from _sources(f"reverse.mappings.{index}", mapping, forward)
        yield from inspect(connection, index, mapping)


def inspect(connection: psycopg.Connection, index: int, mapping: MappingSection) -> Iterator[Finding]:
    """A mapping, each of its statements, held against the catalogue."""
    for number, part in enumerate(mapping.parts):
        place = f"reverse.mappings.{index}" + (f".statements.{number}" if mapping.statements else "")
        if part.into is None:
            yield ok(place, f"{'SQL of your own' if part.sql else 'a call'}: not looked into")
            continue
        name = split_table(part.into)
        table = catalogue.tables(connection, [name]).get(name)
        findings = [*_mapping(connection, place, part, table)] if table else [missing(connection, name, place)]
        if table and not any(it.level == "error" for it in findings):
            findings += rewritten.probe(connection, place, part, table)
        yield from findings or [ok(place, f"{part.action} {table} fits the table")]


def probe_tables(connection: psycopg.Connection, needed: Sequence[str], stage: Stage) -> Iterator[Finding]:
    """Those of our own tables that are `needed`, and the rights of the connection's role on them."""
    place, role = f"schema {legacy.SCHEMA}", connection.info.user
    found = catalogue.tables(connection, [(legacy.SCHEMA, name) for name in needed])
    absent = [name for name in needed if (legacy.SCHEMA, name) not in found]
    if absent and stage == "run":
        yield error(place, f"there is no table {', '.join(absent)}", "run `figbridge init`")
    elif absent:
        yield from _may_create(connection, place)
    for table in found.values():
        yield from _own(connection, place, table, stage)
        lacking = [right for right in OWN[table.name].rights if not _may(connection, table, right)]
        if lacking and stage == "run":
            yield error(
                place,
                f"role {spell(role)} lacks {', '.join(lacking)} on {table}",
                f"GRANT USAGE ON SCHEMA {legacy.SCHEMA} TO {quote(role)}; "
                f"GRANT {', '.join(OWN[table.name].rights)} ON {table} TO {quote(role)};",
            )


def _may_create(connection: psycopg.Connection, place: str) -> Iterator[Finding]:
    allowed = connection.execute(
        "SELECT CASE WHEN to_regnamespace(%(schema)s) IS NULL "
        "THEN has_database_privilege(current_database(), 'CREATE') "
        "ELSE has_schema_privilege(%(schema)s, 'CREATE') END",
        {"schema": legacy.SCHEMA},
    ).fetchone()
    if allowed and allowed[0]:
        yield ok(place, "will be made")
    else:
        yield error(
            place,
            f"role {spell(connection.info.user)} may not make it",
            "let a DBA run what `figbridge init --print-sql` prints; the bridge itself needs fewer rights",
        )


def _own(connection: psycopg.Connection, place: str, table: Table, stage: Stage) -> Iterator[Finding]:
    expected = OWN[table.name]
    columns = {column.name for column in _columns(connection, table)}
    lacking = sorted(expected.columns - columns)
    if lacking and expected.added.issuperset(lacking):
        if stage == "run":
            yield error(place, f"{table} has no column {', '.join(lacking)} yet", "run `figbridge init`")
    elif lacking:
        yield error(
            place,
            f"{table} has no column {', '.join(lacking)}: it is not figbridge's, or of another version of it",
            f"if nobody needs its rows (they say what was applied): DROP TABLE {table}; then run `figbridge init`",
        )
    elif expected.key not in _unique_keys(connection, table):
        yield error(
            place,
            f"{table} has no primary key on {', '.join(sorted(expected.key))}: repeated events would be applied twice",
            f"ALTER TABLE {table} ADD PRIMARY KEY ({', '.join(sorted(expected.key))});",
        )


def _may(connection: psycopg.Connection, table: Table, right: str) -> bool:
    row = connection.execute(
        "SELECT has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, %s) "
        "FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = %s",
        [right, table.oid],
    ).fetchone()
    return bool(row and row[0])


def _forward_sources(config: Config, database: str, names: Sequence[Name]) -> set[str]:
    """Every source that our own events may carry."""
    if config.forward is None:
        return set()
    return {config.forward.source.format(database=database, schema=schema, table=table) for schema, table in names}


def _sources(place: str, mapping: MappingSection, forward: set[str]) -> Iterator[Finding]:
    for source in mapping.match.source:
        if source in forward:
            yield error(
                f"{place}.match.source",
                f"{source!r} is what our own events carry: they would come back as if the new system had sent them",
                "name the new system's source, or change forward.source",
            )
        if source == canary.SOURCE:
            yield error(
                f"{place}.match.source", f"{source!r} is kept for figbridge itself", "name the new system's source"
            )


def _mapping(connection: psycopg.Connection, place: str, mapping: StatementSection, table: Table) -> Iterator[Finding]:
    if table.kind not in {"r", "p", "v"}:
        yield error(f"{place}.into", f"{table} is a {KINDS.get(table.kind, 'relation')}", "name a table or a view")
        return
    columns = {column.name: column for column in _columns(connection, table)}
    yield from _names(place, mapping, table, columns)
    yield from _values(place, mapping, table, columns)
    yield from _rights(connection, place, mapping, table, columns)
    if mapping.key.keys() <= columns.keys():
        yield from _key(connection, place, mapping, table)
    yield from unreached.probe(connection, place, mapping, table)
    if mapping.rules:
        unique = _unique_keys(connection, table)
        yield from conflict.probe(connection, place, mapping, table, columns=columns.keys(), unique=unique)


def _names(place: str, mapping: StatementSection, table: Table, columns: Mapping[str, Column]) -> Iterator[Finding]:
    for part, names in (("key", mapping.key), ("set", mapping.set), ("soft", mapping.soft)):
        for name in names:
            if name not in columns:
                near = difflib.get_close_matches(name, columns, n=1)
                yield error(
                    f"{place}.{part}.{name}",
                    f"{table} has no column {name!r}",
                    f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(columns)}",
                )


def _values(place: str, mapping: StatementSection, table: Table, columns: Mapping[str, Column]) -> Iterator[Finding]:
    inserts = mapping.action in {"insert", "upsert"}
    written = {**mapping.set, **mapping.soft, **(mapping.key if mapping.action == "upsert" else {})}
    for name in written:
        part = "set" if name in mapping.set else "soft" if name in mapping.soft else "key"
        if name not in columns:
            continue
        # an insert says OVERRIDING SYSTEM VALUE, which helps an identity column and no other; an UPDATE cannot
        identity = columns[name].identity_always and mapping.action != "insert" and part != "key"
        if columns[name].generated or identity:
            yield error(
                f"{place}.{part}.{name}",
                f"{table} generates {name!r} always; {mapping.action} may not write it",
                "leave the column out" + (", or let the owner make it GENERATED BY DEFAULT" if identity else ""),
            )
    unsaid = [column.name for column in columns.values() if inserts and column.needed and column.name not in written]
    if unsaid:
        yield warning(
            place,
            f"{table} wants a value for {', '.join(map(spell, unsaid))} (NOT NULL, no default); the mapping has none",
            "add it under set, unless a trigger of the table fills it in",
        )


def _rights(
    connection: psycopg.Connection, place: str, mapping: StatementSection, table: Table, columns: Mapping[str, Column]
) -> Iterator[Finding]:
    role = connection.info.user
    asked = rights(mapping)
    lacking = [
        right
        for right, names in asked.items()
        if any(right not in columns[name].rights for name in names if name in columns)
        or (not names and not _may(connection, table, right))
    ]
    usage = connection.execute("SELECT has_schema_privilege(%s, 'USAGE')", [table.schema]).fetchone()
    grants = [f"GRANT {', '.join(lacking)} ON {table.quoted} TO {quote(role)};"] if lacking else []
    if not (usage and usage[0]):
        grants.insert(0, f"GRANT USAGE ON SCHEMA {quote(table.schema)} TO {quote(role)};")
        lacking.insert(0, "USAGE on the schema")
    if lacking:
        yield error(place, f"role {spell(role)} lacks {', '.join(lacking)} for {table}", " ".join(grants))
    if "INSERT" in asked:
        for column in columns.values():
            if column.sequence and column.name not in asked["INSERT"]:
                yield error(
                    place,
                    f"role {spell(role)} may not use the sequence of {table}.{column.name}",
                    f"GRANT USAGE ON SEQUENCE {column.sequence} TO {quote(role)};",
                )


def _key(connection: psycopg.Connection, place: str, mapping: StatementSection, table: Table) -> Iterator[Finding]:
    if table.kind == "v" or not mapping.key:
        return  # a view has no index to look at
    upsert = mapping.action == "upsert"
    keys, unique = frozenset(mapping.key), _unique_keys(connection, table, arbiters=upsert)
    listed = ", ".join(mapping.key)
    if upsert and keys not in unique:
        yield error(
            f"{place}.key",
            f"no unique index of {table} is on exactly ({listed}), so ON CONFLICT cannot find the row",
            f"use the columns of one ({'; '.join(', '.join(sorted(it)) for it in unique) or 'there is none'}), "
            "or let the owner add one (partial, deferrable, expression and WITHOUT OVERLAPS indexes do not count)",
        )
    elif not any(found <= keys for found in unique):
        yield warning(
            f"{place}.key",
            f"({listed}) is not unique in {table}: one event may {mapping.action} several rows",
            "use the columns of the primary key, unless that is meant",
        )


def _columns(connection: psycopg.Connection, table: Table) -> list[Column]:
    with connection.cursor(row_factory=class_row(Column)) as cursor:
        return cursor.execute(
            """
            SELECT a.attname::text AS name,
                   a.attgenerated <> '' AS generated, a.attidentity = 'a' AS identity_always,
                   a.attnotnull AND NOT a.atthasdef AND a.attidentity = '' AND a.attgenerated = '' AS needed,
                   ARRAY(SELECT word FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE']) AS word
                         WHERE has_column_privilege(a.attrelid, a.attnum, word)) AS rights,
                   (SELECT s.oid::regclass::text
                    FROM pg_attrdef d
                    JOIN pg_depend p ON p.classid = 'pg_attrdef'::regclass AND p.objid = d.oid
                                    AND p.refclassid = 'pg_class'::regclass
                    JOIN pg_class s ON s.oid = p.refobjid
                    WHERE d.adrelid = a.attrelid AND d.adnum = a.attnum  -- CASE: asking it of a table is an error
                      AND CASE WHEN s.relkind = 'S' THEN NOT has_sequence_privilege(s.oid, 'USAGE') END
                    LIMIT 1) AS sequence
            FROM pg_attribute a
            WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
            """,
            [table.oid],
        ).fetchall()


def _unique_keys(connection: psycopg.Connection, table: Table, *, arbiters: bool = True) -> list[frozenset[str]]:
    """The column sets that ON CONFLICT may name: https://www.postgresql.org/docs/current/sql-insert.html.

    Without `arbiters` also the keys WITHOUT OVERLAPS, which name one row and cannot be named by ON CONFLICT.
    """
    rows = connection.execute(
        """
        SELECT ARRAY(SELECT a.attname::text FROM pg_attribute a
                     WHERE a.attrelid = i.indrelid AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1]))
        FROM pg_index i
        WHERE i.indrelid = %s AND i.indisunique AND i.indisvalid AND i.indimmediate
          AND (%s OR NOT i.indisexclusion)
          AND i.indpred IS NULL AND i.indexprs IS NULL
        ORDER BY i.indisprimary DESC, i.indexrelid
        """,
        [table.oid, not arbiters],
    ).fetchall()
    return [frozenset(columns) for (columns,) in rows]


def outdated(connection: psycopg.Connection, config: Config) -> bool:
    """Whether one of our tables lacks a column that this version writes."""
    found = catalogue.tables(connection, [(legacy.SCHEMA, name) for name in own_tables(config)])
    return any(
        not OWN[table.name].columns <= {column.name for column in _columns(connection, table)}
        for table in found.values()
    )
