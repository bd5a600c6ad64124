"""What AWS may answer, for each of its sinks alike: entries and requests refused, for now and for ever."""

import contextlib
import json
import socket
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conformance.events import event
from figbridge.errors import SinkRefused, SinkUnavailable
from figbridge.transports import Sink, open_sink
from fixtures.anyhttp import FOREIGN
from fixtures.fake_aws import Cut, Document, FakeAws, Handler, cut, raw, refuse
from fixtures.sinks import SERVICES, Service, Taken, section, service


@pytest.fixture(params=SERVICES)
def behind(request: pytest.FixtureRequest) -> Service:
    return service(request.param)


@pytest.fixture
def fake(behind: Service) -> Iterator[FakeAws]:
    with behind.fake() as fake:
        yield fake


@pytest.fixture
def sink(behind: Service, fake: FakeAws) -> Iterator[Sink]:
    sink = behind.sink(fake)
    sink.check()
    yield sink
    sink.close()


def refusing(code: str, *numbers: int, sender: bool = True) -> Any:
    def judge(entry: Taken) -> tuple[str, bool] | None:
        return (code, sender) if entry.envelope["detail"]["n"] in numbers else None

    return judge


@pytest.mark.parametrize(
    ("code", "retryable"),
    [
        ("ThrottlingException", True),
        ("ProvisionedThroughputExceededException", True),
        ("InternalFailure", True),
        ("ServiceUnavailableException", True),
        ("KMSThrottlingException", True),
        ("InvalidMessageContents", False),
        ("AccessDeniedException", False),
        ("SomethingNewInAws", False),
    ],
)
def test_a_refused_entry_is_returned_with_the_services_code(
    behind: Service, sink: Sink, code: str, *, retryable: bool
) -> None:
    behind.judge = refusing(code, 2)

    (rejection,) = sink.publish([event(n, key=f"k{n}") for n in (1, 2, 3)])

    assert rejection.event == event(2, key="k2")
    assert (rejection.code, rejection.retryable) == (code, retryable)
    assert rejection.message == f"because of {code}"
    assert [it.envelope["detail"]["n"] for it in behind.taken] == [1, 3]


@pytest.mark.parametrize("type_", ["sqs", "sns.fifo"])
def test_what_is_no_fault_of_ours_may_be_taken_later(type_: str) -> None:
    behind = service(type_)
    behind.judge = refusing("SomethingNewInAws", 2, sender=False)
    with behind.fake() as fake:
        sink = behind.sink(fake)
        (rejection,) = sink.publish([event(1), event(2)])
        sink.close()
    assert rejection.retryable


def test_when_no_entry_is_allowed_the_sink_refuses(behind: Service, sink: Sink) -> None:
    behind.judge = refusing("AccessDeniedException", 1, 2)

    with pytest.raises(SinkRefused, match="AccessDeniedException") as caught:
        sink.publish([event(1), event(2)])
    assert behind.operation.removesuffix("Batch").removesuffix("Events") in caught.value.hint


def test_an_entry_with_neither_success_nor_error_is_sent_again(behind: Service, fake: FakeAws, sink: Sink) -> None:
    def half(parameters: Document) -> Document:
        answer = behind.take(parameters)
        for name, results in answer.items():
            if isinstance(results, list) and results:
                answer[name] = results[:1] if name == "Successful" else [results[0], {}]
        return answer

    fake.script[behind.operation] = deque([half])

    (rejection,) = sink.publish([event(1), event(2)])

    assert (rejection.event, rejection.code, rejection.retryable) == (event(2), "NoAnswer", True)


@pytest.mark.parametrize(
    "answer",
    [
        refuse(400, "ThrottlingException"),
        refuse(429, "ThrottledException"),
        refuse(500, "InternalFailure"),
        refuse(503, "ServiceUnavailable"),
        refuse(403, "RequestExpired"),
        cut,
    ],
)
def test_what_may_pass_is_unavailable_and_tried_once(
    behind: Service, fake: FakeAws, sink: Sink, answer: Handler
) -> None:
    fake.script[behind.operation] = deque([answer])

    with pytest.raises(SinkUnavailable) as caught:
        sink.publish([event(1), event(2)])

    assert caught.value.hint
    assert len(fake.calls(behind.operation)) == 1
    assert not sink.publish([event(1), event(2)])


@pytest.mark.parametrize("answer", FOREIGN.values(), ids=FOREIGN)
def test_an_answer_that_is_none_of_awss_is_unavailable(
    behind: Service, fake: FakeAws, sink: Sink, answer: tuple[int, bytes]
) -> None:
    fake.script = {behind.operation: deque([raw(*answer)]), behind.look_up: deque([raw(*answer)])}

    try:
        rejections = sink.publish([event(1, key="a"), event(2, key="b")])
    except SinkUnavailable as error:
        assert error.hint  # noqa: PT017 (or it is the other)
    else:
        assert [(it.code, it.retryable) for it in rejections] == [("NoAnswer", True)] * 2
    with contextlib.suppress(SinkUnavailable):  # where nothing is needed of the answer, any will do
        sink.check()
    sink.check()
    assert not sink.publish([event(1), event(2)])


@pytest.mark.parametrize("element", ["null", "7", '["x"]'])
def test_what_is_no_object_is_no_answer_for_its_entry(behind: Service, fake: FakeAws, sink: Sink, element: str) -> None:
    if behind.type in {"sns", "eventbridge_v2"}:
        pytest.skip("its answers are not JSON")
    lists: Document = {name: [] for name in ("Records", "Entries", "RequestResponses", "Successful", "Failed")}
    body = json.dumps(lists).replace("[]", f"[{element}, {element}]").encode()
    fake.script[behind.operation] = deque([raw(200, body)])

    rejections = sink.publish([event(1, key="a"), event(2, key="b")])

    assert [(it.code, it.retryable) for it in rejections] == [("NoAnswer", True)] * 2


@pytest.mark.parametrize("type_", ["sqs", "sqs.fifo+crt"])
def test_an_empty_list_may_be_null(type_: str) -> None:
    behind = service(type_)
    with behind.fake() as fake:
        sink = behind.sink(fake)
        fake.script[behind.operation] = deque([raw(200, b'{"Successful":[{"Id":"0","MessageId":"m"}],"Failed":null}')])
        assert not sink.publish([event(1)])
        sink.close()


def test_a_request_that_was_taken_and_not_answered_is_unavailable(behind: Service, fake: FakeAws, sink: Sink) -> None:
    def taken_and_cut(parameters: Document) -> Document:
        behind.take(parameters)
        raise Cut

    fake.script[behind.operation] = deque([taken_and_cut])

    with pytest.raises(SinkUnavailable):
        sink.publish([event(1)])
    assert len(behind.taken) == 1


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        ("AccessDeniedException", "allow"),
        ("UnrecognizedClientException", "credentials"),
        ("ResourceNotFoundException", "create"),
        ("KMSDisabledException", "KMS key"),
    ],
)
def test_what_only_a_human_can_mend_is_refused_with_the_remedy(
    behind: Service, fake: FakeAws, sink: Sink, code: str, remedy: str
) -> None:
    fake.script = {behind.operation: deque([refuse(400, code)]), behind.look_up: deque([refuse(400, code)])}

    for call in (lambda: sink.publish([event(1), event(2)]), sink.check):
        with pytest.raises(SinkRefused, match=code) as caught:
            call()
        assert remedy in caught.value.hint


CONTENT = {
    "eventbridge": ("ValidationException", "Total size of the entries in the request is over the limit"),
    "eventbridge_v2": ("InvalidInputException", "not valid JSON"),
    "kinesis": ("InvalidArgumentException", "record too large"),
    "firehose": ("InvalidArgumentException", "record too large"),
    "sqs": ("InvalidMessageContents", "characters"),
    "sns": ("InvalidParameter", "message too long"),
}


def test_an_entry_for_which_the_whole_request_is_refused_is_found(behind: Service, fake: FakeAws, sink: Sink) -> None:
    code, message = CONTENT[behind.type]

    def choosy(parameters: Document) -> Document:
        judged = replace(behind, taken=[])
        judged.take(parameters)
        if any(it.envelope["detail"]["n"] == 5 for it in judged.taken):
            return refuse(400, code, message)(parameters)
        return behind.take(parameters)

    fake.handlers[behind.operation] = choosy

    (rejection,) = sink.publish([event(n, key=f"k{n}") for n in range(8)])

    assert rejection.event == event(5, key="k5")
    assert not rejection.retryable
    assert sorted(it.envelope["detail"]["n"] for it in behind.taken) == [0, 1, 2, 3, 4, 6, 7]
    assert len(fake.calls(behind.operation)) == 7


def test_when_every_entry_is_to_blame_it_is_the_set_up(behind: Service, fake: FakeAws, sink: Sink) -> None:
    code, message = CONTENT[behind.type]
    fake.handlers[behind.operation] = refuse(400, code, message)

    if behind.type == "eventbridge":  # the one code that is about size alone
        assert [it.code for it in sink.publish([event(1), event(2)])] == ["EntryTooLarge"] * 2
        return
    with pytest.raises(SinkRefused, match=code):
        sink.publish([event(1), event(2)])


def test_expired_credentials_are_read_again(
    behind: Service, fake: FakeAws, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    path.write_text("[default]\naws_access_key_id = OLD\naws_secret_access_key = x\naws_session_token = t\n")
    sink = behind.sink(fake)
    sink.check()
    fake.script[behind.operation] = deque([refuse(400, "ExpiredTokenException", "expired")])
    path.write_text("[default]\naws_access_key_id = NEW\naws_secret_access_key = x\naws_session_token = t\n")

    with pytest.raises(SinkUnavailable) as caught:
        sink.publish([event(1)])
    assert caught.value.urgent
    assert "renew the credentials" in caught.value.hint
    assert not sink.publish([event(1)])

    assert fake.access_keys[-2:] == ["OLD", "NEW"]
    sink.close()


def test_an_endpoint_that_is_not_there_is_unavailable(behind: Service) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        sink = open_sink(section(behind.type, f"http://127.0.0.1:{nobody.getsockname()[1]}", **behind.options))
        for call in (sink.check, lambda: sink.publish([event(1)])):
            with pytest.raises(SinkUnavailable):
                call()
        sink.close()
