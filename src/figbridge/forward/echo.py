"""Our own reverse writes, met again in the WAL: recognised by the inbox row, dropped, counted.

The reverse path writes the inbox row as the first statement of its transaction, and the inbox is published, so the
mark arrives before the data it marks. From then to the commit every row is ours and stays here.

Why the mark is a row: it commits with the data or not at all, needs no privilege, passes every pooler, and has to be
written anyway for idempotency. A replication origin would outlive a ROLLBACK and a DISCARD ALL (measured), so behind a
pool it would silently hide genuine legacy writes, which is worse than a loop.
"""

import queue
from typing import Final

import structlog

from figbridge import canary
from figbridge.change import Change, Operation
from figbridge.legacy import SCHEMA

_log = structlog.get_logger()
_INBOX_SOURCE: Final = "source"
_INBOX_KEY: Final = "idempotency_key"


class EchoFilter:
    """Decides for each row whether it is an echo. One transaction at a time, on the capture thread.

    `canaries` receives the nonce of every canary seen, for somebody else to answer: this thread must not wait for a
    database while the walsender waits for it.
    """

    def __init__(self) -> None:
        self.canaries: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.late_marks = 0
        self._ours = False
        self._passed = 0

    def begin(self) -> None:
        """A transaction starts: it is the legacy system's until a mark says otherwise."""
        self._ours = False
        self._passed = 0

    def drops(self, change: Change) -> bool:
        """Whether `change` must not be published."""
        if change.relation.schema == SCHEMA:
            # never published, whatever the publication says: our tables are nobody's business
            if change.relation.name == canary.INBOX[1] and change.operation is Operation.INSERT:
                self._mark(change)
            return True
        if self._ours:
            return True
        self._passed += 1
        return False

    def _mark(self, change: Change) -> None:
        self._ours = True
        values = dict(zip((column.name for column in change.relation.columns), change.after or (), strict=True))
        if self._passed:
            self.late_marks += 1
            _log.error(
                "an inbox row came after data of its transaction: those rows have left as events and may loop",
                rows=self._passed,
                hint="the inbox row must be the first statement of a reverse transaction; who else writes to it?",
            )
        source, nonce = values.get(_INBOX_SOURCE), values.get(_INBOX_KEY)
        if isinstance(source, bytes) and isinstance(nonce, bytes) and source.decode() == canary.SOURCE:
            self.canaries.put(nonce.decode())
