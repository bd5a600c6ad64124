"""The outbox's settings, and JSON taken apart without a loss. What leaves is tested in integration/test_messages.py."""

import json
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from figbridge.config import Config, OutboxSection
from figbridge.errors import ConfigError
from figbridge.members import Member, NotJson, Number, check, of_object

COLUMNS = {"id": "uuid", "aggregate_type": "text", "aggregate_id": "bigint", "type": "text", "payload": "jsonb"}


def parse(**forward: Any) -> Config:
    legacy = {"dsn": "postgresql://db/shop", "tables": ["shop.orders", 'shop."outbox"']}
    tree = {"legacy": legacy, "forward": {"sink": {"type": "stdout"}, **forward}}
    return Config.parse(yaml.safe_dump(tree), {})


def problem(**forward: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(**forward)
    (found,) = caught.value.problems
    return str(found)


# --- the settings


def test_nothing_leaves_by_message_or_outbox_unless_it_is_asked_for() -> None:
    forward = parse().forward
    assert forward
    assert (forward.messages, forward.outbox, forward.heartbeat_seconds) == ((), None, 10.0)


def test_the_names_are_those_of_the_file() -> None:
    config = parse(
        messages=["audit", "app.*", "*"],
        outbox={"table": "shop.outbox", "aggregate-type": "kind", "event-type": "what", "expand-json": True},
        **{"heartbeat-seconds": 0},
    )
    assert config.forward
    assert config.forward.heartbeat_seconds == 0
    outbox = config.forward.outbox
    assert outbox
    assert (outbox.aggregate_type, outbox.event_type, outbox.expand_json) == ("kind", "what", True)
    assert (outbox.detail, outbox.source, outbox.detail_type) == ("envelope", "legacy.{database}", "{type}")


@pytest.mark.parametrize("prefix", ["figbridge.heartbeat", "figbridge.*", "figbridge."])
def test_the_bridges_own_messages_cannot_be_asked_for(prefix: str) -> None:
    assert "the bridge's own" in problem(messages=[prefix])
    assert "forward.outbox.message-prefix" in problem(outbox={"message-prefix": prefix})


@pytest.mark.parametrize("prefix", ["a*b", "**", ""])
def test_a_prefix_is_a_text_with_an_asterisk_at_its_end_at_most(prefix: str) -> None:
    assert problem(messages=[prefix]).startswith("forward.messages.0: ")


def test_an_outbox_is_somewhere_and_published() -> None:
    assert "neither table nor message-prefix" in problem(outbox={})
    assert "is none of legacy.tables" in problem(outbox={"table": "shop.outbox_2"})
    assert "holds a *" in problem(outbox={"message-prefix": "outbox*"})
    assert "fields are nowhere" in problem(outbox={"table": "shop.outbox", "detail": "payload", "fields": ["a"]})
    assert "{operation}" in problem(outbox={"table": "shop.outbox", "detail-type": "{operation}"})
    assert "aws." in problem(outbox={"table": "shop.outbox", "source": "aws.shop"})


# --- the table


def test_a_table_with_every_column_is_no_problem() -> None:
    section = OutboxSection(table="shop.outbox")
    assert section.problems(COLUMNS) == []
    # an id of the application's own is a courtesy; asked for by name, it is missed
    without = {name: kind for name, kind in COLUMNS.items() if name != "id"}
    assert section.problems(without) == []
    assert [it.where for it in OutboxSection(table="shop.outbox", id="id").problems(without)] == ["forward.outbox.id"]


def test_each_missing_column_is_named_with_its_setting_and_a_remedy() -> None:
    columns = {"aggregatetype": "text", "aggregate_id": "text", "body": "jsonb"}
    section = OutboxSection(table="shop.outbox", fields=("tenant",))
    found = {it.where: it for it in section.problems(columns)}
    assert found.keys() == {
        "forward.outbox.aggregate-type", "forward.outbox.event-type", "forward.outbox.payload", "forward.outbox.fields",
    }  # fmt: skip
    assert found["forward.outbox.aggregate-type"].remedy == "did you mean 'aggregatetype'?"
    assert found["forward.outbox.payload"].remedy == "the table has aggregatetype, aggregate_id, body"


@pytest.mark.parametrize(("kind", "problems"), [("text", 0), ("character varying(100)", 0), ("jsonb", 1), ("bytea", 1)])
def test_only_text_is_expanded(kind: str, problems: int) -> None:
    section = OutboxSection(table="shop.outbox", expand_json=True)
    assert len(section.problems(COLUMNS | {"payload": kind})) == problems


# --- the members of an object

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
SPACE = st.text(" \t\r\n", max_size=2)


@given(st.dictionaries(st.text(), VALUES, max_size=5), st.booleans(), SPACE)
def test_every_value_is_cut_out_as_it_was_written(tree: dict[str, Any], ascii_only: bool, space: str) -> None:
    texts = {name: json.dumps(value, ensure_ascii=ascii_only) for name, value in tree.items()}
    written = [
        f"{space}{json.dumps(name, ensure_ascii=ascii_only)}{space}:{space}{text}{space}"
        for name, text in texts.items()
    ]
    whole = f"{space}{{{','.join(written) or space}}}{space}"
    found = of_object(whole)
    assert {name: member.text for name, member in found.items()} == texts


def test_numbers_keep_their_digits() -> None:
    found = of_object('{"a": 12345678901234567890123, "b": 1.10, "c": "1", "d": -0}')
    assert found["a"] == Member(Number("12345678901234567890123"), "12345678901234567890123")
    assert (found["b"].text, found["d"].text) == ("1.10", "-0")
    assert isinstance(found["a"].value, Number)
    assert not isinstance(found["c"].value, Number)
    assert of_object('{"a": 1%s}' % ("0" * 10_000))["a"].text == "1" + "0" * 10_000


@pytest.mark.parametrize(
    "text",
    ["", "[]", "1", "{", '{"a"}', '{"a":}', '{"a":1,}', '{"a":1}{}', "{'a':1}", '{"a":NaN}', '{"a":[-Infinity]}',
     '{"a":1,"a":2}', '{"a":"\n"}', '{"a":01}', "{a:1}", '{"a":' + "[" * 100_000, "\ufeff{}"],
    ids=repr,
)  # fmt: skip
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(NotJson):
        of_object(text)


@given(st.text('{}[]":, \\un1e-"', max_size=30))
def test_of_any_text_it_says_what_a_json_parser_says(text: str) -> None:
    try:
        tree = json.loads(text)
    except ValueError:
        with pytest.raises(NotJson):
            check(text)
    else:
        check(text)
        if isinstance(tree, dict):
            try:
                assert of_object(text).keys() == tree.keys()
            except NotJson as error:
                assert "twice" in str(error)  # noqa: PT017 (only the one reason is allowed)
