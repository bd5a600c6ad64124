"""What the legacy database did: values without behaviour, read from the WAL, never written to.

A `Change` is one row of one table, decoded but not yet interpreted: its values are the bytes of PostgreSQL's text
output, so nothing is parsed that nobody asks for (one abstraction that costs 2 µs a row is a bad abstraction).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final, NamedTuple, Self

_EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)
NO_CAUSE: Final = b'"hops":0,"cause":null'  # the legacy system itself


class Lsn(int):
    """A position in the write-ahead log; orders and subtracts as the integer it is, prints as ``16/B374D848``.

    https://www.postgresql.org/docs/current/datatype-pg-lsn.html
    """

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """From ``16/B374D848``. Raises ValueError for anything else."""
        high, slash, low = text.partition("/")
        if not slash:
            raise ValueError(f"not an LSN: {text!r}")
        return cls((int(high, 16) << 32) | int(low, 16))

    def __str__(self) -> str:
        return f"{self >> 32:X}/{self & 0xFFFFFFFF:X}"

    __repr__ = __str__


class Operation(StrEnum):
    """What happened to a row; the values are the words an event says."""

    INSERT = "insert"
    UPDATE = "update"
    DELETE = "delete"
    TRUNCATE = "truncate"
    READ = "read"  # by a snapshot: nothing happened to it

    __hash__ = str.__hash__  # an enum's own is written in Python, and an operation is looked up for each row


class Unchanged:
    """The type of `UNCHANGED`: a TOASTed value that an update did not touch and the server did not send."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "UNCHANGED"


UNCHANGED: Final = Unchanged()

# One value of a row: text output, NULL, or "not sent".
Value = bytes | None | Unchanged
Row = Sequence[Value]


@dataclass(frozen=True, slots=True)
class Column:
    """A column as the RELATION message describes it; ``is_key`` is replica identity, not necessarily primary key."""

    name: str
    type_oid: int
    typmod: int
    is_key: bool


@dataclass(frozen=True, slots=True)
class Relation:
    """A table as it was when the change was made.

    ``identity`` is pg_class.relreplident: ``d`` default, ``i`` index, ``f`` full, ``n`` nothing.
    With ``f`` the server flags *every* column as key.
    """

    oid: int
    schema: str
    name: str
    identity: str
    columns: tuple[Column, ...]

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"


class Begin(NamedTuple):
    """The start of a transaction. ``commit_lsn`` is where its commit record *begins*: known before the first row.

    ``cause`` is the end of the details of its events: what made them, as JSON.
    """

    commit_lsn: Lsn
    committed_at: datetime
    xid: int
    cause: bytes = NO_CAUSE


class Commit(NamedTuple):
    """The end of a transaction. ``end_lsn``, just past the commit record, is what may be acknowledged.

    Its time is that of `Begin`, so it is not read again.
    """

    commit_lsn: Lsn
    end_lsn: Lsn


@dataclass(frozen=True, slots=True)
class Origin:
    """The transaction came from elsewhere: the replication origin ``name`` was set in its session."""

    commit_lsn: Lsn
    name: str


@dataclass(frozen=True, slots=True)
class LogicalMessage:
    """What ``pg_logical_emit_message`` wrote."""

    transactional: bool
    lsn: Lsn
    prefix: str
    content: bytes


@dataclass(frozen=True, slots=True)
class TypeName:
    """The name of a type that is not built in, sent before the first relation that uses it."""

    oid: int
    schema: str
    name: str


class Change(NamedTuple):
    """One row message. A NamedTuple because a frozen dataclass costs three times as much to make, per row.

    ``before`` holds the old row (``before_is_key`` False) or only its key columns, the others None
    (``before_is_key`` True). ``ordinal`` counts the rows of the transaction from 0, before any filter: with the
    commit LSN it is the identity of the change, the same on every replay. ``unsent`` says that a value of ``after`` is
    `UNCHANGED`.
    """

    operation: Operation
    relation: Relation
    ordinal: int
    before: Row | None
    before_is_key: bool
    after: Row | None
    unsent: bool


def timestamp(microseconds: int) -> datetime:
    """A server timestamp (microseconds since 2000-01-01 UTC, the protocol's epoch) as an aware datetime."""
    return _EPOCH + timedelta(0, 0, microseconds)
