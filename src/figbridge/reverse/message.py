"""From the bytes of a message to an event, and from values to JSON again, without losing a digit.

Invariant: numbers are read as int and Decimal and written as their exact digits, however many there are.

Reading and writing are on the hot path. msgspec does both: it hands over the digits of 12.50, which orjson would make a
double, and writes a Decimal's as they are. What it refuses to read, and -0, the standard library's decoder reads, or
says what is wrong with; what it cannot write (lone surrogates, very deep nesting), or would write in other characters
than ASCII, a slower writer of ours does.

Of a name that an object has twice the last one counts, for the row, for the hash and for the version alike.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable
from decimal import Decimal
from operator import itemgetter
from typing import Any, Final

import msgspec

from figbridge.delivery.pack import DETAIL_TYPE
from figbridge.digits import EXACT, FAST
from figbridge.errors import BridgeError
from figbridge.event import Received

_UNSTORABLE: Final = re.compile("[\\0\ud800-\udfff]")
_NEGATIVE_ZERO: Final = re.compile(rb"-0(?![-.\w])")  # the number; within a text it is rare, and does no harm
_ENVELOPE: Final = itemgetter("id", "source", "detail-type", "detail")


class Malformed(BridgeError):
    """An event that can never be applied, whoever tries: poison.

    ``field`` is the field of the envelope, or the path of the mapping, that is wrong. The message says how it should
    look and never quotes the value, because that may be personal data.
    """

    reason: Final = "malformed"

    def __init__(
        self, field: str, what: str, *, expected: str, hint: str = "mend the producer, then redrive the dead letter"
    ) -> None:
        super().__init__(f"{field} {what}; expected {expected}", hint=hint)
        self.field = field


# (the message, its payload) → the envelope that it has not. Raises Malformed.
Enveloping = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]


def parse(body: bytes, bare: Enveloping | None = None) -> Received:
    """The event of a message body: EventBridge's envelope, bare or as the ``Message`` of an SNS notification.

    A CloudEvent in structured JSON is understood, too: its ``type`` is the detail-type, and its ``data`` is found as
    ``detail`` as well, so that a mapping need not know in which envelope an event came.

    From a Custom Event Bus it comes alone (transformer RAW) or as ``Data`` beside its metadata (WITH_METADATA). `bare`
    makes an envelope for a message that has none.

    https://docs.aws.amazon.com/eventbridge/latest/userguide/eb-custom-bus-transform.html
    https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/formats/json-format.md
    https://docs.aws.amazon.com/eventbridge/latest/ref/overiew-event-structure.html
    https://docs.aws.amazon.com/sns/latest/dg/sns-message-and-json-formats.html
    Raises Malformed.
    """
    try:
        document = _quickly(body)
        if type(document) is not dict:
            document = read(body, "the message")
    except Exception:  # noqa: BLE001 (whatever it was, the other decoder reads it or says what is wrong)
        document = read(body, "the message")
    if (known := _known(document)) is not None:
        return known
    if document.get("Type") == "Notification" and isinstance(document.get("Message"), str):
        document = read(document["Message"], "Message of the SNS notification")
    if "specversion" in document and "detail" not in document:
        document = _of_cloud_event(document)
    if not isinstance(document.get("detail"), dict):
        document = _unwrapped(document, bare)
    identity, source, detail_type = document.get("id"), document.get("source"), document.get("detail-type")
    if detail_type == DETAIL_TYPE:  # of another bridge; ignored, its events would be lost without a word
        raise Malformed("detail", "is a pack of several events", expected="one; set forward.pack: none at its bridge")
    identity, source, detail_type = (_required_text(document, it) for it in ("id", "source", "detail-type"))
    return Received(identity, source, detail_type, document)


def _quickly(body: bytes) -> Any:
    """Raises ValueError and others for what it cannot read, or not exactly."""
    if _NEGATIVE_ZERO.search(body):
        raise ValueError("msgspec would take it for 0")
    return FAST.decode(body)


def _known(document: dict[str, Any]) -> Received | None:
    """The event of an envelope as nearly all of them are: bare, and in ASCII. None for any other."""
    try:
        identity, source, detail_type, detail = _ENVELOPE(document)
    except KeyError:
        return None
    if (
        identity and source and detail_type and type(identity) is type(source) is type(detail_type) is str
        and type(detail) is dict and detail_type != DETAIL_TYPE and "Type" not in document
        and (texts := identity + source + detail_type).isascii() and "\0" not in texts
    ):  # fmt: skip
        return tuple.__new__(Received, (identity, source, detail_type, document))  # as it says, in half of the time
    return None


def _unwrapped(message: dict[str, Any], bare: Enveloping | None) -> dict[str, Any]:
    """The envelope of a message that is none. Raises Malformed."""
    payload, metadata = message, message.get("SystemMetadata")
    if isinstance(metadata, dict) and isinstance(message.get("Data"), dict):
        payload = message["Data"]
        if isinstance(payload.get("detail"), dict):
            return {"id": metadata.get("aws:EventId"), **payload}
    if bare is None:
        raise Malformed("detail", _found(message, "detail"), expected="a JSON object, or the section reverse.bare")
    return bare(message, payload)


def require_rows(document: dict[str, Any]) -> None:
    """Raise Malformed for a claim check: an event of another bridge whose rows are in S3, and not in its detail."""
    claim = document["detail"].get("claim_check")
    if type(claim) is dict and {"bucket", "key", "sha256"} <= claim.keys():
        # applied, it would leave each column alone, or write a row of defaults
        raise Malformed(
            "detail.claim_check",
            "says that the rows are in S3",
            expected="the rows; map the event by a call that fetches the object, or let its bridge use a sink for "
            "larger events instead of forward.claim-check",
            hint="write the object's rows by such a call, then redrive the dead letter",
        )


def hops(event: Received) -> int:
    """How many bridges the event has passed, as its detail says; 0 where it does not."""
    detail = event.document["detail"]
    found = detail.get("hops") if type(detail) is dict else None
    return found if type(found) is int and 0 <= found < 1 << 31 else 0


def _of_cloud_event(document: dict[str, Any]) -> dict[str, Any]:
    if not str(document["specversion"]).startswith("1."):
        raise Malformed("specversion", "is of another version of CloudEvents", expected="1.0")
    for field in ("id", "source", "type"):  # by their own names, in the error
        _required_text(document, field)
    if not isinstance(document.get("data"), dict):
        raise Malformed("data", _found(document, "data"), expected="a JSON object")
    return {**document, "detail-type": document["type"], "detail": document["data"]}


def payload_hash(event: Received) -> bytes:
    """SHA-256 of the canonical JSON of ``detail``: keys sorted, no spaces, numbers with the digits they came with."""
    detail = event.document["detail"]
    try:
        written = _SORTED.encode(detail)
    except (TypeError, ValueError, RecursionError):
        written = b"\xff"
    if not written.isascii():
        written = write(detail, "detail", canonical=True).encode("ascii")
    return hashlib.sha256(written).digest()


def read(text: str | bytes, field: str) -> dict[str, Any]:
    """One JSON object, to the last digit. Raises Malformed, naming `field`."""
    try:
        value = EXACT.decode(text if isinstance(text, str) else text.decode())
    except UnicodeDecodeError as error:
        raise Malformed(field, "is not UTF-8", expected="a JSON object in UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise Malformed(field, "is not JSON that we can read", expected="one JSON object") from error
    if not isinstance(value, dict):
        raise Malformed(field, f"is {_kind(value)}", expected="a JSON object")
    return value


_PLAIN: Final = msgspec.json.Encoder(decimal_format="number")
_SORTED: Final = msgspec.json.Encoder(decimal_format="number", order="sorted")


def _required_text(document: dict[str, Any], field: str) -> str:
    value = document.get(field)
    if not isinstance(value, str):
        raise Malformed(field, _found(document, field), expected="a string")
    return storable(value, field)


def storable(text: str, field: str) -> str:
    """`text`, if a text column can hold it. Raises Malformed."""
    if not text:
        raise Malformed(field, "is empty", expected="a string that names something")
    # PostgreSQL's text holds no NUL; JSON's \ud800 alone is no character in any encoding
    if not plain(text) and _UNSTORABLE.search(text):
        raise Malformed(field, "holds a character that no text column can", expected="Unicode text without NUL")
    return text


def plain(text: str) -> bool:
    """Whether `text` is ASCII without NUL, and so `storable` in any encoding. Quick."""
    return text.isascii() and "\0" not in text


def _found(document: dict[str, Any], field: str) -> str:
    return f"is {_kind(document[field])}" if field in document else "is missing"


def _kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case str():
            return "a string"
        case list():
            return "an array"
        case dict():
            return "an object"
    return "a number"


def write(value: Any, field: str, *, canonical: bool = False) -> str:
    """JSON in ASCII, so that no client encoding can spoil it; `canonical` sorts the keys. Raises Malformed.

    `field` is what the error names. A float that JSON has not must not be in `value`: it would be null. See
    `figbridge.reverse.values.finite`.
    """
    try:
        written = (_SORTED if canonical else _PLAIN).encode(value)
        if written.isascii():
            return written.decode("ascii")
    except (
        TypeError,
        ValueError,
        RecursionError,
    ):  # it has no bytes for it; the other writer has, or says what is wrong
        pass
    try:
        return _write(value, canonical)
    except RecursionError as error:
        raise Malformed(field, "is nested too deeply", expected="a few hundred levels at most") from error
    except ValueError as error:
        raise Malformed(field, str(error), expected="values that JSON has") from error


def _write(value: Any, canonical: bool) -> str:
    # the standard library's encoder has no way to write a Decimal as a number
    match value:
        case str():
            return json.dumps(value)
        case dict():
            # a json column (not jsonb) keeps the order of keys, so only the hash may sort them
            keys = sorted(value) if canonical else value
            return "{" + ",".join([f"{json.dumps(key)}:{_write(value[key], canonical)}" for key in keys]) + "}"
        case list():
            return "[" + ",".join([_write(item, canonical) for item in value]) + "]"
        case None | bool():
            return json.dumps(value)
        case int() | Decimal():
            return str(value)
        case float() if math.isfinite(value):  # only the file and Python callables bring floats
            return repr(value)
    raise ValueError(f"holds a {type(value).__name__} that JSON has not")
