"""The layout of a table about which there are rules: its values come as text, and pass the encoders of the stream.

It also is that of a table whose key has a type of which JSON does not give back the text that a literal is made of: an
array, say. There are few of these.

INVARIANT. What `figbridge.forward.sanitize` keeps from the stream's events is in no event of a snapshot, nor in its id.
A block holds values as they are in the database, which the names of rows and the next chunk are made of; it lives
until its slice leaves, and nobody prints it. Rows that stay are gone from it before it is offered.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, Final

from psycopg import sql

from figbridge.change import Operation, Row
from figbridge.event import Event, envelopes
from figbridge.forward import values
from figbridge.forward.place import Stamp
from figbridge.forward.snapshot.block import Block, Part, Values
from figbridge.forward.snapshot.layout import Layout, NoLiteral
from figbridge.forward.table import Table

_NULL: Final = b"\\N"
_ESCAPE: Final = re.compile(rb"\\(.)", re.DOTALL)
_MEANS: Final = {b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t", b"v": b"\v"}


# what they write a literal can be made of, as it is or without its quotation marks
_GIVE_BACK: Final = {
    values.text, values.boolean, values.raw, values.safe_number, values.exact_number, values.float_, values.timestamp,
    values.timestamptz,
}  # fmt: skip


def layout(table: Table, *, keyed: bool, order: Sequence[str]) -> Layout:
    """How the rows of `table` come from the server, in the order of these columns, and become events."""
    columns = zip(table.relation.columns, table.encoders, strict=True)
    odd = any(column.name in order and encoder not in _GIVE_BACK for column, encoder in columns)
    return Sanitized(table, keyed=keyed) if table.ruled or odd else Layout(table, keyed=keyed)


class Sanitized(Layout):
    """As `Layout`, whose `Values` are rows in their text form here. Blocks are lines of COPY as they came."""

    def __init__(self, table: Table, *, keyed: bool) -> None:
        self.table, self.keyed, self.joint = table, keyed, None
        names = [column.name for column in table.relation.columns]
        self.query = sql.SQL(", ").join(map(sql.Identifier, names))

    def copy(self, query: sql.Composed) -> sql.Composed:
        """See `Layout.copy`."""
        return sql.SQL("COPY ({}) TO STDOUT").format(query)

    def block(self, copied: bytes) -> bytes:
        """See `Layout.block`."""
        return copied

    def leaving(self, block: Block) -> Block:
        """See `Layout.leaving`."""
        where = self.table.where
        if where is None:
            return block
        lines = [line for line in block.lines[:-1].split(b"\n") if where.row(_row(line))] if block.rows else []
        return Block(b"".join([line + b"\n" for line in lines]), len(lines))

    def parts(self, block: Block) -> Iterator[Part]:
        """See `Layout.parts`."""
        if block.rows:
            yield Part.of([_row(line) for line in block.lines[:-1].split(b"\n")])

    def names(self, part: Part) -> list[str]:
        """See `Layout.names`."""
        return [f"{self.table.label}{self._written(row)[2].decode()}" for row in part.values()]

    def keys(self, row: Values, indexes: Sequence[int]) -> list[str]:
        """See `Layout.keys`."""
        found: Any = row
        try:
            return [(found[index] or b"").decode() for index in indexes]
        except UnicodeDecodeError:
            raise NoLiteral(self.table) from None

    def events(self, part: Part, identity: str, stamp: Stamp, ordinal: int) -> list[Event]:
        """See `Layout.events`."""
        parts, label = self.table.parts[Operation.READ], self.table.label
        nothing = parts.before + b"null" + parts.after
        found = []
        for number, row in enumerate(part.values(), stamp.first + ordinal):
            key, image, name = self._written(row)
            end = hashlib.blake2b(name, digest_size=12).hexdigest()
            # the bus's order is by the event's key, which for a table without one is the same for all rows
            order = f"{label}{name.decode()}" if self.keyed else f"{label}null"
            detail = b"".join((
                parts.start, f"{identity}{end}".encode(), parts.between, key, nothing, image, parts.end, stamp.read,
                b"%d" % number, stamp.tail,
            ))  # fmt: skip
            about = parts.source, parts.detail_type, order, stamp.time
            found.append(Event(f"{identity}{end}", *about, detail, None, False, parts.resources))
        return found

    def lines(self, part: Part, identity: str, stamp: Stamp, ordinal: int) -> bytes:
        """See `Layout.lines`."""
        return b"".join([line + b"\n" for line in envelopes(self.events(part, identity, stamp, ordinal))])

    def _written(self, row: Row) -> tuple[bytes, bytes, bytes]:
        """(the key, the row, what tells it from the others), of which the last is no JSON where it is a hash."""
        table = self.table
        try:
            key, image = table.write(row)
        except UnicodeDecodeError:
            key, image = table.key(row), table.row(row)
        return key, image, table.name(row, key, image, keyed=self.keyed)


def _row(line: bytes) -> Row:
    """The values of one line, without its line break."""
    fields = line.split(b"\t")
    if b"\\" not in line:
        return fields  # none of them is NULL
    return [None if it == _NULL else _plain(it) if b"\\" in it else it for it in fields]


def _plain(field: bytes) -> bytes:
    return _ESCAPE.sub(lambda found: _MEANS.get(found[1], found[1]), field)
