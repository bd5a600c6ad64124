"""A chunk on its way to the sink: cut into slices, between which the stream goes first.

INVARIANT. Until a row has been given to the sink, the stream wins over it: `Reads.overtaken` is told each event of the
stream that goes first, and the row that it is about does not leave any more. So the window stays open, as it were,
from the high watermark until the last slice. An event that does not tell all of its row may not go first (`blocks`).

The rows stay as they came, 150 bytes or so each, and become events when their slice leaves.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, overload

from figbridge.event import Event, Lines
from figbridge.forward.checkpoint import Ticket
from figbridge.forward.place import Stamp
from figbridge.forward.snapshot.layout import Layout, Values
from figbridge.forward.versions import Version

if TYPE_CHECKING:
    from figbridge.forward.snapshot.window import Window

_FEWEST, _MOST = 500, 10_000  # rows that leave at once
_BRIEF, _LONG = 0.004, 0.050  # seconds that they may take: while the stream flows, and while it has rested
_RESTS: Final = 1.0  # seconds without an event
_FRAME: Final = 700  # bytes, about, of an envelope beside its values, and the names of ten columns or so


class Block(NamedTuple):
    """Neighbouring rows, as `Layout.block` has made them."""

    text: bytes
    rows: int


class Slice(Lines):
    """Events of some rows, made when they are asked for."""

    def __init__(
        self, layout: Layout, block: bytes | Sequence[Values], rows: int, size: int, about: tuple[str, Stamp, int]
    ) -> None:
        self._layout, self._block, self._rows, self._about = layout, block, rows, about
        self.weight = 2 * size + _FRAME * rows
        self._events: list[Event] | None = None

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[Event]:
        if self._events is None:
            self._events = self._layout.events(self._made(), *self._about)
        return iter(self._events)

    @overload
    def __getitem__(self, index: int) -> Event: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Event]: ...
    def __getitem__(self, index: int | slice) -> Event | Sequence[Event]:
        return list(self)[index]

    def lines(self) -> bytes:
        """See `Lines`."""
        return self._layout.lines(self._made(), *self._about)

    def _made(self) -> Iterable[Values]:
        return self._layout.rows(self._block) if isinstance(self._block, bytes) else self._block


class Reads:
    """The blocks of one chunk. `stamp` is of its high watermark's transaction.

    The publish loop's alone once it is in the buffer: ``left`` counts the rows that have left.
    """

    def __init__(self, window: "Window", stamp: Stamp, ticket: Ticket, versions: Sequence[Version] = ()) -> None:
        self.table, self.ticket, self.versions = window.layout.table.relation.oid, ticket, versions
        self.left, self.behind = 0, 0  # behind: how many batches of the stream go before it
        self._layout, self._identity, self._stamp = window.layout, window.identity, stamp
        self._blocks, self._touched = list(reversed(window.offered)), window.touched

    @property
    def size(self) -> int:
        """Bytes of what has not left yet."""
        return sum([len(block.text) for block in self._blocks])

    @property
    def whole(self) -> bool:
        """Whether no event of the table may go first: without a key none says of which row it is."""
        return not self._layout.keyed

    def overtaken(self, events: Iterable[Event]) -> None:
        """These go first."""
        self._touched.update([event.key for event in events])
        self._touched.update([event.old_key for event in events if event.old_key is not None])

    def slice(self, rows: int) -> tuple[Slice, int]:
        """The next, of about `rows` rows, and its size as `size` has counted it."""
        blocks = [self._blocks.pop()] if self._blocks else []
        count = sum([block.rows for block in blocks])
        while self._blocks and count + self._blocks[-1].rows <= rows:
            blocks.append(self._blocks.pop())
            count += blocks[-1].rows
        text = b"".join([block.text for block in blocks])
        block: bytes | Sequence[Values] = text
        if self._touched and count:
            found = list(self._layout.rows(text))
            names = self._layout.names(found)
            if not self._touched.isdisjoint(names):
                block = [row for row, name in zip(found, names, strict=True) if name not in self._touched]
                count = len(block)
        about = self._identity, self._stamp, self.left
        self.left += count
        return Slice(self._layout, block, count, len(text), about), len(text)

    @property
    def ended(self) -> bool:
        """Whether all has been given away."""
        return not self._blocks


class Share:
    """How many rows leave at once: few while the stream flows, whose events wait meanwhile; many while it rests."""

    def __init__(self) -> None:
        self.rows = _FEWEST
        self._streamed = float("-inf")

    def took(self, events: int, seconds: float, *, read: bool) -> None:
        """`events` became durable in `seconds`."""
        now = time.monotonic()
        if not read:
            self._streamed = now
            return
        wanted = _BRIEF if now - self._streamed < _RESTS else _LONG
        # a sink has a cost of its own for each request: no less than half as many, no more than twice as many at once
        rows = int(events * min(2.0, max(0.5, wanted / max(seconds, 1e-6))))
        self.rows = max(_FEWEST, min(rows, _MOST))
