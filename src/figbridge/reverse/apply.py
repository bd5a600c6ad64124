"""Events into the legacy database over one connection: all of them at once, and when that fails, one is to blame.

The first try is the express one (`express`); whatever disappoints it is done step by step (`transaction`), and who is
to blame is found by `search`.

INVARIANT. COMMIT is sent only after every answer of the transaction has been read and is good (`transaction`).

Refuses: prepared statements behind a pooler, and guessing after a lost COMMIT: the claim of the next try knows.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import psycopg

from figbridge import legacy
from figbridge.errors import LegacyUnavailable
from figbridge.event import Received
from figbridge.reverse import conflict, express, order, transaction
from figbridge.reverse.guard import LoopGuard
from figbridge.reverse.mapping import Mapping, Work
from figbridge.reverse.novelty import Novelty, Rows
from figbridge.reverse.outcome import (
    FOREIGN_KEY,
    UPDATE_MISSING,
    Applied,
    Awaited,
    Outcome,
    contended,
    raise_if_bug,
    unavailable,
    words,
)
from figbridge.reverse.parents import missing_parent
from figbridge.reverse.search import BRIEF, Search
from figbridge.reverse.session import Session
from figbridge.reverse.statement import Statement
from figbridge.reverse.transaction import Examiner, Suspects

# What a claim can suffer from because of its values: a character the database's encoding has not (22), a key longer
# than an index entry may be (54). Anything else that happens to a claim would happen to the next one, too.
_CLAIM_POISON: Final = ("22", "54")
_SHOWN: Final = 200  # characters of a statement, in the log

_Result = TypeVar("_Result")

__all__ = ["Applied", "Applier", "Outcome"]


class Applier:
    """Applies events over one connection of its own, opened when needed and again when it broke. For one thread.

    `statement_timeout` and `lock_timeout` are seconds. `guard` marks the transactions, where the claim alone is not the
    mark. `examine` says what stands between the events of a batch and the tables, None where they are simply written;
    `refuse` what the rules for conflicts make of an error.
    `on_step` is told ``executed`` (all statements are done, COMMIT is next) and ``committed``: the places where a crash
    test strikes.
    """

    def __init__(
        self,
        dsn: str,
        *,
        statement_timeout: float,
        lock_timeout: float,
        guard: LoopGuard | None = None,
        examine: Callable[[Sequence[Work]], Examiner | None] = conflict.examiner_of,
        refuse: Callable[[psycopg.Connection, Work, psycopg.Error, str], Examiner | Applied | None] = conflict.refusal,
        on_step: Callable[[str], None] = lambda _step: None,
    ) -> None:
        self._begin = transaction.beginning(_milliseconds(statement_timeout), _milliseconds(lock_timeout))
        brief = min(lock_timeout, BRIEF)
        self._begin_briefly = transaction.beginning(_milliseconds(statement_timeout), _milliseconds(brief))
        self._lock_timeout = lock_timeout
        self._hurried = False
        # the server's own end of a statement comes first
        self._session = Session(dsn, guard, patience=statement_timeout + legacy.PATIENCE)
        self._guard = guard
        self._examine, self._refuse = examine, refuse
        self._on_step = on_step
        self._may_commit: Callable[[], None] = lambda: None
        self._following: Callable[[], express.Parcel | None] = lambda: None
        self._hope = express.Hope()
        self._novelty = Novelty()

    def apply(self, event: Received, mapping: Mapping) -> Applied:
        """Apply one event; as `apply_all`, but raises LegacyUnavailable when somebody else has the row."""
        work = mapping.prepare(event)
        self._hurried = False
        try:
            return self._transaction([work], self._run)[work]
        except Suspects as suspects:
            if suspects.error is not None and contended(suspects.error):
                raise unavailable(suspects.error) from suspects.error
            return self._judged(work, suspects)

    def apply_all(
        self,
        works: Sequence[Work],
        may_commit: Callable[[], None] = lambda: None,
        *,
        hopeful: bool = True,
        parcel: express.Parcel | None = None,
        following: Callable[[], express.Parcel | None] = lambda: None,
        before: dict[Work, Applied] | None = None,
        hurried: bool = False,
    ) -> dict[Work, Applied]:
        """Apply `works`, in their order for each entity and each message group; what became of each.

        RETRY: it waits for another event or for a lock; nothing was written. DEAD_LETTER: it can never be applied;
        nothing was written, so the key stays free for a mended event. IGNORED and DUPLICATE: the key is claimed.
        Raises LegacyUnavailable (try all of them again; if it was a lost COMMIT, the keys will tell) and BridgeError
        when the inbox itself cannot be written, which no event is to blame for.

        `may_commit` is called before each COMMIT; what it raises rolls back instead. `hopeful`: none of them has come
        before, as far as anybody knows. `parcel` is of `parcel`, for about these works. `following` is asked at COMMIT
        for the parcel that the next call will have, if it is known by then: the server begins with it at once.
        `before` are the outcomes of earlier events that are not parked yet: what waits there is not overtaken here.
        `hurried`: locks are waited for but briefly.
        """
        self._may_commit, self._following, self._hurried = may_commit, following, hurried
        outcomes = dict(before) if before else {}
        batches = [works] if parcel and parcel.works == works else order.without_repeated_keys(works)
        for batch in batches:
            if not (hopeful and self._express(batch, outcomes, parcel)):
                self._search(batch, outcomes)
        return outcomes

    def parcel(self, works: Sequence[Work], *, alone: bool) -> express.Parcel | None:
        """What `apply_all` is going to send for `works`, made beforehand, where it can. For any thread.

        `alone`: nothing waits in the park, as far as is known.
        """
        if not self._hope.near or not self._simple(works) or len({work.identity for work in works}) < len(works):
            return None
        return express.Parcel(works, alone=alone, rows=self._novelty.next())

    def decide(self, work: Work, examiner: Examiner) -> Applied:
        """Apply one event, with `examiner` between it and the tables. Raises Suspects, and as `apply_all`."""
        return self._transaction([work], functools.partial(self._run, examiner=examiner))[work]

    def connection(self) -> psycopg.Connection:
        """The connection, in autocommit mode and idle, for questions to the catalogue and the park."""
        return self._session.idle()

    def close(self) -> None:
        """Close the connection. May be called twice."""
        self._session.close()

    def _simple(self, works: Sequence[Work]) -> bool:
        """Whether nothing stands between `works` and the tables."""
        return not (self._guard and self._guard.lists) and self._examine(works) is None

    def _express(self, works: Sequence[Work], outcomes: dict[Work, Applied], parcel: express.Parcel | None) -> bool:
        """Whether all of them could be applied at once; if not, nothing was done."""
        made = parcel is not None and parcel.works == works
        if (
            not (made or self._simple(works))
            or not self._hope.there()
            or len(works := order.not_behind(works, outcomes)) == 0
        ):
            return False
        try:
            applied = self._hoped(works, parcel)
        except Suspects as suspects:
            self._hope.learn(fulfilled=False)
            self._search(works, outcomes, suspects)
            return True
        self._hope.learn(fulfilled=applied is not None)
        outcomes |= applied or {}
        return applied is not None

    def _hoped(self, works: Sequence[Work], parcel: express.Parcel | None) -> dict[Work, Applied] | None:
        """As `express.Lane.run`. A row that was there after all disappoints `novelty` alone: it is tried once more."""
        made = parcel if parcel and parcel.works == works else express.Parcel(works)
        run = functools.partial(self._run_express, parcel=made)
        applied = self._transaction(works, run, self._session.opened)
        if applied is None and made.rows is Rows.NEW and not made.claimed:
            return None  # a key was known, which says nothing of the rows
        self._novelty.learn(made.rows, new=applied is not None and made.new)
        if applied is None and made.rows is Rows.NEW:
            return self._hoped(works, None)
        return applied

    def _search(self, works: Sequence[Work], outcomes: dict[Work, Applied], suspects: Suspects | None = None) -> None:
        """Apply `works` step by step, whatever is the matter with some; `suspects` is how a first try ended."""

        def transact(some: Sequence[Work], briefly: bool) -> dict[Work, Applied]:
            self._hurried |= briefly
            return self._transaction(some, self._run)

        Search(works, outcomes, transact, self._judged, allowance=self._lock_timeout).run(suspects)

    def _run(
        self,
        connection: psycopg.Connection,
        works: Sequence[Work],
        begin: Sequence[bytes],
        *,
        examiner: Examiner | None = None,
    ) -> dict[Work, Applied]:
        naming = self._guard.naming(works) if self._guard else None
        examiner = examiner or self._examine(works)
        return transaction.run(connection, works, begin, self._step, naming=naming, examiner=examiner)

    def _run_express(
        self,
        connection: psycopg.Connection,
        _works: Sequence[Work],
        begin: Sequence[bytes],
        *,
        parcel: express.Parcel,
    ) -> dict[Work, Applied] | None:
        try:
            return self._session.lane(connection).run(parcel, begin, self._step, self._following)
        except psycopg.OperationalError:
            # transaction_timeout cuts a pipeline without a word; step by step, the server says what it was
            self._hope.learn(fulfilled=False)
            raise

    def _step(self, step: str) -> None:
        if step == "executed":
            self._may_commit()
        self._on_step(step)

    def _transaction(
        self,
        works: Sequence[Work],
        run: Callable[..., _Result],
        connected: Callable[[], psycopg.Connection] | None = None,
    ) -> _Result:
        connection = (connected or self.connection)()
        try:
            begin = self._begin_briefly if self._hurried else self._begin
            if self._guard:
                begin = [*begin, *self._guard.beginning(connection, works)]
            return run(connection, works, begin)
        except Suspects as suspects:
            if suspects.error is not None:
                self._raise_if_not_the_events(suspects, suspects.error)
            raise
        except psycopg.Error as error:
            raise_if_bug(error)
            raise unavailable(error) from error
        finally:
            self._session.leave_clean(connection)

    def _raise_if_not_the_events(self, suspects: Suspects, error: psycopg.Error) -> None:
        if contended(error, claiming=suspects.claiming):
            return
        if self._session.prepares and express.session_swapped(error):
            self._session.prepares = False
            self._session.close()
            raise LegacyUnavailable(
                "a prepared statement is gone: a pooler gives our session to others",
                hint="nothing is lost; the bridge goes on without prepared statements",
            ) from error
        refused = unavailable(error)
        if refused.retryable and (error.sqlstate is not None or isinstance(error, psycopg.OperationalError)):
            if suspects.query is not None and error.sqlstate is not None:  # it may be a trigger's word
                refused.hint += f"; it was the answer to: {' '.join(suspects.query.split())[:_SHOWN]}"
            raise refused from error
        if suspects.claiming and not (error.sqlstate or "").startswith(_CLAIM_POISON):
            raise_if_bug(error)
            refused.hint = "the inbox must be there and ours to write: see `figbridge check`, and `figbridge init`"
            raise refused from error

    def _judged(self, work: Work, suspects: Suspects) -> Applied:
        """What the error of a transaction with this event alone says of it."""
        error = suspects.error
        if error is None:
            statement = suspects.awaited[work]
            message = f"no row of {'.'.join(statement.shape.table)} has this key"
            awaited = Awaited(statement.shape.table, statement.shape.key, statement.document)
            return Applied(Outcome.RETRY, UPDATE_MISSING, message, awaited)
        state = error.sqlstate or "driver"
        if suspects.claiming and not contended(error):
            return Applied(Outcome.DEAD_LETTER, state, f"the idempotency key cannot be stored: {words(error)}")
        query = suspects.query or ""
        if contended(error):
            return Applied(Outcome.RETRY, state, words(error), statement=query)
        if work.expected and (refused := self._refused(work, error)):
            return refused
        if state in FOREIGN_KEY:
            parent = self._parent(work, error)
            return Applied(Outcome.RETRY, state, words(error), parent, query)
        return Applied(Outcome.DEAD_LETTER, state, words(error), statement=query)

    def _refused(self, work: Work, error: psycopg.Error) -> Applied | None:
        """What the rules for conflicts say of the error, and is done; None when they say nothing."""
        try:
            refused = self._refuse(self.connection(), work, error, words(error))
            if refused is None or isinstance(refused, Applied):
                return refused
            return self.decide(work, refused)
        except Suspects as suspects:  # somebody holds the version; the next try will be judged anew
            state = (suspects.error and suspects.error.sqlstate) or "driver"
            return Applied(Outcome.RETRY, state, str(suspects))
        except psycopg.Error as unknown:
            raise unavailable(unknown) from unknown

    def _parent(self, work: Work, error: psycopg.Error) -> Awaited | None:
        documents = [(it.shape.table, it.document) for it in work.statements if isinstance(it, Statement)]
        try:
            return missing_parent(self.connection(), error, documents)
        except psycopg.Error as unknown:
            raise unavailable(unknown) from unknown


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))  # 0 would mean no timeout
