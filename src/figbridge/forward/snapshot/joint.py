r"""Rows that the server joins: all values of a stretch of rows in a few long texts, in the place of a message a row.

COPY sends each row as a message of its own, which libpq, psycopg and Python each handle: 1 µs a row. And ``to_json``
costs the server 0.1 µs a value. Here a statement answers with up to three texts, in which the values of all rows stand
one after another, and what must be done to them is done to the whole text at once:

    plain   numbers, booleans, jsonb   are JSON as PostgreSQL prints them
    text    text and all that is like it   escaped as JSON in one call of orjson
    time    timestamps   a ``T`` in the place of the blank, ``+00:00`` for ``+00``

``plain`` and ``text`` have U+007F between two values, ``time`` has it between quotation marks. A value may have it,
too: then the numbers of values and of columns differ. NULL is something that this process has made up by chance: a
word, a number of 19 digits, a moment in a far century. A number stays one that way: to make text of it first, so that
the text of NULL could stand for it, costs as much as to print it.

INVARIANT. The values are those of the stream's encoders, byte by byte, or there are none: what is not so simple makes
`Joint.simple` false, and the rows are read in the other way, by COPY. That is U+007F in a text, bytes that are no
UTF-8, a year before Christ. Neither does the server ever make a text that is much larger than was asked for: a row
with a value of more than `_WIDE` bytes, or of which that cannot be ruled out without reading it (`_wide`), is left
out, so there are fewer rows than were asked for.
https://www.postgresql.org/docs/current/functions-aggregate.html
"""

import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import chain
from typing import Final

import orjson
from psycopg import sql
from psycopg.postgres import types as _built_in

from figbridge.change import Column
from figbridge.forward import values
from figbridge.forward.table import Table

Values = tuple[str, ...]  # of a row, as JSON, in the order of its columns
Text = bytes | tuple[bytes, ...]  # of a block: lines, or the texts of `Joint.around`

_PLAIN, _TEXT, _TIME = range(3)
_WIDE: Final = 2000  # bytes; PostgreSQL moves larger values out of the row, as a rule
_SMALL: Final = 100  # bytes on disk, which are 25 kB at most if they are compressed
_WORD: Final = secrets.token_hex(8)
_NULL: Final = f"\x01{_WORD}"
_NUMBER: Final = str(-8 * 10**18 - secrets.randbelow(10**18))
_MOMENT: Final = (
    f"{200_000 + secrets.randbelow(90_000)}-0{1 + secrets.randbelow(9)}-{10 + secrets.randbelow(19)} "
    f"12:{10 + secrets.randbelow(50)}:{10 + secrets.randbelow(50)}.{secrets.randbelow(10**5):05}7"
)
_NULL_THERE: Final = f'"\\u0001{_WORD}"'
_NUMBER_THERE, _MOMENT_THERE = _NUMBER.encode(), _MOMENT.replace(" ", "T").encode()
_PART: Final = 32 * 1024  # bytes
_SEPARATOR: Final = b"\x7f"  # JSON has no escape for it, which orjson would take its time for
_BETWEEN: Final = (r"\x7f", r"\x7f", r'"\x7f"')
_OID: Final = {
    name: _built_in[name].oid for name in ("text", "varchar", "jsonb", "float4", "float8", "int8", "numeric", "bpchar")
}
_INTEGERS: Final = {_built_in[name].oid for name in ("int2", "int4", "int8")}
# of a length that never is a matter
_SHORT: Final = {
    _built_in[name].oid
    for name in ("bool", "int2", "int4", "int8", "float4", "float8", "timestamp", "timestamptz", "date", "uuid")
}
_DIGITS: Final = {_built_in[name].oid for name in ("bool", "int2", "int4", "int8", "float4", "float8", "numeric")}
_BOOLEAN: Final = "CASE WHEN {it} THEN 'true' WHEN NOT {it} THEN 'false' ELSE 'null' END"
# encoder → the text, and how the value gets into it: as it is when it cannot be NULL, and else
_WAYS: Final[dict[values.Encoder, tuple[int, str, str]]] = {
    values.raw: (_PLAIN, "{it}", "coalesce({it}::text, 'null')"),
    values.safe_number: (_PLAIN, "{it}", "coalesce({it}::text, 'null')"),
    values.boolean: (_PLAIN, _BOOLEAN, _BOOLEAN),
    values.timestamp: (_TIME, "{it}", "coalesce({it}, {moment}::pg_catalog.timestamp)"),
    values.timestamptz: (_TIME, "{it}", "coalesce({it}, {moment}::pg_catalog.timestamptz)"),
    # a cast to text is not always what the type prints (inet, character); concat prints
    values.text: (_TEXT, "{it}", "CASE WHEN {it} IS NULL THEN {null} ELSE pg_catalog.concat({it}) END"),
}
_TEXTS: Final = (_TEXT, "{it}", "coalesce({it}, {null})")
_BLANKS: Final = (_TEXT, "{it}", "coalesce({it}, {null}::pg_catalog.bpchar)")
_JSON: Final = (_PLAIN, "{it}", "coalesce({it}, 'null'::pg_catalog.jsonb)")
_INTEGER: Final = (_PLAIN, "{it}", "coalesce({it}::pg_catalog.int8, {number}::pg_catalog.int8)")
_NUMERIC: Final = (_PLAIN, "{it}", "coalesce({it}, {number}::pg_catalog.numeric)")
_QUOTED: Final = (_PLAIN, "pg_catalog.to_json({it})", "coalesce(pg_catalog.to_json({it})::text, 'null')")
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


def _wide(column: Column) -> str | None:
    """The condition under which a value may have a text of more than `_WIDE` bytes; None if it never has."""
    oid, length = column.type_oid, column.typmod - 4  # of a typmod the first four are a length word's
    if oid in _SHORT or (oid in (_OID["varchar"], _OID["bpchar"]) and 0 <= 4 * length <= _WIDE):
        return None
    if oid == _OID["numeric"]:  # a few bytes may have many zeros; no typmod allows for more than 2000 digits
        many = (
            f"{{it}} >= 1e{_WIDE} AND {{it}} < 'Infinity' OR {{it}} <= -1e{_WIDE} AND {{it}} > '-Infinity' "
            f"OR pg_catalog.scale({{it}}) > {_WIDE}"
        )
        return many if column.typmod < 0 else None
    if oid in (_OID["text"], _OID["varchar"], _OID["bpchar"]):
        return f"pg_catalog.octet_length({{it}}) > {_WIDE}"  # which need not read it, either
    size = "pg_catalog.pg_column_size({it})"
    return f"{size} > {_SMALL} AND ({size} > {_WIDE} OR pg_catalog.pg_column_compression({{it}}) IS NOT NULL)"


class Joint:
    """See the module."""

    def __init__(self, table: Table, ways: Sequence[tuple[int, str, str]]) -> None:
        self._columns, self._ways = table.relation.columns, ways
        self._groups = [group for group, _, _ in ways]
        self._counts = [self._groups.count(group) for group in (_PLAIN, _TEXT, _TIME)]
        # whose values may have a separator in them: no time has, and no number
        self._doubtful = {
            group
            for column, group in zip(self._columns, self._groups, strict=True)
            if group == _TEXT or (group == _PLAIN and column.type_oid not in _DIGITS)
        }

    def around(self, never_null: Collection[str]) -> tuple[sql.Composed, sql.Composed]:
        """What stands before and behind a SELECT of the columns in the statement that joins its rows.

        It answers with (number of rows, the texts), these NULL if there are no rows.
        """
        items: list[list[sql.Composable]] = [[], [], []]
        wide: list[sql.Composable] = []
        for place, (column, (group, sure, other)) in enumerate(zip(self._columns, self._ways, strict=True)):
            it = sql.Identifier(f"c{place}")
            way = sql.SQL(sure if column.name in never_null else other)
            items[group].append(way.format(it=it, null=_NULL, number=_NUMBER, moment=_MOMENT))
            if condition := _wide(column):
                wide.append(sql.SQL(condition).format(it=it))
        comma = sql.SQL(", ")
        joined = "pg_catalog.string_agg(pg_catalog.concat_ws({it}, {items}), {it})"
        texts = [
            sql.SQL(joined).format(it=sql.SQL(f"E'{between}'"), items=comma.join(found)) if found else sql.SQL("''")
            for between, found in zip(_BETWEEN, items, strict=True)
        ]
        # above the LIMIT, as a filter: as a column that each of the texts looks at it costs the server a tenth of all
        narrow = sql.SQL(" WHERE ({}) IS NOT TRUE").format(sql.SQL(" OR ").join(wide)) if wide else sql.SQL("")
        names = comma.join([sql.Identifier(f"c{place}") for place in range(len(self._columns))])
        return (
            sql.SQL("SELECT pg_catalog.count(*), {} FROM (").format(comma.join(texts)),
            sql.SQL(") AS a ({}){}").format(names, narrow),
        )

    def simple(self, rows: int, texts: Sequence[bytes]) -> bool:
        """Whether these are the texts of `rows` rows, and `rows` makes of them what the stream would say."""
        # each search is for one character, of which the C library finds the next without a look at those between
        if b"B" in texts[_TIME]:  # BC
            return False
        for group in self._doubtful:
            if texts[group].count(_SEPARATOR) + 1 != self._counts[group] * rows:
                return False
        text = texts[_TEXT]
        return text.isascii() or _is_utf8(text)

    def rows(self, texts: Sequence[bytes]) -> Iterator[Values]:
        """The rows of texts that are `simple`."""
        plain, text, time = texts
        fields = [
            chain.from_iterable(_values(it, made))
            for it, made in ((plain, _plain), (text, _text), (b'"%b"' % time, _time))
        ]
        return zip(*[fields[group] for group in self._groups], strict=True)

    def last(self, texts: Sequence[bytes]) -> Values:
        """The last of them, for less than all of them cost."""
        tails = []
        for text, count, between in zip(texts, self._counts, _BETWEEN, strict=True):
            own = between.replace(r"\x7f", "\x7f").encode()
            values = text[-_PART:].rsplit(own, count)
            if len(values) <= count:
                values = text.rsplit(own, count)
            tails.append(own.join(values[-count:]) if count else b"")
        return next(self.rows(tails))


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _values(text: bytes, made: Callable[[bytes], str]) -> Iterator[list[str]]:
    """Its values, some at a time: all of them would be as many objects, and as long a text, as a cache cannot hold."""
    begin = 0
    while (end := text.find(_SEPARATOR, begin + _PART)) >= 0:
        yield made(text[begin:end]).split("\x7f")
        begin = end + 1
    yield made(text[begin:]).split("\x7f")


def _plain(text: bytes) -> str:
    if _NUMBER_THERE in text:
        text = text.replace(_NUMBER_THERE, b"null")
    return text.decode()


def _text(text: bytes) -> str:
    written = orjson.dumps(text.decode()).decode().replace("\x7f", '"\x7f"')
    return written.replace(_NULL_THERE, "null") if b"\x01" in text else written


def _time(text: bytes) -> str:
    text = text.replace(b" ", b"T").replace(b"+", b"+00:")  # the zone is +00
    if _MOMENT_THERE in text:
        text = text.replace(b'"%b+00:00"' % _MOMENT_THERE, b"null").replace(b'"%b"' % _MOMENT_THERE, b"null")
    return text.decode()
