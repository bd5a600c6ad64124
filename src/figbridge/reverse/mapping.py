"""From a message to a statement: parse the body, find the mapping, fill in the values.

Values are converted by PostgreSQL, with the column's own type: the statement hands one JSON document to
``json_populate_record(NULL::table, …)`` and picks its columns. So arrays, composites, ``numeric`` of any length,
``"NaN"``, ``bytea`` in hex, enums and domains arrive as the table means them, and this file knows no type at all.
https://www.postgresql.org/docs/current/functions-json.html

Invariant: no digit is lost on the way. Numbers are read as int and Decimal and written as their exact digits.

Rules, and what they refuse:

* A ``key`` or ``idempotency_key`` path that yields null or nothing makes the event poison (`Malformed`): a row that
  is not named cannot be meant.
* A ``set`` path that yields null *or nothing* writes NULL. JMESPath answers both alike, so absent does not mean
  "leave as it is"; an event that may lack a field wants a mapping of its own, without that column.
* Columns that no mapping names keep their defaults on insert. A column of a *domain* that forbids NULL cannot be
  left out: the record is built before the default applies, and PostgreSQL refuses it with 23502.
* JMESPath's arithmetic functions know float only and refuse a number with a fraction; let PostgreSQL convert.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Final, Literal

import jmespath
import jmespath.exceptions
from psycopg import sql

from figbridge import canary
from figbridge.config import MappingSection, split_table
from figbridge.errors import BridgeError, ConfigError, Problem
from figbridge.event import Received

Action = Literal["insert", "update", "upsert", "delete"]

_RECORD: Final = sql.SQL("json_populate_record(NULL::{table}, $1::json) AS r")
# An identity column that is GENERATED ALWAYS takes the new system's value where a mapping names it, as PostgreSQL's
# own apply worker would write it. Without such a column the clause means nothing.
_INSERT: Final = sql.SQL("INSERT INTO {table} AS t ({columns}) OVERRIDING SYSTEM VALUE SELECT {values} FROM {record}")
_UPDATE: Final = sql.SQL("UPDATE {table} AS t SET {assignments} FROM {record} WHERE {row}")
_DELETE: Final = sql.SQL("DELETE FROM {table} AS t USING {record} WHERE {row}")


class Malformed(BridgeError):
    """An event that can never be applied, whoever tries: poison.

    ``field`` is the field of the envelope, or the path of the mapping, that is wrong. The message says how it should
    look and never quotes the value, because that may be personal data.
    """

    reason: Final = "malformed"

    def __init__(self, field: str, what: str, *, expected: str) -> None:
        super().__init__(f"{field} {what}; expected {expected}", hint="mend the producer, then redrive the dead letter")
        self.field = field


@dataclass(frozen=True, slots=True)
class Statement:
    """SQL whose only parameter, ``$1``, is the JSON text `document`: the columns of one row."""

    query: bytes
    document: str


@dataclass(frozen=True, slots=True)
class Target:
    """The row an event is about, as far as the event says: its key, or all columns when it inserts."""

    table: tuple[str, str]
    columns: frozenset[tuple[str, str]]

    def may_be(self, other: "Target") -> bool:
        """Whether both may be the same row: nothing that both of them say differs.

        Two keys of different columns may well be one row, and then order counts; so in doubt, yes.
        """
        if self.table != other.table:
            return False
        theirs = dict(other.columns)
        return all(theirs.get(column, value) == value for column, value in self.columns)


def parse(body: bytes) -> Received:
    """The event of a message body: EventBridge's envelope, bare or as the ``Message`` of an SNS notification.

    https://docs.aws.amazon.com/eventbridge/latest/ref/overiew-event-structure.html
    https://docs.aws.amazon.com/sns/latest/dg/sns-message-and-json-formats.html
    Raises Malformed.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise Malformed("the message", "is not UTF-8", expected="a JSON object in UTF-8") from error
    document = _object(text, "the message")
    if document.get("Type") == "Notification" and isinstance(document.get("Message"), str):
        document = _object(document["Message"], "Message of the SNS notification")
    if not isinstance(document.get("detail"), dict):
        raise Malformed("detail", _found(document, "detail"), expected="a JSON object")
    return Received(
        id=_required_text(document, "id"),
        source=_required_text(document, "source"),
        detail_type=_required_text(document, "detail-type"),
        document=document,
    )


def payload_hash(event: Received) -> bytes:
    """SHA-256 of the canonical JSON of ``detail``: keys sorted, no spaces, numbers with the digits they came with."""
    return hashlib.sha256(_json(event.document["detail"], "detail", canonical=True).encode("ascii")).digest()


class _Path:
    """A compiled JMESPath expression that names its place in the configuration."""

    __slots__ = ("_compiled", "name")

    def __init__(self, expression: str, place: str) -> None:
        self.name = f"{expression} ({place})"
        self._compiled = jmespath.compile(expression)

    def value(self, event: Received) -> Any:
        """What the path yields; None for null and for nothing. Raises Malformed when it cannot be evaluated."""
        try:
            return self._compiled.search(event.document)
        # a function of JMESPath that is given what it cannot work with says so in any of these ways
        except (jmespath.exceptions.JMESPathError, ArithmeticError, RecursionError, TypeError, ValueError) as error:
            raise Malformed(self.name, "cannot be evaluated", expected="values that its functions take") from error


class Mapping:
    """One kind of event → one statement on one table. SQL is composed here, once; an event only brings the values."""

    def __init__(self, section: MappingSection) -> None:
        self.action: Action = section.action
        self.table = split_table(section.into)
        self._key = {column: _Path(path, f"key {column}") for column, path in section.key.items()}
        self._set = {column: _Path(path, f"set {column}") for column, path in section.set.items()}
        self._idempotency_key = (
            _Path(section.idempotency_key, "idempotency_key") if section.idempotency_key is not None else None
        )
        self._query = _compose(self.action, self.table, list(self._key), list(self._set)).as_bytes(None)

    def statement(self, event: Received) -> Statement:
        """The statement for `event`. Raises Malformed when a key has no value."""
        values = {**self._key_values(event), **{column: path.value(event) for column, path in self._set.items()}}
        return Statement(self._query, _json(values, f"the columns for {'.'.join(self.table)}"))

    @property
    def makes_row(self) -> bool:
        """Whether its statement brings a row that was not there."""
        return self.action in {"insert", "upsert"}

    def idempotency_key(self, event: Received) -> str:
        """The producer's key, or the event's id where the mapping names none. Raises Malformed."""
        if self._idempotency_key is None:
            return event.id
        value = self._idempotency_key.value(event)
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise Malformed(self._idempotency_key.name, "yields no key", expected="a string or an integer")
        return _storable(str(value), self._idempotency_key.name)

    def target(self, event: Received) -> Target:
        """The row that `event` is about. Raises Malformed."""
        values = self._key_values(event) or {column: path.value(event) for column, path in self._set.items()}
        # 42 and "42" are one key to PostgreSQL, which converts both with the column's type
        texts = (
            (column, value if isinstance(value, str) else _json(value, column)) for column, value in values.items()
        )
        return Target(self.table, frozenset(texts))

    def _key_values(self, event: Received) -> dict[str, Any]:
        values = {column: path.value(event) for column, path in self._key.items()}
        for column, value in values.items():
            if value is None:
                raise Malformed(self._key[column].name, "yields null or nothing", expected="the key of a row")
        return values


class Mappings:
    """All mappings, by source and detail-type. Raises ConfigError when two want the same events."""

    def __init__(self, sections: Sequence[MappingSection]) -> None:
        self._by_kind: dict[tuple[str, str], Mapping] = {}
        problems: list[Problem] = []
        first: dict[tuple[str, str], int] = {}
        for index, section in enumerate(sections):
            mapping, where = Mapping(section), f"reverse.mappings.{index}.match"
            if canary.SOURCE in section.match.source:
                problems.append(Problem(where, f"the source {canary.SOURCE} is the bridge's own", "remove it"))
            for source in dict.fromkeys(section.match.source):
                for detail_type in dict.fromkeys(section.match.detail_type):
                    kind = source, detail_type
                    if kind in first:
                        what = f"source {source!r} with detail-type {detail_type!r} is taken by mapping {first[kind]}"
                        problems.append(Problem(where, what, "let each kind of event match one mapping"))
                    first.setdefault(kind, index)
                    self._by_kind.setdefault(kind, mapping)
        if problems:
            raise ConfigError("the mappings contradict each other", problems)

    def find(self, event: Received) -> Mapping | None:
        """The mapping for `event`, or None when nobody asked for events of its kind."""
        return self._by_kind.get((event.source, event.detail_type))


def _compose(action: Action, table: tuple[str, str], key: list[str], values: list[str]) -> sql.Composed:
    def each(template: str, columns: list[str], separator: str) -> sql.Composed:
        return sql.SQL(separator).join(sql.SQL(template).format(c=sql.Identifier(column)) for column in columns)

    name = sql.Identifier(*table)
    record = _RECORD.format(table=name)
    row = each("t.{c} = r.{c}", key, " AND ")
    if action == "update":
        return _UPDATE.format(table=name, assignments=each("{c} = r.{c}", values, ", "), record=record, row=row)
    if action == "delete":
        return _DELETE.format(table=name, record=record, row=row)
    insert = _INSERT.format(
        table=name, columns=each("{c}", key + values, ", "), values=each("r.{c}", key + values, ", "), record=record
    )
    if action == "insert":
        return insert
    resolution = (
        sql.SQL("DO UPDATE SET {}").format(each("{c} = EXCLUDED.{c}", values, ", "))
        if values
        else sql.SQL("DO NOTHING")
    )
    return sql.SQL("{} ON CONFLICT ({}) {}").format(insert, each("{c}", key, ", "), resolution)


def _object(text: str, field: str) -> dict[str, Any]:
    try:
        value = json.loads(text, parse_float=_exact, parse_int=_integer, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Malformed(field, "is not JSON that we can read", expected="one JSON object") from error
    if not isinstance(value, dict):
        raise Malformed(field, f"is {_kind(value)}", expected="a JSON object")
    return value


def _exact(digits: str) -> Decimal:
    try:
        return Decimal(digits)  # construction never rounds, whatever the context's precision
    except InvalidOperation as error:
        raise ValueError("an exponent beyond any database's") from error


def _integer(digits: str) -> int | Decimal:
    try:
        return int(digits)
    except ValueError:  # beyond sys.set_int_max_str_digits; a numeric may be that long
        return Decimal(digits)


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _required_text(document: dict[str, Any], field: str) -> str:
    value = document.get(field)
    if not isinstance(value, str):
        raise Malformed(field, _found(document, field), expected="a string")
    return _storable(value, field)


def _storable(text: str, field: str) -> str:
    """`text`, if a text column can hold it. Raises Malformed."""
    if not text:
        raise Malformed(field, "is empty", expected="a string that names something")
    # PostgreSQL's text holds no NUL; JSON's \ud800 alone is no character in any encoding
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise Malformed(field, "holds a character that no text column can", expected="Unicode text without NUL")
    return text


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


def _json(value: Any, field: str, *, canonical: bool = False) -> str:
    """JSON in ASCII, so that no client encoding can spoil it; `canonical` sorts the keys. Raises Malformed."""
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
        case float() if math.isfinite(value):  # only JMESPath's functions make floats
            return repr(value)
    raise ValueError(f"holds a {type(value).__name__} that JSON has not")
