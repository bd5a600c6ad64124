"""From an event to what is to be done for it: its key, its version, its statements.

Rules, and what they refuse:

* A ``key``, ``idempotency_key``, ``version`` or ``entity`` path that yields null or nothing makes the event poison
  (`Malformed`): a row that is not named cannot be meant.
* A ``set`` path that yields null writes NULL; one that leads nowhere leaves the column alone (an insert: its default),
  so absent, null and unchanged are three things. A figbridge event's ``unchanged`` columns are absent in ``after``.
* A claim check (`forward.claim-check` of another bridge) has a key and no rows, so it is poison for all but deletes,
  and callables, which may fetch the rows.
* 42 and "42" are one key, because PostgreSQL converts both with the column's type; see `figbridge.reverse.spelling`.
"""

import hashlib
from collections.abc import Iterable, Sequence
from collections.abc import Mapping as MappingOf
from dataclasses import dataclass
from typing import Any, Final

from figbridge import canary
from figbridge.change import Lsn
from figbridge.config import MappingSection
from figbridge.errors import ConfigError, Problem
from figbridge.event import Named, Received
from figbridge.reverse.message import Malformed, hops, payload_hash, require_rows, storable, write
from figbridge.reverse.parts import Call, Row, as_text, part_of
from figbridge.reverse.policy import Expected
from figbridge.reverse.spelling import Spell, spelled
from figbridge.reverse.statement import Free, Statement
from figbridge.reverse.values import Document, Path

_LONGEST: Final = 500  # characters of an identity; a longer one is known by its hash, which an index can hold


@dataclass(slots=True, eq=False)
class Work:
    """One event, ready to be applied.

    identity what the inbox knows it by: source and idempotency key
    entity   (scope, identity): what versions are compared by, and order is kept by
    version  a decimal number, None without one
    hops     how many bridges the event has passed
    again    it was parked before: nothing that is parked holds it back
    expected of each `Statement`, in their order, what the new system had seen; empty where nobody compares
    document the envelope, for the record of a conflict; None where there can be none
    group    the message group whose order is kept, beside its entity's; None where only that one's is

    Of the event itself only its name is kept: a batch of documents is larger than a processor's cache, and to go
    through it again costs as much as to read the next one.
    """

    event: Named
    mapping: "Mapping"
    identity: tuple[str, str]
    payload_hash: bytes
    entity: tuple[str, str]
    version: str | None
    statements: Sequence[Statement | Free]
    hops: int = 0
    again: bool = False
    expected: Sequence[Expected | None] = ()
    document: Document | None = None
    group: str | None = None

    @property
    def key(self) -> str:
        """The idempotency key."""
        return self.identity[1]

    def having(self, statements: Sequence[Statement | Free]) -> "Work":
        """The same with other statements."""
        return Work(
            self.event,
            self.mapping,
            self.identity,
            self.payload_hash,
            self.entity,
            self.version,
            statements,
            self.hops,
            self.again,
            self.expected,
            self.document,
            self.group,
        )


class Mapping:
    """One kind of event → its statements. SQL is composed from the mapping; an event only brings the values."""

    def __init__(self, section: MappingSection) -> None:
        self.section = section
        alone = len(section.parts) == 1
        self._parts = [part_of(part, section.version if alone else None) for part in section.parts]
        first = self._parts[0]
        self._first = first if isinstance(first, Row) else None
        self._alone = self._first if alone else None
        # whether it brings the row that an update may wait for
        self.makes_row = self._first is not None and self._first.action in {"insert", "upsert"}
        self.scope = ".".join(first.table) if isinstance(first, Row) else "/".join(section.match.source)
        self.tables = tuple(dict.fromkeys(part.table for part in self._parts if isinstance(part, Row)))
        self._idempotency_key = (
            Path(section.idempotency_key, "idempotency_key") if section.idempotency_key is not None else None
        )
        self._version = Path(section.version, "version") if section.version is not None else None
        self._entity = Path(section.entity, "entity") if section.entity is not None else None
        # of the table of the first statement; an insert is known by it, see `figbridge.reverse.drift`
        self.primary_key: tuple[str, ...] = ()
        # of that table's columns, so that a key is one entity however it is written
        self.spelling: MappingOf[str, Spell] = {}
        # why it cannot be used as the tables are, None when it can
        self.broken: str | None = None
        self.plain = all(isinstance(part, Row) for part in self._parts)  # whether none of its SQL is the user's own
        self.deletes = isinstance(first, Row) and first.action in {"delete", "soft"}
        self._takes_claim_checks = all(
            isinstance(part, Call) or (isinstance(part, Row) and part.action == "delete") for part in self._parts
        )
        rows = [part for part in self._parts if isinstance(part, Row)]
        self.policies = tuple(part.policy for part in rows)
        self._judged = rows if any(self.policies) else ()

    def prepare(self, event: Received, *, again: bool = False) -> Work:
        """What is to be done for `event`. Raises Malformed."""
        document = event.document
        statements: Sequence[Statement | Free]
        key: Sequence[Any]
        version = None
        detail = document.get("detail")
        if type(detail) is dict and "claim_check" in detail and not self._takes_claim_checks:
            require_rows(document)
        if self._alone is not None:  # nearly always; the key's paths are walked once
            key, statement, version = self._alone.row(document)
            statements = (statement,)
        else:
            statements = self.statements(event)
            key = tuple(self._first.key_of(document).values()) if self._first else ()
        if len(key) == 1 and type(key[0]) is int and self._entity is None:
            identity = str(key[0])
        else:
            identity = self._identity(event, key)
        return Work(
            tuple.__new__(Named, event[:3]),
            self,
            (event.source, event.id if self._idempotency_key is None else self.idempotency_key(event)),
            payload_hash(event),
            (self.scope, identity if len(identity) <= _LONGEST else hashlib.sha256(identity.encode()).hexdigest()),
            str(version) if type(version) is int else _version(self._version, document) if self._version else None,
            statements,
            hops(event),
            again,
            self._expected(document, statements) if self._judged else (),
            document if self._judged else None,
        )

    def statements(self, event: Received) -> Sequence[Statement | Free]:
        """In the order in which they run. Raises Malformed."""
        document = event.document
        return [statement for part in self._parts for statement in part.statements(document)]

    def _expected(self, document: Document, statements: Sequence[Statement | Free]) -> Sequence[Expected | None]:
        made = [it for it in statements if isinstance(it, Statement)]  # one of each row, whatever stands between them
        return [
            row.policy.expected(document, statement, row.key_of(document)) if row.policy else None
            for row, statement in zip(self._judged, made, strict=True)
        ]

    def idempotency_key(self, event: Received) -> str:
        """The producer's key, or the event's id where the mapping names none. Raises Malformed."""
        if self._idempotency_key is None:
            return event.id
        return _name(self._idempotency_key, event.document, "yields no key")

    def _identity(self, event: Received, key: Sequence[Any]) -> str:
        if self._entity is not None:
            return _name(self._entity, event.document, "names nothing")
        if key:
            values = dict(zip(self.section.parts[0].key, key, strict=True))
        elif self._first and self.primary_key:
            values = self._first.columns(event.document, self.primary_key)
        else:
            values = {}
        if not values:
            return f"event {event.id}"  # nothing else can mean it
        texts = [spelled(self.spelling, column, str(as_text(values[column], column))) for column in sorted(values)]
        return texts[0] if len(texts) == 1 else write(texts, "the key")


def _name(path: Path, document: Document, wrong: str) -> str:
    value = path.get(document)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise Malformed(path.name, wrong, expected="a string or an integer")
    return storable(str(value), path.name)


def _version(path: Path, document: Document) -> str:
    """A number as its digits; a position as commit LSN · 2³² + ordinal, by which positions are ordered."""
    value = path.get(document)
    if type(value) is int:  # not a bool
        return str(value)
    match value:
        case str() if value.isascii() and value.isdecimal():
            return value
        case {"commit_lsn": str(lsn), "ordinal": int(ordinal)}:
            try:
                return str((int(Lsn.parse(lsn)) << 32) + ordinal)
            except ValueError:
                pass
    raise Malformed(path.name, "yields no version", expected="an integer, or a position with commit_lsn and ordinal")


class Mappings:
    """All mappings, by source and detail-type. Raises ConfigError when two want the same events."""

    def __init__(self, sections: Sequence[MappingSection]) -> None:
        self.all: list[Mapping] = []
        self._by_kind: dict[tuple[str, str], Mapping] = {}
        problems: list[Problem] = []
        first: dict[tuple[str, str], int] = {}
        keys: dict[str, tuple[int, list[str]]] = {}
        for index, section in enumerate(sections):
            mapping, where = Mapping(section), f"reverse.mappings.{index}.match"
            self.all.append(mapping)
            problems += _one_entity(index, mapping, keys)
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


def _one_entity(index: int, mapping: Mapping, keys: dict[str, tuple[int, list[str]]]) -> Iterable[Problem]:
    """Versions of a table's rows are comparable only when all mappings name a row in the same way."""
    section = mapping.section
    if section.version is None:
        return
    part = section.parts[0]
    if section.entity is None and not part.key:
        what = "has a version and no key, so nobody knows of what"
        yield Problem(f"reverse.mappings.{index}", what, "name it by entity: the path of the row's identity")
        return
    if part.key and section.entity is None:
        named = sorted(part.key)
        other, theirs = keys.setdefault(mapping.scope, (index, named))
        if theirs != named:
            what = f"names the rows of {mapping.scope} by {', '.join(named)}, mapping {other} by {', '.join(theirs)}"
            yield Problem(f"reverse.mappings.{index}.key", what, "use the same columns, or give both an entity")
