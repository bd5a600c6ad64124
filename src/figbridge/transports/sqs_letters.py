"""Dead letters in an SQS queue, where alarms and tools of a team that lives by queues find them.

A queue has no way to look without taking: what is shown is hidden from others meanwhile, and given back at the end.
How much can be in hand is bounded, so a queue cannot be searched without end; a table or S3 can.

A letter that is larger than a message goes to S3, body only, if `bucket` is set; the object is durable before the
message is sent. It is not deleted, because a letter that was repeated is two messages with one body: give the prefix a
lifecycle rule of 15 days, one more than a queue keeps a message.

Rights: sqs:SendMessage, sqs:GetQueueAttributes; the command also sqs:ReceiveMessage, sqs:DeleteMessage and
sqs:ChangeMessageVisibility. With `bucket`: s3:PutObject, s3:ListBucket; the command s3:GetObject.
https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/quotas-messages.html
"""

import contextlib
import hashlib
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Final, NamedTuple

import orjson

from figbridge.config import SqsDeadLetters
from figbridge.deadletter import DeadLetter, Kept, Unreadable, Wanted, dump, parse
from figbridge.errors import BridgeError, SinkError, SinkRefused, SinkUnavailable
from figbridge.transports import aws
from figbridge.transports.awsclient import Client
from figbridge.transports.awssink import xml_safe

_LARGEST: Final = 1_048_576  # bytes of a message, and of a request
_BATCH: Final = 10  # messages of a receive
_HIDDEN: Final = 300  # seconds that a message is ours; when it takes longer, it comes again, which is harmless
_WAIT: Final = 1  # seconds; a poll without waiting asks some of the queue's servers only, and may find nothing
_HELD: Final = 10_000  # receipts in memory, half a kilobyte each; SQS itself allows 120,000
_READ: Final = ("MessageId", "ReceiptHandle", "Body")
_AGAIN: Final = "nothing is lost; the bridge tries again"


class _Place(NamedTuple):
    message: str
    receipt: str


class SqsDeadLetterStore:
    """A queue, with a bucket for large bodies if there is one. Raises BridgeError without a region or credentials."""

    def __init__(self, section: SqsDeadLetters) -> None:
        self._url, self._bucket, self._prefix = section.queue_url, section.bucket, section.prefix
        self._client = Client("sqs", section)
        self._s3 = Client("s3", section) if section.bucket else None
        self._most: int | None = None
        self._held: dict[str, _Place] = {}  # by message; what `scan` has to give back
        self.name = section.queue_url

    def add(self, letters: Sequence[DeadLetter]) -> None:
        """See `DeadLetters.add`; a request each, for letters are rare and may be large. Raises as `check`."""
        for letter in letters:
            parameters = {}
            if self._url.endswith(".fifo"):  # no order among letters, so that none holds up the ones behind it
                parameters = {"MessageGroupId": letter.id, "MessageDeduplicationId": letter.id}
            text = self._message(letter)
            with self._asking("sqs:SendMessage"):
                answer = self._client.boto.send_message(QueueUrl=self._url, MessageBody=text, **parameters)
                aws.proven(answer, "MessageId")

    def check(self) -> None:
        """The queue, and the bucket, are there. Raises SinkRefused, SinkUnavailable.

        That the queue may be written to is shown by the first letter: there is no message that nobody would read.
        """
        self._look_up()
        if self._s3:
            with self._asking("s3:ListBucket"):
                self._s3.boto.head_bucket(Bucket=self._bucket)

    def scan(self, wanted: Wanted) -> Generator[Kept, None, None]:
        """See `DeadLetterStore.scan`: in no order.

        What is not removed is given back at the end. Raises BridgeError when more than 10,000 letters would have to be
        held for that.
        """
        try:
            while messages := self._receive():
                around = any(it["MessageId"] in self._held for it in messages)
                self._held |= {it["MessageId"]: _Place(it["MessageId"], it["ReceiptHandle"]) for it in messages}
                if around:  # hidden for so long that it came again: everything has been seen
                    return
                for message in messages:
                    letter = self._read(message)
                    if letter in wanted:
                        yield Kept(letter, self._held[message["MessageId"]])
                if len(self._held) > _HELD:
                    raise BridgeError(
                        f"more than {_HELD} letters of {self.name} were looked at, and a queue cannot be searched",
                        hint="those that were dealt with are done, and all others are in the queue; redrive or discard "
                        "with a filter that fits more of them. A table or S3 can be searched without a bound",
                    )
        finally:
            self._give_back()

    def remove(self, kept: Sequence[Kept]) -> None:
        """See `DeadLetterStore.remove`. Raises SinkUnavailable, SinkRefused."""
        for it in kept:
            place: _Place = it.place
            with self._asking("sqs:DeleteMessage"):
                self._client.boto.delete_message(QueueUrl=self._url, ReceiptHandle=place.receipt)
            self._held.pop(place.message, None)

    def update(self, kept: Sequence[Kept]) -> None:
        """See `DeadLetterStore.update`: a message cannot be changed, and another one would come to the same scan."""

    def close(self) -> None:
        """Close the clients' connections."""
        self._client.close()
        if self._s3:
            self._s3.close()

    def _message(self, letter: DeadLetter) -> str:
        text = xml_safe(dump(letter))
        most = self._most if self._most is not None else self._look_up()
        if len(text) <= most:
            return text.decode()
        if self._s3 is None:
            raise SinkRefused(
                f"the letter of event {letter.event_id} is {len(text)} bytes, and {self.name} takes {most}",
                hint="name a bucket for such bodies in this section (forward.dead-letters.bucket), or keep dead "
                "letters in S3 or in a table",
            )
        name = f"{self._prefix}{letter.id}.body"
        with self._asking("s3:PutObject"):
            answer = self._s3.boto.put_object(Bucket=self._bucket, Key=name, Body=letter.body)
            aws.proven(answer, "ETag")
        digest = hashlib.sha256(letter.body).hexdigest()
        where = {"bucket": self._bucket, "key": name, "bytes": len(letter.body), "sha256": digest}
        return xml_safe(dump(letter, body_in=where)).decode()

    def _read(self, message: dict[str, Any]) -> DeadLetter:
        text = message["Body"].encode()
        try:
            body = None
            where = orjson.loads(text).get("body_in")
            if where:
                if self._s3 is None or where["bucket"] != self._bucket:
                    raise BridgeError(
                        f"the body of a letter of {self.name} is in the bucket {where['bucket']}",
                        hint="name that bucket in the section of the dead letters",
                    )
                key = where["key"]
                with self._asking("s3:GetObject"):
                    body = self._s3.boto.get_object(Bucket=self._bucket, Key=key)["Body"].read()
            return parse(text, body)
        except (ValueError, AttributeError, KeyError, TypeError, Unreadable) as error:
            raise BridgeError(
                f"{self.name} holds a message that is no dead letter of figbridge's ({message['MessageId']})",
                hint="give the dead letters a queue of their own; a queue's own redrive handles other messages",
            ) from error

    def _receive(self) -> list[dict[str, Any]]:
        with self._asking("sqs:ReceiveMessage"):
            answer = self._client.boto.receive_message(
                QueueUrl=self._url, MaxNumberOfMessages=_BATCH, VisibilityTimeout=_HIDDEN, WaitTimeSeconds=_WAIT
            )
            return [{name: it[name] for name in _READ} for it in answer.get("Messages", ())]

    def _give_back(self) -> None:
        places = list(self._held.values())
        self._held.clear()
        for begin in range(0, len(places), _BATCH):
            entries = [
                {"Id": str(number), "ReceiptHandle": place.receipt, "VisibilityTimeout": 0}
                for number, place in enumerate(places[begin : begin + _BATCH])
            ]
            with contextlib.suppress(*aws.ERRORS), aws.reading():  # then it is visible by itself after `_HIDDEN`
                self._client.boto.change_message_visibility_batch(QueueUrl=self._url, Entries=entries)

    def _look_up(self) -> int:
        names = ["MaximumMessageSize"]
        with self._asking("sqs:GetQueueAttributes"):
            answer = self._client.boto.get_queue_attributes(QueueUrl=self._url, AttributeNames=names)
            most = min(_LARGEST, int(answer.get("Attributes", {}).get("MaximumMessageSize", _LARGEST)))
        self._most = most
        return most

    @contextlib.contextmanager
    def _asking(self, action: str) -> Iterator[None]:
        """Around a call and the reading of its answer. Raises SinkUnavailable, SinkRefused."""
        try:
            with aws.reading():
                yield
        except aws.ERRORS as error:
            raise self._translated(error, action) from error

    def _translated(self, error: Exception, action: str) -> SinkError:
        code, retryable = aws.classify(error)
        in_s3 = self._s3 if action.startswith("s3:") else None
        resource = f"the bucket {self._bucket}" if in_s3 else self.name
        what = f"{action} on {resource}: {code}: {error}"
        if aws.expired(code):
            return (in_s3 or self._client).expired(SinkUnavailable(what))
        if retryable:
            return SinkUnavailable(what, hint=_AGAIN)
        # HeadBucket has no body, so its errors have no code but the status
        code = {"404": "NoSuchBucket", "403": "AccessDenied"}.get(code, code).rpartition(".")[2]
        return SinkRefused(what, hint=aws.remedy(code, action=action, resource=resource))
