"""The quick ways to read an event do what the exact ones do: two decoders, two ways along a mapping's paths."""

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from figbridge.config import MappingSection
from figbridge.event import Received
from figbridge.reverse import message
from figbridge.reverse.mapping import Mapping
from figbridge.reverse.message import Malformed, parse, write

ENVELOPE = '{"id": "e-1", "source": "shop", "detail-type": "order", "detail": %s}'
DIGITS = st.one_of(
    st.integers().map(str),
    st.decimals(allow_nan=False, allow_infinity=False).map(str),
    st.sampled_from(["-0", "0.10", "1E400", "1e-7", "12345678901234567890123456789012345678.90", "0" * 3, "1.", "NaN"]),
)
TEXTS = st.one_of(
    st.text().map(json.dumps), st.sampled_from(['"\\ud800"', '"\\u0000"', '"\\/"', '"\t"', '"\\ud83d\\ude00"'])
)
JSON = st.recursive(
    st.one_of(DIGITS, TEXTS, st.sampled_from(["null", "true", "false", "Infinity", "-"])),
    lambda inner: st.one_of(
        st.lists(inner).map(lambda items: f"[{', '.join(items)}]"),
        st.lists(st.tuples(TEXTS, inner)).map(lambda pairs: f"{{{', '.join(f'{key}: {it}' for key, it in pairs)}}}"),
    ),
)  # fmt: skip


def typed(value: Any) -> Any:
    """So that 1, 1.0 and True differ, and so do 1.0 and 1.00."""
    if isinstance(value, dict):
        return {key: typed(it) for key, it in value.items()}
    if isinstance(value, list):
        return [typed(it) for it in value]
    return type(value), str(value)


def exact(body: bytes) -> Any:
    try:
        return typed(message.read(body, "the message"))
    except Malformed:
        return Malformed


@given(JSON)
@example("[" * 5_000 + "]" * 5_000)
@example("9" * 5_000)
def test_a_message_is_what_the_exact_decoder_reads(detail: str) -> None:
    body = (ENVELOPE % f'{{"it": {detail}}}').encode("utf-8", "surrogatepass")
    try:
        found = typed(parse(body).document)
    except Malformed:
        found = Malformed
    assert found == exact(body)


@given(st.binary(max_size=4), st.integers(0, 200), st.integers(0, 3))
def test_a_damaged_message_is_never_read_as_something_else(junk: bytes, place: int, removed: int) -> None:
    body = (ENVELOPE % '{"a": [1.50, -0, 1e5, "\\u00e9\\n"], "b": {"é": null, "c": true}}').encode()
    body = body[:place] + junk + body[place + removed :]
    try:
        found = typed(message._quickly(body))
    except Exception:  # noqa: BLE001 (as `parse` does)
        return  # then the exact decoder decides
    assert not isinstance(found, dict) or found == exact(body)


@pytest.mark.parametrize("number", ["-0", "-0.0", "-0e1"])
@pytest.mark.parametrize("around", ["%s", "[%s, 1]", '{"n":%s}', "[1,\n%s\t]"])
def test_a_negative_zero_keeps_its_sign(number: str, around: str) -> None:
    value = around % number
    received = parse((ENVELOPE % f'{{"n": {value}}}').encode())
    assert write(received.document["detail"]["n"], "n") == "".join(value.replace("-0e1", "-0E+1").split())


def test_a_fraction_keeps_its_digits_and_a_repeated_name_its_last_value() -> None:
    detail = parse((ENVELOPE % '{"total": 12.50, "total": 7.10, "n": 1}').encode()).document["detail"]
    assert detail == {"total": Decimal("7.10"), "n": 1}
    assert str(detail["total"]) == "7.10"


VALUES = st.one_of(st.none(), st.integers(), st.text(), st.booleans(), st.lists(st.integers()), st.just({"x": None}))
DETAILS = st.one_of(
    st.dictionaries(st.sampled_from("abcd"), VALUES), VALUES, st.fixed_dictionaries(dict.fromkeys("abcd", VALUES))
)
SECTION = {"match": {"source": "shop", "detail-type": "order"}, "into": "shop.orders"}


@pytest.mark.parametrize(
    "section",
    [
        {"action": "upsert", "key": {"a": "detail.a"}, "set": {"b": "detail.b", "c": "detail.c"}},
        {"action": "update", "key": {"a": "detail.a", "b": "detail.b"}, "set": {"c": "detail.c"}},
        {"action": "insert", "set": {"a": "detail.a", "d": "detail.d"}},
        {"action": "delete", "key": {"a": "detail.a", "c": "detail.c"}},
        {"action": "delete", "key": {"a": "detail.a"}, "soft": {"b": "detail.b"}},
    ],
)
@given(detail=DETAILS)
def test_all_columns_at_once_are_what_one_after_the_other_would_be(section: dict[str, Any], detail: Any) -> None:
    quick, slow = (Mapping(MappingSection.model_validate({**SECTION, **section})) for _ in range(2))
    assert quick._first
    assert slow._first
    assert quick._first._fields is not None
    slow._first._fields = None
    received = Received("e-1", "shop", "order", {"detail": detail})

    def prepared(mapping: Mapping) -> Any:
        try:
            work = mapping.prepare(received)
        except Malformed as error:
            return str(error)
        return work.entity, work.statements

    assert prepared(quick) == prepared(slow)
