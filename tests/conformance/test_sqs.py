"""SQS as a source, over HTTP to an emulator: the suite of all sources, and what is SQS's own."""

import contextlib
import json
import socket
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import boto3
import pytest
from moto.server import ThreadedMotoServer
from structlog.testing import capture_logs

from conformance.source_suite import SourceFeatures, SourceHarness, SourceSuite, take
from figbridge.config import SqsSourceSection
from figbridge.errors import QueueError, QueueUnavailable
from figbridge.transports import open_source
from figbridge.transports.sqs import SqsDelivery, SqsSource
from fixtures.anyhttp import FOREIGN, AnyHttp

if TYPE_CHECKING:
    from mypy_boto3_sqs.literals import QueueAttributeNameType


def section(url: str, endpoint: str, **options: Any) -> SqsSourceSection:
    given = {"type": "sqs", "queue_url": url, "endpoint_url": endpoint, "visibility-timeout": 5}
    return SqsSourceSection.model_validate({**given, **options})


@dataclass
class SqsHarness:
    endpoint: str
    fifo: bool
    features: ClassVar[SourceFeatures] = SourceFeatures(any_bytes=False, patience=8.0)

    def __post_init__(self) -> None:
        self.client = boto3.client("sqs", endpoint_url=self.endpoint)
        attributes: dict[QueueAttributeNameType, str] = {"FifoQueue": "true"} if self.fifo else {}
        name = f"reverse-{uuid.uuid4()}{'.fifo' if self.fifo else ''}"
        self.url = self.client.create_queue(QueueName=name, Attributes=attributes)["QueueUrl"]

    def open(self) -> SqsSource:
        return SqsSource(section(self.url, self.endpoint))

    def open_missing(self) -> SqsSource:
        return SqsSource(section(f"{self.url}-of-nobody", self.endpoint))

    def put(self, bodies: Sequence[bytes]) -> None:
        for body in bodies:
            if self.fifo:
                # a group for each: the suite settles them one by one, and a group would lock
                self.client.send_message(
                    QueueUrl=self.url,
                    MessageBody=body.decode(),
                    MessageGroupId=str(uuid.uuid4()),
                    MessageDeduplicationId=str(uuid.uuid4()),
                )
            else:
                self.client.send_message(QueueUrl=self.url, MessageBody=body.decode())


class TestStandardQueue(SourceSuite):
    @pytest.fixture
    def harness(self, aws_endpoint: str) -> SourceHarness:
        return SqsHarness(aws_endpoint, fifo=False)


class TestFifoQueue(SourceSuite):
    @pytest.fixture
    def harness(self, aws_endpoint: str) -> SourceHarness:
        return SqsHarness(aws_endpoint, fifo=True)


def test_the_configuration_opens_it(aws_endpoint: str) -> None:
    harness = SqsHarness(aws_endpoint, fifo=False)
    source = open_source(section(harness.url, aws_endpoint))
    source.check()
    assert source.name == "sqs"
    source.close()


def test_a_missing_queue_names_itself_and_the_remedy(aws_endpoint: str) -> None:
    missing = SqsHarness(aws_endpoint, fifo=False).open_missing()
    for call in (missing.check, lambda: missing.receive(wait=0)):
        with pytest.raises(QueueError, match="of-nobody") as caught:
            call()
        assert not caught.value.retryable
        assert "create" in caught.value.hint
        assert "sqs:DeleteMessage" in caught.value.hint


def test_an_endpoint_that_does_not_answer_is_unavailable() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        endpoint = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        source = SqsSource(section(f"{endpoint}/123456789012/reverse", endpoint))
        for call in (source.check, lambda: source.receive(wait=0)):
            with pytest.raises(QueueUnavailable) as caught:
                call()
            assert caught.value.retryable
            assert caught.value.hint


def test_a_refused_permission_names_the_rights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moto checks policies only after a set-up over HTTP; here its answer is AWS's."""
    import botocore.exceptions

    harness_section = section("http://127.0.0.1:9/1/q", "http://127.0.0.1:9")
    source = SqsSource(harness_section)
    answer: Any = {"Error": {"Code": "AccessDenied", "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": 403}}

    def refuse(**_: Any) -> None:
        raise botocore.exceptions.ClientError(answer, "GetQueueAttributes")

    monkeypatch.setattr(source._client.boto, "get_queue_attributes", refuse)
    with pytest.raises(QueueError, match="AccessDenied") as caught:
        source.check()
    assert not caught.value.retryable
    assert "sqs:GetQueueAttributes" in caught.value.hint


def test_a_receive_is_ten_messages_at_most(aws_endpoint: str) -> None:
    harness = SqsHarness(aws_endpoint, fifo=False)
    harness.put([b"x"] * 12)
    assert len(harness.open().receive(wait=1)) == 10


@pytest.mark.parametrize("fifo", [False, True])
def test_an_expired_receipt_is_logged_and_the_message_comes_again(aws_endpoint: str, *, fifo: bool) -> None:
    harness = SqsHarness(aws_endpoint, fifo=fifo)
    harness.put([b"a", b"b"])
    source = harness.open()
    first, second = take(source, 2)
    harness.client.purge_queue(QueueUrl=harness.url)  # whatever becomes of the messages, the receipts are void
    with capture_logs() as logs:
        first.ack()
        second.nack()
    told = [line for line in logs if "action" in line]  # the heartbeat may have noticed, too
    assert all("expired" in line["event"] and "visibility-timeout" in line["hint"] for line in told)


def test_text_of_a_bus_comes_as_its_rule_sends_it(aws_endpoint: str) -> None:
    """PutEvents → rule → queue: the envelope that the parser is made for."""
    harness = SqsHarness(aws_endpoint, fifo=False)
    publish_through_a_rule(harness, {"id": 7, "name": "żółw 🌳"})
    (delivery,) = take(harness.open(), 1)
    envelope = json.loads(delivery.body)
    assert (envelope["source"], envelope["detail-type"]) == ("shop.next", "order.placed")
    assert envelope["detail"] == {"id": 7, "name": "żółw 🌳"}


def publish_through_a_rule(harness: SqsHarness, *details: dict[str, Any]) -> None:
    """Each detail as an event of shop.next, by EventBridge, into the harness's queue."""
    events = boto3.client("events", endpoint_url=harness.endpoint)
    bus = f"shop-{uuid.uuid4()}"
    events.create_event_bus(Name=bus)
    events.put_rule(Name="reverse", EventBusName=bus, EventPattern=json.dumps({"source": ["shop.next"]}))
    attributes = harness.client.get_queue_attributes(QueueUrl=harness.url, AttributeNames=["QueueArn"])
    arn = attributes["Attributes"]["QueueArn"]
    events.put_targets(Rule="reverse", EventBusName=bus, Targets=[{"Id": "queue", "Arn": arn}])
    entry = {"EventBusName": bus, "Source": "shop.next", "DetailType": "order.placed"}
    answer = events.put_events(Entries=[{**entry, "Detail": json.dumps(detail)} for detail in details])  # type: ignore[typeddict-item]  # a dict display is no TypedDict
    assert answer["FailedEntryCount"] == 0


def test_a_queue_that_answers_again_needs_no_new_source() -> None:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    port = server.get_host_and_port()[1]
    harness = SqsHarness(f"http://127.0.0.1:{port}", fifo=False)
    harness.put([b"kept"])
    source = harness.open()
    server.stop()
    with pytest.raises(QueueUnavailable):
        source.receive(wait=0)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port)
    server.start()
    try:
        assert take(source, 1)[0].body == b"kept"
    finally:
        server.stop()


@pytest.mark.parametrize("answer", FOREIGN.values(), ids=FOREIGN)
def test_an_answer_that_is_none_of_awss_is_unavailable(answer: tuple[int, bytes]) -> None:
    status, body = answer
    with AnyHttp(lambda *_: (status, body, {})) as server:
        source = SqsSource(section(f"{server.url}/123456789012/reverse", server.url))
        delivery = SqsDelivery(source, {"ReceiptHandle": "r", "Body": "x"}, 0, 0)
        for call in (
            source.check,
            lambda: source.receive(wait=0),
            lambda: source.acknowledge([delivery]),
            delivery.ack,
            delivery.nack,
            lambda: source._extend(["r"], 5),
        ):
            with contextlib.suppress(QueueUnavailable):
                call()
        source.close()


@pytest.mark.parametrize("message", [b"null", b"{}", b'{"ReceiptHandle":"r"}'])
def test_what_is_no_message_is_no_answer(message: bytes) -> None:
    with AnyHttp(lambda *_: (200, b'{"Messages":[%b],"Failed":[%b]}' % (message, message), {})) as server:
        source = SqsSource(section(f"{server.url}/123456789012/reverse", server.url))
        delivery = SqsDelivery(source, {"ReceiptHandle": "r", "Body": "x"}, 0, 0)
        for call in (lambda: source.receive(wait=0), lambda: source.acknowledge([delivery])):
            with pytest.raises(QueueUnavailable, match="is not AWS"):
                call()
        source.close()
