import json
import math
import re
import tracemalloc
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from figbridge.forward import values
from figbridge.legacy import TypeDescription
from fixtures.type_page import page

PAGE = Path(__file__).parents[2] / "docs" / "types.md"

# what numeric's output function prints: never an exponent, digits before and after the point
NUMBERS = st.one_of(
    st.integers(-(10**40), 10**40).map(str),
    st.integers(-(2**53) - 3, -(2**53) + 3).map(str),
    st.decimals(allow_nan=False, allow_infinity=False).map(lambda number: f"{number:f}"),
    st.decimals(min_value=-(10**6), max_value=10**6, places=4, allow_nan=False).map(lambda number: f"{number:f}"),
    st.builds(
        lambda sign, zeros, digits, more: f"{sign}0.{'0' * zeros}{digits}{'0' * more}",
        st.sampled_from(["", "-"]),
        st.integers(0, 420),
        st.text("0123456789", min_size=1, max_size=18),
        st.integers(0, 9),
    ),
    st.builds(
        lambda digits, zeros: f"{digits}{'0' * zeros}.5",
        st.from_regex(r"[1-9][0-9]{0,17}", fullmatch=True),
        st.integers(0, 320),
    ),
)


@given(NUMBERS)
@example(str(2**53 - 1))
@example(str(2**53))
@example(str(2**53 + 1))
@example(str(-(2**63)))
@example("0." + "0" * 296 + "1")
@example("0." + "0" * 307 + "1")
@example("0." + "0" * 400 + "1")
@example("1" + "0" * 400)
@example("0.1")
@example("0.1000000000000000")
@example("0.000000000000000000")
@example("123456789012.3456")
@example("9.529199866759897")  # the 16th digit is lost
def test_a_safe_number_survives_a_parser_that_knows_only_doubles(digits: str) -> None:
    encoded = json.loads(values.safe_number(digits.encode()), parse_int=float)
    if isinstance(encoded, str):
        assert encoded == digits
    else:
        assert math.isfinite(encoded)
        # shortest form that reads back as the same double: it must be the digits we were given
        assert Decimal(repr(encoded)) == Decimal(digits)


@pytest.mark.parametrize(
    "digits",
    ["0", "-1", "12.50", "99999999999999.9", "-99999999999999.9", "9007199254740991", "-9007199254740991",
     "0.00000000000000000001", "0.000000000000000000"],
)  # fmt: skip
def test_what_every_parser_reads_is_a_number(digits: str) -> None:
    assert values.safe_number(digits.encode()) == digits.encode()


def test_an_integer_beyond_what_rfc_8259_calls_interoperable_is_a_string() -> None:
    # a double holds it, and 2**53 + 1 comes out as the same
    assert values.safe_number(b"9007199254740992") == b'"9007199254740992"'
    assert values.safe_number(b"-9007199254740992") == b'"-9007199254740992"'


@given(NUMBERS)
def test_an_exact_number_keeps_its_digits(digits: str) -> None:
    assert values.exact_number(digits.encode()) == digits.encode()


@pytest.mark.parametrize("word", [b"NaN", b"Infinity", b"-Infinity"])
def test_what_json_does_not_know_is_a_string(word: bytes) -> None:
    for encode in (values.safe_number, values.exact_number, values.float_):
        assert json.loads(encode(word)) == word.decode()


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"))


@given(TEXT)
@example('\n\r\t"\\\x7f\x85\u2028')
def test_text_survives(text: str) -> None:
    encoded = values.text(text.encode())
    assert json.loads(encoded) == text
    assert b"\n" not in encoded


def test_the_page_of_types_is_the_table_of_the_tests() -> None:
    assert PAGE.read_text() == page(), "out of date: `make docs` writes it anew"


def literal(value: Any, delimiter: str = ",") -> str:
    """As array_out has it: quotes only where they are needed."""
    if value is None:
        return "NULL"
    if isinstance(value, list):
        return "{" + delimiter.join(literal(item, delimiter) for item in value) + "}"
    assert isinstance(value, str)
    if value and value.upper() != "NULL" and not set(value) & set('"\\{} \t\n\r\v\f' + delimiter):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


@st.composite
def arrays(draw: st.DrawFn, element: st.SearchStrategy[Any]) -> list[Any]:
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))

    def part(depth: int) -> list[Any]:
        return [draw(element) if depth == len(shape) else part(depth + 1) for _ in range(shape[depth - 1])]

    return part(1)


ELEMENT = st.none() | TEXT | st.sampled_from(["", "NULL", "null", "{}", "}{", ",", ";", "\\", '"', " ", "\n"])


@given(arrays(ELEMENT), st.sampled_from(",;|"))
def test_a_text_array_survives(rows: list[Any], delimiter: str) -> None:
    encoded = values.array(values.text, delimiter)(literal(rows, delimiter).encode())
    assert json.loads(encoded) == rows
    assert b"\n" not in encoded


@given(arrays(st.none() | st.integers(-(2**31), 2**31 - 1)))
def test_an_array_of_integers_survives(rows: list[Any]) -> None:
    def as_text(value: Any) -> Any:
        return [as_text(item) for item in value] if isinstance(value, list) else None if value is None else str(value)

    assert json.loads(values.array(values.raw)(literal(as_text(rows)).encode())) == rows


@given(st.lists(arrays(ELEMENT), min_size=1, max_size=3))
def test_an_array_of_a_domain_over_arrays_survives(rows: list[Any]) -> None:
    encode = values.array(values.array(values.text))
    assert json.loads(encode(literal([literal(row) for row in rows]).encode())) == rows


@pytest.mark.parametrize("text", ["a b", 'a "quoted" b', "back\\\\slash"])
def test_a_large_element_takes_memory_of_its_own_size(text: str) -> None:
    value = literal([text * 100_000]).encode()
    encode = values.array(lambda element: b"%d" % len(element))  # text itself reserves more, but does not touch it
    tracemalloc.start()
    try:
        encoded = encode(value)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert json.loads(encoded) == [len(text) * 100_000]
    assert peak < 8 * len(value)


def test_an_array_with_bounds_of_its_own_stays_a_literal() -> None:
    for element in (values.raw, values.text):
        assert json.loads(values.array(element)(b"[0:1]={1,2}")) == "[0:1]={1,2}"


# what a column of type json holds: any space that JSON allows between tokens, escapes of any kind
SPACE = st.text(" \t\r\n", max_size=3)
ESCAPES = st.sampled_from([r"\ud800", r"\udfff\ud800", r"\u0000", r"\n", r"\"", r"\\", "é", "\u2028", "\x7f", "n"])
JSON_STRING = st.lists(ESCAPES, max_size=5).map(lambda parts: f'"{"".join(parts)}"')
JSON_TEXT = st.recursive(
    st.sampled_from(["null", "true", "1e400", "-0.10", "1" * 40]) | JSON_STRING,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]"),
        # the same key may come twice
        st.lists(inner, max_size=3).map(lambda items: "{" + ",".join(f'"k":{item}' for item in items) + "}"),
        st.builds(lambda before, item, after: before + item + after, SPACE, inner, SPACE),
    ),
    max_leaves=6,
)


def exact(text: str) -> Any:
    return json.loads(text, parse_int=str, parse_float=str, object_pairs_hook=tuple)


@given(JSON_TEXT)
def test_a_document_survives_on_one_line(text: str) -> None:
    for encode, value in ((values.document, text), (values.array(values.document), literal([text]))):
        encoded = encode(value.encode()).decode()
        assert "\n" not in encoded
        assert "\r" not in encoded
        assert exact(encoded) == (exact(text) if encode is values.document else [exact(text)])


@given(st.binary().map(lambda value: value.replace(b"\0", b"")))
@example("é".encode("latin-1"))
@example(b'\xed\xa0\x80"\n')
def test_bytes_that_are_not_utf_8_are_one_line_of_json_and_can_be_had_back(value: bytes) -> None:
    document = b'["%b"]' % re.sub(rb'[\x00-\x1f"\\]', b"", value)
    for encode, given_value in ((values.text, value), (values.document, document)):
        encoded = encode(given_value)
        assert b"\n" not in encoded
        said = json.loads(encoded.decode())
        held = said if encode is values.text else json.dumps(said, ensure_ascii=False)
        assert held.encode(errors="surrogateescape") == given_value


def test_a_char_is_what_later_servers_print() -> None:
    for byte in range(1, 256):
        said = json.loads(values.char(bytes([byte])).decode())
        assert said == (chr(byte) if byte < 128 else f"\\{byte:03o}")


def test_a_type_is_looked_up_once_down_to_what_it_is_made_of() -> None:
    catalogue = {
        20001: TypeDescription(base=25, element=None, delimiter=","),  # a domain over text
        20002: TypeDescription(base=20001, element=None, delimiter=","),  # and one over that
        20003: TypeDescription(base=None, element=20002, delimiter=","),  # its array
        20004: TypeDescription(base=20003, element=None, delimiter=","),  # a domain over the array
        20005: TypeDescription(base=None, element=20004, delimiter=","),
        20006: TypeDescription(base=None, element=None, delimiter=","),  # an enumeration
        20007: TypeDescription(base=None, element=20006, delimiter=";"),
        20008: TypeDescription(base=1700, element=None, delimiter=","),  # a domain over numeric
    }
    asked: list[int] = []

    def describe(type_oid: int) -> TypeDescription | None:
        asked.append(type_oid)
        return catalogue.get(type_oid)

    encoders = values.Encoders("safe", describe)
    assert encoders.of(25) is values.text
    assert encoders.of(23) is values.raw
    assert asked == [], "built-in types are known"
    assert encoders.of(20002) is values.text
    assert encoders.of(20008) is values.safe_number
    assert encoders.of(20006) is values.text
    assert encoders.of(20003)(b'{a,NULL,"b c"}') == b'["a",null,"b c"]'
    assert encoders.of(20005)(b'{"{a}","{}",NULL}') == b'[["a"],[],null]'
    assert encoders.of(20007)(b"{calm;wild}") == b'["calm","wild"]'
    assert encoders.of(29999) is values.text, "a type that is gone"
    for oid in (*catalogue, 29999):
        encoders.of(oid)
    assert sorted(asked) == [*catalogue, 29999]


def test_a_look_up_that_failed_is_made_again() -> None:
    answers: list[TypeDescription | None] = []
    encoders = values.Encoders("exact", lambda _: answers.pop())
    with pytest.raises(IndexError):
        encoders.of(20001)
    answers.append(TypeDescription(base=20, element=None, delimiter=","))
    assert encoders.of(20001) is values.exact_number
