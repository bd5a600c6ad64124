"""Records that the Kinesis Producer Library has aggregated: many of a user's records in one of the stream's.

    F3 89 9A C2 · AggregatedRecord, a protobuf message · MD5 of that message
    https://github.com/awslabs/amazon-kinesis-producer/blob/master/aggregation-format.md

    message AggregatedRecord {                        message Record {
      repeated string partition_key_table     = 1;      required uint64 partition_key_index     = 1;
      repeated string explicit_hash_key_table = 2;      optional uint64 explicit_hash_key_index = 2;
      repeated Record records                 = 3;      required bytes  data                    = 3;
    }                                                   repeated Tag    tags                    = 4;  }

That one message is read by hand, as the wire format says, which saves a dependency:
https://protobuf.dev/programming-guides/encoding/

What is not whole (another magic or digest, a message that cannot be read, one without a record) is a plain record, as
for the Kinesis Client Library, and the reverse path says of it what it says of any message that it cannot read. So
nothing is guessed, and nothing lost: it becomes a dead letter with all of its bytes.

Keys are not looked at: the order is that of the records. That library also drops the records whose hash key is not of
the shard that they are in, because its producer sends those again. Others that write this format do not; so all are
handed out here, and one that comes twice is a duplicate for the inbox.
"""

import hashlib
from collections.abc import Iterator
from typing import Final

MAGIC: Final = b"\xf3\x89\x9a\xc2"
_DIGEST: Final = 16  # bytes of an MD5
_RECORDS, _DATA = 3, 3  # fields of AggregatedRecord and Record
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types; 3 and 4 are groups, which these messages have not
_LONGEST: Final = 10  # bytes of a varint of 64 bits


class _Malformed(Exception):
    """Not such a message."""


def user_records(data: bytes) -> list[bytes]:
    """The records in `data`, in their order; `data` itself where it is no aggregated record."""
    if not data.startswith(MAGIC) or len(data) < len(MAGIC) + _DIGEST:
        return [data]
    message = data[len(MAGIC) : -_DIGEST]
    if hashlib.md5(message, usedforsecurity=False).digest() != data[-_DIGEST:]:
        return [data]
    try:
        return [
            _data(message, *place) for number, place in _fields(message, 0, len(message)) if number == _RECORDS
        ] or [data]
    except _Malformed:
        return [data]


def _data(message: bytes, begin: int, end: int) -> bytes:
    found = None
    for number, place in _fields(message, begin, end):
        if number == _DATA:
            found = place  # the last one counts
    if found is None:
        raise _Malformed
    return message[slice(*found)]


def _fields(message: bytes, begin: int, end: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """(number, place) of those of the wire type that bytes, strings and messages have; others are passed over."""
    while begin < end:
        tag, begin = _varint(message, begin, end)
        number, kind = tag >> 3, tag & 7
        if number == 0:
            raise _Malformed
        if kind == _BYTES:
            length, begin = _varint(message, begin, end)
            if length > end - begin:
                raise _Malformed
            yield number, (begin, begin + length)
            begin += length
        elif kind == _VARINT:
            _, begin = _varint(message, begin, end)
        elif kind in {_FIXED64, _FIXED32}:
            begin += 8 if kind == _FIXED64 else 4
        else:
            raise _Malformed
    if begin != end:
        raise _Malformed


def _varint(message: bytes, begin: int, end: int) -> tuple[int, int]:
    """(value, the place behind it)."""
    value = shift = 0
    for place in range(begin, min(end, begin + _LONGEST)):
        byte = message[place]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place + 1
        shift += 7
    raise _Malformed
