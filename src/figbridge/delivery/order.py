"""Which events may be sent now, so that no two events of a key ever overtake one another.

INVARIANT: of each key at most one event is out at any time, the oldest that is not durable yet. So an entry that is
refused holds back its own key and no other, and no retry, timeout or partly taken request can reorder a key.

An event that changes a row's key belongs to both keys. One about a whole table waits for everything before it, and
everything after it waits for it: of which table an event is, its key does not say.
"""

from collections import deque
from collections.abc import Mapping, Sequence

from figbridge.event import Event


class Order:
    """The events of one call, by their index in it. For one thread.

    `keys` has those of an entry that is of several events, by its id.
    """

    def __init__(self, events: Sequence[Event], keys: Mapping[str, Sequence[str]] | None = None) -> None:
        self._events = events
        self._known = keys or {}
        self._admitted = 0
        # key → those behind the event of it that is out or ready; None as long as there are none, which is the rule
        self._behind: dict[str, deque[int] | None] = {}
        self._waits: dict[int, int] = {}  # event → how many keys it waits for
        self.unsettled = 0
        self.ready: deque[int] = deque()
        self._admit()

    def settle(self, index: int) -> None:
        """The event is durable or dead-lettered: whatever waited for it alone becomes ready."""
        for key in self._keys(self._events[index]):
            behind = self._behind[key]
            if not behind:
                del self._behind[key]
                continue
            following = behind.popleft()
            self._waits[following] -= 1
            if not self._waits[following]:
                del self._waits[following]
                self.ready.append(following)
        self.unsettled -= 1
        if not self.unsettled:
            self._admit()

    def _admit(self) -> None:
        """Line up the events before the next one that is about a whole table, or that one alone."""
        for index in range(self._admitted, len(self._events)):
            event = self._events[index]
            if event.whole_table and self.unsettled:
                return
            self._admitted += 1
            self.unsettled += 1
            self._line_up(index, event)
            if event.whole_table:
                return

    def _keys(self, event: Event) -> Sequence[str]:
        if self._known and (keys := self._known.get(event.id)) is not None:
            return keys
        return keys_of(event)

    def _line_up(self, index: int, event: Event) -> None:
        waits = 0
        for key in self._keys(event):
            if key not in self._behind:
                self._behind[key] = None
                continue
            behind = self._behind[key]
            if behind is None:
                behind = self._behind[key] = deque()
            behind.append(index)
            waits += 1
        if waits:
            self._waits[index] = waits
        else:
            self.ready.append(index)


def keys_of(event: Event) -> tuple[str, ...]:
    """What order is kept by of one event."""
    key, old_key = event.key, event.old_key
    return (key,) if old_key is None or old_key == key else (key, old_key)
