"""A Kinesis data stream, by PutRecords: https://docs.aws.amazon.com/kinesis/latest/APIReference/API_PutRecords.html

The key of the row is the partition key, so that all events of a row go to one shard. PutRecords itself keeps no order
between the records of a request, and a shard that is throttled refuses single ones: the publisher never puts two
events of a key into one request, which is what makes the order of a row hold.

Kinesis drops no repetitions: consumers go by the event's id.
"""

from binascii import b2a_base64
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import orjson
import structlog

from figbridge.config import KinesisSinkSection
from figbridge.errors import SinkRefused, SinkUnavailable
from figbridge.event import Event
from figbridge.transports import Limits
from figbridge.transports.awssink import JsonSink, Refusal, Unfit, body, in_order, plain

_log = structlog.get_logger()

_KIB = 1024
# of a record: what every stream takes that was not set otherwise (MaxRecordSizeInKiB); of a request: PutRecords
_LIMITS: Final = Limits(entries=500, entry_bytes=1024 * _KIB, batch_bytes=10 * 1024 * _KIB, partial=True)


class KinesisSink(JsonSink):
    """One stream. See `figbridge.transports.Sink`."""

    name = "kinesis"
    service = "kinesis"
    action = "kinesis:PutRecords"
    operation = "PutRecords"
    look_up_action = "kinesis:DescribeStreamSummary"
    content = frozenset({"InvalidArgumentException", "ValidationException"})

    def __init__(self, section: KinesisSinkSection) -> None:
        super().__init__(section, _LIMITS, resource=f"the stream {section.stream}")
        self._stream = {"StreamARN" if section.stream.startswith("arn:") else "StreamName": section.stream}

    def size(self, event: Event) -> int:
        """Bytes of the data and of the partition key, before base64."""
        return event.body_size() + len(plain(event.key))

    def look_up(self) -> None:
        """DescribeStreamSummary; the largest record is a setting of the stream."""
        found = self._client.boto.describe_stream_summary(**self._stream)["StreamDescriptionSummary"]
        status = found.get("StreamStatus", "ACTIVE")
        if status == "CREATING":
            raise SinkUnavailable(f"{self.resource} is still being created", hint="the bridge waits for it")
        if status == "DELETING":
            raise SinkRefused(f"{self.resource} is being deleted", hint="create it again when it is gone")
        if found.get("RecordDistributionStrategy") == "AUTO":
            _log.warning(
                "the stream spreads records without regard to their partition key, so the events of a row are not in "
                "order",
                stream=next(iter(self._stream.values())),
                hint="set its record distribution strategy to USER_PARTITION_KEY",
            )
        self.limits = replace(self.limits, entry_bytes=_KIB * found.get("MaxRecordSizeInKiB", 1024))

    def entry(self, event: Event, payload: bytes, index: int) -> bytes:  # noqa: ARG002
        """See `AwsSink.entry`."""
        key = plain(event.key)
        if (size := len(payload) + len(key)) > self.limits.entry_bytes:
            raise Unfit("EntryTooLarge", f"{size} bytes, and {self.resource} takes {self.limits.entry_bytes}")
        return b'{"Data":"%b","PartitionKey":%b}' % (b2a_base64(payload, newline=False), orjson.dumps(key))

    def send(self, entries: list[bytes]) -> Sequence[Refusal | None]:
        """PutRecords."""
        answer = self.request(body(entries, "Records", self._stream), **self._stream)
        return in_order(answer, "Records", "SequenceNumber")
