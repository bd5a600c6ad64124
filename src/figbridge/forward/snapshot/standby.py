"""Chunks read from a physical standby, so that the primary is asked for watermarks alone.

INVARIANT. What a chunk lacks of the stream, its window has noted. Three things see to it:

* The chunk's snapshot is taken when the standby has replayed the low watermark's commit. A standby shows a transaction
  when it replays its commit record, so whatever the stream told before low is visible: what the primary must be asked
  (`window.Windows.met`) has no meaning here, for there is no commit that is in the WAL and not yet seen.
* What the standby had not replayed yet commits after low: before high, where the stream wins, or behind it.
* What it had replayed is in the primary's WAL before high, which is written when the chunk has been read. So nothing is
  in a chunk that the stream tells before its window.

Both must be one history: each chunk asks whether the server is still in recovery, and each connection whether it has
the primary's system identifier. A standby that was promoted is read no more.

A query that holds up replay is cancelled by the standby (``max_standby_streaming_delay``) and its chunk read again.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import psycopg

from figbridge import legacy
from figbridge.errors import LegacyUnavailable
from figbridge.retry import Stopped

_PATIENCE: Final = 30.0  # seconds; longer the window would have to note what the stream touches
_TICK: Final = 0.01
_BEHIND: Final = "SELECT pg_is_in_recovery(), pg_last_wal_replay_lsn() >= %s::pg_lsn"


class Standby:
    """A connection to the standby at `dsn`, for one loop."""

    def __init__(self, connection: psycopg.Connection) -> None:
        self.connection = connection

    @classmethod
    @contextmanager
    def opened(cls, dsn: str, system_identifier: str) -> Iterator["Standby"]:
        """Raises LegacyUnavailable, BridgeError."""
        with legacy.connect(dsn, purpose="snapshot-standby", autocommit=True) as connection, legacy.translated():
            query = "SELECT system_identifier::text FROM pg_control_system()"
            (found,) = connection.execute(query).fetchone() or ("",)
            if found != system_identifier:
                raise LegacyUnavailable(
                    f"forward.snapshot-standby is a server of another cluster: {found}, not {system_identifier}",
                    hint="name a physical standby of legacy.dsn",
                )
            yield cls(connection)

    def wait(self, primary: psycopg.Connection, stop: threading.Event) -> None:
        """Return when all that is committed on `primary` by now can be seen. Raises LegacyUnavailable, Stopped."""
        (end,) = primary.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone() or ("",)
        deadline = time.monotonic() + _PATIENCE
        while True:
            recovers, reached = self.connection.execute(_BEHIND, [end]).fetchone() or (False, False)
            if not recovers:
                raise LegacyUnavailable(
                    "forward.snapshot-standby is no standby (any more)", hint="name one of the server in legacy.dsn"
                )
            if reached:
                return
            if time.monotonic() > deadline:
                raise LegacyUnavailable(
                    f"forward.snapshot-standby has not replayed {end} within {_PATIENCE:.0f} s",
                    hint="nothing is lost; the snapshot goes on when it has caught up",
                )
            if stop.wait(_TICK):
                raise Stopped
