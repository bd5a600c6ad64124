"""SQL, composed from a mapping and never from an event: an event only brings values.

Values are converted by PostgreSQL, with the column's own type. A statement takes one JSON array, a document for each
event, and hands each to ``json_populate_record`` (or all of them, which is quicker, to ``json_populate_recordset``,
where nobody asks for their numbers). So arrays, composites, ``numeric`` of any length, ``"NaN"``, ``bytea`` in hex,
enums and domains arrive as the table means them, and this file knows no type at all.
https://www.postgresql.org/docs/current/functions-json.html

One event or five hundred: it is the same statement, so a batch can do nothing that a single event does not. UPDATE and
DELETE return the number of each document that found its row, which tells the events that did not.

Columns that are not named keep their defaults on insert and their values on update.
"""

import functools
from collections.abc import Mapping as MappingOf
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from psycopg import sql

Action = Literal["insert", "update", "upsert", "delete", "soft"]

# A row with NULL in each column. Not NULL itself: with that PostgreSQL runs each column that a document leaves out
# through the checks of its domain, and refuses it where that forbids NULL.
_EMPTY: Final = sql.SQL("ROW((NULL::{table}).*)::{table}")

_ROWS: Final = sql.SQL(
    "json_array_elements($1::json) WITH ORDINALITY AS d (document, number), "
    "json_populate_record({empty}, d.document) AS r"
)
# An identity column that is GENERATED ALWAYS takes the new system's value where a mapping names it, as PostgreSQL's
# own apply worker would write it. Without such a column the clause means nothing.
_INSERT: Final = sql.SQL(
    "INSERT INTO {table} AS t ({columns}) OVERRIDING SYSTEM VALUE SELECT {values} "
    "FROM json_populate_recordset({empty}, $1::json) AS r"
)
# An insert that names no column: one row, whose document is not needed, but sent as with any other.
_DEFAULTS: Final = sql.SQL("WITH d AS (SELECT $1::json) INSERT INTO {table} DEFAULT VALUES")
_UPDATE: Final = sql.SQL("UPDATE {table} AS t SET {assignments} FROM {rows} WHERE {row} RETURNING d.number")
_DELETE: Final = sql.SQL("DELETE FROM {table} AS t USING {rows} WHERE {row} RETURNING d.number")
# An update that leaves every column alone still has to find its row.
_FIND: Final = sql.SQL("SELECT d.number FROM {rows} JOIN {table} AS t ON {row}")


@dataclass(frozen=True, slots=True)
class Shape:
    """A statement without its values. Equal shapes share one statement; `key` and `columns` are in the file's order."""

    action: Action
    table: tuple[str, str]
    key: tuple[str, ...]
    columns: tuple[str, ...]

    @property
    def finds(self) -> bool:
        """Whether the statement returns the numbers of the documents that found their row."""
        return self.action in {"update", "delete", "soft"}

    @property
    def single(self) -> bool:
        """Whether the statement takes one document only."""
        return self.action == "insert" and not self.key and not self.columns

    @property
    def makes_row(self) -> bool:
        """Whether the statement brings a row that was not there."""
        return self.action in {"insert", "upsert"}


class Statement(NamedTuple):
    """A statement on one row: its shape and the JSON object of its columns. Made once an event, so a NamedTuple."""

    shape: Shape
    document: str

    @property
    def query(self) -> bytes:
        """SQL with the parameter ``$1``."""
        return compose(self.shape)

    @property
    def parameters(self) -> Sequence[Any]:
        """Those of `query`, for this row alone."""
        return [f"[{self.document}]"]


@dataclass(frozen=True, slots=True)
class Free:
    """SQL of the user's own, with psycopg's named parameters; PostgreSQL infers the type of each."""

    query: str
    parameters: MappingOf[str, str | None]


@functools.lru_cache(maxsize=4096)
def compose(shape: Shape) -> bytes:
    """The SQL of `shape`; its parameter ``$1`` is a JSON array, of one document where the shape is `single`."""
    name = sql.Identifier(*shape.table)
    record = empty(shape.table)
    rows = _ROWS.format(empty=record)
    key, columns = list(shape.key), list(shape.columns)
    row = _each("t.{c} = r.{c}", key, " AND ")
    if shape.action in {"update", "soft"} and columns:
        assignments = _each("{c} = r.{c}", columns, ", ")
        return _UPDATE.format(table=name, assignments=assignments, rows=rows, row=row).as_bytes(None)
    if shape.action in {"update", "soft"}:
        return _FIND.format(table=name, rows=rows, row=row).as_bytes(None)
    if shape.action == "delete":
        return _DELETE.format(table=name, rows=rows, row=row).as_bytes(None)
    written = key + columns
    if not written:
        return _DEFAULTS.format(table=name).as_bytes(None)
    values = _each("r.{c}", written, ", ")
    insert = _INSERT.format(table=name, empty=record, columns=_each("{c}", written, ", "), values=values)
    if shape.action == "insert":
        return insert.as_bytes(None)
    resolution = (
        sql.SQL("DO UPDATE SET {}").format(_each("{c} = EXCLUDED.{c}", columns, ", "))
        if columns
        else sql.SQL("DO NOTHING")
    )
    return sql.SQL("{} ON CONFLICT ({}) {}").format(insert, _each("{c}", key, ", "), resolution).as_bytes(None)


def empty(table: tuple[str, str]) -> sql.Composable:
    """The row of `table` for json_populate_record and its like to populate."""
    return _EMPTY.format(table=sql.Identifier(*table))


def finding(shape: Shape) -> bytes:
    """The query that only finds the rows of `shape`, with the same parameter."""
    return compose(Shape("update", shape.table, shape.key, ()))


def inserting(shape: Shape) -> bytes:
    """The SQL of an insert or an upsert of which every row is new."""
    return compose(Shape("insert", shape.table, shape.key, shape.columns))


def _each(template: str, columns: list[str], separator: str) -> sql.Composed:
    return sql.SQL(separator).join(sql.SQL(template).format(c=sql.Identifier(column)) for column in columns)
