"""Whether the rows of the next batch are expected to be new, so that nothing is provided for those that are there.

ON CONFLICT takes a quarter of all the time that the server needs for an event: it looks into the index first, and marks
a row as not yet there, in the table and in the WAL, until the index has it. Where rows come into being it never finds
anything. So now and then entities and rows are looked for before they are written. If none of a batch is there, those
that follow are inserted as new:

    UNKNOWN ──1 batch──▶ ASKED ──none was there──▶ NEW ──▶ NEW ──▶ …
       ▲                   │ some were              │ 23505: done again at once, as UNKNOWN
       └───────────────────┴── 2, 4, 8 … batches ───┘

INVARIANT. What is expected changes the way and never the end: a batch with a row that was there after all fails as a
whole, and is done again with ON CONFLICT. It is an error in the server's log, too, and a batch for nothing, so it must
be rare: each one doubles the pause before anybody asks again, and only a batch that went well takes one off it.
"""

from enum import Enum, auto
from typing import Final

_MOST: Final = 1024  # batches


class Rows(Enum):
    """What is known of the rows of a batch."""

    UNKNOWN = auto()
    ASKED = auto()  # nothing; but they are looked for first
    NEW = auto()


class Novelty:
    """See the module. `next` may be asked by any thread."""

    def __init__(self) -> None:
        self._new = False
        self._pause = 1
        self._left = 0

    def next(self) -> Rows:
        """For the next batch that is made."""
        if self._new:
            return Rows.NEW
        if self._left:
            self._left -= 1
            return Rows.UNKNOWN
        return Rows.ASKED

    def learn(self, rows: Rows, *, new: bool) -> None:
        """What became of a batch that was ASKED, or NEW; `new`: none of its rows was there."""
        if rows is Rows.UNKNOWN:
            return
        self._new = new
        if not new:
            self._left = self._pause
            self._pause = min(2 * self._pause, _MOST)
        elif rows is Rows.NEW:
            self._pause = max(1, self._pause - 1)
