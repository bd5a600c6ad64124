"""How much a snapshot may ask of the legacy database: a rate, and a standstill while a standby is behind.

What needs no rule here: a stream or a sink that is behind. No chunk is read before its low watermark has come through
the stream, and none is offered before the one before it is durable, so a snapshot is never ahead of either.
"""

import sys
import threading
import time
from typing import Final

import psycopg
import structlog

from figbridge.metrics import Metrics
from figbridge.retry import Stopped

_log = structlog.get_logger()
_LOOK: Final = 1.0  # seconds between two looks at the standbys
_WHILE: Final = 0.1  # seconds
# of physical standbys; NULL for one that is idle, and to a role that may not see it (pg_monitor may)
_LAG: Final = """
SELECT coalesce(extract(epoch FROM max(r.replay_lag)), 0)::float8 FROM pg_stat_replication r
WHERE NOT EXISTS (SELECT FROM pg_replication_slots s WHERE s.active_pid = r.pid AND s.slot_type = 'logical')
"""


class Pace:
    """Of one loop: `rate` rows a second (0: as fast as it goes), `lag` seconds that a standby may be behind."""

    def __init__(self, metrics: Metrics, *, rate: float = 0, lag: float = 10) -> None:
        self._rate = rate
        self._lag = lag
        self._metrics = metrics
        self._due = self._looked = 0.0

    @property
    def most(self) -> int:
        """How many rows a chunk may have, so that the rate is kept within a second, too."""
        return max(10, int(self._rate)) if self._rate else sys.maxsize

    def took(self, rows: int) -> None:
        """`rows` were read."""
        if self._rate:
            self._due = max(self._due, time.monotonic() - 1) + rows / self._rate

    def wait(self, connection: psycopg.Connection, stop: threading.Event) -> bool:
        """Return when the next chunk may be read; whether that took a while. Raises Stopped, psycopg.Error."""
        seconds = self._due - time.monotonic()
        if seconds > 0 and stop.wait(seconds):
            raise Stopped
        if not self._lag or time.monotonic() - self._looked < _LOOK:
            return seconds > _WHILE
        said = False
        while (behind := self._behind(connection)) > self._lag:
            if not said:
                _log.warning("the snapshot waits for a standby", seconds_behind=round(behind, 1), allowed=self._lag)
            said = True
            self._metrics.snapshot_throttled.set(1)
            if stop.wait(_LOOK):
                raise Stopped
        self._metrics.snapshot_throttled.set(0)
        self._looked = time.monotonic()
        return said or seconds > _WHILE

    def _behind(self, connection: psycopg.Connection) -> float:
        row = connection.execute(_LAG).fetchone()
        return float(row[0]) if row else 0.0
