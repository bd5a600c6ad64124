"""Amazon EventBridge, by PutEvents: https://docs.aws.amazon.com/eventbridge/latest/APIReference/API_PutEvents.html

Invariant: an event counts as durable only when AWS answered an EventId for its own entry.

Refuses to publish to a bus that it did not look up: PutEvents answers for an unknown bus with success and event ids,
and the events are gone. So the bus is looked up before the first event and again every minute.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

import orjson

from figbridge.config import EventBridgeSinkSection
from figbridge.errors import SinkRefused, SinkUnavailable
from figbridge.event import Event, Rejection
from figbridge.retry import Backoff
from figbridge.transports import Limits, aws
from figbridge.transports.awssink import JsonSink, Refusal, Unfit, in_order

# "The total entry size must be less than 1MB", all entries of a request together (256 KB until January 2026).
_MOST_BYTES = 1024 * 1024 - 1
_LIMITS: Final = Limits(entries=10, entry_bytes=_MOST_BYTES, batch_bytes=_MOST_BYTES, partial=True, ordered=False)
_TIME_BYTES = 14  # what the time counts for, however it is written
_MOST_DETAIL_TYPE = 128  # characters
_LOOK_UP_EVERY = 60.0  # seconds; the most that a bus deleted behind our back can swallow, where looking up works
_ASK_AGAIN = 10.0  # seconds, or less, after a look that failed


class EventBridgeSink(JsonSink):
    """One event bus. See `figbridge.transports.Sink`."""

    name = "eventbridge"
    service = "events"
    action = "events:PutEvents"
    operation = "PutEvents"
    look_up_action = "events:DescribeEventBus"
    content = frozenset()

    def __init__(self, section: EventBridgeSinkSection, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(section, _LIMITS, resource=f"the event bus {section.bus}")
        self._bus = section.bus
        self._bus_name = orjson.dumps(section.bus)
        self._trace = section.trace_header
        self._clock = clock
        self._looked_up: float | None = None
        self._asks_again = 0.0
        self._asking = threading.Lock()
        self._backoff, self._failed = Backoff(f"look up the event bus {section.bus} again", longest=_ASK_AGAIN), 0

    def size(self, event: Event) -> int:
        """Bytes of the entry by AWS's formula.

        https://docs.aws.amazon.com/eventbridge/latest/userguide/eb-putevents.html#eb-putevent-size
        """
        named = _utf8(event.source) + _utf8(event.detail_type) + sum(map(_utf8, event.resources))
        return _TIME_BYTES + named + event.content_size()

    def look_up(self) -> None:
        """DescribeEventBus."""
        aws.proven(self._client.boto.describe_event_bus(Name=self._bus), "Name")
        self._looked_up, self._failed = self._clock(), 0

    def publish(self, events: Sequence[Event]) -> Sequence[Rejection]:
        """See `AwsSink.publish`."""
        if events:
            self._look_up_again()
        return super().publish(events)

    def payloads(self, events: Sequence[Event]) -> Sequence[bytes]:
        """The envelope is EventBridge's own to make."""
        return events[0].contents(events) if events else ()

    def entry(self, event: Event, payload: bytes, index: int) -> bytes:  # noqa: ARG002
        """See `AwsSink.entry`; the codes are what PutEvents would answer."""
        if (size := self.size(event)) > _MOST_BYTES:
            raise Unfit("EntryTooLarge", f"{size} bytes, and EventBridge takes {_MOST_BYTES}")
        if not event.source or not event.detail_type:
            raise Unfit("InvalidArgument", "source and detail-type must not be empty")
        if event.source.startswith("aws."):
            raise Unfit(
                "NotAuthorizedForSourceException", f"source {event.source!r}: EventBridge keeps aws. for itself"
            )
        if (length := len(event.detail_type)) > _MOST_DETAIL_TYPE:
            raise Unfit("InvalidArgument", f"detail-type of {length} characters, EventBridge takes {_MOST_DETAIL_TYPE}")
        if not payload.startswith(b"{"):
            raise Unfit("MalformedDetail", "the detail is not a JSON object")
        more = b""
        if event.resources:
            more = b',"Resources":%b' % orjson.dumps(event.resources)
        if self._trace:
            more += b',"TraceHeader":%b' % orjson.dumps(aws.trace_header(self._trace, event.id, event.time))
        return b'{"Source":%b,"DetailType":%b,"Detail":%b,"Time":%r,"EventBusName":%b%b}' % (
            orjson.dumps(event.source),
            orjson.dumps(event.detail_type),
            orjson.dumps(payload.decode()),
            event.time.timestamp(),
            self._bus_name,
            more,
        )

    def send(self, entries: list[bytes]) -> Sequence[Refusal | None]:
        """PutEvents."""
        answer = self.request(b'{"Entries":[%b]}' % b",".join(entries))
        return in_order(answer, "Entries", "EventId")

    def fault(self, code: str, message: str) -> str | None:
        """A region whose limit is still the old one answers a ValidationException like any other, but for its text.

        "Total size of the entries in the request is over the limit".
        """
        return "EntryTooLarge" if code == "ValidationException" and "size" in message else None

    def _look_up_again(self) -> None:
        if self._looked_up is None:
            self.check()
        elif self._is_due(self._looked_up) and self._asking.acquire(blocking=False):  # one thread; the others go on
            try:
                if self._is_due(self._looked_up):  # and not by somebody else just now
                    self._ask_again(self._looked_up)
            finally:
                self._asking.release()

    def _is_due(self, looked_up: float) -> bool:
        return self._clock() >= max(looked_up + _LOOK_UP_EVERY, self._asks_again)

    def _ask_again(self, looked_up: float) -> None:
        try:
            self.check()
        except SinkUnavailable as error:
            # the bus was there a minute ago, and DescribeEventBus has a small quota of its own
            self._failed += 1
            self._asks_again = self._clock() + self._backoff.seconds(error, self._failed)
        except SinkRefused as error:
            if "NotFound" in str(error):
                error.hint = (
                    f"{self._bus} was there {self._clock() - looked_up:.0f} s ago; what was published since may "
                    "be lost. Create it again, with its rules, and compare the tables with their consumers"
                )
            raise


def _utf8(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
