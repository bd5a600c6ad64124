"""What is held in an SQS queue stays ours for as long as we hold it; what is lost is not applied."""

import json
import threading
import time
import uuid
from typing import TYPE_CHECKING, Any

import boto3
import pytest
from moto.server import ThreadedMotoServer
from structlog.testing import capture_logs

from conformance.source_suite import take
from conformance.test_sqs import section
from figbridge.config import MappingSection
from figbridge.deadletter import TableDeadLetterStore
from figbridge.metrics import Metrics
from figbridge.reverse.apply import Applier
from figbridge.reverse.consume import Consumer
from figbridge.reverse.mapping import Mappings
from figbridge.transports.sqs import SqsSource
from figbridge.transports.visibility import Heartbeat, Held
from fixtures.clock import until
from fixtures.postgres import Database
from fixtures.reverse import count, make_shop, mapping

if TYPE_CHECKING:
    from mypy_boto3_sqs.literals import QueueAttributeNameType

SHORT = 1.5  # seconds of visibility: less than the configuration allows, for a test is in a hurry


class Queue:
    """A queue and its clients."""

    def __init__(self, endpoint: str, *, fifo: bool) -> None:
        self.client = boto3.client("sqs", endpoint_url=endpoint)
        attributes: dict[QueueAttributeNameType, str] = {"FifoQueue": "true"} if fifo else {}
        name = f"held-{uuid.uuid4()}{'.fifo' if fifo else ''}"
        self.url = self.client.create_queue(QueueName=name, Attributes=attributes)["QueueUrl"]
        self.endpoint = endpoint

    def open(self, timeout: float = SHORT) -> SqsSource:
        source = SqsSource(section(self.url, self.endpoint))
        source._visibility_timeout = 2  # what ReceiveMessage asks for
        source._heartbeat = Heartbeat(timeout, source._extend)
        return source

    def put(self, body: str, group: str | None = None) -> None:
        more = {"MessageGroupId": group, "MessageDeduplicationId": str(uuid.uuid4())} if group else {}
        self.client.send_message(QueueUrl=self.url, MessageBody=body, **more)  # type: ignore[arg-type]

    @property
    def counts(self) -> tuple[int, int]:
        """(visible, in flight)"""
        names: list[Any] = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        found: dict[Any, str] = dict(
            self.client.get_queue_attributes(QueueUrl=self.url, AttributeNames=names)["Attributes"]
        )
        return int(found[names[0]]), int(found[names[1]])


@pytest.mark.parametrize("fifo", [False, True])
def test_a_held_message_stays_invisible_however_long_it_takes(aws_endpoint: str, *, fifo: bool) -> None:
    queue = Queue(aws_endpoint, fifo=fifo)
    for number in range(12):
        queue.put(str(number), f"g{number}" if fifo else None)
    source = queue.open()
    held = take(source, 12)
    deadline = time.monotonic() + 3 * SHORT
    until(lambda: time.monotonic() > deadline or queue.counts != (0, 12), 20)
    assert queue.counts == (0, 12)
    assert not any(it.lost for it in held)
    source.acknowledge(held)
    assert queue.counts == (0, 0)
    source.close()


def test_what_nobody_holds_any_more_becomes_visible(aws_endpoint: str) -> None:
    queue = Queue(aws_endpoint, fifo=False)
    queue.put("a")
    source = queue.open()
    take(source, 1)
    source.close()
    until(lambda: queue.counts == (1, 0))


def test_a_void_receipt_is_lost_and_so_is_what_is_behind_it_in_its_group(aws_endpoint: str) -> None:
    queue = Queue(aws_endpoint, fifo=True)
    for number in range(6):
        queue.put(str(number), f"g{number % 2}")
    source = queue.open()
    held = take(source, 6)
    victim = next(it for it in held if it.body == b"2")
    queue.client.delete_message(QueueUrl=queue.url, ReceiptHandle=victim.receipt)  # type: ignore[attr-defined]
    with capture_logs() as logs:
        until(lambda: victim.lost)
        until(lambda: all(it.lost for it in held if it.body in (b"0", b"4")))
    assert [it.body for it in held if not it.lost] == [b"1", b"3", b"5"]
    assert any(line["log_level"] == "warning" and line["behind"] == 2 for line in logs)
    # made visible at once: another one gets the rest of the group, in order
    other = queue.open()
    assert [it.body for it in take(other, 2)] == [b"0", b"4"]
    source.close()
    other.close()


def test_when_the_queue_does_not_answer_the_clock_decides() -> None:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    queue = Queue(f"http://127.0.0.1:{server.get_host_and_port()[1]}", fifo=False)
    queue.put("a")
    source = queue.open()
    (held,) = take(source, 1)
    server.stop()
    with capture_logs() as logs:
        until(lambda: held.lost, 20)
    assert any("invisible" in line["event"] for line in logs)
    source.close()


def test_nobody_holds_a_message_for_more_than_twelve_hours() -> None:
    asked: list[int] = []
    heartbeat = Heartbeat(60, lambda _receipts, seconds: asked.append(seconds) or ())  # type: ignore[func-returns-value]
    old = Held("r", None, time.monotonic() - 43190, 43192)
    heartbeat._extend([old])
    assert asked == [60]
    assert old.until == old.received + 43200


@pytest.mark.parametrize("fifo", [False, True])
def test_what_is_lost_while_it_is_applied_is_rolled_back(database: Database, aws_endpoint: str, *, fifo: bool) -> None:
    """The statements wait for a lock of the legacy application; meanwhile a message goes to somebody else."""
    make_shop(database)
    queue = Queue(aws_endpoint, fifo=fifo)
    for number in range(4):
        body = {"id": f"e{number}", "source": "shop.next", "detail-type": "order", "detail": {"id": number}}
        queue.put(json.dumps(body), "g" if fifo else None)
    source, stop = queue.open(), threading.Event()
    received: list[Any] = []
    receive = source.receive

    def noted(*, wait: float) -> Any:
        found = receive(wait=wait)
        received.extend(found)
        return found

    source.receive = noted  # type: ignore[method-assign]
    mappings = Mappings([MappingSection.model_validate(mapping("insert").section.model_dump(by_alias=True))])
    consumer = Consumer(
        source, mappings, Applier(database.dsn, statement_timeout=60, lock_timeout=60),
        TableDeadLetterStore(database.dsn), Metrics(), park_timeout=60,
    )  # fmt: skip
    thread = threading.Thread(target=consumer.run, args=(stop,), daemon=True)
    with database.connect() as application:
        application.execute("BEGIN; LOCK TABLE shop.orders")
        thread.start()
        until(lambda: len(received) == 4, 20)
        waiting = "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted AND database = (SELECT oid FROM pg_database "
        waiting += "WHERE datname = current_database())"
        until(lambda: database.execute(waiting)[0][0], 20)
        victim = next(it for it in received if json.loads(it.body)["id"] == "e1")
        queue.client.delete_message(QueueUrl=queue.url, ReceiptHandle=victim.receipt)
        until(lambda: victim.lost, 20)
        application.execute("COMMIT")
    if fifo:  # e1 is gone for good here; all others come again, to us
        until(lambda: count(database, "shop.orders") == 3, 20)
        assert len(received) == 7
    else:
        until(lambda: count(database, "shop.orders") == 3, 20)
        assert len(received) == 4
    until(lambda: queue.counts == (0, 0), 20)
    stop.set()
    thread.join(60)
    assert database.execute("SELECT idempotency_key FROM figbridge.inbox ORDER BY 1") == [("e0",), ("e2",), ("e3",)]
