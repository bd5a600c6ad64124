"""How far the bridge may acknowledge before it has to say so first; pure, so that a test can walk through every crash.

    permit(F): F ≤ limit ─▶ F        target ─▶ (commit it to the row) ─▶ lift
               F > limit ─▶ what was let through last

INVARIANT. What `permit` returns never passes `limit`, never goes back, and was asked for: it is the end of a commit
whenever what it is asked with is. A limit is lowered before the row says so, and raised after.
"""

import threading
from typing import Final

from figbridge.change import Lsn

LEAST: Final = 64 * 1024  # bytes of headroom; several times what writing the row itself adds to the WAL
MOST: Final = 64 * 1024 * 1024
_SECONDS: Final = 2.0  # of our own progress: the loop raises the bound about once a second
UNBOUND: Final = Lsn(2**64 - 1)


class Bound:
    """How far we may acknowledge, and how far we did. Any thread may call anything."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._limit = Lsn(0)
        self._acknowledged = Lsn(0)
        self._passed = Lsn(0)
        self._asked = Lsn(0)
        self._headroom = LEAST
        self._noted = (0.0, Lsn(0))

    @property
    def acknowledged(self) -> Lsn:
        """The furthest that `permit` ever let through, or where the slot stood when it was taken."""
        return self._acknowledged

    @property
    def limit(self) -> Lsn:
        """What `permit` lets through now."""
        return self._limit

    @property
    def short(self) -> bool:
        """Whether it is time to raise the limit: nothing is held yet, if all goes well."""
        return self._asked + self._headroom // 2 > self._limit

    @property
    def loose(self) -> bool:
        """Whether the limit is further ahead than it needs to be, after a burst."""
        return self._limit - self._acknowledged > 4 * LEAST

    def permit(self, lsn: Lsn) -> Lsn:
        """What may be acknowledged when all up to `lsn` is durable: `lsn`, or what was let through before."""
        with self._lock:
            self._asked = max(self._asked, lsn)
            if lsn <= self._limit:
                self._passed = lsn
                self._acknowledged = max(self._acknowledged, lsn)
            return self._passed

    def freeze(self, at: Lsn) -> None:
        """The slot stands at `at`: let nothing more through until `lift`."""
        with self._lock:
            self._acknowledged = max(self._acknowledged, at)
            self._limit = self._acknowledged

    def target(self, now: float) -> Lsn:
        """Where the next limit should be, at the monotonic time `now`. A lower limit is in force at once.

        A higher one only with `lift`, once the row says so.
        """
        with self._lock:
            since, place = self._noted
            rate = (self._asked - place) / max(1.0, now - since) if place else 0.0
            self._noted = (now, self._asked)
            self._headroom = int(min(MOST, max(LEAST, _SECONDS * rate)))
            target = Lsn(max(self._asked, self._acknowledged) + self._headroom)
            self._limit = min(self._limit, target)
            return target

    def exact(self) -> Lsn:
        """What was acknowledged; from now on nothing more is let through."""
        with self._lock:
            self._limit = self._acknowledged
            return self._limit

    def lift(self, limit: Lsn) -> None:
        """`limit` is committed: let through up to there."""
        with self._lock:
            self._limit = max(self._limit, limit)
