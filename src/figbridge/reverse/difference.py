"""What statements change: the rows that they name, before and after; for what is rolled back then."""

from collections.abc import Sequence
from typing import Final

import psycopg
from psycopg import sql

from figbridge import legacy
from figbridge.reverse.statement import Shape, empty

# What COMMIT would say, while there is still something to roll back.
CHECKED: Final = "SET CONSTRAINTS ALL IMMEDIATE"

# t.* is the row, whatever its columns are called; t alone would be a column of that name. Not as jsonb, which has
# neither the \u0000 nor the half of a surrogate pair that a column of type json can hold.
_ROWS: Final = sql.SQL("""
    SELECT d.number, to_json(t.*)::text
    FROM json_array_elements($1::json) WITH ORDINALITY AS d (document, number)
    CROSS JOIN LATERAL json_populate_record({empty}, d.document) AS r
    JOIN {table} AS t ON {row}
""")


def rows(connection: psycopg.Connection, shape: Shape, documents: Sequence[str]) -> list[list[str]]:
    """The rows of each document, as JSON: those with its key; of an insert, with its primary key.

    Without a primary key among its columns, an insert's rows are those with all of its values. Raises psycopg.Error.
    """
    names, condition = shape.key, "t.{c} = r.{c}"
    if not names:
        primary = legacy.primary_key_of(connection, *shape.table)
        if primary and set(primary) <= set(shape.columns):
            names = primary
        else:
            names, condition = shape.columns, "t.{c}::text IS NOT DISTINCT FROM r.{c}::text"
    row = sql.SQL(" AND ").join(sql.SQL(condition).format(c=sql.Identifier(name)) for name in names)
    query = _ROWS.format(
        table=sql.Identifier(*shape.table), empty=empty(shape.table), row=row if names else sql.SQL("false")
    )
    found: list[list[str]] = [[] for _ in documents]
    with legacy.every_digit(connection):
        for number, text in psycopg.RawCursor(connection).execute(query, [f"[{','.join(documents)}]"]):
            found[number - 1].append(text)
    return found
