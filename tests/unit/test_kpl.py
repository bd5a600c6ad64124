"""Aggregated Kinesis records: taken apart when they are whole, left alone when they are not, never a crash."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from figbridge.transports.kpl import MAGIC, user_records
from fixtures.kpl import aggregated, sealed, varint

# made by aws-kinesis-agg 1.2.3, which has Google's own protobuf: keys a, b, a, a; the last with an explicit hash key
FOREIGN = bytes.fromhex(
    "f3899ac20a01610a0162120531323334351a0e08001a0a7b226964223a2231227d1a0e08011a0a7b226964223a2232227d"
    "1a0408001a001a08080010001a0200ff1266f7c47bb324bbfd8e1fe8e1ca36ef"
)
BODIES = st.lists(st.binary(max_size=300), min_size=1, max_size=20)


def test_what_another_library_made() -> None:
    assert user_records(FOREIGN) == [b'{"id":"1"}', b'{"id":"2"}', b"", b"\x00\xff"]


@given(
    bodies=BODIES,
    keys=st.lists(st.text(max_size=200), min_size=1, max_size=5),
    tags=st.booleans(),
    hashed=st.booleans(),
)
def test_every_record_comes_out_in_its_order(bodies: list[bytes], keys: list[str], tags: bool, hashed: bool) -> None:
    assert user_records(aggregated(*bodies, keys=keys, tags=tags, hashed=hashed)) == bodies


@given(st.binary(max_size=300))
def test_a_plain_record_is_itself(data: bytes) -> None:
    assert user_records(data) == [data]


@given(bodies=BODIES, data=st.data())
def test_a_damaged_one_is_a_plain_record(bodies: list[bytes], data: st.DataObject) -> None:
    whole = aggregated(*bodies)
    damaged = bytearray(whole)
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(whole) - 1)) :]
    else:
        bit = data.draw(st.integers(0, 8 * len(whole) - 1))
        damaged[bit // 8] ^= 1 << bit % 8
    assert user_records(bytes(damaged)) == [bytes(damaged)]


@given(st.one_of(st.binary(max_size=60), BODIES.map(lambda it: aggregated(*it)[4:-16])), st.data())
def test_whatever_stands_behind_a_right_digest_is_read_or_left_alone(message: bytes, data: st.DataObject) -> None:
    mangled = bytearray(message)
    for _ in range(data.draw(st.integers(0, 3)) if message else 0):
        mangled[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    whole = sealed(bytes(mangled))
    found = user_records(whole)
    assert found == [whole] or (sum(map(len, found)) <= len(mangled) and all(it in mangled for it in found))


@pytest.mark.parametrize(
    "message",
    [
        b"",  # no record: nobody would hear of it
        b"\x0a\x01k",
        b"\x1a\x02\x08\x00",  # a record without data
        b"\x1a\x7f",  # longer than it is
        b"\x1a",
        b"\x1b\x1c",  # a group
        b"\x02\x00",  # field 0
        b"\x0d\x00",  # a fixed32 that is cut off
        b"\xff" * 11,
        b"\x1a" + varint(1 << 63),
    ],
)
def test_a_message_that_is_none_is_a_plain_record(message: bytes) -> None:
    whole = sealed(message)
    assert user_records(whole) == [whole]


def test_fields_that_are_not_known_are_passed_over() -> None:
    odd = b"\x28\x96\x01" + b"\x31" + bytes(8) + b"\x3d" + bytes(4) + b"\x42\x02hi"  # a varint, 64 bits, 32 bits, bytes
    record = b"\x08\x00\x1a\x01x" + odd
    assert user_records(sealed(odd + b"\x1a" + varint(len(record)) + record)) == [b"x"]
    assert user_records(MAGIC) == [MAGIC]
