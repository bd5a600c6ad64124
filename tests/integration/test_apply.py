"""One event, one transaction, on a real server: applied once, whatever repeats, overlaps, breaks or is nonsense."""

import contextlib
import itertools
import json
import socket
import threading
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any

import psycopg
import pytest
from psycopg import conninfo

from figbridge import legacy
from figbridge.config import MappingSection
from figbridge.errors import BridgeError, LegacyUnavailable
from figbridge.event import Received
from figbridge.reverse import suppressed
from figbridge.reverse.apply import Applied, Applier, Outcome
from figbridge.reverse.mapping import Mapping
from figbridge.reverse.message import Malformed, parse
from figbridge.reverse.statement import Statement
from fixtures.postgres import Database

SHOP = """
    CREATE SCHEMA shop;
    CREATE TABLE shop.customers (id bigint PRIMARY KEY, name text);
    CREATE TABLE shop.orders (
        id bigint PRIMARY KEY,
        customer_id bigint REFERENCES shop.customers,
        status text NOT NULL DEFAULT 'new' CHECK (status <> 'impossible'),
        quantity integer,
        note varchar(5)
    );
"""
PARSED_IDS = itertools.count(1)


@pytest.fixture
def shop(database: Database) -> Database:
    return _shop(database)


@pytest.fixture
def each_shop(each_database: Database) -> Database:
    return _shop(each_database)


def _shop(database: Database) -> Database:
    database.execute((resources.files("figbridge") / "schema.sql").read_text())
    database.execute(SHOP)
    return database


@pytest.fixture
def make() -> Iterator[Callable[..., Applier]]:
    """Appliers that are closed in the end."""
    with contextlib.ExitStack() as stack:

        def applier(database: Database | str, **options: Any) -> Applier:
            dsn = database if isinstance(database, str) else database.dsn
            made = Applier(dsn, **{"statement_timeout": 10.0, "lock_timeout": 2.0, **options})
            stack.callback(made.close)
            return made

        yield applier


Make = Callable[..., Applier]


def test_our_keys_are_in_the_order_of_their_bytes(shop: Database) -> None:
    """Quicker, and a new version of the operating system's collations cannot spoil an index that has to be unique."""
    asked = """
        SELECT c.relname, a.attname FROM pg_attribute a
        JOIN pg_class c ON c.oid = a.attrelid JOIN pg_collation o ON o.oid = a.attcollation
        WHERE c.oid IN ('figbridge.inbox'::regclass, 'figbridge.entity_version'::regclass) AND o.collname = 'C'
        ORDER BY c.relname, a.attnum
    """
    keys = [
        ("entity_version", "scope"),
        ("entity_version", "identity"),
        ("inbox", "source"),
        ("inbox", "idempotency_key"),
    ]
    assert shop.execute(asked) == keys


def test_tables_of_an_older_figbridge_are_left_as_they_are(shop: Database, make: Make) -> None:
    """To change the order of a key would write its index anew under a lock."""
    shop.execute("""
        ALTER TABLE figbridge.inbox ALTER idempotency_key TYPE text COLLATE "POSIX";
        ALTER TABLE figbridge.entity_version ALTER identity TYPE text COLLATE "POSIX";
    """)
    before = shop.execute("SELECT relname, relfilenode FROM pg_class WHERE relname ~ '^(inbox|entity_version)'")
    shop.execute((resources.files("figbridge") / "schema.sql").read_text())
    after = shop.execute("SELECT relname, relfilenode FROM pg_class WHERE relname ~ '^(inbox|entity_version)'")
    assert set(after) == set(before)
    applied = make(shop).apply(event({"id": 1, "status": "new", "v": 1}), mapping("upsert", version="detail.v"))
    assert applied == Applied(Outcome.APPLIED)


def mapping(action: str, into: str = "shop.orders", **options: Any) -> Mapping:
    columns = {"id": "detail.id", "customer_id": "detail.customer", "status": "detail.status"}
    usual: dict[str, dict[str, Any]] = {
        "insert": {"set": columns},
        "update": {"key": {"id": "detail.id"}, "set": {"status": "detail.status"}},
        "upsert": {"key": {"id": "detail.id"}, "set": {"status": "detail.status"}},
        "delete": {"key": {"id": "detail.id"}},
    }
    match = {"source": "shop.next", "detail-type": "order"}
    section = {"match": match, "into": into, "action": action, **usual[action], **options}
    return Mapping(MappingSection.model_validate(section))


def event(detail: dict[str, Any] | str, event_id: str | None = None) -> Received:
    text = detail if isinstance(detail, str) else json.dumps(detail)
    identity = event_id or f"e-{next(PARSED_IDS)}"
    return parse(f'{{"id": "{identity}", "source": "shop.next", "detail-type": "order", "detail": {text}}}'.encode())


def inbox(database: Database) -> list[str]:
    return [key for (key,) in database.execute("SELECT idempotency_key FROM figbridge.inbox ORDER BY applied_at")]


def orders(database: Database) -> list[tuple[int, str]]:
    return database.execute("SELECT id, status FROM shop.orders ORDER BY id")


# --- what is applied


def test_insert_update_upsert_delete(each_shop: Database, make: Make) -> None:
    applier = make(each_shop)
    steps: list[tuple[str, dict[str, Any], list[tuple[int, str]]]] = [
        ("insert", {"id": 1, "status": "new"}, [(1, "new")]),
        ("update", {"id": 1, "status": "paid"}, [(1, "paid")]),
        ("upsert", {"id": 1, "status": "sent"}, [(1, "sent")]),
        ("upsert", {"id": 2, "status": "new"}, [(1, "sent"), (2, "new")]),
        ("delete", {"id": 1}, [(2, "new")]),
    ]
    for action, detail, rows in steps:
        assert applier.apply(event(detail), mapping(action)) == Applied(Outcome.APPLIED)
        assert orders(each_shop) == rows
    assert len(inbox(each_shop)) == 5


def test_an_upsert_with_nothing_to_set_only_makes_sure_of_the_row(shop: Database, make: Make) -> None:
    shop.execute("INSERT INTO shop.orders VALUES (1, NULL, 'kept')")
    bare = mapping("upsert", set={})
    for number in (1, 2):
        assert make(shop).apply(event({"id": number}), bare).outcome is Outcome.APPLIED
    assert orders(shop) == [(1, "kept"), (2, "new")]


def test_names_may_hold_quotes_percents_spaces_and_capitals(shop: Database, make: Make) -> None:
    shop.execute('CREATE SCHEMA "S""%s"; CREATE TABLE "S""%s"."T 100%" ("Id%" int PRIMARY KEY, "sel""ect" text)')
    options = {"key": {"Id%": "detail.id"}, "set": {'sel"ect': "detail.status"}}
    applier = make(shop)
    for action in ("upsert", "update"):
        found = applier.apply(event({"id": 1, "status": action}), mapping(action, into='"S""%s"."T 100%"', **options))
        assert found.outcome is Outcome.APPLIED
    assert shop.execute('TABLE "S""%s"."T 100%"') == [(1, "update")]


def test_an_identity_column_takes_the_new_systems_value_where_the_mapping_names_it(shop: Database, make: Make) -> None:
    shop.execute("CREATE TABLE shop.tickets (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, status text)")
    applier = make(shop)
    assert applier.apply(event({"id": 77, "status": "a"}), mapping("upsert", "shop.tickets")).outcome == "applied"
    unnamed = mapping("insert", "shop.tickets", set={"status": "detail.status"})
    assert applier.apply(event({"status": "b"}), unnamed).outcome is Outcome.APPLIED
    assert shop.execute("SELECT * FROM shop.tickets ORDER BY id") == [(1, "b"), (77, "a")]


def test_a_negative_zero_is_one_where_the_column_knows_it(shop: Database, make: Make) -> None:
    shop.execute("CREATE TABLE shop.zeros (id int PRIMARY KEY, whole bigint, exact numeric, double float8, note text)")
    columns = dict.fromkeys(("whole", "exact", "double", "note"), "detail.zero")
    insert = mapping("insert", "shop.zeros", set={"id": "detail.zero", **columns})
    assert make(shop).apply(event('{"zero": -0}'), insert).outcome is Outcome.APPLIED
    assert shop.execute("SELECT id, whole, exact::text, double::text, note FROM shop.zeros") == [
        (0, 0, "0", "-0", "-0")
    ]


FORTY_DIGITS = "1234567890123456789012345678901234567.890"


def test_every_type_is_converted_by_the_server_and_no_digit_is_lost(each_shop: Database, make: Make) -> None:
    each_shop.execute("""
        CREATE TYPE shop.mood AS ENUM ('glad', 'sad');
        CREATE TYPE shop.address AS (street text, number int);
        CREATE DOMAIN shop.positive AS numeric CHECK (VALUE > 0);
        CREATE TABLE shop.types (
            id bigint PRIMARY KEY, exact numeric, nothing numeric, tiny numeric, far numeric, nan numeric, inf float8,
            list int[], nested text[][], doc jsonb, text_in_doc jsonb, ordered json, at timestamptz, bytes bytea,
            yes bool, mood shop.mood, positive shop.positive, home shop.address, homes shop.address[], fixed char(4),
            object_as_text text, day date, span interval, unset text DEFAULT 'default'
        )
    """)
    detail = f"""{{
        "id": 9223372036854775807, "exact": {FORTY_DIGITS}, "nothing": null, "tiny": 1.50, "far": 1e30, "nan": "NaN",
        "inf": "-Infinity", "list": [1, null, 3], "nested": [["a", "b,"], ["c\\"", "NULL"]],
        "doc": {{"a": [1, {{"b": {FORTY_DIGITS}}}], "ü": "😀"}}, "text_in_doc": "plain", "ordered": {{"z": 1, "a": 2}},
        "at": "2026-11-23T10:08:02.69654+02:00", "bytes": "\\\\xdeadbeef00", "yes": true, "mood": "glad",
        "positive": 0.5, "home": {{"street": "O'Higgins", "number": 7}}, "homes": [{{"street": "x", "number": 1}}],
        "fixed": "ab", "object_as_text": {{"k": "v"}}, "day": "0044-03-15 BC", "span": "1 day 02:00"
    }}"""
    received = event(detail)
    columns = {name: f"detail.{name}" for name in received.document["detail"]}
    assert make(each_shop).apply(received, mapping("insert", "shop.types", set=columns)) == Applied(Outcome.APPLIED)

    with each_shop.connect(options="-c timezone=UTC") as connection:
        row = connection.execute("SELECT to_jsonb(t)::text FROM shop.types t").fetchone()
    assert row is not None
    assert json.loads(row[0], parse_float=str, parse_int=str) == {
        "id": "9223372036854775807",
        "exact": FORTY_DIGITS,
        "nothing": None,
        "tiny": "1.50",
        "far": "1" + "0" * 30,
        "nan": "NaN",
        "inf": "-Infinity",
        "list": ["1", None, "3"],
        "nested": [["a", "b,"], ['c"', "NULL"]],
        "doc": {"a": ["1", {"b": FORTY_DIGITS}], "ü": "😀"},
        "text_in_doc": "plain",
        "ordered": {"z": "1", "a": "2"},
        "at": "2026-11-23T08:08:02.69654+00:00",
        "bytes": "\\xdeadbeef00",
        "yes": True,
        "mood": "glad",
        "positive": "0.5",
        "home": {"street": "O'Higgins", "number": "7"},
        "homes": [{"street": "x", "number": "1"}],
        "fixed": "ab  ",
        "object_as_text": '{"k":"v"}',
        "day": "0044-03-15 BC",
        "span": "1 day 02:00:00",
        "unset": "default",
    }
    assert each_shop.execute("SELECT ordered::text FROM shop.types") == [('{"z":1,"a":2}',)]


# --- the idempotency key


def test_the_same_key_twice_is_a_duplicate_and_changes_nothing(each_shop: Database, make: Make) -> None:
    each_shop.execute("INSERT INTO shop.orders VALUES (1, NULL, 'new')")
    applier, by_change = make(each_shop), mapping("update", idempotency_key="detail.change")
    assert applier.apply(event({"id": 1, "status": "paid", "change": 7}), by_change).outcome is Outcome.APPLIED
    each_shop.execute("UPDATE shop.orders SET status = 'sent by legacy'")
    again = applier.apply(event({"change": 7, "status": "paid", "id": 1}), by_change)
    assert again == Applied(Outcome.DUPLICATE)
    assert orders(each_shop) == [(1, "sent by legacy")]
    assert inbox(each_shop) == ["7"]


def test_a_duplicate_is_one_even_when_its_statement_could_no_longer_run(shop: Database, make: Make) -> None:
    applier, received = make(shop), event({"id": 1, "status": "new"})
    assert applier.apply(received, mapping("insert")).outcome is Outcome.APPLIED
    assert applier.apply(received, mapping("insert")).outcome is Outcome.DUPLICATE, "and not a unique violation"


def test_the_same_key_of_another_source_is_another_key(shop: Database, make: Make) -> None:
    applier, first = make(shop), event({"id": 1, "status": "new"}, "same")
    other = Received(id="same", source="billing", detail_type="order", document=event({"id": 2}).document)
    assert applier.apply(first, mapping("upsert")).outcome is Outcome.APPLIED
    assert applier.apply(other, mapping("upsert", set={})).outcome is Outcome.APPLIED


def test_the_same_key_with_another_payload_is_key_reuse(shop: Database, make: Make) -> None:
    applier = make(shop)
    assert applier.apply(event({"id": 1, "status": "new"}, "k"), mapping("insert")).outcome is Outcome.APPLIED
    reused = applier.apply(event({"id": 2, "status": "new"}, "k"), mapping("insert"))
    assert (reused.outcome, reused.reason) == (Outcome.DEAD_LETTER, "key_reuse")
    assert orders(shop) == [(1, "new")]


def test_the_same_key_in_two_threads_is_applied_by_exactly_one(each_shop: Database, make: Make) -> None:
    each_shop.execute("CREATE TABLE shop.counter (id int PRIMARY KEY, note text)")
    rounds, start = 25, threading.Barrier(2)
    insert = mapping("insert", "shop.counter", set={"note": "detail.note", "id": "detail.id"})
    found: list[list[Outcome]] = [[], []]

    def work(mine: list[Outcome], applier: Applier) -> None:
        for number in range(rounds):
            start.wait(30)
            mine.append(applier.apply(event({"id": number, "note": "x"}, f"key-{number}"), insert).outcome)

    threads = [threading.Thread(target=work, args=(mine, make(each_shop))) for mine in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [sorted(pair) for pair in zip(*found, strict=True)] == [["applied", "duplicate"]] * rounds
    assert each_shop.execute("SELECT count(*) FROM shop.counter") == [(rounds,)]


def test_a_claim_waits_for_the_transaction_that_holds_the_key(shop: Database, make: Make) -> None:
    """The two overlap for certain: the first is held between its statements and its commit."""
    executed, go = threading.Event(), threading.Event()

    def hold(step: str) -> None:
        if step == "executed":
            executed.set()
            assert go.wait(30)

    received, found = event({"id": 1, "status": "new"}), []
    first, second = make(shop, on_step=hold), make(shop, lock_timeout=30.0, statement_timeout=30.0)
    threads = [
        threading.Thread(
            target=lambda applier=applier: found.append(applier.apply(received, mapping("insert")).outcome)
        )
        for applier in (first, second)
    ]
    threads[0].start()
    assert executed.wait(30)
    threads[1].start()
    _wait_for_lock(shop)
    assert found == []
    go.set()
    for thread in threads:
        thread.join(30)
    assert sorted(found) == [Outcome.APPLIED, Outcome.DUPLICATE]


def _wait_for_lock(database: Database) -> None:
    """Until a session of this database waits for a lock; the server wakes us at most 1,000 times, 10 ms apart."""
    question = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with database.connect() as connection:
        for _ in range(1000):
            if connection.execute(question).fetchone() == (1,):
                return
            connection.execute("SELECT pg_sleep(0.01)")
    pytest.fail("nobody waited for a lock")


def test_the_claim_is_the_first_row_of_the_transaction_in_the_wal(each_shop: Database, make: Make) -> None:
    each_shop.execute("""
        CREATE TABLE shop.audit (id bigint);
        CREATE FUNCTION shop.audit() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN INSERT INTO shop.audit VALUES (NEW.id); RETURN NEW; END';
        CREATE TRIGGER audit BEFORE INSERT OR UPDATE ON shop.orders FOR EACH ROW EXECUTE FUNCTION shop.audit();
        CREATE PUBLICATION tables FOR TABLE shop.orders, shop.audit;
        CREATE PUBLICATION inbox FOR TABLE figbridge.inbox WITH (publish = 'insert')
    """)
    slot = each_shop.create_slot()
    applier = make(each_shop)
    applier.apply(event({"id": 1, "status": "new"}), mapping("insert"))
    applier.apply(event({"id": 1, "status": "paid"}), mapping("update"))
    rows = each_shop.execute(
        "SELECT data FROM pg_logical_slot_peek_binary_changes(%s, NULL, NULL, "
        "'proto_version', '1', 'publication_names', 'tables,inbox')",
        [slot],
    )
    assert _tables(bytes(data) for (data,) in rows) == [["inbox", "audit", "orders"], ["inbox", "audit", "orders"]]


def _tables(messages: Iterator[bytes]) -> list[list[str]]:
    """The tables of the row messages of each transaction, in their order."""
    names: dict[bytes, str] = {}
    transactions: list[list[str]] = []
    for message in messages:
        if message[:1] == b"B":
            transactions.append([])
        elif message[:1] == b"R":
            names[message[1:5]] = message[5:].split(b"\0")[1].decode()
        elif message[:1] in {b"I", b"U", b"D"}:
            transactions[-1].append(names[message[1:5]])
    return [tables for tables in transactions if tables]


# --- what waits for another event


def test_an_update_before_its_insert_waits_and_leaves_no_claim(each_shop: Database, make: Make) -> None:
    applier, update = make(each_shop), event({"id": 1, "status": "paid"})
    early = applier.apply(update, mapping("update"))
    assert (early.outcome, early.reason) == (Outcome.RETRY, "update_missing")
    assert inbox(each_shop) == []
    assert applier.apply(event({"id": 1, "status": "new"}), mapping("insert")).outcome is Outcome.APPLIED
    assert applier.apply(update, mapping("update")).outcome is Outcome.APPLIED
    assert orders(each_shop) == [(1, "paid")]


def test_an_update_that_a_trigger_suppresses_is_done(each_shop: Database, make: Make) -> None:
    each_shop.execute("""
        CREATE FUNCTION shop.keep() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
        CREATE TRIGGER keep BEFORE UPDATE ON shop.orders
            FOR EACH ROW WHEN (OLD.status = 'closed') EXECUTE FUNCTION shop.keep();
        INSERT INTO shop.orders (id, status) VALUES (1, 'closed'), (2, 'new');
    """)
    applier, update = make(each_shop), mapping("update")
    both = [update.prepare(event({"id": number, "status": "paid"})) for number in (1, 2)]
    missing = update.prepare(event({"id": 3, "status": "paid"}))
    found = applier.apply_all([*both, missing])
    assert [(found[it].outcome.value, found[it].reason) for it in [*both, missing]] == [
        ("ignored", "suppressed"), ("applied", ""), ("retried", "update_missing"),
    ]  # fmt: skip
    assert applier.apply_all(both[:1])[both[0]].outcome is Outcome.DUPLICATE
    assert orders(each_shop) == [(1, "closed"), (2, "paid")]


def test_what_a_trigger_does_in_the_place_of_an_update_is_committed_once(shop: Database, make: Make) -> None:
    shop.execute("""
        CREATE VIEW shop.overview AS SELECT id, status, count(*) FROM shop.orders GROUP BY id, status;
        CREATE TABLE shop.asked (id bigint, status text);
        CREATE FUNCTION shop.ask() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN INSERT INTO shop.asked VALUES (NEW.id, NEW.status); RETURN NULL; END $$;
        CREATE TRIGGER ask INSTEAD OF UPDATE ON shop.overview FOR EACH ROW EXECUTE FUNCTION shop.ask();
        INSERT INTO shop.orders (id, status) VALUES (1, 'new');
    """)
    update = mapping("update", "shop.overview", set={"status": "detail.status"})
    found = make(shop).apply(event({"id": 1, "status": "paid"}), update)
    assert (found.outcome, found.reason) == (Outcome.IGNORED, "suppressed")
    assert shop.execute("SELECT id, status FROM shop.asked") == [(1, "paid")]


def test_a_row_that_comes_right_behind_its_update_is_updated(
    shop: Database, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = suppressed.there

    def come(*arguments: Any) -> frozenset[Statement]:
        shop.execute("INSERT INTO shop.orders (id, status) VALUES (1, 'new') ON CONFLICT DO NOTHING")
        return look(*arguments)

    monkeypatch.setattr(suppressed, "there", come)
    assert make(shop).apply(event({"id": 1, "status": "paid"}), mapping("update")).outcome is Outcome.APPLIED
    assert orders(shop) == [(1, "paid")]


@pytest.mark.parametrize("deferred", [False, True])
def test_a_row_whose_parent_is_missing_waits_for_it(shop: Database, make: Make, deferred: bool) -> None:
    if deferred:
        shop.execute("ALTER TABLE shop.orders ALTER CONSTRAINT orders_customer_id_fkey DEFERRABLE INITIALLY DEFERRED")
    applier, child = make(shop), event({"id": 1, "customer": 5, "status": "new"})
    early = applier.apply(child, mapping("insert"))
    assert (early.outcome, early.reason) == (Outcome.RETRY, "23503")
    assert inbox(shop) == []
    parent = mapping("insert", "shop.customers", set={"id": "detail.id"})
    assert applier.apply(event({"id": 5}), parent).outcome is Outcome.APPLIED
    assert applier.apply(child, mapping("insert")).outcome is Outcome.APPLIED


def test_a_delete_waits_for_the_rows_that_refer_to_its_own(each_shop: Database, make: Make) -> None:
    """PostgreSQL 18 has a SQLSTATE of its own for RESTRICT."""
    each_shop.execute("""
        CREATE TABLE shop.notes (id bigint PRIMARY KEY, order_id bigint REFERENCES shop.orders ON DELETE RESTRICT);
        INSERT INTO shop.orders (id) VALUES (1);
        INSERT INTO shop.notes VALUES (1, 1);
    """)
    applier, delete = make(each_shop), mapping("delete")
    waits = applier.apply(event({"id": 1}, "order"), delete)
    assert (waits.outcome, waits.reason in {"23001", "23503"}) == (Outcome.RETRY, True)
    assert applier.apply(event({"id": 1}, "note"), mapping("delete", into="shop.notes")).outcome is Outcome.APPLIED
    assert applier.apply(event({"id": 1}, "order"), delete).outcome is Outcome.APPLIED


def test_a_delete_that_finds_nothing_is_ignored_and_its_key_is_claimed(shop: Database, make: Make) -> None:
    applier, received = make(shop), event({"id": 404})
    found = applier.apply(received, mapping("delete"))
    assert (found.outcome, found.reason) == (Outcome.IGNORED, "delete_missing")
    assert applier.apply(received, mapping("delete")).outcome is Outcome.DUPLICATE


# --- poison


@pytest.mark.parametrize(
    ("detail", "action", "options", "state"),
    [
        ({"id": 1, "status": "text"}, "upsert", {"set": {"quantity": "detail.status"}}, "22P02"),
        ({"id": 1, "status": 2**31}, "upsert", {"set": {"quantity": "detail.status"}}, "22003"),
        ({"id": 1, "status": "too long"}, "upsert", {"set": {"note": "detail.status"}}, "22001"),
        ({"id": 1, "status": "\0"}, "upsert", {}, "22P05"),
        ({"id": 1, "status": "\ud800"}, "upsert", {}, "22P02"),
        ({"id": 1, "status": None}, "upsert", {}, "23502"),
        ({"id": 7, "status": "x"}, "insert", {}, "23505"),
        ({"id": 1, "status": "impossible"}, "upsert", {}, "23514"),
        ({"id": 1, "status": "x"}, "upsert", {"set": {"no_column": "detail.status"}}, "42703"),
        ({"id": 1, "status": "x"}, "upsert", {"key": {"status": "detail.status"}, "set": {"id": "detail.id"}}, "42P10"),
        ({"id": 1, "status": "x"}, "upsert", {"into": "shop.no_table"}, "42P01"),
    ],
)
def test_what_can_never_be_applied_is_poison_and_the_next_event_goes_on(
    shop: Database, make: Make, *, detail: dict[str, Any], action: str, options: dict[str, Any], state: str
) -> None:
    shop.execute("INSERT INTO shop.orders VALUES (7, NULL, 'taken')")
    applier = make(shop)
    poison = applier.apply(event(detail), mapping(action, **options))
    assert (poison.outcome, poison.reason) == (Outcome.DEAD_LETTER, state)
    assert poison.message
    assert inbox(shop) == [], "the key stays free for the mended event"
    assert applier.apply(event({"id": 2, "status": "fine"}), mapping("upsert")).outcome is Outcome.APPLIED
    assert orders(shop) == [(2, "fine"), (7, "taken")]


def test_a_key_without_a_value_is_poison_before_anything_is_sent(make: Make) -> None:
    nowhere = make("host=127.0.0.1 port=1 dbname=nowhere")
    with pytest.raises(Malformed, match=r"detail\.id \(key id\)"):
        nowhere.apply(event({"status": "x"}), mapping("update"))


def test_a_key_that_no_index_entry_can_hold_is_poison(shop: Database, make: Make) -> None:
    # random digits: what compresses well would fit
    incompressible = "".join(str(number * 7919 % 104729) for number in range(4000))
    poison = make(shop).apply(event({"id": 1, "status": "x"}, incompressible), mapping("upsert"))
    assert (poison.outcome, poison.reason) == (Outcome.DEAD_LETTER, "54000")
    assert "idempotency key" in poison.message


# --- what passes by itself


@pytest.mark.parametrize("state", ["08006", "40001", "40P01", "53300", "55P03", "57014", "25006", "25P03", "58030"])
def test_what_the_event_is_not_to_blame_for_is_tried_again(shop: Database, make: Make, state: str) -> None:
    # a sequence is not rolled back, so the trigger fails once only
    shop.execute(f"""
        CREATE SEQUENCE shop.calls;
        CREATE FUNCTION shop.fail_once() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                IF nextval('shop.calls') = 1 THEN RAISE 'not now' USING ERRCODE = '{state}'; END IF;
                RETURN NEW;
            END $$;
        CREATE TRIGGER fail_once BEFORE INSERT ON shop.orders FOR EACH ROW EXECUTE FUNCTION shop.fail_once()
    """)
    applier, received = make(shop), event({"id": 1, "status": "new"})
    with pytest.raises(LegacyUnavailable) as caught:
        applier.apply(received, mapping("insert"))
    assert caught.value.hint
    assert inbox(shop) == []
    assert applier.apply(received, mapping("insert")).outcome is Outcome.APPLIED


def test_a_row_that_the_legacy_application_has_locked_is_waited_for_so_long_and_no_longer(
    shop: Database, make: Make
) -> None:
    shop.execute("INSERT INTO shop.orders VALUES (1, NULL, 'new')")
    applier, received = make(shop, lock_timeout=0.05), event({"id": 1, "status": "paid"})
    with shop.connect() as legacy, legacy.transaction():
        legacy.execute("SELECT * FROM shop.orders FOR UPDATE")
        with pytest.raises(LegacyUnavailable, match="lock timeout"):
            applier.apply(received, mapping("update"))
    assert applier.apply(received, mapping("update")).outcome is Outcome.APPLIED


def test_the_statement_timeout_ends_a_slow_trigger(shop: Database, make: Make) -> None:
    shop.execute("""
        CREATE FUNCTION shop.slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(30); RETURN NEW; END';
        CREATE TRIGGER slow BEFORE INSERT ON shop.orders FOR EACH ROW EXECUTE FUNCTION shop.slow()
    """)
    with pytest.raises(LegacyUnavailable, match="statement timeout"):
        make(shop, statement_timeout=0.05).apply(event({"id": 1, "status": "new"}), mapping("insert"))


def test_a_bridge_that_stops_between_statement_and_commit_holds_no_row_for_long(shop: Database, make: Make) -> None:
    """Paused by its host, or out of memory: the legacy application gets its rows back, and nothing is lost."""
    shop.execute("INSERT INTO shop.orders (id, status) VALUES (1, 'old')")
    paused = iter([True])

    def stand_still(step: str) -> None:
        if step == "executed" and next(paused, False):
            # waits for the row, which is ours, until the server takes it from us
            shop.execute("SET lock_timeout = '20s'; UPDATE shop.orders SET status = 'theirs' WHERE id = 1")

    applier = make(shop, on_step=stand_still, statement_timeout=0.3)
    work = mapping("update").prepare(event({"id": 1, "status": "new"}))
    with pytest.raises(LegacyUnavailable):
        applier.apply_all([work])
    assert orders(shop) == [(1, "theirs")]
    assert applier.apply_all([work]) == {work: Applied(Outcome.APPLIED)}
    assert orders(shop) == [(1, "new")]


def test_no_setting_outlives_the_transaction(shop: Database, make: Make) -> None:
    """Behind PgBouncer the session is somebody else's a moment later."""
    applier = make(shop, lock_timeout=0.05, statement_timeout=0.05)
    applier.apply(event({"id": 1, "status": "new"}), mapping("insert"))
    applier.apply(event({"id": 1, "status": "text"}), mapping("update", set={"quantity": "detail.status"}))
    assert applier._session._connection is not None
    names = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
    shown = [applier._session._connection.execute(f"SHOW {name}").fetchone() for name in names]
    assert shown == [("0",), ("0",), ("0",)]
    assert applier._session._connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE


def test_a_commit_is_durable_even_where_the_role_says_it_need_not_be(shop: Database, make: Make) -> None:
    shop.execute(f"ALTER DATABASE {shop.name} SET synchronous_commit = off")
    shop.execute("""
        CREATE TABLE shop.seen (setting text);
        CREATE FUNCTION shop.look() RETURNS trigger LANGUAGE plpgsql AS
            $$BEGIN INSERT INTO shop.seen VALUES (current_setting('synchronous_commit')); RETURN NEW; END$$;
        CREATE TRIGGER look BEFORE INSERT ON shop.orders FOR EACH ROW EXECUTE FUNCTION shop.look()
    """)
    assert make(shop).apply(event({"id": 1, "status": "new"}), mapping("insert")).outcome is Outcome.APPLIED
    assert shop.execute("TABLE shop.seen") == [("on",)]


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_a_strict_default_isolation_makes_no_difference(shop: Database, make: Make, level: str) -> None:
    shop.execute(f"ALTER DATABASE {shop.name} SET default_transaction_isolation = '{level}'")
    applier, received = make(shop), event({"id": 1, "status": "new"})
    outcomes = [applier.apply(received, mapping("insert")).outcome for _ in range(2)]
    assert outcomes == [Outcome.APPLIED, Outcome.DUPLICATE]


def test_a_database_that_may_only_be_read_is_waited_for(shop: Database, make: Make) -> None:
    shop.execute(f"ALTER DATABASE {shop.name} SET default_transaction_read_only = on")
    applier, received = make(shop), event({"id": 1, "status": "new"})
    with pytest.raises(LegacyUnavailable, match="25006") as caught:
        applier.apply(received, mapping("insert"))
    assert "primary" in caught.value.hint


def test_without_the_inbox_it_stops_and_says_so_instead_of_burying_every_event(shop: Database, make: Make) -> None:
    shop.execute("DROP TABLE figbridge.inbox")
    with pytest.raises(BridgeError, match="42P01") as caught:
        make(shop).apply(event({"id": 1, "status": "new"}), mapping("insert"))
    assert not caught.value.retryable
    assert "figbridge init" in caught.value.hint


def test_a_column_of_a_domain_that_forbids_null_may_be_left_out(each_shop: Database, make: Make) -> None:
    each_shop.execute("""
        CREATE DOMAIN shop.present AS text NOT NULL;
        CREATE DOMAIN shop.checked AS text CHECK (value IS NOT NULL);
        ALTER TABLE shop.orders ADD a shop.present DEFAULT 'a', ADD b shop.checked DEFAULT 'b', DROP note;
        INSERT INTO shop.orders (id, status) VALUES (1, 'old'), (2, 'old');
    """)
    applier = make(each_shop)
    for number, (action, identity) in enumerate((("update", 1), ("delete", 2), ("insert", 3), ("upsert", 4))):
        applied = applier.apply(event({"id": identity, "status": "new"}, str(number)), mapping(action))
        assert applied == Applied(Outcome.APPLIED)
    found = [(1, "new", "a", "b"), (3, "new", "a", "b"), (4, "new", "a", "b")]
    assert each_shop.execute("SELECT id, status, a, b FROM shop.orders ORDER BY id") == found
    columns = {"status": "detail.status", "a": "detail.a", "b": "detail.b"}
    for number, (column, reason) in enumerate((("a", "23502"), ("b", "23514"))):
        detail = {"id": 1, "status": "newer", "a": "a", "b": "b"} | {column: None}
        applied = applier.apply(event(detail, f"null {number}"), mapping("update", set=columns))
        assert (applied.outcome, applied.reason) == (Outcome.DEAD_LETTER, reason)
    each_shop.execute("ALTER TABLE shop.orders ALTER a DROP DEFAULT")
    assert applier.apply(event({"id": 5, "status": "new"}), mapping("insert")).reason == "23502", "there is no value"
    assert each_shop.execute("SELECT id, status, a, b FROM shop.orders ORDER BY id") == found


def test_an_encoding_that_lacks_a_character_is_poison_not_a_crash(database: Database, make: Make) -> None:
    name = f"{database.name}_latin"
    database.execute(f"CREATE DATABASE {name} ENCODING 'LATIN1' TEMPLATE template0")
    latin = Database(database.server, name)
    try:
        _shop(latin)
        applier = make(latin)
        assert applier.apply(event({"id": 1, "status": "größe"}, "schlüssel"), mapping("upsert")).outcome == "applied"
        for detail, key in (({"id": 2, "status": "€"}, None), ({"id": 2, "status": "x"}, "€")):
            assert applier.apply(event(detail, key), mapping("upsert")).reason in {"22P05", "22P02"}
        assert orders(latin) == [(1, "größe")]
        applier.close()
    finally:
        database.execute(f"DROP DATABASE {name} WITH (FORCE)")


# --- when the connection breaks


def test_a_backend_that_is_killed_between_statement_and_commit_costs_nothing(each_shop: Database, make: Make) -> None:
    kills = iter([True])

    def kill(step: str) -> None:
        if step == "executed" and next(kills, False):
            assert applier._session._connection is not None
            each_shop.execute("SELECT pg_terminate_backend(%s, 5000)", [applier._session._connection.info.backend_pid])

    applier, received = make(each_shop, on_step=kill), event({"id": 1, "status": "new"})
    with pytest.raises(LegacyUnavailable):
        applier.apply(received, mapping("insert"))
    assert (orders(each_shop), inbox(each_shop)) == ([], [])
    assert applier.apply(received, mapping("insert")) == Applied(Outcome.APPLIED)
    assert applier.apply(received, mapping("insert")) == Applied(Outcome.DUPLICATE)
    assert orders(each_shop) == [(1, "new")]


def test_a_session_that_is_killed_as_soon_as_it_is_there_is_opened_again(
    shop: Database, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills, asked = iter([True]), legacy.direct
    opened: list[psycopg.Connection] = []

    def kill(connection: psycopg.Connection) -> bool:
        opened.append(connection)
        if next(kills, False):
            shop.execute("SELECT pg_terminate_backend(%s, 5000)", [connection.info.backend_pid])
        return asked(connection)

    monkeypatch.setattr(legacy, "direct", kill)
    applier, received = make(shop), event({"id": 1, "status": "new"})
    with pytest.raises(LegacyUnavailable):
        applier.apply(received, mapping("insert"))
    assert opened[0].closed
    assert applier.apply(received, mapping("insert")) == Applied(Outcome.APPLIED)


def test_a_commit_whose_answer_is_lost_turns_out_to_be_done(shop: Database, make: Make) -> None:
    with _deaf_after_commit(shop) as dsn:
        applier, received = make(dsn), event({"id": 1, "status": "new"})
        with pytest.raises(LegacyUnavailable):
            applier.apply(received, mapping("insert"))
        assert applier.apply(received, mapping("insert")) == Applied(Outcome.DUPLICATE)
    assert orders(shop) == [(1, "new")]


@contextlib.contextmanager
def _deaf_after_commit(database: Database) -> Iterator[str]:
    """A DSN through a proxy that forwards the first COMMIT, and cuts the line when the server answers it."""
    target = conninfo.conninfo_to_dict(database.dsn)
    first = threading.Event()

    def serve(client: socket.socket, server: socket.socket) -> None:
        deaf = threading.Event()

        def answers() -> None:
            with client, server, contextlib.suppress(OSError):
                while (data := server.recv(65536)) and not deaf.is_set():
                    client.sendall(data)
                client.shutdown(socket.SHUT_RDWR)

        threading.Thread(target=answers, daemon=True).start()
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                if b"COMMIT\0" in data and not first.is_set():
                    first.set()
                    deaf.set()
                server.sendall(data)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection((str(target["host"]), int(str(target["port"]))))
                threading.Thread(target=serve, args=(client, server), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        port = listener.getsockname()[1]
        yield conninfo.make_conninfo(database.dsn, host="127.0.0.1", port=port, sslmode="disable", gssencmode="disable")
        listener.shutdown(socket.SHUT_RDWR)
    assert first.is_set()
