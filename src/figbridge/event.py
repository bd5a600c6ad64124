"""What the world is told: the event, and the sink's word on an event it did not take."""

import functools
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import orjson


class Event(NamedTuple):
    """One event on its way out.

    id           derived from the change's position, never generated: a replay carries the same one
    source       EventBridge ``Source``, such as ``legacy.shop``
    detail_type  EventBridge ``DetailType``, such as ``orders.updated``
    key          what order is kept by: the table and the row's key; equal keys leave in commit order
    time         when the legacy transaction committed
    detail       the JSON object, UTF-8, without a newline (so that a line of a file is an event)
    old_key      the row's key before the change, where the change is of the key itself: order is kept by both
    whole_table  it is about all rows of its table (a truncate, a change of the schema): no event of the table may
                 overtake it, nor be overtaken
    resources    EventBridge ``Resources``: ARNs, or whatever the set-up has for them

    A NamedTuple because it is made once per row on the hot path. What a sink sends of it is `body`, or `content` where
    the service makes the envelope; a format (`figbridge.formats`) is a subclass that says otherwise.
    """

    id: str
    source: str
    detail_type: str
    key: str
    time: datetime
    detail: bytes
    old_key: str | None = None
    whole_table: bool = False
    resources: tuple[str, ...] = ()

    def envelope(self) -> bytes:
        """The event as EventBridge delivers it to a target: one JSON object, UTF-8, no newline.

        The local bus and the file sink store this form, so one reader understands all of them.
        Field names: https://docs.aws.amazon.com/eventbridge/latest/ref/overiew-event-structure.html
        (``account`` and ``region`` are AWS's to fill in; ``resources`` is there if there are any.)
        """
        return envelopes([self])[0]

    def body(self) -> bytes:
        """The message of a sink that carries messages as they are: one JSON object, UTF-8, no newline."""
        return self.bodies([self])[0]

    def body_size(self) -> int:
        """Bytes of `body`, without making it."""
        time = _WITH_MICROSECONDS if self.time.microsecond else _WHOLE_SECOND
        names = _names(self.source, self.detail_type, self.resources)
        return _FRAME + len(orjson.dumps(self.id)) + len(names) + time + len(self.detail)

    def content_size(self) -> int:
        """Bytes of what `contents` gives of it."""
        return len(self.detail)

    @staticmethod
    def bodies(events: "Sequence[Event]") -> list[bytes]:
        """`body` of each, for less than one by one; all are of one format."""
        return envelopes(events)

    @staticmethod
    def contents(events: "Sequence[Event]") -> list[bytes]:
        """What a bus that makes the envelope itself is given of each: a JSON object."""
        return [event.detail for event in events]


# Bytes of an envelope that are always there, and of its time, which has microseconds only if there are any.
_FRAME: Final = len(b'{"version":"0","id":,,"time":,"detail":}')
_WITH_MICROSECONDS: Final = len('"2026-11-23T10:08:02.698540Z"')
_WHOLE_SECOND: Final = len('"2026-11-23T10:08:02Z"')


def envelopes(events: Iterable[Event]) -> list[bytes]:
    """`Event.envelope` of each, for less: neighbours mostly have source, detail-type and time in common."""
    lines = []
    join = b"".join
    last_time = last_type = last_source = last_resources = None
    between = b""
    for identity, source, detail_type, _, time, detail, _, _, resources in events:
        if (
            time is not last_time
            or detail_type is not last_type
            or source is not last_source
            or resources is not last_resources
        ):
            between = attributes(source, detail_type, time, resources)
            last_time, last_type, last_source, last_resources = time, detail_type, source, resources
        lines.append(join((b'{"version":"0","id":', orjson.dumps(identity), between, detail, b"}")))
    return lines


def attributes(source: str, detail_type: str, time: datetime, resources: tuple[str, ...]) -> bytes:
    """The envelope between id and detail: the same for all rows of a table in a transaction, so made once for them."""
    return b',%b,"time":%b,"detail":' % (_names(source, detail_type, resources), utc(time))


def utc(time: datetime) -> bytes:
    """A JSON string, as RFC 3339 has it: ``"2026-11-23T10:08:02.698540Z"``."""
    if time.tzinfo is not UTC:
        time = time.astimezone(UTC)
    return orjson.dumps(time, option=orjson.OPT_UTC_Z)


@functools.lru_cache(maxsize=4096)
def _names(source: str, detail_type: str, resources: tuple[str, ...]) -> bytes:
    names: dict[str, object] = {"source": source, "detail-type": detail_type}
    return orjson.dumps(names | {"resources": resources} if resources else names)[1:-1]


@dataclass(frozen=True, slots=True)
class Rejection:
    """An event the sink refused, alone; the others of its batch are durable.

    ``code`` is the service's own error code. ``retryable`` False means that no repetition can succeed.
    """

    event: Event
    code: str
    message: str
    retryable: bool


class Lines(Sequence[Event]):
    """Events that can say their envelopes for less than one by one.

    `lines` may end early, because others wait: then that is all, and the length says so.
    """

    @abstractmethod
    def lines(self) -> Iterable[bytes]:
        """`Event.envelope` of each, with a line break behind it, in some parts, which are made when they are taken."""


class Named(NamedTuple):
    """What is kept of an event on its way in once its statements are made. See `Received`."""

    id: str
    source: str
    detail_type: str


class Received(NamedTuple):
    """One event on its way in, parsed but not interpreted.

    ``id`` is the producer's (or the bus's) id, never the transport's message id: a transport gives a repeated event
    a new one. ``document`` is the whole envelope, which the paths of a mapping start from; its numbers are int and
    Decimal, so no digit is lost.
    """

    id: str
    source: str
    detail_type: str
    document: dict[str, Any]
