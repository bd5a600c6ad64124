"""What of a table leaves the database, compiled into the table's encoder: before there is an event.

    exclude, include     the column is in no event: neither row nor key, old row nor schema.changed
    mask, truncate,      its encoder is another one; whatever reads the event, a log, a dead letter, a claim check
    replace, hash        or an outbox rejection, never had the value
    where                the row leaves only if it holds

INVARIANT. A rule that cannot be kept stops the bridge: a column that is named and not there may have been renamed, and
would leave under its new name; so would a table whose name nobody listed. And no two rows become one: where what
leaves of a key does not tell rows apart, order is kept by a keyed hash of the whole key, which also is the partition
key that the sink is given.

NULL leaves as null, whatever the rule: that there is no value is no value.
"""

import hmac
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any, Final

import orjson

from figbridge import digits
from figbridge.change import UNCHANGED, Change, Operation, Relation, Row
from figbridge.config import HashSection, SelectSection
from figbridge.errors import BridgeError
from figbridge.forward import values
from figbridge.forward.values import Encoder, Encoders
from figbridge.predicate import Kind, Predicate, compiled

_MASKED: Final = b'"***"'
Name = tuple[str, str]  # (schema, table)
_LAST_DIGIT: Final = ord("9")
# of other types, such as json, values may be of any kind
_KINDS: Final[dict[Encoder, Kind]] = {
    values.raw: "number", values.exact_number: "number", values.float_: "number", values.boolean: "boolean",
    values.text: "string", values.char: "string", values.timestamp: "string", values.timestamptz: "string",
}  # fmt: skip
_UNKNOWN: Final = (
    "if it was renamed, name it anew in legacy.tables, forward.select and forward.outbox, and list its old name under "
    "former-names of its entry in forward.select. If it is a partition, list it there, too, and let the publication "
    "have publish_via_partition_root. If it is another table, add it to legacy.tables, with rules of its own. Nothing "
    "of it leaves until then"
)
NOT_DECIDED: Final = "FilterNotDecided"  # the code of such a rejection


class CannotSanitize(BridgeError):
    """A table is not as the rules about it say, so nothing of it may leave."""


class Hashing:
    """HMAC-SHA256 of a value's text, as a JSON string with the key's id before it: ``"1:9f86d0…"``."""

    def __init__(self, section: HashSection) -> None:
        # the key's own two blocks are hashed once, here
        self._keyed = hmac.new(section.key.get_secret_value().encode(), digestmod="sha256")
        self.id = section.id

    def __call__(self, value: bytes) -> bytes:
        """An `Encoder`."""
        mac = self._keyed.copy()
        mac.update(value)
        return f'"{self.id}:{mac.hexdigest()}"'.encode()


class Where:
    """A predicate over the rows of one version of a table. `dropped` is called for each change that does not leave.

    What it asks of a number is asked of all its digits, whatever form events give it. Raises CannotSanitize.
    """

    def __init__(
        self,
        predicate: Predicate,
        relation: Relation,
        encoders: Encoders,
        keys: frozenset[str],
        dropped: Callable[[], None],
    ) -> None:
        position = {column.name: index for index, column in enumerate(relation.columns)}
        self.positions = [position[name] for name in predicate.columns if name in position]
        encode = [encoders.exact.of(relation.columns[index].type_oid) for index in self.positions]
        self._read = [_reader(it) for it in encode]
        self._predicate = predicate
        self._absent = len(self.positions) < len(predicate.columns)
        self._key = [index for index, column in enumerate(relation.columns) if column.name in keys]
        self._of_key = set(self.positions) <= set(self._key)
        self._dropped = dropped
        for index, it in zip(self.positions, encode, strict=True):
            _check_kind(predicate, relation, relation.columns[index].name, _KINDS.get(it))

    def keeps(self, raw: Sequence[bytes | None]) -> bool:
        """Whether a row with these values, in the text form of `positions`, leaves."""
        if self._absent:
            return False  # missing-columns: ignore; what cannot be asked does not hold
        found = [None if it is None else read(it) for read, it in zip(self._read, raw, strict=True)]
        return self._predicate.holds(found)

    def row(self, row: Row) -> bool:
        """Whether a row, all of whose values are known, leaves."""
        return self.keeps([row[index] for index in self.positions])  # type: ignore[misc]

    def change(self, change: Change) -> Change | None:
        """The change as it looks to who sees only the rows that leave; None when there is nothing to see.

        As PostgreSQL's own row filters have it, an update that moves a row out is a delete, one that moves it in an
        insert. Where the old row was not sent, it may have been in: then it is a delete, too, and an update stays one.
        https://www.postgresql.org/docs/current/logical-replication-row-filter.html
        Raises Undecided.
        """
        operation, relation, ordinal, before, before_is_key, after, _ = change
        if operation is Operation.TRUNCATE:
            return change
        if after is None:
            return self._told(change if before is None or self._old(before, before_is_key) is not False else None)
        if any(after[index] is UNCHANGED for index in self.positions):
            raise Undecided(self._bare(change))
        now = self.row(after)
        if operation is not Operation.UPDATE:
            return self._told(change if now else None)
        was = (now if self._of_key else None) if before is None else self._old(before, before_is_key)
        if now:
            moved = Change(Operation.INSERT, relation, ordinal, None, False, after, change.unsent)
            return moved if was is False else change
        if was is False:
            return self._told(None)
        old, is_key = (self._keyed(after), True) if before is None else (before, before_is_key)
        return Change(Operation.DELETE, relation, ordinal, old, is_key, None, False)

    def _told(self, change: Change | None) -> Change | None:
        if change is None:
            self._dropped()
        return change

    def _old(self, before: Row, is_key: bool) -> bool | None:
        if (is_key and not self._of_key) or any(before[index] is UNCHANGED for index in self.positions):
            return None
        return self.row(before)

    def _keyed(self, row: Row) -> Row:
        return [value if index in self._key else None for index, value in enumerate(row)]

    def _bare(self, change: Change) -> Change:
        """The same change with nothing but its key."""
        row = self._keyed(change.after or ()) if change.before is None else change.before
        return change._replace(before=row, before_is_key=True, after=None, unsent=False)


class Undecided(Exception):
    """The server did not send a value that the predicate asks for. ``change`` has nothing but the key."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.change = change


@dataclass(frozen=True, slots=True)
class Treatment:
    """The rules of one version of a table, by the positions of its columns.

    ``withheld`` are in no event, ``encoders`` are other ones than the types'. ``said`` is column → what is done with
    it. ``veil`` hashes what tells rows apart, where what leaves does not.
    """

    withheld: frozenset[int] = frozenset()
    encoders: Mapping[int, Encoder] = field(default_factory=dict)
    said: Mapping[str, str] = field(default_factory=dict)
    veil: Hashing | None = None
    where: Where | None = None


_NONE: Final = Treatment()


class Rules:
    """The rules of all tables. `dropped` is told the table of each change that a predicate keeps back.

    `tables` are the names of those that leave: of any other nobody knows by which rules. None: any may.
    """

    def __init__(
        self,
        sections: Sequence[SelectSection] = (),
        hashing: HashSection | None = None,
        dropped: Callable[[str], None] = lambda _table: None,
        *,
        tables: Collection[Name] | None = None,
    ) -> None:
        self._sections = {name: section for section in sections for name in section.names}
        self._tables = tables
        self._hashing = Hashing(hashing) if hashing else None
        self._dropped = dropped

    def present(self, relation: Relation) -> Name:
        """The name that the table has now, of one that may come under a former name."""
        name = (relation.schema, relation.name)
        section = self._sections.get(name)
        return section.names[0] if section else name

    def of(self, relation: Relation, encoders: Encoders, keys: frozenset[str], *, unveiled: bool = False) -> Treatment:
        """What is done with the table. Raises CannotSanitize, and what `encoders` raises.

        `unveiled`: nothing depends on telling its rows apart.
        """
        name = (relation.schema, relation.name)
        section = self._sections.get(name)
        if section is None:
            if self._tables is not None and name not in self._tables:
                raise CannotSanitize(
                    f"there is a change of {relation}, which is none of legacy.tables: it may be one of them by "
                    "another name, and would leave without what forward.select and forward.outbox say of it",
                    hint=_UNKNOWN,
                )
            return _NONE
        names = [column.name for column in relation.columns]
        if section.missing_columns == "stop" and (missing := section.missing(names)):
            raise CannotSanitize(
                f"forward.select names the column {missing[0]!r} of {relation}, which the table did not have when this "
                "change was written",
                hint="if it was renamed, list the new name beside the old one, with missing-columns: ignore. Nothing "
                "of the table leaves until then",
            )
        treated = {index: section.treatments[name] for index, name in enumerate(names) if name in section.treatments}
        withheld = frozenset(index for index, name in enumerate(names) if section.stays(name))
        where = None
        if section.where is not None:
            label = str(relation)
            where = Where(compiled(section.where), relation, encoders, keys, lambda: self._dropped(label))
        changed = {*withheld, *(index for index, how in treated.items() if how != "hash")}
        told_by = {index for index, name in enumerate(names) if name in keys} or set(range(len(names)))
        return Treatment(
            withheld,
            {index: self._encoder(section, names[index], how) for index, how in treated.items()},
            {names[index]: how for index, how in treated.items()},
            self._veil(relation) if changed & told_by and not unveiled else None,
            where,
        )

    def withholds(self, relation: Relation) -> bool:
        """Whether a column of the table is in no event."""
        section = self._sections.get((relation.schema, relation.name))
        return section is not None and any(section.stays(column.name) for column in relation.columns)

    def _veil(self, relation: Relation) -> Hashing:
        if self._hashing is None:
            raise CannotSanitize(
                f"what leaves of {relation} does not tell its rows apart: a column of its key stays, or is masked",
                hint="set forward.hash, by which order is then kept; or hash the column instead",
            )
        return self._hashing

    def _encoder(self, section: SelectSection, column: str, how: str) -> Encoder:
        match how:
            case "mask":
                return constant(_MASKED)
            case "replace":
                return constant(orjson.dumps(section.replace[column]))
            case "truncate":
                return truncated(section.truncate[column])
        if self._hashing is None:
            raise CannotSanitize(f"{section.table}.{column} is to be hashed, without a key", hint="set forward.hash")
        return self._hashing


def constant(json: bytes) -> Encoder:
    """The same for every value."""
    return lambda _value: json


def truncated(length: int) -> Encoder:
    """The first `length` characters of the value's text, as a string."""

    def encode(value: bytes) -> bytes:
        # four bytes are the most that a character takes
        start = value[: 4 * length].decode(errors="surrogateescape")[:length]
        return values.text(start.encode(errors="surrogateescape"))

    return encode


def _check_kind(predicate: Predicate, relation: Relation, column: str, kind: Kind | None) -> None:
    if predicate.misfits(column, kind):
        literals = " or ".join(sorted(predicate.kinds[column]))
        raise CannotSanitize(
            f"forward.select.where compares the column {column!r} of {relation} with a {literals}, and it was a {kind} "
            "when this change was written, to which that is never equal",
            hint="if its type was changed, compare it with literals of both kinds, such as "
            f"({column} == `5` || {column} == '5'); there may be rows of both still. Nothing of the table "
            "leaves until then",
        )


def _reader(encode: Encoder) -> Callable[[bytes], Any]:
    """What makes of a value's text form what the predicate takes."""
    if encode is values.raw:
        return int
    if encode is values.exact_number or encode is values.float_:
        return _number
    return lambda value: _value(encode(value))


def _number(value: bytes) -> Decimal | str:
    """Raises ValueError, or IndexError."""
    if value[-1] > _LAST_DIGIT:
        return value.decode()  # NaN, Infinity
    try:
        return Decimal(value.decode())
    except InvalidOperation:
        raise ValueError("a number that is none") from None


def _value(json: bytes) -> Any:
    try:
        return digits.loads(json)
    except (ValueError, RecursionError):  # what nobody can read is equal to nothing
        return json
