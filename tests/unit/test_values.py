import json
from decimal import Decimal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from figbridge.forward import values

NUMBERS = st.one_of(
    st.integers(-(10**40), 10**40).map(str),
    st.decimals(allow_nan=False, allow_infinity=False).map(lambda number: f"{number:f}"),
    st.decimals(min_value=-(10**6), max_value=10**6, places=4, allow_nan=False).map(lambda number: f"{number:f}"),
)


@given(NUMBERS)
@example(str(2**53))
@example(str(2**53 + 1))
@example(str(-(2**63)))
@example("0." + "0" * 307 + "1")
@example("0." + "0" * 400 + "1")
@example("1" + "0" * 400)
@example("0.1")
@example("123456789012.3456")
def test_a_safe_number_survives_a_parser_that_knows_only_doubles(digits: str) -> None:
    encoded = json.loads(values.safe_number(digits.encode()), parse_int=float)
    if isinstance(encoded, str):
        assert encoded == digits
    else:
        # shortest form that reads back as the same double: it must be the digits we were given
        assert Decimal(repr(encoded)) == Decimal(digits)


@given(NUMBERS)
def test_an_exact_number_keeps_its_digits(digits: str) -> None:
    assert values.exact_number(digits.encode()) == digits.encode()


@pytest.mark.parametrize("word", [b"NaN", b"Infinity", b"-Infinity"])
def test_what_json_does_not_know_is_a_string(word: bytes) -> None:
    for encode in (values.safe_number, values.exact_number, values.float_):
        assert json.loads(encode(word)) == word.decode()


@given(st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_text_survives(text: str) -> None:
    encoded = values.text(text.encode())
    assert json.loads(encoded) == text
    assert b"\n" not in encoded


@given(
    st.lists(
        st.lists(
            st.one_of(st.none(), st.text(st.characters(codec="utf-8", exclude_characters="\0"))), min_size=2, max_size=2
        ),
        min_size=1,
        max_size=4,
    )
)
def test_a_text_array_survives(rows: list[list[str | None]]) -> None:
    def literal(value: str | None) -> str:
        if value is None:
            return "NULL"
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'

    text = "{" + ",".join("{" + ",".join(map(literal, row)) + "}" for row in rows) + "}"
    assert json.loads(values.array(values.text)(text.encode())) == rows
