"""One transaction for one event or many: claim the idempotency keys, compare the versions, run the statements, commit.

    round trip 1   BEGIN · timeouts
    round trip 2   claim          which keys are ours
    round trip 3   versions       which events are newer than their row (if any has one)
    round trip 4   statements     one for each run of neighbours of one shape; several in a pipeline
    round trip 5   COMMIT

This is the careful way, step by step. `express` sends 1 to 4 at once, and comes here only where that goes wrong.

INVARIANT. The claim is the first to write WAL, which makes it the mark of the loop guard (`figbridge.forward.echo`);
and only what was claimed *and* is newer reaches a statement. All of it commits or none.

ORDER. Statements run in the order of the events. Neighbours share one statement only if they have the same shape, are
about different entities, and of different message groups where the order of these is kept: triggers see the rows of one
statement in any order. An event of an entity that is in hand begins another round of 3 and 4. A version is compared and
written by the same statement, which locks the entity until the end; claims and versions are taken in the order of their
keys, and rows are written in the order of their entities, so two replicas with overlapping batches wait for each other
and not in a circle, unless one has an entity twice in a batch, or a group. There and with the legacy application a
deadlock is possible, as between any two clients; then the batch is cut in two (`apply`).

Timeouts are set inside the transaction (set_config's third argument, SET LOCAL). Behind PgBouncer's transaction mode a
session's SET would stay with a server connection that the next transaction may not get, and another client would; and
startup options are refused by it (https://www.pgbouncer.org/features.html).
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

import psycopg
from psycopg.pq import TransactionStatus

from figbridge.errors import LegacyUnavailable
from figbridge.reverse import claim, suppressed
from figbridge.reverse.group import Naming, Todo, named, segments, statements
from figbridge.reverse.mapping import Work
from figbridge.reverse.outcome import (
    DELETE_MISSING,
    DONE,
    STALE_VERSION,
    Applied,
    Outcome,
    raise_if_bug,
)
from figbridge.reverse.statement import Shape, Statement

# READ COMMITTED whatever the role's default is: a stricter level cannot see the key of a transaction that committed
# since the snapshot, and would answer a plain duplicate with 40001.
# synchronous_commit off would let a crash of the server take back what the queue has been told is done.
_BEGIN: Final = b"BEGIN ISOLATION LEVEL READ COMMITTED"
# Should we be stopped or cut off between two statements, the server gives the legacy application its rows back as soon.
_SETTINGS: Final = """
    SELECT set_config('statement_timeout', '{0}', true), set_config('lock_timeout', '{1}', true),
           set_config('idle_in_transaction_session_timeout', '{0}', true),
           set_config('synchronous_commit', CASE current_setting('synchronous_commit')
                      WHEN 'off' THEN 'on' ELSE current_setting('synchronous_commit') END, true)
"""
STALE: Final = Applied(Outcome.IGNORED, STALE_VERSION, "an event with this version or a newer one was applied")


class Suspects(Exception):
    """The transaction cannot commit because of one of these events. Nothing was written.

    `error` is the server's, None when the events' rows are missing; `query` is the statement it was the answer to, None
    for the claim and for COMMIT; `claiming` says that no statement ran yet; `awaited` has the update of each missing
    row.
    """

    def __init__(
        self,
        works: Sequence[Work],
        error: psycopg.Error | None = None,
        query: str | None = None,
        *,
        claiming: bool = False,
        awaited: Mapping[Work, Statement] | None = None,
    ) -> None:
        super().__init__(str(error))
        self.works, self.error, self.query, self.claiming = works, error, query, claiming
        self.awaited = awaited or {}


class Examiner(Protocol):
    """Stands between the events and the tables in one transaction, and is made anew for each; see `conflict`."""

    def look(self, connection: psycopg.Connection, works: Sequence[Work]) -> None:
        """Before the versions of `works` are compared and written. Raises psycopg.Error."""

    def stale(self, works: Iterable[Work]) -> dict[Work, Applied]:
        """The outcomes of events that are older than what was applied."""

    def execute(
        self, connection: psycopg.Connection, works: Sequence[Work], naming: Naming | None
    ) -> dict[Work, Applied]:
        """As `execute`, which does the writing."""

    def finish(self, connection: psycopg.Connection) -> bool:
        """When all statements are done; whether to commit. Raises Suspects, psycopg.Error."""


def run(
    connection: psycopg.Connection,
    works: Sequence[Work],
    begin: Sequence[bytes],
    on_step: Callable[[str], None],
    *,
    naming: Naming | None = None,
    examiner: Examiner | None = None,
) -> dict[Work, Applied]:
    """Apply `works`, whose keys all differ, in one transaction; the outcome of each.

    `begin` is from `beginning`, `naming` from `guard.LoopGuard.naming`; `examiner` is for works that are not simply
    written. Where some of `works` wait for what is parked, and others could be behind them in a message group, nothing
    is done, and the outcomes are of those that wait alone. Raises Suspects, LegacyUnavailable, or psycopg.Error; after
    an error the transaction is still open.
    """
    try:
        return _run(connection, works, begin, on_step, naming=naming, examiner=examiner)
    except Suspects as suspects:
        if examiner or len(works) > 1 or not _there(connection, works, suspects):
            raise
    connection.execute("ROLLBACK")
    return _run(connection, works, [suppressed.BEGIN, *begin[1:]], on_step, naming=naming, stable=True)


def _run(
    connection: psycopg.Connection,
    works: Sequence[Work],
    begin: Sequence[bytes],
    on_step: Callable[[str], None],
    *,
    naming: Naming | None = None,
    examiner: Examiner | None = None,
    stable: bool = False,
) -> dict[Work, Applied]:
    """As `run`; `stable`: the transaction sees one state of the tables, so it knows which rows are there."""
    fresh, outcomes = _claim(connection, works, begin)
    waiting = {work: it for work, it in outcomes.items() if it.outcome is Outcome.RETRY} if outcomes else {}
    if waiting and any(work.group is not None for work in fresh):
        connection.execute("ROLLBACK")
        return waiting
    for segment in segments(fresh):
        if examiner:
            examiner.look(connection, segment)
        newer = _newer(connection, segment)
        if len(newer) < len(segment):
            stale = set(segment).difference(newer)
            outcomes |= examiner.stale(stale) if examiner else dict.fromkeys(stale, STALE)
        if newer and examiner:
            outcomes |= examiner.execute(connection, newer, naming)
        elif newer:
            there = suppressed.there(connection, newer[0].statements) if stable else frozenset()
            outcomes |= execute(connection, newer, naming, there)
    if (examiner and not examiner.finish(connection)) or not any(work in outcomes for work in fresh):
        connection.execute("ROLLBACK")
        return outcomes
    _commit(connection, fresh, on_step)
    return outcomes


def _there(connection: psycopg.Connection, works: Sequence[Work], suspects: Suspects) -> bool:
    """Whether a row that `suspects` lack is there all the same. Raises Suspects."""
    try:
        return bool(suspects.awaited and suppressed.there(connection, suspects.awaited.values()))
    except psycopg.Error as error:
        raise Suspects(works, error) from error


def _commit(connection: psycopg.Connection, works: Sequence[Work], on_step: Callable[[str], None]) -> None:
    """Commit what `works` did. Raises Suspects, LegacyUnavailable."""
    on_step("executed")
    try:
        done = connection.execute("COMMIT")
    except psycopg.Error as error:
        raise Suspects(works, error) from error  # deferred constraints and triggers speak here
    require_commit(done)
    on_step("committed")


def require_commit(done: "Answer") -> None:
    """Raise LegacyUnavailable where the answer to COMMIT is ROLLBACK: without an error, after a failed transaction."""
    if done.statusmessage != "COMMIT":
        raise LegacyUnavailable("the server rolled back instead", hint="nothing is lost; the bridge tries again")


def beginning(statement_timeout: int, lock_timeout: int) -> Sequence[bytes]:
    """The statements a transaction begins with; both in milliseconds."""
    return _BEGIN, _SETTINGS.format(int(statement_timeout), int(lock_timeout)).encode()


def _claim(
    connection: psycopg.Connection, works: Sequence[Work], begin: Sequence[bytes]
) -> tuple[list[Work], dict[Work, Applied]]:
    """The works whose keys are ours, in their order; and what became of the others."""
    cursor = psycopg.RawCursor(connection)
    try:
        connection.execute(b";".join(begin))  # one message of the simple protocol, so one round trip
        cursor.execute(claim.CLAIM, claim.claims(works))
    except psycopg.Error as error:
        raise Suspects(works, error, claiming=True) from error
    if cursor.rowcount == len(works):
        return list(works), {}
    ours = set(cursor.fetchall())
    others = [work for work in works if work.identity not in ours]
    return [work for work in works if work.identity in ours], claim.known(connection, others)


def _newer(connection: psycopg.Connection, works: Sequence[Work]) -> Sequence[Work]:
    """The works without a version, and those whose version was the higher one; it is written now."""
    versioned = [work for work in works if work.version is not None]
    if not versioned:
        return works
    cursor = psycopg.RawCursor(connection)
    try:
        cursor.execute(claim.VERSIONS, claim.versions(versioned))
    except psycopg.Error as error:
        raise Suspects(versioned, error, claim.VERSIONS) from error
    if cursor.rowcount == len(versioned):
        return works
    raised = set(cursor.fetchall())
    return [work for work in works if work.version is None or work.entity in raised]


class Answer(Protocol):
    """What is asked for of a statement's answer: psycopg's cursor has it, and `figbridge.reverse.wire`'s answer."""

    @property
    def rowcount(self) -> int:
        """-1 without an answer."""

    @property
    def statusmessage(self) -> str | None:
        """None without an answer."""

    def fetchall(self) -> list[Any]:
        """The rows."""


class Sent(NamedTuple):
    """A statement on its way: `members` are its works in the order of the documents."""

    cursor: Answer
    query: str | bytes
    shape: Shape | None
    members: list[Work]


def execute(
    connection: psycopg.Connection,
    works: Sequence[Work],
    naming: Naming | None,
    there: frozenset[Statement] = frozenset(),
) -> dict[Work, Applied]:
    """Run the statements of `works`; raises Suspects when one fails or finds no row to update.

    `there` are updates whose row is there for as long as the transaction lasts (`suppressed`).
    """
    sent: list[Sent] = []
    todo = statements(works) if naming is None else [*named(works, naming)]
    try:
        with connection.pipeline() if len(todo) > 1 else contextlib.nullcontext():
            send(connection, todo, sent, prepare=naming is not None)
    except psycopg.Error as error:
        if sent[-1].shape is not None:  # with the user's own SQL the driver may have a right to complain
            raise_if_bug(error)
        failed = next((it for it in sent if it.cursor.statusmessage is None), None)  # the first without an answer
        if failed is None:
            raise Suspects(works, error) from error
        query = failed.query if isinstance(failed.query, str) else failed.query.decode()
        raise Suspects(failed.members, error, query) from error
    if connection.info.transaction_status != TransactionStatus.INTRANS:
        # what was read as another statement (`own_sql`) was one that ends it: nothing more may be done without a claim
        raise Suspects(
            works, psycopg.errors.InvalidTransactionTermination("the SQL has ended the bridge's transaction")
        )
    return read(works, sent, there)


def send(connection: psycopg.Connection, todo: Iterable[Todo], sent: list[Sent], *, prepare: bool) -> None:
    """Execute `todo`; what was sent is appended to `sent`, the one that failed too.

    `prepare` is for a connection that no wire uses, as where each work stands alone behind its name (`wire`).
    """
    for query, parameters, shape, members in todo:
        # RawCursor: our SQL has $1 and no %s, so a % in a column's name is a % and not a placeholder
        cursor = psycopg.Cursor(connection) if shape is None else psycopg.RawCursor(connection)
        sent.append(Sent(cursor, query, shape, members))
        cursor.execute(query, parameters, prepare=prepare and keeps_plan(shape))


def keeps_plan(shape: Shape | None) -> bool:
    """Whether a statement may be prepared: a plan that joins would be kept as it was for the size of the table then."""
    return shape is not None and not shape.finds


def read(works: Sequence[Work], sent: Sequence[Sent], there: frozenset[Statement] = frozenset()) -> dict[Work, Applied]:
    """Which rows were found; raises Suspects with those that were to be updated and are not there.

    `there` as for `execute`.
    """
    outcomes = dict.fromkeys(works, DONE)
    missing: dict[Work, Statement] = {}
    suspected: list[Work] = []
    for cursor, _, shape, members in sent:
        if shape is None or not shape.finds:
            continue
        found = {number for (number,) in cursor.fetchall()}
        lacking = [work for number, work in enumerate(members, 1) if number not in found]
        if not lacking:
            continue
        if shape.action == "update":
            awaited = {work: _statement_of(work, shape) for work in lacking}
            # of two spellings of one key ("7" and "007") an UPDATE takes either, and order has to decide: all of them
            # are suspects, and none is suppressed
            if len(members) > 1 or not there >= {*awaited.values()}:
                missing |= awaited
                suspected += members
            without = suppressed.of(shape)
        else:
            without = Applied(Outcome.IGNORED, DELETE_MISSING, f"no row of {'.'.join(shape.table)} has this key")
        for work in lacking:
            if len(work.statements) == 1:  # of several, the others did their part
                outcomes[work] = without
    if missing:
        raise Suspects(suspected, awaited=missing)
    return outcomes


def _statement_of(work: Work, shape: Shape) -> Statement:
    return next(it for it in work.statements if isinstance(it, Statement) and it.shape == shape)
