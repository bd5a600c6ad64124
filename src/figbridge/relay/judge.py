"""One message → what becomes of it. Pure: no clock that matters, no network, nothing remembered.

The detail of a valid event is cut out of the message, not parsed and printed again: a double has 17 digits, and a
number of a producer may have more.

No text here repeats a value of an event: reasons go into logs.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, Literal, NamedTuple

import jmespath
import orjson

from figbridge import members
from figbridge.config import RelaySection
from figbridge.contracts import Breach, Contracts
from figbridge.event import Event
from figbridge.members import Member, NotJson, Number

MARK: Final = "relayed"  # the member that the relay adds to a detail
_OWN: Final = ("id", "op", "schema", "table", "position")  # members that together only figbridge's own events have
_NEEDED: Final = ("id", "source", "detail-type")

Reason = Literal["malformed", "no_contract", "contract", "reserved", "id_reused", "refused"]
Drop = Literal["valid_already", "quarantined_already", "hops", "duplicate"]


class Valid(NamedTuple):
    """To be published. ``name`` is what tells a repetition; ``body`` the message, in case the sink refuses it."""

    event: Event
    name: tuple[str, str]
    body: bytes


class Invalid(NamedTuple):
    """To be set aside: the event that says why, for the quarantine."""

    event: Event
    reason: Reason
    breaches: Sequence[Breach]
    contract: str | None
    body: bytes


class _Flaw(NamedTuple):
    reason: Reason
    breaches: Sequence[Breach]
    contract: str | None


class Dropped(NamedTuple):
    """Nothing more is done about it. ``source`` is as it came."""

    why: Drop
    id: str
    source: str


Verdict = Valid | Invalid | Dropped


class _Malformed(Exception):
    """The message is no event. ``breach`` says why."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(message)
        self.breach = Breach(path, message)


class _Parsed(NamedTuple):
    text: str
    envelope: Mapping[str, Member]
    detail: Mapping[str, Member]
    source: str
    detail_type: str
    time: datetime


class Judge:
    """Judges by `contracts` and the section's rules."""

    def __init__(self, section: RelaySection, contracts: Contracts) -> None:
        self._contracts = contracts
        self._section = section
        self._id = jmespath.compile(section.event_id) if section.event_id else None
        self._key = jmespath.compile(section.key) if section.key else None

    def judge(self, body: bytes) -> Verdict:
        """What becomes of a message: EventBridge's envelope or a CloudEvent, bare or as SNS's ``Message``."""
        try:
            parsed = _parse(body)
            identity = self._identity(parsed)
        except _Malformed as error:
            return self.invalid(body, "malformed", [error.breach])
        section, source = self._section, parsed.source
        mark = parsed.detail.get(MARK)
        # not the detail's own hops: in figbridge's events they count something else, and a service means what it likes
        hops = _hops(mark.value) if mark and _is_ours(mark) else 0
        if why := self._forwarded_already(source, hops):
            return Dropped(why, identity, source)
        if flaw := self._flaw(parsed, mark):
            return self._invalid(parsed, identity, *flaw)
        event = Event(
            id=identity,
            source=f"{section.prefix}{source}",
            detail_type=parsed.detail_type,
            key=self._order(parsed, identity),
            time=parsed.time,
            detail=_marked(parsed, identity, hops + 1),
            old_key=_old_key(parsed.detail),
            whole_table=_is_whole(parsed.detail),
        )
        return Valid(event, (source, identity), body)

    def _forwarded_already(self, source: str, hops: int) -> Drop | None:
        if source.startswith(self._section.prefix):
            return "valid_already"
        if source.startswith(self._section.quarantine_prefix):
            return "quarantined_already"
        return "hops" if hops >= self._section.max_hops else None

    def _flaw(self, parsed: _Parsed, mark: Member | None) -> _Flaw | None:
        if mark is not None and not _is_ours(mark):
            breach = Breach(f"/detail/{MARK}", "is the relay's own member; the service must name its own otherwise")
            return _Flaw("reserved", [breach], None)
        contract = self._contracts.find(parsed.source, parsed.detail_type)
        if contract is None:
            if self._section.unknown == "forward":
                return None
            breach = Breach("", "there is no contract for events of this source and detail-type")
            return _Flaw("no_contract", [breach], None)
        breaches = contract.breaches(_bytes(parsed.envelope["detail"].text))
        return _Flaw("contract", breaches, contract.name) if breaches else None

    def refused(self, valid: Valid, code: str, message: str) -> Invalid:
        """The sink never takes this event; what is said about it instead."""
        return self.invalid(valid.body, "refused", [Breach("", f"{code}: {message}")])

    def invalid(self, body: bytes, reason: Reason, breaches: Sequence[Breach]) -> Invalid:
        """A message set aside, whatever it is."""
        try:
            parsed = _parse(body)
            # two events of one id are two in quarantine, too, where it drops repetitions
            identity = hashlib.sha256(body).hexdigest() if reason == "id_reused" else self._identity(parsed)
            return self._invalid(parsed, identity, reason, breaches)
        except _Malformed:
            pass
        identity = hashlib.sha256(body).hexdigest()  # the same message again has the same id
        try:
            said = {"body": body.decode()}
        except UnicodeDecodeError:
            said = {"body_base64": base64.b64encode(body).decode()}
        flaw = _Flaw(reason, breaches, None)
        event = self._aside(identity, ("unreadable", "unreadable"), datetime.now(UTC), flaw, orjson.dumps(said)[1:])
        return Invalid(event, reason, breaches, None, body)

    def _invalid(
        self,
        parsed: _Parsed,
        identity: str,
        reason: Reason,
        breaches: Sequence[Breach],
        contract: str | None = None,
    ) -> Invalid:
        flaw = _Flaw(reason, breaches, contract)
        kind = parsed.source, parsed.detail_type
        event = self._aside(identity, kind, parsed.time, flaw, b'"event":%b}' % _bytes(parsed.text))
        return Invalid(event, *flaw, parsed.text.encode())

    def _aside(self, identity: str, kind: tuple[str, str], time: datetime, flaw: _Flaw, rest: bytes) -> Event:
        """The event for the quarantine; `kind` is source and detail-type, `rest` what the message was."""
        source, detail_type = kind
        said = {
            "id": identity,
            "reason": flaw.reason,
            "contract": flaw.contract,
            "breaches": [{"path": it.path, "message": it.message} for it in flaw.breaches],
        }
        return Event(
            id=identity,
            source=f"{self._section.quarantine_prefix}{source}",
            detail_type=detail_type,
            key=f"{source}:{identity}",
            time=time,
            detail=orjson.dumps(said)[:-1] + b"," + rest,
        )

    def _identity(self, parsed: _Parsed) -> str:
        if self._id is not None:
            found = _search(self._id, parsed)
            if not isinstance(found, str | int) or isinstance(found, bool) or found == "":
                raise _Malformed("", "relay.event-id leads to no text and no number")
            return str(found)
        if _is_own(parsed.detail):
            return str(parsed.detail["id"].value)
        return str(parsed.envelope["id"].value)

    def _order(self, parsed: _Parsed, identity: str) -> str:
        if self._key is not None:
            return f"{parsed.source}:{json.dumps(_search(self._key, parsed), sort_keys=True)}"
        if _is_own(parsed.detail) and "key" in parsed.detail:
            return _row(parsed.detail, _key_of(parsed.detail))
        return f"{parsed.source}:{identity}"


def _parse(body: bytes) -> _Parsed:
    try:
        text = body.decode()
    except UnicodeDecodeError:
        raise _Malformed("", "the message is not UTF-8") from None
    envelope = _object(text, "")
    if "Message" in envelope and envelope.get("Type", Member("", "")).value == "Notification":
        text = str(envelope["Message"].value)
        if any("\ud800" <= it <= "\udfff" for it in text):
            raise _Malformed("/Message", "holds half a character, a lone surrogate")
        envelope = _object(text, "")
    if "specversion" in envelope and "detail" not in envelope:  # a CloudEvent: other names for the same
        same = {"type": "detail-type", "data": "detail"}
        envelope = {same.get(name, name): member for name, member in envelope.items() if name not in same.values()}
    for name in _NEEDED:
        value = envelope[name].value if name in envelope else None
        if not isinstance(value, str) or isinstance(value, Number) or not value:
            raise _Malformed(f"/{name}", "is missing, or no text")
        if not value.isprintable() and any("\ud800" <= it <= "\udfff" for it in value):
            raise _Malformed(f"/{name}", "holds half a character, a lone surrogate")
    if "detail" not in envelope or not isinstance(envelope["detail"].value, dict):
        raise _Malformed("/detail", "is missing, or no object")
    detail = _object(envelope["detail"].text, "/detail")
    source, detail_type = (envelope[name].value for name in ("source", "detail-type"))
    return _Parsed(text, envelope, detail, source, detail_type, _time(envelope))


def _object(text: str, path: str) -> dict[str, Member]:
    try:
        return members.of_object(text)
    except NotJson as error:
        raise _Malformed(path, f"is not JSON that can be passed on ({_without_values(error)})") from None


def _without_values(error: NotJson) -> str:
    said = str(error)
    return said if said.startswith("at character") or said.endswith(("deeply", "object")) else "a name is there twice"


def _time(envelope: Mapping[str, Member]) -> datetime:
    if "time" not in envelope:
        return datetime.now(UTC)
    try:
        time = datetime.fromisoformat(str(envelope["time"].value))
    except ValueError:
        raise _Malformed("/time", "is no time as ISO 8601 writes it") from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _is_own(detail: Mapping[str, Member]) -> bool:
    return all(name in detail for name in _OWN) and isinstance(detail["id"].value, str) and bool(detail["id"].value)


def _is_ours(mark: Member) -> bool:
    return isinstance(mark.value, dict) and isinstance(mark.value.get("id"), str) and "hops" in mark.value


def _hops(mark: Mapping[str, Any]) -> int:
    value = mark.get("hops")
    return int(value) if isinstance(value, Number) and value.isdecimal() and len(value) < 10 else 0


def _row(detail: Mapping[str, Member], key: Mapping[str, Member] | None) -> str:
    """As `figbridge.forward.shape` names a row, whoever printed it anew on the way."""
    said = "null" if key is None else _compact(key)
    return f"{detail['schema'].value}.{detail['table'].value}:{said}"


def _compact(of: Mapping[str, Member]) -> str:
    return "{" + ",".join(f"{orjson.dumps(name).decode()}:{member.text}" for name, member in of.items()) + "}"


def _key_of(detail: Mapping[str, Member]) -> Mapping[str, Member] | None:
    key = detail["key"]
    return members.of_object(key.text) if isinstance(key.value, dict) else None


def _is_whole(detail: Mapping[str, Member]) -> bool:
    """A truncate, or a change of the schema: an event about all rows of its table."""
    return _is_own(detail) and detail["op"].value in {"truncate", "schema.changed"}


def _old_key(detail: Mapping[str, Member]) -> str | None:
    """The key that the row had, where a change of figbridge's own is of the key itself."""
    if not _is_own(detail) or "before" not in detail or "key" not in detail:
        return None
    key = _key_of(detail)
    if key is None or not isinstance(detail["before"].value, dict):
        return None
    before = members.of_object(detail["before"].text)
    if any(name not in before for name in key):
        return None
    was = {name: before[name] for name in key}
    return None if _compact(was) == _compact(key) else _row(detail, was)


def _marked(parsed: _Parsed, identity: str, hops: int) -> bytes:
    """The detail as it was written, with our member at its end."""
    mark: dict[str, Any] = {"id": identity, "source": parsed.source}
    account = parsed.envelope["account"].value if "account" in parsed.envelope else None
    if isinstance(account, str):
        mark["account"] = str(account)
    mark["hops"] = hops
    if MARK in parsed.detail:  # of another relay before this one
        inside = _compact({name: member for name, member in parsed.detail.items() if name != MARK})[1:-1]
    else:
        inside = parsed.envelope["detail"].text[1:-1].strip()
    return _bytes(f'{{{inside}{"," if inside else ""}"{MARK}":{orjson.dumps(mark).decode()}}}')


def _bytes(text: str) -> bytes:
    """On one line, which a line of a file must be; a line break in JSON can only stand between tokens."""
    if "\n" in text or "\r" in text:
        text = text.replace("\n", " ").replace("\r", " ")
    return text.encode()


def _search(path: Any, parsed: _Parsed) -> Any:
    """What a compiled JMESPath finds in the event; None also where what it does with the values does not fit them."""
    try:
        return path.search(json.loads(parsed.text))
    except (ArithmeticError, RecursionError, TypeError, ValueError):  # JMESPath's own are ValueErrors
        return None
