"""Where an event goes that cannot be delivered or applied: kept whole, with the reason, never skipped.

Adding a letter twice leaves one letter, because a crash between the letter and the acknowledgement repeats both.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import orjson
import psycopg

from figbridge import legacy
from figbridge.config import DeadLettersSection, FileDeadLetters


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One undeliverable event. ``body`` is its envelope, or the message as it came when it was not an event."""

    direction: Literal["forward", "reverse"]
    event_id: str | None
    reason: str
    message: str
    attempts: int
    body: bytes

    @property
    def id(self) -> str:
        """Derived from direction and body, so that a repeated letter is the same letter."""
        return hashlib.sha256(self.direction.encode() + b"\0" + self.body).hexdigest()


class DeadLetters(Protocol):
    """A store of dead letters. Called from one thread."""

    def add(self, letters: Sequence[DeadLetter]) -> None:
        """Return when all are durable. Raises LegacyUnavailable (try again) or BridgeError."""

    def close(self) -> None:
        """Release what is held."""


class TableDeadLetterStore:
    """figbridge.dead_letter in the legacy database; a connection for each call, because letters are rare."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn

    def add(self, letters: Sequence[DeadLetter]) -> None:
        """See `DeadLetters.add`."""
        with legacy.connect(self._dsn, purpose="dead-letters") as connection, legacy.translated():
            insert_letters(connection, letters)

    def close(self) -> None:
        """Nothing is held."""


def insert_letters(connection: psycopg.Connection, letters: Sequence[DeadLetter]) -> None:
    """Write `letters` in the connection's current transaction; what is there already stays as it is."""
    with connection.cursor() as cursor:
        cursor.executemany(
            """
            INSERT INTO figbridge.dead_letter (id, direction, event_id, reason, message, attempts, body)
            VALUES (%s, %s, %s, %s, %s, %s, %s) ON CONFLICT (id) DO NOTHING
            """,
            [
                # a text column cannot hold NUL, and a message may quote the event
                (it.id, it.direction, _text(it.event_id), it.reason, _text(it.message), it.attempts, it.body)
                for it in letters
            ],
        )


def _text(value: str | None) -> str | None:
    return value.replace("\0", "\\0") if value is not None else None


class FileDeadLetterStore:
    """JSON lines, synced to disk. A repeated letter is written again, under the same id."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")

    def add(self, letters: Sequence[DeadLetter]) -> None:
        """See `DeadLetters.add`."""
        for letter in letters:
            body = letter.body.decode(errors="backslashreplace")
            line = {
                "id": letter.id,
                "direction": letter.direction,
                "event_id": letter.event_id,
                "reason": letter.reason,
                "message": letter.message,
                "attempts": letter.attempts,
                "body": body,
            }
            self._file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def open_dead_letters(section: DeadLettersSection, dsn: str) -> DeadLetters:
    """The store that a configuration section describes."""
    return FileDeadLetterStore(section.path) if isinstance(section, FileDeadLetters) else TableDeadLetterStore(dsn)
