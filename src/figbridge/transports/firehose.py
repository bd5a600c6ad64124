"""A Firehose stream: https://docs.aws.amazon.com/firehose/latest/APIReference/API_PutRecordBatch.html

A record is one line, the body of the event and a newline, so that what lands in S3 is JSON lines.

Firehose keeps no order and drops no repetitions; whoever reads the store goes by the position and the id of an event.
"""

from binascii import b2a_base64
from collections.abc import Sequence
from typing import Final

from figbridge.config import FirehoseSinkSection
from figbridge.errors import SinkRefused, SinkUnavailable
from figbridge.event import Event
from figbridge.transports import Limits
from figbridge.transports.awssink import JsonSink, Refusal, Unfit, body, in_order

_MOST_BYTES = 1_024_000  # "1,000 KiB" of a record, before base64
# "4 MB for the entire request"; read as the smaller of the two megabytes
_LIMITS: Final = Limits(entries=500, entry_bytes=_MOST_BYTES, batch_bytes=4_000_000, partial=True, ordered=False)


class FirehoseSink(JsonSink):
    """One stream. See `figbridge.transports.Sink`."""

    name = "firehose"
    service = "firehose"
    action = "firehose:PutRecordBatch"
    operation = "PutRecordBatch"
    look_up_action = "firehose:DescribeDeliveryStream"
    content = frozenset({"InvalidArgumentException"})

    def __init__(self, section: FirehoseSinkSection) -> None:
        super().__init__(section, _LIMITS, resource=f"the Firehose stream {section.stream}")
        self._stream = section.stream

    def size(self, event: Event) -> int:
        """Bytes of the line, before base64."""
        return event.body_size() + 1

    def look_up(self) -> None:
        """DescribeDeliveryStream; one that reads a Kinesis stream takes nothing from us."""
        answer = self._client.boto.describe_delivery_stream(DeliveryStreamName=self._stream)
        found = answer["DeliveryStreamDescription"]
        status, kind = found.get("DeliveryStreamStatus", "ACTIVE"), found.get("DeliveryStreamType", "DirectPut")
        if status == "CREATING":
            raise SinkUnavailable(f"{self.resource} is still being created", hint="the bridge waits for it")
        if status != "ACTIVE":
            raise SinkRefused(f"{self.resource} is {status}", hint="create it again, or choose another")
        if kind != "DirectPut":
            raise SinkRefused(
                f"{self.resource} has a source of its own ({kind}), so it takes no records from applications",
                hint="publish to that source (sink type kinesis), or create a Firehose stream of the type Direct PUT",
            )

    def entry(self, event: Event, payload: bytes, index: int) -> bytes:  # noqa: ARG002
        """See `AwsSink.entry`."""
        line = payload + b"\n"
        if len(line) > _MOST_BYTES:
            raise Unfit("EntryTooLarge", f"{len(line)} bytes, and Firehose takes {_MOST_BYTES}")
        return b'{"Data":"%b"}' % b2a_base64(line, newline=False)

    def send(self, entries: list[bytes]) -> Sequence[Refusal | None]:
        """PutRecordBatch."""
        frame = {"DeliveryStreamName": self._stream}
        answer = self.request(body(entries, "Records", frame))
        return in_order(answer, "RequestResponses", "RecordId")
