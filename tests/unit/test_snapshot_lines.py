"""The lines that a snapshot writes column by column are the envelopes of its events."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from figbridge.change import Begin, Column, Lsn, Relation
from figbridge.event import envelopes
from figbridge.forward import debezium, place
from figbridge.forward.place import Stamp
from figbridge.forward.snapshot.block import Block, Part
from figbridge.forward.snapshot.layout import Layout
from figbridge.forward.table import Naming, Table
from figbridge.forward.values import Encoders

BEGIN = Begin(Lsn(1), datetime(2026, 11, 26, tzinfo=UTC), 7)
STAMPS = {"native": place.of_rows(BEGIN, "1-slot"), "debezium": debezium.of_rows(BEGIN, "1-slot")}
STAMP = STAMPS["native"]
INT8, TEXT, UUID, INT4, NUMERIC = 20, 25, 2950, 23, 1700
SMALL = ((12 << 16) | 2) + 4  # numeric(12,2)
INTEGERS = st.integers(-(2**63), 2**63 - 1) | st.integers(-9, 9) | st.sampled_from([2**53, 10**15, 10**14])
SPECIAL = st.sampled_from(["NaN", "Infinity", "-Infinity", "0.000000000000001", "-0.5"])
VALUES: dict[tuple[int, int], st.SearchStrategy[str]] = {
    (INT8, -1): INTEGERS.map(str),
    (INT4, -1): st.integers(-(2**31), 2**31 - 1).map(str),
    (NUMERIC, -1): SPECIAL | st.decimals(allow_nan=False, allow_infinity=False).map(lambda it: format(it, "f")),
    (NUMERIC, SMALL): st.just("NaN") | st.integers(-(10**12) + 1, 10**12 - 1).map(lambda it: f"{it / 100:.2f}"),
    (TEXT, -1): st.text().map(lambda it: json.dumps(it, ensure_ascii=False)),
    (UUID, -1): st.uuids().map(lambda it: f'"{it}"'),
}


def layout(types: list[tuple[int, int]], keys: set[int], form: Any = "native") -> Layout:
    columns = tuple(Column(f'c "{it}"', *type_, it in keys) for it, type_ in enumerate(types))
    relation = Relation(16385, "public", 't {"x"} %s', "d" if keys else "f", columns)
    naming = Naming("shop", "legacy.{database}", "{table}.{operation}", ("arn:x",), form=form)
    table = Table(relation, naming, Encoders("safe", lambda _: None), frozenset(columns[it].name for it in keys), {})
    return Layout(table, keyed=bool(keys))


@st.composite
def parts(draw: st.DrawFn) -> tuple[Layout, Part, Stamp, int]:
    """Rows of some table, and the ordinal of the first."""
    types = draw(st.lists(st.sampled_from(sorted(VALUES)), max_size=6))
    keys = draw(st.sets(st.sampled_from(range(len(types))), max_size=3)) if types else set()
    values = [VALUES[type_] if it in keys else VALUES[type_] | st.just("null") for it, type_ in enumerate(types)]
    rows = draw(st.lists(st.tuples(*values), max_size=8))
    first = draw(st.integers(0, 5) | st.integers(990, 1005) | st.integers(99_995, 100_001))
    form = draw(st.sampled_from(sorted(STAMPS)))
    part = Part(list(zip(*rows, strict=True)) if rows else [()] * len(types), len(rows))
    return layout(types, keys, form), part, STAMPS[form], first


@given(parts())
def test_lines_are_envelopes(given_: tuple[Layout, Part, Stamp, int]) -> None:
    of, part, stamp, first = given_
    events = of.events(part, "1-slot-1-16385-", stamp, first)
    lines = of.lines(part, "1-slot-1-16385-", stamp, first)
    assert lines.split(b"\n")[:-1] == envelopes(events)
    for line in envelopes(events):
        json.loads(line)


@pytest.mark.parametrize("count", [1, 999, 1000, 1001, 2500])
@pytest.mark.parametrize("first", [0, 1, 999, 1000, 1999])
def test_ordinals(first: int, count: int) -> None:
    of = layout([(INT4, -1)], {0})
    part = Part([[str(it) for it in range(count)]], count)
    lines = of.lines(part, "i-", STAMP, first).split(b"\n")[:-1]
    assert [json.loads(it)["detail"]["position"]["ordinal"] for it in lines] == list(range(first, first + count))
    assert lines == envelopes(of.events(part, "i-", STAMP, first))


def test_a_part_is_cut() -> None:
    of = layout([(INT4, -1), (TEXT, -1)], {0})
    text = "".join(f'{it}\t"{it}"\n' for it in range(1234))
    found = list(of.parts(Block(text.encode(), 1234)))
    assert [it.rows for it in found] == [500, 500, 234]
    assert [row for it in found for row in it.values()] == [(str(it), f'"{it}"') for it in range(1234)]
    one, other = found[0].cut(3)
    assert [one.rows, other.rows] == [3, 497]
    assert [*one.values(), *other.values()] == list(found[0].values())
