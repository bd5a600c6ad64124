r"""Rows that the server joins: all values of a stretch of rows in a few long texts, in the place of a message a row.

COPY sends each row as a message of its own, which libpq, psycopg and Python each handle: 1 µs a row. And ``to_json``
costs the server 0.2 µs a value. Here a statement answers with some texts, in which the values of all rows stand one
after another, and what must be done to them is done to many at once (`Joint.parts`):

    plain   numbers, booleans, jsonb   are JSON as PostgreSQL prints them
    text    text and all that is like it, as a rule a column each   escaped as JSON in one call of orjson
    time    timestamps   a ``T`` in the place of the blank, ``+00:00`` for ``+00``

Between two values, and between two rows, is U+001F, which no JSON has in it, or U+007F, where the kind is text or time.
A text may have that, too: then the numbers of values and of columns differ. NULL is something that this process has
made up by chance: a word, a number of 19 digits, a moment before Christ. A number stays one that way: to make text of
it first, so that the text of NULL could stand for it, costs as much as to print it.

One text of all kinds would cost the server a seventh less, and Python, which must sort the values then, half as much
again as it would gain. One of plain values and times, a tenth, and Python as much.

INVARIANT. The values are those of the stream's encoders, byte by byte, or there are none: what is not so simple makes
`Joint.simple` false, and the rows are read in the other way, by COPY. That is U+007F in a text, and bytes that are no
UTF-8. Neither does the server ever make texts of more than `_MOST` bytes: a row whose own have more than its share of
that is left out, so there are fewer rows than were asked for. They are made before that, as COPY makes them. (To ask of
each value whether it may be wide, before it is read, cost as much as to print two of them.)
https://www.postgresql.org/docs/current/functions-aggregate.html
"""

import secrets
from collections.abc import Iterator, Sequence
from math import ceil
from typing import Final, NamedTuple

import orjson
from psycopg import sql
from psycopg.postgres import types as _built_in

from figbridge.forward import values
from figbridge.forward.snapshot.block import Block, Part, cuts
from figbridge.forward.table import Table

_PLAIN, _TEXT, _TIME = range(3)
_ALONE: Final = 8  # texts that have one column each, at most
_ARGUMENTS: Final = 99  # beside a separator: https://www.postgresql.org/docs/current/limits.html (function arguments)
_MOST: Final = 64 * 1024 * 1024  # bytes of a statement's texts, where those of some blocks were asked for
_WIDE: Final = 4000  # of a row's, whatever its share
_WORD: Final = secrets.token_hex(8)
_NULL: Final = f"\x01{_WORD}"
_NUMBER: Final = str(-8 * 10**18 - secrets.randbelow(10**18))
_MOMENT: Final = (
    f"{1000 + secrets.randbelow(3700)}-0{1 + secrets.randbelow(9)}-{10 + secrets.randbelow(19)} "
    f"{10 + secrets.randbelow(14)}:{10 + secrets.randbelow(50)}:{10 + secrets.randbelow(50)}"
    f".{secrets.randbelow(10**5):05}7"
)
_NULL_BEGINS: Final = b"\x01"
_NULL_THERE: Final = f'"\\u0001{_WORD}"'
_NUMBER_THERE = _NUMBER.encode()
_MOMENTS_THERE: Final = [f'"{_MOMENT}{zone} BC"'.encode() for zone in ("", "+00")]
_MARGIN: Final = 1.01, 64  # times, and bytes, that are looked at beyond what values have on average
_BETWEEN_PLAIN: Final = "\x1f"
_BETWEEN: Final = "\x7f"  # JSON has no escape for it, which orjson would take its time for
_BETWEEN_QUOTED: Final = f'"{_BETWEEN}"'
_SEPARATORS: Final = (_BETWEEN_PLAIN, _BETWEEN, _BETWEEN_QUOTED)  # of the texts
_OID: Final = {
    name: _built_in[name].oid for name in ("text", "varchar", "jsonb", "float4", "float8", "int8", "numeric", "bpchar")
}
_INTEGERS: Final = {_built_in[name].oid for name in ("int2", "int4", "int8")}
# whose values are short, and as texts have no separator in them
_CLEAR: Final = {
    _built_in[name].oid
    for name in ("bool", "int2", "int4", "int8", "float4", "float8", "timestamp", "timestamptz", "uuid")
}
_AS_THEY_ARE: Final = {_OID["text"], _OID["varchar"]}  # which an aggregate takes
# of the last row; what the last of other types is, and whether there is a `max` for them, an index alone knows
_LARGEST: Final = "pg_catalog.max({it}) AS {name}"
_LAST: Final = "(pg_catalog.array_agg({it}))[pg_catalog.count(*)] AS {name}"
_BOOLEAN: Final = "CASE WHEN {it} THEN 'true' WHEN NOT {it} THEN 'false' ELSE 'null' END"
# encoder → what is done to the values, and how they get into the text: as they are when they cannot be NULL, and else
_WAYS: Final[dict[values.Encoder, tuple[int, str, str]]] = {
    values.raw: (_PLAIN, "{it}", "coalesce({it}::pg_catalog.text, 'null')"),
    values.safe_number: (_PLAIN, "{it}", "coalesce({it}::pg_catalog.text, 'null')"),
    values.boolean: (_PLAIN, _BOOLEAN, _BOOLEAN),
    values.timestamp: (_TIME, "{it}", "coalesce({it}, {moment}::pg_catalog.timestamp)"),
    values.timestamptz: (_TIME, "{it}", "coalesce({it}, {moment}::pg_catalog.timestamptz)"),
    # a cast to text is not always what the type prints (inet, character); concat prints. IS NULL would be true of a
    # composite value, too, all of whose attributes are NULL
    values.text: (
        _TEXT,
        "{it}",
        "CASE WHEN {it} IS NOT DISTINCT FROM NULL THEN {null} ELSE pg_catalog.concat({it}) END",
    ),
}
_TEXTS: Final = (_TEXT, "{it}", "coalesce({it}, {null})")
_BLANKS: Final = (_TEXT, "{it}", "coalesce({it}, {null}::pg_catalog.bpchar)")
_JSON: Final = (_PLAIN, "{it}", "coalesce({it}, 'null'::pg_catalog.jsonb)")
_INTEGER: Final = (_PLAIN, "{it}", "coalesce({it}::pg_catalog.int8, {number}::pg_catalog.int8)")
_NUMERIC: Final = (_PLAIN, "{it}", "coalesce({it}, {number}::pg_catalog.numeric)")
_QUOTED: Final = (_PLAIN, "pg_catalog.to_json({it})", "coalesce(pg_catalog.to_json({it})::pg_catalog.text, 'null')")
_BY_TYPE: Final = {
    _OID["text"]: _TEXTS,
    _OID["varchar"]: _TEXTS,
    _OID["bpchar"]: _BLANKS,
    _OID["jsonb"]: _JSON,
    _OID["float4"]: _QUOTED,
    _OID["float8"]: _QUOTED,
    _OID["numeric"]: _NUMERIC,
    **dict.fromkeys(_INTEGERS, _INTEGER),
}


def joint(table: Table) -> "Joint | None":
    """For the rows of `table`, if all of its columns can be read so."""
    ways = [
        _way(column.type_oid, encoder) for column, encoder in zip(table.relation.columns, table.encoders, strict=True)
    ]
    found = [way for way in ways if way]
    return Joint(table, found) if found and len(found) == len(ways) and not table.ruled else None


def _way(oid: int, encoder: values.Encoder) -> tuple[int, str, str] | None:
    if encoder is values.exact_number and oid in (_OID["int8"], _OID["numeric"]):
        return _QUOTED
    return _BY_TYPE.get(oid) or _WAYS.get(encoder)


class _Group(NamedTuple):
    """Columns whose values are in one text."""

    kind: int
    indexes: Sequence[int]

    @property
    def separator(self) -> str:
        """What the server puts between two of them."""
        return _SEPARATORS[self.kind]


def _grouped(ways: Sequence[tuple[int, str, str]]) -> list[_Group]:
    """A text costs the server less alone than with others, but there may be more columns than a result has room for."""
    found = []
    for kind in (_PLAIN, _TEXT, _TIME):
        indexes = [index for index, (it, _, _) in enumerate(ways) if it == kind]
        each = min(ceil(len(indexes) / _ALONE) or 1, _ARGUMENTS) if kind == _TEXT else _ARGUMENTS
        found += [_Group(kind, indexes[first : first + each]) for first in range(0, len(indexes), each)]
    return found


class Joint:
    """See the module."""

    def __init__(self, table: Table, ways: Sequence[tuple[int, str, str]]) -> None:
        self._columns, self._ways = table.relation.columns, ways
        self._groups = _grouped(ways)
        # the texts that may be wide; a value of one of them may have a separator
        self._wide = [
            number
            for number, group in enumerate(self._groups)
            if not {self._columns[index].type_oid for index in group.indexes} <= _CLEAR
        ]

    @property
    def texts(self) -> int:
        """How many of a block."""
        return len(self._groups)

    def around(self, key: Sequence[str]) -> tuple[sql.Composed, sql.Composed, sql.Composed]:
        """What to SELECT of a row, and what stands before and behind that SELECT in the statement that joins its rows.

        Behind it all, `limit`. It answers with (number of rows, the last row's `key` as k0 and so on, the texts); all
        but the number is NULL if there are no rows.
        """
        items = []
        for column, (_, sure, other) in zip(self._columns, self._ways, strict=True):
            way = sql.SQL(sure if column.name in key else other)
            it = sql.Identifier(column.name)
            items.append(way.format(it=it, null=_NULL, number=_NUMBER, moment=f"{_MOMENT} BC"))
        comma = sql.SQL(", ")
        names = [sql.Identifier("a", f"t{number}") for number in range(self.texts)]
        own = [self._own(group, [items[index] for index in group.indexes]) for group in self._groups]
        texts = [
            sql.SQL("pg_catalog.string_agg({}, {})").format(name, group.separator)
            for name, group in zip(names, self._groups, strict=True)
        ]
        whole = {column.name for column in self._columns if column.type_oid in _INTEGERS}
        way = sql.SQL(_LARGEST if whole.issuperset(key) and len(key) == 1 else _LAST)
        last = [
            way.format(it=sql.Identifier("a", f"k{place}"), name=sql.Identifier(f"k{place}"))
            for place in range(len(key))
        ]
        sizes = [sql.SQL("pg_catalog.octet_length({})").format(names[number]) for number in self._wide]
        narrow = sql.SQL(" WHERE {} <= ").format(sql.SQL(" + ").join(sizes)) if sizes else sql.SQL("")
        aliases = [*(f"t{number}" for number in range(self.texts)), *(f"k{place}" for place in range(len(key)))]
        return (
            comma.join([*own, *map(sql.Identifier, key)]),
            sql.SQL("SELECT pg_catalog.count(*), {}, {} FROM (").format(comma.join(last), comma.join(texts)),
            sql.SQL(") AS a ({}){}").format(comma.join(map(sql.Identifier, aliases)), narrow),
        )

    def _own(self, group: _Group, items: Sequence[sql.Composed]) -> sql.Composed:
        """What one row gives to a text."""
        if len(items) == 1 and self._columns[group.indexes[0]].type_oid in _AS_THEY_ARE:
            return items[0]
        return sql.SQL("pg_catalog.concat_ws({}, {})").format(group.separator, sql.SQL(", ").join(items))

    def limit(self, rows: int) -> bytes:
        """The end of a statement that asks for so many rows."""
        return b"%d" % min(_WIDE, _MOST // rows) if self._wide else b""

    def simple(self, block: Block) -> bool:
        """Whether these are the texts of so many rows, and `parts` makes of them what the stream would say."""
        for number in self._wide:
            group = self._groups[number]
            if group.kind == _TEXT:
                between = block.texts[number].count(_BETWEEN.encode())
                if between + 1 != len(group.indexes) * block.rows:
                    return False
        return all(text.isascii() or _is_utf8(text) for text in block.texts)

    def parts(self, block: Block) -> Iterator[Part]:
        """The rows of a block that is `simple`, some at a time."""
        taken = [_Taken(text, group, block.rows) for text, group in zip(block.texts, self._groups, strict=True)]
        for _, rows in cuts(block.rows):
            columns: list[list[str]] = [[]] * len(self._columns)
            for values_, group in zip(taken, self._groups, strict=True):
                for index, column in zip(group.indexes, values_.take(rows), strict=True):
                    columns[index] = column
            yield Part(columns, rows)


class _Taken:
    """The values of a text, made some at a time: all of them would be more than a cache can hold."""

    def __init__(self, text: bytes, group: _Group, rows: int) -> None:
        self._text, self._at = b'"%b"' % text if group.kind == _TIME else text, 0
        self._made, self._width = _MADE[group.kind], len(group.indexes)
        self._between = _BETWEEN_PLAIN if group.kind == _PLAIN else _BETWEEN
        self._separator = self._between.encode()
        self._size = len(text) / (self._width * rows) if rows else 0  # of a value, on average
        self._found, self._first = list[str](), 0  # of which those from `_first` on were not taken yet

    def take(self, rows: int) -> list[list[str]]:
        """The values of the next rows, column by column."""
        width = self._width
        end = self._first + rows * width
        while len(self._found) < end:
            found = self._made(self._piece(end - len(self._found))).split(self._between)
            found[:0] = self._found[self._first :]
            self._found, end, self._first = found, end - self._first, 0
        columns = [self._found[self._first + place : end : width] for place in range(width)]
        self._first = end
        return columns

    def _piece(self, values_: int) -> bytes:
        """With so many values, or a few more, as a rule: those that are left over are moved."""
        times, more = _MARGIN
        end = self._text.find(self._separator, self._at + int(values_ * self._size * times) + more)
        piece = self._text[self._at : end] if end >= 0 else self._text[self._at :]
        self._at = end + 1 if end >= 0 else len(self._text)
        return piece


def _plain(text: bytes) -> str:
    if b"-" in text and _NUMBER_THERE in text:  # to look for one character takes next to no time
        text = text.replace(_NUMBER_THERE, b"null")
    return text.decode()


def _text(text: bytes) -> str:
    written = orjson.dumps(text.decode()).decode().replace(_BETWEEN, _BETWEEN_QUOTED)
    return written.replace(_NULL_THERE, "null") if _NULL_BEGINS in text else written


def _time(text: bytes) -> str:
    if b"B" in text:  # before Christ
        for moment in _MOMENTS_THERE:
            text = text.replace(moment, b"null")
    if b"B" in text:  # the encoder does both types justice
        moments = text.split(_BETWEEN.encode())
        text = _BETWEEN.encode().join([it if it == b"null" else values.timestamptz(it[1:-1]) for it in moments])
    else:
        text = text.replace(b" ", b"T").replace(b"+", b"+00:")  # the zone is +00
    return text.decode()


_MADE: Final = (_plain, _text, _time)  # of each kind


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
