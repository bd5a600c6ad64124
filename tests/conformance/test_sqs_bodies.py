"""What AWS's services put into a queue, by the services themselves (an emulator's): it is the same event each time."""

import json
import uuid
from typing import Any

import boto3
import pytest

from conformance.source_suite import take
from conformance.test_sqs import SqsHarness, publish_through_a_rule
from figbridge.config import BareSection
from figbridge.reverse.bare import Bare
from figbridge.reverse.message import parse

ENVELOPE = {"id": "e-1", "source": "shop.next", "detail-type": "order.placed", "detail": {"id": 7, "total": 1.5}}
BARE = Bare(
    BareSection.model_validate({"id": "change", "source": "'shop.next'", "detail-type": "join('.', ['order', what])"})
)


@pytest.fixture
def harness(aws_endpoint: str) -> SqsHarness:
    return SqsHarness(aws_endpoint, fifo=False)


def arn(harness: SqsHarness) -> str:
    attributes = harness.client.get_queue_attributes(QueueUrl=harness.url, AttributeNames=["QueueArn"])
    return attributes["Attributes"]["QueueArn"]


@pytest.mark.parametrize("raw", ["true", "false"])
def test_by_sns_raw_or_wrapped(harness: SqsHarness, raw: str) -> None:
    sns: Any = boto3.client("sns", endpoint_url=harness.endpoint)
    topic = sns.create_topic(Name=f"shop-{uuid.uuid4()}")["TopicArn"]
    attributes = {"RawMessageDelivery": raw}
    sns.subscribe(TopicArn=topic, Protocol="sqs", Endpoint=arn(harness), Attributes=attributes)
    sns.publish(TopicArn=topic, Message=json.dumps(ENVELOPE))
    (delivery,) = take(harness.open(), 1)
    assert (b"Notification" in delivery.body) == (raw == "false")
    assert parse(delivery.body) == parse(json.dumps(ENVELOPE).encode())


def test_by_a_rule(harness: SqsHarness) -> None:
    publish_through_a_rule(harness, {"id": 7, "total": 1.5})
    (delivery,) = take(harness.open(), 1)
    received = parse(delivery.body)
    assert received[1:3] == ("shop.next", "order.placed")
    assert json.loads(delivery.body)["id"] == received.id


def test_by_a_rule_with_an_input_transformer(harness: SqsHarness) -> None:
    events: Any = boto3.client("events", endpoint_url=harness.endpoint)
    bus = f"shop-{uuid.uuid4()}"
    events.create_event_bus(Name=bus)
    events.put_rule(Name="r", EventBusName=bus, EventPattern=json.dumps({"source": ["shop.next"]}))
    transformer = {
        "InputPathsMap": {"n": "$.detail.id", "c": "$.detail.change"},
        "InputTemplate": '{"change": "<c>", "what": "placed", "number": <n>}',
    }
    events.put_targets(
        Rule="r", EventBusName=bus, Targets=[{"Id": "q", "Arn": arn(harness), "InputTransformer": transformer}]
    )
    detail = json.dumps({"id": 7, "change": "c-1"})
    entry: Any = {"EventBusName": bus, "Source": "shop.next", "DetailType": "order.placed", "Detail": detail}
    events.put_events(Entries=[entry])
    (delivery,) = take(harness.open(), 1)
    received = parse(delivery.body, BARE)
    assert received[:3] == ("c-1", "shop.next", "order.placed")
    assert received.document["detail"]["number"] == 7
