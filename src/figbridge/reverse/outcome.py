"""What becomes of an event, and how a SQLSTATE decides it.

    retry    08, 53, 57 (but those below)     the server: everything waits, nobody is to blame
             40, 55, 57014, 25P04             this row, now: the event waits a moment, the others go on
             08, 53200, 53400, 57000          the same where a statement failed and the session goes on: what a trigger
                                              asks is away, or this statement is too much
    park     23503, 23001                     until the row that is referred to is there, or its last child is gone
             a row that is missing            until it is there
    poison   22, 23, 42, the rest             dead letter

https://www.postgresql.org/docs/current/errcodes-appendix.html
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import psycopg

from figbridge import legacy
from figbridge.errors import BridgeError, LegacyUnavailable

# foreign_key_violation, and what ON DELETE RESTRICT is from PostgreSQL 18 on: another event is to come first
FOREIGN_KEY: Final = ("23503", "23001")
UPDATE_MISSING: Final = "update_missing"
DELETE_MISSING: Final = "delete_missing"
STALE_VERSION: Final = "stale_version"
KEY_REUSE: Final = "key_reuse"
ROW_WAITS: Final = "row_waits"
EARLIER_WAITS: Final = "earlier_waits"  # a constraint refuses it, perhaps only until an earlier event is applied
MAPPING_BROKEN: Final = "mapping_broken"
PING_PONG: Final = "ping_pong"

# What these say is true of the server or the session, not of the event: a standby after a failover (25006), a session
# cut for idling (25P03), a disk that fails (58). A dead letter for each event would empty the queue for nothing.
_NOT_THE_EVENTS_FAULT: Final = ("25006", "25P03", "58")
# Somebody else has the row: a deadlock, a serialization failure, a lock, statement or transaction timeout.
_CONTENTION: Final = ("40", "55", "57014", "25P04")
# lock_not_available by lock_timeout, query_canceled by statement_timeout: each try costs the whole of it
LOCK_TIMEOUT: Final = "55P03"
STATEMENT_TIMEOUT: Final = "57014"
TIMEOUTS: Final = (LOCK_TIMEOUT, STATEMENT_TIMEOUT)
# What of 08, 53 and 57 a statement can fail with while the server is well: a trigger's own connection (dblink), no room
# in the lock table for so many partitions, temp_file_limit, a trigger that says so.
_OF_A_STATEMENT: Final = ("08", "53200", "53400", "57000")


class Outcome(StrEnum):
    """What became of an event; the values label the metric."""

    APPLIED = "applied"
    DUPLICATE = "duplicate"
    IGNORED = "ignored"
    RETRY = "retried"
    DEAD_LETTER = "dead_letter"

    __hash__ = str.__hash__  # an enum's own is written in Python, and outcomes are counted


@dataclass(frozen=True, slots=True)
class Awaited:
    """The row that an event waits for: its table and the JSON object of the columns that name it."""

    table: tuple[str, str]
    columns: tuple[str, ...]
    document: str


@dataclass(frozen=True, slots=True)
class Applied:
    """The outcome of one try. ``reason`` is a SQLSTATE or a word of ours, ``message`` may quote the event.

    `awaited` is the row that a RETRY waits for, where it is known. `statement` is the SQL that failed. `conflicts` are
    (kind, decision) of what was found otherwise than the event expects.
    """

    outcome: Outcome
    reason: str = ""
    message: str = ""
    awaited: Awaited | None = None
    statement: str = ""
    conflicts: tuple[tuple[str, str], ...] = ()


DONE: Final = Applied(Outcome.APPLIED)  # of nearly every event, so it is told by `is`


def contended(error: psycopg.Error, *, claiming: bool = False) -> bool:
    """Whether the error is about what the event needs and cannot have at this moment, and not about the server.

    `claiming`: it is of a statement of ours that any event would have failed with.
    """
    state = error.sqlstate or ""
    if state.startswith(_CONTENTION):
        return True
    # the severity tells before the connection does: after FATAL and PANIC it is gone
    goes_on = error.diag.severity_nonlocalized == "ERROR"
    return goes_on and not claiming and state.startswith(_OF_A_STATEMENT)


def contention(reason: str) -> bool:
    """As `contended`, of the reason for which an event waits."""
    return reason.startswith((*_CONTENTION, *_OF_A_STATEMENT))


def unavailable(error: psycopg.Error) -> BridgeError:
    """The error as one of ours; retryable when no event is to blame for it."""
    if (error.sqlstate or "").startswith(_NOT_THE_EVENTS_FAULT):
        return LegacyUnavailable(
            f"the legacy database cannot write now: {error} (SQLSTATE {error.sqlstate})",
            hint="nothing is lost; is this the primary, and is it healthy?",
        )
    return legacy.translate(error)


def raise_if_bug(error: psycopg.Error) -> None:
    """No SQLSTATE and not the connection: a misuse of the driver by us. A retry for ever would hide it."""
    if error.sqlstate is None and not isinstance(error, psycopg.OperationalError):
        raise error


def words(error: psycopg.Error) -> str:
    """The server's words without the context, which quotes our own SQL."""
    diag = error.diag
    parts = [diag.message_primary, diag.message_detail, diag.message_hint]
    return " · ".join(part for part in parts if part) or str(error)
