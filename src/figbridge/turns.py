"""How long a thread computes before another that waits gets the interpreter: Python's switch interval.

It is the process's, not a thread's: 5 ms by default, which is nothing beside a second and much beside a commit that is
to be an event after one millisecond. https://docs.python.org/3/library/sys.html#sys.setswitchinterval
"""

import sys
import threading
from typing import Final

TURN: Final = 0.0001  # seconds


class Turns:
    """While anybody is within, a thread that waits for the interpreter gets its turn after 0.1 ms, not after 5.

    For work that another loop does beside those whose latency counts. Turns that short cost those a few per cent.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._within = 0
        self._before = 0.0

    def __enter__(self) -> None:
        with self._lock:
            if not self._within:
                self._before = sys.getswitchinterval()
                sys.setswitchinterval(min(TURN, self._before))
            self._within += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._within -= 1
            if not self._within:
                sys.setswitchinterval(self._before)


SHORT_TURNS: Final = Turns()
