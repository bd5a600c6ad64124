"""The bus as the new system sees it: the same story on the embedded bus and on Amazon EventBridge with SQS.

On AWS this is plain boto3 (`AwsBus`), nothing of figbridge: PutEvents out, ReceiveMessage in, DeleteMessage when done.
"""

import json
import math
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol

from figbridge.errors import BridgeError
from figbridge.event import Event
from figbridge.transports import Delivery

SOURCE: Final = "shop.next"  # what the new system calls itself on the bus
LEGACY: Final = "legacy."  # what the events of legacy systems begin with
BUS: Final = "shop"
INBOUND_QUEUE: Final = "new-system"
BATCH: Final = 10  # entries of PutEvents, messages of ReceiveMessage: AWS's limit for both


@dataclass(frozen=True, slots=True)
class Entry:
    """An event of ours on its way out."""

    detail_type: str
    detail: dict[str, Any]


class BusUnavailable(Exception):
    """The bus did not answer, or took only a part; try again."""


class Bus(Protocol):
    """Receive, then acknowledge; publish. At least once, in any order. Each of them raises BusUnavailable."""

    def receive(self, *, wait: float) -> Sequence[bytes]:
        """The next events; none when there are none within about `wait` seconds."""

    def acknowledge(self) -> None:
        """All that the last `receive` returned is done with. Without this call it comes again."""

    def publish(self, entries: Sequence[Entry]) -> None:
        """Return when all `entries` (`BATCH` at most) are on the bus; if it raises, some may be."""


def open_bus(address: str) -> Bus:
    """From ``local:<file>`` or ``aws:<endpoint URL>``."""
    kind, _, place = address.partition(":")
    match kind:
        case "local":
            return LocalBus(Path(place))
        case "aws":
            return AwsBus(place)
    raise ValueError(f"not the address of a bus: {address!r}")


class AwsBus:
    """A queue that an EventBridge rule fills, and PutEvents."""

    def __init__(self, endpoint: str) -> None:
        import boto3  # noqa: PLC0415 (0.2 s that the embedded bus does not need)
        from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415 (see above)

        self._failures = BotoCoreError, ClientError
        self._events = boto3.client("events", endpoint_url=endpoint)
        self._sqs = boto3.client("sqs", endpoint_url=endpoint)
        self._queue = self._sqs.get_queue_url(QueueName=INBOUND_QUEUE)["QueueUrl"]
        self._receipts: list[str] = []

    def receive(self, *, wait: float) -> Sequence[bytes]:
        """See `Bus.receive`."""
        try:
            answer = self._sqs.receive_message(
                QueueUrl=self._queue, MaxNumberOfMessages=BATCH, WaitTimeSeconds=math.ceil(wait)
            )
        except self._failures as error:
            raise BusUnavailable(str(error)) from error
        messages = answer.get("Messages", [])
        self._receipts = [message["ReceiptHandle"] for message in messages]
        return [message["Body"].encode() for message in messages]

    def acknowledge(self) -> None:
        """See `Bus.acknowledge`."""
        if not self._receipts:
            return
        try:
            # a message that could not be deleted comes again, and is a duplicate then
            self._sqs.delete_message_batch(
                QueueUrl=self._queue,
                Entries=[{"Id": str(n), "ReceiptHandle": receipt} for n, receipt in enumerate(self._receipts)],
            )
        except self._failures as error:
            raise BusUnavailable(str(error)) from error

    def publish(self, entries: Sequence[Entry]) -> None:
        """See `Bus.publish`."""
        try:
            answer = self._events.put_events(
                Entries=[
                    {
                        "EventBusName": BUS,
                        "Source": SOURCE,
                        "DetailType": entry.detail_type,
                        "Detail": json.dumps(entry.detail),
                    }
                    for entry in entries
                ]
            )
        except self._failures as error:
            raise BusUnavailable(str(error)) from error
        # PutEvents answers 200 also when it took none of them
        if answer["FailedEntryCount"]:
            raise BusUnavailable(f"PutEvents refused {answer['FailedEntryCount']} entries: {answer['Entries']}")


class LocalBus:
    """figbridge's embedded bus: one SQLite file."""

    def __init__(self, path: Path) -> None:
        from figbridge.transports.local import LocalSink, LocalSource  # noqa: PLC0415 (nor AWS this)

        self._sink = LocalSink(path)
        self._source = LocalSource(path, subscriber=INBOUND_QUEUE, sources=(f"{LEGACY}*",))
        self._deliveries: Sequence[Delivery] = ()

    def receive(self, *, wait: float) -> Sequence[bytes]:
        """See `Bus.receive`."""
        with _translated():
            self._deliveries = self._source.receive(wait=wait)
        return [delivery.body for delivery in self._deliveries]

    def acknowledge(self) -> None:
        """See `Bus.acknowledge`."""
        with _translated():
            for delivery in self._deliveries:
                delivery.ack()

    def publish(self, entries: Sequence[Entry]) -> None:
        """See `Bus.publish`."""
        now = datetime.now(UTC)
        events = [
            Event(
                id=str(uuid.uuid4()),  # as EventBridge does: an event that is put twice has two ids
                source=SOURCE,
                detail_type=entry.detail_type,
                key=entry.detail["change_id"],
                time=now,
                detail=json.dumps(entry.detail).encode(),
            )
            for entry in entries
        ]
        with _translated():
            self._sink.publish(events)  # it takes all or raises


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except BridgeError as error:
        if not error.retryable:
            raise
        raise BusUnavailable(str(error)) from error
