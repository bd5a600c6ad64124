"""The same transaction in two round trips: everything but COMMIT is sent at once, before any answer is read.

    round trip 1   BEGIN · timeouts · claim · versions · statements     (transaction.py needs four for these)
    round trip 2   COMMIT                                               and behind it round trip 1 of the next batch

It is sent in the hope that all keys are new and all versions newer, as they are nearly always; and where rows have been
new for a while, that they are, too (`novelty`). Where one is not, where a row is missing or a statement fails, the
transaction is rolled back and `transaction` does it again, step by step. A key that is known is an error in the
server's log, so what is delivered again is not tried this way at all.

INVARIANT. COMMIT is sent only after all answers have been read and every one of them is what was hoped for. So whatever
a statement did for an event that should not have been applied is never committed.

ORDER. The batch behind a COMMIT is a transaction of its own, and the server begins with it when it is through with the
one before. Should that one fail after all (a deferred constraint), or should something else be asked of the connection
first, it is rolled back, and sent again in its turn. It is sent ahead only where the connection is nobody else's: a
pooler might give what stands behind a COMMIT to another session.

Why it matters: each answer that is waited for leaves the server idle, and wakes a thread which has to get Python's lock
from the one that parses the next batch. For the same reason what is sent is made beforehand (`Parcel`), by that other
thread: it has the events in its processor's cache, and the server has the batch before to work on meanwhile.
"""

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import psycopg

from figbridge.errors import BridgeError
from figbridge.reverse import claim, group, transaction
from figbridge.reverse.mapping import Work
from figbridge.reverse.novelty import Rows
from figbridge.reverse.outcome import Applied, contended
from figbridge.reverse.statement import finding, inserting
from figbridge.reverse.transaction import Suspects
from figbridge.reverse.wire import Wire

_NOT_PREPARED: Final = ("26000", "42P05")  # invalid_sql_statement_name, duplicate_prepared_statement
# the names of prepared statements: the wire's, and psycopg's; how they are quoted depends on the server's language
_OURS: Final = re.compile(r"\b(figbridge|_pg3)_\d+\b")
_MOST = 64  # batches without hope after those that disappointed


def session_swapped(error: psycopg.Error) -> bool:
    """Whether a statement that we prepared is not there, or is there already.

    Then somebody between us and the server hands sessions around, and did not show it (`legacy.direct`). A trigger and
    the user's SQL may prepare and execute statements, too, and fail with the same states.
    """
    return error.sqlstate in _NOT_PREPARED and _OURS.search(error.diag.message_primary or "") is not None


class Hope:
    """Whether the next batch is worth the try: after n disappointments in a row, 2ⁿ batches are done step by step."""

    def __init__(self) -> None:
        self._pause = 1
        self._left = 0

    def there(self) -> bool:
        """To be asked once for each batch."""
        if self._left:
            self._left -= 1
            return False
        return True

    @property
    def near(self) -> bool:
        """Whether the batch after the next one will be worth it, as far as is known."""
        return self._left <= 1

    def learn(self, fulfilled: bool) -> None:
        """What became of a batch that was tried."""
        if fulfilled:
            self._pause = 1
        else:
            self._left = self._pause
            self._pause = min(2 * self._pause, _MOST)


class Parcel:
    """What is sent for `works`, whose keys all differ: statements and parameters. Needs no connection.

    `alone` as for `claim.claims`. `rows` is what is known of them, and UNKNOWN where it makes no difference.
    """

    def __init__(self, works: Sequence[Work], *, alone: bool = False, rows: Rows = Rows.UNKNOWN) -> None:
        self.works = list(works)
        self.claims = claim.claims(works, alone=alone)
        self.segments = [_Segment(segment) for segment in group.segments(works)]
        # whether all of it is ours, and none the user's own SQL
        self.plain = all(shape is not None for it in self.segments for _, _, shape, _ in it.todo)
        # an entity's second event finds what the first one wrote
        makes = self.plain and all(shape and shape.makes_row for it in self.segments for _, _, shape, _ in it.todo)
        self.claimed = False  # whether all of its keys were new; known when it was tried
        self.new = False  # whether none of the rows was there; known when it was applied
        self.rows = rows if makes and [it.versioned for it in self.segments] == [len(works)] else Rows.UNKNOWN


class _Segment:
    """Works whose entities all differ: their versions, then their statements."""

    def __init__(self, works: list[Work]) -> None:
        self.works = works
        versioned = [work for work in works if work.version is not None]
        self.versioned = len(versioned)
        self.versions = claim.versions(versioned) if versioned else []
        self.todo = group.statements(works)


class Lane:
    """The express transactions of one connection, one after the other. For one thread."""

    def __init__(self, connection: psycopg.Connection) -> None:
        self.connection = connection
        self._wire = Wire(connection)
        self._ahead: _Sent | None = None

    @property
    def ahead(self) -> bool:
        """Whether a transaction is open whose parcel is still to be given to `run`."""
        return self._ahead is not None

    def run(
        self,
        parcel: Parcel,
        begin: Sequence[bytes],
        on_step: Callable[[str], None],
        following: Callable[[], Parcel | None] = lambda: None,
    ) -> dict[Work, Applied] | None:
        """As `transaction.run`; None when it did not go as hoped, and the transaction is to be rolled back.

        `following` is asked, when this one is about to be committed, for the parcel that `run` is given next.
        Raises Suspects, LegacyUnavailable, psycopg.Error.
        """
        if not parcel.plain:
            self.clear()
            return _run_by_driver(self.connection, parcel, begin, on_step)
        sent: _Sent | None = None
        done, wire = None, self._wire
        try:
            sent = self._taken(parcel, begin)
            wire.receive()
            outcomes = sent.outcomes()
            if outcomes is None:
                return None
            parcel.new = sent.new
            on_step("executed")
            done = wire.send(b"COMMIT")
            wire.sync()
            if wire.prepares and (behind := following()) and behind.plain:
                self._ahead = self._sent(behind, begin)
            wire.receive()
            transaction.require_commit(done)
        except psycopg.Error as error:
            if done is not None:
                self.clear()
                raise Suspects(parcel.works, error) from error  # deferred constraints and triggers speak here
            if self.connection.closed:
                raise
            if sent is not None:
                parcel.claimed = sent.claimed
                sent.judge(error)
            return None
        except BridgeError:
            self.clear()
            raise
        finally:
            if self._ahead is None:
                wire.leave()
        on_step("committed")
        return outcomes

    def clear(self) -> None:
        """Take back what was sent ahead, so that the connection is idle. What it did was never committed."""
        if self._ahead is None:
            return
        self._ahead = None
        self._wire.leave()
        if not self.connection.closed:
            with contextlib.suppress(psycopg.Error):  # the next statement will say so
                self.connection.execute("ROLLBACK")

    def _taken(self, parcel: Parcel, begin: Sequence[bytes]) -> "_Sent":
        """What was sent of `parcel`, now or before."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.parcel is parcel:
            return ahead
        self._ahead = ahead
        self.clear()
        self._wire.enter()
        return self._sent(parcel, begin)

    def _sent(self, parcel: Parcel, begin: Sequence[bytes]) -> "_Sent":
        sent = _Sent(parcel, self._wire.send, self._wire.flush)
        sent.all(begin)
        self._wire.sync()
        self._wire.flush()
        return sent


def _run_by_driver(
    connection: psycopg.Connection, parcel: Parcel, begin: Sequence[bytes], on_step: Callable[[str], None]
) -> dict[Work, Applied] | None:
    """As `Lane.run`, with the user's own SQL, whose parameters are psycopg's. Nothing is prepared: see the wire."""

    def send(query: str | bytes, parameters: Any = None, *, prepare: bool = False) -> Any:  # noqa: ARG001
        # RawCursor: our SQL has $1 and no %s, so a % in a column's name is a % and not a placeholder
        ours = not isinstance(parameters, Mapping)
        cursor: psycopg.Cursor[Any] = psycopg.RawCursor(connection) if ours else psycopg.Cursor(connection)
        cursor.execute(query, parameters, prepare=False)
        return cursor

    sent = _Sent(parcel, send)
    done: psycopg.Cursor[Any] | None = None
    try:
        with connection.pipeline() as pipeline:
            sent.all(begin)
            # Waits for all answers. Without it the driver would end the pipeline by a Sync and a Flush; and after a
            # Flush the server does not count the time for which a transaction is idle, so that rows could be held by a
            # bridge that was stopped.
            pipeline.sync()
            outcomes = sent.outcomes()
            if outcomes is None:
                return None
            on_step("executed")
            done = connection.execute("COMMIT")
    except psycopg.Error as error:
        if done is not None:
            raise Suspects(parcel.works, error) from error  # deferred constraints and triggers speak here
        if connection.closed:
            raise
        sent.judge(error)
        return None
    transaction.require_commit(done)
    on_step("committed")
    return outcomes


class _Sent:
    """What was sent of a parcel, by `send`, and its answers. `begun` is called when the claim is on its way."""

    def __init__(
        self, parcel: Parcel, send: Callable[..., transaction.Answer], begun: Callable[[], None] = lambda: None
    ) -> None:
        self.parcel = parcel
        self._send, self._begun = send, begun
        self._counted: list[tuple[transaction.Answer, int]] = []  # each is to have an answer of so many rows
        self._segments: list[tuple[list[Work], list[transaction.Sent]]] = []
        self._there: list[transaction.Answer] = []

    def all(self, begin: Sequence[bytes]) -> None:
        """Send everything."""
        for statement in begin:
            self._send(statement, prepare=True)
        self._count(claim.HOPED_CLAIM, self.parcel.claims, len(self.parcel.works))
        self._begun()
        for segment in self.parcel.segments:
            rows = self.parcel.rows
            if rows is Rows.ASKED:
                self._look_for(segment)
            if segment.versioned:
                versions = claim.NEW_VERSIONS if rows is Rows.NEW else claim.HOPED_VERSIONS
                self._count(versions, segment.versions, segment.versioned)
            sent: list[transaction.Sent] = []
            self._segments.append((segment.works, sent))
            for hoped, parameters, shape, members in segment.todo:
                query = inserting(shape) if shape and rows is Rows.NEW else hoped
                answer = self._send(query, parameters, prepare=transaction.keeps_plan(shape))
                sent.append(transaction.Sent(answer, query, shape, members))

    def _look_for(self, segment: _Segment) -> None:
        """Which of its entities and rows are there. Not prepared: see `transaction.keeps_plan`."""
        self._there.append(self._send(claim.ENTITIES_THERE, segment.versions[:2]))
        for _, parameters, shape, _ in segment.todo:
            if shape and shape.action == "upsert":
                self._there.append(self._send(finding(shape), parameters))

    @property
    def claimed(self) -> bool:
        """Whether all keys are ours."""
        return bool(self._counted) and self._counted[0][0].rowcount == len(self.parcel.works)

    @property
    def new(self) -> bool:
        """Whether none of those that were looked for was there."""
        return not any(answer.rowcount for answer in self._there)

    def _count(self, query: str, parameters: Sequence[str | bytes], rows: int) -> None:
        self._counted.append((self._send(query, parameters, prepare=True), rows))

    def outcomes(self) -> dict[Work, Applied] | None:
        """When all answers are there; None when one is not what was hoped for."""
        if any(answer.rowcount != rows for answer, rows in self._counted):
            return None
        outcomes: dict[Work, Applied] = {}
        try:
            for segment, sent in self._segments:
                outcomes |= transaction.read(segment, sent)
        except Suspects:
            return None
        return outcomes

    def judge(self, error: psycopg.Error) -> None:
        """Raise Suspects when the error of a statement says enough; else it is to be found out step by step."""
        if session_swapped(error):
            raise Suspects(self.parcel.works, error) from error
        if contended(error) and self.claimed:
            # the wait was long enough: no second one for the same lock
            raise Suspects(self._unanswered() or self.parcel.works, error) from error

    def _unanswered(self) -> Sequence[Work]:
        """The works of the first statement without an answer."""
        return next((it.members for _, sent in self._segments for it in sent if it.cursor.statusmessage is None), ())
