"""The Custom Event Bus as a sink: the suite on a fake that speaks botocore's own wire form, as no emulator knows it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from conformance.events import WHEN, event
from conformance.sink_suite import SinkFeatures, SinkHarness, SinkSuite
from figbridge.errors import SinkRefused, SinkUnavailable
from figbridge.event import Event
from figbridge.transports import Sink
from fixtures.fake_aws import Document, FakeAws, refuse
from fixtures.sinks import BUS, Service, Taken, service


@dataclass
class Bus:
    """What the bus keeps, each deduplication id of a group once."""

    service: Service
    fake: FakeAws
    features: ClassVar[SinkFeatures] = SinkFeatures(exact=False, ordered=True, unique=True)

    def open(self) -> Sink:
        return self.service.sink(self.fake)

    def open_missing(self) -> Sink:
        handler = refuse(404, "ResourceNotFoundException", "no such bus")
        self.fake.handlers["DescribeEventBus"] = handler
        return self.service.sink(self.fake)

    def read(self, count: int) -> list[bytes]:
        kept = {(it.group, it.dedup): json.dumps(it.envelope).encode() for it in self.service.taken}
        assert len(kept) >= count
        return list(kept.values())


@pytest.fixture
def bus() -> Iterator[Bus]:
    made = service("eventbridge_v2")
    with made.fake() as fake:
        yield Bus(made, fake)


class TestEventBridgeV2(SinkSuite):
    @pytest.fixture
    def harness(self, bus: Bus) -> SinkHarness:
        return bus


@pytest.fixture
def sink(bus: Bus) -> Iterator[Sink]:
    sink = bus.open()
    sink.check()
    yield sink
    sink.close()


def test_an_entry_is_what_put_events_asks_for(bus: Bus, sink: Sink) -> None:
    assert not sink.publish([event(1), event(2, key="shop.orders/żółw")])

    (request,) = bus.fake.calls("PutEvents")
    first, second = request["Entries"]
    assert request["EventBusArn"] == BUS
    assert {name: value for name, value in first.items() if name != "Time"} == {
        "Source": "legacy.shop",
        "DetailType": "orders.updated",
        "Detail": event(1).detail.decode(),
        "SystemMetadata": {"EventGroupId": "shop.orders/1", "DeduplicationId": event(1).id},
    }
    assert first["Time"].timestamp() == pytest.approx(WHEN.timestamp(), abs=1e-3)
    group = second["SystemMetadata"]["EventGroupId"]
    assert len(group) == 64, "a key that is no plain text goes as a hash"
    assert not sink.publish([event(3, key="shop.orders/żółw")])
    assert bus.fake.calls("PutEvents")[1]["Entries"][0]["SystemMetadata"]["EventGroupId"] == group


def test_a_repetition_that_the_bus_dropped_is_a_success(bus: Bus, sink: Sink) -> None:
    def repeated(parameters: Document) -> Document:
        return {"Entries": [{"EventId": "e", "SuccessCode": "DEDUPLICATED"} for _ in parameters["Entries"]]}

    bus.fake.handlers["PutEvents"] = repeated

    assert not sink.publish([event(1), event(2)])


@pytest.mark.parametrize(
    ("flawed", "code"),
    [
        (event(1, detail_type="x" * 129), "InvalidInputException"),
        (event(1, source="x" * 257), "InvalidInputException"),
        (event(1, source="aws.x"), "InvalidInputException"),
        (event(1, source=""), "InvalidInputException"),
        (event(1)._replace(detail=b"[1]"), "InvalidInputException"),
        (event(1)._replace(detail=b'{"v":"\xff"}'), "MalformedDetail"),
        (event(1)._replace(detail=b'{"v":"%b"}' % (b"x" * 1024 * 1024)), "EntryTooLarge"),
    ],
)
def test_what_aws_would_refuse_is_not_sent(bus: Bus, sink: Sink, flawed: Event, code: str) -> None:
    (rejection,) = sink.publish([event(2), flawed, event(3)])

    assert (rejection.event, rejection.code, rejection.retryable) == (flawed, code, False)
    assert len(bus.service.taken) == 2


@pytest.mark.parametrize(
    ("state", "error"),
    [("CREATING", SinkUnavailable), ("DELETING", SinkRefused), ("CREATE_FAILED", SinkRefused)],
)
def test_a_bus_that_takes_no_events_says_why(
    bus: Bus, sink: Sink, state: str, error: type[SinkUnavailable | SinkRefused]
) -> None:
    described: dict[str, Any] = {"Name": "orders", "State": state, "StateReason": "because"}
    bus.fake.handlers |= {
        "DescribeEventBus": lambda _: described,
        "PutEvents": refuse(409, "InvalidStateException", "not in a state for it"),
    }

    for call in (sink.check, lambda: sink.publish([event(1)])):
        with pytest.raises(error) as caught:
            call()
        assert caught.value.hint


def test_what_is_taken_is_read_from_the_wire(bus: Bus, sink: Sink) -> None:
    assert not sink.publish([event(1)])
    assert bus.service.taken == [
        Taken(
            "shop.orders/1",
            event(1).id,
            {"source": "legacy.shop", "detail-type": "orders.updated", "detail": json.loads(event(1).detail)},
        )
    ]
