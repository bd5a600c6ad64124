"""What a chunk is made of: blocks, as they came from the server, and parts of them, whose values are JSON."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import compress
from typing import Any, Final, NamedTuple, Self

_PART: Final = 500  # rows; what has no room in a processor's cache costs more
Values = tuple[str, ...]  # of a row, as JSON, in the order of its columns


class Block(NamedTuple):
    """Neighbouring rows: lines as `Layout.block` has made them, or the texts in which the server has joined them."""

    text: bytes | tuple[bytes, ...]
    rows: int

    @property
    def joined(self) -> bool:
        """Whether they are a matter of `joint`."""
        return isinstance(self.text, tuple)

    @property
    def texts(self) -> tuple[bytes, ...]:
        """Of rows that were joined."""
        return self.text if isinstance(self.text, tuple) else ()

    @property
    def lines(self) -> bytes:
        """Of rows that were not."""
        return b"" if isinstance(self.text, tuple) else self.text

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(map(len, self.text)) if isinstance(self.text, tuple) else len(self.text)


class Part(NamedTuple):
    """Some neighbouring rows, column by column: that is how the most is done to them at once."""

    columns: Sequence[Sequence[Any]]
    rows: int

    @classmethod
    def of(cls, rows: Sequence[Sequence[Any]]) -> Self:
        """These rows."""
        return cls(list(zip(*rows, strict=True)), len(rows))

    def values(self) -> Iterable[Any]:
        """Row by row, each a `Values` as a rule."""
        return zip(*self.columns, strict=True) if self.columns else [()] * self.rows

    def kept(self, flags: Sequence[bool]) -> "Part":
        """Those whose flag is true."""
        return Part([list(compress(column, flags)) for column in self.columns], sum(flags))

    def cut(self, rows: int) -> tuple["Part", "Part"]:
        """The first of them, as many as there are of `rows`, and the others."""
        rows = min(rows, self.rows)
        return (
            Part([column[:rows] for column in self.columns], rows),
            Part([column[rows:] for column in self.columns], self.rows - rows),
        )


def cuts(rows: int) -> Iterator[tuple[int, int]]:
    """(the first, how many) of each part of so many rows."""
    for first in range(0, rows, _PART):
        yield first, min(_PART, rows - first)
