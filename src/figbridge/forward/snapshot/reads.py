"""A chunk on its way to the sink: cut into slices, between which the stream goes first.

INVARIANT. Until a row has been given to the sink, the stream wins over it: `Reads.overtaken` is told each event of the
stream that goes first, and the row that it is about does not leave any more. So the window stays open, as it were,
from the high watermark until the last slice. An event that does not tell all of its row may not go first (`blocks`).

The rows stay as they came, 150 bytes or so each, and become events when their slice leaves.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar, overload

from figbridge.event import Event, Lines
from figbridge.forward.checkpoint import Ticket
from figbridge.forward.place import Stamp
from figbridge.forward.snapshot.block import Block, Part
from figbridge.forward.snapshot.layout import Layout
from figbridge.forward.versions import Version

if TYPE_CHECKING:
    from figbridge.forward.snapshot.window import Window

T = TypeVar("T")
_FEWEST, _MOST = 150, 10_000  # rows that leave at once
# seconds that they may take: while the stream flows (some events of its own take half as long), and while it rests
_BRIEF, _LONG = 0.0005, 0.050
_RESTS: Final = 1.0  # seconds without an event
_LEFT: Final = 8  # times as long as a read took, the stream has the cores for itself, if it flows
_REST: Final = 0.08  # seconds, at most


class _Walk:
    """Through the parts of a block, in their order."""

    def __init__(self, block: Block, layout: Layout) -> None:
        self._parts, self._rest = layout.parts(block), Part((), 0)
        self.at = 0

    def take(self, rows: int) -> Iterator[Part]:
        """So many rows."""
        while rows:
            part = self._rest if self._rest.rows else next(self._parts)
            self._rest = Part((), 0)
            if part.rows > rows:
                part, self._rest = part.cut(rows)
            rows -= part.rows
            self.at += part.rows
            yield part


class _Opened:
    """A block that leaves in stretches, in their order, as a rule; each can be asked for again."""

    def __init__(self, block: Block, layout: Layout) -> None:
        self.rows, self.size, self._block, self._layout = block.rows, block.size, block, layout
        self._walk = _Walk(block, layout)
        self.given = 0

    def part(self, most: int) -> tuple["_Stretch", int]:
        """The next rows, at most so many, and their share of the bytes."""
        count = min(most, self.rows - self.given)
        size = self.size * count // max(1, self.rows - self.given)
        stretch = _Stretch(self, self.given, count)
        self.given += count
        self.size -= size
        return stretch, size

    def parts(self, begin: int, rows: int) -> Iterator[Part]:
        """The rows from `begin` on."""
        if begin != self._walk.at:
            self._walk = _Walk(self._block, self._layout)
            for _ in self._walk.take(begin):
                pass
        return self._walk.take(rows)


class _Stretch(NamedTuple):
    """Rows of a block."""

    opened: _Opened
    begin: int
    rows: int

    def parts(self) -> Iterator[Part]:
        """See `_Opened.parts`."""
        return self.opened.parts(self.begin, self.rows)

    def cut(self, rows: int) -> tuple["_Stretch", "_Stretch"]:
        """The first of its rows, and the others."""
        return self._replace(rows=rows), self._replace(begin=self.begin + rows, rows=self.rows - rows)


class _Kept:
    """Rows of which some may have gone."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts, self.rows = parts, sum(part.rows for part in parts)

    def parts(self) -> Iterator[Part]:
        """As `_Stretch.parts`."""
        return iter(self._parts)

    def cut(self, rows: int) -> tuple["_Kept", "_Kept"]:
        """As `_Stretch.cut`."""
        first, others = list[Part](), list[Part]()
        for part in self._parts:
            before, behind = part.cut(rows)  # of which one is empty, as a rule
            first.append(before)
            others.append(behind)
            rows -= before.rows
        return _Kept(first), _Kept(others)


class Slice(Lines):
    """Events of some rows, made when they are asked for.

    `lines` ends early when it is `hurried`. When it has failed and comes again, it may end elsewhere.
    """

    def __init__(
        self,
        layout: Layout,
        stretches: Sequence[_Stretch | _Kept],
        size: int,
        about: tuple[str, Stamp, int],
        hurried: Callable[[], bool],
    ) -> None:
        self._layout, self._about, self._hurried = layout, about, hurried
        self._stretches = stretches
        self._all = self._rows = sum(it.rows for it in stretches)
        self._size = size
        self._events: list[Event] | None = None

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[Event]:
        if self._events is None:
            self._rows = self._all
            self._events = [event for events, _ in self._made(self._layout.events) for event in events]
        return iter(self._events)

    @overload
    def __getitem__(self, index: int) -> Event: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Event]: ...
    def __getitem__(self, index: int | slice) -> Event | Sequence[Event]:
        return list(self)[index]

    def lines(self) -> Iterator[bytes]:
        """See `Lines`."""
        self._rows = 0
        for lines, count in self._made(self._layout.lines):
            self._rows += count
            yield lines
            if self._hurried():
                return

    def rest(self) -> tuple[list[_Stretch | _Kept], int]:
        """The rows that it has ended before, and their size."""
        left, rest = self._rows, list[_Stretch | _Kept]()
        for stretch in self._stretches:
            if left < stretch.rows:
                rest.append(stretch.cut(left)[1] if left else stretch)
            left = max(0, left - stretch.rows)
        return rest, self._size * (self._all - self._rows) // max(1, self._all)

    def _made(self, make: Callable[[Part, str, Stamp, int], T]) -> Iterator[tuple[T, int]]:
        identity, stamp, ordinal = self._about
        for stretch in self._stretches:
            for part in stretch.parts():
                yield make(part, identity, stamp, ordinal), part.rows
                ordinal += part.rows


class Reads:
    """The blocks of one chunk. `stamp` is of its high watermark's transaction.

    The publish loop's alone once it is in the buffer: ``left`` counts the rows that have left.
    """

    def __init__(self, window: "Window", stamp: Stamp, ticket: Ticket, versions: Sequence[Version] = ()) -> None:
        self.table, self.ticket, self.versions = window.layout.table.relation.oid, ticket, versions
        self.left, self.behind = 0, 0  # behind: how many batches of the stream go before it
        self._rest: list[_Stretch | _Kept] = []  # of a slice that ended early
        self._rest_size = 0
        self._layout, self._identity, self._stamp = window.layout, window.identity, stamp
        self._blocks, self._touched = list(reversed(window.offered)), window.touched
        self._opened: _Opened | None = None

    @property
    def size(self) -> int:
        """Bytes of what has not left yet."""
        opened = self._opened.size if self._opened else 0
        return sum([block.size for block in self._blocks]) + opened + self._rest_size

    @property
    def whole(self) -> bool:
        """Whether no event of the table may go first: without a key none says of which row it is."""
        return not self._layout.keyed

    def overtaken(self, events: Iterable[Event]) -> None:
        """These go first."""
        self._touched.update([event.key for event in events])
        self._touched.update([event.old_key for event in events if event.old_key is not None])

    def slice(self, rows: int, hurried: Callable[[], bool] = lambda: False) -> tuple[Slice, int]:
        """The next, of at most `rows` rows, and its size as `size` has counted it. See `Slice`, and `back`."""
        found: list[_Stretch | _Kept] = []
        count = size = 0
        if self._touched:  # then all of them are made at once
            rows = min(rows, _MOST)
        while count < rows and not self.ended:
            stretch, bytes_ = self._next(rows - count)
            found.append(stretch)
            count += stretch.rows
            size += bytes_
        if self._touched and count:
            found = [self._untouched(found)]
        made = Slice(self._layout, found, size, (self._identity, self._stamp, self.left), hurried)
        self.left += len(made)
        return made, size

    def back(self, ended: Slice) -> int:
        """Take back what the last slice has ended before: its size."""
        rest, size = ended.rest()
        self.left -= sum(it.rows for it in rest)
        self._rest = rest + self._rest
        self._rest_size += size
        return size

    def _next(self, most: int) -> tuple[_Stretch | _Kept, int]:
        """Neighbouring rows, at most so many, and their share of the bytes."""
        if self._rest:
            stretch = self._rest.pop(0)
            if stretch.rows > most:
                stretch, other = stretch.cut(most)
                self._rest.insert(0, other)
            rows = stretch.rows + sum(it.rows for it in self._rest)
            size = self._rest_size * stretch.rows // max(1, rows)
            self._rest_size -= size
            return stretch, size
        if self._opened is None:
            self._opened = _Opened(self._blocks.pop(), self._layout)
        stretch, size = self._opened.part(most)
        if self._opened.given == self._opened.rows:
            self._opened = None
        return stretch, size

    def _untouched(self, stretches: Sequence[_Stretch | _Kept]) -> _Kept:
        kept = list[Part]()
        for part in [part for stretch in stretches for part in stretch.parts()]:
            names = self._layout.names(part)
            none = self._touched.isdisjoint(names)
            kept.append(part if none else part.kept([name not in self._touched for name in names]))
        return _Kept(kept)

    @property
    def ended(self) -> bool:
        """Whether all has been given away."""
        return not (self._blocks or self._opened or self._rest)


class Share:
    """How many rows leave at once: few while the stream flows, whose events wait meanwhile; many while it rests."""

    def __init__(self) -> None:
        self.rows = _FEWEST
        self._streamed = float("-inf")

    @property
    def flows(self) -> bool:
        """Whether the stream had events just now. Other threads may ask."""
        return time.monotonic() - self._streamed < _RESTS

    def rest(self, seconds: float) -> None:
        """Of a thread that has read from the server for so long: leave the cores to the stream, while it flows."""
        if self.flows:
            time.sleep(min(_REST, _LEFT * seconds))

    def took(self, events: int, seconds: float, *, read: bool) -> None:
        """`events` became durable in `seconds`."""
        now = time.monotonic()
        if not read:
            self._streamed = now
            return
        wanted = _BRIEF if self.flows else _LONG
        # a sink has a cost of its own for each request: no less than half as many, no more than twice as many at once
        rows = int(events * min(2.0, max(0.5, wanted / max(seconds, 1e-6))))
        self.rows = max(_FEWEST, min(rows, _MOST))
