r"""How the rows of one version of a table come from the server, and how they become events.

The server writes most values as JSON itself: ``COPY (SELECT id, to_json(note), …)``. It costs the server about 0.1 µs a
value, on its own core, and what arrives is put into place by `lines`, or by one compiled function a table (as `unroll`
does it for the stream). A block of rows is text, a row a line, a value a field between tabs, and each value is JSON: no
value has a tab, a line break or one of COPY's escapes in it, so a block is cut by one `split`.

INVARIANT. A value is what the stream would say of it, byte by byte: only such types are left to the server whose
``to_json`` is the rule of `forward.values` without an exception. All others come as text and go through the very
encoders of the stream, here (`Layout.block`). The type matrix of the stream is run through both ways and compared.

A row of a snapshot is named by its key: of integers and uuids by their text, of other types by a hash, as a row without
a key is by a hash of all of it. https://www.postgresql.org/docs/current/sql-copy.html#id-1.9.3.55.9.2
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from types import CodeType
from typing import Any, Final

from psycopg import sql
from psycopg.postgres import types as _built_in

from figbridge.change import Operation, Row
from figbridge.errors import BridgeError
from figbridge.event import Event
from figbridge.forward import values
from figbridge.forward.place import Stamp
from figbridge.forward.snapshot.block import Block, Part, Values, cuts
from figbridge.forward.snapshot.joint import Joint, joint
from figbridge.forward.snapshot.lines import Lines, by_text, digest, number
from figbridge.forward.table import Table

_NULL: Final = b"\\N"
_PLACE: Final = re.compile("§([0-9]+)§")
_ESCAPE: Final = re.compile(rb"\\(.)", re.DOTALL)
_MEANS: Final = {b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t", b"v": b"\v"}
# encoders whose rule is to_json's, for every value of their types
_SERVED: Final = {values.text, values.boolean, values.float_, values.timestamp, values.timestamptz, values.exact_number}
_INT8: Final = _built_in["int8"].oid  # its values are digits or null
_UUID: Final = _built_in["uuid"].oid
_JSONB: Final = _built_in["jsonb"].oid


class NoLiteral(BridgeError):
    """No statement can name a row: its key has bytes that are no UTF-8."""

    def __init__(self, table: Table) -> None:
        super().__init__(
            f"a key of {table.relation} holds bytes that are not UTF-8, and by these no row can be looked up",
            hint="correct the value, then order the snapshot of the table again",
        )


class Layout:
    """See the module. `keyed`: the key's columns name a row in events; else all of its columns do.

    `query` is what to SELECT of a row, ``joint`` the other way of its rows, if there is one for the table.
    """

    def __init__(self, table: Table, *, keyed: bool) -> None:
        self.table, self.keyed = table, keyed
        self.joint: Joint | None
        self._encoders = table.encoders
        oids = [column.type_oid for column in table.relation.columns]
        self._ways = [_way(oid, encode) for oid, encode in zip(oids, self._encoders, strict=True)]
        self._all_served = None not in self._ways
        self.query = sql.SQL(", ").join(
            sql.SQL(way or "{}").format(sql.Identifier(column.name))
            for way, column in zip(self._ways, table.relation.columns, strict=True)
        )
        self._options = sql.SQL(" (NULL 'null')" if self._all_served else "")
        self.joint = joint(table)
        self._parts = table.parts[Operation.READ]
        named = [oids[index] for index in table.keys] if by_text(table, keyed=keyed) else []
        self._functions = _functions(table, keyed=keyed, named=named)
        self._lines = Lines(table, self._named, keyed=keyed)

    def copy(self, query: sql.Composed) -> sql.Composed:
        """The statement that sends the rows of `query`."""
        return sql.SQL("COPY ({}) TO STDOUT{}").format(query, self._options)

    def block(self, copied: bytes) -> bytes:
        """Whole lines of COPY → a block. Raises ValueError for a text that its type cannot have."""
        if self._all_served:
            # JSON has no raw control character, so nothing else was escaped
            return copied.replace(b"\\\\", b"\\") if b"\\" in copied else copied
        lines = [
            b"\t".join([self._value(index, field) for index, field in enumerate(line.split(b"\t"))])
            for line in copied[:-1].split(b"\n")
        ]
        return b"\n".join(lines) + b"\n"

    def leaving(self, block: Block) -> Block:
        """What of a block leaves: all of it, where no rule says otherwise."""
        return block

    def _value(self, index: int, field: bytes) -> bytes:
        if field == _NULL:
            return b"null"
        if b"\\" in field:
            field = _ESCAPE.sub(lambda found: _MEANS.get(found[1], found[1]), field)
        return field if self._ways[index] else self._encoders[index](field)

    def rows(self, block: Block) -> Iterator[Values]:
        """The rows of a block."""
        return chain.from_iterable(part.values() for part in self.parts(block))

    def parts(self, block: Block) -> Iterator[Part]:
        """The same, some at a time."""
        if block.joined:
            return self.joint.parts(block) if self.joint else iter(())
        return self._copied(block)

    def _copied(self, block: Block) -> Iterator[Part]:
        try:
            text = block.lines.decode()
        except UnicodeDecodeError:
            text = self._mended(block.lines)
        width, rows = len(self._ways), block.rows
        fields = text[:-1].replace("\n", "\t").split("\t") if width and rows else []
        for first, count in cuts(rows):
            part = fields[first * width : (first + count) * width]
            yield Part([part[index::width] for index in range(width)], count)

    def _mended(self, block: bytes) -> str:
        """With bytes that are not UTF-8 as the stream's encoders write them."""
        lines = block.decode(errors="surrogateescape")[:-1].split("\n")
        return "".join("\t".join(map(_valid, line.split("\t"))) + "\n" for line in lines)

    def name(self, row: Row) -> str:
        """What events of the stream about `row` are noted under; with a key, nothing else of it is looked at."""
        table = self.table
        name = table.name(row, table.key(row), b"" if self.keyed else table.row(row), keyed=self.keyed)
        return f"{table.label}{name.decode()}"

    def names(self, part: Part) -> list[str]:
        """What the stream's events about the same rows are noted under."""
        return self._named(part, self.table.label)

    def _named(self, part: Part, label: str = "") -> list[str]:
        if not part.rows:
            return []
        keys = [part.columns[index] for index in self.table.keys]
        found: list[str] = self._functions["names"](zip(*keys, strict=True) if self.keyed else part.values(), label)
        return found

    def keys(self, row: Values, indexes: Sequence[int]) -> list[str]:
        """These values of a row, as the texts that literals are made of. Raises NoLiteral."""
        texts = [json.loads(it) if it.startswith('"') else it for it in map(row.__getitem__, indexes)]
        if not all(map(_is_text, texts)):
            raise NoLiteral(self.table)
        return texts

    def events(self, part: Part, identity: str, stamp: Stamp, ordinal: int) -> list[Event]:
        """The events of rows, whose ordinals begin at `ordinal`; `identity` begins their ids."""
        position = f"}}{self._parts.end.decode()}{stamp.read.decode()}"
        made: list[Event] = self._functions["events"](
            part.values(), identity, stamp.first + ordinal, position, stamp.tail.decode(), stamp.time
        )
        return made

    def lines(self, part: Part, identity: str, stamp: Stamp, ordinal: int) -> bytes:
        """The envelopes of the same events, each with a line break behind it."""
        return self._lines.of(part, identity, stamp, ordinal)


def _way(oid: int, encode: values.Encoder) -> str | None:
    """How the server writes a type as JSON, `{}` being the column; None if it cannot as we do."""
    if oid == _JSONB or encode is values.raw or encode is values.safe_number:
        return "{}"  # jsonb has no line breaks; numbers are looked at when they are put into place
    # types of one's own are none of the list: to_json would use their casts to json
    return "pg_catalog.to_json({})" if oid in _SCALARS and encode in _SERVED else None


_SCALARS: Final = {info.oid for info in _built_in}


def _valid(value: str) -> str:
    if value.isascii() or not any("\udc80" <= character <= "\udcff" for character in value):
        return value
    if value.startswith('"'):
        text: str = json.loads(value)
        return values.text(text.encode(errors="surrogateescape")).decode()
    return value.encode(errors="backslashreplace").decode()


def _is_text(value: str) -> bool:
    """Whether all of it is UTF-8: a byte that is not is half a character."""
    return value.isascii() or not any("\ud800" <= it <= "\udfff" for it in value)


class _Pieces:
    """Constants of a function whose text has numbers alone: ``§3§`` within an f-string stands for the fourth."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def __call__(self, text: str) -> str:
        self._found.append(text)
        return f"§{len(self._found) - 1}§"

    def put(self, code: CodeType) -> CodeType:
        """`code` with the constants in their places: as one with the text around them, which is half as dear."""
        constants = [
            self.put(it) if isinstance(it, CodeType) else self._said(it) if isinstance(it, str) else it
            for it in code.co_consts
        ]
        return code.replace(co_consts=tuple(constants))

    def _said(self, constant: str) -> str:
        return _PLACE.sub(lambda found: self._found[int(found[1])], constant)


def _functions(table: Table, *, keyed: bool, named: Sequence[int]) -> dict[str, Any]:
    """``names`` and ``events``, compiled. Their text is made of numbers alone, as `unroll`'s.

    ``names`` has rows of the columns that name one alone, which are the key's if it is `keyed`.
    `named` has the types of the key's columns if their texts are the end of an id.
    """
    piece, labels, width = _Pieces(), [(label or b"").decode() for label in table.labels], range(len(table.labels))

    def members(columns: Iterable[int]) -> str:
        """Of a JSON object, without its last brace."""
        pairs = [f"{piece(('{', ',')[place > 0] + labels[it] + ':')}{{v{it}}}" for place, it in enumerate(columns)]
        return "".join(pairs) or piece("{")

    image = members(width)
    key = members(table.keys) + piece("}") if table.keys else piece("null")
    name = key if keyed else image + piece("}")
    numbered = {
        it: f"if len(v{it}) > {values.SAFE_LENGTH}{odd}: v{it} = number(v{it})"
        for it in width
        if table.encoders[it] is values.safe_number
        for odd in ["" if table.relation.columns[it].type_oid == _INT8 else f" or v{it}[-1] > '9'"]
    }
    numbers = list(numbered.values())
    naming = table.keys if keyed else width
    if named:
        texts = [
            f"{{v{it}[1:-1]}}" if oid == _UUID else f"{{k{it}}}" if oid == _INT8 else f"{{v{it}}}"
            for it, oid in zip(table.keys, named, strict=True)
        ]
        # before a large one gets quotation marks
        numbers = [f"k{it} = v{it}" for it, oid in zip(table.keys, named, strict=True) if oid == _INT8] + numbers
        end, hashed = piece(".").join(texts), []
    else:
        end, hashed = "{end}", [f'end = hash(f"{name}")']
    parts = table.parts[Operation.READ]
    between, nothing = piece(parts.between.decode()), piece(f"{parts.before.decode()}null{parts.after.decode()}")
    label, start = piece(table.label), piece(parts.start.decode())
    detail = f"{{identity}}{end}{between}{key}{nothing}{image}{{position}}{{ordinal}}{{tail}}"
    about = f'f"{{identity}}{end}", source, detail_type, f"{label}{key}", time'
    event = f'({about}, f"{start}{detail}".encode(), None, False, resources)'
    bodies = {
        "names(rows, label)": (
            naming,
            [*[numbered[it] for it in naming if it in numbered], f'append(f"{{label}}{name}")'],
        ),
        "events(rows, identity, ordinal, position, tail, time)": (
            width,
            [*numbers, *hashed, f"append(new(Event, {event}))", "ordinal += 1"],
        ),
    }
    namespace: dict[str, Any] = {"Event": Event, "new": tuple.__new__, "number": number, "hash": digest}
    namespace |= {"source": parts.source, "detail_type": parts.detail_type, "resources": parts.resources}
    for function, (columns, body) in bodies.items():
        row = "".join(f"v{it}, " for it in columns)
        text = [
            f"def {function}:",
            " made = []; append = made.append",
            f" for {row or '_'} in rows:",
            *[f"  {line}" for line in body],
            " return made",
        ]
        exec(piece.put(compile("\n".join(text), "<rows of a table>", "exec")), namespace)  # noqa: S102
    return namespace
