"""The search for the events that spoil a batch.

    transact(all) ──commit──▶ done
        │ one of these must be to blame
        ├─▶ transact(all the others)       in one transaction, without them and what comes after them in their order
        └─▶ transact(first half), transact(second half), … down to one event, whose error decides (`outcome`)

So a bad event costs a few transactions and holds nobody up but later events of its own entity (and of its message
group, where the order of that is kept: `Work.group`).

INVARIANT. What a single event does in the end is what it would have done alone, after those that stand before it. Those
that run ahead of others may meet rows that these were to change or to remove: what a constraint says to them then
(class 23) is no verdict. They wait until the rest is known, and are tried again one by one, in their order.

TIMEOUTS. Each transaction that fails by one costs all of it, and others wait meanwhile. So once a lock was waited for
in vain, the search waits for locks but briefly; after a statement that was too slow its events are tried one by one, as
halves would be too slow again. When the allowance is used up, whoever was suspected by then is parked untried, and
tried from there (`slow`).

WHY NOT SAVEPOINTS. They would hold the locks of the good events while the bad ones are searched for, and gain nothing.
Measured with one bad event of 500 (upserts with a version), PostgreSQL 18, fsync on, a network of 1 ms, best of nine:

    halves, a transaction each        98 round trips   170 ms    no lock is held for longer than some 16 ms
    halves, a savepoint each         115               180       every lock for all of it
    a savepoint for each event     2,519             4,600       every lock for all of it

What would help is to send each half at once, as `express` does: 58 round trips (36 with savepoints). A batch with a bad
event is rare, so that is left alone.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Final

from figbridge.reverse import order
from figbridge.reverse.mapping import Work
from figbridge.reverse.outcome import (
    EARLIER_WAITS,
    LOCK_TIMEOUT,
    ROW_WAITS,
    STATEMENT_TIMEOUT,
    TIMEOUTS,
    UPDATE_MISSING,
    Applied,
    Outcome,
    words,
)
from figbridge.reverse.transaction import Suspects

BRIEF: Final = 0.02  # seconds for a lock, once one was waited for in vain
_CONSTRAINT: Final = "23"  # integrity_constraint_violation
_TAKEN: Final = ("23505", "23P01")  # unique_violation, exclusion_violation: another row of the table is in the way
_AHEAD: Final = Applied(Outcome.RETRY, EARLIER_WAITS)  # until those before it are known


class Search:
    """The search in one batch, `works`. What is found goes into `outcomes`, which may have those of earlier events.

    `transact` applies works in one transaction, as `transaction.run`, and is told whether to wait but briefly for
    locks; `judge` says what the error of a transaction with one event alone means for it. `allowance` is how many
    seconds may be lost by timeouts, after the first one.
    """

    def __init__(
        self,
        works: Sequence[Work],
        outcomes: dict[Work, Applied],
        transact: Callable[[Sequence[Work], bool], dict[Work, Applied]],
        judge: Callable[[Work, Suspects], Applied],
        *,
        allowance: float,
    ) -> None:
        self._works = works
        self._places = {work: place for place, work in enumerate(works)}
        self._outcomes = outcomes
        self._transact, self._judge = transact, judge
        self._ahead: list[Work] = []  # constraints spoke against these before their turn
        self._allowance = allowance
        self._timeout: Applied | None = None  # what becomes of those that are not tried any more
        self._lost = -math.inf  # seconds, from the second timeout on
        self._slow: set[Work] = set()  # suspected of timeouts

    def run(self, suspects: Suspects | None = None) -> None:
        """Apply them all; `suspects` is how a first try ended. Raises what `transact` and `judge` do."""
        if suspects:
            self._learn(suspects, 0.0)
        self._solve(self._pieces(self._works, suspects) if suspects else [self._works])
        if not self._ahead:
            return
        self._ahead = []
        again = [work for work in self._works if _for_others(self._outcomes[work])]
        for work in again:
            del self._outcomes[work]
        for work in again:
            self._solve([[work]])

    def _solve(self, pieces: Sequence[Sequence[Work]]) -> None:
        """Apply each piece, in their order."""
        todo = [*reversed(pieces)]
        while todo:
            works = order.not_behind(self._not_too_slow(todo.pop()), self._outcomes)
            if not works:
                continue
            begun = time.monotonic()
            try:
                known = self._transact(works, self._locked)
            except Suspects as suspects:
                self._learn(suspects, time.monotonic() - begun)
                todo += reversed(self._pieces(works, suspects))
                continue
            self._outcomes |= known
            if len(known) < len(works):  # the others are asked about again, now that it is known who waits
                todo.append([work for work in works if work not in known])

    @property
    def _locked(self) -> bool:
        """Whether a lock was waited for in vain."""
        return self._timeout is not None and self._timeout.reason == LOCK_TIMEOUT

    def _learn(self, suspects: Suspects, seconds: float) -> None:
        """Count what a timeout cost, and whom it leaves suspected."""
        error = suspects.error
        if error is None or error.sqlstate not in TIMEOUTS:
            return
        self._lost = 0.0 if self._timeout is None else self._lost + seconds
        if not self._locked:  # that locks are waited for but briefly holds for the rest of the search
            self._timeout = Applied(Outcome.RETRY, error.sqlstate, words(error), statement=suspects.query or "")
        self._slow |= set(suspects.works)

    def _not_too_slow(self, works: Sequence[Work]) -> Sequence[Work]:
        """Those of `works` that may be tried still; of the others it is known what becomes of them."""
        if self._timeout is None or self._lost <= self._allowance:
            return works
        self._outcomes |= dict.fromkeys(self._slow.intersection(works), self._timeout)
        return [work for work in works if work not in self._slow]

    def _pieces(self, works: Sequence[Work], suspects: Suspects) -> Sequence[Sequence[Work]]:
        """What is to be tried next of `works`, which fail together; nothing where it is one, which is judged."""
        if len(works) == 1:
            self._outcomes[works[0]] = self._verdict(works[0], suspects)
            return ()
        suspected, tainted = set(suspects.works), set[object]()
        innocent, others = [], []
        for work in works:
            if work in suspected or work.entity in tainted or work.group in tainted:
                tainted |= {work.entity, work.group} - {None}
                others.append(work)
            else:
                innocent.append(work)
        if suspects.error is not None and suspects.error.sqlstate == STATEMENT_TIMEOUT:
            return innocent, *([work] for work in others)
        # if the one to blame is known, what comes after it is not
        half = 1 if innocent and len(suspected) == 1 else len(others) // 2
        return innocent, others[:half], others[half:]

    def _verdict(self, work: Work, suspects: Suspects) -> Applied:
        error = suspects.error
        if error is None or suspects.claiming or not (error.sqlstate or "").startswith(_CONSTRAINT):
            return self._judge(work, suspects)
        before = self._works[: self._places[work]]
        if any(it not in self._outcomes or (self._ahead and self._waits(it)) for it in before):
            self._ahead.append(work)
            return _AHEAD
        if error.sqlstate in _TAKEN and any(self._may_make_room(it, work) for it in self._outcomes):
            message = f"{words(error)}; an earlier event of this table waits"
            return Applied(Outcome.RETRY, EARLIER_WAITS, message, statement=suspects.query or "")
        return self._judge(work, suspects)

    def _waits(self, work: Work) -> bool:
        return self._outcomes[work].outcome is Outcome.RETRY

    def _may_make_room(self, earlier: Work, work: Work) -> bool:
        """Whether `earlier`, when it has waited, may change or remove the row that is in the way of `work`."""
        if not self._waits(earlier) or self._places.get(earlier, -1) >= self._places[work]:
            return False
        tables, awaited = work.mapping.tables, self._outcomes[earlier].awaited
        # what waits for a row of the same table may wait for this very one: nobody would ever go
        return not set(tables).isdisjoint(earlier.mapping.tables) and (awaited is None or awaited.table not in tables)


def _for_others(applied: Applied) -> bool:
    """Whether it waits for its turn alone."""
    waits = applied.outcome is Outcome.RETRY and applied.awaited is None
    return waits and applied.reason in {EARLIER_WAITS, ROW_WAITS, UPDATE_MISSING}
