"""Parked events that a timeout ended before: each alone, and never for long, so that nobody else waits for them.

A statement that is too slow, or a row that stays locked, costs its whole timeout at each try. Together in one
transaction they would spoil it for each other, and for as long as they are tried nothing else is applied. So a look
into the park tries one after the other until that has cost something, those first that were tried least; and then there
is a pause of three times as long. For a lock each fourth try waits as long as it may, the others briefly
(`search.BRIEF`).
"""

import time
from collections.abc import Callable, Iterable
from typing import Final

from figbridge.reverse.item import Item
from figbridge.reverse.outcome import TIMEOUTS, Outcome

_ENOUGH: Final = 0.1  # seconds of one look that may be waited in vain
_PAUSE: Final = 3  # times what was waited: others have three quarters of the time


class Slow:
    """See the module. For one thread."""

    def __init__(self) -> None:
        self._pause_ends = 0.0

    @property
    def due(self) -> bool:
        """Whether there is no pause."""
        return time.monotonic() >= self._pause_ends

    def apply(self, items: Iterable[Item], apply: Callable[[Item, bool], object]) -> list[Item]:
        """Have `apply` apply items; those that were tried. It is told whether to wait but briefly for locks."""
        tried: list[Item] = []
        lost = 0.0
        for item in sorted(items, key=lambda it: it.delivery.attempts):
            if lost >= _ENOUGH:
                break
            begun = time.monotonic()
            apply(item, item.delivery.attempts % 4 != 0)
            tried.append(item)
            if item.applied and item.applied.outcome is Outcome.RETRY and item.applied.reason in TIMEOUTS:
                lost += time.monotonic() - begun
        self._pause_ends = time.monotonic() + _PAUSE * lost
        return tried
