"""The standby status updates of the stream: when one is due, and what the server is told.

The server ends a client of which it hears nothing for wal_sender_timeout, and keeps WAL until it is told that it may
forget it. So one is due at an interval, and soon after more has become durable.
https://www.postgresql.org/docs/current/protocol-replication.html
"""

import time
from typing import Final

from figbridge.change import Lsn
from figbridge.forward.checkpoint import Checkpoint
from figbridge.forward.heartbeat import Heartbeats
from figbridge.forward.source import ReplicationSource
from figbridge.metrics import Metrics

_INTERVAL: Final = 10.0  # PostgreSQL's own wal_receiver_status_interval
_PROGRESS: Final = 0.2  # at most this long after an acknowledgement the server learns of it


class Status:
    """What the server was told last, and when. One thread, that of the capture loop."""

    def __init__(
        self, source: ReplicationSource, checkpoint: Checkpoint, heartbeats: Heartbeats | None, metrics: Metrics
    ) -> None:
        self._source = source
        self._checkpoint = checkpoint
        self._heartbeats = heartbeats
        self._metrics = metrics
        self._interval = _INTERVAL
        self._reported = Lsn(0)
        self._last = 0.0
        self.server_end = 0  # of its WAL, as far as this connection was told

    def opened(self) -> None:
        """A connection begins to stream."""
        self.server_end = 0
        self._last = time.monotonic()
        self._interval = min(_INTERVAL, self._source.sender_timeout / 4)

    def until_due(self) -> float:
        """Seconds; not positive when one is due."""
        wanted = _PROGRESS if self._checkpoint.flushed > self._reported else self._interval
        return self._last + wanted - time.monotonic()

    def send(self, *, at_once: bool = False) -> None:
        """Send one, if it is due or wanted `at_once`. Raises SourceDisconnected."""
        if at_once or self.until_due() <= 0:
            flushed = self._checkpoint.flushed
            self._source.send_status(written=self._checkpoint.tracked, flushed=flushed)
            self._last, self._reported = time.monotonic(), flushed
            self._metrics.flushed_lsn.set(flushed)
            self._metrics.lag_bytes.set(max(0, max(self.server_end, self._source.server_end) - flushed))
        if self._heartbeats:
            self._heartbeats.acknowledged(self._source.acknowledged)
