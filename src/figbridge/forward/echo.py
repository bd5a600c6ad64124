"""Our own reverse writes, met again in the WAL: recognised by their mark, dropped, counted.

The reverse path puts the mark first into its transaction, so it arrives before the data it marks. From then to the
commit the transaction is ours. Three marks, by ``legacy.loop-guard``:

    inbox     the row of figbridge.inbox, which is published. It commits with the data or not at all, needs no
              privilege, passes every pooler, and has to be written anyway for idempotency.
    message   a transactional logical message (`figbridge.mark.MARK`): nothing of ours is published. Anybody who can
              connect may write one, and hide a transaction of his own behind it.
    origin    a replication origin. It would outlive a ROLLBACK and a DISCARD ALL (measured), so behind a pool it would
              silently hide genuine legacy writes, which is worse than a loop. Compared here by its name, and not by
              pgoutput's ``origin 'none'``, which would hide other origins' writes too, and is unknown before 16.

What stays here of such a transaction, ``forward.echo`` says: all of it, or only the rows that the reverse path asked
for (`touched`). A transaction that has no list of those, of an older bridge for instance, stays here as a whole.
"""

import queue
from datetime import datetime
from typing import Final, Literal

import structlog

from figbridge import canary, mark
from figbridge.change import Change, LogicalMessage, Operation
from figbridge.forward.pingpong import PingPong
from figbridge.forward.touched import Touched
from figbridge.legacy import SCHEMA

_log = structlog.get_logger()
_INBOX_SOURCE: Final = "source"
_INBOX_KEY: Final = "idempotency_key"

Guard = Literal["inbox", "message", "origin"]


class EchoFilter:
    """Decides for each row whether it is an echo. One transaction at a time, on the capture thread.

    `guard` is ``legacy.loop-guard``, `origin` the name of our replication origin; `touched_rows`: only those rows are
    echoes.

    `canaries` receives the nonce of every canary seen, for somebody else to answer: this thread must not wait for a
    database while the walsender waits for it. `ours` says whether the open transaction is known to be ours.
    """

    def __init__(
        self,
        *,
        guard: Guard = "inbox",
        origin: str = "",
        touched_rows: bool = False,
        ping_pong: PingPong | None = None,
    ) -> None:
        self.canaries: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.late_marks = 0
        self.ours = False
        self._guard = guard
        self._origin = origin
        self._touched_rows = touched_rows
        self._ping_pong = ping_pong or PingPong(0, 1.0)
        self._touched: Touched | None = None
        self._own = 0  # rows of our tables in this transaction

    def begin(self, committed_at: datetime) -> None:
        """A transaction starts: it is the legacy system's until a mark says otherwise."""
        self._ping_pong.begin(committed_at.timestamp())
        self.ours = False
        self._touched = None
        self._own = 0

    @property
    def cause(self) -> bytes | None:
        """What made the row that passes now, as an event's detail says it; None in a transaction that is not ours."""
        return self._touched.cause if self.ours and self._touched else None

    @property
    def passes(self) -> bool:
        """Whether something of the open transaction that is no row may leave."""
        return not self.ours or (self._touched is not None and not self._touched.unknown)

    def came_from(self, origin: str) -> None:
        """The transaction has a replication origin, which the server says before anything else of it."""
        if self._guard == "origin" and origin == self._origin:
            self.ours = True

    def hears(self, message: LogicalMessage, rows: int) -> bool:
        """Whether a transactional message is one of ours about this transaction, which has had so many `rows`."""
        try:
            match message.prefix:
                case mark.MARK:
                    if self._guard == "message":
                        self._mark(rows - self._own)
                    self._listed(message.content)
                case mark.CAUSE if self._touched is not None:
                    self._touched.turn(message.content)
                case mark.CANARY:
                    self._canary(message.content.decode())
                case _:
                    return message.prefix == mark.CAUSE
        except (ValueError, LookupError, TypeError) as error:
            _log.error(
                "a mark that we cannot read: its transaction is taken for ours as a whole",
                prefix=message.prefix,
                error=str(error),
                hint="is the other path of the bridge of another version? who else writes messages of this prefix?",
            )
            self._touched = None
        return True

    def drops(self, change: Change) -> bool:
        """Whether `change` must not be published."""
        if change.relation.schema == SCHEMA:
            # never published, whatever the publication says: our tables are nobody's business
            self._own += 1
            if change.relation.name == canary.INBOX[1] and change.operation is Operation.INSERT:
                self._inbox_row(change)
            return True
        if not self.ours:
            return False
        self._ping_pong.ours(change)
        return self._touched is None or self._touched.takes(change)

    @property
    def watched(self) -> set[int]:
        """OIDs of tables of which every row has to come here."""
        return self._ping_pong.watched

    def holds(self, change: Change) -> bool:
        """Whether `change`, which is no echo, must not be published either: its row goes to and fro (`pingpong`)."""
        return bool(self._ping_pong.watched) and self._ping_pong.theirs(change)

    def _listed(self, content: bytes) -> None:
        if not self._touched_rows or content == mark.UNLISTED.encode():
            return
        self._touched = self._touched or Touched()
        before = self._touched.overflown
        self._touched.add(content)
        if self._touched.overflown and not before:
            _log.warning("a reverse transaction is too large to compare its rows; all of it is taken for an echo")

    def _inbox_row(self, change: Change) -> None:
        if self._guard != "inbox":
            return
        self._mark(change.ordinal + 1 - self._own)
        values = dict(zip((column.name for column in change.relation.columns), change.after or (), strict=True))
        source, nonce = values.get(_INBOX_SOURCE), values.get(_INBOX_KEY)
        if isinstance(source, bytes) and isinstance(nonce, bytes) and source.decode() == canary.SOURCE:
            self._canary(nonce.decode())

    def _mark(self, passed: int) -> None:
        """The transaction is ours. `passed` rows of others came before; they have left, if no mark came first."""
        late, self.ours = 0 if self.ours else passed, True
        if late:
            self.late_marks += 1
            _log.error(
                "a mark came after data of its transaction: those rows have left as events and may loop",
                rows=late,
                hint="the mark must be the first statement of a reverse transaction; who else writes it?",
            )

    def _canary(self, nonce: str) -> None:
        """A canary is answered only where a reverse transaction would have been recognised."""
        if not self.ours:
            _log.error("a canary came without its mark: a reverse transaction would loop", guard=self._guard)
        elif self._touched_rows and self._touched is None:
            _log.error("a canary came without its list: what triggers do in a reverse transaction would be lost")
        else:
            self.canaries.put(nonce)
