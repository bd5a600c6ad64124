"""The EventBridge sink: the suite on an emulator (rule → queue), and what only a real AWS does on a fake of it."""

import json
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import cached_property
from typing import Any, ClassVar, Literal

import boto3
import pytest
from structlog.testing import capture_logs

from conformance.events import WHEN, event
from conformance.sink_suite import SinkFeatures, SinkHarness, SinkSuite
from figbridge.config import AwsSection, EventBridgeSinkSection
from figbridge.errors import BridgeError, SinkRefused, SinkUnavailable
from figbridge.event import Event
from figbridge.transports import aws
from figbridge.transports.awsclient import Client
from figbridge.transports.eventbridge import EventBridgeSink
from fixtures.clock import PATIENCE
from fixtures.fake_eventbridge import FakeEventBridge, cut, error, partly, raw


def section(endpoint: str, bus: str = "orders", client: Literal["boto3", "crt"] = "boto3") -> EventBridgeSinkSection:
    return EventBridgeSinkSection(type="eventbridge", bus=bus, region="eu-west-1", endpoint_url=endpoint, client=client)


@dataclass
class EventBridgeHarness:
    endpoint: str
    bus: str
    client: Literal["boto3", "crt"] = "boto3"
    features: ClassVar[SinkFeatures] = SinkFeatures(exact=False, ordered=False, unique=False, quoting=False)

    def open(self) -> EventBridgeSink:
        return EventBridgeSink(section(self.endpoint, self.bus, self.client))

    def open_missing(self) -> EventBridgeSink:
        return EventBridgeSink(section(self.endpoint, "no-such-bus", self.client))

    @cached_property
    def queue(self) -> str:
        """A bus with one rule for everything and a queue behind it."""
        events, sqs = self._client("events"), self._client("sqs")
        events.create_event_bus(Name=self.bus)
        queue = sqs.create_queue(QueueName=self.bus)["QueueUrl"]
        arn = sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
        pattern = json.dumps({"source": [{"prefix": ""}]})
        events.put_rule(Name="all", EventBusName=self.bus, EventPattern=pattern, State="ENABLED")
        events.put_targets(Rule="all", EventBusName=self.bus, Targets=[{"Id": "queue", "Arn": arn}])
        return str(queue)

    def read(self, count: int) -> list[bytes]:
        sqs = self._client("sqs")
        found: list[bytes] = []
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            wait = 1 if len(found) < count else 0
            answer = sqs.receive_message(QueueUrl=self.queue, MaxNumberOfMessages=10, WaitTimeSeconds=wait)
            if not (messages := answer.get("Messages", [])) and len(found) >= count:
                break
            for message in messages:
                found.append(message["Body"].encode())
                sqs.delete_message(QueueUrl=self.queue, ReceiptHandle=message["ReceiptHandle"])
        assert len(found) >= count
        return found

    def _client(self, service: str) -> Any:
        return boto3.client(service, region_name="eu-west-1", endpoint_url=self.endpoint)  # type: ignore[call-overload]  # the stubs know literal names only


@pytest.mark.parametrize("client_", ["boto3", "crt"])
class TestEventBridge(SinkSuite):
    @pytest.fixture
    def harness(self, aws_endpoint: str, client_: Literal["boto3", "crt"]) -> SinkHarness:
        harness = EventBridgeHarness(aws_endpoint, f"bus-{uuid.uuid4().hex}", client_)
        assert harness.queue
        return harness


@pytest.fixture
def fake() -> Iterator[FakeEventBridge]:
    with FakeEventBridge() as fake:
        yield fake


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sink(fake: FakeEventBridge, clock: Clock) -> Iterator[EventBridgeSink]:
    sink = EventBridgeSink(section(fake.url), clock=clock)
    sink.check()
    yield sink
    sink.close()


def test_an_entry_is_what_put_events_asks_for(fake: FakeEventBridge, sink: EventBridgeSink) -> None:
    elsewhere = timezone(timedelta(hours=5, minutes=30))
    assert not sink.publish([event(1), event(2, time=WHEN.astimezone(elsewhere))])

    ((first, second),) = fake.puts
    assert first == {
        "Source": "legacy.shop",
        "DetailType": "orders.updated",
        "Detail": event(1).detail.decode(),
        "Time": WHEN.timestamp(),
        "EventBusName": "orders",
    }
    assert second["Time"] == first["Time"]
    (agent,) = fake.agents
    assert "figbridge/" in agent


@pytest.mark.parametrize(
    ("code", "retryable"),
    [
        ("InternalFailure", True),
        ("InternalException", True),
        ("ThrottlingException", True),
        ("ServiceUnavailable", True),
        ("MalformedDetail", False),
        ("InvalidArgument", False),
        ("RedactionFailure", False),
        ("NotAuthorizedForDetailTypeException", False),
        ("AccessDeniedException", False),
        ("SomethingNewInAws", False),
    ],
)
def test_a_refused_entry_is_returned_and_the_others_count_as_published(
    fake: FakeEventBridge, sink: EventBridgeSink, code: str, *, retryable: bool
) -> None:
    fake.script.append(partly(None, code, None))

    (rejection,) = sink.publish([event(1), event(2), event(3)])

    assert rejection.event == event(2)
    assert (rejection.code, rejection.retryable) == (code, retryable)
    assert rejection.message == f"because of {code}"


def test_an_entry_with_neither_id_nor_error_is_tried_again(fake: FakeEventBridge, sink: EventBridgeSink) -> None:
    fake.script.append(lambda _: (200, {"FailedEntryCount": 0, "Entries": [{"EventId": "x"}, {}]}))

    (rejection,) = sink.publish([event(1), event(2)])

    assert rejection.event == event(2)
    assert rejection.retryable


@pytest.mark.parametrize("code", ["AccessDeniedException", "NotAuthorizedForSourceException"])
def test_when_no_entry_is_allowed_the_sink_refuses(fake: FakeEventBridge, sink: EventBridgeSink, code: str) -> None:
    fake.script.append(partly(code, code))

    with pytest.raises(SinkRefused, match=code) as caught:
        sink.publish([event(1), event(2)])
    assert "events:PutEvents" in caught.value.hint


@pytest.mark.parametrize(
    "answer",
    [
        error(400, "ThrottlingException", "Rate exceeded"),
        error(500, "InternalException"),
        error(503, "ServiceUnavailable"),
        error(400, "ExpiredTokenException", "The security token included in the request is expired"),
        error(400, "RequestExpired"),
        raw(502, b"<html><body>Bad Gateway"),
        raw(429, b""),
        cut,
        lambda entries: (200, {"FailedEntryCount": 0, "Entries": [{"EventId": "x"} for _ in entries[1:]]}),
        lambda entries: (200, {"FailedEntryCount": 0, "Entries": [{"EventId": "x"} for _ in [*entries, None]]}),
        raw(200, b"{}"),
        raw(200, b""),
        raw(200, b"<html>Welcome to the hotel's wireless network"),
    ],
    ids=lambda answer: getattr(answer, "__name__", None),
)
def test_what_may_pass_is_unavailable_and_tried_once(
    fake: FakeEventBridge, sink: EventBridgeSink, monkeypatch: pytest.MonkeyPatch, answer: Any
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "4")  # which must not bring botocore's own retries back
    monkeypatch.setenv("AWS_RETRY_MODE", "standard")
    again = EventBridgeSink(section(fake.url))
    for each in (sink, again):
        fake.requests.clear()
        fake.script.append(answer)

        with pytest.raises(SinkUnavailable) as caught:
            each.publish([event(1), event(2)])

        assert caught.value.hint
        assert len(fake.puts) == 1
        assert not each.publish([event(1), event(2)])
    again.close()


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (error(400, "AccessDeniedException", "User is not authorized"), "allow events:PutEvents"),
        (error(400, "UnrecognizedClientException"), "credentials"),
        (error(403, "InvalidSignatureException"), "credentials"),
        (error(400, "ValidationException", "1 validation error detected"), "mend"),
        (error(400, "ResourceNotFoundException"), "create the event bus orders"),
        (raw(404, b"not here"), "mend"),
    ],
)
def test_what_only_a_human_can_mend_is_refused(
    fake: FakeEventBridge, sink: EventBridgeSink, answer: Any, hint: str
) -> None:
    fake.script.append(answer)

    with pytest.raises(SinkRefused) as caught:
        sink.publish([event(1), event(2)])
    assert hint in caught.value.hint


TOO_LARGE = error(400, "ValidationException", "Total size of the entries in the request is over the limit.")


def test_a_region_with_a_smaller_limit_refuses_the_entry_not_the_bus(
    fake: FakeEventBridge, sink: EventBridgeSink
) -> None:
    fake.script.append(TOO_LARGE)
    (rejection,) = sink.publish([event(1)])
    assert (rejection.code, rejection.retryable) == ("EntryTooLarge", False)

    fake.script.extend([TOO_LARGE, TOO_LARGE])  # together, and the first of them alone
    (rejection,) = sink.publish([event(1), event(2)])
    assert (rejection.event, rejection.code) == (event(1), "EntryTooLarge")
    assert [len(put) for put in fake.puts[1:]] == [2, 1, 1]


def test_an_endpoint_that_does_not_answer_is_unavailable(
    fake: FakeEventBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    release = threading.Event()

    def hang(entries: list[dict[str, Any]]) -> tuple[int, dict[str, Any]]:
        release.wait(20)
        return 200, {"FailedEntryCount": 0, "Entries": [{"EventId": "x"} for _ in entries]}

    monkeypatch.setattr(aws, "_READ_TIMEOUT", 0.2)
    sink = EventBridgeSink(section(fake.url))
    fake.script.append(hang)
    try:
        with pytest.raises(SinkUnavailable, match="ReadTimeoutError"):
            sink.publish([event(1)])
    finally:
        release.set()
        sink.close()


def test_an_endpoint_that_is_not_there_is_unavailable() -> None:
    sink = EventBridgeSink(section("http://127.0.0.1:1"))
    for call in (sink.check, lambda: sink.publish([event(1)])):
        with pytest.raises(SinkUnavailable, match="EndpointConnectionError"):
            call()
    sink.close()


LIMIT = 1024 * 1024 - 1
FRAME = 14 + len("legacy.shop") + len("orders.updated") + len('{"v":""}')


def of_size(size: int) -> Event:
    """An event of `size` bytes by AWS's formula, most of them in two-byte letters."""
    filler = size - FRAME
    text = "ż" * (filler // 2) + "x" * (filler % 2)
    return event(1)._replace(detail=f'{{"v":"{text}"}}'.encode())


@pytest.mark.parametrize(
    ("flawed", "code"),
    [
        (of_size(LIMIT + 1), "EntryTooLarge"),
        (event(1, source=""), "InvalidArgument"),
        (event(1, detail_type=""), "InvalidArgument"),
        (event(1, detail_type="x" * 129), "InvalidArgument"),
        (event(1, source="aws.rds"), "NotAuthorizedForSourceException"),
        (event(1)._replace(detail=b"[1]"), "MalformedDetail"),
        (event(1)._replace(detail=b'{"v":"\xff"}'), "MalformedDetail"),
    ],
)
def test_what_aws_would_refuse_is_not_sent(
    fake: FakeEventBridge, sink: EventBridgeSink, flawed: Event, code: str
) -> None:
    (rejection,) = sink.publish([event(2), flawed, event(3)])

    assert rejection.event == flawed
    assert (rejection.code, rejection.retryable) == (code, False)
    assert [[entry["Detail"] for entry in put] for put in fake.puts] == [
        [event(2).detail.decode(), event(3).detail.decode()]
    ]
    assert [it.code for it in sink.publish([flawed])] == [code]
    assert len(fake.puts) == 1


def test_the_largest_entry_and_the_longest_detail_type_are_sent(fake: FakeEventBridge, sink: EventBridgeSink) -> None:
    assert sink.size(of_size(LIMIT)) == LIMIT == sink.limits.entry_bytes
    assert not sink.publish([of_size(LIMIT)])
    assert not sink.publish([event(1, detail_type="ż" * 128)])

    assert len(fake.puts) == 2


def test_an_unknown_bus_is_never_published_to(fake: FakeEventBridge) -> None:
    sink = EventBridgeSink(section(fake.url, "odrers"))
    for call in (sink.check, lambda: sink.publish([event(1)])):
        with pytest.raises(SinkRefused, match="odrers") as caught:
            call()
        assert "create the event bus odrers" in caught.value.hint
    assert not fake.puts
    sink.close()


def test_a_bus_that_is_deleted_is_noticed_within_a_minute(
    fake: FakeEventBridge, sink: EventBridgeSink, clock: Clock
) -> None:
    fake.buses.clear()
    clock.now = 59
    assert not sink.publish([event(1)])  # what AWS answers for a bus that is gone

    clock.now = 61
    with pytest.raises(SinkRefused) as caught:
        sink.publish([event(2)])
    assert "may be lost" in caught.value.hint
    assert len(fake.puts) == 1


def test_a_look_that_fails_for_another_reason_does_not_stop_publishing(
    fake: FakeEventBridge, sink: EventBridgeSink, clock: Clock
) -> None:
    clock.now = 61
    fake.describe.append(error(400, "ThrottlingException"))
    assert not sink.publish([event(1)])
    assert len(fake.puts) == 1

    fake.buses.clear()
    clock.now += 10
    with pytest.raises(SinkRefused):  # asked again soon, not in a minute
        sink.publish([event(2)])


def test_a_look_that_is_throttled_is_not_repeated_with_each_request(
    fake: FakeEventBridge, sink: EventBridgeSink, clock: Clock
) -> None:
    """DescribeEventBus has a small quota, and many threads publish."""
    fake.requests.clear()
    fake.describe.extend([error(400, "ThrottlingException")] * 1000)
    with capture_logs() as logs, ThreadPoolExecutor(8) as threads:
        for moment in (61, 71):
            clock.now = moment
            assert not any(threads.map(lambda n: sink.publish([event(n)]), range(50)))
    asked = [operation for operation, _ in fake.requests if operation == "DescribeEventBus"]
    assert len(asked) == 2
    assert len(logs) == 1
    assert len(fake.puts) == 100

    fake.describe.clear()
    for moment in (81, 140):
        clock.now = moment
        sink.publish([event(1)])
    assert len([operation for operation, _ in fake.requests if operation == "DescribeEventBus"]) == 3


def test_a_bus_may_be_named_by_its_arn(fake: FakeEventBridge) -> None:
    arn = "arn:aws:events:eu-west-1:123456789012:event-bus/orders"
    sink = EventBridgeSink(section(fake.url, arn))
    sink.check()
    sink.publish([event(1)])
    assert fake.puts[0][0]["EventBusName"] == arn
    sink.close()


def test_without_region_credentials_or_profile_nothing_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    here = AwsSection(region="eu-west-1")
    for remove, where, hint in (
        ("AWS_DEFAULT_REGION", AwsSection(), "set region"),
        ("AWS_SECRET_ACCESS_KEY", here, "AWS_SECRET_ACCESS_KEY"),
        ("AWS_ACCESS_KEY_ID", here, "give the process a role"),
    ):
        monkeypatch.delenv(remove)
        with pytest.raises(BridgeError) as caught:
            Client("events", where)
        assert hint in caught.value.hint
        assert not caught.value.retryable
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(BridgeError, match="nobody") as caught:
        Client("events", here)
    assert caught.value.hint
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with pytest.raises(BridgeError) as caught:
        Client("events", AwsSection.model_construct(region="eu-west-1", endpoint_url="localhost:4566"))  # not by a file
    assert "endpoint_url" in caught.value.hint


def test_the_emulator_agrees_that_a_bad_detail_is_refused_alone(aws_endpoint: str) -> None:
    harness = EventBridgeHarness(aws_endpoint, f"bus-{uuid.uuid4().hex}")
    assert harness.queue
    sink = harness.open()
    sink.check()
    broken = event(2)._replace(detail=b'{"v":')

    (rejection,) = sink.publish([event(1), broken, event(3)])

    assert rejection.event == broken
    assert (rejection.code, rejection.retryable) == ("MalformedDetail", False)
    assert len(harness.read(2)) == 2
    sink.close()


def test_the_envelope_reads_the_same_for_any_string_and_zone() -> None:
    for text in ("", '"', "\\", "\x00\x1f\x7f", "\u2028", "🌳", "%b %s", "</script>"):
        document = json.loads(event(1, id=text, source=text, detail_type=text).envelope())
        assert [document[name] for name in ("id", "source", "detail-type")] == [text] * 3
    for time_ in (WHEN, WHEN.replace(microsecond=0), WHEN.astimezone(timezone(timedelta(hours=-8)))):
        document = json.loads(event(1, time=time_).envelope())
        assert document["time"].endswith("Z")
        assert datetime.fromisoformat(document["time"]) == time_
    assert list(document) == ["version", "id", "source", "detail-type", "time", "detail"]
