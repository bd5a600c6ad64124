"""Rows whose events wait: what comes later for such a row has to wait, too, or it would overtake.

    insert (its parent is not there yet) ──▶ released, comes again in 2 s
    delete of the same row               ──▶ applied now, it would find nothing, and the insert would bring the row back

An update whose row is not there waits for the very event that brings the row, so it must not hold that one back.

Invariant: an event is held back only by events that came before it; so the first of a row is always free to go, and
nothing waits in a circle.

It remembers across receives, because an event that waits comes back in a later one. It forgets what does not come back
soon after it was due: then another replica has it. Order between replicas is a FIFO queue's business, not this one's.
For one thread.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from figbridge.reverse.mapping import Target

EventKey = tuple[str, str]  # source and id

# Seconds that an event may come later than it was due, because the queue is long, before it counts as somebody else's.
_LATE = 15.0


@dataclass(frozen=True, slots=True)
class _Entry:
    target: Target
    due: float
    row_missing: bool


class Waiting:
    """The events that were released, in the order in which they first came. `clock` is time.monotonic's."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._entries: dict[EventKey, _Entry] = {}  # a repeated event keeps its place: dict does not move a key

    def __bool__(self) -> bool:
        return bool(self._entries)

    def add(self, key: EventKey, target: Target, delay: float, *, row_missing: bool = False) -> None:
        """The event was released and comes again in `delay` seconds; `row_missing`: when its row is there."""
        self._entries[key] = _Entry(target, self._clock() + delay, row_missing)

    def remove(self, key: EventKey) -> None:
        """The event is done with."""
        self._entries.pop(key, None)

    def delay(self, key: EventKey, target: Target, *, makes_row: bool = False) -> float | None:
        """Seconds until the earlier events are due that this one has to wait for; None when it may go.

        `makes_row`: the event brings the row, so it does not wait for those that wait for the row.
        """
        ahead = [it for it in self._ahead(key, target) if not (makes_row and it.row_missing)]
        return max(0.0, max(entry.due for entry in ahead) - self._clock()) if ahead else None

    def for_row(self, key: EventKey, target: Target) -> bool:
        """Whether all that this event waits behind waits for the row: then so does this one."""
        return all(entry.row_missing for entry in self._ahead(key, target))

    def _ahead(self, key: EventKey, target: Target) -> list[_Entry]:
        """The waiting events of the row that came before this one."""
        now = self._clock()
        self._entries = {other: entry for other, entry in self._entries.items() if entry.due + _LATE > now}
        ahead = []
        for other, entry in self._entries.items():
            if other == key:
                break  # what follows came after it
            if entry.target.may_be(target):
                ahead.append(entry)
        return ahead
