"""A dead letter, what a store of them does, and the form in which a letter is written to a file, S3 or SQS."""

import base64
import binascii
import hashlib
import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, Protocol, Self

import orjson

from figbridge.config import Direction
from figbridge.event import Event, Rejection

_GROUP: Final = 500  # letters
_GROUP_BYTES: Final = 8 * 1024 * 1024  # of their bodies, and one letter more
# The end of a row's id: commit LSN and ordinal (`figbridge.forward.place`).
_POSITION: Final = ("commit_lsn", "ordinal", "lsn", "xid")
_LSN: Final = re.compile(r"[0-9A-F]{1,8}/[0-9A-F]{1,8}")
_PLACE: Final = re.compile(r"-([0-9A-F]{8})([0-9A-F]{8})-([0-9A-F]{8})")


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One undeliverable event. ``body`` is its envelope, or the message as it came when it was not an event.

    statement    the SQL that failed, without its values
    table        schema.table that it is about, or was for; None where nobody knows
    position     where in the legacy database's history it was: commit_lsn, ordinal; None for an event of others
    key          what order is kept by (`Event.key`), with old_key and whole_table; of forward letters
    created_at   when it became a letter
    """

    direction: Direction
    event_id: str | None
    reason: str
    message: str
    attempts: int
    body: bytes
    statement: str = ""
    table: str | None = None
    position: dict[str, Any] | None = None
    key: str | None = None
    old_key: str | None = None
    whole_table: bool = False
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def id(self) -> str:
        """Derived from direction and body, so that a repeated letter is the same letter."""
        return hashlib.sha256(self.direction.encode() + b"\0" + self.body).hexdigest()

    @classmethod
    def of(cls, rejection: Rejection, attempts: int) -> Self:
        """The letter of an event that the sink will never take."""
        event = rejection.event
        detail = _object(event.detail)
        return cls(
            "forward",
            event.id,
            rejection.code,
            rejection.message,
            attempts,
            event.envelope(),
            table=named_table(detail),
            position=position_of(detail) or _position_in(event.id),
            key=event.key,
            old_key=event.old_key,
            whole_table=event.whole_table,
        )

    def again(self, reason: str, message: str, statement: str = "") -> Self:
        """The same letter after one more try, which ended so."""
        return replace(self, reason=reason, message=message, statement=statement, attempts=self.attempts + 1)

    def event(self) -> Event:
        """The event of a forward letter, its detail to the byte. Raises Unreadable.

        A letter that was written before keys were kept is ordered by itself alone.
        """
        head, found, tail = self.body.partition(b',"detail":')  # unescaped, so it cannot be within a string
        try:
            if not found or not tail.endswith(b"}"):
                raise ValueError("it has no detail")  # noqa: TRY301 (one error for all of them)
            names = orjson.loads(head + b"}")
            time = datetime.fromisoformat(names["time"])
            identity, source, detail_type = str(names["id"]), str(names["source"]), str(names["detail-type"])
            resources = tuple(map(str, names.get("resources", ())))
        except (ValueError, KeyError, TypeError) as error:
            raise Unreadable(f"its body is not an envelope that figbridge wrote: {error}") from error
        key = self.key if self.key is not None else identity
        return Event(identity, source, detail_type, key, time, tail[:-1], self.old_key, self.whole_table, resources)

    @property
    def occurred_at(self) -> datetime:
        """The event's own time, which a repeated letter has as well; `created_at` where the body tells none."""
        try:
            time = datetime.fromisoformat(orjson.loads(self.body.partition(b',"detail":')[0] + b"}")["time"])
        except (ValueError, KeyError, TypeError):
            return self.created_at
        return time if time.tzinfo else time.replace(tzinfo=UTC)


class Unreadable(Exception):
    """A letter, or an event in a letter, that is not of the form in which the bridge writes it."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which letters are meant. None, and no ids, mean all.

    `ids` are beginnings of the letters' ids, or whole ids of events; `since` compares with `DeadLetter.created_at`.
    """

    direction: Direction | None = None
    reason: str | None = None
    table: str | None = None
    ids: tuple[str, ...] = ()
    since: datetime | None = None

    def __contains__(self, letter: DeadLetter) -> bool:
        if self.direction not in {None, letter.direction} or self.reason not in {None, letter.reason}:
            return False
        if self.table not in {None, letter.table} or (self.since and letter.created_at < self.since):
            return False
        return not self.ids or letter.event_id in self.ids or letter.id.startswith(self.ids)


class Kept(NamedTuple):
    """A letter and where its store has it, which only the store understands."""

    letter: DeadLetter
    place: Any


class Redriven(NamedTuple):
    """What became of a letter that was tried again: with a `reason` it is a dead letter still, without one it is gone.

    `reason` and `message` are those of this try.
    """

    letter: DeadLetter
    reason: str | None = None
    message: str = ""


class DeadLetters(Protocol):
    """Where letters are put. Called from one thread."""

    def add(self, letters: Sequence[DeadLetter]) -> None:
        """Return when all are durable. Raises a retryable BridgeError (try again) or another one."""

    def close(self) -> None:
        """Release what is held."""


class DeadLetterStore(DeadLetters, Protocol):
    """A store of dead letters, for the command that reads them. Called from one thread; others may add meanwhile."""

    @property
    def name(self) -> str:
        """For messages: what and where it is."""

    def check(self) -> None:
        """Prove that it exists and, as far as that can be asked without writing, may be written. Raises BridgeError."""

    def scan(self, wanted: Wanted) -> Generator[Kept, None, None]:
        """The wanted letters, the oldest first where the store keeps an order, in bounded memory.

        Letters that are removed meanwhile do not disturb it; of those that are added meanwhile it may show some.
        A letter may come twice where the store cannot know it. Raises BridgeError.
        """

    def remove(self, kept: Sequence[Kept]) -> None:
        """Remove letters that `scan` handed out and is not through with. Twice is no error. Raises BridgeError."""

    def update(self, kept: Sequence[Kept]) -> None:
        """Write how another try of letters that `scan` handed out ended (`DeadLetter.again`), each at its place.

        A letter that was removed meanwhile stays removed, as far as the store can tell. Nothing happens where a letter
        cannot be changed at its place. Raises BridgeError.
        """


def grouped(letters: Iterable[Kept]) -> Iterator[list[Kept]]:
    """In hands that memory has room for, however large the letters are."""
    group: list[Kept] = []
    size = 0
    for it in letters:
        group.append(it)
        size += len(it.letter.body)
        if len(group) == _GROUP or size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def named_table(detail: Any) -> str | None:
    """schema.table of a figbridge event's detail."""
    match detail:
        case {"schema": str(schema), "table": str(table)}:
            return f"{schema}.{table}"
    return None


def position_of(detail: Any) -> dict[str, Any] | None:
    """The position in a figbridge event's detail; whatever else calls itself a position is none."""
    match detail:
        case {"position": dict(position)}:
            found = {name: position[name] for name in _POSITION if _is_place(position.get(name))}
            return found if found.keys() & {"commit_lsn", "lsn"} else None
    return None


def _is_place(value: Any) -> bool:
    return bool(_LSN.fullmatch(value)) if isinstance(value, str) else isinstance(value, int) and 0 <= value < 1 << 32


def _position_in(identity: str) -> dict[str, Any] | None:
    # an outbox event may be nothing but its payload; its id says where it was all the same
    found = list(_PLACE.finditer(identity))
    if not found:
        return None
    high, low, ordinal = (int(it, 16) for it in found[-1].groups())
    return {"commit_lsn": f"{high:X}/{low:X}", "ordinal": ordinal}


def _object(detail: bytes) -> Any:
    try:
        return orjson.loads(detail)
    except ValueError:  # that may be the very reason for the letter
        return None


def dump(letter: DeadLetter, **more: Any) -> bytes:
    """One JSON object, without a newline. A body that is no UTF-8 stands there as ``body_base64``."""
    try:
        body = {"body": letter.body.decode()}
    except UnicodeDecodeError:
        body = {"body_base64": base64.b64encode(letter.body).decode()}
    written = {
        "id": letter.id,
        "direction": letter.direction,
        "event_id": writable(letter.event_id),
        "reason": letter.reason,
        "message": writable(letter.message),
        "attempts": letter.attempts,
        "table": letter.table,
        "position": letter.position,
        "key": letter.key,
        "old_key": letter.old_key,
        "whole_table": letter.whole_table,
        "statement": letter.statement or None,
        "created_at": letter.created_at,
        **more,
        **({} if "body_in" in more else body),
    }
    return orjson.dumps(written, option=orjson.OPT_UTC_Z)


def writable(text: str | None, codec: str = "utf-8") -> str | None:
    """As `codec` can have it: what it lacks, as UTF-8 half a surrogate pair, stands there as Python's escape."""
    return text.encode(codec, errors="backslashreplace").decode(codec) if text is not None else None


def parse(text: bytes, body: bytes | None = None) -> DeadLetter:
    """What `dump` wrote; `body` where it is kept elsewhere. Raises Unreadable."""
    try:
        read = orjson.loads(text)
        if body is None:
            body = read["body"].encode() if "body" in read else base64.b64decode(read["body_base64"], validate=True)
        created = read.get("created_at")
        return DeadLetter(
            read["direction"],
            read["event_id"],
            read["reason"],
            read["message"],
            int(read["attempts"]),
            body,
            read.get("statement") or "",
            read.get("table"),
            read.get("position"),
            read.get("key"),
            read.get("old_key"),
            bool(read.get("whole_table")),
            datetime.fromisoformat(created) if created else datetime.fromtimestamp(0, UTC),
        )
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
        raise Unreadable(f"not a dead letter that figbridge wrote: {type(error).__name__}") from error
