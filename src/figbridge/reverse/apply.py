"""One event, one transaction: claim the idempotency key, run the mapping's statement, commit.

    round trip 1   BEGIN · timeouts · claim · statement        (one pipeline: sent together, answered in order)
    round trip 2   COMMIT, or ROLLBACK when the claim says duplicate or anything failed

Invariant: COMMIT is sent only after the answers of both the claim and the statement have been read and are good. So
sending the statement before the claim's answer is known cannot apply anything twice: a lost claim rolls the statement
back. In the server they run one after the other, and the claim is the first to write WAL, which makes it the mark of
the loop guard (`figbridge.forward.echo`).

Timeouts are set inside the transaction (set_config's third argument, SET LOCAL). Behind PgBouncer's transaction mode a
session's SET would stay with a server connection that the next transaction may not get, and another client would; and
startup options are refused by it (https://www.pgbouncer.org/features.html). In the pipeline this costs no round trip.

Refuses: replication origins (one outlives ROLLBACK and DISCARD ALL, and would hide genuine writes), prepared
statements (`figbridge.legacy.connect`), and guessing after a lost COMMIT: the claim of the next try knows.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import psycopg
from psycopg import conninfo
from psycopg.pq import TransactionStatus

from figbridge import legacy
from figbridge.errors import BridgeError, LegacyUnavailable
from figbridge.event import Received
from figbridge.reverse.mapping import Mapping, Statement, payload_hash

# READ COMMITTED whatever the role's default is: a stricter level cannot see the key of a transaction that committed
# since the snapshot, and would answer a plain duplicate with 40001.
_BEGIN: Final = "BEGIN ISOLATION LEVEL READ COMMITTED"
# synchronous_commit off would let a crash of the server take back what the queue has been told is done.
_SETTINGS: Final = """
    SELECT set_config('statement_timeout', $1, true), set_config('lock_timeout', $2, true),
           set_config('synchronous_commit', CASE current_setting('synchronous_commit')
                      WHEN 'off' THEN 'on' ELSE current_setting('synchronous_commit') END, true)
"""
_CLAIM: Final = """
    INSERT INTO figbridge.inbox (source, idempotency_key, payload_hash, event_id) VALUES ($1, $2, $3, $4)
    ON CONFLICT (source, idempotency_key) DO NOTHING
"""
_CLAIMED: Final = "SELECT payload_hash FROM figbridge.inbox WHERE source = $1 AND idempotency_key = $2"

_PARENT_MISSING: Final = "23503"  # foreign_key_violation: another event is to come first
UPDATE_MISSING: Final = "update_missing"
_DELETE_MISSING: Final = "delete_missing"
_KEY_REUSE: Final = "key_reuse"

# What these say is true of the server or the session, not of the event: a standby after a failover (25006), a session
# cut for idling (25P03), a disk that fails (58). A dead letter for each event would empty the queue for nothing.
_NOT_THE_EVENTS_FAULT: Final = ("25006", "25P03", "58")
# What a claim can suffer from because of its values: a character the database's encoding has not (22), a key longer
# than an index entry may be (54). Anything else that happens to a claim would happen to the next one, too.
_CLAIM_POISON: Final = ("22", "54")


class Outcome(StrEnum):
    """What became of an event; the values label the metric."""

    APPLIED = "applied"
    DUPLICATE = "duplicate"
    IGNORED = "ignored"
    RETRY = "retried"
    DEAD_LETTER = "dead_letter"


@dataclass(frozen=True, slots=True)
class Applied:
    """The outcome of one try. ``reason`` is a SQLSTATE or a word of ours, ``message`` may quote the event."""

    outcome: Outcome
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class _Claim:
    source: str
    key: str
    payload_hash: bytes
    event_id: str


@dataclass(frozen=True, slots=True)
class _Answers:
    """What the pipeline brought: rows claimed and rows written (-1: no answer), and the error that ended it."""

    claimed: int
    written: int
    error: psycopg.Error | None


class Applier:
    """Applies events over one connection of its own, opened when needed and again when it broke. For one thread.

    `statement_timeout` and `lock_timeout` are seconds. `on_step` is told ``executed`` (both statements are done, COMMIT
    is next) and ``committed``: the places where a crash test strikes.
    """

    def __init__(
        self,
        dsn: str,
        *,
        statement_timeout: float,
        lock_timeout: float,
        on_step: Callable[[str], None] = lambda _step: None,
    ) -> None:
        # identifiers and keys are sent as UTF-8, whatever the encoding of the database is; the server converts
        self._dsn = conninfo.make_conninfo(dsn, client_encoding="UTF8")
        self._timeouts = [_milliseconds(statement_timeout), _milliseconds(lock_timeout)]
        self._patience = statement_timeout + legacy.PATIENCE  # the server's own end of a statement comes first
        self._on_step = on_step
        self._connection: psycopg.Connection | None = None

    def apply(self, event: Received, mapping: Mapping) -> Applied:
        """Apply `event` in one transaction, or find that it is done already.

        RETRY: it waits for another event (its parent row, or the row it updates); nothing was written.
        DEAD_LETTER: it can never be applied; nothing was written, so the key stays free for a mended event.
        IGNORED: the row to delete was not there; the key is claimed, so that a repetition is a duplicate.
        Raises Malformed (poison), LegacyUnavailable (try again; if it was a lost COMMIT, the key will tell) and
        BridgeError when the inbox itself cannot be written, which no event is to blame for.
        """
        statement = mapping.statement(event)
        claim = _Claim(event.source, mapping.idempotency_key(event), payload_hash(event), event.id)
        connection = self._connected()
        try:
            return self._transaction(connection, claim, statement, mapping)
        except psycopg.Error as error:
            _raise_if_bug(error)
            raise _unavailable(error) from error
        finally:
            self._leave_clean(connection)

    def close(self) -> None:
        """Close the connection. May be called twice."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _transaction(
        self, connection: psycopg.Connection, claim: _Claim, statement: Statement, mapping: Mapping
    ) -> Applied:
        answers = self._execute(connection, claim, statement)
        if answers.claimed == 0:
            # whatever became of the statement: it is not ours to run
            connection.execute("ROLLBACK")
            return _compare(connection, claim)
        if answers.error is not None:
            _raise_if_bug(answers.error)
            return _claim_failed(answers.error) if answers.claimed < 0 else _statement_failed(answers.error)
        if mapping.action == "update" and answers.written == 0:
            return Applied(Outcome.RETRY, UPDATE_MISSING, f"no row of {'.'.join(mapping.table)} has this key")
        self._on_step("executed")
        try:
            done = connection.execute("COMMIT")
        except psycopg.Error as error:
            _raise_if_bug(error)
            return _statement_failed(error)  # deferred constraints and triggers speak here
        if done.statusmessage != "COMMIT":  # PostgreSQL answers ROLLBACK, without an error, to COMMIT of a failed one
            raise LegacyUnavailable("the server rolled back instead", hint="nothing is lost; the bridge tries again")
        self._on_step("committed")
        if mapping.action == "delete" and answers.written == 0:
            return Applied(Outcome.IGNORED, _DELETE_MISSING, f"no row of {'.'.join(mapping.table)} has this key")
        return Applied(Outcome.APPLIED)

    def _execute(self, connection: psycopg.Connection, claim: _Claim, statement: Statement) -> _Answers:
        # RawCursor: the SQL has $1 and no %s, so a % in a column's name is a % and not a placeholder
        claiming, writing = psycopg.RawCursor(connection), psycopg.RawCursor(connection)
        failure: psycopg.Error | None = None
        try:
            with connection.pipeline():  # leaving the block sends Sync and reads every answer
                connection.execute(_BEGIN)
                psycopg.RawCursor(connection).execute(_SETTINGS, self._timeouts)
                claiming.execute(_CLAIM, [claim.source, claim.key, claim.payload_hash, claim.event_id])
                writing.execute(statement.query, [statement.document])
        except psycopg.Error as error:
            failure = error
        return _Answers(claiming.rowcount, writing.rowcount, failure)

    def _connected(self) -> psycopg.Connection:
        if self._connection is None:
            self._connection = legacy.connect(self._dsn, purpose="apply", autocommit=True, patience=self._patience)
        return self._connection

    def _leave_clean(self, connection: psycopg.Connection) -> None:
        """No transaction stays open between two events, and no broken connection is kept."""
        if not connection.closed and connection.info.transaction_status != TransactionStatus.IDLE:
            with contextlib.suppress(psycopg.Error):
                connection.execute("ROLLBACK")
        if connection.closed or connection.info.transaction_status != TransactionStatus.IDLE:
            with contextlib.suppress(psycopg.Error):
                connection.close()
            self._connection = None


def _compare(connection: psycopg.Connection, claim: _Claim) -> Applied:
    """The key is taken: by this event, or by another one."""
    row = psycopg.RawCursor(connection).execute(_CLAIMED, [claim.source, claim.key]).fetchone()
    if row is None:
        raise LegacyUnavailable("an inbox row was purged while it was looked at", hint="the bridge tries again")
    if bytes(row[0]) == claim.payload_hash:
        return Applied(Outcome.DUPLICATE)
    return Applied(
        Outcome.DEAD_LETTER,
        _KEY_REUSE,
        "the idempotency key was applied before with another payload; the producer must give each change its own key",
    )


def _claim_failed(error: psycopg.Error) -> Applied:
    state = error.sqlstate or ""
    if state.startswith(_CLAIM_POISON):
        return Applied(Outcome.DEAD_LETTER, state, f"the idempotency key cannot be stored: {_message(error)}")
    refused = _unavailable(error)
    if not refused.retryable:
        refused.hint = "the inbox must be there and ours to write: see `figbridge check`, and `figbridge init`"
    raise refused from error


def _statement_failed(error: psycopg.Error) -> Applied:
    if (refused := _unavailable(error)).retryable:
        raise refused from error
    state = error.sqlstate or ""
    outcome = Outcome.RETRY if state == _PARENT_MISSING else Outcome.DEAD_LETTER
    return Applied(outcome, state, _message(error))


def _unavailable(error: psycopg.Error) -> BridgeError:
    if (error.sqlstate or "").startswith(_NOT_THE_EVENTS_FAULT):
        return LegacyUnavailable(
            f"the legacy database cannot write now: {error} (SQLSTATE {error.sqlstate})",
            hint="nothing is lost; is this the primary, and is it healthy?",
        )
    return legacy.translate(error)


def _raise_if_bug(error: psycopg.Error) -> None:
    """No SQLSTATE and not the connection: a misuse of the driver by us. A retry for ever would hide it."""
    if error.sqlstate is None and not isinstance(error, psycopg.OperationalError):
        raise error


def _message(error: psycopg.Error) -> str:
    """The server's words without the context, which quotes our own SQL."""
    diag = error.diag
    parts = [diag.message_primary, diag.message_detail, diag.message_hint]
    return " · ".join(part for part in parts if part) or str(error)


def _milliseconds(seconds: float) -> str:
    return str(max(1, round(seconds * 1000)))  # 0 would mean no timeout
