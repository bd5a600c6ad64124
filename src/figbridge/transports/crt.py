"""One operation of a JSON service, signed by the AWS Common Runtime: the extra ``figbridge[crt]``.

botocore puts a request together in Python, through its hooks, its rules of endpoints and its own signer, which is most
of the CPU of a small request. Here a request is its bytes, a signature made in C, and a connection that is kept.

What stays botocore's: where credentials come from and when they are renewed, the endpoint, what an error of the service
means. So a sink raises the same, whichever client it has.

INVARIANT. A connection is used again only after an answer was read to its end: an answer that was not waited for can
never be taken for that of a later request.

What it refuses to do: go through a proxy. botocore does.
https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html
"""

import hashlib
import http.client
import queue
import select
import socket
import ssl
import urllib.request
from typing import Any, Final, NoReturn
from urllib.parse import urlsplit

import orjson
from awscrt import auth
from awscrt.http import HttpHeaders, HttpRequest
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    ConnectTimeoutError,
    EndpointConnectionError,
    ReadTimeoutError,
    SSLError,
)
from botocore.parsers import create_parser

from figbridge.errors import BridgeError
from figbridge.transports import aws

_ERRORS: Final = create_parser("json")


class Caller:
    """Calls `operation` of the service of `client`, a boto3 client; any number of threads.

    `credentials` are botocore's, and may be exchanged for others; `user_agent` is what the client would say.
    Raises BridgeError where a proxy is set for the endpoint. Timeouts in seconds.
    """

    def __init__(
        self,
        client: Any,
        operation: str,
        *,
        credentials: Any,
        user_agent: str,
        connect_timeout: float,
        read_timeout: float,
        authorities: str | None,
    ) -> None:
        model = client.meta.service_model
        self._url = str(client.meta.endpoint_url)
        self._operation = operation
        self._shape = model.operation_model(operation).output_shape
        self.credentials = credentials
        self._region, self._service = client.meta.region_name, model.signing_name
        self._timeouts = connect_timeout, read_timeout
        parts = urlsplit(self._url)
        self._host, self._port, self._path = parts.hostname or "", parts.port, parts.path or "/"
        if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(self._host):
            raise BridgeError(
                f"{self._url} is behind a proxy, and client: crt goes through none",
                hint="set client: boto3 in this section, or add the host to NO_PROXY",
            )
        self._tls = ssl.create_default_context(cafile=authorities) if parts.scheme == "https" else None
        self._headers = [
            ("Host", parts.netloc),
            ("Content-Type", f"application/x-amz-json-{model.metadata.get('jsonVersion', '1.0')}"),
            ("X-Amz-Target", f"{model.metadata['targetPrefix']}.{operation}"),
            ("User-Agent", user_agent),
        ]
        self._idle: queue.SimpleQueue[http.client.HTTPConnection] = queue.SimpleQueue()

    def __call__(self, body: bytes) -> dict[str, Any]:
        """The answer, parsed. Raises what a boto3 client raises."""
        headers = self._signed(body)
        connection = self._connection()
        try:
            connection.request("POST", self._path, body, headers)
            response = connection.getresponse()
            content = response.read()
        except BaseException as error:
            connection.close()
            if isinstance(error, (OSError, http.client.HTTPException)):
                self._fail(error)
            raise
        if response.will_close:
            connection.close()
        else:
            self._idle.put(connection)
        if response.status >= 300:
            document = {"status_code": response.status, "headers": dict(response.getheaders()), "body": content}
            with aws.reading(response.status):
                parsed = _ERRORS.parse(document, self._shape)
            raise ClientError(parsed, self._operation)
        try:
            answer = orjson.loads(content)
        except orjson.JSONDecodeError:  # of something between us and AWS; which entries were taken is not known
            return {}
        return answer if isinstance(answer, dict) else {}

    def close(self) -> None:
        """Close the connections that nobody uses at this moment; the others are closed by their users' end."""
        while True:
            try:
                self._idle.get_nowait().close()
            except queue.Empty:
                return

    def _signed(self, body: bytes) -> dict[str, str]:
        # frozen: a provider that renews its credentials does it in here, and never between key and secret
        frozen = self.credentials.get_frozen_credentials()
        config = auth.AwsSigningConfig(
            algorithm=auth.AwsSigningAlgorithm.V4,
            signature_type=auth.AwsSignatureType.HTTP_REQUEST_HEADERS,
            credentials_provider=auth.AwsCredentialsProvider.new_static(
                frozen.access_key, frozen.secret_key, frozen.token
            ),
            region=self._region,
            service=self._service,
            signed_body_value=hashlib.sha256(body).hexdigest(),
        )
        headers = HttpHeaders([*self._headers, ("Content-Length", str(len(body)))])
        return dict(auth.aws_sign_request(HttpRequest("POST", self._path, headers), config).result().headers)

    def _connection(self) -> http.client.HTTPConnection:
        while True:
            try:
                connection = self._idle.get_nowait()
            except queue.Empty:
                return self._connected()
            if not _ended(connection):
                return connection
            connection.close()

    def _connected(self) -> http.client.HTTPConnection:
        connect, read = self._timeouts
        connection = (
            http.client.HTTPSConnection(self._host, self._port, timeout=connect, context=self._tls)
            if self._tls
            else http.client.HTTPConnection(self._host, self._port, timeout=connect)
        )
        try:
            connection.connect()
        except TimeoutError as error:
            raise ConnectTimeoutError(endpoint_url=self._url, error=error) from error
        except ssl.SSLError as error:
            raise SSLError(endpoint_url=self._url, error=error) from error
        except OSError as error:
            raise EndpointConnectionError(endpoint_url=self._url, error=error) from error
        made = connection.sock
        made.settimeout(read)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a NAT gateway forgets, and tells nobody
        return connection

    def _fail(self, error: Exception) -> NoReturn:
        if isinstance(error, TimeoutError):
            raise ReadTimeoutError(endpoint_url=self._url, error=error) from error
        if isinstance(error, ssl.SSLError):
            raise SSLError(endpoint_url=self._url, error=error) from error
        raise ConnectionClosedError(endpoint_url=self._url, error=error) from error


def _ended(connection: http.client.HTTPConnection) -> bool:
    """Whether the other side has closed an idle connection, or says something that nobody asked for."""
    if connection.sock is None:
        return True
    look = select.poll()  # not select(), which knows no descriptor beyond 1023
    look.register(connection.sock, select.POLLIN)
    return bool(look.poll(0))
