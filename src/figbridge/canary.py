"""The start-up proof that nothing loops: a reverse transaction whose echo the forward path must recognise.

    reverse:  BEGIN; inbox row (the mark); canary row (the data); COMMIT      ──WAL──▶
    forward:  meets the mark first, drops the rows, and answers: UPDATE canary SET seen_at
    reverse:  sees the answer, and only now starts to consume

The answer is a row and not a signal inside the process, because `run --only forward` and `run --only reverse` may be
two containers, and because a row passes through every pooler (LISTEN does not survive PgBouncer's transaction mode).
It cannot loop itself: the canary's publication carries inserts only, and our schema is never part of the tables'.
"""

import secrets
import threading
from typing import Final

import structlog

from figbridge import legacy
from figbridge.retry import Stopped, persist

_log = structlog.get_logger()

INBOX: Final = (legacy.SCHEMA, "inbox")
CANARY: Final = (legacy.SCHEMA, "canary")
SOURCE: Final = "figbridge.canary"  # the inbox source of a canary; no event's source may be this

_ANSWER_POLL = 0.1  # seconds between two looks for the answer
_PATIENCE = 10.0  # seconds without an answer before the log says what is being waited for


def write(dsn: str, slot: str) -> str:
    """Commit a canary; its nonce. Raises LegacyUnavailable or BridgeError."""
    nonce = secrets.token_hex(16)
    with legacy.connect(dsn, purpose="canary") as connection, legacy.translated():
        connection.execute(
            "INSERT INTO figbridge.inbox (source, idempotency_key, payload_hash, event_id) VALUES (%s, %s, '', %s)",
            [SOURCE, nonce, nonce],
        )
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


def await_answer(dsn: str, nonce: str, stop: threading.Event) -> None:
    """Return when the forward path has answered `nonce`. Raises Stopped, LegacyUnavailable or BridgeError.

    It waits as long as it takes: while the forward path is down or far behind, consuming would be unproven.
    """
    waited = 0.0
    with legacy.connect(dsn, purpose="canary", autocommit=True) as connection, legacy.translated():
        while not stop.wait(_ANSWER_POLL):
            row = connection.execute("SELECT seen_at FROM figbridge.canary WHERE nonce = %s", [nonce]).fetchone()
            if row and row[0]:
                return
            waited += _ANSWER_POLL
            if waited >= _PATIENCE:
                waited = 0.0
                _log.warning(
                    "waiting for the forward path to recognise our echo",
                    nonce=nonce,
                    hint="the reverse path starts when the forward path has read up to here; is it running?",
                )
    raise Stopped


def prove(dsn: str, slot: str, stop: threading.Event) -> None:
    """Write a canary and return when its echo was recognised, however often the database goes away meanwhile."""
    nonce = persist(lambda: write(dsn, slot), what="write canary", stop=stop)
    persist(lambda: await_answer(dsn, nonce, stop), what="await canary", stop=stop)
    _log.info("the loop guard is proven", nonce=nonce)
