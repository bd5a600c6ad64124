"""Amazon EventBridge, by PutEvents: https://docs.aws.amazon.com/eventbridge/latest/APIReference/API_PutEvents.html

Invariant: an event counts as durable only when AWS answered an EventId for its own entry.

Refuses to publish to a bus that it did not look up: PutEvents answers for an unknown bus with success and event ids,
and the events are gone. So the bus is looked up before the first event and again every minute.
Entries that AWS would not take are returned without being sent, because a single one that is too large makes AWS
refuse the whole request.
"""

import time
from collections.abc import Callable, Sequence
from datetime import UTC
from typing import Any, Final

import structlog

from figbridge.config import EventBridgeSinkSection
from figbridge.errors import SinkError, SinkRefused, SinkUnavailable
from figbridge.event import Event, Rejection
from figbridge.transports import Limits, aws

_log = structlog.get_logger()

# "The total entry size must be less than 1MB", all entries of a request together (256 KB until January 2026).
_MOST_BYTES = 1024 * 1024 - 1
_LIMITS: Final = Limits(entries=10, entry_bytes=_MOST_BYTES, batch_bytes=_MOST_BYTES, partial=True)
_TIME_BYTES = 14  # what the time counts for, however it is written
_MOST_DETAIL_TYPE = 128  # characters
_LOOK_UP_EVERY = 60.0  # seconds; the most that a bus deleted behind our back can swallow

# Codes of an entry that are about who we are, not about the entry: the next one would fare no better.
_FORBIDDEN: Final = ("AccessDenied", "NotAuthorized", "InvalidAccountId")


class EventBridgeSink:
    """One event bus. Raises BridgeError when made without a region or credentials."""

    name = "eventbridge"
    limits = _LIMITS

    def __init__(self, section: EventBridgeSinkSection, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._bus = section.bus
        # botocore's own check of the parameters takes a third of the CPU of a call; `_flaw` says more, for less
        self._client = aws.client("events", section, validate=False)
        self._clock = clock
        self._looked_up: float | None = None

    def size(self, event: Event) -> int:
        """Bytes of the entry by AWS's formula.

        https://docs.aws.amazon.com/eventbridge/latest/userguide/eb-putevents.html#eb-putevent-size
        """
        return _TIME_BYTES + _utf8(event.source) + _utf8(event.detail_type) + len(event.detail)

    def check(self) -> None:
        """Look the bus up (events:DescribeEventBus). Raises SinkRefused, SinkUnavailable.

        That we may put events is shown by the first one only: a policy can depend on source and detail-type, so an
        entry made up for the purpose would prove nothing.
        """
        try:
            self._client.describe_event_bus(Name=self._bus)
        except aws.ERRORS as error:
            raise self._translated(error, "events:DescribeEventBus") from error
        self._looked_up = self._clock()

    def publish(self, events: Sequence[Event]) -> Sequence[Rejection]:
        """One PutEvents. Returns the entries that were not taken; raises SinkUnavailable, SinkRefused."""
        rejections = []
        sent = []
        entries = []
        for event in events:
            if flaw := self._flaw(event):
                rejections.append(Rejection(event, *flaw, retryable=False))
                continue
            try:
                entries.append(self._entry(event))
            except UnicodeDecodeError as error:  # a database of encoding SQL_ASCII holds any bytes
                rejections.append(Rejection(event, "MalformedDetail", str(error), retryable=False))
                continue
            sent.append(event)
        if not entries:
            return rejections
        self._look_up_again()
        try:
            results = self._client.put_events(Entries=entries).get("Entries", ())
        except aws.ERRORS as error:
            if len(sent) == 1 and _too_large(error):
                # a region whose limit is still the old one: it is about this entry, not about the bus
                return [*rejections, Rejection(sent[0], "EntryTooLarge", str(error), retryable=False)]
            raise self._translated(error, "events:PutEvents") from error
        if len(results) != len(sent):
            raise SinkUnavailable(
                f"PutEvents answered {len(results)} results for {len(sent)} entries: which were taken is not known",
                hint="look at what stands between the bridge and AWS, a proxy perhaps; all of them are sent again",
            )
        refused = [_rejection(event, result) for event, result in zip(sent, results, strict=True) if not _taken(result)]
        self._stop_if_forbidden(refused, len(sent))
        return [*rejections, *refused]

    def close(self) -> None:
        """Close the client's connections."""
        self._client.close()

    def _entry(self, event: Event) -> dict[str, Any]:
        return {
            "Source": event.source,
            "DetailType": event.detail_type,
            "Detail": event.detail.decode(),
            "Time": event.time.astimezone(UTC),  # botocore drops the offset of any other zone
            "EventBusName": self._bus,
        }

    def _flaw(self, event: Event) -> tuple[str, str] | None:
        """(code, message) of why AWS would not take `event`; the codes are AWS's own but for EntryTooLarge."""
        if (size := self.size(event)) > _MOST_BYTES:
            return "EntryTooLarge", f"{size} bytes, and EventBridge takes {_MOST_BYTES}"
        if not event.source or not event.detail_type:
            return "InvalidArgument", "source and detail-type must not be empty"
        if event.source.startswith("aws."):
            return "NotAuthorizedForSourceException", f"source {event.source!r}: EventBridge keeps aws. for itself"
        if len(event.detail_type) > _MOST_DETAIL_TYPE:
            length = len(event.detail_type)
            return "InvalidArgument", f"detail-type of {length} characters, EventBridge takes {_MOST_DETAIL_TYPE}"
        if not event.detail.startswith(b"{"):
            return "MalformedDetail", "the detail is not a JSON object"
        return None

    def _look_up_again(self) -> None:
        if self._looked_up is not None and self._clock() - self._looked_up < _LOOK_UP_EVERY:
            return
        try:
            self.check()
        except SinkUnavailable as error:
            if self._looked_up is None:
                raise
            # the bus was there a minute ago, and DescribeEventBus has a small quota of its own: ask next time
            _log.warning("could not look the bus up again", bus=self._bus, error=str(error))
        except SinkRefused as error:
            if self._looked_up is not None and "NotFound" in str(error):
                error.hint = (
                    f"{self._bus} was there {self._clock() - self._looked_up:.0f} s ago; what was published since may "
                    "be lost. Create it again, with its rules, and compare the tables with their consumers"
                )
            raise

    def _stop_if_forbidden(self, refused: Sequence[Rejection], sent: int) -> None:
        """Raise when every entry was refused for our rights: dead-lettering all that follows would help nobody."""
        if len(refused) < sent or not all(it.code.startswith(_FORBIDDEN) for it in refused):
            return
        first = refused[0]
        raise SinkRefused(
            f"EventBridge refused every entry: {first.code}: {first.message}",
            hint=aws.remedy(first.code, action="events:PutEvents", resource=f"the event bus {self._bus}"),
        )

    def _translated(self, error: Exception, action: str) -> SinkError:
        code, retryable = aws.classify(error)
        what = f"{action} on {self._bus}: {code}: {error}"
        if retryable:
            return SinkUnavailable(what, hint="nothing is lost; the bridge tries again")
        return SinkRefused(what, hint=aws.remedy(code, action=action, resource=f"the event bus {self._bus}"))


def _taken(result: dict[str, Any]) -> bool:
    return bool(result.get("EventId")) and not result.get("ErrorCode")


def _rejection(event: Event, result: dict[str, Any]) -> Rejection:
    code = result.get("ErrorCode")
    if not code:  # neither taken nor refused: the one safe reading is "again"
        return Rejection(event, "NoAnswer", "neither an EventId nor an ErrorCode", retryable=True)
    return Rejection(event, code, result.get("ErrorMessage") or "", retryable=aws.retryable(code))


def _too_large(error: Exception) -> bool:
    # "Total size of the entries in the request is over the limit": a ValidationException like any other, but for this
    return aws.classify(error)[0] == "ValidationException" and "size" in str(error)


def _utf8(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
