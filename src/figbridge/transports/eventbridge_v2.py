"""An EventBridge Custom Event Bus: https://docs.aws.amazon.com/eventbridgev2/latest/APIReference/API_PutEvents.html

Invariant: an event counts as durable only when AWS answered PUBLISHED or DEDUPLICATED for its own entry. DEDUPLICATED
says that the bus already has it, under the same id, so it is a success.

The key of the row is the event's group, so that a FIFO subscriber receives the events of a row in order, and the
event's id is its deduplication id: what a crash repeats within five minutes reaches no subscriber twice.

The size of a request is not limited by its model; the limit of the Classic bus is kept, in its formula.
"""

from collections.abc import Sequence
from datetime import UTC
from typing import Any, Final

from botocore.exceptions import ClientError

from figbridge.config import EventBridgeV2SinkSection
from figbridge.errors import SinkError, SinkRefused, SinkUnavailable
from figbridge.event import Event
from figbridge.transports import Limits, aws
from figbridge.transports.awssink import AwsSink, Refusal, Unfit, in_order, plain

_MOST_BYTES = 1024 * 1024 - 1
_LIMITS: Final = Limits(entries=100, entry_bytes=_MOST_BYTES, batch_bytes=_MOST_BYTES, partial=True, dedup=300.0)
_TIME_BYTES = 14
_MOST_SOURCE = 256  # characters
_MOST_DETAIL_TYPE = 128


class EventBridgeV2Sink(AwsSink):
    """One bus. See `figbridge.transports.Sink`."""

    name = "eventbridge_v2"
    service = "eventbridgev2"
    action = "events:PutEvents"
    look_up_action = "events:DescribeEventBus"
    content = frozenset({"InvalidInputException"})

    def __init__(self, section: EventBridgeV2SinkSection) -> None:
        super().__init__(section, _LIMITS, resource=f"the event bus {section.bus}")
        self._bus = section.bus

    def size(self, event: Event) -> int:
        """Bytes of the entry: time, source, detail-type, resources, detail, group and deduplication id."""
        ids = len(plain(event.key)) + len(plain(event.id))
        named = sum(len(it.encode()) for it in (event.source, event.detail_type, *event.resources))
        return _TIME_BYTES + named + event.content_size() + ids

    def look_up(self) -> None:
        """DescribeEventBus; a bus that is being made takes no events yet."""
        answer = self._client.boto.describe_event_bus(EventBusArn=self._bus)
        state, reason = answer.get("State", "ACTIVE"), answer.get("StateReason", "")
        if state == "CREATING":
            raise SinkUnavailable(f"{self.resource} is still being created", hint="the bridge waits for it")
        if state in {"CREATE_FAILED", "DELETING"}:
            raise SinkRefused(
                f"{self.resource} is {state}: {reason}", hint="create the bus again, with its subscribers"
            )

    def payloads(self, events: Sequence[Event]) -> Sequence[bytes]:
        """The envelope is EventBridge's own to make."""
        return events[0].contents(events) if events else ()

    def entry(self, event: Event, payload: bytes, index: int) -> dict[str, Any]:  # noqa: ARG002
        """See `AwsSink.entry`. One entry that AWS cannot read would make it refuse the whole request."""
        if (size := self.size(event)) > _MOST_BYTES:
            raise Unfit("EntryTooLarge", f"{size} bytes, and EventBridge takes {_MOST_BYTES}")
        for what, text, most in (
            ("source", event.source, _MOST_SOURCE),
            ("detail-type", event.detail_type, _MOST_DETAIL_TYPE),
        ):
            if not 1 <= len(text) <= most:
                raise Unfit("InvalidInputException", f"{what} of {len(text)} characters, EventBridge takes 1 to {most}")
        if event.source.startswith("aws."):
            raise Unfit("InvalidInputException", f"source {event.source!r}: EventBridge keeps aws. for itself")
        if not payload.startswith(b"{"):
            raise Unfit("InvalidInputException", "the detail is not a JSON object")
        resources = {"Resources": event.resources} if event.resources else {}
        return {
            **resources,
            "Source": event.source,
            "DetailType": event.detail_type,
            "Detail": payload.decode(),
            "Time": event.time.astimezone(UTC),  # botocore drops the offset of any other zone
            "SystemMetadata": {"EventGroupId": plain(event.key), "DeduplicationId": plain(event.id)},
        }

    def send(self, entries: list[dict[str, Any]]) -> Sequence[Refusal | None]:
        """PutEvents. FailedEntryCount may be missing, so each entry is looked at."""
        with aws.reading():
            answer = self._client.boto.put_events(EventBusArn=self._bus, Entries=entries)
        return in_order(answer, "Entries", "SuccessCode")

    def _translated(self, error: Exception, action: str) -> SinkError:
        if isinstance(error, ClientError) and error.response.get("Error", {}).get("Code") == "InvalidStateException":
            # being created: it passes; being deleted: the look-up says so, and what to do
            self.check()
            return SinkUnavailable(f"{self.resource}: {error}", hint="nothing is lost; the bridge tries again")
        return super()._translated(error, action)
