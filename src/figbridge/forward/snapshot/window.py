"""What the snapshot loops and the capture loop share: windows, from the low watermark to the high one.

    begin ─▶ (low met) noting ─▶ (high met) closing ─▶ (its commit) handed over, `outcome` says what became of it
                 └── TRUNCATE, another schema, the connection lost ─▶ void: to be read again ─────────▲

INVARIANT. A row leaves only if no event about it was made, and none was dropped, between the two watermarks. What is
noted may be too much (a window that was voided, a key noted twice), never too little: a window does not outlive the
connection in which its low watermark was met, for what another process may have read meanwhile nobody noted here.

Windows of dead processes and of other bridges pass by in the same stream: their names are unknown here.
"""

import secrets
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import orjson

from figbridge.change import UNCHANGED, Change, Lsn, Operation, Relation
from figbridge.event import Event
from figbridge.forward.snapshot.block import Block, Values
from figbridge.forward.snapshot.layout import Layout
from figbridge.forward.snapshot.reads import Reads

_NOWHERE: Final = Lsn(0)
_MEMORY: Final = (
    16_384  # transactions that are remembered, at least; more can hardly end between a commit record and its effect
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a window. `end`: the acknowledgement of this position says that its rows are durable.

    `reads` has the rows that are on their way, `again` those of the chunk's rows that must be read again. `void` says
    why nothing leaves; empty if it does.
    """

    end: Lsn = _NOWHERE
    reads: Reads | None = None
    again: Sequence[Values] = ()
    void: str = ""


@dataclass(slots=True, eq=False)
class Window:
    """One window of one table. ``offered`` is set by its reader before the high watermark is written.

    ``identity`` begins the ids of its events; ``touched`` has the names of rows of which the stream told.
    """

    name: str
    layout: Layout
    identity: str
    offered: Sequence[Block] = ()
    touched: set[str] = field(default_factory=set)
    low_met: threading.Event = field(default_factory=threading.Event)
    closed: threading.Event = field(default_factory=threading.Event)
    outcome: Outcome = field(default_factory=Outcome)
    _again: set[str] = field(default_factory=set)
    voided: str = ""
    _relation: Relation | None = None

    def content(self, mark: str) -> str:
        """What a watermark says; `mark` is low or high."""
        return orjson.dumps({"window": self.name, "mark": mark}).decode()

    def row(self, change: Change, *, dropped: bool) -> None:
        """The stream tells of a row; `dropped`: it makes no event."""
        operation, relation, _, before, _, after, unsent = change
        if operation is Operation.TRUNCATE:
            self.voided = "the table was truncated"
            return
        if relation is not self._relation:
            if relation != self.layout.table.relation:
                self.voided = "the table's schema changed"
                return
            self._relation = relation
        names = []
        if after is not None:
            if unsent:
                after, _ = self.layout.table.settle(after, before)
                unsent = UNCHANGED in after  # under REPLICA IDENTITY FULL the old row has it
            names.append(self.layout.name(after))
        if before is not None:
            names.append(self.layout.name(before))
        self.touched.update(names)
        if dropped and not self.layout.keyed:
            self.voided = "a row without a key was written by the reverse path"
        if self.layout.keyed and (unsent or dropped):
            self._again.update(names)

    def events(self, events: Iterable[Event]) -> None:
        """The same of plain inserts and updates of a table with a key, by their events."""
        self.touched.update([event.key for event in events])

    def unsaid(self) -> Sequence[Values]:
        """The rows of the chunk of which the stream told, but not all."""
        if not self._again:
            return ()
        return [
            row
            for block in self.offered
            for part in self.layout.parts(block)
            for row, name in zip(part.values(), self.layout.names(part), strict=True)
            if name in self._again
        ]

    def close(self, outcome: Outcome) -> None:
        """Tell the reader."""
        self.outcome, self.offered = outcome, ()
        self.closed.set()

    def void(self, why: str = "") -> None:
        """Tell the reader that nothing has left."""
        self.close(Outcome(void=why or self.voided))


class Windows:
    """All windows of this process.

    `begin`, `met` and `forget` are for the snapshot loops, everything else for the capture loop. What they share are
    single entries of dictionaries, so there is no lock.
    """

    def __init__(self) -> None:
        self.open: dict[int, Window] = {}  # by the table's OID
        self.unkeyed: set[int] = set()  # tables of open windows whose events do not name the row
        self.closing: list[Window] = []
        self.streaming = False
        self._instance = secrets.token_hex(8)
        self._count = 0
        self._known: dict[str, Window] = {}
        self._met: set[int] = set()
        self._met_before: set[int] = set()  # the generation before; what is older is forgotten

    def begin(self, layout: Layout, identity: str) -> Window:
        """A window whose watermarks the capture loop will know; `identity` begins the ids of its events."""
        self._count += 1
        window = Window(f"{self._instance}-{layout.table.relation.oid}-{self._count}", layout, identity)
        self._known[window.name] = window
        return window

    def met(self, xids: Iterable[int]) -> bool:
        """Whether one of these transactions (their low 32 bits) has passed in the stream, so has its commit record."""
        return any(xid in self._met or xid in self._met_before for xid in xids)  # in this order, for the other thread

    def forget(self, window: Window) -> None:
        """Nobody waits for `window` any more."""
        self._known.pop(window.name, None)
        oid = window.layout.table.relation.oid
        if self.open.get(oid) is window:
            self.open.pop(oid, None)
            self.unkeyed.discard(oid)

    def begun(self, xid: int) -> None:
        """A transaction begins in the stream."""
        self._met.add(xid)
        if len(self._met) > _MEMORY:  # one by one would be dear: a dict finds its oldest key behind all the dead ones
            self._met_before = self._met
            self._met = set()

    def mark(self, content: bytes) -> None:
        """A message with our prefix has arrived."""
        try:
            told = orjson.loads(content)
            window, mark = self._known.get(told["window"]), told["mark"]
        except (ValueError, TypeError, LookupError):
            return  # anyone may emit a message with any prefix
        if window is None:
            return
        oid = window.layout.table.relation.oid
        if mark == "low":
            self.open[oid] = window
            if not window.layout.keyed:
                self.unkeyed.add(oid)
            window.low_met.set()
        elif mark == "high" and self.open.get(oid) is window:
            self.forget(window)
            self.closing.append(window)

    def row(self, change: Change, *, dropped: bool) -> None:
        """A row of any table; asked only while a window is open."""
        if (window := self.open.get(change.relation.oid)) is not None:
            window.row(change, dropped=dropped)

    def named(self, oid: int, keys: Sequence[int]) -> None:
        """What the events of a table's rows are named by from here on; asked only while a window is open."""
        window = self.open.get(oid)
        if window is not None and window.layout.table.keys != keys:
            window.voided = "the table's key changed"  # under REPLICA IDENTITY FULL its relation is the same

    def close(self, hand_over: Callable[[Window], Reads], end: Lsn) -> None:
        """The high watermarks' transaction has ended, at `end`: `hand_over` what was offered."""
        for window in self.closing:
            if window.voided:
                window.void()
            else:
                window.close(Outcome(end, hand_over(window), window.unsaid()))
        self.closing.clear()

    def interrupted(self) -> None:
        """The stream begins anew, perhaps behind what another process has read."""
        for window in [*self._known.values(), *self.closing]:
            self.forget(window)
            window.void("the stream was interrupted")
        self.closing.clear()
