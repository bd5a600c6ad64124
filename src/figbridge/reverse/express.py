"""The same transaction in two round trips: everything but COMMIT is sent at once, before any answer is read.

    round trip 1   BEGIN · timeouts · claim · versions · statements     (transaction.py needs four for these)
    round trip 2   COMMIT

It is sent in the hope that all keys are new and all versions newer, as they are nearly always. Where one is not, where
a row is missing or a statement fails, the transaction is rolled back and `transaction` does it again, step by step.
A key that is known is an error in the server's log, so what is delivered again is not tried this way at all.

INVARIANT. COMMIT is sent only after all answers have been read and every one of them is what was hoped for. So whatever
a statement did for an event that should not have been applied is never committed.

Why it matters: each answer that is waited for leaves the server idle, and wakes a thread which has to get Python's lock
from the one that parses the next batch. For the same reason what is sent is made beforehand (`Parcel`), by that other
thread: it has the events in its processor's cache, and the server has the batch before to work on meanwhile.
"""

from collections.abc import Callable, Sequence
from typing import Any

import psycopg

from figbridge.reverse import claim, transaction
from figbridge.reverse.mapping import Work
from figbridge.reverse.outcome import Applied, contended
from figbridge.reverse.transaction import Suspects

_MOST = 64  # batches without hope after those that disappointed


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

    `alone` as for `claim.claims`.
    """

    def __init__(self, works: Sequence[Work], *, alone: bool = False) -> None:
        self.works = list(works)
        self.claims = claim.claims(works, alone=alone)
        self.segments = [_Segment(segment) for segment in transaction.segments(works)]


class _Segment:
    """Works whose entities all differ: their versions, then their statements."""

    def __init__(self, works: list[Work]) -> None:
        self.works = works
        versioned = [work for work in works if work.version is not None]
        self.versioned = len(versioned)
        self.versions = claim.versions(versioned) if versioned else []
        self.todo = transaction.statements(works)


def run(
    connection: psycopg.Connection, parcel: Parcel, begin: Sequence[bytes], on_step: Callable[[str], None]
) -> dict[Work, Applied] | None:
    """As `transaction.run`; None when it did not go as hoped, and the transaction is to be rolled back."""
    sent, works = _Sent(connection, parcel), parcel.works
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
            raise Suspects(works, error) from error  # deferred constraints and triggers speak here
        if connection.closed:
            raise
        if contended(error) and sent.claimed:
            # the wait was long enough: no second one for the same lock
            raise Suspects(sent.unanswered() or works, error) from error
        return None
    transaction.require_commit(done)
    on_step("committed")
    return outcomes


class _Sent:
    """What was sent of a parcel, and its answers."""

    def __init__(self, connection: psycopg.Connection, parcel: Parcel) -> None:
        self._connection = connection
        self._parcel = parcel
        self._counted: list[tuple[psycopg.RawCursor, int]] = []  # each is to have an answer of so many rows
        self._segments: list[tuple[list[Work], list[transaction.Sent]]] = []

    def all(self, begin: Sequence[bytes]) -> None:
        """Send everything."""
        for statement in begin:
            psycopg.RawCursor(self._connection).execute(statement, prepare=True)
        self._count(claim.HOPED_CLAIM, self._parcel.claims, len(self._parcel.works))
        for segment in self._parcel.segments:
            if segment.versioned:
                self._count(claim.HOPED_VERSIONS, segment.versions, segment.versioned)
            self._segments.append((segment.works, []))
            transaction.send(self._connection, segment.todo, self._segments[-1][1])

    def _count(self, query: str, parameters: Sequence[str | bytes], rows: int) -> None:
        cursor = psycopg.RawCursor(self._connection)
        self._counted.append((cursor, rows))
        cursor.execute(query, parameters, prepare=True)

    @property
    def claimed(self) -> bool:
        """Whether all keys were new."""
        return bool(self._counted) and self._counted[0][0].rowcount == len(self._parcel.works)

    def outcomes(self) -> dict[Work, Applied] | None:
        """When all answers are there; None when one is not what was hoped for."""
        if any(cursor.rowcount != rows for cursor, rows in self._counted):
            return None
        outcomes: dict[Work, Applied] = {}
        try:
            for segment, sent in self._segments:
                outcomes |= transaction.read(segment, sent)
        except Suspects:
            return None
        return outcomes

    def unanswered(self) -> Sequence[Work]:
        """The works of the first statement without an answer."""
        return next((it.members for _, sent in self._segments for it in sent if it.cursor.statusmessage is None), ())
