"""Kinesis, Firehose, SQS and SNS as sinks: the suite of all sinks, over HTTP to an emulator.

What moto lacks, and so differs here from AWS: Kinesis still has the limits of 5 MiB a request and 1 MiB a record, and
SNS those of 256 KiB whatever the topic's attribute says.
"""

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import boto3
import pytest

from conformance.events import event
from conformance.sink_suite import SinkFeatures, SinkHarness, SinkSuite
from figbridge.transports import Sink, open_sink
from fixtures.clock import PATIENCE
from fixtures.sinks import section


def client(service: str, endpoint: str) -> Any:
    return boto3.client(service, endpoint_url=endpoint)  # type: ignore[call-overload]  # the stubs know literal names


def received(sqs: Any, url: str, count: int) -> list[bytes]:
    """Everything in a queue, `count` messages at least."""
    found: list[bytes] = []
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        answer = sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10, WaitTimeSeconds=int(len(found) < count))
        if not (messages := answer.get("Messages", [])) and len(found) >= count:
            break
        for message in messages:
            found.append(message["Body"].encode())
            sqs.delete_message(QueueUrl=url, ReceiptHandle=message["ReceiptHandle"])
    assert len(found) >= count
    return found


def queue(sqs: Any, name: str, *, fifo: bool) -> str:
    attributes = {"FifoQueue": "true"} if fifo else {}
    return str(sqs.create_queue(QueueName=name, Attributes=attributes)["QueueUrl"])


@dataclass
class Harness:
    """A place of its own for each test; `options` are those of the section, `read_all` looks into it."""

    type: str
    endpoint: str
    options: dict[str, Any]
    missing: dict[str, Any]
    features: SinkFeatures
    read_all: Callable[[int], list[bytes]]

    def open(self) -> Sink:
        return open_sink(section(self.type, self.endpoint, **self.options))

    def open_missing(self) -> Sink:
        return open_sink(section(self.type, self.endpoint, **self.missing))

    def read(self, count: int) -> list[bytes]:
        found = self.read_all(count)
        assert len(found) >= count
        return found


STANDARD = SinkFeatures(exact=True, ordered=False, unique=False)
FIFO = SinkFeatures(exact=True, ordered=True, unique=True)


CLIENTS = pytest.mark.parametrize("client_", ["boto3", "crt"])


@CLIENTS
class TestKinesis(SinkSuite):
    features: ClassVar = SinkFeatures(exact=True, ordered=True, unique=False, most=5 * 1024 * 1024)

    @pytest.fixture
    def harness(self, aws_endpoint: str, client_: str) -> SinkHarness:
        kinesis, name = client("kinesis", aws_endpoint), f"orders-{uuid.uuid4()}"
        kinesis.create_stream(StreamName=name, ShardCount=3)

        def read(_: int) -> list[bytes]:
            found = []
            for shard in kinesis.list_shards(StreamName=name)["Shards"]:
                where = {"ShardId": shard["ShardId"], "ShardIteratorType": "TRIM_HORIZON"}
                iterator = kinesis.get_shard_iterator(StreamName=name, **where)["ShardIterator"]
                while records := (answer := kinesis.get_records(ShardIterator=iterator))["Records"]:
                    found += [record["Data"] for record in records]
                    iterator = answer["NextShardIterator"]
            return found

        missing = {"stream": "no-such", "client": client_}
        return Harness("kinesis", aws_endpoint, {"stream": name, "client": client_}, missing, self.features, read)


def test_a_kinesis_stream_may_be_named_by_its_arn(aws_endpoint: str) -> None:
    client("kinesis", aws_endpoint).create_stream(StreamName="orders", ShardCount=1)
    sink = open_sink(section("kinesis", aws_endpoint, stream="arn:aws:kinesis:eu-west-1:123456789012:stream/orders"))
    sink.check()
    assert not sink.publish([event(1)])
    sink.close()


@CLIENTS
class TestFirehose(SinkSuite):
    @pytest.fixture
    def harness(self, aws_endpoint: str, client_: str) -> SinkHarness:
        firehose, s3, name = client("firehose", aws_endpoint), client("s3", aws_endpoint), f"orders-{uuid.uuid4()}"
        s3.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
        destination = {"BucketARN": f"arn:aws:s3:::{name}", "RoleARN": "arn:aws:iam::123456789012:role/firehose"}
        firehose.create_delivery_stream(DeliveryStreamName=name, ExtendedS3DestinationConfiguration=destination)

        def read(_: int) -> list[bytes]:
            keys = [it["Key"] for it in s3.list_objects_v2(Bucket=name).get("Contents", [])]
            texts = [s3.get_object(Bucket=name, Key=key)["Body"].read() for key in keys]
            return [line for text in texts for line in text.splitlines()]

        missing = {"stream": "no-such", "client": client_}
        return Harness("firehose", aws_endpoint, {"stream": name, "client": client_}, missing, STANDARD, read)


@CLIENTS
@pytest.mark.parametrize("fifo", [False, True], ids=["standard", "fifo"])
class TestSqs(SinkSuite):
    @pytest.fixture
    def harness(self, aws_endpoint: str, client_: str, *, fifo: bool) -> SinkHarness:
        sqs, name = client("sqs", aws_endpoint), f"orders-{uuid.uuid4()}"
        url = queue(sqs, f"{name}.fifo" if fifo else name, fifo=fifo)
        return Harness(
            "sqs",
            aws_endpoint,
            {"queue_url": url, "client": client_},
            {"queue_url": url.replace("orders", "no-such"), "client": client_},
            FIFO if fifo else STANDARD,
            lambda count: received(sqs, url, count),
        )


@pytest.mark.parametrize("fifo", [False, True], ids=["standard", "fifo"])
class TestSns(SinkSuite):
    @pytest.fixture
    def harness(self, aws_endpoint: str, *, fifo: bool) -> SinkHarness:
        """A topic, and a queue that receives its messages as they are."""
        sns, sqs = client("sns", aws_endpoint), client("sqs", aws_endpoint)
        name = f"orders-{uuid.uuid4()}{'.fifo' if fifo else ''}"
        topic = sns.create_topic(Name=name, Attributes={"FifoTopic": "true"} if fifo else {})["TopicArn"]
        url = queue(sqs, name, fifo=fifo)
        arn = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
        sns.subscribe(TopicArn=topic, Protocol="sqs", Endpoint=arn, Attributes={"RawMessageDelivery": "true"})
        return Harness(
            "sns",
            aws_endpoint,
            {"topic": topic},
            {"topic": topic.replace("orders", "no-such")},
            FIFO if fifo else STANDARD,
            lambda count: received(sqs, url, count),
        )
