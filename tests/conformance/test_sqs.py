"""The SQS source on an emulator: a FIFO queue keeps order, so the whole suite applies to it."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import boto3
import pytest

from conformance.source_suite import SourceFeatures, SourceHarness, SourceSuite
from figbridge.config import SqsSourceSection
from figbridge.transports.sqs import SqsSource


@dataclass
class SqsHarness:
    endpoint: str
    # what a dead process held becomes visible after the shortest visibility timeout we allow, and a margin
    features: ClassVar[SourceFeatures] = SourceFeatures(any_bytes=False, patience=15.0)

    def open(self) -> SqsSource:
        return self._source(self.queue)

    def open_missing(self) -> SqsSource:
        return self._source(f"{self.endpoint}/123456789012/no-such-queue")

    def put(self, bodies: Sequence[bytes]) -> None:
        for body in bodies:
            self.client.send_message(
                QueueUrl=self.queue,
                MessageBody=body.decode(),
                MessageGroupId="suite",
                MessageDeduplicationId=uuid.uuid4().hex,
            )

    @cached_property
    def client(self) -> Any:
        return boto3.client("sqs", region_name="eu-west-1", endpoint_url=self.endpoint)

    @cached_property
    def queue(self) -> str:
        attributes: Any = {"FifoQueue": "true"}
        name = f"{uuid.uuid4().hex}.fifo"
        return str(self.client.create_queue(QueueName=name, Attributes=attributes)["QueueUrl"])

    def _source(self, url: str) -> SqsSource:
        return SqsSource(
            SqsSourceSection.model_validate(
                {
                    "type": "sqs",
                    "queue_url": url,
                    "region": "eu-west-1",
                    "endpoint_url": self.endpoint,
                    "visibility-timeout": 5,
                }
            )
        )


class TestSqs(SourceSuite):
    @pytest.fixture
    def harness(self, aws_endpoint: str) -> SourceHarness:
        return SqsHarness(aws_endpoint)
