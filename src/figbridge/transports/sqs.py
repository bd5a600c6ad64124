"""Amazon SQS as a source: usually the target of an EventBridge rule.

Invariant: a message leaves the queue only by `ack`. While we hold it, a heartbeat keeps it invisible, however long the
database takes (`visibility`); when nobody does any more, it becomes visible by itself, so a crash needs no clean-up.

A receipt that has expired is not an error: the message is (or will be) in somebody's hands again, and the inbox makes
the repetition harmless. It is logged, because a visibility timeout that is too short makes every message come twice.

FIFO: SQS hands out no later message of a group while we hold one, and `receive` keeps its order. An event that has to
wait is parked, so it is not in the queue's way, and holds up later events of its own entity alone; or, with
``reverse.order: group``, all later ones of its group, in this replica and in every other (`reverse.park`). A dead
letter ends that: the event is safe and can be applied again, and its group goes on. What we hold and cannot apply any
more, on a stop or without the database, is given back at once, a group from its first message on.

Refuses to order a standard queue: it does not keep order itself. Use a FIFO queue where order counts.
https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_ReceiveMessage.html
"""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

import structlog

from figbridge.config import SqsSourceSection
from figbridge.errors import QueueError, QueueUnavailable
from figbridge.transports import Delivery, aws
from figbridge.transports.awsclient import Client
from figbridge.transports.visibility import LONGEST, Heartbeat, Held

_log = structlog.get_logger()

_BATCH: Final = 10  # most messages of one ReceiveMessage
_LONGEST_POLL: Final = 20  # seconds
_CERTAIN: Final = 0.9  # of the visibility timeout is left, surely, when an answer has come

# How DeleteMessage and ChangeMessageVisibility say that the receipt is of yesterday. A FIFO queue says
# InvalidParameterValue: https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_DeleteMessage.html
_EXPIRED: Final = ("ReceiptHandleIsInvalid", "MessageNotInflight", "InvalidParameterValue")
_OF_A_RECEIPT: Final = ("DeleteMessage", "ChangeMessageVisibility")
_RIGHTS: Final = "sqs:GetQueueAttributes, sqs:ReceiveMessage, sqs:DeleteMessage and sqs:ChangeMessageVisibility"


class SqsSource:
    """A queue. See `figbridge.transports.Source`."""

    name = "sqs"

    def __init__(self, section: SqsSourceSection) -> None:
        self._url = section.queue_url
        self.queue = section.queue_url.rstrip("/").rpartition("/")[2]
        self._visibility_timeout = section.visibility_timeout
        self._client = Client("sqs", section)
        self._heartbeat = Heartbeat(section.visibility_timeout, self._extend)

    def check(self) -> None:
        """See `Source.check`."""
        with self._asking("GetQueueAttributes"):
            self._client.boto.get_queue_attributes(QueueUrl=self._url, AttributeNames=["QueueArn"])

    def receive(self, *, wait: float) -> Sequence["SqsDelivery"]:
        """See `Source.receive`; `wait` is rounded up to seconds, and at most 20 of them."""
        waited = min(_LONGEST_POLL, math.ceil(wait))
        with self._asking("ReceiveMessage"):
            answer = self._client.boto.receive_message(
                QueueUrl=self._url,
                MaxNumberOfMessages=_BATCH,
                WaitTimeSeconds=waited,
                VisibilityTimeout=self._visibility_timeout,
                MessageSystemAttributeNames=["ApproximateReceiveCount", "MessageGroupId"],
            )
            # invisible since the answer was made: a little before now
            now, seconds = time.monotonic(), self._visibility_timeout * _CERTAIN
            deliveries = [SqsDelivery(self, message, now, seconds) for message in answer.get("Messages", [])]
        self._heartbeat.hold([it.held for it in deliveries])
        return deliveries

    def delete(self, receipt: str) -> None:
        """Remove a message. Raises QueueUnavailable or QueueError."""
        self._heartbeat.let_go([receipt])
        self._settle("DeleteMessage", self._client.boto.delete_message, ReceiptHandle=receipt)

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """See `Source.acknowledge`; ten a request. A receipt that has expired is not an error, as in `delete`."""
        receipts = [delivery.receipt for delivery in deliveries if isinstance(delivery, SqsDelivery)]
        self._heartbeat.let_go(receipts)
        for begin in range(0, len(receipts), _BATCH):
            part = receipts[begin : begin + _BATCH]
            entries = [{"Id": str(number), "ReceiptHandle": receipt} for number, receipt in enumerate(part)]
            with self._asking("DeleteMessageBatch"):
                answer = self._client.boto.delete_message_batch(QueueUrl=self._url, Entries=entries)
                failed = [part[int(it["Id"])] for it in answer.get("Failed", [])]
            for receipt in failed:
                self.delete(receipt)  # alone, so that its own error says what is wrong

    def hide(self, receipt: str, seconds: int) -> None:
        """Make a message visible again in `seconds`. Raises QueueUnavailable or QueueError."""
        self._heartbeat.let_go([receipt])
        self._settle(
            "ChangeMessageVisibility",
            self._client.boto.change_message_visibility,
            ReceiptHandle=receipt,
            VisibilityTimeout=seconds,
        )

    def close(self) -> None:
        """Close the connections; what is unsettled becomes visible by itself."""
        self._heartbeat.close()
        self._client.close()

    def _extend(self, receipts: Sequence[str], seconds: int) -> list[str]:
        """Keep these invisible for `seconds`, 0 for not at all; the ones whose receipts are void."""
        entries = [
            {"Id": str(number), "ReceiptHandle": receipt, "VisibilityTimeout": seconds}
            for number, receipt in enumerate(receipts)
        ]
        with self._asking("ChangeMessageVisibilityBatch"):
            answer = self._client.boto.change_message_visibility_batch(QueueUrl=self._url, Entries=entries)
            return [receipts[int(it["Id"])] for it in answer.get("Failed", []) if it.get("SenderFault", True)]

    def _settle(self, action: str, call: Any, **parameters: Any) -> None:
        try:
            with self._asking(action):
                call(QueueUrl=self._url, **parameters)
        except _ReceiptExpired as error:
            _log.warning(
                "the receipt of a message expired; it is delivered again",
                action=action,
                code=error.code,
                hint="if this is frequent, raise visibility-timeout",
            )

    @contextlib.contextmanager
    def _asking(self, action: str) -> Iterator[None]:
        """Around a call and the reading of its answer. Raises _ReceiptExpired, QueueUnavailable or QueueError."""
        try:
            with aws.reading():
                yield
        except aws.ERRORS as error:
            code, retryable = aws.classify(error)
            if code in _EXPIRED and action in _OF_A_RECEIPT:
                raise _ReceiptExpired(code) from error
            if aws.expired(code):
                what = f"the queue {self._url} refused {action}: {error}"
                raise self._client.expired(QueueUnavailable(what)) from error
            if retryable:
                raise QueueUnavailable(
                    f"the queue {self._url} did not answer to {action}: {error}",
                    hint="its messages are kept; if it lasts, check the network, the region and endpoint_url",
                ) from error
            raise QueueError(
                f"the queue {self._url} refused {action}: {error}",
                hint=f"{aws.remedy(code.rpartition('.')[2], action=f'sqs:{action}', resource=self._url)} "
                f"(the bridge needs {_RIGHTS})",
            ) from error


class _ReceiptExpired(Exception):
    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


class SqsDelivery:
    """A received message. See `figbridge.transports.Delivery`."""

    __slots__ = ("_source", "attempts", "body", "held", "receipt")

    def __init__(self, source: SqsSource, message: dict[str, Any], received: float, seconds: float) -> None:
        self._source = source
        self.receipt: str = message["ReceiptHandle"]
        attributes = message.get("Attributes", {})
        self.held = Held(self.receipt, attributes.get("MessageGroupId"), received, seconds)
        # a lone surrogate cannot be in an SQS message, but an emulator may let it pass: it is for the parser to refuse
        self.body: bytes = message["Body"].encode(errors="surrogatepass")
        self.attempts = int(attributes.get("ApproximateReceiveCount", 1))

    @property
    def lost(self) -> bool:
        """See `Delivery.lost`."""
        return self.held.lost

    @property
    def group(self) -> str | None:
        """See `Delivery.group`; the queue's name and the message group id."""
        return None if self.held.group is None else f"{self._source.queue}/{self.held.group}"

    def ack(self) -> None:
        """See `Delivery.ack`."""
        self._source.delete(self.receipt)

    def nack(self, *, delay: float = 0.0) -> None:
        """See `Delivery.nack`; rounded up to seconds, at most 12 hours."""
        self._source.hide(self.receipt, min(LONGEST, math.ceil(delay)))
