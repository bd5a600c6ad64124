"""pgoutput bytes → messages: pure, protocol version 1, one connection's worth of memory.

Formats: https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html

It never waits and never guesses. A message that is shorter, longer or other than the server could have meant is a
`DecodeError` with its kind and offset; the bytes of a value are handed on untouched, so a value cannot be damaged here.
"""

import struct
from typing import Final

from figbridge.change import (
    UNCHANGED,
    Begin,
    Change,
    Column,
    Commit,
    LogicalMessage,
    Lsn,
    Operation,
    Origin,
    Relation,
    TypeName,
    Value,
    timestamp,
)
from figbridge.errors import DecodeError

# A TRUNCATE names several tables; each becomes a change of its own.
Message = Begin | Commit | Origin | Relation | TypeName | LogicalMessage | Change | list[Change]

_U16: Final = struct.Struct(">H").unpack_from
_U32: Final = struct.Struct(">I").unpack_from
_BEGIN: Final = struct.Struct(">QqI")  # final LSN, commit timestamp, xid
_COMMIT: Final = struct.Struct(">BQQq")  # flags, commit LSN, end LSN, timestamp
_MESSAGE: Final = struct.Struct(">BQ")  # flags, LSN
_COLUMN: Final = struct.Struct(">Ii")  # type OID, typmod

_INSERT, _UPDATE, _DELETE, _TRUNCATE = b"IUDT"
_KEY, _OLD, _NEW = b"KON"
_TEXT, _NULL, _UNSENT = b"tnu"


class Decoder:
    """Remembers the relations of one connection and the ordinal of the open transaction. Make a new one per connection.

    The server sends a RELATION before the first change of a table and again after each change of its shape: a row is
    always read by the relation in force when it was written.
    """

    def __init__(self) -> None:
        self._relations: dict[int, Relation] = {}
        self._ordinal = 0
        self.in_transaction = False

    def feed(self, payload: bytes) -> Message:
        """Decode one message (the payload of an XLogData). Raises DecodeError."""
        try:
            kind = payload[0]
            if kind == _INSERT:
                return self._insert(payload)
            if kind == _UPDATE:
                return self._update(payload)
            if kind == _DELETE:
                return self._delete(payload)
            return self._other(payload)
        except (IndexError, struct.error) as error:
            raise _malformed(payload, f"it ends too soon ({error})", len(payload)) from error
        except UnicodeDecodeError as error:
            raise _malformed(payload, f"a name is not UTF-8: {error}", 0) from error
        except (ValueError, OverflowError) as error:  # overflow: a time of commit that no calendar has
            raise _malformed(payload, str(error), 0) from error

    def _insert(self, payload: bytes) -> Change:
        relation = self._relation(payload, 1)
        if payload[5] != _NEW:
            raise _malformed(payload, f"expected a new row, found {payload[5]:#x}", 5)
        after, end = _row(payload, 6, len(relation.columns))
        _expect_end(payload, end)
        return Change(Operation.INSERT, relation, self._next(), None, False, after)

    def _update(self, payload: bytes) -> Change:
        relation = self._relation(payload, 1)
        width = len(relation.columns)
        before, position, part = None, 5, payload[5]
        if part in (_KEY, _OLD):
            before, position = _row(payload, 6, width)
        if payload[position] != _NEW:
            raise _malformed(payload, f"expected a new row, found {payload[position]:#x}", position)
        after, end = _row(payload, position + 1, width)
        _expect_end(payload, end)
        return Change(Operation.UPDATE, relation, self._next(), before, part == _KEY, after)

    def _delete(self, payload: bytes) -> Change:
        relation = self._relation(payload, 1)
        part = payload[5]
        if part not in (_KEY, _OLD):
            raise _malformed(payload, f"expected an old row or key, found {part:#x}", 5)
        before, end = _row(payload, 6, len(relation.columns))
        _expect_end(payload, end)
        return Change(Operation.DELETE, relation, self._next(), before, part == _KEY, None)

    def _other(self, payload: bytes) -> Message:  # noqa: PLR0911 (one return a kind of message)
        match payload[:1]:
            case b"B":
                _expect_end(payload, 1 + _BEGIN.size)
                commit_lsn, committed, xid = _BEGIN.unpack_from(payload, 1)
                if self.in_transaction:
                    raise _malformed(payload, "a transaction begins inside another", 1)
                self.in_transaction, self._ordinal = True, 0
                return Begin(Lsn(commit_lsn), timestamp(committed), xid)
            case b"C":
                _expect_end(payload, 1 + _COMMIT.size)
                _, commit_lsn, end_lsn, committed = _COMMIT.unpack_from(payload, 1)
                if not self.in_transaction:
                    raise _malformed(payload, "a commit without a begin", 1)
                self.in_transaction = False
                return Commit(Lsn(commit_lsn), Lsn(end_lsn), timestamp(committed))
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
                flags, lsn = _MESSAGE.unpack_from(payload, 1)
                prefix, position = _string(payload, 1 + _MESSAGE.size)
                end = position + 4 + _U32(payload, position)[0]
                _expect_end(payload, end)
                return LogicalMessage(bool(flags & 1), Lsn(lsn), prefix, payload[position + 4 : end])
            case _:
                raise _malformed(payload, "not a message of pgoutput protocol version 1", 0)

    def _remember(self, payload: bytes) -> Relation:
        schema, position = _string(payload, 5)
        name, position = _string(payload, position)
        identity = chr(payload[position])
        if identity not in "difn":
            raise _malformed(payload, f"replica identity {identity!r} does not exist", position)
        count = _U16(payload, position + 1)[0]
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
        self._relations[relation.oid] = relation
        return relation

    def _truncate(self, payload: bytes) -> list[Change]:
        count = _U32(payload, 1)[0]
        _expect_end(payload, 6 + 4 * count)
        return [
            Change(Operation.TRUNCATE, self._relation(payload, 6 + 4 * index), self._next(), None, False, None)
            for index in range(count)
        ]

    def _relation(self, payload: bytes, position: int) -> Relation:
        oid = _U32(payload, position)[0]
        relation = self._relations.get(oid)
        if relation is None:
            raise _malformed(payload, f"relation {oid} was never described", position)
        return relation

    def _next(self) -> int:
        if not self.in_transaction:
            raise ValueError("a row outside a transaction")
        ordinal = self._ordinal
        self._ordinal = ordinal + 1
        return ordinal


def _row(payload: bytes, position: int, width: int) -> tuple[list[Value], int]:
    """The values of a TupleData at `position`, and the position behind it."""
    count = _U16(payload, position)[0]
    if count != width:
        raise _malformed(payload, f"a row of {count} columns for a relation of {width}", position)
    position += 2
    values: list[Value] = []
    append = values.append
    for _ in range(count):
        kind = payload[position]
        if kind == _TEXT:
            start = position + 5
            # unsigned: a damaged length runs past the end, which _expect_end sees, never backwards
            position = start + _U32(payload, position + 1)[0]
            append(payload[start:position])
        elif kind == _NULL:
            append(None)
            position += 1
        elif kind == _UNSENT:
            append(UNCHANGED)
            position += 1
        else:
            raise _malformed(payload, f"a value of unknown kind {kind:#x}", position)
    return values, position


def _string(payload: bytes, position: int) -> tuple[str, int]:
    end = payload.index(b"\0", position)  # ValueError when it never ends
    return payload[position:end].decode(), end + 1


def _expect_end(payload: bytes, position: int) -> None:
    # slices past the end are short in silence, so this check is what makes truncated input loud
    if position != len(payload):
        raise _malformed(payload, f"it should be {position} bytes long and is {len(payload)}", position)


def _malformed(payload: bytes, what: str, offset: int) -> DecodeError:
    return DecodeError(what, kind=payload[:1].decode("latin-1") or "empty", offset=offset)
