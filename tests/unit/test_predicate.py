"""Predicates say what JMESPath says, and what they are not is refused with the way out."""

import json
from decimal import Decimal
from typing import Any

import jmespath
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from figbridge.predicate import compiled

_LITERALS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([0.5, "", "a", "b", [], {}, [1], {"m": 1}])
)
_OPERANDS = st.one_of(
    _LITERALS.map(lambda it: f"`{json.dumps(it)}`"), st.sampled_from(["a", "b", "c", "a.m", "b.m.n", "'a'"])
)
_EXPRESSIONS = st.recursive(
    st.one_of(
        _OPERANDS,
        st.tuples(_OPERANDS, st.sampled_from(["==", "!="]), _OPERANDS).map(" ".join),
        # an order of a number and a string is an error in the library, and in the specification null
        st.tuples(st.sampled_from(["a", "b", "`1`"]), st.sampled_from(["<", "<=", ">", ">="]), st.just("`1`")).map(
            " ".join
        ),
    ),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["&&", "||"]), inner).map(lambda it: f"({' '.join(it)})"),
        inner.map(lambda it: f"!({it})"),
    ),
    max_leaves=6,
)
_VALUES = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([0.5, [], {}, {"m": {"n": 1}}, [1]]))


def _truth(value: Any) -> bool:
    return not (value is None or value is False or value in ("", [], {}))


@given(_EXPRESSIONS, _VALUES, _VALUES, _VALUES)
@example("a == `1`", True, None, None)
@example("a == `0`", False, None, None)
def test_it_is_jmespath(text: str, a: Any, b: Any, c: Any) -> None:
    row = {"a": a, "b": b, "c": c}
    predicate = compiled(text)

    assert predicate.holds([row[name] for name in predicate.columns]) is _truth(jmespath.search(text, row))


def test_strings_have_an_order_and_other_pairs_have_none() -> None:
    predicate = compiled("placed_at >= '2026-01-01'")

    assert predicate.columns == ("placed_at",)
    assert predicate.holds(["2026-11-23T10:08:02"])
    assert not predicate.holds(["2025-12-31T10:08:02"])
    assert not predicate.holds([None])
    assert not predicate.holds([20260101])


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("status = 'paid'", "JMESPath"),
        ("", "JMESPath"),
        ("items[0]", "index"),
        ("contains(status, 'x')", "function"),
        ("a | b", "pipe"),
        ("deleted_at == null", "backticks"),
        ("a.b[*]", "subexpression"),
        ("a < `Infinity`", "'Infinity'"),
    ],
)
def test_what_is_no_predicate_is_refused(text: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        compiled(text)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a == `0.1`", True),
        ("a == `0.10`", True),
        ("a < `0.1000000000000000000000001`", True),
        ("a == `0.1000000000000000000000001`", False),
        ("b == `9007199254740993`", True),
        ("b == `9007199254740992.5`", False),
        ("b > `9007199254740992.5`", True),
    ],
)
def test_numbers_are_compared_to_the_last_digit(text: str, *, wanted: bool) -> None:
    predicate = compiled(text)
    row = {"a": Decimal("0.1"), "b": 9007199254740993}

    assert predicate.holds([row[name] for name in predicate.columns]) is wanted


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("n > `0` && n < `5`", {"n": {"number"}}),
        ("'a' == s || !(s == 'b')", {"s": {"string"}}),
        ("n > `0` || n > '0'", {"n": {"number", "string"}}),
        ("n != 'NaN'", {"n": {"number", "string"}}),
        ("b == `true` && n == `null` && d.m == 'x' && l == `[1]` && n > m", {"b": {"boolean"}}),
    ],
)
def test_it_says_with_what_kinds_of_literals_a_column_is_compared(text: str, kinds: dict[str, set[str]]) -> None:
    assert compiled(text).kinds == kinds
