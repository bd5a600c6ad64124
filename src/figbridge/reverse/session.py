"""The one connection of an `Applier`: opened when needed and again when it broke, prepared, marked, left clean.

INVARIANT. Between two uses it has no open transaction but one that its lane has sent ahead (`express.Lane`), and that
one is taken back before anything else is asked.
"""

import contextlib
import sys
from typing import Final

import psycopg
from psycopg import conninfo
from psycopg.pq import TransactionStatus

from figbridge import legacy
from figbridge.errors import OriginInUse
from figbridge.reverse import express
from figbridge.reverse.guard import LoopGuard
from figbridge.reverse.outcome import unavailable


class Session:
    """See the module. `patience` is how many seconds the server may be silent. For one thread.

    `prepares` says whether the server may keep statements for us, where nobody stands between it and us.
    """

    def __init__(self, dsn: str, guard: LoopGuard | None, *, patience: float) -> None:
        # identifiers and keys are sent as UTF-8, whatever the encoding of the database is; the server converts
        self._dsn: Final = conninfo.make_conninfo(dsn, client_encoding="UTF8")
        self._guard, self._patience = guard, patience
        self.prepares = True
        self._connection: psycopg.Connection | None = None
        self._lane: express.Lane | None = None

    def idle(self) -> psycopg.Connection:
        """The connection, in autocommit mode and idle. Raises LegacyUnavailable."""
        if self._lane:
            self._lane.clear()
        return self.opened()

    def opened(self) -> psycopg.Connection:
        """The connection, perhaps with a transaction that was sent ahead. Raises LegacyUnavailable."""
        if self._connection is None or self._connection.closed:
            connection = legacy.connect(self._dsn, purpose="apply", autocommit=True, patience=self._patience)
            try:
                if self.prepares and legacy.direct(connection):
                    connection.prepare_threshold = sys.maxsize  # what asks for it by itself, and nothing else
                if self._guard:
                    self._guard.opened(connection)
            except psycopg.Error as error:
                connection.close()  # it would write without a mark
                raise unavailable(error) from error
            except OriginInUse:
                connection.close()
                raise
            self._connection, self._lane = connection, None
        return self._connection

    def lane(self, connection: psycopg.Connection) -> express.Lane:
        """The lane of `connection`, which is the one that is open."""
        if self._lane is None or self._lane.connection is not connection:
            self._lane = express.Lane(connection)
        return self._lane

    def leave_clean(self, connection: psycopg.Connection) -> None:
        """No transaction stays open but one sent ahead, and no broken connection is kept."""
        if self._lane and self._lane.ahead and not connection.closed:
            return
        if not connection.closed and connection.info.transaction_status != TransactionStatus.IDLE:
            with contextlib.suppress(psycopg.Error):
                connection.execute("ROLLBACK")
        if connection.closed or connection.info.transaction_status != TransactionStatus.IDLE:
            with contextlib.suppress(psycopg.Error):
                connection.close()
            self._connection = self._lane = None

    def close(self) -> None:
        """Close the connection. May be called twice, and it may be opened again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = self._lane = None
