"""A part of a table's rows → their envelopes, a line each, made column by column.

Python pays for each row that it touches. Here it touches none: what stands between the values is the same for all rows
of a chunk, so a list is filled with it, the values of each column are put into their places by one assignment, and one
`join` makes the text of some hundred rows. The list is used for the next rows of the chunk again.
"""

import hashlib
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Final

from psycopg.postgres import types as _built_in

from figbridge.change import Column, Operation
from figbridge.event import attributes
from figbridge.forward import values
from figbridge.forward.place import Stamp
from figbridge.forward.snapshot.block import Part
from figbridge.forward.table import Table

_NAMED_BY_TEXT: Final = {_built_in[name].oid for name in ("int2", "int4", "int8", "uuid")}
_UUID: Final = _built_in["uuid"].oid
_NUMERIC: Final = _built_in["numeric"].oid
_UNITS: Final = list(map(str, range(1000)))
_THREE_DIGITS: Final = [f"{number:03}" for number in range(1000)]


def number(value: str) -> str:
    """A number as the stream has it, see `values.safe_number`; null stays."""
    return value if value == "null" else values.safe_number(value.encode()).decode()


def digest(name: str) -> str:
    """The end of the id of a row that is not named by the texts of its key."""
    return hashlib.blake2b(name.encode(), digest_size=12).hexdigest()


def by_text(table: Table, *, keyed: bool) -> bool:
    """Whether the texts of a row's key are the end of its id."""
    return keyed and {table.relation.columns[it].type_oid for it in table.keys} <= _NAMED_BY_TEXT


class Lines:
    """Of one version of a table. `names` gives the key of each row, as JSON; or all of it, for a table without one.

    For one thread.
    """

    def __init__(self, table: Table, names: Callable[[Part], Sequence[str]], *, keyed: bool) -> None:
        self._names, self._parts = names, table.parts[Operation.READ]
        columns = table.relation.columns
        self._uuids = [columns[it].type_oid == _UUID for it in table.keys] if by_text(table, keyed=keyed) else None
        self._keys = table.keys
        self._numbers = [
            (index, _may_be_long(column), column.type_oid == _NUMERIC)
            for index, (column, encoder) in enumerate(zip(columns, table.encoders, strict=True))
            if encoder is values.safe_number
        ]
        # what stands before a value, and which; behind those of all columns there are the ids' ends, and the ordinals
        self._between: list[str] = []
        self._slots = [len(columns), len(columns)]
        text = self._parts.between.decode()
        labels = [(label or b"").decode() for label in table.labels]
        for members in (table.keys, range(len(columns))):
            for place, index in enumerate(members):
                self._between.append(f"{text}{',' if place else '{'}{labels[index]}:")
                self._slots.append(index)
                text = ""
            if members is table.keys:
                none = f"{self._parts.before.decode()}null{self._parts.after.decode()}"
                text += f"{'}' if table.keys else 'null'}{none}"
        self._end = f"{text}{'' if columns else '{'}}}{self._parts.end.decode()}"
        self._slots.append(len(columns) + 1)
        self._made: tuple[tuple[str, Stamp, int], list[str]] | None = None  # of which rows, and `_empty`

    def of(self, part: Part, identity: str, stamp: Stamp, ordinal: int) -> bytes:
        """The lines of a part whose ordinals begin at `ordinal`; `identity` begins the ids."""
        if not part.rows:
            return b""
        columns = [*part.columns, self._ends(part), _UNITS]
        for index, long, odd in self._numbers:
            column = columns[index]
            if (long and max(map(len, column)) > values.SAFE_LENGTH) or (odd and not _are_finite(column)):
                columns[index] = list(map(number, column))
        wanted = identity, stamp, part.rows
        if self._made is None or self._made[0] != wanted:
            self._made = wanted, self._empty(*wanted)
        made, step = self._made[1], 2 * len(self._slots)
        for place, slot in enumerate(self._slots[:-1]):
            made[2 * place + 1 :: step] = columns[slot]
        _count(made, f"{self._end}{stamp.read.decode()}", stamp.first + ordinal, step)
        return "".join(made).encode()

    def _empty(self, identity: str, stamp: Stamp, rows: int) -> list[str]:
        """The text of so many rows, with nothing in the places of their values."""
        parts = self._parts
        about = attributes(parts.source, parts.detail_type, stamp.time, parts.resources).decode()
        begin, end = f'{{"version":"0","id":"{identity}', f"{stamp.tail.decode()}}}\n"
        between = [end + begin, f'"{about}{parts.start.decode()}{identity}', *self._between, self._end]
        row = [""] * (2 * len(self._slots))
        row[::2] = between
        made = row * rows
        made[0] = begin
        made.append(end)
        return made

    def _ends(self, part: Part) -> Sequence[str]:
        """Of the ids."""
        if self._uuids is None:
            return list(map(digest, self._names(part)))
        texts = [
            [value[1:-1] for value in part.columns[index]] if uuid else part.columns[index]
            for index, uuid in zip(self._keys, self._uuids, strict=True)
        ]
        return texts[0] if len(texts) == 1 else list(map(".".join, zip(*texts, strict=True)))


def _may_be_long(column: Column) -> bool:
    """Whether a number may have more than `values.SAFE_LENGTH` characters: what a numeric's modifier rules out."""
    precision, scale = (column.typmod - 4) >> 16, (column.typmod - 4) & 0x7FF
    return not (
        column.type_oid == _NUMERIC
        and column.typmod >= 0
        and scale <= precision
        and precision + len("-0.") <= values.SAFE_LENGTH
    )


def _are_finite(column: Sequence[str]) -> bool:
    """Not so: NaN, Infinity."""
    text = "".join(column)
    return "N" not in text and "I" not in text


def _count(made: list[str], before: str, first: int, step: int) -> None:
    """Put the ordinals into their places, and what stands before them, with all but their last three digits.

    Those three are looked up. To make a text of each number takes as long as all else that is done to a row's value.
    """
    rows, at = len(made) // step, 0
    while at < rows:
        thousand, unit = divmod(first + at, 1000)
        count = min(1000 - unit, rows - at)
        behind = (at + count) * step
        made[at * step + step - 1 : behind : step] = (_THREE_DIGITS if thousand else _UNITS)[unit : unit + count]
        made[at * step + step - 2 : behind : step] = repeat(f"{before}{thousand or ''}", count)
        at += count
