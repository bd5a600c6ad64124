"""Amazon SQS as a sink, standard or FIFO.

https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_SendMessageBatch.html

A message is the body of the event (`Event.body`). In a FIFO queue the key of the row is the message group, so that the
events of a row are received in order, and the event's id is the deduplication id, so that a repetition within five
minutes is dropped. A standard queue keeps no order and drops nothing.

A queue is FIFO if its name ends with ``.fifo``; AWS allows neither one without the other.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import orjson

from figbridge.config import SqsSinkSection
from figbridge.event import Event
from figbridge.transports import Limits, aws
from figbridge.transports.awssink import JsonSink, Refusal, body, by_id, message, xml_safe

_MOST_BYTES = 1024 * 1024  # of a message, and of all messages of a request together
_STANDARD: Final = Limits(entries=10, entry_bytes=_MOST_BYTES, batch_bytes=_MOST_BYTES, partial=True, ordered=False)
_FIFO: Final = replace(_STANDARD, ordered=True, dedup=300.0)


class SqsSink(JsonSink):
    """One queue. See `figbridge.transports.Sink`."""

    name = "sqs"
    service = "sqs"
    action = "sqs:SendMessage"
    operation = "SendMessageBatch"
    look_up_action = "sqs:GetQueueAttributes"
    content = frozenset({"BatchRequestTooLong", "InvalidMessageContents", "InvalidParameterValue"})

    def __init__(self, section: SqsSinkSection) -> None:
        self._url = section.queue_url
        self._trace = section.trace_header
        self._fifo = section.queue_url.endswith(".fifo")
        super().__init__(section, _FIFO if self._fifo else _STANDARD, resource=f"the queue {section.queue_url}")

    def size(self, event: Event) -> int:
        """Bytes of the message; its group and ids do not count, and it has no attributes, which would."""
        return len(xml_safe(event.body()))

    def look_up(self) -> None:
        """GetQueueAttributes; the largest message is a setting of the queue."""
        answer = self._client.boto.get_queue_attributes(QueueUrl=self._url, AttributeNames=["MaximumMessageSize"])
        most = int(answer.get("Attributes", {}).get("MaximumMessageSize", _MOST_BYTES))
        self.limits = replace(self.limits, entry_bytes=most)

    def entry(self, event: Event, payload: bytes, index: int) -> tuple[str, bytes]:
        """See `AwsSink.entry`; its id, and the entry."""
        number = str(index)
        entry = message(event, self.fit(xml_safe(payload)), number, "MessageBody", fifo=self._fifo)
        if self._trace:  # a system attribute, which counts for no bytes of the message
            header = aws.trace_header(self._trace, event.id, event.time)
            entry["MessageSystemAttributes"] = {"AWSTraceHeader": {"DataType": "String", "StringValue": header}}
        return number, orjson.dumps(entry)

    def send(self, entries: list[tuple[str, bytes]]) -> Sequence[Refusal | None]:
        """SendMessageBatch."""
        content = body([entry for _, entry in entries], "Entries", {"QueueUrl": self._url})
        answer = self.request(content, QueueUrl=self._url)
        return by_id(answer, [id_ for id_, _ in entries])
