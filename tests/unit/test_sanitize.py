"""Rules about columns and rows: what they make of values, what they refuse, and what is told at load."""

import hashlib
import hmac
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from figbridge.change import UNCHANGED, Change, Column, Operation, Relation, Row
from figbridge.config import Config, HashSection, SelectSection
from figbridge.errors import ConfigError
from figbridge.forward.sanitize import CannotSanitize, Hashing, Rules, Undecided, constant, truncated
from figbridge.forward.table import Naming, Table
from figbridge.forward.values import Encoders

KEY = HashSection.model_validate({"key": "correct horse battery", "id": "2026-11"})
RELATION = Relation(
    1,
    "shop",
    "people",
    "d",
    (Column("id", 23, -1, True), Column("email", 25, -1, False), Column("state", 25, -1, False)),
)


def select(**rules: Any) -> SelectSection:
    return SelectSection.model_validate({"table": "shop.people"} | rules)


def table(hashing: HashSection | None = KEY, **rules: Any) -> Table:
    naming, encoders = Naming("db", "legacy.{database}", "{table}.{operation}"), Encoders("safe", lambda _: None)
    return Table(RELATION, naming, encoders, frozenset({"id"}), {}, rules=Rules([select(**rules)], hashing))


def test_a_hash_is_hmac_sha256_with_the_keys_id() -> None:
    mac = hmac.new(b"correct horse battery", b"ada@example.com", hashlib.sha256).hexdigest()

    assert Hashing(KEY)(b"ada@example.com") == f'"2026-11:{mac}"'.encode()


@given(st.text().filter(lambda it: "\0" not in it), st.integers(0, 5))
def test_truncated_is_the_first_characters(text: str, length: int) -> None:
    try:
        value = text.encode()
    except UnicodeEncodeError:
        return
    assert json.loads(truncated(length)(value)) == text[:length]


@given(st.binary(), st.integers(0, 5))
def test_no_bytes_are_too_odd_to_be_truncated(value: bytes, length: int) -> None:
    assert len(json.loads(truncated(length)(value))) <= length


def test_null_stays_null_and_a_constant_is_any_json() -> None:
    made = table(mask=["email"], replace={"state": 7})

    assert made.write([b"1", None, b"x"]) == (b'{"id":1}', b'{"id":1,"email":null,"state":7}')
    assert constant(b"null")(b"x") == b"null"


def test_what_stays_is_nowhere() -> None:
    made = table(exclude=["email"])

    assert made.write([b"1", b"a", b"b"])[1] == b'{"id":1,"state":"b"}'
    assert made.row([b"1", b"a", b"b"]) == b'{"id":1,"state":"b"}'
    assert "email" not in json.dumps(made.describe())
    assert made.settle([b"1", UNCHANGED, UNCHANGED], None)[1] == b'["state"]'


def test_include_keeps_back_what_it_does_not_name() -> None:
    assert table(include=["id"]).write([b"1", b"a", b"b"])[1] == b'{"id":1}'


def test_the_description_says_what_was_done_and_so_has_another_version() -> None:
    made = table(hash=["email"])

    assert made.columns[1] == {"name": "email", "type": "text", "key": False, "sanitized": "hash"}
    assert made.version != table().version


@pytest.mark.parametrize(
    "rules", [{"exclude": ["id"]}, {"mask": ["id"]}, {"truncate": {"id": 1}}, {"replace": {"id": 0}}]
)
def test_rows_whose_key_does_not_leave_are_told_apart_by_a_hash(rules: dict[str, Any]) -> None:
    made = table(**rules)
    first, second = ([key, b"a", b"b"] for key in (b"11", b"12"))

    assert made.order(first, made.key(first)) != made.order(second, made.key(second))
    assert "11" not in made.key(first).decode().replace('"id":1', "")
    assert made.name(first, b"", b"", keyed=True) != made.name(second, b"", b"", keyed=True)
    assert made.order(first, b"").startswith('shop.people:"2026-11:')
    assert made.lanes == {}
    with pytest.raises(CannotSanitize, match="does not tell its rows apart"):
        table(hashing=None, **rules)


def test_a_hashed_key_is_its_own_order_and_keeps_the_lane() -> None:
    made = table(hash=["id"])

    key = made.key([b"11", b"a", b"b"])
    assert made.order([b"11", b"a", b"b"], key) == f"shop.people:{key.decode()}"
    assert made.lanes


def test_a_column_that_is_gone_stops_everything() -> None:
    with pytest.raises(CannotSanitize, match="'ssn'"):
        table(exclude=["ssn"])
    made = table(exclude=["ssn", "email"], missing_columns="ignore")
    assert made.write([b"1", b"a", b"b"])[1] == b'{"id":1,"state":"b"}'
    with pytest.raises(CannotSanitize, match="'status'"):
        table(where="status == 'x'")


def test_a_table_that_nobody_listed_stops_everything() -> None:
    encoders = Encoders("safe", lambda _: None)
    other = replace(RELATION, name="folk")

    rules = Rules([select(exclude=["email"])], tables=[("shop", "people"), ("shop", "orders")])
    with pytest.raises(CannotSanitize, match=r"shop\.folk"):
        rules.of(other, encoders, frozenset({"id"}))
    assert not rules.of(replace(RELATION, name="orders"), encoders, frozenset({"id"})).withheld
    former = Rules([select(exclude=["email"], **{"former-names": ["shop.folk"]})], tables=[("shop", "people")])
    assert former.of(other, encoders, frozenset({"id"})).withheld == {1}


# --- predicates

IN, OUT = b"on", b"off"
ON = "state == 'on'"


def row(state: Any, key: bytes = b"1") -> Row:
    return [key, b"e", state]


def change(operation: Operation, before: Row | None, after: Row | None, *, is_key: bool = False) -> Change:
    unsent = after is not None and UNCHANGED in after
    return Change(operation, RELATION, 0, before, is_key, after, unsent)


def seen(of: Change, where: str = ON) -> tuple[str, Row | None, Row | None] | None:
    filtered = table(where=where).where
    assert filtered
    found = filtered.change(of)
    return found and (found.operation.value, found.before, found.after)


INSERT, UPDATE, DELETE = Operation.INSERT, Operation.UPDATE, Operation.DELETE
BY_KEY = [b"1", None, None]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (change(INSERT, None, row(IN)), ("insert", None, row(IN))),
        (change(INSERT, None, row(OUT)), None),
        # the whole old row is known
        (change(UPDATE, row(IN), row(IN)), ("update", row(IN), row(IN))),
        (change(UPDATE, row(OUT), row(IN)), ("insert", None, row(IN))),
        (change(UPDATE, row(IN), row(OUT)), ("delete", row(IN), None)),
        (change(UPDATE, row(OUT), row(OUT)), None),
        (change(DELETE, row(IN), None), ("delete", row(IN), None)),
        (change(DELETE, row(OUT), None), None),
        # of the old row nothing but the key: it may have been in
        (change(UPDATE, None, row(IN)), ("update", None, row(IN))),
        (change(UPDATE, None, row(OUT)), ("delete", BY_KEY, None)),
        (change(UPDATE, BY_KEY, row(OUT, b"2"), is_key=True), ("delete", BY_KEY, None)),
        (change(UPDATE, BY_KEY, row(IN, b"2"), is_key=True), ("update", BY_KEY, row(IN, b"2"))),
        (change(DELETE, BY_KEY, None, is_key=True), ("delete", BY_KEY, None)),
        (change(Operation.TRUNCATE, None, None), ("truncate", None, None)),
    ],
)
def test_what_is_seen_of_a_change(given: Change, wanted: Any) -> None:
    assert seen(given) == wanted


def test_a_predicate_over_the_key_is_always_decided() -> None:
    where = "id < `10`"
    assert seen(change(UPDATE, None, row(IN)), where) == ("update", None, row(IN))
    assert seen(change(UPDATE, None, row(IN, b"11")), where) is None
    assert seen(change(DELETE, [b"11", None, None], None, is_key=True), where) is None
    moved = change(UPDATE, [b"11", None, None], row(IN, b"2"), is_key=True)
    assert seen(moved, where) == ("insert", None, row(IN, b"2"))


def test_a_value_that_was_not_sent_decides_nothing_and_leaves_nothing() -> None:
    with pytest.raises(Undecided) as caught:
        seen(change(UPDATE, None, row(UNCHANGED)))

    bare = caught.value.change
    assert (bare.before, bare.after) == (BY_KEY, None)


def numbers(where: str, *values: str, types: Sequence[int] = (20, 1700)) -> bool:
    """Whether a row with these values of the columns a, b … leaves."""
    columns = [Column(name, oid, -1, is_key=False) for name, oid in zip("abcd", types, strict=False)]
    relation = Relation(1, "shop", "people", "d", tuple(columns[: len(values)]))
    rules, encoders = Rules([select(where=where)]), Encoders("safe", lambda _: None)
    filtered = rules.of(relation, encoders, frozenset(), unveiled=True).where
    assert filtered
    return filtered.row([it.encode() for it in values])


@pytest.mark.parametrize(
    ("where", "values"),
    [
        ("a == `9007199254740993`", ["9007199254740993"]),
        ("a > `9007199254740992`", ["9007199254740993"]),
        ("!(a != `9007199254740993`)", ["9007199254740993"]),
        ("a < `-9007199254740992`", ["-9007199254740993"]),
        ("b > `0`", ["1", "12345678901234567.12345"]),
        ("b == `12345678901234567.12345`", ["1", "12345678901234567.12345"]),
        ("b == `12345678901234567.1234500`", ["1", "12345678901234567.12345"]),
        ("b != `12345678901234567.123451`", ["1", "12345678901234567.12345"]),
        ("b > a", ["9007199254740993", "9007199254740993.1"]),
        ("b == `0.1`", ["1", "0.10"]),
        ("b == 'NaN'", ["1", "NaN"]),
        ("b > `1000`", ["1", "9" * 5000]),
    ],
)
def test_a_number_that_no_double_holds_is_compared_as_the_number_that_it_is(where: str, values: list[str]) -> None:
    assert numbers(where, *values)


@pytest.mark.parametrize(
    ("where", "type_oid", "value"),
    [
        ("a == `0.1`", 700, "0.1"),  # float4
        ("a == `0.1`", 701, "0.1"),  # float8
        ("a == `[9007199254740993, 1.5]`", 1231, "{9007199254740993,1.50}"),  # numeric[]
        ("a.n > `12345678901234567.12344`", 3802, '{"n": 12345678901234567.12345}'),  # jsonb
        ("a.n == `1.5`", 114, '{"s": "\\ud800", "n": 1.50}'),  # json with half a character
        (f"a.n > `{'9' * 400}`", 114, '{"n": %s}' % ("9" * 5000)),
        ("a == `true`", 16, "t"),
    ],
)
def test_so_is_one_of_any_other_type(where: str, type_oid: int, value: str) -> None:
    assert numbers(where, value, types=[type_oid])


@pytest.mark.parametrize(
    ("where", "type_oid"),
    [
        ("a > `0`", 25),
        ("a != `5`", 25),
        ("a > '5'", 20),
        ("a == '9007199254740993'", 20),
        ("a == 'x'", 701),
        ("a == 'true'", 16),
        ("a == `true`", 23),
        ("a == `5`", 1114),
    ],
)
def test_a_column_of_another_kind_than_what_it_is_compared_with_stops_everything(where: str, type_oid: int) -> None:
    with pytest.raises(CannotSanitize, match="'a'"):
        numbers(where, "1", types=[type_oid])


@pytest.mark.parametrize(
    ("where", "type_oid", "value"),
    [
        ("a > `0` || a > '0'", 20, "1"),  # both kinds are listed, for both sides of an ALTER TYPE
        ("a > `0` || a > '0'", 25, "1"),
        ("a.m == 'x' || a == `5`", 3802, "5"),
        ("a != 'Infinity'", 701, "1"),
        ("a != `null`", 25, "1"),
    ],
)
def test_it_does_not_where_something_can_hold(where: str, type_oid: int, value: str) -> None:
    assert numbers(where, value, types=[type_oid])


# --- the section


def problem(forward: dict[str, Any], tables: tuple[str, ...] = ("shop.people",)) -> str:
    tree = {"legacy": {"dsn": "host=x", "tables": tables}, "forward": {"sink": {"type": "stdout"}} | forward}
    with pytest.raises(ConfigError) as caught:
        Config.parse(json.dumps(tree), {})
    (found,) = caught.value.problems
    return str(found)


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        ({"select": [{"table": "shop.nobody"}]}, "none of legacy.tables"),
        ({"select": [{"table": "shop.people"}, {"table": "SHOP.people"}]}, "two entries"),
        ({"select": [{"table": "shop.people", "hash": ["id"]}]}, "hash has no key"),
        ({"select": [{"table": "shop.people", "mask": ["a"], "exclude": ["a"]}]}, "named twice"),
        ({"select": [{"table": "shop.people", "include": ["a"], "exclude": ["b"]}]}, "include and exclude"),
        ({"select": [{"table": "shop.people", "include": ["a"], "mask": ["b"]}]}, "not in include"),
        ({"select": [{"table": "shop.people", "where": "a ="}]}, "JMESPath"),
        ({"select": [{"table": "shop.people", "truncate": {"a": -1}}]}, "forward.select.0.truncate.a"),
        ({"select": [{"table": "shop.people", "former-names": ["SHOP.people"]}]}, "twice"),
        ({"select": [{"table": "shop.people", "former-names": ["shop.a", "shop.a"]}]}, "twice"),
        ({"select": [{"table": "shop.people", "former-names": ["people"]}]}, "schema.table"),
        ({"hash": {"key": "hunter2"}}, "16 characters"),
        ({"outbox": {"table": "shop.people"}, "select": [{"table": "shop.people", "mask": ["payload"]}]}, "outbox"),
        ({"outbox": {"table": "shop.people"}, "select": [{"table": "shop.people", "where": "a"}]}, "outbox"),
    ],
)
def test_what_is_wrong_is_told_at_load(forward: dict[str, Any], words: str) -> None:
    told = problem(forward)

    assert words in told
    assert "hunter2" not in told


def test_a_former_name_is_no_table_of_the_file() -> None:
    select = [{"table": "shop.people", "former-names": ["shop.folk"]}]
    assert "an entry of its own" in problem({"select": select}, ("shop.people", "shop.folk"))
