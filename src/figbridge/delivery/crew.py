"""Threads that wait for a sink's answers.

They are started as they are needed, and they are daemons: a process that is told to end must not wait for a service
that does not answer.
"""

import queue
import threading
from collections.abc import Callable


class Crew:
    """At most `most` threads. With one there is no thread at all: the caller waits itself."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._started = 0

    def do(self, work: Callable[[], None]) -> None:
        """Call `work`, which raises nothing, on a thread that has nothing else to do, or on the next one that has."""
        if self._most == 1:
            work()
            return
        if not self._idle.acquire(blocking=False) and self._started < self._most:
            self._started += 1
            threading.Thread(target=self._run, name=f"publish-{self._started}", daemon=True).start()
        self._work.put(work)

    def close(self) -> None:
        """Each thread ends after what it does now."""
        for _ in range(self._started):
            self._work.put(None)
        self._started = 0

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()
            self._idle.release()
