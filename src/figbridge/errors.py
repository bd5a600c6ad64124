"""Everything that can go wrong, and what the operator does about it.

BridgeError                  hint says the remedy; exit_status is what the process ends with
├── ConfigError              the file is wrong: every problem, with its field          (2)
├── SetupError               the database, bus or queue is not as the file says        (2)
├── SourceError              the legacy database, read side
│   ├── SourceDisconnected   retried: the connection went, the slot keeps our place
│   ├── SlotInUse            retried: another replica of the bridge holds the slot
│   ├── SlotLost             stops: changes may be gone, only a human may go on
│   │   └── SlotGap          of this very database; forward.on-slot-loss may say to go on with a backfill
│   └── DecodeError          stops: bytes we do not understand; nothing is guessed
├── SinkError
│   ├── SinkUnavailable      retried: it is not known that any entry was accepted
│   └── SinkRefused          stops: permission, name, or an entry nobody may skip
├── QueueError               the reverse source
│   └── QueueUnavailable     retried
└── LegacyUnavailable        the legacy database, write side; retried
    └── OriginInUse          another replica of the bridge, or the bridge itself, has the origin

A class exists only where a caller behaves differently.
``retryable``, ``retry_after`` and ``urgent`` are read by one place, `figbridge.retry`.
"""

from collections.abc import Sequence
from dataclasses import dataclass


class BridgeError(Exception):
    """The root. ``hint`` is the remedy, in the imperative; ``retryable`` says that trying again may help.

    ``retry_after`` is a fixed number of seconds until then, where backing off would only cost time; ``urgent`` says
    that trying again helps only after a human has acted.
    """

    exit_status = 1
    retryable = False
    retry_after: float | None = None
    urgent = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, where, and how to mend it."""

    where: str
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f"\n      remedy: {self.remedy}" if self.remedy else ""
        return f"{self.where}: {self.what}{remedy}"


class _Problems(BridgeError):
    exit_status = 2

    def __init__(self, title: str, problems: Sequence[Problem]) -> None:
        super().__init__(title + "".join(f"\n  - {problem}" for problem in problems))
        self.problems = tuple(problems)


class ConfigError(_Problems):
    """The configuration file is wrong. Carries all of its problems, not the first."""


class SetupError(_Problems):
    """The database, the bus or the queue is not what the configuration says it is."""


class SourceError(BridgeError):
    """The replication side of the legacy database."""


class SourceDisconnected(SourceError):
    """The replication connection ended. The slot keeps our place; connect again."""

    retryable = True


class SlotInUse(SourceError):
    """Another process holds the replication slot: a second replica of this bridge, or its zombie walsender."""

    retryable = True
    retry_after = 0.5  # whoever waits for the slot takes it over this soon; backing off would only cost time


class SlotLost(SourceError):
    """The slot is missing, invalidated or not ours. Changes may be lost for ever, so nothing goes on by itself."""


class SlotGap(SlotLost):
    """The database is ours, and the slot is missing, invalidated or was moved: a new one and a backfill can make up."""


class DecodeError(SourceError):
    """A pgoutput message that cannot be what the server meant to send.

    ``kind`` is the message's type byte, ``offset`` where in it the reader stood, ``lsn`` where in the WAL it began.
    """

    def __init__(self, what: str, *, kind: str, offset: int, lsn: str = "?") -> None:
        super().__init__(
            f"pgoutput message {kind!r} at LSN {lsn}, offset {offset}: {what}",
            hint="keep the slot, report this message with the server's version; nothing after it was acknowledged",
        )
        self.what, self.kind, self.offset, self.lsn = what, kind, offset, lsn


class SinkError(BridgeError):
    """The place where events go."""


class SinkUnavailable(SinkError):
    """Not known that any entry was accepted: all of them must be tried again, under the same ids."""

    retryable = True


class SinkRefused(SinkError):
    """The sink will never take this: a permission, a name, a size. A human must act."""


class QueueError(BridgeError):
    """The place where the new system's events come from."""


class QueueUnavailable(QueueError):
    """The queue did not answer; its messages are still there."""

    retryable = True


class LegacyUnavailable(BridgeError):
    """The legacy database could not be reached, or had no room, or asked us to try again."""

    retryable = True


class OriginInUse(LegacyUnavailable):
    """Another session has the replication origin of ``loop-guard: origin``. A replica waits for it, a command ends."""

    retry_after = 0.5  # as SlotInUse
