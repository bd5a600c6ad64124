"""What every sink of AWS does alike: check each entry, send what can be taken, read the answer for each.

INVARIANT: an event counts as durable only when AWS said so of its own entry. An entry with neither success nor error is
sent again.

Entries that AWS would not take are returned without being sent, because one that is too large makes AWS refuse the
whole request. When it refuses a whole request for what is in it all the same, the request is sent again in halves
until the entry is found: one bad event must not stop the others, nor be repeated with them for ever.

Refuses to guess who is at fault: if every entry of a request is refused for our rights or for the same content error,
it is the set-up, so the sink stops with the remedy and nothing is dead-lettered.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

import orjson
from botocore import xform_name

from figbridge.config import AwsSinkSection, JsonSinkSection
from figbridge.errors import SinkError, SinkRefused, SinkUnavailable
from figbridge.event import Event, Rejection
from figbridge.transports import Limits, aws
from figbridge.transports.awsclient import Client

if TYPE_CHECKING:
    from figbridge.transports.crt import Caller

# Codes of an entry that are about who we are, not about the entry: the next one would fare no better.
_FORBIDDEN: Final = ("AccessDenied", "NotAuthorized", "InvalidAccountId", "AuthorizationError", "KMS", "Kms")
# What MessageGroupId and MessageDeduplicationId may hold; a partition key may hold more
_MOST_PLAIN: Final = 128  # characters


class Refusal(NamedTuple):
    """AWS's word on one entry: its code and text, and whether a later try may succeed."""

    code: str
    message: str
    retryable: bool


class Unfit(Exception):
    """An entry that AWS would not take. The code is AWS's own, but for EntryTooLarge."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class AwsSink(ABC):
    """One destination. Raises BridgeError when made without a region or credentials.

    service   botocore's name of the service
    action    the IAM action of a request, such as ``kinesis:PutRecords``
    content   codes by which the service refuses a whole request for what is in it
    resource  what the destination is, for messages: ``the queue https://...``
    """

    name: ClassVar[str]
    service: ClassVar[str]
    action: ClassVar[str]
    content: ClassVar[frozenset[str]]

    def __init__(self, section: AwsSinkSection, limits: Limits, *, resource: str) -> None:
        self.limits = replace(limits, in_flight=section.in_flight)
        self.resource = resource
        self._section = section
        # botocore's own check of the parameters takes a third of the CPU of a call; `entry` says more, for less
        self._client = Client(
            self.service, section, validate=False, connections=self.limits.in_flight, made=self._connected
        )

    @abstractmethod
    def size(self, event: Event) -> int:
        """See `Sink.size`."""

    @abstractmethod
    def look_up(self) -> None:
        """Ask the service for the destination. What the client raises is translated by `check`."""

    @abstractmethod
    def entry(self, event: Event, payload: bytes, index: int) -> Any:
        """`event` as the `index`-th entry of a request, in whatever form `send` wants it. Raises Unfit.

        `payload` is from `payloads`.
        """

    @abstractmethod
    def send(self, entries: list[Any]) -> Sequence[Refusal | None]:
        """One request: for each entry its refusal, None where it is durable. Raises what the client raises."""

    def payloads(self, events: Sequence[Event]) -> Sequence[bytes]:
        """What is sent of each event: its body, or its content if the service makes an envelope of its own."""
        return events[0].bodies(events) if events else ()

    look_up_action: ClassVar[str]

    def check(self) -> None:
        """Look the destination up. Raises SinkRefused, SinkUnavailable.

        That we may write to it is shown by the first request only: a made-up entry would be read by consumers.
        """
        try:
            with aws.reading():
                self.look_up()
        except aws.ERRORS as error:
            raise self._translated(error, self.look_up_action) from error

    def publish(self, events: Sequence[Event]) -> Sequence[Rejection]:
        """One request. Returns the entries that were not taken; raises SinkUnavailable, SinkRefused."""
        rejections: list[Rejection] = []
        sent: list[Event] = []
        entries: list[Any] = []
        for event, payload in zip(events, self.payloads(events), strict=True):
            try:
                entries.append(self.entry(event, payload, len(entries)))
            except Unfit as flaw:
                rejections.append(Rejection(event, flaw.code, str(flaw), retryable=False))
            except UnicodeDecodeError as error:  # a database of encoding SQL_ASCII holds any bytes
                rejections.append(Rejection(event, "MalformedDetail", str(error), retryable=False))
            else:
                sent.append(event)
        if not entries:
            return rejections
        refused = self._put(sent, entries)
        if len(refused) == len(sent) and all(not it.retryable and it.code.startswith(_FORBIDDEN) for it in refused):
            first = refused[0]
            raise SinkRefused(
                f"{self.resource} refused every entry: {first.code}: {first.message}",
                hint=aws.remedy(first.code, action=self.action, resource=self.resource),
            )
        return [*rejections, *refused]

    def fit(self, payload: bytes) -> bytes:
        """`payload`, if it is not too large. Raises Unfit."""
        if len(payload) > self.limits.entry_bytes:
            most = self.limits.entry_bytes
            raise Unfit("EntryTooLarge", f"{len(payload)} bytes, and {self.resource} takes {most}")
        return payload

    def close(self) -> None:
        """Close the client's connections."""
        self._client.close()

    def _put(self, events: Sequence[Event], entries: list[Any]) -> list[Rejection]:
        try:
            results = self.send(entries)
        except aws.ERRORS as error:
            code, retryable = aws.classify(error)
            fault = None if retryable else self.fault(code, str(error))
            if fault is None:
                raise self._translated(error, self.action) from error
            return self._find(events, entries, fault, error)
        if len(results) != len(entries):
            raise SinkUnavailable(
                f"{self.action} answered {len(results)} results for {len(entries)} entries: which were taken is not "
                "known",
                hint="look at what stands between the bridge and AWS, a proxy perhaps; all of them are sent again",
            )
        return [
            Rejection(event, *result)
            for event, result in zip(events, results, strict=True)
            if result is not None
        ]  # fmt: skip

    def fault(self, code: str, message: str) -> str | None:  # noqa: ARG002 (for those that need it)
        """The code of an entry for which alone a request would be refused with `code`; None if it is not for an entry.

        Then a part of the request may be taken.
        """
        code = code.rpartition(".")[2]
        if code == "BatchRequestTooLong":
            return "EntryTooLarge"
        return code if code in self.content else None

    def _find(self, events: Sequence[Event], entries: list[Any], code: str, error: Exception) -> list[Rejection]:
        """Send the halves of a request that was refused for its content, down to the entry that is at fault."""
        if len(entries) == 1:
            return [Rejection(events[0], code, str(error), retryable=False)]
        half = len(entries) // 2
        rejections = [*self._put(events[:half], entries[:half]), *self._put(events[half:], entries[half:])]
        if code != "EntryTooLarge" and len(rejections) == len(entries) and all(it.code == code for it in rejections):
            raise self._translated(error, self.action) from error
        return rejections

    def _connected(self, boto: Any, credentials: Any) -> None:  # noqa: B027 (nothing is to be done, as a rule)
        """A new client is about to be used."""

    def _translated(self, error: Exception, action: str) -> SinkError:
        code, retryable = aws.classify(error)
        what = f"{action} on {self.resource}: {code}: {error}"
        if aws.expired(code):
            return self._client.expired(SinkUnavailable(what))
        if retryable:
            return SinkUnavailable(what, hint="nothing is lost; the bridge tries again")
        return SinkRefused(what, hint=aws.remedy(code, action=action, resource=self.resource))


class JsonSink(AwsSink):
    """Of a service that speaks JSON: its entries are JSON objects, its answer is taken as parsed JSON.

    operation  of the request, such as ``PutRecords``
    """

    operation: ClassVar[str]
    _section: JsonSinkSection
    _caller: "Caller | None" = None

    def request(self, body: bytes, **parameters: Any) -> dict[str, Any]:
        """The answer to one request; `parameters` are for the rules by which botocore chooses an endpoint."""
        with aws.reading():
            if self._caller:
                return self._caller(body)
            answer: dict[str, Any] = self._method(Body=body, **parameters).get("Answer", {})
            return answer

    def close(self) -> None:
        """See `AwsSink.close`."""
        super().close()
        if self._caller:
            self._caller.close()

    def _connected(self, boto: Any, credentials: Any) -> None:
        aws.take_bodies(boto, self.operation)
        self._method = getattr(boto, xform_name(self.operation))
        if self._caller:  # other threads may be waiting for answers to it, so it only learns new credentials
            self._caller.credentials = credentials
        elif self._section.client == "crt":
            self._caller = aws.caller(boto, self.operation, credentials)


def body(entries: Iterable[bytes], name: str, frame: Mapping[str, str]) -> bytes:
    """A request's body: the parameters of `frame`, and `entries` as the parameter `name`."""
    return b'%b,"%b":[%b]}' % (orjson.dumps(frame)[:-1], name.encode(), b",".join(entries))


def refusal(result: Mapping[str, Any]) -> Refusal:
    """Of an entry that is not durable, from its part of the answer.

    Without a code AWS said neither yes nor no: the one safe reading is "again". What SQS and SNS call no fault of the
    sender may be taken later.
    """
    code = result.get("ErrorCode") or result.get("Code")
    if not code or not isinstance(code, str):
        return Refusal("NoAnswer", "neither taken nor refused", retryable=True)
    message = str(result.get("ErrorMessage") or result.get("Message") or "")
    return Refusal(code, message, retryable=aws.retryable(code) or result.get("SenderFault") is False)


def in_order(answer: Mapping[str, Any], name: str, proof: str) -> list[Refusal | None]:
    """Results that stand under `name`, in the order of the entries; `proof` without an error is a success."""
    return [None if it.get(proof) and not it.get("ErrorCode") else refusal(it) for it in _objects(answer, name)]


def by_id(answer: Mapping[str, Any], ids: Iterable[str]) -> list[Refusal | None]:
    """Results that are named by the entry's Id: Successful and Failed, as SQS and SNS answer."""
    taken = {str(it.get("Id")) for it in _objects(answer, "Successful")}
    failed = {str(it.get("Id")): it for it in _objects(answer, "Failed")}
    return [None if id_ in taken else refusal(failed.get(id_, {})) for id_ in ids]


def _objects(answer: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """A list of an answer, which nobody has read before us; what is no object says nothing of its entry."""
    found = answer.get(name)
    if not isinstance(found, list):  # a server in Go says null for an empty one
        return []
    return [it if isinstance(it, dict) else {} for it in found]


def message(event: Event, payload: bytes, number: str, name: str, *, fifo: bool) -> dict[str, Any]:
    """An entry of SQS or SNS: `payload` as the parameter `name`, and what a FIFO queue or topic goes by."""
    entry: dict[str, Any] = {"Id": number, name: payload.decode()}
    if fifo:
        entry["MessageGroupId"] = plain(event.key)
        entry["MessageDeduplicationId"] = plain(event.id)
    return entry


def plain(text: str) -> str:
    """`text` as AWS takes it for a group, a deduplication id or a partition key: itself, or a hash where it would not.

    A hash is 64 hexadecimal digits of SHA-256. Equal texts stay equal, which is all that is asked of them.
    """
    if len(text) <= _MOST_PLAIN and text.isascii() and text.isprintable() and text and " " not in text:
        return text
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def xml_safe(body: bytes) -> bytes:
    r"""JSON without U+FFFE and U+FFFF, which SQS and SNS refuse; as escapes in a JSON text they are the same values.

    Every other character that XML does not know is a control character, which JSON writes as an escape anyway. All
    JSON that is not within a string is ASCII, so the replacement cannot hit anything else.
    """
    if b"\xef\xbf" in body:
        body = body.replace(b"\xef\xbf\xbe", rb"\ufffe").replace(b"\xef\xbf\xbf", rb"\uffff")
    return body
