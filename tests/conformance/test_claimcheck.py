"""Events too large for the sink: kept in S3, over HTTP to an emulator, and the event that takes their place."""

import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import boto3
import pytest

from conformance.events import event
from figbridge.config import ClaimCheckSection
from figbridge.deadletter import DeadLetter
from figbridge.delivery.pack import Packing
from figbridge.errors import SinkRefused, SinkUnavailable
from figbridge.event import Event
from figbridge.formats import CloudEvent, DebeziumEvent
from figbridge.forward.publish import Publisher
from figbridge.metrics import Metrics
from figbridge.transports import Deposit, open_deposit
from fixtures.anyhttp import FOREIGN, AnyHttp
from fixtures.fake_aws import FakeAws
from fixtures.sinks import Service, service

LARGE = b'{"id":"%%b","op":"insert","table":"orders","key":{"id":7},"position":{"ordinal":2},"after":{"v":"%b"}}' % (
    b"x" * 1_100_000
)


class Letters:
    def __init__(self) -> None:
        self.reasons: list[str] = []

    def add(self, letters: Sequence[DeadLetter]) -> None:
        self.reasons += [it.reason for it in letters]

    def close(self) -> None:
        pass


def section(endpoint: str, bucket: str = "events") -> ClaimCheckSection:
    return ClaimCheckSection(bucket=bucket, region="eu-west-1", endpoint_url=endpoint)


@pytest.fixture
def s3(aws_endpoint: str) -> Any:
    s3 = boto3.client("s3", endpoint_url=aws_endpoint)
    s3.create_bucket(Bucket="events", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    return s3


@pytest.fixture
def deposit(aws_endpoint: str) -> Iterator[Deposit]:
    deposit = open_deposit(section(aws_endpoint))
    yield deposit
    deposit.close()


@pytest.fixture(params=["kinesis", "eventbridge"])
def behind(request: pytest.FixtureRequest) -> Service:
    return service(request.param)


@pytest.fixture
def fake(behind: Service) -> Iterator[FakeAws]:
    with behind.fake() as fake:
        yield fake


def publish(
    behind: Service, fake: FakeAws, deposit: Deposit, events: Sequence[Event], *, kind: type[Event] = Event,
    pack: bool = False,
) -> tuple[Letters, Metrics]:  # fmt: skip
    letters, metrics, sink = Letters(), Metrics(), behind.sink(fake)
    packing = Packing("transaction", sink, 65_536) if pack else None
    publisher = Publisher(sink, letters, metrics, threading.Event(), deposit, kind=kind, packing=packing)
    publisher.publish(events)
    publisher.close()
    sink.close()
    return letters, metrics


def test_a_large_event_is_kept_and_one_that_says_where_is_sent_in_its_place(
    s3: Any, deposit: Deposit, behind: Service, fake: FakeAws
) -> None:
    large = event(2, detail=LARGE)
    letters, metrics = publish(behind, fake, deposit, [event(1), large, event(3)])

    assert letters.reasons == []
    assert metrics.registry.get_sample_value("figbridge_forward_claim_checks_total") == 1
    assert [it.envelope["detail"]["id"] for it in behind.taken] == [event(n).id for n in (1, 2, 3)]
    detail = behind.taken[1].envelope["detail"]
    claim = detail.pop("claim_check")
    whole = s3.get_object(Bucket=claim["bucket"], Key=claim["key"])["Body"].read()
    assert whole == large.envelope()
    assert (claim["bytes"], claim["sha256"]) == (len(whole), hashlib.sha256(whole).hexdigest())
    assert claim["key"] == f"figbridge/{large.id}.json"
    assert detail == {
        "id": large.id, "op": "insert", "table": "orders", "key": {"id": 7}, "position": {"ordinal": 2},
    }  # fmt: skip


@pytest.mark.parametrize("kind", [CloudEvent, DebeziumEvent])
def test_what_is_kept_is_the_message_in_its_format(
    s3: Any, deposit: Deposit, behind: Service, fake: FakeAws, kind: type[Event]
) -> None:
    large = event(2, detail=LARGE.replace(b'{"id":', b'{"source":{"lsn":7},"id":', 1))
    letters, _ = publish(behind, fake, deposit, [large], kind=kind)

    assert letters.reasons == []
    message = behind.taken[0].envelope
    if behind.type == "eventbridge":
        message = message["detail"]
    detail = message["data"] if kind is CloudEvent else message
    assert detail["source"] == {"lsn": 7}
    claim = detail["claim_check"]
    whole = s3.get_object(Bucket=claim["bucket"], Key=claim["key"])["Body"].read()
    assert whole == tuple.__new__(kind, large).body()


@pytest.mark.usefixtures("s3")
def test_a_large_event_of_a_packed_transaction_leaves_alone(deposit: Deposit, behind: Service, fake: FakeAws) -> None:
    """In its place: the same row is before and behind it."""
    names = [f"7-A-{n:08X}" for n in range(5)]
    events = [event(n, detail=LARGE if n == 2 else None)._replace(id=name, key="k") for n, name in enumerate(names)]
    letters, metrics = publish(behind, fake, deposit, events, pack=True)

    assert letters.reasons == []
    assert metrics.registry.get_sample_value("figbridge_forward_claim_checks_total") == 1
    published = metrics.registry.get_sample_value("figbridge_forward_published_total", {"sink": behind.type})
    assert published == 5
    details = [it.envelope["detail"] for it in behind.taken]
    assert [it.get("count") for it in details] == [2, None, 2]
    assert details[1]["claim_check"]["key"] == f"figbridge/{names[2]}.json"


@pytest.mark.usefixtures("s3")
def test_an_event_whose_key_alone_is_too_large_is_a_dead_letter(
    deposit: Deposit, behind: Service, fake: FakeAws
) -> None:
    huge = event(1, detail=b'{"id":"%%b","key":{"id":"%b"}}' % (b"x" * 1_100_000))

    letters, _ = publish(behind, fake, deposit, [huge])

    assert letters.reasons == ["EntryTooLarge"]
    assert behind.taken == []


@pytest.mark.usefixtures("s3")
def test_a_number_that_a_double_does_not_hold_is_left_out_rather_than_changed(deposit: Deposit) -> None:
    small = deposit.deposit(event(1, detail=b'{"id":"%b","key":{"n":0.12345678901234567890},"position":{"n":1}}'))

    assert json.loads(small.detail).keys() == {"id", "position", "claim_check"}


def test_a_bucket_that_is_not_there_is_refused_with_a_remedy(aws_endpoint: str) -> None:
    deposit = open_deposit(section(aws_endpoint, "nobodys"))
    for call in (deposit.check, lambda: deposit.deposit(event(1))):
        with pytest.raises(SinkRefused) as caught:
            call()
        assert "create the bucket nobodys" in caught.value.hint
    deposit.close()


@pytest.mark.usefixtures("s3")
def test_a_bucket_that_is_there_passes_the_check(deposit: Deposit) -> None:
    deposit.check()


def test_a_bucket_that_does_not_answer_is_tried_again() -> None:
    deposit = open_deposit(section("http://127.0.0.1:1"))
    with pytest.raises(SinkUnavailable):
        deposit.deposit(event(1))
    deposit.close()


@pytest.mark.parametrize("answer", FOREIGN.values(), ids=FOREIGN)
def test_an_answer_that_is_none_of_awss_is_unavailable(answer: tuple[int, bytes]) -> None:
    """Also one that says 200: an object that is stored has an ETag."""
    status, body = answer
    with AnyHttp(lambda *_: (status, body, {})) as server:
        deposit = open_deposit(section(server.url))
        with pytest.raises(SinkUnavailable):
            deposit.deposit(event(1))
        deposit.close()
