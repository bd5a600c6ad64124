"""The breaker: a row that goes to and fro between both systems, each answering the other, is held.

    ours, theirs, ours, theirs, …     the same row; how often within a minute, by the time of the commits

The loop guard knows our own writes. It cannot know a legacy job that answers each of them with one of its own, which
the new system then answers: no transaction of ours carries that change. In the WAL both directions meet in order, so
here it shows. What is held is the legacy system's part, with the code `HELD`: without it the new system has nothing to
answer. The row is let through again when it has been quiet.

Rows pass the lanes of `unroll` unseen, which is why they are fast. A table leaves them only while one of its rows is
written by us so often that it may bounce: `watched`.

Bounded: it knows a limited number of rows, those of the last minute; the commit times are the server's, so a backlog
that is read at once is no burst.
"""

from dataclasses import dataclass
from typing import Final

import structlog

from figbridge.change import Change, Value
from figbridge.event import Event, Rejection

_log = structlog.get_logger()

HELD: Final = "ping_pong"
_MOST: Final = 10_000  # rows; beyond it all are forgotten, and a loop is found a little later

_Key = tuple[int, tuple[Value, ...]]  # the table's OID, the key's values


@dataclass(slots=True)
class _Seen:
    ours: int = 0
    bounces: int = 0
    answered: bool = True  # by the legacy system, since our last write


class PingPong:
    """For the capture thread. `limit`: how often a row may bounce within `seconds`; 0: as often as it likes."""

    def __init__(self, limit: int, seconds: float) -> None:
        self._limit = limit
        self._seconds = seconds
        self._now: dict[_Key, _Seen] = {}
        self._before: dict[_Key, _Seen] = {}
        self._since = 0.0
        self.watched: set[int] = set()  # OIDs of tables

    def begin(self, at: float) -> None:
        """A transaction that was committed at `at`, in seconds."""
        if not self._now and not self._before:
            self._since = at
        elif at - self._since > self._seconds / 2 or len(self._now) > _MOST:
            old = at - self._since > self._seconds
            self._before, self._now, self._since = {} if old else self._now, {}, at
            self.watched &= {oid for (oid, _), seen in self._before.items() if self._suspect(seen.ours)}

    def ours(self, change: Change) -> None:
        """We wrote this row."""
        key = _key(change) if self._limit else None
        if key is None:
            return
        seen = self._now.setdefault(key, _Seen())
        seen.ours += 1
        seen.answered = False
        before = self._before.get(key)
        if self._suspect(seen.ours + (before.ours if before else 0)):
            self.watched.add(change.relation.oid)

    def theirs(self, change: Change) -> bool:
        """The legacy system wrote this row; whether its event is to be held."""
        if change.relation.oid not in self.watched:
            return False
        key = _key(change)
        seen, before = (self._now.get(key), self._before.get(key)) if key else (None, None)
        last = seen or before
        if last is None:
            return False
        if not last.answered:
            last.bounces += 1
            last.answered = True
        return (seen.bounces if seen else 0) + (before.bounces if before else 0) > self._limit

    def _suspect(self, ours: int) -> bool:
        return ours > self._limit // 2


def held(event: Event) -> Rejection:
    """For the dead letters: to publish it once more would only be answered once more."""
    _log.error(
        "a row goes to and fro between both systems; its event is held",
        event_id=event.id,
        detail_type=event.detail_type,
        hint="find who answers whom: a trigger or a job of the legacy system, a consumer of the new one",
    )
    return Rejection(event, HELD, "its row goes to and fro between both systems", retryable=False)


def _key(change: Change) -> _Key | None:
    """The row: its key before the change, since that is what it was known by; None of a table that names no row."""
    relation = change.relation
    row = change.before or change.after
    if row is None or relation.identity not in "di":
        return None
    return relation.oid, tuple([value for column, value in zip(relation.columns, row, strict=True) if column.is_key])
