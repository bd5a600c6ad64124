"""Chunks read from a physical standby, so that the primary is asked for watermarks alone.

INVARIANT. What a chunk lacks of the stream, its window has noted. Three things see to it:

* The chunk's snapshot is taken when the standby has replayed the low watermark's commit. A standby shows a transaction
  when it replays its commit record, so whatever the stream told before low is visible: what the primary must be asked
  (`window.Windows.met`) has no meaning here, for there is no commit that is in the WAL and not yet seen.
* What the standby had not replayed yet commits after low: before high, where the stream wins, or behind it.
* What it had replayed is in the primary's WAL before high, which is written when the chunk has been read. So nothing is
  in a chunk that the stream tells before its window.

Both must be one history: each chunk asks whether the server is still in recovery, and each connection whether it has
the primary's system identifier. A standby that was promoted is read no more, and nothing is read in its place until a
human has said where: the task stands still and says why, the stream goes on.

A query that holds up replay is cancelled by the standby (``max_standby_streaming_delay``) and its chunk read again.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import psycopg

from figbridge import legacy
from figbridge.errors import BridgeError, LegacyUnavailable
from figbridge.preflight.standby import ANOTHER
from figbridge.retry import Stopped

_PATIENCE: Final = 30.0  # seconds; longer the window would have to note what the stream touches
_TICK: Final = 0.01
_HERE: Final = "SELECT pg_current_wal_insert_lsn()::pg_catalog.text, current_database()::pg_catalog.text"
_BEHIND: Final = (
    "SELECT pg_is_in_recovery(), current_database()::pg_catalog.text, pg_last_wal_replay_lsn() >= %s::pg_catalog.pg_lsn"
)


class Standby:
    """A connection to the standby at `dsn`, for one loop."""

    def __init__(self, connection: psycopg.Connection) -> None:
        self.connection = connection

    @classmethod
    @contextmanager
    def opened(cls, dsn: str, system_identifier: str) -> Iterator["Standby"]:
        """Raises LegacyUnavailable."""
        try:
            with legacy.translated():
                connection = legacy.connect(dsn, purpose="snapshot-standby", autocommit=True, prepares=True)
                try:
                    query = "SELECT system_identifier::pg_catalog.text FROM pg_control_system()"
                    (found,) = connection.execute(query).fetchone() or ("",)
                except BaseException:
                    connection.close()
                    raise
        except BridgeError as error:  # whatever it is, it is no failure of the table
            away = LegacyUnavailable(
                f"forward.snapshot-standby does not answer: {str(error.__cause__ or error).strip()}",
                hint="the snapshot goes on when it does; the stream does not wait for it",
            )
            away.urgent, away.retry_after = error.urgent or not error.retryable, error.retry_after
            raise away from error
        with connection:
            if found != system_identifier:
                raise _unusable(f"is a server of another cluster: {found}, not {system_identifier}")
            yield cls(connection)

    def wait(self, primary: psycopg.Connection, stop: threading.Event) -> None:
        """Return when all that is committed on `primary` by now can be seen. Raises LegacyUnavailable, Stopped."""
        end, database = primary.execute(_HERE).fetchone() or ("", "")
        deadline = time.monotonic() + _PATIENCE
        while True:
            recovers, other, reached = self.connection.execute(_BEHIND, [end]).fetchone() or (False, "", False)
            if not recovers:
                raise _unusable("is no standby (any more): it was promoted?")
            if other != database:
                raise _unusable(f"names database {other}, and legacy.dsn {database}")
            if reached:
                return
            if time.monotonic() > deadline:
                raise LegacyUnavailable(
                    f"forward.snapshot-standby has not replayed {end} within {_PATIENCE:.0f} s",
                    hint="nothing is lost; the snapshot goes on when it has caught up",
                )
            if stop.wait(_TICK):
                raise Stopped


def _unusable(why: str) -> LegacyUnavailable:
    """Only a human can say where else to read: the primary may be what they want to spare."""
    error = LegacyUnavailable(f"forward.snapshot-standby {why}", hint=f"{ANOTHER}. Nothing is lost")
    error.urgent, error.retry_after = True, legacy.REFUSED
    return error
