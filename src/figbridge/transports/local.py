"""The embedded bus: one SQLite file that several processes publish to and subscribe to at the same time.

Invariant: every event that `LocalSink.publish` returned from is handed to every subscriber, in the order of its
commit, until that subscriber acknowledges it. Acknowledgements come in any order and leave no hole; what a dead
process held is handed out again, and its attempts are counted on.

Refuses nothing to a second reader of one subscriber: each would get everything, so run one.

The file grows until `LocalSink.prune`: it keeps events for a subscriber yet to come, and their ids, by which a
repeated event is known. A subscriber that never returns keeps all that it has not read.
"""

import math
import sqlite3
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from figbridge.errors import QueueError, QueueUnavailable, SinkRefused, SinkUnavailable
from figbridge.event import Event, Rejection
from figbridge.transports import Delivery, Limits
from figbridge.transports.busfile import BusFile

_LIMITS: Final = Limits(
    entries=5_000, entry_bytes=900_000_000, batch_bytes=8 * 1024 * 1024, partial=False, dedup=math.inf
)
_FRAME = 128  # bytes of an envelope that are neither attribute nor detail
_BATCH = 500  # deliveries of one receive
_STRIDE = 1_000  # passed-over events after which the frontier is written although nothing was delivered
# SQLite tells nobody in another process that something was committed, and a file watch would miss a WAL that is
# written in place. `PRAGMA data_version` says in microseconds, without reading a table, whether another connection
# committed: https://www.sqlite.org/pragma.html#pragma_data_version
_POLL = 0.005  # seconds between two looks
_SPAN: Final = "FROM delivery WHERE subscriber = ? AND seq BETWEEN ? AND ?"


class LocalSink:
    """Publishes to the bus at `path`, which is made when missing. Durable (``synchronous = FULL``) on return."""

    name = "local"
    limits = _LIMITS

    def __init__(self, path: Path) -> None:
        self._bus = BusFile(path, "FULL", passing=SinkUnavailable, refused=SinkRefused)

    def size(self, event: Event) -> int:
        """Bytes of the body, to within its escapes: it groups writes, and refuses only what SQLite cannot hold."""
        return len(event.detail) + len(event.id) + len(event.source) + len(event.detail_type) + _FRAME

    def check(self) -> None:
        """Open the bus. Raises SinkRefused, SinkUnavailable."""
        with self._bus.connected():
            pass

    def publish(self, events: Sequence[Event]) -> Sequence[Rejection]:
        """Append `events` in one transaction; one whose (source, id) is there already stays as and where it is.

        Raises SinkUnavailable (none was appended) or SinkRefused.
        """
        rows = [(event.source, event.id, event.body()) for event in events]
        if rows:
            with self._bus.transaction() as connection:
                connection.executemany(
                    "INSERT INTO event (source, id, body) VALUES (?, ?, ?) ON CONFLICT (source, id) DO NOTHING", rows
                )
        return ()

    def prune(self) -> int:
        """Delete what every subscriber has settled; how many. Nothing while there is no subscriber.

        A pruned event that is published again is a new one to the bus: its id is gone too.
        """
        with self._bus.transaction() as connection:
            return connection.execute(
                "DELETE FROM event WHERE seq <= (SELECT min(frontier) FROM subscriber) "
                "AND seq NOT IN (SELECT seq FROM delivery)"
            ).rowcount

    def close(self) -> None:
        """Close the file."""
        self._bus.close()


class LocalSource:
    """One subscriber of the bus, from the bus's first event on; in order of commit, repeated deliveries first.

    `sources`: only events of these; a trailing ``*`` matches a prefix. It is applied when an event is first met, so
    a wider filter later does not bring back what was passed over.
    May be made in one thread and used in another, by one at a time; `close` may come from any and ends a wait.

    Its connection runs with ``synchronous = NORMAL``: a power failure can undo the last acknowledgements (never an
    event), and then they are delivered again, as at-least-once allows. With FULL each one would cost an fsync.
    """

    name = "local"

    def __init__(self, path: Path, *, subscriber: str, sources: Sequence[str] | None = None) -> None:
        self._bus = BusFile(path, "NORMAL", passing=QueueUnavailable, refused=QueueError)
        self._subscriber = subscriber
        self._filter, self._arguments = _filter(sources)
        self._held: set[int] = set()  # handed out by us and not settled; empty at a start, so all of those come again
        self._frontier: int | None = None  # as it is in the file
        self._opened = 0  # which of the bus's files that is about
        self._closed = threading.Event()

    def check(self) -> None:
        """Open the bus and take our place on it. Raises QueueError, QueueUnavailable."""
        self._position()

    def receive(self, *, wait: float) -> Sequence[Delivery]:
        """Up to 500 deliveries; empty after `wait` seconds without any. Raises QueueUnavailable, QueueError."""
        deadline = time.monotonic() + wait
        version: int | None = None
        while not self._closed.is_set():
            with self._bus.connected() as connection:
                self._keep_up()
                seen = connection.execute("PRAGMA data_version").fetchone()[0]
                # a delay that has passed changes no data_version
                if (seen != version or self._repeats(connection, 1)) and (found := self._take(connection)):
                    return found
            version = seen
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                break
            self._closed.wait(min(_POLL, remaining))
        return ()

    def settle(self, seq: int, *, opened: int, again_at: float | None) -> None:
        """For our deliveries: acknowledge (`again_at` None), or release until `again_at`, in seconds since 1970.

        Nothing is done for one of a file that was moved away since it was the `opened`-th.
        """
        with self._bus.transaction() as connection:
            self._keep_up()
            if opened != self._opened:
                return
            if again_at is None:
                connection.execute("DELETE FROM delivery WHERE subscriber = ? AND seq = ?", [self._subscriber, seq])
            else:
                connection.execute(
                    "UPDATE delivery SET not_before = ? WHERE subscriber = ? AND seq = ?",
                    [again_at, self._subscriber, seq],
                )
        self._held.discard(seq)

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """See `Source.acknowledge`; in one transaction."""
        ours = [delivery for delivery in deliveries if isinstance(delivery, _LocalDelivery)]
        if not ours:
            return
        with self._bus.transaction() as connection:
            self._keep_up()
            numbers = {delivery.seq for delivery in ours if delivery.opened == self._opened}
            if not numbers:
                return
            span = (self._subscriber, min(numbers), max(numbers))
            # nearly always they are all that there is from the first to the last: one statement, not one for each
            among = connection.execute(f"SELECT count(*) {_SPAN}", span).fetchone()[0]
            if among == len(numbers) and numbers <= self._held:
                connection.execute(f"DELETE {_SPAN}", span)
            else:
                connection.executemany(
                    "DELETE FROM delivery WHERE subscriber = ? AND seq = ?",
                    [(self._subscriber, seq) for seq in numbers],
                )
        self._held -= numbers

    def close(self) -> None:
        """Close the file; what is not settled is handed out again after the next start."""
        self._closed.set()
        self._bus.close()

    def _keep_up(self) -> None:
        """What is known by heart is about the file that is open."""
        if self._opened != self._bus.opened:
            self._opened, self._frontier = self._bus.opened, None
            self._held.clear()

    def _position(self) -> int:
        if self._frontier is None:
            with self._bus.transaction() as connection:
                self._keep_up()
                connection.execute("INSERT INTO subscriber VALUES (?, 0) ON CONFLICT DO NOTHING", [self._subscriber])
                row = connection.execute("SELECT frontier FROM subscriber WHERE name = ?", [self._subscriber])
                self._frontier = int(row.fetchone()[0])
        return self._frontier

    def _repeats(self, connection: sqlite3.Connection, most: int) -> list[tuple[int, int]]:
        """(seq, attempts) of what was handed out before and is due again."""
        there = connection.execute("SELECT count(*) FROM delivery WHERE subscriber = ?", [self._subscriber]).fetchone()
        if there[0] == len(self._held):  # each of those has its row
            return []
        rows = connection.execute(
            "SELECT seq, attempts FROM delivery WHERE subscriber = ? AND not_before <= ? ORDER BY seq",
            [self._subscriber, time.time()],
        ).fetchall()
        return [(seq, attempts) for seq, attempts in rows if seq not in self._held][:most]

    def _take(self, connection: sqlite3.Connection) -> list[Delivery]:
        """Hand out what is due. Reads before it writes: events never change, and our deliveries are ours alone."""
        frontier = self._position()
        repeats = [(seq, attempts, _body(connection, seq)) for seq, attempts in self._repeats(connection, _BATCH)]
        room = _BATCH - len(repeats)
        end = connection.execute("SELECT max(seq) FROM event").fetchone()[0] or 0
        fresh = connection.execute(
            # only placeholders are put together; the cast is for a publisher that inserted text
            "SELECT seq, 0, CAST(body AS BLOB) FROM event "  # noqa: S608
            f"WHERE seq > ? AND seq <= ? {self._filter} ORDER BY seq LIMIT ?",
            [frontier, end, *self._arguments, room],
        ).fetchall()
        reached = frontier
        if len(fresh) < room:  # read to the end; what is not in `fresh` was passed over
            reached = max(frontier, end)
        elif fresh:
            reached = fresh[-1][0]
        if repeats or fresh or reached - frontier >= _STRIDE:
            self._record([seq for seq, *_ in repeats], fresh[-1][0] if fresh else frontier, reached)
        found = [*repeats, *fresh]
        self._held.update([seq for seq, *_ in found])
        return [_LocalDelivery(self, self._opened, seq, attempts + 1, body) for seq, attempts, body in found]

    def _record(self, repeats: Sequence[int], last: int, frontier: int) -> None:
        """Write that `repeats` are handed out again, and for the first time what is ours up to `last`."""
        name = self._subscriber
        with self._bus.transaction() as connection:
            connection.executemany(
                "UPDATE delivery SET attempts = attempts + 1 WHERE subscriber = ? AND seq = ?",
                [(name, seq) for seq in repeats],
            )
            connection.execute(
                # only placeholders are put together; what was read in this span is still all that is in it
                f"INSERT INTO delivery SELECT ?, seq, 1, 0 FROM event WHERE seq > ? AND seq <= ? {self._filter}",  # noqa: S608
                [name, self._frontier, last, *self._arguments],
            )
            connection.execute("UPDATE subscriber SET frontier = ? WHERE name = ?", [frontier, name])
        self._frontier = frontier


class _LocalDelivery:
    """See `figbridge.transports.Delivery`."""

    __slots__ = ("_source", "attempts", "body", "opened", "seq")
    lost = False  # nobody else has our place
    group = None

    def __init__(self, source: LocalSource, opened: int, seq: int, attempts: int, body: bytes) -> None:
        self._source = source
        self.opened = opened
        self.seq = seq
        self.attempts = attempts
        self.body = body

    def ack(self) -> None:
        self._source.settle(self.seq, opened=self.opened, again_at=None)

    def nack(self, *, delay: float = 0.0) -> None:
        self._source.settle(self.seq, opened=self.opened, again_at=time.time() + delay if delay > 0 else 0.0)


def _body(connection: sqlite3.Connection, seq: int) -> bytes:
    row = connection.execute("SELECT CAST(body AS BLOB) FROM event WHERE seq = ?", [seq]).fetchone()
    body: bytes = row[0]
    return body


def _filter(sources: Sequence[str] | None) -> tuple[str, list[Any]]:
    """(SQL to add to a WHERE, its arguments). Not LIKE or GLOB: a source may hold their wildcards."""
    if sources is None:
        return "", []
    conditions: list[str] = []
    arguments: list[Any] = []
    for pattern in sources:
        if pattern.endswith("*"):
            conditions.append("substr(source, 1, ?) = ?")
            arguments += [len(pattern) - 1, pattern[:-1]]
        else:
            conditions.append("source = ?")
            arguments.append(pattern)
    return f"AND ({' OR '.join(conditions)})", arguments
