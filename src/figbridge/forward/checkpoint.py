"""Completed in any order, acknowledged in order: the watermark.

    track(10) track(20) track(30)     resolve(20)  → flushed 0     (10 is still out)
                                      resolve(10)  → flushed 20
                                      resolve(30)  → flushed 30

INVARIANT: `flushed` never passes an LSN whose events are not all durable, and never goes back.
"""

import threading
from collections import deque

from figbridge.change import Lsn


class Ticket:
    """One tracked LSN, in flight until resolved."""

    __slots__ = ("lsn", "resolved")

    def __init__(self, lsn: Lsn, *, resolved: bool = False) -> None:
        self.lsn = lsn
        self.resolved = resolved


class Checkpoint:
    """The highest LSN such that everything at or below it is delivered. Any thread may call anything."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tickets: deque[Ticket] = deque()
        self._flushed = Lsn(0)
        self._tracked = Lsn(0)

    @property
    def flushed(self) -> Lsn:
        """What may be acknowledged to the server."""
        return self._flushed

    @property
    def tracked(self) -> Lsn:
        """The newest LSN handed to `track` or `advance`: where a new connection may go on within this process."""
        return self._tracked

    @property
    def pending(self) -> int:
        """Tickets that are not resolved yet, with those that wait behind them."""
        return len(self._tickets)

    def track(self, lsn: Lsn) -> Ticket:
        """Announce that events up to the commit end `lsn` are on their way. Call in stream order."""
        with self._lock:
            self._tracked = max(self._tracked, lsn)
            ticket = Ticket(self._tracked)
            self._tickets.append(ticket)
            return ticket

    def resolve(self, ticket: Ticket) -> None:
        """Say that all events of `ticket` are durable."""
        with self._lock:
            ticket.resolved = True
            while self._tickets and self._tickets[0].resolved:
                self._flushed = max(self._flushed, self._tickets.popleft().lsn)

    def advance(self, lsn: Lsn) -> None:
        """Say that there is nothing to deliver up to `lsn`: filtered transactions, and the keepalives of a quiet time.

        Without this a publication that nobody writes to would retain the WAL of a busy server for ever.
        Call in stream order, and never inside a transaction whose commit has not been tracked.
        """
        with self._lock:
            self._tracked = max(self._tracked, lsn)
            if not self._tickets:
                self._flushed = self._tracked
            elif self._tickets[-1].resolved:
                self._tickets[-1].lsn = self._tracked  # not one ticket per keepalive while the sink is down
            else:
                self._tickets.append(Ticket(self._tracked, resolved=True))
