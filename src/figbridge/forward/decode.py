"""pgoutput bytes → messages: pure, protocol version 1, one connection's worth of memory.

Formats: https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html

It never waits and never guesses. A message that is shorter, longer or other than the server could have meant is a
`DecodeError` with its kind and offset; the bytes of a value are handed on untouched, so a value cannot be damaged here.
"""

import struct
from collections.abc import Callable
from typing import Final

from figbridge.change import (
    Begin,
    Change,
    Column,
    Commit,
    LogicalMessage,
    Lsn,
    Operation,
    Origin,
    Relation,
    Row,
    TypeName,
    timestamp,
)
from figbridge.errors import DecodeError
from figbridge.forward.unroll import KindError, Reader, reader

# A TRUNCATE names several tables; each becomes a change of its own.
Message = Begin | Commit | Origin | Relation | TypeName | LogicalMessage | Change | list[Change]

_U16: Final = struct.Struct(">H").unpack_from
_U32: Final = struct.Struct(">I").unpack_from
_HEAD: Final = struct.Struct(">xIB").unpack_from  # of a row message: relation, which part comes first
_INSERT_HEAD: Final = struct.Struct(">xIBH").unpack_from  # the same, and the part's number of columns
_BEGIN: Final = struct.Struct(">xQqI")  # final LSN, commit timestamp, xid
_COMMIT: Final = struct.Struct(">xxQQ8x")  # flags, commit LSN, end LSN, timestamp
_MESSAGE: Final = struct.Struct(">xBQ")  # flags, LSN
_COLUMN: Final = struct.Struct(">Ii")  # type OID, typmod

_KEY, _OLD, _NEW = b"KON"
_MOST_COLUMNS: Final = 1600  # https://www.postgresql.org/docs/current/limits.html
# made once: an attribute of an enum's class costs as much as a column
_INSERTED, _UPDATED, _DELETED = Operation.INSERT, Operation.UPDATE, Operation.DELETE


class Decoder:
    """Remembers the relations of one connection and the ordinal of the open transaction. Make a new one per connection.

    The server sends a RELATION before the first change of a table and again after each change of its shape: a row is
    always read by the relation in force when it was written. Whoever reads rows of the open transaction in another way
    counts them in `ordinal`, that of the next row.
    """

    def __init__(self) -> None:
        self._relations: dict[int, tuple[Relation, int, Reader]] = {}
        self.ordinal = 0
        self.in_transaction = False
        self._in_place: dict[int, Callable[[bytes, int], Message]] = {
            ord("I"): self._insert,
            ord("U"): self._update,
            ord("D"): self._delete,
            ord("B"): self._begin,
            ord("C"): self._commit,
        }

    def feed(self, message: bytes, start: int = 0) -> Message:
        """Decode one message, which begins at `start` and ends where `message` ends. Raises DecodeError.

        A row is read in place: to cut an XLogData's payload out first would copy every row once more.
        """
        try:
            if (read := self._in_place.get(message[start])) is not None:
                return read(message, start)
            message, start = message[start:], 0
            return self._other(message)
        except _Malformed as error:
            what, offset = error.what, error.position - start
        except KindError as error:
            what, offset = f"a value of unknown kind {message[error.position]:#x}", error.position - start
        except (IndexError, struct.error) as error:
            what, offset = f"it ends too soon ({error})", max(0, len(message) - start)
        except (ValueError, OverflowError) as error:  # overflow: a time of commit that no calendar has
            what, offset = str(error), 0
        raise DecodeError(what, kind=message[start : start + 1].decode("latin-1") or "empty", offset=offset)

    def _insert(self, message: bytes, start: int) -> Change:
        oid, part, count = _INSERT_HEAD(message, start)
        relation, width, read = self._relation(oid, start)
        if part != _NEW:
            raise _Malformed(f"expected a new row, found {part:#x}", start + 5)
        if count != width:
            raise _wrong_width(count, width, start + 6)
        after, end, unsent = read(message, start + 8)
        if end != len(message):
            raise _wrong_end(message, end)
        return Change(_INSERTED, relation, self._next(), None, False, after, unsent)

    def _update(self, message: bytes, start: int) -> Change:
        oid, part = _HEAD(message, start)
        relation, width, read = self._relation(oid, start)
        before, position = None, start + 5
        if part != _NEW:
            if part != (_OLD if relation.identity == "f" else _KEY):
                raise _wrong_old(part, relation, position)
            before, position, _ = _row(message, position + 1, width, read)
        if message[position] != _NEW:
            raise _Malformed(f"expected a new row, found {message[position]:#x}", position)
        after, end, unsent = _row(message, position + 1, width, read)
        if end != len(message):
            raise _wrong_end(message, end)
        return Change(_UPDATED, relation, self._next(), before, part == _KEY, after, unsent)

    def _delete(self, message: bytes, start: int) -> Change:
        oid, part = _HEAD(message, start)
        relation, width, read = self._relation(oid, start)
        if part != (_OLD if relation.identity == "f" else _KEY):
            raise _wrong_old(part, relation, start + 5)
        before, end, _ = _row(message, start + 6, width, read)
        if end != len(message):
            raise _wrong_end(message, end)
        return Change(_DELETED, relation, self._next(), before, part == _KEY, None, False)

    def _begin(self, message: bytes, start: int) -> Begin:
        if len(message) != start + _BEGIN.size:
            raise _wrong_end(message, start + _BEGIN.size)
        commit_lsn, committed, xid = _BEGIN.unpack_from(message, start)
        if self.in_transaction:
            raise _Malformed("a transaction begins inside another", start + 1)
        self.in_transaction, self.ordinal = True, 0
        return Begin(Lsn(commit_lsn), timestamp(committed), xid)

    def _commit(self, message: bytes, start: int) -> Commit:
        if len(message) != start + _COMMIT.size:
            raise _wrong_end(message, start + _COMMIT.size)
        commit_lsn, end_lsn = _COMMIT.unpack_from(message, start)
        if not self.in_transaction:
            raise _Malformed("a commit without a begin", start + 1)
        self.in_transaction = False
        return Commit(Lsn(commit_lsn), Lsn(end_lsn))

    def _other(self, payload: bytes) -> Message:
        match payload[:1]:
            case b"R":
                return self._remember(payload)
            case b"Y":
                schema, position = _string(payload, 5)
                name, position = _string(payload, position)
                _expect_end(payload, position)
                return TypeName(_U32(payload, 1)[0], schema or "pg_catalog", name)
            case b"T":
                return self._truncate(payload)
            case b"O":
                name, position = _string(payload, 9)
                _expect_end(payload, position)
                return Origin(Lsn(int.from_bytes(payload[1:9])), name)
            case b"M":
                flags, lsn = _MESSAGE.unpack_from(payload)
                prefix, position = _string(payload, _MESSAGE.size)
                end = position + 4 + _U32(payload, position)[0]
                _expect_end(payload, end)
                return LogicalMessage(bool(flags & 1), Lsn(lsn), prefix, payload[position + 4 : end])
            case _:
                raise _Malformed("not a message of pgoutput protocol version 1", 0)

    def _remember(self, payload: bytes) -> Relation:
        schema, position = _string(payload, 5)
        name, position = _string(payload, position)
        identity = chr(payload[position])
        if identity not in "difn":
            raise _Malformed(f"replica identity {identity!r} does not exist", position)
        count = _U16(payload, position + 1)[0]
        if count > _MOST_COLUMNS:  # a reader is compiled for each number of columns: 65,535 would take seconds
            raise _Malformed(f"{count} columns, and a table has at most {_MOST_COLUMNS}", position + 1)
        position += 3
        columns = []
        for _ in range(count):
            flags = payload[position]
            column, position = _string(payload, position + 1)
            type_oid, typmod = _COLUMN.unpack_from(payload, position)
            position += _COLUMN.size
            columns.append(Column(column, type_oid, typmod, bool(flags & 1)))
        _expect_end(payload, position)
        # an empty namespace stands for pg_catalog
        relation = Relation(_U32(payload, 1)[0], schema or "pg_catalog", name, identity, tuple(columns))
        self._relations[relation.oid] = relation, count, reader(count)
        return relation

    def _truncate(self, payload: bytes) -> list[Change]:
        count = _U32(payload, 1)[0]
        _expect_end(payload, 6 + 4 * count)  # before the list is made: a damaged count may say four billion
        return [
            Change(Operation.TRUNCATE, self._relation(oid, 5)[0], self._next(), None, False, None, False)
            for (oid,) in struct.iter_unpack(">I", payload[6:])
        ]

    def _relation(self, oid: int, start: int) -> tuple[Relation, int, Reader]:
        known = self._relations.get(oid)
        if known is None:
            raise _Malformed(f"relation {oid} was never described", start + 1)
        return known

    def _next(self) -> int:
        if not self.in_transaction:
            raise ValueError("a row outside a transaction")
        ordinal = self.ordinal
        self.ordinal = ordinal + 1
        return ordinal


class _Malformed(Exception):
    """What is wrong, and where in the buffer."""

    def __init__(self, what: str, position: int) -> None:
        super().__init__(what, position)
        self.what, self.position = what, position


def _row(message: bytes, position: int, width: int, read: Reader) -> tuple[Row, int, bool]:
    """The values of a TupleData at `position`, the position behind it, whether one of them was not sent."""
    (count,) = _U16(message, position)
    if count != width:
        raise _wrong_width(count, width, position)
    return read(message, position + 2)


def _string(payload: bytes, position: int) -> tuple[str, int]:
    end = payload.find(b"\0", position)
    if end < 0:
        raise _Malformed("a name that never ends", min(position, len(payload)))
    try:
        return payload[position:end].decode(), end + 1
    except UnicodeDecodeError as error:
        raise _Malformed(f"a name is not UTF-8: {error}", position + error.start) from error


def _expect_end(payload: bytes, position: int) -> None:
    # slices past the end are short in silence, so this check is what makes truncated input loud
    if position != len(payload):
        raise _wrong_end(payload, position)


def _wrong_end(message: bytes, end: int) -> _Malformed:
    return _Malformed(f"its parts end {end - len(message):+} bytes from its own end", min(end, len(message)))


def _wrong_width(count: int, width: int, position: int) -> _Malformed:
    return _Malformed(f"a row of {count} columns for a relation of {width}", position)


def _wrong_old(part: int, relation: Relation, position: int) -> _Malformed:
    # a key read as a whole row would say that every other column was NULL, and one bit is between the two
    return _Malformed(f"found {part:#x} where replica identity {relation.identity!r} has another old part", position)
