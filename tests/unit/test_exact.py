"""JMESPath over exact numbers: what its functions, comparisons and literals make of them."""

import time
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from figbridge.reverse.message import Malformed, parse, write
from figbridge.reverse.values import Path

NUMBERS = st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**30), max_value=10**30) | st.integers()


def found(expression: str, detail: str) -> Any:
    event = parse(f'{{"id":"1","source":"s","detail-type":"t","detail":{detail}}}'.encode())
    return Path(expression, "here").get(event.document)


@pytest.mark.parametrize(
    ("expression", "detail", "expected"),
    [
        ("to_number(detail.x)", '{"x":12.50}', "12.50"),
        ("to_number(detail.x)", '{"x":"12.50"}', "12.50"),
        ("to_number(detail.x)", '{"x":"42"}', "42"),
        ("to_number(detail.x)", '{"x":"1e999"}', "1E+999"),
        ("to_number(detail.x)", '{"x":-0.99}', "-0.99"),
        ("to_number(detail.x)", '{"x":"twelve"}', "null"),
        ("to_number(detail.x)", '{"x":true}', "null"),
        ("to_number(detail.x)", '{"x":"%s"}' % ("9" * 5000), "9" * 5000),
        ("to_string(detail.x)", '{"x":12.50}', '"12.50"'),
        ("to_string(detail.x)", '{"x":"12.50"}', '"12.50"'),
        ("to_string(detail)", '{"x":12.50,"é":[null]}', r'"{\"x\":12.50,\"\\u00e9\":[null]}"'),
        ("type(detail.x)", '{"x":0.1}', '"number"'),
        ("type(detail.x)", '{"x":false}', '"boolean"'),
        ("detail.x == `0.1`", '{"x":0.1}', "true"),
        ("detail.x == `0.10`", '{"x":0.1}', "true"),
        ("detail.x >= `0.1`", '{"x":0.1}', "true"),
        ("detail.x == `0.1000000000000000000001`", '{"x":0.1}', "false"),
        ("detail.x < `1e400`", '{"x":1e399}', "true"),
        ("detail.x < `1e9999999999999999999`", '{"x":1e399}', "true"),
        ('`{"a": [0.10, "\\`"]}`', "{}", '{"a":[0.10,"`"]}'),
        ("'`0.1`'", "{}", '"`0.1`"'),
        ("detail.items[?price==`9.99`].name", '{"items":[{"price":9.99,"name":"a"},{"price":1,"name":"b"}]}', '["a"]'),
        ("contains(detail.l, `9.99`)", '{"l":[9.99]}', "true"),
        ("abs(detail.x)", '{"x":-1.000000000000000000000000000000001}', "1.000000000000000000000000000000001"),
        ("ceil(detail.x)", '{"x":1.000000000000000000000000000000001}', "2"),
        ("floor(detail.x)", '{"x":-0.5}', "-1"),
        ("ceil(detail.x)", '{"x":-0.5}', "0"),
        ("floor(detail.x)", '{"x":7}', "7"),
        ("sum(detail.l)", '{"l":[1,2]}', "3"),
        ("sum(detail.l)", '{"l":[1.5,2,0.1]}', "3.6"),
        ("sum(detail.l)", '{"l":[1e40,1e-40]}', f"1{'0' * 40}.{'0' * 39}1"),
        ("sum(detail.l)", '{"l":[]}', "0"),
        ("avg(detail.l)", '{"l":[1,2]}', "1.5"),
        ("avg(detail.l)", '{"l":[0.1,0.2,0.3]}', "0.2"),
        ("avg(detail.l)", '{"l":[]}', "null"),
        ("max(detail.l)", '{"l":[1.5,2.5,2]}', "2.5"),
        ("min(detail.l)", '{"l":[1.5,2.5,2]}', "1.5"),
        ("sort(detail.l)", '{"l":[2.5,1,1.50]}', "[1,1.50,2.5]"),
        ("sort_by(detail.l, &p)[*].n", '{"l":[{"p":1.5,"n":1},{"p":0.5,"n":2},{"p":1,"n":3}]}', "[2,3,1]"),
        ("max_by(detail.l, &p).n", '{"l":[{"p":1.5,"n":1},{"p":0.5,"n":2}]}', "1"),
        ("min_by(detail.l, &p).n", '{"l":[{"p":1.5,"n":1},{"p":0.5,"n":2}]}', "2"),
    ],
)
def test_numbers_stay_exact(expression: str, detail: str, expected: str) -> None:
    assert write(found(expression, detail), "here") == expected


def test_a_literal_without_quotes_is_text_as_for_the_library() -> None:
    with pytest.warns(PendingDeprecationWarning):
        assert found("`word`", "{}") == "word"


@given(st.lists(NUMBERS, min_size=1, max_size=5))
def test_a_sum_loses_nothing(numbers: list[Any]) -> None:
    detail = f'{{"l":{write(numbers, "the numbers")}}}'
    assert Fraction(found("sum(detail.l)", detail)) == sum(map(Fraction, numbers))
    assert Fraction(found("max(detail.l)", detail)) == max(map(Fraction, numbers))


@pytest.mark.parametrize(
    "expression", ["to_number(detail.x)", "ceil(detail.x)", "floor(detail.x)", "abs(detail.x)", "max([detail.x, `1`])"]
)
def test_a_number_with_a_huge_exponent_is_not_written_out(expression: str) -> None:
    begin = time.thread_time()
    assert found(expression, '{"x":1e300000000}') == Decimal("1e300000000")
    assert time.thread_time() - begin < 1


@pytest.mark.parametrize(
    ("expression", "detail"),
    [
        ("sum(detail.l)", '{"l":[1e300000000,1]}'),
        ("avg(detail.l)", '{"l":[1e-300000000,1]}'),
        ("to_number(detail.x)", '{"x":"1e99999999999999999999"}'),
        ("to_number(detail.x)", '{"x":"nan"}'),
        ("to_number(detail.x)", '{"x":"inf"}'),
        ("sum(detail.l)", '{"l":[1.5,"2"]}'),
        ("sum(detail.l)", '{"l":[1.5,true]}'),
        ("abs(detail.x)", '{"x":"1"}'),
        ("`1e99999999999999999999`", "{}"),
    ],
)
def test_what_cannot_be_said_exactly_is_poison(expression: str, detail: str) -> None:
    with pytest.raises(Malformed, match=r"cannot be evaluated|finite"):
        found(expression, detail)
