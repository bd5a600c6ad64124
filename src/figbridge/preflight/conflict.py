"""Probes of a statement's rules for conflicts: its columns, its key, and if PostgreSQL can compute their values."""

from collections.abc import Collection, Iterator, Sequence

import psycopg
from psycopg import sql

from figbridge import legacy
from figbridge.config import ConflictsSection, StatementSection
from figbridge.preflight.catalogue import Table
from figbridge.preflight.finding import Finding, error


def compared(mapping: StatementSection) -> set[str]:
    """The columns that are read of a row, to compare it and to keep what was found."""
    rules = mapping.rules
    if rules is None:
        return set()
    version = {rules.version.column} if rules.version else set()
    return {*mapping.key, *mapping.set, *mapping.soft, *rules.before} | version


def may_insert(mapping: StatementSection) -> bool:
    """Whether an update writes the whole row where there is none."""
    rules = mapping.rules
    if rules is None or mapping.action != "update":
        return False
    return "new_wins" in {rules.kinds.update_missing, rules.kinds.update_deleted or rules.policy}


def probe(
    connection: psycopg.Connection,
    place: str,
    mapping: StatementSection,
    table: Table,
    *,
    columns: Collection[str],
    unique: Sequence[frozenset[str]],
) -> Iterator[Finding]:
    """The rules of `mapping`, if it has any, held against the `columns` and `unique` keys of its table."""
    rules, place = mapping.rules, f"{place}.conflicts"
    if rules is None:
        return
    if absent := sorted(
        compared(mapping) - set(columns) - mapping.set.keys() - mapping.key.keys() - mapping.soft.keys()
    ):
        yield error(place, f"{table} has no column {', '.join(absent)}", f"it has: {', '.join(columns)}")
        return
    yield from _key(connection, place, mapping, table, unique)
    for column, expression in _expressions(mapping, rules):
        if column in columns and (refused := _refused(connection, table, expression)):
            yield error(
                f"{place}.{column}",
                f"PostgreSQL cannot compute the column by the rule: {refused}",
                "use another policy, or an expression over current, new and before",
            )


def _key(
    connection: psycopg.Connection,
    place: str,
    mapping: StatementSection,
    table: Table,
    unique: Sequence[frozenset[str]],
) -> Iterator[Finding]:
    if mapping.action == "insert":
        key = legacy.primary_key_of(connection, table.schema, table.name)
        if not key or not mapping.set.keys() >= {*key}:
            named = f"its primary key ({', '.join(key)}) under set" if key else "another action with key"
            yield error(place, f"the row that may be there already of {table} cannot be named", f"give {named}")
    elif table.kind != "v" and not any(found <= mapping.key.keys() for found in unique):
        yield error(
            place,
            f"({', '.join(mapping.key)}) is not unique in {table}, so there is no one row to compare with",
            "use the columns of the primary key",
        )


def _expressions(mapping: StatementSection, rules: ConflictsSection) -> Iterator[tuple[str, sql.Composable]]:
    grouped = {column: group for group in rules.groups for column in group.columns}
    for column in mapping.soft or mapping.set:
        group = grouped.get(column)
        if group and group.sql is not None:
            yield column, sql.SQL(group.sql)  # the file's own SQL, which is the point of it
        elif ((group and group.policy) or rules.policy) == "delta" and not (group and group.owner == "legacy"):
            delta = sql.SQL("current.{c} + (new.{c} - before.{c})")
            yield column, delta.format(c=sql.Identifier(column))


def _refused(connection: psycopg.Connection, table: Table, expression: sql.Composable) -> str | None:
    """What the server says against it; EXPLAIN plans the statement and runs nothing."""
    name = sql.Identifier(table.schema, table.name)
    query = sql.SQL(
        "EXPLAIN SELECT to_json({expression}) FROM {table} AS current, {table} AS new, {table} AS before"
    ).format(expression=expression, table=name)
    try:
        with connection.transaction():
            psycopg.RawCursor(connection).execute(query)
    except psycopg.Error as refused:
        if not (refused.sqlstate or "").startswith(("22", "42")):
            raise
        return refused.diag.message_primary
    return None
