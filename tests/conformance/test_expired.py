"""Credentials that expire and are renewed in their file: whatever uses them goes on, without a new process."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conformance.dead_letter_suite import letter
from conformance.events import event
from figbridge.config import ClaimCheckSection, KinesisSourceSection, S3DeadLetters, SqsDeadLetters, SqsSourceSection
from figbridge.errors import BridgeError
from figbridge.transports import open_dead_letters, open_deposit
from figbridge.transports.kinesis_source import KinesisSource
from figbridge.transports.sqs import SqsSource
from fixtures.anyhttp import AnyHttp
from fixtures.fake_aws import refuse
from fixtures.sinks import service

S3_EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
JSON_EXPIRED = b'{"__type":"com.amazonaws.sqs#ExpiredTokenException","message":"The security token is expired"}'
TAKEN = b'{"MessageId":"m","StreamDescriptionSummary":{"StreamStatus":"ACTIVE"}}'

Write = Callable[[str], object]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """The file of credentials, of which OLD are expired."""
    path = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)

    def write(key: str) -> None:
        path.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = x\naws_session_token = t\n")

    write("OLD")
    return write


@pytest.fixture
def s3() -> Iterator[AnyHttp]:
    with AnyHttp(lambda _, key: (400, S3_EXPIRED, {}) if key == "OLD" else (200, b"", {"ETag": '"e"'})) as server:
        yield server


@pytest.fixture
def json_service() -> Iterator[AnyHttp]:
    with AnyHttp(lambda _, key: (400, JSON_EXPIRED, {}) if key == "OLD" else (200, TAKEN, {})) as server:
        yield server


def goes_on(call: Callable[[], Any], write: Write) -> None:
    for _ in range(2):
        with pytest.raises(BridgeError) as caught:
            call()
        assert caught.value.retryable
        assert caught.value.urgent
        assert "renew the credentials" in caught.value.hint
    write("NEW")
    with pytest.raises(BridgeError):  # the try that finds them
        call()
    call()


def test_a_claim_check(s3: AnyHttp, write: Write) -> None:
    deposit = open_deposit(ClaimCheckSection(bucket="events", region="eu-west-1", endpoint_url=s3.url))
    goes_on(lambda: deposit.deposit(event(1)), write)
    assert [key for _, key in s3.seen] == ["OLD", "OLD", "OLD", "NEW"]
    deposit.close()


def test_dead_letters_in_s3(s3: AnyHttp, write: Write) -> None:
    store = open_dead_letters(S3DeadLetters(type="s3", bucket="events", region="eu-west-1", endpoint_url=s3.url), "")
    goes_on(lambda: store.add([letter(1)]), write)
    store.close()


def test_dead_letters_in_a_queue(json_service: AnyHttp, write: Write) -> None:
    url = json_service.url
    store = open_dead_letters(SqsDeadLetters(type="sqs", queue_url=f"{url}/1/q", endpoint_url=url), "")
    goes_on(lambda: store.add([letter(1)]), write)
    store.close()


def test_the_source_sqs(json_service: AnyHttp, write: Write) -> None:
    url = json_service.url
    source = SqsSource(SqsSourceSection.model_validate({"type": "sqs", "queue_url": f"{url}/1/q", "endpoint_url": url}))
    goes_on(lambda: source.receive(wait=0), write)
    source.close()


def test_the_source_kinesis(json_service: AnyHttp, write: Write) -> None:
    given = {"type": "kinesis", "stream": "s", "endpoint_url": json_service.url}
    source = KinesisSource(KinesisSourceSection.model_validate(given), "")
    goes_on(source.check, write)
    source.close()


@pytest.mark.parametrize("type_", ["eventbridge", "sns", "kinesis+crt"])
def test_a_client_is_made_only_where_there_are_others(type_: str, write: Write) -> None:
    """One takes megabytes, and credentials may stay expired for hours."""
    behind = service(type_)
    with behind.fake() as fake:
        sink = behind.sink(fake)
        client = sink._client  # type: ignore[attr-defined]
        first, take = client.boto, behind.take
        fake.handlers[behind.operation] = lambda given: (
            refuse(400, "ExpiredTokenException")(given) if fake.access_keys[-1] == "OLD" else take(given)
        )
        sink.check()
        for _ in range(3):
            with pytest.raises(BridgeError):
                sink.publish([event(1)])
        assert client.boto is first
        write("NEW")
        threads = [threading.Thread(target=client.expired, args=[BridgeError("expired")]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        second = client.boto
        assert second is not first
        client.expired(BridgeError("expired"))
        assert client.boto is second
        assert not sink.publish([event(1)])
        sink.close()


def test_credentials_that_are_being_written_are_no_others(write: Write, tmp_path: Path) -> None:
    behind = service("sqs")
    with behind.fake() as fake:
        sink = behind.sink(fake)
        client = sink._client  # type: ignore[attr-defined]
        first = client.boto
        for half in ("", "[default]\naws_access_key_id = NEW\n", "[default]\naws_acc", "[def"):
            (tmp_path / "credentials").write_text(half)
            assert client.expired(BridgeError("expired")).urgent
            assert client.boto is first
        write("NEW")
        client.expired(BridgeError("expired"))
        assert client.boto is not first
        sink.close()
