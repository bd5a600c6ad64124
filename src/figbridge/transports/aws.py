"""How a boto3 client is made for a transport, and what AWS's errors mean for a second try.

Invariant: botocore never tries twice by itself. A retry that `figbridge.retry` does not know of would hide from the
metrics, would not end when the bridge is asked to stop, and would sleep inside a loop that has keepalives to answer.

Refuses to guess: without a region or credentials nothing starts. botocore would look for them again at each request
and answer minutes later with an error that names neither.
"""

import contextlib
import functools
import hashlib
import struct
from collections.abc import Iterator, Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final

import boto3
import botocore
import botocore.session
import orjson
from botocore.config import Config as BotoConfig
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,  # noqa: A004 (botocore's own, which is not a subclass of the built-in one)
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    MetadataRetrievalError,
    NoRegionError,
    PartialCredentialsError,
    ProfileNotFound,
    SSLError,
)
from botocore.parsers import ResponseParserError

from figbridge.config import AwsSection
from figbridge.errors import BridgeError

if TYPE_CHECKING:
    from figbridge.transports.crt import Caller


class ForeignAnswer(BotoCoreError):
    """What came back is no answer of AWS: the page of a proxy, or an error of a load balancer in front of AWS."""

    fmt = "what answered is not AWS, a proxy perhaps: {error}"


# What a call of a client raises within `reading`; nothing else of botocore's concerns a transport.
ERRORS: Final = (ClientError, BotoCoreError, ResponseParserError)

# What botocore's parsers raise of a body that they did not expect, beside ResponseParserError. MemoryError: a text that
# is read as CBOR begins with the length of the rest.
_UNREADABLE: Final = (
    AttributeError, LookupError, MemoryError, OverflowError, RecursionError, TypeError, ValueError, struct.error,
)  # fmt: skip

_CONNECT_TIMEOUT = 3  # seconds; an endpoint that does not answer a SYN by then is not there
# Seconds without a byte. More than the 20 s of SQS's longest poll, or each poll of an empty queue would be an error:
# https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-short-and-long-polling.html
_READ_TIMEOUT = 30

# https://docs.aws.amazon.com/eventbridge/latest/APIReference/CommonErrors.html and, for the older spellings,
# https://docs.aws.amazon.com/sdkref/latest/guide/feature-retry-behavior.html ("which errors are retried").
# The HTTP status alone does not tell: ThrottlingException and RequestExpired are 400.
_RETRYABLE: Final = frozenset({
    "BandwidthLimitExceeded",
    "EC2ThrottledException",
    "ExpiredToken",  # credentials are refreshed between tries; a bridge that ends at each expiry would be worse
    "ExpiredTokenException",
    "InternalError",
    "InternalException",
    "InternalFailure",
    "InternalFailureException",
    "InternalServerError",
    "InternalServiceError",
    "KMSThrottling",
    "KMSThrottlingException",
    "KmsThrottled",
    "LimitExceededException",
    "OverLimit",
    "PriorRequestNotComplete",
    "ProvisionedThroughputExceededException",
    "RequestAbortedException",
    "RequestExpired",  # our clock was off or we were suspended; a new request has a new date
    "RequestLimitExceeded",
    "RequestThrottled",
    "RequestThrottledException",
    "RequestTimeout",
    "RequestTimeoutException",
    "ServiceUnavailable",
    "ServiceUnavailableException",
    "SlowDown",
    "Throttled",
    "ThrottledException",
    "Throttling",
    "ThrottlingException",
    "TooManyRequestsException",
    "TransactionInProgressException",
})  # fmt: skip
_EXPIRED: Final = frozenset({"ExpiredToken", "ExpiredTokenException"})
_RETRYABLE_STATUS: Final = frozenset({408, 429, 500, 502, 503, 504})
_PASSING: Final = (
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    CredentialRetrievalError,
    MetadataRetrievalError,
    ResponseParserError,
    ForeignAnswer,
)

_NO_CREDENTIALS: Final = (
    "give the process a role (ECS task role, EKS service account, instance profile), or set AWS_PROFILE, or set "
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; an emulator takes any values"
)


def session(section: AwsSection) -> boto3.Session:
    """What reads region and credentials, each time anew. Raises BridgeError with a hint.

    Not for two threads at once: https://docs.aws.amazon.com/boto3/latest/guide/session.html
    """
    with _opening("AWS"):
        return boto3.Session(region_name=section.region)


def client(
    service: str, section: AwsSection, session: boto3.Session, *, validate: bool = True, connections: int = 10
) -> Any:
    """A boto3 client for `service` (botocore's name: ``events``, ``sqs``), with botocore's retries off.

    `validate` False skips botocore's check of the parameters; only for a caller that did its own. `connections` is how
    many threads use it at once; with fewer each further request would open a connection and drop it.
    Raises BridgeError with a hint when there is no region, profile or credentials. Nothing is called yet.
    """
    settings = BotoConfig(
        # counts the first attempt; without it botocore makes five
        retries={"total_max_attempts": 1},
        connect_timeout=_CONNECT_TIMEOUT,
        read_timeout=_READ_TIMEOUT,
        tcp_keepalive=True,  # a NAT gateway forgets an idle connection after 350 s and tells nobody
        parameter_validation=validate,
        max_pool_connections=connections,
        # whole, and not botocore's with an addition: botocore would put its own together anew for each request, twice
        user_agent=_user_agent(),
    )
    with _opening(service):
        credentials = session.get_credentials()
        made = session.client(service, endpoint_url=section.endpoint_url, config=settings)  # type: ignore[call-overload]  # stubs know literal names
    if credentials is None:
        raise BridgeError(f"no AWS credentials for {service}", hint=_NO_CREDENTIALS)
    return made


@contextlib.contextmanager
def _opening(service: str) -> Iterator[None]:
    try:
        yield
    except NoRegionError as error:
        raise BridgeError(
            f"no AWS region for {service}",
            hint="set region in this section of the configuration, or AWS_DEFAULT_REGION in the environment",
        ) from error
    except (PartialCredentialsError, CredentialRetrievalError) as error:
        raise BridgeError(f"no AWS credentials for {service}: {error}", hint=_NO_CREDENTIALS) from error
    except ProfileNotFound as error:
        raise BridgeError(str(error), hint="mend AWS_PROFILE, or mount the file it is defined in") from error
    except (BotoCoreError, ValueError) as error:  # ValueError: an endpoint_url that is not a URL
        raise BridgeError(
            f"no client for {service}: {error}", hint="check region and endpoint_url of this section"
        ) from error


def caller(client: Any, operation: str, credentials: Any) -> "Caller":
    """What calls `operation` of the client's service by the AWS Common Runtime. Raises BridgeError."""
    from figbridge.transports.crt import Caller  # noqa: PLC0415 (an extra)

    return Caller(
        client,
        operation,
        credentials=credentials,
        user_agent=_user_agent(),
        connect_timeout=_CONNECT_TIMEOUT,
        read_timeout=_READ_TIMEOUT,
        authorities=botocore.session.get_session().get_config_variable("ca_bundle"),  # AWS_CA_BUNDLE, or the profile's
    )


@contextlib.contextmanager
def reading(status: int | None = None) -> Iterator[None]:
    """Around the call of a client and the reading of its answer. Raises ForeignAnswer for one that cannot be read.

    Around nothing else: a defect of ours must end the bridge, and would be tried for ever in here.
    """
    try:
        yield
    except _UNREADABLE as error:
        http = "" if status is None else f"HTTP {status}, "
        raise ForeignAnswer(error=f"{http}{type(error).__name__}: {error}") from error


def proven(answer: Mapping[str, Any], name: str) -> None:
    """Raises ForeignAnswer if an answer has no `name`, by which AWS says that it has stored something."""
    if not answer.get(name):
        raise ForeignAnswer(error=f"an answer without {name}")


def take_bodies(client: Any, operation: str) -> None:
    """Let an operation of a JSON service be given its body ready-made, as ``Body``, and answer ``Answer``, parsed.

    botocore walks through each value of each entry by the service's model, in Python, on the way out and on the way
    back: two thirds of the CPU of a PutRecords. The hooks are botocore's own; signing, endpoints, credentials and
    errors stay its business. Other parameters may be given beside, for the rules that choose the endpoint.
    https://docs.aws.amazon.com/boto3/latest/guide/events.html
    """
    name = f"{client.meta.service_model.service_id.hyphenize()}.{operation}"
    events = client.meta.events
    events.register(f"provide-client-params.{name}", _keep_body)
    events.register(f"before-call.{name}", _put_body)
    events.register(f"before-parse.{name}", _parse)


def _keep_body(params: dict[str, Any], context: dict[str, Any], **_: Any) -> None:
    context["figbridge.body"] = params.pop("Body")


def _put_body(params: dict[str, Any], context: dict[str, Any], **_: Any) -> None:
    params["body"] = context["figbridge.body"]


def _parse(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any) -> None:
    if response_dict["status_code"] >= 300:
        return  # an error, which botocore reads
    try:
        answer = orjson.loads(response_dict["body"])
    except orjson.JSONDecodeError:
        return  # of a proxy perhaps; botocore says so
    if isinstance(answer, dict):
        customized_response_dict["Answer"] = answer
        response_dict["body"] = b"{}"


def classify(error: Exception) -> tuple[str, bool]:
    """(code, retryable) of what a client's call raised: one of `ERRORS`.

    The code is the service's own, or botocore's class name when no service answered.
    Retryable are throttling, the service's own failures, lost connections, timeouts and expired credentials.
    """
    if isinstance(error, ClientError):
        code = str(error.response.get("Error", {}).get("Code") or "Unknown")
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return code, status in _RETRYABLE_STATUS or retryable(code)
    name = type(error).__name__
    if isinstance(error, SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        return name, False  # any other TLS failure may be a connection cut in its handshake
    return name, isinstance(error, _PASSING)


def expired(code: str) -> bool:
    """Whether an error code says that the credentials of a request have expired."""
    return code.rpartition(".")[2] in _EXPIRED


def retryable(code: str) -> bool:
    """Whether an error code, of a request or of a single entry, says that a later try may succeed."""
    return code.rpartition(".")[2] in _RETRYABLE


def remedy(code: str, *, action: str, resource: str) -> str:
    """What the operator does about `code` when the IAM action `action` on `resource` was refused with it."""
    if code.upper().startswith("KMS"):
        return (
            f"let this role use the KMS key of {resource} (kms:GenerateDataKey, kms:Decrypt); the key must be enabled"
        )
    if "AccessDenied" in code or code.startswith(("NotAuthorized", "AuthorizationError")):
        return f"allow {action} on {resource} to this role; look into the resource's own policy as well"
    if code in {"UnrecognizedClientException", "InvalidClientTokenId", "InvalidSignatureException"}:
        return "the credentials are not valid for this region and account; check them, and this machine's clock"
    if "NotFound" in code or "NonExistent" in code or code in {"QueueDoesNotExist", "NoSuchBucket"}:
        return f"create {resource}, or check its name, the region and the account"
    if code == "SSLError":
        return "the endpoint's certificate is not trusted here; name its authority with AWS_CA_BUNDLE"
    return f"AWS refused {action} on {resource} with {code}; mend what the message says and start again"


def trace_header(template: str, identity: str, time: datetime) -> str:
    """X-Ray's trace header of an event, by a template of ``{trace}`` and ``{id}``.

    The trace is that of the event's transaction, derived from its id like everything else: what is delivered again is
    the same trace. https://docs.aws.amazon.com/xray/latest/devguide/xray-api-sendingdata.html#xray-api-traceids
    """
    return template.format(trace=_trace(identity.rpartition("-")[0], int(time.timestamp())), id=identity)


@functools.lru_cache(maxsize=64)
def _trace(transaction: str, seconds: int) -> str:
    return f"1-{seconds:08x}-{hashlib.blake2b(transaction.encode(), digest_size=12).hexdigest()}"


def _user_agent() -> str:
    return f"Boto3/{boto3.__version__} Botocore/{botocore.__version__} figbridge/{_version()}"


def _version() -> str:
    try:
        return version("figbridge")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0"
