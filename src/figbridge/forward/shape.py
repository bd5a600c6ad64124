"""Change → Event: the envelope. One encoder is compiled for each version of a table, and then only bytes are joined.

The detail (https://docs.aws.amazon.com/eventbridge/latest/ref/overiew-event-structure.html calls it so):

    id          see the package docstring
    op          insert, update, delete, truncate
    schema, table
    key         the row's replica identity key; null for a truncate or a table without one
    before      the old row as far as the server sent it: all of it under REPLICA IDENTITY FULL, the old key when an
                update changed it or for a delete, else null
    after       the new row; null for delete and truncate
    unchanged   columns whose TOASTed value the update did not touch and the server did not send: absent, not null
    position    commit_lsn, ordinal and xid; a consumer of an unordered bus compares (commit_lsn, ordinal)
    committed_at, hops (how many bridges it has passed), cause (what triggered it; null: the legacy system)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal

import orjson

from figbridge.change import UNCHANGED, Begin, Change, Operation, Relation, Row
from figbridge.event import Event
from figbridge.forward import values

PrimaryKey = Callable[[Relation], Sequence[str]]

_PAST: Final = {
    Operation.INSERT: "inserted",
    Operation.UPDATE: "updated",
    Operation.DELETE: "deleted",
    Operation.TRUNCATE: "truncated",
}


@dataclass(frozen=True, slots=True)
class Naming:
    """How events are named: the templates of `ForwardSection`, and the database's name that fills them."""

    database: str
    source: str
    detail_type: str


class Shaper:
    """Makes events of one bridge. `begin` for each transaction, then `event` for each of its rows; one thread.

    `primary_key` is asked once per table version, for tables with REPLICA IDENTITY FULL, whose RELATION message flags
    every column as key and so does not say what identifies the row.
    """

    def __init__(self, naming: Naming, numbers: Literal["safe", "exact"], primary_key: PrimaryKey) -> None:
        self._naming = naming
        self._encoders = values.encoders(numbers)
        self._primary_key = primary_key
        self._tables: dict[int, _Table] = {}
        self._id_prefix = ""
        self._position = b""
        self._tail = b""
        self._time = datetime.fromtimestamp(0, UTC)

    def begin(self, begin: Begin, identity: str) -> None:
        """Start a transaction; `identity` is the part of the id before the commit LSN, without a dash at its end."""
        self._id_prefix = f"{identity}-{begin.commit_lsn:016X}-"
        self._position = b',"position":{"commit_lsn":"%b","ordinal":' % str(begin.commit_lsn).encode()
        committed = begin.committed_at.isoformat(timespec="microseconds").replace("+00:00", "Z").encode()
        self._tail = b',"xid":%d},"committed_at":"%b","hops":0,"cause":null}' % (begin.xid, committed)
        self._time = begin.committed_at

    def event(self, change: Change) -> Event:
        """The event of one change of the open transaction."""
        operation, relation, ordinal, before, before_is_key, after = change
        table = self._tables.get(relation.oid)
        if table is None or table.relation is not relation:
            table = self._compile(relation)
        unchanged = b"[]"
        if after is not None and UNCHANGED in after:
            after, unchanged = table.settle(after, None if before_is_key else before)
        key_row = after if after is not None else before
        key = table.key(key_row) if key_row is not None else b"null"
        identity = f"{self._id_prefix}{ordinal:08X}"
        source, detail_type, head = table.names[operation]
        detail = b'{"id":"%b%b%b,"before":%b,"after":%b,"unchanged":%b%b%d%b' % (
            identity.encode(),
            head,
            key,
            b"null" if before is None else table.key(before) if before_is_key else table.row(before),
            b"null" if after is None else table.row(after),
            unchanged,
            self._position,
            ordinal,
            self._tail,
        )
        return Event(identity, source, detail_type, f"{table.label}{key.decode()}", self._time, detail)

    def _compile(self, relation: Relation) -> "_Table":
        table = self._tables.get(relation.oid)
        if table is None or table.relation != relation:
            table = self._tables[relation.oid] = _Table(relation, self._naming, self._encoders, self._keys(relation))
        table.relation = relation  # a new connection describes the same table again
        return table

    def _keys(self, relation: Relation) -> frozenset[str]:
        if relation.identity == "f":
            return frozenset(self._primary_key(relation))
        return frozenset(column.name for column in relation.columns if column.is_key)


class _Table:
    """One version of a table, compiled."""

    def __init__(
        self, relation: Relation, naming: Naming, encoders: dict[int, values.Encoder], keys: frozenset[str]
    ) -> None:
        self.relation = relation
        self.label = f"{relation}:"
        self._columns = [
            (orjson.dumps(column.name) + b":", encoders.get(column.type_oid, values.text))
            for column in relation.columns
        ]
        self._key_columns = [index for index, column in enumerate(relation.columns) if column.name in keys]
        words = {"database": naming.database, "schema": relation.schema, "table": relation.name}
        place = b'"schema":%b,"table":%b,"key":' % (orjson.dumps(relation.schema), orjson.dumps(relation.name))
        self.names = {
            operation: (
                naming.source.format(**words),
                naming.detail_type.format(**words, operation=_PAST[operation]),
                b'","op":"%b",%b' % (operation.value.encode(), place),
            )
            for operation in Operation
        }

    def row(self, row: Row) -> bytes:
        """All columns of `row` that were sent, as a JSON object."""
        parts: list[bytes] = []
        append = parts.append
        for value, (label, encode) in zip(row, self._columns, strict=True):
            if value is None:
                append(label + b"null")
            elif isinstance(value, bytes):
                append(label + encode(value))
        return b"{%b}" % b",".join(parts)

    def key(self, row: Row) -> bytes:
        """The key columns of `row` as a JSON object; null when the table has none."""
        if not self._key_columns:
            return b"null"
        parts: list[bytes] = []
        for index in self._key_columns:
            value, (label, encode) = row[index], self._columns[index]
            if value is None:
                parts.append(label + b"null")
            elif isinstance(value, bytes):
                parts.append(label + encode(value))
        return b"{%b}" % b",".join(parts)

    def settle(self, after: Row, before: Row | None) -> tuple[Row, bytes]:
        """Fill what the server did not send from the old row, if that is whole; else name it."""
        if before is not None:
            after = [old if new is UNCHANGED else new for new, old in zip(after, before, strict=True)]
        missing = [
            column.name for column, value in zip(self.relation.columns, after, strict=True) if value is UNCHANGED
        ]
        return after, orjson.dumps(missing)
