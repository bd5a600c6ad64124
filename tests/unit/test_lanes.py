"""A lane makes what `Decoder` and `Shaper` make of the same messages, and leaves to them what they refuse.

The messages are made here, so that hypothesis can choose the columns and break the bytes.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from figbridge.change import Begin, Change, Lsn, Operation, timestamp
from figbridge.config import HashSection, SelectSection
from figbridge.errors import DecodeError
from figbridge.event import Event, Rejection
from figbridge.forward.decode import Decoder
from figbridge.forward.keys import PrimaryKeys
from figbridge.forward.sanitize import Rules
from figbridge.forward.shape import Shaper
from figbridge.forward.source import PAYLOAD
from figbridge.forward.table import Naming
from figbridge.forward.unroll import HEAD
from figbridge.forward.values import Encoders

_OID: Final = 16384
_NAMING: Final = Naming("db", "legacy.{database}", "{table}.{operation}")
_DEBEZIUM: Final = replace(_NAMING, form="debezium", resources=("arn:{table}",))
_FRAME: Final = struct.pack(">cQQq", b"w", 1, 2, 3)
_BEGIN: Final = Begin(Lsn(0x16B374D8), timestamp(847_000_000_123_456), 753)
_BOOL, _INT8, _INT4, _TEXT, _JSON, _FLOAT8, _TIMESTAMP, _TIMESTAMPTZ, _NUMERIC = (
    16,
    20,
    23,
    25,
    114,
    701,
    1114,
    1184,
    1700,
)

Value = bytes | None


def relation(types: Sequence[int], keys: frozenset[int], name: bytes = b"t") -> bytes:
    columns = b"".join(
        struct.pack(">B", index in keys) + b'c%%"%d\0' % index + struct.pack(">Ii", oid, -1)
        for index, oid in enumerate(types)
    )
    return (
        _FRAME + struct.pack(">cI", b"R", _OID) + b"public\0" + name + b"\0d" + struct.pack(">H", len(types)) + columns
    )


def row(kind: bytes, values: Sequence[Value], part: bytes = b"N") -> bytes:
    cells = [b"n" if value is None else struct.pack(">cI", b"t", len(value)) + value for value in values]
    return _FRAME + struct.pack(">cIcH", kind, _OID, part, len(values)) + b"".join(cells)


class Both:
    """The two ways of one stream: `slow` has no lanes."""

    def __init__(self, described: bytes, naming: Naming = _NAMING, rules: Callable[[], Rules] = Rules) -> None:
        self.slow = _way(described, naming, rules())
        self.fast = _way(described, naming, rules())

    def slowly(self, messages: Sequence[bytes]) -> list[Event]:
        return [event for message in messages if (event := _event(*self.slow, message))]

    def fastly(self, messages: Sequence[bytes]) -> tuple[list[Event], int]:
        """As `Capture` does; and how many rows went through a lane."""
        decoder, shaper = self.fast
        events: list[Event] = []
        laned, rest = 0, iter(messages)
        message = next(rest, b"")
        while message:
            if lane := shaper.lanes.get(message[HEAD]):
                first = decoder.ordinal
                message, decoder.ordinal = lane[2](message, rest, first, shaper.stamp, events.append)
                if decoder.ordinal > first:
                    laned += decoder.ordinal - first
                    continue
            if event := _event(decoder, shaper, message):
                events.append(event)
            message = next(rest, b"")
        return events, laned


def _way(described: bytes, naming: Naming, rules: Rules) -> tuple[Decoder, Shaper]:
    encoders = Encoders("safe", lambda _oid: None)
    decoder, shaper = Decoder(), Shaper(naming, encoders, lambda _relation: PrimaryKeys(0, {}), rules=rules)
    decoder.feed(described, PAYLOAD)
    decoder.feed(b"B" + struct.pack(">QqI", 1, 2, 3))
    shaper.begin(_BEGIN, "7000-slot-1")
    return decoder, shaper


def _event(decoder: Decoder, shaper: Shaper, message: bytes) -> Event | None:
    change = decoder.feed(message, PAYLOAD)
    assert isinstance(change, Change)
    shaper.message = message
    event = shaper.event(change)
    return event.event if isinstance(event, Rejection) else event  # of a key that is NULL, which no server sends


_VALUES: Final[dict[int, st.SearchStrategy[bytes]]] = {
    _BOOL: st.sampled_from([b"t", b"f"]),
    _INT8: st.integers(-(2**63), 2**63 - 1).map(lambda it: b"%d" % it),
    _INT4: st.integers(-(2**31), 2**31 - 1).map(lambda it: b"%d" % it),
    _TEXT: st.one_of(st.text().map(str.encode), st.binary(), st.just(b"x" * 300)),
    _JSON: st.sampled_from([b'{"a":1}', b'{\n"a" : 1\r\n}', '"ä"'.encode(), b'"\xff"', b"null"]),
    _FLOAT8: st.sampled_from([b"1.5", b"NaN", b"-Infinity", b"1e+300"]),
    _TIMESTAMP: st.sampled_from([b"2026-11-23 10:08:02.69654", b"infinity", b"0044-03-15 00:00:00 BC"]),
    _TIMESTAMPTZ: st.sampled_from([b"2026-11-23 10:08:02+00", b"-infinity", b"0044-03-15 00:00:00+00 BC"]),
    _NUMERIC: st.sampled_from([b"12.50", b"NaN", b"12345678901234567890.5", b"-0.000000000000001"]),
}


@st.composite
def tables(draw: Callable[..., object]) -> tuple[list[int], frozenset[int], list[tuple[bytes, list[Value]]]]:
    """Types, positions of the key, and rows, each with its kind."""
    types = draw(st.lists(st.sampled_from(sorted(_VALUES)), max_size=12))
    assert isinstance(types, list)
    keys = draw(st.frozensets(st.integers(0, max(0, len(types) - 1)), max_size=2))
    assert isinstance(keys, frozenset)
    one = st.tuples(*[st.one_of(st.none(), _VALUES[oid]) for oid in types]).map(list)
    rows = draw(st.lists(st.tuples(st.sampled_from([b"I", b"U"]), one), min_size=2, max_size=6))
    assert isinstance(rows, list)
    return types, keys, rows


@given(tables(), st.sampled_from([_NAMING, _DEBEZIUM]))
def test_a_lane_makes_what_the_long_way_makes(
    table: tuple[list[int], frozenset[int], list[tuple[bytes, list[Value]]]], naming: Naming
) -> None:
    types, keys, rows = table
    both = Both(relation(types, keys), naming)
    messages = [row(kind, values) for kind, values in rows]
    assert both.fastly(messages)[0] == both.slowly(messages)


def test_all_rows_but_the_first_pass_the_lane() -> None:
    both = Both(relation([_INT8, _TEXT], frozenset({0})))
    messages = [row(b"I", [b"%d" % number, b"x"]) for number in range(5000)]
    events, laned = both.fastly(messages)
    assert events == both.slowly(messages)
    assert laned == len(messages) - 1
    assert events[-1].id.endswith(f"{4999:08X}")


def test_what_a_lane_does_not_know_goes_the_long_way_in_its_place() -> None:
    """A value that was not sent, a new key, a deleted row, a text that is not UTF-8."""
    both = Both(relation([_INT8, _TEXT], frozenset({0})))
    ordinary = row(b"U", [b"1", b"x"])
    unsent = _FRAME + struct.pack(">cIcH", b"U", _OID, b"N", 2) + struct.pack(">cI", b"t", 1) + b"1u"
    old_key = struct.pack(">H", 2) + struct.pack(">cI", b"t", 1) + b"1n"
    new_key = _FRAME + struct.pack(">cIc", b"U", _OID, b"K") + old_key + row(b"U", [b"2", b"x"])[PAYLOAD + 5 :]
    deleted = _FRAME + struct.pack(">cIc", b"D", _OID, b"K") + old_key
    no_utf8 = row(b"U", [b"3", b"\xff"])
    messages = [ordinary, ordinary, unsent, ordinary, new_key, ordinary, deleted, ordinary, no_utf8, ordinary]
    events, laned = both.fastly(messages)
    assert events == both.slowly(messages)
    assert laned == 5, "every ordinary row but the first, which opens the lane"


def test_a_description_closes_all_lanes() -> None:
    """Or a row would be written under the names of a version of its table that is no longer in force."""
    described = relation([_INT8, _TEXT], frozenset({0}))
    both = Both(described)
    ordinary = row(b"I", [b"1", b"x"])
    both.fastly([ordinary, ordinary])
    decoder, shaper = both.fast
    for name in (b"other", b"t"):
        decoder.feed(relation([_INT8, _TEXT], frozenset({0}), name), PAYLOAD)
        shaper.described()
        events, laned = both.fastly([ordinary, ordinary])
        assert laned == 1
        assert {event.detail_type for event in events} == {f"{name.decode()}.inserted"}


@given(tables(), st.data())
def test_broken_bytes_are_judged_by_the_decoder_alone(
    table: tuple[list[int], frozenset[int], list[tuple[bytes, list[Value]]]], data: st.DataObject
) -> None:
    types, keys, rows = table
    both = Both(relation(types, keys))
    first = [row(kind, values) for kind, values in rows]
    assert both.fastly(first)[0] == both.slowly(first)
    broken = bytearray(row(*rows[-1]))
    for _ in range(data.draw(st.integers(1, 3))):
        broken[data.draw(st.integers(PAYLOAD, len(broken) - 1))] = data.draw(st.integers(0, 255))
    message = bytes(broken[: data.draw(st.integers(PAYLOAD + 1, len(broken)))])
    outcomes = [_outcome(lambda: both.fastly([message])[0]), _outcome(lambda: both.slowly([message]))]
    assert outcomes[0] == outcomes[1]


def _outcome(way: Callable[[], list[Event]]) -> list[Event] | tuple[str, int]:
    try:
        return way()
    except DecodeError as error:
        return error.what, error.offset
    except AssertionError:
        return "not a row", 0
    except (ValueError, IndexError):
        return "a value that its type cannot have", 0  # `Capture` makes a DecodeError of it


def test_operations_have_lanes_of_their_own() -> None:
    both = Both(relation([_INT8], frozenset({0})))
    messages = [row(b"I", [b"1"]), row(b"I", [b"2"]), row(b"U", [b"1"])]
    events, _ = both.fastly(messages)
    assert [event.detail_type for event in events] == ["t.inserted", "t.inserted", "t.updated"]
    assert {operation for operation, _, _ in both.fast[1].lanes.values()} == {Operation.INSERT, Operation.UPDATE}


@st.composite
def selections(draw: Callable[..., object], width: int) -> Callable[[], Rules]:
    """Rules about some of the columns, and perhaps a predicate over two of them."""
    fates = draw(st.lists(st.sampled_from(["", "exclude", "mask", "hash", "truncate", "replace"]), min_size=width))
    assert isinstance(fates, list)
    names = [f'c%"{index}' for index in range(width)]
    of = {fate: [name for name, it in zip(names, fates, strict=False) if it == fate] for fate in set(fates)}
    asked = draw(st.sampled_from([None, *range(width)]))
    kinds = ["> `0`", "== 'x'", "== `true`"]  # of whatever type a column is, one of them can hold
    compared = [f'"c%\\"{index}" {it}' for index in (0, asked) for it in kinds]
    where = None if asked is None else " || ".join([f'!"c%\\"{asked}"', *compared])
    section = SelectSection.model_validate(
        {
            "table": "public.t",
            "exclude": of.get("exclude", []),
            "mask": of.get("mask", []),
            "hash": of.get("hash", []),
            "truncate": dict.fromkeys(of.get("truncate", []), 2),
            "replace": dict.fromkeys(of.get("replace", []), "%b"),
            "where": where,
        }
    )
    hashing = HashSection.model_validate({"key": "k" * 16, "id": "%s"[1:]})
    return lambda: Rules([section], hashing)


@given(tables(), st.sampled_from([_NAMING, _DEBEZIUM]), st.data())
def test_sanitized_columns_and_filtered_rows_are_the_same_on_both_ways(
    table: tuple[list[int], frozenset[int], list[tuple[bytes, list[Value]]]], naming: Naming, data: st.DataObject
) -> None:
    types, keys, rows = table
    both = Both(relation(types, keys), naming, data.draw(selections(len(types))))
    messages = [row(kind, values) for kind, values in rows]
    assert both.fastly(messages)[0] == both.slowly(messages)


@pytest.mark.parametrize("naming", [_NAMING, _DEBEZIUM])
def test_sanitized_rows_pass_the_lane(naming: Naming) -> None:
    section = SelectSection.model_validate(
        {
            "table": "public.t",
            "exclude": ['c%"1'],
            "mask": ['c%"2'],
            "hash": ['c%"0'],
            "where": '"c%\\"3" > `0`',
        }
    )
    hashing = HashSection.model_validate({"key": "k" * 16})
    both = Both(relation([_INT8, _TEXT, _TEXT, _INT4], frozenset({0})), naming, lambda: Rules([section], hashing))
    messages = [row(b"I", [b"%d" % number, b"secret", b"secret", b"7"]) for number in range(100)]
    events, laned = both.fastly(messages)
    assert laned == 99
    assert events == both.slowly(messages)
    assert b"secret" not in b"".join(event.detail for event in events)
    assert len({event.key for event in events}) == 100


def test_ordinals_of_a_large_transaction() -> None:
    """The digits of an id's end are looked up, those before them are made now and then: across each seam of that."""
    both = Both(relation([_INT8], frozenset({0})))
    messages = [row(b"I", [b"%d" % number]) for number in range(8300)]
    fast, _ = both.fastly(messages)
    assert fast == both.slowly(messages)
    for decoder in (both.slow[0], both.fast[0]):
        decoder.ordinal = 0xFFFFFFFE  # beyond eight digits an id grows by one
    assert both.fastly(messages[:4])[0] == both.slowly(messages[:4])
