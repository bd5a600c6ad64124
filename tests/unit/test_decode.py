"""The decoder against a second reading of the manual: what is no message is a DecodeError, what is one is read alike.

The messages here are made by hand and by hypothesis; those of real servers are in integration/test_decode.py.
"""

import struct
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from figbridge.change import UNCHANGED, Change
from figbridge.errors import DecodeError
from figbridge.forward.decode import Decoder
from fixtures import wire
from fixtures.reference_decoder import Reference, Unreadable, plain

PADDING = b"\x00w\xff" * 9  # 27 bytes of something else before the message
TABLE = wire.relation(7, [(1, "id", 23, -1), (0, "name", 25, -1)])
WHOLE = wire.relation(8, [(1, "id", 23, -1), (1, "name", 25, -1)], identity="f")


def feed(decoder: Decoder, message: bytes, start: int) -> Any:
    """What the decoder reads, in the reference's form, or its DecodeError. Anything else fails the test."""
    try:
        return plain(decoder.feed(PADDING[:start] + message, start))
    except DecodeError as error:
        return error


def read(reference: Reference, message: bytes) -> Any:
    """What the reference reads, or why it does not."""
    try:
        return reference.read(message)
    except Unreadable as why:
        return why


def both(decoder: Decoder, reference: Reference, message: bytes, start: int = 0) -> Any:
    """The reading that both agree on; None when both refuse."""
    found, wanted = feed(decoder, message, start), read(reference, message)
    if not isinstance(wanted, Unreadable):
        assert found == wanted
        assert decoder.in_transaction == reference.in_transaction
        return found
    assert isinstance(found, DecodeError), f"the reference refuses ({wanted}) what the decoder reads as {found}"
    assert found.kind == (message[:1].decode("latin-1") or "empty")
    assert 0 <= found.offset <= len(message)
    return None


@given(wire.conversations(), st.sampled_from([0, 25]))
def test_conversations_are_read_as_the_manual_says(conversation: list[bytes], start: int) -> None:
    decoder, reference = Decoder(), Reference()
    for message in conversation:
        assert both(decoder, reference, message, start) is not None


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_damage_is_noticed_or_read_as_the_manual_says(data: st.DataObject) -> None:
    decoder, reference = Decoder(), Reference()
    start = data.draw(st.sampled_from([0, 25]))
    for message in data.draw(wire.conversations()):
        if data.draw(st.integers(0, 2)) == 0:
            damaged = data.draw(wire.damages(message))
            if both(decoder, reference, damaged, start) is None:
                return
        elif both(decoder, reference, message, start) is None:
            return  # what was damaged before had a meaning of its own, and this one does not go with it


@settings(max_examples=1000, deadline=None)
@given(st.binary(max_size=80), st.sampled_from([0, 25]))
def test_arbitrary_bytes_in_an_open_transaction(message: bytes, start: int) -> None:
    decoder, reference = Decoder(), Reference()
    for known in (TABLE, WHOLE, wire.begin()):
        both(decoder, reference, known)
    both(decoder, reference, message, start)


def opened() -> tuple[Decoder, Reference]:
    decoder, reference = Decoder(), Reference()
    for known in (TABLE, WHOLE, wire.begin()):
        assert both(decoder, reference, known)
    return decoder, reference


@given(st.sampled_from("IUD"), st.sampled_from([7, 8, 9]), st.binary(max_size=40))
def test_arbitrary_bytes_behind_the_head_of_a_row(kind: str, oid: int, rest: bytes) -> None:
    both(*opened(), struct.pack(">cI", kind.encode(), oid) + rest, 25)


EVERY_KIND = {
    "begin": wire.begin(2**63, 10**15, 2**32 - 1),
    "commit": wire.commit(2**64 - 1, 2**64 - 1, -1),
    "origin": b"O" + bytes(8) + b"elsewhere\0",
    "relation": wire.relation(9, [(1, "é", 2**32 - 1, -1), (0, "", 0, 2**31 - 1)], "i", "t"),
    "type": b"Y" + bytes(3) + b"\x09public\0mood\0",
    "insert": wire.insert(7, [b"1", None]),
    "update": b"U\0\0\0\x07N" + wire.row([b"1", "u"]),
    "update of a key": b"U\0\0\0\x07K" + wire.row([b"1", None]) + b"N" + wire.row([b"2", b"x"]),
    "update of a whole row": b"U\0\0\0\x08O" + wire.row([b"1", b"y"]) + b"N" + wire.row([b"2", b"x"]),
    "delete": b"D\0\0\0\x07K" + wire.row([b"1", None]),
    "delete of a whole row": b"D\0\0\0\x08O" + wire.row([b"1", b""]),
    "truncate": wire.truncate([(7, "d", 2), (8, "f", 2)]),
    "message": b"M\x01" + bytes(8) + b"prefix\0\0\0\0\x03abc",
}


def ready(kind: str) -> tuple[Decoder, Reference]:
    decoder, reference = opened()
    if kind == "begin":
        both(decoder, reference, wire.commit())
    return decoder, reference


@pytest.mark.parametrize("start", [0, 25])
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_each_kind_whole_cut_at_each_byte_too_long_and_with_each_bit_flipped(kind: str, start: int) -> None:
    message = EVERY_KIND[kind]
    assert both(*ready(kind), message, start)
    for length in range(len(message)):
        assert both(*ready(kind), message[:length], start) is None
    for more in (b"\0", b"n", message):
        assert both(*ready(kind), message + more, start) is None
    for bit in range(8 * len(message)):
        damaged = bytearray(message)
        damaged[bit // 8] ^= 1 << bit % 8
        both(*ready(kind), bytes(damaged), start)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_number_that_lies_costs_no_memory(kind: str) -> None:
    """Wherever a length or a count may stand. 64 kB would be 16 times what a message of 50 bytes needs."""
    message = EVERY_KIND[kind]
    lies = [b"\xff" * 2, b"\x7f\xff", b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\x10\0\0\0"]
    for lie in lies:
        for at in range(1, len(message)):
            damaged = message[:at] + lie + message[at + len(lie) :]
            decoder, reference = ready(kind)
            tracemalloc.start()
            try:
                both(decoder, reference, damaged)
                assert tracemalloc.get_traced_memory()[1] < 64_000
            finally:
                tracemalloc.stop()


def test_more_columns_than_a_table_can_have() -> None:
    """Each number of columns costs a compilation: 65,535 would take the bridge seconds."""
    columns = [(0, f"c{number}", 25, -1) for number in range(1601)]
    assert both(*opened(), wire.relation(9, columns[:1600]))
    decoder, reference = opened()
    assert both(decoder, reference, wire.relation(9, columns)) is None


@pytest.mark.parametrize("kind", ["update of a key", "update of a whole row", "delete", "delete of a whole row"])
def test_a_key_is_never_taken_for_a_whole_old_row_nor_the_other_way_round(kind: str) -> None:
    """One bit is between K and O; the columns that are not of the key would read as NULL."""
    message = EVERY_KIND[kind]
    swapped = message[:5] + (b"O" if message[5:6] == b"K" else b"K") + message[6:]
    with pytest.raises(DecodeError, match="replica identity") as caught:
        opened()[0].feed(swapped)
    assert caught.value.offset == 5


def test_a_value_is_the_bytes_that_came() -> None:
    decoder, _ = opened()
    change = decoder.feed(wire.insert(7, [b"\xff\0\n", "u"]))
    assert isinstance(change, Change)
    assert change.after == (b"\xff\0\n", UNCHANGED)
    assert change.unsent


def test_a_message_that_ends_before_it_begins() -> None:
    for length in (0, 1, 24, 25):
        with pytest.raises(DecodeError) as caught:
            opened()[0].feed(b"w" * length, 25)
        assert (caught.value.kind, caught.value.offset) == ("empty", 0)
