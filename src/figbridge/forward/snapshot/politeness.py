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
# of physical standbys; the lag of an idle one is NULL, and to a role that may not see it (pg_monitor may) all of it is
_STANDBYS: Final = """
SELECT r.pid, coalesce(extract(epoch FROM r.replay_lag), 0)::float8, (r.replay_lsn - '0/0')::bigint,
       (pg_current_wal_flush_lsn() - '0/0')::bigint
FROM pg_stat_replication r
WHERE r.replay_lsn IS NOT NULL
  AND NOT EXISTS (SELECT FROM pg_replication_slots s WHERE s.active_pid = r.pid AND s.slot_type = 'logical')
"""


class Lag:
    """How far physical standbys are behind, asked again and again.

    ``replay_lag`` alone does not say it: the server measures when a standby answers. One that hangs, or whose network
    does, keeps the value that it had, which is NULL on an idle server. So for each standby a place in the WAL is kept,
    and since when it has had to replay up to there.
    """

    def __init__(self) -> None:
        self._marks: dict[int, tuple[int, float]] = {}  # by the walsender's pid

    def seconds(self, connection: psycopg.Connection) -> float:
        """Of the one that is furthest behind; 0 without any. Raises psycopg.Error."""
        now, marks, most = time.monotonic(), dict[int, tuple[int, float]](), 0.0
        for pid, told, replayed, end in connection.execute(_STANDBYS).fetchall():
            place, since = self._marks.get(pid, (end, now))
            if replayed >= place:
                place, since = end, now
            marks[pid] = place, since
            most = max(most, told, now - since)
        self._marks = marks
        return most


class Pace:
    """Of one loop: `rate` rows a second (0: as fast as it goes), `lag` seconds that a standby may be behind."""

    def __init__(self, metrics: Metrics, *, rate: float = 0, lag: float = 10) -> None:
        self._rate = rate
        self._lag = lag
        self._metrics = metrics
        self._standbys = Lag()
        self._due = self._looked = 0.0

    @property
    def limited(self) -> bool:
        """Whether there is a rate to be kept."""
        return bool(self._rate)

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
        while (behind := self._standbys.seconds(connection)) > self._lag:
            if not said:
                _log.warning("the snapshot waits for a standby", seconds_behind=round(behind, 1), allowed=self._lag)
            said = True
            self._metrics.snapshot_throttled.set(1)
            if stop.wait(_LOOK):
                raise Stopped
        self._metrics.snapshot_throttled.set(0)
        self._looked = time.monotonic()
        return said or seconds > _WHILE
