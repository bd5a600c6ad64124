"""How many requests may be out at once, and when the next one may go: additive increase, multiplicative decrease.

INVARIANT: requests that were out at the same time failed of the same, so together they count as one failure.

* a request that was taken widens the window by one for each window of them
* one of which half the entries or more were refused for now, or that was not answered, halves it
* one that was not answered also stops everything for a while, with full jitter: a sink that is away is not helped by
  asking it more. Entries that were refused wait each for itself, so that one hot key (a Kinesis shard at its limit)
  does not stop the others.
"""

import time

from figbridge.errors import BridgeError
from figbridge.retry import Backoff


class Pace:
    """Of one sink, from call to call. For one thread. Times are of the monotonic clock, in seconds."""

    def __init__(self, what: str, most: int) -> None:
        self._backoff = Backoff(what)
        self._most = most
        self._window = float(most)
        self._failures = 0
        self._failed = 0.0
        self.resume = 0.0  # no request before this

    @property
    def window(self) -> int:
        """Requests that may be out, from 1 to the most there may be."""
        return int(self._window)

    def taken(self) -> None:
        """Every entry of a request was taken, or refused for ever."""
        self._failures = 0
        self._window = min(float(self._most), self._window + 1 / self._window)

    def refused(self, sent: float, error: BridgeError, attempt: int, *, most: bool) -> float:
        """An entry of a request that left at `sent` was refused for now: seconds until it goes again.

        `attempt` is how often it was sent; `most` says that half the entries of its request or more fared so.
        """
        if most and sent >= self._failed:
            self._narrow()
        return self._backoff.seconds(error, attempt)

    def unanswered(self, sent: float, error: BridgeError) -> None:
        """It is not known what became of a request that left at `sent`."""
        if sent < self._failed:
            return
        self._failures += 1
        self._narrow()
        self.resume = self._failed + self._backoff.seconds(error, self._failures)

    def _narrow(self) -> None:
        self._failed = time.monotonic()
        self._window = max(1.0, self._window / 2)
