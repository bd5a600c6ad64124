"""Rows that a mapping's statement does not reach, though they are there: nobody is told of them by an error.

Row-level security hides rows from the role. And ON CONFLICT looks into the table that it names, not into those that
inherit from it: https://www.postgresql.org/docs/current/ddl-inherit.html
"""

from collections.abc import Iterator

import psycopg

from figbridge.config import StatementSection
from figbridge.preflight.catalogue import Table, quote, spell
from figbridge.preflight.finding import Finding, warning

# not the partitions of a partitioned table, which ON CONFLICT does look into
_CHILDREN = "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = %s ORDER BY 1 LIMIT 5"


def probe(connection: psycopg.Connection, place: str, mapping: StatementSection, table: Table) -> Iterator[Finding]:
    """`mapping`, whose columns are there, held against row-level security and inheritance."""
    if table.policed:
        yield warning(
            f"{place}.into",
            f"row-level security of {table} is in force for role {spell(connection.info.user)}: a row that its "
            "policies hide is not there (an update waits for it in vain, a delete is ignored), and one that they "
            "forbid is a dead letter 42501",
            f"ALTER ROLE {quote(connection.info.user)} BYPASSRLS; or let a policy show and allow the role every row",
        )
    if mapping.action == "upsert" and mapping.rules is None and table.kind == "r":
        children = [name for (name,) in connection.execute(_CHILDREN, [table.oid])]
        if children:
            yield warning(
                f"{place}.into",
                f"an upsert into {table} does not see rows of tables that inherit from it ({', '.join(children)}): "
                "such a row is made a second time, or the event is a dead letter 23505",
                "name the table that has the rows, let the owner make it a partitioned table, or write SQL of your own "
                "(sql)",
            )
