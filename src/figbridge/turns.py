"""How long a thread computes before another that waits gets the interpreter: Python's switch interval.

It is the process's, not a thread's: 5 ms by default, which is nothing beside a second and much beside a commit that is
to be an event after one millisecond. https://docs.python.org/3/library/sys.html#sys.setswitchinterval
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

TURN: Final = 0.0001  # seconds
_LONG: Final = 0.005


class Turns:
    """While anybody is within, a thread that waits for the interpreter gets its turn after 0.1 ms, not after 5.

    For work that another loop does beside those whose latency counts. Turns that short cost those a few per cent.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._within = self._held = 0
        self._before = 0.0

    def __enter__(self) -> None:
        self._change(within=1)

    def __exit__(self, *_: object) -> None:
        self._change(within=-1)

    @contextmanager
    def held(self) -> Iterator[None]:
        """For about a millisecond: others wait until the turn of the thread that calls this is over.

        What somebody idle waits for is then done at once. In short turns two threads would get one each, so it would
        take twice as long, and each change costs.
        """
        self._change(held=1)
        try:
            yield
        finally:
            self._change(held=-1)

    def _change(self, *, within: int = 0, held: int = 0) -> None:
        with self._lock:
            if not (self._within or self._held):
                self._before = sys.getswitchinterval()
            self._within += within
            self._held += held
            if self._held:
                sys.setswitchinterval(_LONG)
            elif self._within:
                sys.setswitchinterval(min(TURN, self._before))
            else:
                sys.setswitchinterval(self._before)


SHORT_TURNS: Final = Turns()
