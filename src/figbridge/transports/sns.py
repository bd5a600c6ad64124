"""An SNS topic, standard or FIFO, by PublishBatch: https://docs.aws.amazon.com/sns/latest/api/API_PublishBatch.html

A message is the body of the event (`Event.body`). In a FIFO topic the key of the row is the message group, so that the
events of a row are delivered in order, and the event's id is the deduplication id. A standard topic keeps no order.

Messages have no attributes, which would count as bytes: subscribers filter on the body's own source and
detail-type, with ``FilterPolicyScope=MessageBody``.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from figbridge.config import SnsSinkSection
from figbridge.event import Event
from figbridge.transports import Limits, aws
from figbridge.transports.awssink import AwsSink, Refusal, by_id, message, xml_safe

# bytes of all messages of a request together, where the topic's MaximumMessageSize says nothing else
_MOST_BYTES: Final = 256 * 1024
_STANDARD: Final = Limits(entries=10, entry_bytes=_MOST_BYTES, batch_bytes=_MOST_BYTES, partial=True, ordered=False)
_FIFO: Final = replace(_STANDARD, ordered=True, dedup=300.0)


class SnsSink(AwsSink):
    """One topic. See `figbridge.transports.Sink`."""

    name = "sns"
    service = "sns"
    action = "sns:Publish"
    look_up_action = "sns:GetTopicAttributes"
    content = frozenset({"BatchRequestTooLong", "InvalidParameter", "ParameterValueInvalid"})

    def __init__(self, section: SnsSinkSection) -> None:
        self._topic = section.topic
        self._fifo = section.topic.endswith(".fifo")
        super().__init__(section, _FIFO if self._fifo else _STANDARD, resource=f"the topic {section.topic}")

    def size(self, event: Event) -> int:
        """Bytes of the message; it has no attributes, which would count."""
        return len(xml_safe(event.body()))

    def look_up(self) -> None:
        """GetTopicAttributes; the largest request is a setting of the topic."""
        attributes = self._client.boto.get_topic_attributes(TopicArn=self._topic).get("Attributes", {})
        most = int(attributes.get("MaximumMessageSize", _MOST_BYTES))
        self.limits = replace(self.limits, entry_bytes=most, batch_bytes=most)

    def entry(self, event: Event, payload: bytes, index: int) -> dict[str, Any]:
        """See `AwsSink.entry`."""
        return message(event, self.fit(xml_safe(payload)), str(index), "Message", fifo=self._fifo)

    def send(self, entries: list[dict[str, Any]]) -> Sequence[Refusal | None]:
        """PublishBatch."""
        with aws.reading():
            answer = self._client.boto.publish_batch(TopicArn=self._topic, PublishBatchRequestEntries=entries)
        return by_id(answer, [it["Id"] for it in entries])
