"""Streams that broke off, and how long to wait before the next one.

The first time there is no reason to wait: the server was restarted, somebody ended a backend. A stream that breaks off
again without having moved will do so again, and each time the server decodes everything up to there. So the bridge
backs off, is not ready, and says it no oftener than every 30 s.

Pure: it reads no clock.
"""

from typing import Final

from figbridge.change import Lsn
from figbridge.errors import BridgeError
from figbridge.retry import Backoff

_FIRST: Final = 0.2  # seconds: a server that accepts and cuts at once must not be hammered
_PASSING: Final = 2.0  # seconds at most, while the next try may do: an application comes back from a failover as soon
_LASTING: Final = 30.0  # seconds at most, when only a human can end it
_WHOLE: Final = 30.0  # seconds for which a stream was open; one that lived so long was in order, however quiet


class Interruptions:
    """Those of one slot's stream that followed one another at one place."""

    def __init__(self) -> None:
        self._count = 0
        self._place = Lsn(0)
        self._since = 0.0
        self._passing, self._lasting = (Backoff("stream", longest=longest) for longest in (_PASSING, _LASTING))

    def opened(self, place: Lsn, now: float) -> None:
        """A stream begins behind `place` at the monotonic time `now`."""
        self._place, self._since = place, now

    @property
    def stuck(self) -> bool:
        """Whether the last stream ended where it had begun, and so had the one before it."""
        return self._count > 1

    def moved(self, place: Lsn) -> bool:
        """The stream has come to `place`. Whether it was stuck until now."""
        if place <= self._place:
            return False
        was, self._count = self.stuck, 0
        return was

    def seconds(self, error: BridgeError, place: Lsn, now: float) -> float:
        """Until the next stream, after this one ended with `error` at `place`; logged if that is news."""
        if place > self._place or (now - self._since > _WHOLE and not error.urgent):
            self._count = 0
        self._count += 1
        backoff = self._lasting if error.urgent else self._passing
        return max(_FIRST, backoff.seconds(error, self._count))
