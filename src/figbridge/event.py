"""What the world is told: the event, and the sink's word on an event it did not take."""

import functools
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import orjson


class Event(NamedTuple):
    """One event on its way out.

    id           derived from the change's position, never generated: a replay carries the same one
    source       EventBridge ``Source``, such as ``legacy.shop``
    detail_type  EventBridge ``DetailType``, such as ``orders.updated``
    key          what order is kept by: the table and the row's key; equal keys leave in commit order
    time         when the legacy transaction committed
    detail       the JSON object, UTF-8, without a newline (so that a line of a file is an event)

    A NamedTuple because it is made once per row on the hot path.
    """

    id: str
    source: str
    detail_type: str
    key: str
    time: datetime
    detail: bytes

    def envelope(self) -> bytes:
        """The event as EventBridge delivers it to a target: one JSON object, UTF-8, no newline.

        The local bus and the file sink store this form, so one reader understands all of them.
        Field names: https://docs.aws.amazon.com/eventbridge/latest/ref/overiew-event-structure.html
        (``account``, ``region`` and ``resources`` are AWS's to fill in.)
        """
        return b'{"version":"0","id":%b,%b%b}' % (
            orjson.dumps(self.id),
            _attributes(self.source, self.detail_type, self.time),
            self.detail,
        )


@functools.lru_cache(maxsize=4096)
def _attributes(source: str, detail_type: str, time: datetime) -> bytes:
    """The envelope between id and detail: the same for all rows of a table in a transaction, so made once for them.

    In UTC, because equal times of two zones share a place in the cache and must read the same.
    """
    fields = {"source": source, "detail-type": detail_type, "time": time.astimezone(UTC)}
    return orjson.dumps(fields, option=orjson.OPT_UTC_Z)[1:-1] + b',"detail":'


@dataclass(frozen=True, slots=True)
class Rejection:
    """An event the sink refused, alone; the others of its batch are durable.

    ``code`` is the service's own error code. ``retryable`` False means that no repetition can succeed.
    """

    event: Event
    code: str
    message: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class Received:
    """One event on its way in, parsed but not interpreted.

    ``id`` is the producer's (or the bus's) id, never the transport's message id: a transport gives a repeated event
    a new one. ``document`` is the whole envelope, which the paths of a mapping start from; its numbers are int and
    Decimal, so no digit is lost.
    """

    id: str
    source: str
    detail_type: str
    document: dict[str, Any]
