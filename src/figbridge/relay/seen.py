"""Which events the sink has taken, as far as this process remembers: a window of ids, the oldest leave first."""

import threading
from typing import Literal

# of an event: what tells a repetition is (source, id), for the same id of another source is another event
Name = tuple[str, str]


class Seen:
    """At most `most` ids, each with a hash of its detail. For all loops of a process, which share a queue."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._ids: dict[Name, int] = {}
        self._lock = threading.Lock()

    def known(self, name: Name, detail: bytes) -> Literal["no", "same", "other"]:
        """Whether it was taken before; ``other``: under this id, but with another detail."""
        found = self._ids.get(name)
        if found is None:
            return "no"
        return "same" if found == hash(detail) else "other"

    def add(self, name: Name, detail: bytes) -> None:
        """The sink took it; from now on it is known."""
        ids = self._ids
        with self._lock:
            ids.pop(name, None)  # a repetition moves it to the young end
            ids[name] = hash(detail)
            if len(ids) > self._most:
                del ids[next(iter(ids))]
