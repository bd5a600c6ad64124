"""How far the snapshot of one table is: all rows in their order, then those that `moved` from before to behind it."""

from collections.abc import Sequence
from dataclasses import dataclass

from figbridge.forward.snapshot.chunk import Chunk
from figbridge.forward.snapshot.layout import Layout, NoLiteral
from figbridge.forward.snapshot.moved import Entry, Turn
from figbridge.forward.snapshot.plan import Cursor, Plan
from figbridge.forward.snapshot.window import Outcome, Window


@dataclass(slots=True)
class Place:
    """`noted` is the cursor that may be written, `reached` where the next chunk begins.

    ``again`` has the keys of rows that are read next, without the cursor moving. ``turn`` is the last of the rows whose
    key changed, once all others were read, and ``told`` has those of its rows that are on their way. ``left`` is of the
    rows that are on their way; of ``window`` the low watermark is written.
    """

    plan: Plan
    layout: Layout
    noted: Cursor | None
    reached: Cursor | None
    ended: bool = False
    again: Sequence[Sequence[str]] = ()
    turn: Turn | None = None
    told: Sequence[Entry] = ()
    left: Outcome | None = None
    window: Window | None = None

    @property
    def walked(self) -> bool:
        """Whether all rows were read that did not move."""
        return self.ended and not self.again

    def take(self, turn: Turn | None) -> None:
        """Read these next, instead of those that are durable now; None: there are no more."""
        self.turn, self.told, self.again = turn, (), turn.keys if turn else ()

    def leave(self, read: Chunk, outcome: Outcome) -> None:
        """Rows are on their way; what is read next."""
        self.left = outcome
        if self.turn:
            self.told, self.again = self.turn.told(self.layout, None if read.end else read.blocks, outcome.again), ()
            return
        try:
            again = [self.layout.keys(row, self.plan.indexes(self.plan.sought)) for row in outcome.again]
        except NoLiteral:
            if self.plan.key:
                raise
            return
        if again and not self.plan.sought:
            return  # a row is not found again: the chunk is, by ctid, with the same ids
        self.again = again
        self.ended = self.ended or read.end
        self.reached = read.cursor
        if not self.again:
            self.noted = self.reached
