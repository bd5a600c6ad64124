"""The start-up proof that nothing loops: a reverse transaction whose echo the forward path must recognise.

    reverse:  BEGIN; the mark; canary row (the data); COMMIT                  ──WAL──▶
    forward:  meets the mark first, drops the rows, and answers: UPDATE canary SET seen_at
    reverse:  sees the answer, and only now starts to consume

The mark is that of ``legacy.loop-guard``: the inbox row, a logical message, or a replication origin. Where no row of
ours is published, the nonce is in a message of its own.

The answer is a row and not a signal inside the process, because `run --only forward` and `run --only reverse` may be
two containers, and because a row passes through every pooler (LISTEN does not survive PgBouncer's transaction mode).
It cannot loop itself: the canary's publication carries inserts only, and our schema is never part of the tables'.
"""

import secrets
import threading
from typing import Final, Literal

import psycopg
import structlog

from figbridge import legacy, mark
from figbridge.errors import OriginInUse
from figbridge.retry import Stopped, persist

_log = structlog.get_logger()

INBOX: Final = (legacy.SCHEMA, "inbox")
CANARY: Final = (legacy.SCHEMA, "canary")
SOURCE: Final = "figbridge.canary"  # the inbox source of a canary; no event's source may be this

_ANSWER_POLL = 0.1  # seconds between two looks for the answer
_PATIENCE = 10.0  # seconds without an answer before the log says what is being waited for
_BEHIND = "the reverse path starts when the forward path has read up to here; is it running?"
_PASSED_OVER = "it has confirmed what came behind: is it of the same file, with the same legacy.loop-guard?"
_PASSED = 6  # times that long after it was confirmed, a canary is given up: a slot that was made anew never had it


def origin(slot: str) -> str:
    """The name of the replication origin of the bridge with this slot; one session at a time may have it."""
    return f"figbridge_{slot}"


def bear_origin(connection: psycopg.Connection, slot: str) -> None:
    """Mark all that `connection`, in autocommit mode, will write until it ends. Raises OriginInUse, psycopg.Error.

    PostgreSQL before 19 lets one session at a time have an origin, and names no way to share it.
    """
    try:
        connection.execute("SELECT pg_replication_origin_session_setup(%s)", [origin(slot)])
    except psycopg.errors.ObjectInUse as error:
        raise OriginInUse(
            f"another session has the mark of our transactions, the replication origin {origin(slot)}: {error}",
            hint="a second replica waits until the first one ends; for a command that writes, stop the bridge "
            "meanwhile (its forward path may go on: `figbridge run --only forward`)",
        ) from error


def write(dsn: str, slot: str, guard: Literal["inbox", "message", "origin"] = "inbox") -> str:
    """Commit a canary; its nonce. Raises LegacyUnavailable or BridgeError.

    It has a list of what it touches, as a transaction under ``echo: touched_rows`` has: nobody is lost by one too many.
    """
    nonce = secrets.token_hex(16)
    with legacy.connect(dsn, purpose="canary", autocommit=True) as connection, legacy.translated():
        if guard == "origin":
            bear_origin(connection, slot)
        emit = "SELECT pg_logical_emit_message(true, %s, %s)"
        with connection.transaction():
            connection.execute(emit, [mark.MARK, mark.write((), [mark.Entry(SOURCE, nonce, 0, ())])])
            if guard == "inbox":
                connection.execute(
                    "INSERT INTO figbridge.inbox (source, idempotency_key, payload_hash, event_id) "
                    "VALUES (%s, %s, '', %s)",
                    [SOURCE, nonce, nonce],
                )
            else:
                connection.execute(emit, [mark.CANARY, nonce])
            connection.execute("INSERT INTO figbridge.canary (nonce, slot) VALUES (%s, %s)", [nonce, slot])
            # the proof is of today; yesterday's is of no use to anybody
            connection.execute("DELETE FROM figbridge.canary WHERE written_at < now() - interval '1 day'")
            connection.execute(
                "DELETE FROM figbridge.inbox WHERE source = %s AND applied_at < now() - interval '1 day'", [SOURCE]
            )
    return nonce


def answer(dsn: str, nonce: str) -> None:
    """Say that the echo of `nonce` was recognised. Raises LegacyUnavailable or BridgeError."""
    with legacy.connect(dsn, purpose="canary", autocommit=True) as connection, legacy.translated():
        connection.execute("UPDATE figbridge.canary SET seen_at = now() WHERE nonce = %s AND seen_at IS NULL", [nonce])


def await_answer(dsn: str, nonce: str, stop: threading.Event) -> bool:
    """True when the forward path has answered `nonce`, False when it never will: its row is gone, or passed over.

    It waits as long as it takes: while the forward path is down or far behind, consuming would be unproven.
    Raises Stopped, LegacyUnavailable or BridgeError.
    """
    waited, passed = 0.0, 0
    with legacy.connect(dsn, purpose="canary", autocommit=True) as connection, legacy.translated():
        (place,) = connection.execute("SELECT pg_current_wal_lsn()::text").fetchone() or ("0/0",)
        while not stop.wait(_ANSWER_POLL):
            row = connection.execute("SELECT seen_at FROM figbridge.canary WHERE nonce = %s", [nonce]).fetchone()
            if row is None:
                return False
            if row[0]:
                return True
            waited += _ANSWER_POLL
            if waited >= _PATIENCE:
                waited = 0.0
                passed = passed + 1 if _confirmed(connection, nonce, place) else 0
                if passed > _PASSED:
                    return False
                _log.warning(
                    "waiting for the forward path to recognise our echo",
                    nonce=nonce,
                    hint=_PASSED_OVER if passed else _BEHIND,
                )
    raise Stopped


def _confirmed(connection: psycopg.Connection, nonce: str, place: str) -> bool:
    """Whether the forward path has confirmed the LSN `place`, or its slot began behind it."""
    row = connection.execute(
        "SELECT s.confirmed_flush_lsn >= %s::pg_lsn FROM figbridge.canary c "
        "JOIN pg_replication_slots s ON s.slot_name = c.slot AND s.database = current_database() WHERE c.nonce = %s",
        [place, nonce],
    ).fetchone()
    return bool(row and row[0])


def prove(dsn: str, slot: str, stop: threading.Event, guard: Literal["inbox", "message", "origin"] = "inbox") -> None:
    """Write a canary and return when its echo was recognised, however often the database goes away meanwhile."""
    answered = False
    while not answered:
        nonce = persist(lambda: write(dsn, slot, guard), what="write canary", stop=stop)
        # a replica that started meanwhile has deleted it if the forward path has been away for a day, or the slot was
        # made anew behind it
        answered = persist(lambda nonce=nonce: await_answer(dsn, nonce, stop), what="await canary", stop=stop)  # type: ignore[misc]
    _log.info("the loop guard is proven", nonce=nonce)
