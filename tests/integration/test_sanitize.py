"""What must not leave a real database does not: not in an event, a key, a dead letter or a line of the log."""

import json
import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from figbridge import legacy
from figbridge.change import Column, Relation
from figbridge.config import Config, HashSection, OutboxSection, SelectSection
from figbridge.deadletter import DeadLetter
from figbridge.event import Event, Rejection
from figbridge.forward.sanitize import NOT_DECIDED, CannotSanitize, Rules
from figbridge.forward.values import Encoders
from figbridge.forward.versions import History
from figbridge.preflight import LEAVING, inspect
from fixtures.forward import Forward, HeldSink
from fixtures.postgres import Database
from fixtures.replay import FENCE, settled
from fixtures.snapshot import finished, prepare

HASHING = HashSection.model_validate({"key": "correct horse battery", "id": "k1"})
PEOPLE = """
CREATE TABLE people (
    code text PRIMARY KEY, ssn text, email text, phone text, note text, name text, doc jsonb, tags text[], state text,
    plain text
)
"""
COLUMNS = ("ssn", "email", "phone", "note", "name", "doc", "tags")
RULES: dict[str, Any] = {
    "table": "public.people",
    "exclude": ["ssn", "doc"],
    "hash": ["email", "tags"],
    "mask": ["code", "phone"],
    "truncate": {"note": 2},
    "replace": {"name": "somebody"},
    "where": "state != 'hidden'",
}


def select(**rules: Any) -> SelectSection:
    return SelectSection.model_validate(rules)


class Letters:
    def __init__(self) -> None:
        self.letters: list[DeadLetter] = []

    def add(self, letters: Sequence[DeadLetter]) -> None:
        self.letters += letters

    def close(self) -> None:
        pass


class Picky(HeldSink):
    """Refuses every fourth event for ever."""

    def __init__(self) -> None:
        super().__init__()
        self._met = 0

    def publish(self, events: Sequence[Event]) -> Sequence[Rejection]:
        rejections = []
        for event in events:
            self._met += 1
            if self._met % 4 == 0 and FENCE.encode() not in event.detail:
                rejections.append(Rejection(event, "MalformedDetail", "refused by the test", retryable=False))
            else:
                self.events.append(event)
        return rejections


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 30), full=st.booleans())
def test_no_forbidden_value_is_ever_anywhere(database: Database, seed: int, full: bool) -> None:
    """Whatever the application does: rows, keys, deletes, TOAST, DDL, filters, a snapshot, refused entries."""
    dice = random.Random(seed)
    serial = 0

    def secret() -> str:
        nonlocal serial
        serial += 1
        return f"qX{seed}-{serial}Zq" + ("w" * 5000 if dice.random() < 0.1 else "")

    def row() -> dict[str, Any]:
        values: dict[str, Any] = {column: secret() if dice.random() < 0.8 else None for column in COLUMNS}
        values["doc"] = json.dumps({"inner": secret()})
        values["tags"] = [secret(), secret()]
        return {"code": f"{secret()[:40]}", **values, "state": dice.choice(["shown", "hidden", None]), "plain": "open"}

    database.execute(
        "DROP SCHEMA IF EXISTS figbridge CASCADE; DROP TABLE IF EXISTS people; DROP PUBLICATION IF EXISTS pub"
    )
    database.execute(
        "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = %s", [database.slot]
    )
    database.execute(PEOPLE + (";ALTER TABLE people REPLICA IDENTITY FULL" if full else ""))
    with database.connect() as application:
        insert = (
            "INSERT INTO people (code, ssn, email, phone, note, name, doc, tags, state, plain) VALUES "
            "(%(code)s, %(ssn)s, %(email)s, %(phone)s, %(note)s, %(name)s, %(doc)s, %(tags)s, %(state)s, %(plain)s)"
        )
        for _ in range(10):  # before the slot: for the snapshot
            application.execute(insert, row())
        prepare(database, "", "people")
        letters, sink = Letters(), Picky()
        with (
            capture_logs() as logs,
            Forward(
                database,
                messages=[FENCE],
                sink=sink,
                select=[select(**RULES)],
                hashing=HASHING,
                dead_letters=letters,
                history=History(),
                snapshot=[("public", "people")],
            ) as forward,
        ):
            for _ in range(40):
                codes = [code for (code,) in application.execute("SELECT code FROM people").fetchall()]
                changed = {**row(), "old": dice.choice(codes) if codes else "?"}
                application.execute(
                    dice.choice(
                        [
                            insert,
                            insert,
                            "UPDATE people SET email = %(email)s, state = %(state)s WHERE code = %(old)s",
                            "UPDATE people SET code = %(code)s WHERE code = %(old)s",
                            "UPDATE people SET plain = 'changed' WHERE code = %(old)s",
                            "DELETE FROM people WHERE code = %(old)s",
                            "ALTER TABLE people ADD COLUMN IF NOT EXISTS later int",
                        ]
                    ),
                    changed,
                )
            finished(forward, "people")
            settled(forward)
    everything = repr([tuple(it) for it in sink.events]) + repr(letters.letters) + repr(logs)
    assert letters.letters
    assert any(it["op"] == "read" for it in sink.details)
    assert f"qX{seed}" not in everything
    for name in ("ssn", "doc", "inner"):
        assert f'"{name}"' not in everything
    assert '"phone":"***"' in everything
    assert '"hidden"' not in everything
    assert "k1:" in everything


def test_rows_stay_and_move_as_the_predicate_says(each_database: Database) -> None:
    database = each_database
    database.execute("CREATE TABLE orders (id int PRIMARY KEY, state text, note text)")
    database.execute("CREATE PUBLICATION pub FOR TABLE orders")
    database.create_slot()
    rules = select(table="public.orders", where="state == 'paid'")
    with Forward(database, messages=[FENCE], select=[rules]) as forward:
        for statement in (
            "INSERT INTO orders VALUES (1, 'paid', 'a'), (2, 'open', 'b')",
            "UPDATE orders SET note = 'c'",
            "UPDATE orders SET state = 'void' WHERE id = 1",
            "UPDATE orders SET state = 'paid' WHERE id = 2",
            "DELETE FROM orders WHERE id = 1",
            "ALTER TABLE orders REPLICA IDENTITY FULL",
            "UPDATE orders SET state = 'open' WHERE id = 2",
            "UPDATE orders SET note = 'd' WHERE id = 2",
            "UPDATE orders SET state = 'paid' WHERE id = 2",
            "UPDATE orders SET id = 3, state = 'open' WHERE id = 2",
            "DELETE FROM orders",
        ):
            database.execute(statement)
        details = settled(forward)
        told = [(it["op"], it["key"]["id"]) for it in details]
        assert forward.metric("forward_filtered_total", table="public.orders") > 0
    assert told == [
        ("insert", 1),
        ("update", 1),
        ("delete", 2),  # the server did not say whether it was in before; a delete of what nobody has harms nobody
        ("delete", 1),
        ("update", 2),
        ("delete", 1),
        ("delete", 2),  # from here on the whole old row is known
        ("insert", 2),
        ("delete", 2),
    ]
    assert all(it["after"] is None for it in details if it["op"] == "delete")


def test_what_the_predicate_cannot_decide_is_a_dead_letter_with_nothing_but_the_key(database: Database) -> None:
    database.execute("CREATE TABLE docs (id int PRIMARY KEY, body text, n int)")
    database.execute("ALTER TABLE docs ALTER body SET STORAGE EXTERNAL")
    database.execute("CREATE PUBLICATION pub FOR TABLE docs")
    database.create_slot()
    letters = Letters()
    rules = select(table="public.docs", where="body != 'x'")
    with Forward(database, messages=[FENCE], select=[rules], dead_letters=letters) as forward:
        database.execute("INSERT INTO docs VALUES (1, repeat('s', 9000), 0)")
        database.execute("UPDATE docs SET n = 4711")
        details = settled(forward)
    assert [it["op"] for it in details] == ["insert"]
    (letter,) = letters.letters
    assert letter.reason == NOT_DECIDED
    detail = json.loads(letter.body)["detail"]
    assert (detail["op"], detail["key"], detail["after"]) == ("update", {"id": 1}, None)
    assert b"4711" not in letter.body


def test_equal_values_have_equal_hashes_across_tables(database: Database) -> None:
    database.execute("CREATE TABLE a (id int PRIMARY KEY, email text); CREATE TABLE b (email varchar PRIMARY KEY)")
    database.execute("CREATE PUBLICATION pub FOR TABLE a, b")
    database.create_slot()
    rules = [select(table="public.a", hash=["email"]), select(table="public.b", hash=["email"])]
    with Forward(database, messages=[FENCE], select=rules, hashing=HASHING) as forward:
        database.execute("INSERT INTO a VALUES (1, 'ada@example.com'), (2, 'ada@example.com'), (3, NULL)")
        database.execute("INSERT INTO b VALUES ('ada@example.com')")
        first, second, third, other = settled(forward)
        keys = [event.key for event in forward.sink.events]
    assert first["after"]["email"] == second["after"]["email"] == other["key"]["email"]
    assert third["after"]["email"] is None
    assert "ada" not in "".join(keys)


def test_a_renamed_column_stops_the_bridge_before_its_values_leave(database: Database) -> None:
    database.execute("CREATE TABLE people (id int PRIMARY KEY, ssn text)")
    database.execute("CREATE PUBLICATION pub FOR TABLE people")
    database.create_slot()
    rules = select(table="public.people", exclude=["ssn"])
    with Forward(database, select=[rules]) as forward:
        database.execute("INSERT INTO people VALUES (1, 'secret')")
        forward.until_events(1)
        database.execute("ALTER TABLE people RENAME ssn TO social")
        database.execute("INSERT INTO people VALUES (2, 'secret')")
        failure = forward.ended()
    assert isinstance(failure, CannotSanitize)
    assert "missing-columns" in failure.hint
    both = select(table="public.people", exclude=["ssn", "social"], **{"missing-columns": "ignore"})
    with Forward(database, messages=[FENCE], select=[both]) as forward:
        details = settled(forward)
    assert {it["key"]["id"] for it in details} >= {2}
    assert all(list(it["after"]) == ["id"] for it in details)


def test_the_predicate_knows_numbers_that_no_double_holds(each_database: Database) -> None:
    """In the events they are strings; the predicate asks for what is in the database, in stream and snapshot alike."""
    each_database.execute("CREATE TABLE accounts (id int PRIMARY KEY, tenant int8, amount numeric(30, 5))")
    row = "(%s, 9007199254740993, 12345678901234567.12345), (%s, 5, 5)"
    each_database.execute(f"INSERT INTO accounts VALUES {row}", [1, 2])
    prepare(each_database, "", "accounts")
    where = "tenant == `9007199254740993` && amount > `12345678901234567.12344` && !(amount < `1000`)"
    rules = select(table="public.accounts", where=where)
    with Forward(each_database, messages=[FENCE], select=[rules], snapshot=[("public", "accounts")]) as forward:
        finished(forward, "accounts")
        each_database.execute(f"INSERT INTO accounts VALUES {row}", [3, 4])
        details = settled(forward)
    assert [(it["op"], it["key"]["id"]) for it in details] == [("read", 1), ("insert", 3)]
    assert details[0]["after"]["tenant"] == "9007199254740993"


def test_a_column_that_became_text_stops_the_bridge_if_it_is_compared_with_a_number(database: Database) -> None:
    database.execute("CREATE TABLE accounts (id int PRIMARY KEY, tenant int8)")
    database.execute("CREATE PUBLICATION pub FOR TABLE accounts")
    database.create_slot()
    with Forward(database, select=[select(table="public.accounts", where="tenant > `0`")]) as forward:
        database.execute("INSERT INTO accounts VALUES (1, 7)")
        forward.until_events(1)
        database.execute("ALTER TABLE accounts ALTER tenant TYPE text")
        database.execute("INSERT INTO accounts VALUES (2, '7')")
        failure = forward.ended()
    assert isinstance(failure, CannotSanitize)
    assert "both" in failure.hint
    both = select(table="public.accounts", where="tenant > `0` || tenant > '0'")
    with Forward(database, messages=[FENCE], select=[both]) as forward:
        details = settled(forward)
    assert {it["key"]["id"] for it in details} >= {2}


THING = "CREATE SCHEMA s; CREATE TABLE s.thing (id int PRIMARY KEY, ssn text)"
SWAPPED = """
CREATE TABLE s.new (LIKE s.thing INCLUDING ALL); ALTER TABLE s.thing RENAME TO thing_old;
ALTER TABLE s.new RENAME TO thing; ALTER PUBLICATION pub ADD TABLE s.thing
"""


@pytest.mark.parametrize(
    ("ddl", "name"),
    [
        ("ALTER TABLE s.thing RENAME TO thing9", "s.thing9"),
        ("ALTER TABLE s.thing SET SCHEMA public", "public.thing"),
        ("ALTER SCHEMA s RENAME TO s9", "s9.thing"),
        (SWAPPED, "s.thing_old"),
    ],
)
def test_a_renamed_table_stops_the_bridge_before_its_rows_leave(database: Database, ddl: str, name: str) -> None:
    database.execute(f"{THING}; CREATE PUBLICATION pub FOR TABLE s.thing")
    database.create_slot()
    rules = {"table": "s.thing", "exclude": ["ssn"], "where": "id > `0`"}
    with Forward(database, select=[select(**rules)]) as forward:
        database.execute("INSERT INTO s.thing VALUES (1, 'secret')")
        forward.until_events(1)
        database.execute(ddl)
        database.execute(f"INSERT INTO {name} VALUES (2, 'secret'), (-2, 'secret')")
        failure = forward.ended()
        assert [it["key"]["id"] for it in forward.sink.details] == [1]
    assert isinstance(failure, CannotSanitize)
    assert name in str(failure)
    assert "former-names" in failure.hint
    # the way out: the new name, and the old one beside it; rows of both may be there still
    now, former = ("s.thing", name) if ddl is SWAPPED else (name, "s.thing")
    with Forward(
        database, messages=[FENCE], select=[select(**rules | {"table": now, "former-names": [former]})]
    ) as forward:
        details = settled(forward)
    assert {it["key"]["id"] for it in details} - {1} == {2}
    assert all(list(it["after"]) == ["id"] for it in details)


def test_so_do_rows_that_come_under_the_name_of_a_partition(each_database: Database) -> None:
    each_database.execute(f"{THING} PARTITION BY RANGE (id); CREATE TABLE s.part PARTITION OF s.thing DEFAULT")
    each_database.execute("CREATE PUBLICATION pub FOR TABLE s.thing WITH (publish_via_partition_root = true)")
    each_database.create_slot()
    with Forward(each_database, select=[select(table="s.thing", exclude=["ssn"])]) as forward:
        each_database.execute("INSERT INTO s.thing VALUES (1, 'secret')")
        forward.until_events(1)
        each_database.execute("ALTER PUBLICATION pub SET (publish_via_partition_root = false)")
        each_database.execute("INSERT INTO s.thing VALUES (2, 'secret')")
        failure = forward.ended()
    assert isinstance(failure, CannotSanitize)
    assert "s.part" in str(failure)


def test_what_was_written_under_a_former_name_obeys_the_rules_of_the_new_one(each_database: Database) -> None:
    each_database.execute(f"{THING}; CREATE PUBLICATION pub FOR TABLE s.thing")
    each_database.create_slot()
    each_database.execute("INSERT INTO s.thing VALUES (1, 'secret'), (-1, 'secret')")
    each_database.execute("ALTER TABLE s.thing RENAME TO thing9")
    each_database.execute("INSERT INTO s.thing9 VALUES (2, 'secret'), (-2, 'secret')")
    rules = {"table": "s.thing9", "exclude": ["ssn"], "where": "id > `0`"}
    with Forward(each_database, select=[select(**rules)]) as forward:
        assert isinstance(forward.ended(), CannotSanitize)
        assert not forward.sink.events
    with Forward(each_database, messages=[FENCE], select=[select(**rules | {"former-names": ["s.thing"]})]) as forward:
        details = settled(forward)
    assert [(it["table"], it["after"]) for it in details] == [("thing", {"id": 1}), ("thing9", {"id": 2})]


def test_a_renamed_outbox_stops_the_bridge_and_is_routed_under_both_names(database: Database) -> None:
    database.execute(
        "CREATE TABLE outbox (id int PRIMARY KEY, aggregate_type text, aggregate_id text, type text, payload jsonb)"
    )
    database.execute("CREATE PUBLICATION pub FOR TABLE outbox")
    database.create_slot()
    event = "VALUES (%s, 'order', '42', 'Paid', '{}')"
    with Forward(database, outbox=OutboxSection.model_validate({"table": "public.outbox"})) as forward:
        database.execute(f"INSERT INTO outbox {event}", [1])
        forward.until_events(1)
        database.execute("ALTER TABLE outbox RENAME TO outbox9")
        database.execute(f"INSERT INTO outbox9 {event}", [2])
        failure = forward.ended()
        assert [it.detail_type for it in forward.sink.events] == ["Paid"]
    assert isinstance(failure, CannotSanitize)
    now = OutboxSection.model_validate({"table": "public.outbox9"})
    both = select(table="public.outbox9", **{"former-names": ["public.outbox"]})
    with Forward(database, messages=[FENCE], outbox=now, select=[both]) as forward:
        details = settled(forward)
    assert {it["outbox_id"] for it in details} - {1} == {2}
    assert {it["type"] for it in details} == {"Paid"}


def test_the_outbox_obeys_too(database: Database) -> None:
    database.execute(
        "CREATE TABLE outbox (id int PRIMARY KEY, aggregate_type text, aggregate_id text, type text, payload jsonb, "
        "ip text, who text, seen text)"
    )
    database.execute("CREATE PUBLICATION pub FOR TABLE outbox")
    database.create_slot()
    outbox = OutboxSection.model_validate({"table": "public.outbox", "fields": ["ip", "who", "seen"]})
    rules = select(table="public.outbox", exclude=["ip"], hash=["who"])
    letters = Letters()
    with Forward(
        database, messages=[FENCE], select=[rules], hashing=HASHING, outbox=outbox, dead_letters=letters
    ) as forward:
        database.execute("INSERT INTO outbox VALUES (1, 'order', '42', 'Paid', '{}', 'secret', 'secret', 'x')")
        database.execute("INSERT INTO outbox VALUES (2, 'order', NULL, 'Paid', '{}', 'secret', 'secret', 'x')")
        (detail,) = settled(forward)
    assert set(detail["fields"]) == {"who", "seen"}
    (letter,) = letters.letters
    assert "secret" not in json.dumps(detail) + letter.body.decode()


def test_a_change_of_the_schema_does_not_name_what_stays(database: Database) -> None:
    database.execute("CREATE TABLE people (id int PRIMARY KEY, ssn text, email text)")
    database.execute("CREATE PUBLICATION pub FOR TABLE people")
    database.create_slot()
    history = History()
    rules = select(table="public.people", exclude=["ssn"], hash=["email"])
    with Forward(database, messages=[FENCE], select=[rules], hashing=HASHING, history=history) as forward:
        database.execute("INSERT INTO people VALUES (1, 'secret', 'a@b')")
        database.execute("ALTER TABLE people ADD n int")
        database.execute("INSERT INTO people VALUES (2, 'secret', 'a@b', 1)")
        _, told, _ = settled(forward)
    assert told["op"] == "schema.changed"
    assert [it["name"] for it in told["columns"]] == ["id", "email", "n"]
    assert [it["name"] for it in told["previous"]["columns"]] == ["id", "email"]
    assert told["columns"][1]["sanitized"] == "hash"


def test_a_snapshot_of_a_table_without_a_key_keeps_rows_apart_that_look_alike(database: Database) -> None:
    """What leaves of the rows is the same, so only the hash of all that they are tells them apart."""
    database.execute("CREATE TABLE log (who text, what text); ALTER TABLE log REPLICA IDENTITY FULL")
    database.execute("INSERT INTO log SELECT 'user ' || n, 'x' FROM generate_series(1, 50) n")
    prepare(database, "", "log")
    rules = select(table="public.log", mask=["who"])
    with Forward(database, messages=[FENCE], select=[rules], hashing=HASHING, snapshot=[("public", "log")]) as forward:
        forward.until_events(50)
        ids = {it["id"] for it in forward.sink.details if it["op"] == "read"}
    assert len(ids) == 50


# --- the report


def config(database: Database, forward: dict[str, Any]) -> Config:
    sink = {"type": "stdout"}
    tree = {"legacy": {"dsn": database.dsn, "tables": ["public.people"]}, "forward": {"sink": sink} | forward}
    return Config.parse(json.dumps(tree), {})


def report(database: Database, forward: dict[str, Any]) -> list[tuple[str, str]]:
    findings = inspect(config(database, forward), "init")
    return [(it.level, it.what) for it in findings if it.where == f"{LEAVING}public.people"]


def test_check_says_what_leaves(each_database: Database) -> None:
    each_database.execute(PEOPLE)
    names = "code, ssn, email, phone, note, name, doc, tags, state, plain"
    assert report(each_database, {}) == [("ok", f"leave as they are: {names}")]
    rules = {"select": [RULES], "hash": {"key": "correct horse battery", "id": "k1"}}
    assert report(each_database, rules) == [
        (
            "ok",
            (
                "leave as they are: state, plain; hashed (key k1): email, tags; masked: code, phone; truncated: note; "
                "replaced: name; stay: ssn, doc; only rows where state != 'hidden'"
            ),
        )
    ]


def test_check_says_that_a_table_with_rules_is_gone_and_how_to_go_on(database: Database) -> None:
    database.execute("CREATE TABLE people9 (id int PRIMARY KEY)")
    section = {"table": "public.people", "exclude": ["ssn"], "former-names": ["public.folk"]}
    findings = inspect(config(database, {"select": [section]}), "init")
    (found,) = [it for it in findings if it.where == f"{LEAVING}public.people"]
    assert found.level == "error"
    assert "former-names: [public.people, public.folk]" in found.remedy


def test_a_column_that_a_key_only_includes_may_stay(database: Database) -> None:
    database.execute("CREATE TABLE people (code text, note text, PRIMARY KEY (code) INCLUDE (note))")
    found = report(database, {"select": [{"table": "public.people", "exclude": ["note"]}]})
    assert found == [("ok", "leave as they are: code; stay: note")]


@pytest.mark.parametrize(
    ("type_name", "kinds"),
    [
        ("int8", {"number"}),
        ("rate", {"number"}),
        ("float4", {"number"}),
        ("boolean", {"boolean"}),
        ("timestamptz", {"string"}),
        ("mood", {"string"}),
        ("jsonb", {"number", "string", "boolean"}),
        ("int[]", {"number", "string", "boolean"}),
    ],
)
def test_check_and_the_stream_find_a_column_of_the_same_kind(
    database: Database, type_name: str, kinds: set[str]
) -> None:
    database.execute("CREATE DOMAIN share AS numeric; CREATE DOMAIN rate AS share; CREATE TYPE mood AS ENUM ('x', 'y')")
    database.execute(f"CREATE TABLE people (id int PRIMARY KEY, c {type_name})")
    (relation_id, type_oid) = database.execute(
        "SELECT attrelid, atttypid FROM pg_attribute WHERE attrelid = 'people'::regclass AND attname = 'c'"
    )[0]
    relation = Relation(relation_id, "public", "people", "d", (Column("c", type_oid, -1, is_key=False),))
    encoders = Encoders("safe", partial(legacy.type_description, database.dsn))
    for kind, literal in {"number": "`5`", "string": "'x'", "boolean": "`true`"}.items():
        rules = {"table": "public.people", "where": f"c != {literal}"}
        ((level, _),) = report(database, {"select": [rules]})
        assert (level == "ok") is (kind in kinds)
        try:
            Rules([select(**rules)]).of(relation, encoders, frozenset(), unveiled=True)
        except CannotSanitize:
            assert kind not in kinds
        else:
            assert kind in kinds


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"exclude": ["snn"]}, "'snn'"),
        ({"where": "status == 'x'"}, "'status'"),
        ({"where": "state != `5`"}, "'state', a string, with a number"),
        ({"mask": ["code"]}, "does not tell its rows apart"),
    ],
)
def test_check_says_which_rule_does_not_fit(database: Database, rules: dict[str, Any], words: str) -> None:
    database.execute(PEOPLE)
    ((level, what),) = report(database, {"select": [{"table": "public.people"} | rules]})
    assert level == "error"
    assert words in what
