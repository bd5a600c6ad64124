"""What is one service's own: its limits, as the destination sets them; what it does not take; groups and ids."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from conformance.events import event
from figbridge.errors import SinkRefused, SinkUnavailable
from figbridge.formats import KINDS
from fixtures.fake_aws import FakeAws
from fixtures.sinks import SERVICES, Service, service


@pytest.fixture
def behind(request: pytest.FixtureRequest) -> Service:
    return service(request.param)


@pytest.fixture
def fake(behind: Service) -> Iterator[FakeAws]:
    with behind.fake() as fake:
        yield fake


def only(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("behind", names, indirect=True)


@pytest.mark.parametrize(
    ("behind", "answer", "limits"),
    [
        ("kinesis", {"StreamDescriptionSummary": {}}, (1_048_576, 10_485_760)),
        ("kinesis", {"StreamDescriptionSummary": {"MaxRecordSizeInKiB": 10_240}}, (10_485_760, 10_485_760)),
        ("sqs", {"Attributes": {"MaximumMessageSize": "2048"}}, (2_048, 1_048_576)),
        ("sns", {"Attributes": {}}, (262_144, 262_144)),
        ("sns", {"Attributes": {"MaximumMessageSize": "1048576"}}, (1_048_576, 1_048_576)),
    ],
    indirect=["behind"],
)
def test_the_limits_are_those_of_the_destination(
    behind: Service, fake: FakeAws, answer: dict[str, Any], limits: tuple[int, int]
) -> None:
    fake.handlers[behind.look_up] = lambda _: answer
    sink = behind.sink(fake)
    sink.check()
    assert (sink.limits.entry_bytes, sink.limits.batch_bytes) == limits

    def of(size: int) -> Any:
        frame = sink.size(event(1)._replace(detail=b'{"v":""}'))
        return event(1)._replace(detail=b'{"v":"%b"}' % (b"x" * (size - frame)))

    assert not sink.publish([of(limits[0])])
    (rejection,) = sink.publish([of(limits[0] + 1)])
    assert (rejection.code, rejection.retryable) == ("EntryTooLarge", False)
    assert len(behind.taken) == 1
    sink.close()


@pytest.mark.parametrize(
    ("behind", "answer", "error", "hint"),
    [
        ("kinesis", {"StreamDescriptionSummary": {"StreamStatus": "CREATING"}}, SinkUnavailable, "waits"),
        ("kinesis", {"StreamDescriptionSummary": {"StreamStatus": "DELETING"}}, SinkRefused, "create it again"),
        (
            "firehose",
            {"DeliveryStreamDescription": {"DeliveryStreamStatus": "CREATING_FAILED"}},
            SinkRefused,
            "create it again",
        ),
        (
            "firehose",
            {"DeliveryStreamDescription": {"DeliveryStreamType": "KinesisStreamAsSource"}},
            SinkRefused,
            "kinesis",
        ),
    ],
    indirect=["behind"],
)
def test_a_stream_that_takes_nothing_says_why(
    behind: Service, fake: FakeAws, answer: dict[str, Any], error: type[SinkUnavailable], hint: str
) -> None:
    fake.handlers[behind.look_up] = lambda _: answer
    sink = behind.sink(fake)
    with pytest.raises(error) as caught:
        sink.check()
    assert hint in caught.value.hint
    sink.close()


@only("kinesis")
def test_a_stream_that_ignores_partition_keys_is_a_warning(
    behind: Service, fake: FakeAws, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.handlers[behind.look_up] = lambda _: {"StreamDescriptionSummary": {"RecordDistributionStrategy": "AUTO"}}
    sink = behind.sink(fake)
    sink.check()
    assert "USER_PARTITION_KEY" in capsys.readouterr().out
    sink.close()


@only("sqs", "sqs.fifo", "sns", "sns.fifo")
def test_characters_that_xml_does_not_know_leave_as_escapes(behind: Service, fake: FakeAws) -> None:
    odd = '{"v":"\ufffe\uffff\ufffd ﷽ end"}'.encode()
    sink = behind.sink(fake)
    assert not sink.publish([event(1)._replace(detail=odd)])

    assert behind.taken[0].envelope["detail"] == json.loads(odd)
    (request,) = fake.calls(behind.operation)
    body = str(request[behind.entries][0]["Message" if behind.type == "sns" else "MessageBody"])
    assert "\ufffe" not in body
    assert "\uffff" not in body
    assert sink.size(event(1)._replace(detail=odd)) == len(body.encode())
    sink.close()


@pytest.mark.parametrize("behind", SERVICES, indirect=True)
def test_groups_are_by_key_and_repetitions_are_known_by_id(behind: Service, fake: FakeAws) -> None:
    sink = behind.sink(fake)
    keys = ["shop.orders/1", "shop.orders/a b", "shop.orders/a b", "k" * 300]
    sent = [event(n, key=key) for n, key in enumerate(keys)]
    for it in sent:
        assert not sink.publish([it])

    groups = [it.group for it in behind.taken]
    if sink.limits.ordered:
        assert groups[0] == keys[0]
        assert groups[1] == groups[2]
        assert len(set(groups)) == 3
        assert all(group and len(group) <= 128 and group.isascii() and " " not in group for group in groups)
    else:
        assert groups == [None] * 4
    assert [it.dedup for it in behind.taken] == [it.id if sink.limits.dedup else None for it in sent]
    sink.close()


@pytest.mark.parametrize("behind", SERVICES, indirect=True)
def test_the_number_of_requests_in_flight_is_a_setting(behind: Service, fake: FakeAws) -> None:
    sink = behind.sink(fake, **{"in-flight": 3})
    assert sink.limits.in_flight == 3
    assert sink.limits.partial
    sink.close()


@only("firehose")
def test_a_record_of_firehose_is_a_line(behind: Service, fake: FakeAws) -> None:
    sink = behind.sink(fake)
    sink.publish([event(1)])
    assert fake.calls(behind.operation)[0]["Records"] == [{"Data": event(1).envelope() + b"\n"}]
    sink.close()


@only("eventbridge", "eventbridge_v2")
def test_resources_are_sent_and_counted(behind: Service, fake: FakeAws) -> None:
    arn = "arn:aws:rds:eu-west-1:123456789012:db:ż"
    sink = behind.sink(fake)
    assert not sink.publish([event(1, resources=(arn, arn)), event(2, key="k2")])
    one, other = fake.calls(behind.operation)[0]["Entries"]
    assert one["Resources"] == [arn, arn]
    assert "Resources" not in other
    assert sink.size(event(1, resources=(arn, arn))) - sink.size(event(1)) == 2 * len(arn.encode())
    sink.close()


@only("eventbridge", "sqs", "sqs.fifo")
def test_the_events_of_a_transaction_are_one_trace(behind: Service, fake: FakeAws) -> None:
    sink = behind.sink(fake, **{"trace-header": "Root={trace};Sampled=1"})
    names = ["7423-1-00000000000000AA-00000000", "7423-1-00000000000000AA-00000001", "7423-1-00000000000000BB-00000000"]
    for _ in range(2):  # what comes again is the same trace
        assert not sink.publish([event(n)._replace(id=name, key=f"k{n}") for n, name in enumerate(names)])
    traces = []
    for request in fake.calls(behind.operation):
        for entry in request["Entries"]:
            system = entry.get("MessageSystemAttributes", {}).get("AWSTraceHeader", {})
            traces.append(str(entry.get("TraceHeader") or system["StringValue"]))
    assert traces[:3] == traces[3:]
    assert traces[0] == traces[1] != traces[2]
    root = re.fullmatch(r"Root=1-([0-9a-f]{8})-[0-9a-f]{24};Sampled=1", traces[0])
    assert root
    assert int(root[1], 16) == int(event(1).time.timestamp())
    sink.close()


@pytest.mark.parametrize("behind", SERVICES, indirect=True)
@pytest.mark.parametrize("format_", KINDS)
def test_every_sink_sends_the_body_of_every_format(behind: Service, fake: FakeAws, format_: str) -> None:
    """And counts its bytes."""
    sent = tuple.__new__(KINDS[format_], event(1, detail='{"id":"%b","v":"ż"}'.encode()))
    sink = behind.sink(fake)
    sink.check()
    assert not sink.publish([sent])
    content = json.loads(sent.contents([sent])[0])
    taken = behind.taken[0].envelope
    assert taken == (json.loads(sent.body()) if "eventbridge" not in behind.type else {**taken, "detail": content})
    assert sink.size(sent) - sink.size(sent._replace(detail=b"{}")) == len(sent.detail) - 2
    sink.close()
