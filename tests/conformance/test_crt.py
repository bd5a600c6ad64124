"""The client of the AWS Common Runtime: what botocore would have done for it. The suites run with it, too."""

import json
import re
import socket
import threading
from collections.abc import Iterator

import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from pydantic import ValidationError

from conformance.events import event
from figbridge.errors import BridgeError, SinkUnavailable
from figbridge.transports import open_sink
from figbridge.transports.eventbridge import EventBridgeSink
from fixtures.fake_aws import FakeAws
from fixtures.sinks import Service, section, service


@pytest.fixture(params=["eventbridge+crt", "kinesis+crt", "firehose+crt", "sqs+crt"])
def behind(request: pytest.FixtureRequest) -> Service:
    return service(request.param)


@pytest.fixture
def fake(behind: Service) -> Iterator[FakeAws]:
    with behind.fake() as fake:
        yield fake


def test_a_request_is_signed_as_botocore_would(behind: Service, fake: FakeAws, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
    sink = behind.sink(fake)
    caller = sink._caller  # type: ignore[attr-defined]
    body = json.dumps({"x": "ä"}).encode()

    headers = {name.lower(): value for name, value in caller._signed(body).items()}

    found = re.fullmatch(
        r"AWS4-HMAC-SHA256 Credential=testing/\d{8}/eu-west-1/(\w+)/aws4_request, SignedHeaders=([\w;-]+), "
        r"Signature=([0-9a-f]{64})",
        headers["authorization"],
    )
    assert found
    name, signed, signature = found.groups()
    assert {"host", "x-amz-date", "x-amz-security-token", "x-amz-target"} <= set(signed.split(";"))
    request = AWSRequest("POST", f"{fake.url}/", {it: headers[it] for it in signed.split(";")}, body)
    request.context["timestamp"] = headers["x-amz-date"]
    signer = SigV4Auth(Credentials("testing", "testing", "token"), name, "eu-west-1")
    assert signer.signature(signer.string_to_sign(request, signer.canonical_request(request)), request) == signature
    sink.close()


def test_connections_are_used_again(behind: Service, fake: FakeAws) -> None:
    sink = behind.sink(fake)
    for n in range(5):
        assert not sink.publish([event(n)])
    assert sink._caller._idle.qsize() == 1  # type: ignore[attr-defined]
    sink.close()
    assert sink._caller._idle.qsize() == 0  # type: ignore[attr-defined]


ANSWER = b'{"FailedEntryCount":0,"Entries":[{"EventId":"e"}]}'


class Closing:
    """Answers one request of each connection and then closes it, once it is told to or, with `says`, at once."""

    def __init__(self, *, says: bool) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._says = says
        self.may_close, self.closed = threading.Event(), threading.Event()
        self.connections = 0
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            with connection:
                received = b""
                while b"\r\n\r\n" not in received or b'"Entries"' not in received:
                    received += connection.recv(65536)
                more = b"Connection: close\r\n" if self._says else b""
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%b\r\n%b" % (len(ANSWER), more, ANSWER))
                if not self._says:
                    self.may_close.wait(10)
            self.closed.set()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@pytest.mark.parametrize("says", [False, True])
def test_a_connection_that_the_service_has_closed_is_no_failure(*, says: bool) -> None:
    """An idle one is closed after some seconds; sent into, a request would be lost without a need."""
    server = Closing(says=says)
    sink = open_sink(section("eventbridge", f"http://127.0.0.1:{server.port}", bus="orders", client="crt"))
    assert isinstance(sink, EventBridgeSink)
    sink._looked_up = sink._clock()
    for n in range(3):
        assert not sink.publish([event(n)])
        server.may_close.set()
        assert server.closed.wait(10)
        server.closed.clear()
    assert server.connections == 3
    sink.close()
    server.close()


def test_a_proxy_is_for_boto3(behind: Service, fake: FakeAws, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(BridgeError, match="proxy") as caught:
        behind.sink(fake)
    assert "client: boto3" in caught.value.hint
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    behind.sink(fake).close()


def test_a_handshake_that_fails_may_pass() -> None:
    """Here something that speaks no TLS at all."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        endpoint = f"https://127.0.0.1:{listener.getsockname()[1]}"
        sink = open_sink(section("eventbridge", endpoint, bus="orders", client="crt"))
        with pytest.raises(SinkUnavailable, match="SSLError"):
            sink._put([event(1)], [b"{}"])  # type: ignore[attr-defined]
        thread.join()
        sink.close()


def test_without_the_extra_the_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ValidationError, match=r"figbridge\[crt\]"):
        section("eventbridge", "http://127.0.0.1:1", bus="orders", client="crt")
