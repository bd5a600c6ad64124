"""From a message to a statement, without a database: what is understood, what is refused, what is kept exactly."""

import contextlib
import json
from decimal import Decimal
from typing import Any, Final

import jmespath
import pytest
from hypothesis import given
from hypothesis import strategies as st

from figbridge.config import MappingSection
from figbridge.errors import ConfigError
from figbridge.event import Received
from figbridge.reverse.mapping import Mapping, Mappings
from figbridge.reverse.message import Malformed, parse, payload_hash
from figbridge.reverse.statement import Free, Statement
from figbridge.reverse.values import ABSENT, Path

ENVELOPE: dict[str, Any] = {
    "version": "0",
    "id": "e-1",
    "source": "shop.next",
    "detail-type": "order.status-changed",
    "time": "2026-11-23T10:00:00Z",
    "detail": {"order_id": 42, "status": "paid"},
}


def body(**changes: Any) -> bytes:
    """The envelope as JSON, with `changes`; a key's underscore is a hyphen, and ... leaves the key out."""
    merged = {**ENVELOPE, **{key.replace("_", "-"): value for key, value in changes.items()}}
    return json.dumps({key: value for key, value in merged.items() if value is not ...}).encode()


def event(detail: str = '{"order_id": 42, "status": "paid"}', event_id: str = "e-1") -> Received:
    head = json.dumps({**ENVELOPE, "id": event_id, "detail": None}).removesuffix("null}")
    return parse(f"{head}{detail}}}".encode())


def section(**options: Any) -> MappingSection:
    given_options = {
        "match": {"source": "shop.next", "detail-type": "order.status-changed"},
        "into": "shop.orders",
        "action": "update",
        "key": {"id": "detail.order_id"},
        "set": {"status": "detail.status"},
    }
    return MappingSection.model_validate({**given_options, **options})


def statement(mapping: Mapping, received: Received) -> Statement:
    (found,) = mapping.statements(received)
    assert isinstance(found, Statement)
    return found


# --- parse


def test_an_eventbridge_envelope_is_understood() -> None:
    received = parse(body())
    assert (received.id, received.source, received.detail_type) == ("e-1", "shop.next", "order.status-changed")
    assert received.document["detail"] == {"order_id": 42, "status": "paid"}


def test_an_envelope_that_came_by_sns_is_the_same_event() -> None:
    wrapped = json.dumps({"Type": "Notification", "MessageId": "m", "TopicArn": "t", "Message": body().decode()})
    assert parse(wrapped.encode()) == parse(body())


CLOUD: Final = {"specversion": "1.0", "id": "e-1", "source": "shop.next", "type": "order.status-changed"}


def test_a_cloud_event_is_the_same_event() -> None:
    sent = CLOUD | {"data": {"order_id": 42, "status": "paid"}, "subject": "42"}
    received = parse(json.dumps(sent).encode())
    assert received[:3] == parse(body())[:3]
    assert received.document["detail"] == received.document["data"] == parse(body()).document["detail"]
    assert payload_hash(received) == payload_hash(parse(body()))


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (json.dumps(CLOUD).encode(), "data"),
        (json.dumps(CLOUD | {"data": "text"}).encode(), "data"),
        (json.dumps(CLOUD | {"data_base64": "e30="}).encode(), "data"),
        (json.dumps(CLOUD | {"type": None, "data": {}}).encode(), "type"),
        (json.dumps(CLOUD | {"specversion": "0.3", "data": {}}).encode(), "specversion"),
        (b"", "the message"),
        (b"not json", "the message"),
        (b"[1]", "the message"),
        (b"null", "the message"),
        (b"\xff\xfe", "the message"),
        (b"[" * 100_000, "the message"),
        (b'{"detail": NaN}', "the message"),
        (b'{"detail": -Infinity}', "the message"),
        (b'{"detail": {"n": 1e99999999999999999999}}', "the message"),
        (body(detail=...), "detail"),
        (body(detail="text"), "detail"),
        (body(detail=[1]), "detail"),
        (body(detail=None), "detail"),
        (body(id=...), "id"),
        (body(id=7), "id"),
        (body(id=""), "id"),
        (body(id="a\0b"), "id"),
        (body(id="\ud800"), "id"),
        (body(source=None), "source"),
        (body(detail_type=["x"]), "detail-type"),
        (b'{"Type": "Notification", "Message": "hello"}', "Message of the SNS notification"),
        (body(detail_type="figbridge.pack", detail={"op": "pack", "events": []}), "detail"),
    ],
)
def test_anything_else_is_malformed_and_the_field_is_named(message: bytes, field: str) -> None:
    with pytest.raises(Malformed) as caught:
        parse(message)
    assert caught.value.field == field
    assert str(caught.value).startswith(field)
    assert "expected" in str(caught.value)
    assert caught.value.hint


@given(st.binary() | st.recursive(st.none() | st.booleans() | st.text() | st.floats(), st.lists).map(json.dumps))
def test_no_message_raises_anything_but_malformed(message: bytes | str) -> None:
    with pytest.raises(Malformed):
        parse(message if isinstance(message, bytes) else message.encode())


def test_the_message_of_an_error_does_not_quote_the_event() -> None:
    with pytest.raises(Malformed) as caught:
        statement(Mapping(section(key={"id": "detail.nothing"})), event('{"iban": "DE02100100109307118603"}'))
    assert "DE02" not in str(caught.value)


CLAIM = {"bucket": "large", "key": "figbridge/e-1.json", "bytes": 2_000_000, "sha256": "0" * 64}
SQL = {"into": None, "action": None, "key": {}, "set": {}, "sql": "SELECT %(s)s", "with": {"s": "detail.after.status"}}


@pytest.mark.parametrize(
    "options", [{}, {"action": "upsert"}, {"action": "delete", "set": {}, "soft": {"deleted": "time"}}, SQL]
)
def test_a_claim_check_has_no_rows_to_write(options: dict[str, Any]) -> None:
    checked = event(json.dumps({"order_id": 42, "claim_check": CLAIM}))
    with pytest.raises(Malformed, match="in S3") as caught:
        Mapping(section(**options)).prepare(checked)
    assert caught.value.field == "detail.claim_check"
    assert "call" in caught.value.hint


def test_a_claim_check_has_the_key_of_what_is_deleted() -> None:
    checked = event(json.dumps({"order_id": 42, "claim_check": CLAIM}))
    assert Mapping(section(action="delete", set={})).prepare(checked).entity == ("shop.orders", "42")


@pytest.mark.parametrize("own", [None, "paid", {"bucket": "hat-check"}])
def test_a_field_that_only_bears_the_name_is_no_claim_check(own: Any) -> None:
    named = event(json.dumps({"order_id": 42, "status": "paid", "claim_check": own}))
    assert Mapping(section()).prepare(named).statements


# --- numbers


JSON_NUMBER = st.from_regex(r"\A-?(0|[1-9][0-9]{0,60})(\.[0-9]{1,60})?\Z")


@given(JSON_NUMBER)
def test_every_digit_of_a_number_reaches_the_document(digits: str) -> None:
    document = statement(Mapping(section()), event(f'{{"order_id": {digits}, "status": "x"}}')).document
    assert document == f'{{"id":{_same_digits(digits)},"status":"x"}}'


def _same_digits(digits: str) -> str:
    """Decimal writes a small number with an exponent: 0E-7 for 0.0000000. Equal, and with the same scale."""
    return str(Decimal(digits))


@pytest.mark.parametrize(
    "digits", ["9" * 5000, "1E+400000", "-0.0", "1.50", "123456789012345678901234567890.0123456789"]
)
def test_numbers_of_odd_length_survive(digits: str) -> None:
    document = statement(Mapping(section()), event(f'{{"order_id": {digits}, "status": "x"}}')).document
    assert document == f'{{"id":{digits},"status":"x"}}'


# --- idempotency key and payload hash


def test_the_key_is_the_events_id_unless_the_mapping_names_one() -> None:
    assert Mapping(section()).idempotency_key(event()) == "e-1"
    named = Mapping(section(idempotency_key="detail.change"))
    assert named.idempotency_key(event('{"change": "c-9"}')) == "c-9"
    assert named.idempotency_key(event('{"change": 12345678901234567890123}')) == "12345678901234567890123"


@pytest.mark.parametrize("value", ["null", "true", "1.5", '""', "[1]", '{"a": 1}', r'"\u0000"', r'"\ud800"'])
def test_a_key_that_is_no_key_is_poison_and_its_path_is_named(value: str) -> None:
    with pytest.raises(Malformed, match=r"detail\.change \(idempotency_key\)"):
        Mapping(section(idempotency_key="detail.change")).idempotency_key(event(f'{{"change": {value}}}'))


def test_an_absent_key_is_poison_too() -> None:
    with pytest.raises(Malformed, match=r"detail\.change \(idempotency_key\)"):
        Mapping(section(idempotency_key="detail.change")).idempotency_key(event("{}"))


def test_the_payload_hash_knows_no_order_and_no_spaces_but_every_digit() -> None:
    first = payload_hash(event('{"a": 1, "b": {"c": 2.50, "d": [1, 2]}}'))
    assert payload_hash(event('{"b":{"d":[1,2],"c":2.50},"a":1}', event_id="another")) == first
    assert payload_hash(event('{"a": 1, "b": {"c": 2.5, "d": [1, 2]}}')) != first
    assert payload_hash(event('{"a": 1, "b": {"c": 2.50, "d": [2, 1]}}')) != first


def test_nesting_is_hashed_as_far_as_the_stack_goes_and_then_refused() -> None:
    def nested(levels: int) -> str:
        return f'{{"a": {"[" * levels}{"]" * levels}}}'

    assert payload_hash(event(nested(100))) != payload_hash(event(nested(101)))
    for levels in (900, 50_000):  # how far the stack goes is the interpreter's affair
        with contextlib.suppress(Malformed):
            payload_hash(event(nested(levels)))
    with pytest.raises(Malformed):
        event(nested(50_000))


# --- statements


def rows(table: str) -> str:
    return (
        "FROM json_array_elements($1::json) WITH ORDINALITY AS d (document, number), "
        f"json_populate_record(ROW((NULL::{table}).*)::{table}, d.document) AS r"
    )


ORDERS = '"shop"."orders"'
ALL_ROWS = f"FROM json_populate_recordset(ROW((NULL::{ORDERS}).*)::{ORDERS}, $1::json) AS r"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {},
            f'UPDATE {ORDERS} AS t SET "status" = r."status" {rows(ORDERS)} WHERE t."id" = r."id" RETURNING d.number',
        ),
        (
            {"set": {"status": "detail.nothing"}},
            "SELECT d.number " + rows(ORDERS) + f' JOIN {ORDERS} AS t ON t."id" = r."id"',
        ),
        (
            {"action": "insert", "key": {}, "set": {"id": "detail.order_id", "status": "detail.status"}},
            f'INSERT INTO {ORDERS} AS t ("id", "status") OVERRIDING SYSTEM VALUE SELECT r."id", r."status" ' + ALL_ROWS,
        ),
        (
            {"action": "upsert"},
            f'INSERT INTO {ORDERS} AS t ("id", "status") OVERRIDING SYSTEM VALUE SELECT r."id", r."status" '
            + ALL_ROWS
            + ' ON CONFLICT ("id") DO UPDATE SET "status" = EXCLUDED."status"',
        ),
        (
            {"action": "upsert", "set": {}},
            f'INSERT INTO {ORDERS} AS t ("id") OVERRIDING SYSTEM VALUE SELECT r."id" '
            + ALL_ROWS
            + ' ON CONFLICT ("id") DO NOTHING',
        ),
        (
            {"action": "delete", "set": {}, "into": '"My ""Odd"" Schema"."100%"', "key": {"a b": "detail.order_id"}},
            'DELETE FROM "My ""Odd"" Schema"."100%" AS t USING '
            + rows('"My ""Odd"" Schema"."100%"').removeprefix("FROM ")
            + ' WHERE t."a b" = r."a b" RETURNING d.number',
        ),
        (
            {"action": "delete", "set": {}, "soft": {"status": "'gone'"}},
            f'UPDATE {ORDERS} AS t SET "status" = r."status" {rows(ORDERS)} WHERE t."id" = r."id" RETURNING d.number',
        ),
    ],
    ids=["update", "update-of-nothing", "insert", "upsert", "upsert-without-set", "delete", "soft-delete"],
)
def test_the_sql_of_each_action(options: dict[str, Any], expected: str) -> None:
    assert statement(Mapping(section(**options)), event()).query.decode() == expected


def test_the_document_holds_the_mapped_columns_only() -> None:
    document = statement(Mapping(section()), event('{"order_id": 42, "status": "paid", "secret": 1}')).document
    assert document == '{"id":42,"status":"paid"}'


@pytest.mark.parametrize("path", ["detail.status", "detail.history[-1].status", "detail.history[0].status"])
def test_absent_is_not_null(path: str) -> None:
    mapping = Mapping(section(set={"status": path, "note": "detail.note"}))
    for detail, written in [
        ('{"order_id": 42, "note": 1}', '{"id":42,"note":1}'),
        ('{"order_id": 42, "history": [], "note": 1}', '{"id":42,"note":1}'),
        ('{"order_id": 42, "history": [7], "note": 1}', '{"id":42,"note":1}'),
        (
            '{"order_id": 42, "status": null, "history": [{"status": null}], "note": null}',
            '{"id":42,"status":null,"note":null}',
        ),
    ]:
        assert statement(mapping, event(detail)).document == written


def test_what_an_expression_yields_counts_as_there() -> None:
    mapping = Mapping(section(set={"status": "detail.a || detail.b"}))
    assert statement(mapping, event('{"order_id": 42}')).document == '{"id":42,"status":null}'


def test_defaults_and_constants() -> None:
    values = {"status": {"path": "detail.status", "default": "new"}, "origin": {"value": {"by": ["web", 1.5]}}}
    mapping = Mapping(section(set=values))
    for detail, status in [("", '"new"'), (', "status": null', "null"), (', "status": "paid"', '"paid"')]:
        expected = f'{{"id":42,"status":{status},"origin":{{"by":["web",1.5]}}}}'
        assert statement(mapping, event(f'{{"order_id": 42{detail}}}')).document == expected


@pytest.mark.parametrize("name", ["detail.order_id", "detail.total", "detail.tags[-1]", "source", "nothing", "a.b[3]"])
def test_a_walked_path_yields_what_jmespath_does(name: str) -> None:
    document = event('{"order_id": 42, "total": 1.50, "tags": ["a", "b"]}').document
    found = Path(name, "here").get(document)
    assert (None if found is ABSENT else found) == jmespath.search(name, document)


def test_a_number_that_json_has_not_is_poison() -> None:
    with pytest.raises(Malformed, match="finite"):
        statement(Mapping(section(set={"status": "to_number('nan')"})), event())


# --- several statements, SQL, callables


def test_several_statements_keep_their_order_and_sql_gets_text() -> None:
    parts = [
        {"into": "shop.orders", "action": "upsert", "key": {"id": "detail.order_id"}},
        {
            "sql": "UPDATE shop.stock SET n = n - %(n)s WHERE sku = ANY (%(skus)s) AND %(gone)s IS NULL",
            "with": {"n": "detail.n", "skus": "detail.skus", "gone": "detail.gone"},
        },
    ]
    mapping = Mapping(
        MappingSection.model_validate({"match": {"source": "s", "detail-type": "t"}, "statements": parts})
    )
    first, second = mapping.statements(event('{"order_id": 42, "n": 1.50, "skus": ["a"]}'))
    assert isinstance(first, Statement)
    assert isinstance(second, Free)
    assert first.document == '{"id":42}'
    assert second.parameters == {"n": "1.50", "skus": '["a"]', "gone": None}


def test_a_callable_that_nobody_installed_is_said_at_the_start() -> None:
    only = {"match": {"source": "s", "detail-type": "t"}, "call": "nobody"}
    with pytest.raises(ConfigError, match="nobody"):
        Mapping(MappingSection.model_validate(only))


# --- versions


@pytest.mark.parametrize(
    ("version", "number"),
    [
        ("7", "7"),
        ('"12345678901234567890123"', "12345678901234567890123"),
        ('{"commit_lsn": "0/10", "ordinal": 2, "xid": 753}', str((16 << 32) + 2)),
        ('{"commit_lsn": "1/0", "ordinal": 0}', str(1 << 64)),
    ],
)
def test_a_version_is_a_number_or_a_position(version: str, number: str) -> None:
    mapping = Mapping(section(version="detail.version"))
    assert mapping.prepare(event(f'{{"order_id": 1, "version": {version}}}')).version == number


@pytest.mark.parametrize("version", ["null", "true", "1.5", '"x"', '""', "[]", '{"commit_lsn": "x", "ordinal": 1}'])
def test_anything_else_is_no_version_and_poison(version: str) -> None:
    with pytest.raises(Malformed, match=r"detail\.version \(version\)"):
        Mapping(section(version="detail.version")).prepare(event(f'{{"order_id": 1, "version": {version}}}'))


def test_all_mappings_of_a_table_name_its_rows_alike_or_their_versions_would_not_meet() -> None:
    kinds = [{"source": "s", "detail-type": name} for name in "abc"]
    with pytest.raises(ConfigError) as caught:
        Mappings([
            section(match=kinds[0], version="detail.v"),
            section(match=kinds[1], version="detail.v", key={"number": "detail.number"}),
            section(match=kinds[2], version="detail.v", action="insert", key={}, set={"id": "detail.order_id"}),
        ])  # fmt: skip
    assert [it.where for it in caught.value.problems] == ["reverse.mappings.1.key", "reverse.mappings.2"]


@pytest.mark.parametrize("detail", ["{}", '{"order_id": null}'])
def test_a_key_path_that_yields_nothing_is_poison_and_is_named(detail: str) -> None:
    with pytest.raises(Malformed, match=r"detail\.order_id \(key id\) yields null or nothing"):
        statement(Mapping(section()), event(detail))


def test_a_function_that_cannot_work_with_a_value_is_poison_and_its_path_is_named() -> None:
    with pytest.raises(Malformed, match=r"abs\(detail\.total\) \(set status\)"):
        statement(Mapping(section(set={"status": "abs(detail.total)"})), event('{"order_id": 1, "total": "x"}'))


def test_text_is_sent_in_ascii_so_that_no_client_encoding_can_spoil_it() -> None:
    document = statement(Mapping(section()), event('{"order_id": 1, "status": "größe 😀"}')).document
    assert document.isascii()
    assert json.loads(document)["status"] == "größe 😀"


def test_an_object_keeps_its_order_on_the_way_to_a_json_column() -> None:
    document = statement(Mapping(section()), event('{"order_id": 1, "status": {"z": 1, "a": 2}}')).document
    assert document == '{"id":1,"status":{"z":1,"a":2}}'


# --- finding the mapping


def test_a_mapping_is_found_by_source_and_detail_type() -> None:
    mappings = Mappings([
        section(match={"source": ["a", "b"], "detail-type": ["x", "y"]}, into="shop.first"),
        section(into="shop.second"),
    ])  # fmt: skip
    found = mappings.find(event())
    assert found is not None
    assert found.tables == (("shop", "second"),)
    other = mappings.find(parse(body(source="b", detail_type="y")))
    assert other is not None
    assert other.tables == (("shop", "first"),)
    assert mappings.find(parse(body(source="b", detail_type="z"))) is None


def test_two_mappings_for_one_kind_of_event_are_reported_all_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Mappings([
            section(match={"source": "a", "detail-type": ["x", "y"]}),
            section(match={"source": ["a", "b"], "detail-type": "x"}),
            section(match={"source": "a", "detail-type": "y"}),
        ])  # fmt: skip
    assert [problem.where for problem in caught.value.problems] == [
        "reverse.mappings.1.match",
        "reverse.mappings.2.match",
    ]
    assert all(problem.remedy for problem in caught.value.problems)


def test_the_bridges_own_source_cannot_be_mapped() -> None:
    with pytest.raises(ConfigError, match=r"figbridge\.canary"):
        Mappings([section(match={"source": "figbridge.canary", "detail-type": "x"})])


# --- what an event is about


def test_events_are_of_one_entity_when_they_name_one_row() -> None:
    update = Mapping(section())
    insert = Mapping(section(action="insert", key={}, set={"id": "detail.order_id", "status": "detail.status"}))
    elsewhere = Mapping(section(into="shop.customers"))
    two = Mapping(section(key={"b": "detail.b", "a": "detail.a"}))
    named = Mapping(section(entity="detail.number"))
    one, as_text = event('{"order_id": 1, "status": "x", "number": 5}'), event('{"order_id": "1", "status": "y"}')

    assert update.prepare(one).entity == update.prepare(as_text).entity == ("shop.orders", "1")
    assert insert.prepare(one).entity == ("shop.orders", "event e-1"), "its primary key is not known yet"
    insert.primary_key = ("id",)
    assert insert.prepare(one).entity == update.prepare(one).entity
    assert elsewhere.prepare(one).entity == ("shop.customers", "1")
    assert named.prepare(one).entity == ("shop.orders", "5")
    assert two.prepare(event('{"a": 1, "b": "x"}')).entity == ("shop.orders", '["1","x"]')
