"""Many events in one transaction: what each of them would have done alone, and a bad one is found."""

import json
import random
import time
from collections.abc import Iterator
from contextlib import closing
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from figbridge.errors import LegacyUnavailable
from figbridge.metrics import Metrics
from figbridge.reverse.apply import Applier
from figbridge.reverse.drift import Drift
from figbridge.reverse.mapping import Mappings, Work
from figbridge.reverse.message import parse, write
from figbridge.reverse.outcome import Applied
from fixtures.postgres import Database
from fixtures.reverse import count, make_shop, mapping, orders, work


@pytest.fixture
def shop(database: Database) -> Database:
    return make_shop(database)


@pytest.fixture
def applier(shop: Database) -> Iterator[Applier]:
    with closing(Applier(shop.dsn, statement_timeout=10, lock_timeout=0.2)) as found:
        yield found


def outcomes(applier: Applier, works: list[Work]) -> list[tuple[str, str]]:
    found = applier.apply_all(works)
    return [(found[it].outcome.value, found[it].reason) for it in works]


APPLIED = ("applied", "")


def transactions(database: Database) -> int:
    return int(database.execute("SELECT count(DISTINCT xmin::text) FROM figbridge.inbox")[0][0])


def test_five_hundred_events_are_one_transaction(shop: Database, applier: Applier) -> None:
    upsert = mapping()
    assert outcomes(applier, [work(upsert, f"e{n}", id=n, status="a") for n in range(500)]) == [APPLIED] * 500
    assert orders(shop) == [(n, "a") for n in range(500)]
    assert transactions(shop) == 1


@pytest.mark.parametrize("bad", [{"n": "x"}, {"customer": 404}, {"n": 2**40}], ids=["22P02", "23503", "22003"])
def test_one_bad_event_is_found_and_only_what_follows_it_on_its_row_waits(
    shop: Database, applier: Applier, bad: dict[str, Any]
) -> None:
    upsert = mapping()
    works = [work(upsert, f"e{n}", id=n, status="a") for n in range(300)]
    works[123] = work(upsert, "bad", id=123, **bad)
    works.append(work(upsert, "later", id=123, status="later"))
    found = outcomes(applier, works)
    waits = "customer" in bad
    assert [it for n, it in enumerate(found[:-1]) if n != 123] == [APPLIED] * 299
    assert found[123][0] == ("retried" if waits else "dead_letter")
    assert found[-1] == (("retried", "row_waits") if waits else APPLIED)
    expected = [(n, "a") for n in range(300) if n != 123] + ([] if waits else [(123, "later")])
    assert orders(shop) == sorted(expected)
    assert transactions(shop) < 12


def test_events_of_one_row_keep_their_order_within_a_batch(shop: Database, applier: Applier) -> None:
    shop.execute("""
        CREATE TABLE shop.seen (place int GENERATED ALWAYS AS IDENTITY, id bigint, status text);
        CREATE FUNCTION shop.see() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN INSERT INTO shop.seen (id, status) VALUES (NEW.id, NEW.status); RETURN NEW; END';
        CREATE TRIGGER see AFTER INSERT OR UPDATE ON shop.orders FOR EACH ROW EXECUTE FUNCTION shop.see()
    """)
    insert, update, delete = mapping("insert"), mapping("update", set={"status": "detail.status"}), mapping("delete")
    insert.primary_key = ("id",)
    works = [
        work(insert, "1", id=1, status="new"),
        work(insert, "2", id=2, status="new"),
        work(update, "3", id=1, status="paid"),
        work(update, "4", id=1, status="sent"),
        work(update, "5", id=2, status="paid"),
        work(delete, "6", id=2),
        work(insert, "7", id=2, status="again"),
    ]
    assert outcomes(applier, works) == [APPLIED] * 7
    assert orders(shop) == [(1, "sent"), (2, "again")]
    assert shop.execute("SELECT status FROM shop.seen WHERE id = 1 ORDER BY place") == [("new",), ("paid",), ("sent",)]
    assert transactions(shop) == 1, "each event fired the triggers, in one transaction"


def test_two_spellings_of_one_key_lose_no_update(shop: Database, applier: Applier) -> None:
    shop.execute("INSERT INTO shop.orders (id) VALUES (7)")
    status, note = (mapping("update", set={column: "detail.value"}) for column in ("status", "note"))
    assert outcomes(applier, [work(status, "1", id="7", value="a"), work(status, "2", id="007", value="b")]) == [
        APPLIED,
        APPLIED,
    ]
    assert outcomes(applier, [work(note, "3", id="7", value="c")]) == [APPLIED]
    assert shop.execute("SELECT status, note FROM shop.orders") == [("b", "c")]


def test_repeated_and_reused_keys_within_a_batch(shop: Database, applier: Applier) -> None:
    upsert = mapping()
    works = [
        work(upsert, "a", id=1, status="x"),
        work(upsert, "a", id=1, status="x"),
        work(upsert, "b", id=2, status="y"),
        work(upsert, "a", id=3, status="z"),
    ]
    assert outcomes(applier, works) == [APPLIED, ("duplicate", ""), APPLIED, ("dead_letter", "key_reuse")]
    assert orders(shop) == [(1, "x"), (2, "y")]


def test_a_row_that_somebody_holds_holds_up_nobody_else(shop: Database, applier: Applier) -> None:
    upsert = mapping()
    applier.apply_all([work(upsert, f"a{n}", id=n, status="a") for n in range(20)])
    with shop.connect() as legacy, legacy.transaction():
        legacy.execute("SELECT * FROM shop.orders WHERE id = 5 FOR UPDATE")
        found = outcomes(applier, [work(upsert, f"b{n}", id=n, status="b") for n in range(20)])
    assert found.count(APPLIED) == 19
    assert found[5] == ("retried", "55P03")
    assert orders(shop) == [(n, "a" if n == 5 else "b") for n in range(20)]


def test_a_locked_table_costs_one_timeout_and_little_more(shop: Database, applier: Applier) -> None:
    works = [work(mapping(), f"e{n}", id=n, status="a") for n in range(100)]
    with shop.connect() as legacy, legacy.transaction():
        legacy.execute("LOCK TABLE shop.orders IN SHARE MODE")
        begun = time.monotonic()
        assert outcomes(applier, works) == [("retried", "55P03")] * 100
        assert time.monotonic() - begun < 10, "199 timeouts would take 40 s"
    assert outcomes(applier, works) == [APPLIED] * 100


def test_slow_statements_cost_two_timeouts_and_hold_up_nobody_else(shop: Database) -> None:
    shop.execute("""
        CREATE FUNCTION shop.slow() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN IF NEW.id >= 50 THEN PERFORM pg_sleep(30); END IF; RETURN NEW; END';
        CREATE TRIGGER slow BEFORE INSERT ON shop.orders FOR EACH ROW EXECUTE FUNCTION shop.slow()
    """)
    customer = mapping("insert", into="shop.customers", set={"id": "detail.id"})
    works = [work(mapping(), f"e{n}", id=n, status="a") for n in range(80)]
    works.append(work(customer, "other", id=1))
    begun = time.monotonic()
    with closing(Applier(shop.dsn, statement_timeout=0.5, lock_timeout=0.2)) as impatient:
        found = outcomes(impatient, works)
    assert found == [APPLIED] * 50 + [("retried", "57014")] * 30 + [APPLIED]
    assert time.monotonic() - begun < 10, "each of thirty would take 15 s"


FAIL = """
    CREATE FUNCTION shop.fail() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF NEW.id = 5 THEN RAISE 'not now' USING ERRCODE = '{}'; END IF;
            RETURN NEW;
        END $$;
    CREATE TRIGGER fail BEFORE INSERT ON shop.orders FOR EACH ROW EXECUTE FUNCTION shop.fail()
"""


@pytest.mark.parametrize("state", ["08001", "53200", "53400", "57000"])
def test_a_statement_that_sounds_like_a_server_that_is_away_holds_up_nobody_else(
    shop: Database, applier: Applier, state: str
) -> None:
    shop.execute(FAIL.format(state))
    found = outcomes(applier, [work(mapping(), f"e{n}", id=n, status="a") for n in range(20)])
    assert found == [("retried", state) if n == 5 else APPLIED for n in range(20)]


@pytest.mark.parametrize("state", ["53100", "53300", "57P03", "58030"])
def test_a_server_that_is_not_well_is_waited_for_and_the_log_has_the_statement(
    shop: Database, applier: Applier, state: str
) -> None:
    shop.execute(FAIL.format(state))
    with pytest.raises(LegacyUnavailable) as caught:
        outcomes(applier, [work(mapping(), f"e{n}", id=n, status="a") for n in range(20)])
    assert 'INSERT INTO "shop"."orders"' in caught.value.hint


# --- those that run ahead of others


def by_note(action: str) -> Any:
    values = {"note": "detail.note", "quantity": "detail.n"}
    key = {"id": "detail.id"}
    return mapping(action, key={}, set=key | values) if action == "insert" else mapping(action, set=values)


@pytest.mark.parametrize("bad", ["update", "insert"], ids=["of the same statement", "of another statement"])
def test_what_runs_ahead_of_what_makes_room_for_it_is_no_dead_letter(
    shop: Database, applier: Applier, bad: str
) -> None:
    shop.execute("ALTER TABLE shop.orders ADD UNIQUE (note)")
    shop.execute("INSERT INTO shop.orders (id, note) VALUES (1, 'taken'), (3, 'other')")
    insert = by_note("insert")
    works = [
        work(by_note("update"), "room", id=1, note="moved", n=1),
        work(by_note(bad), "bad", id=3, note="bad", n="x"),
        work(insert, "there", id=2, note="taken"),
        work(insert, "never", id=4, note="taken"),
    ]
    dead = ("dead_letter", "23505")
    assert outcomes(applier, works) == [APPLIED, ("dead_letter", "22P02"), APPLIED, dead]
    assert shop.execute("SELECT id, note FROM shop.orders ORDER BY id") == [(1, "moved"), (2, "taken"), (3, "other")]


def test_what_runs_ahead_keeps_its_place_before_what_follows_it(shop: Database, applier: Applier) -> None:
    shop.execute("ALTER TABLE shop.orders ADD UNIQUE (note)")
    shop.execute("INSERT INTO shop.orders (id, note) VALUES (1, 'taken'), (3, 'other')")
    works = [
        work(by_note("update"), "room", id=1, note="moved", n=1),
        work(by_note("update"), "bad", id=3, note="bad", n="x"),
        work(by_note("upsert"), "there", id=2, note="taken"),
        work(by_note("update"), "behind", id=2, note="last"),
        work(by_note("upsert"), "depends", id=4, note="taken"),
    ]
    assert outcomes(applier, works) == [APPLIED, ("dead_letter", "22P02"), APPLIED, APPLIED, APPLIED]
    notes = [(1, "moved"), (2, "last"), (3, "other"), (4, "taken")]
    assert shop.execute("SELECT id, note FROM shop.orders ORDER BY id") == notes


def test_a_rule_for_conflicts_says_nothing_of_what_runs_ahead(shop: Database, applier: Applier) -> None:
    shop.execute("ALTER TABLE shop.orders ADD UNIQUE (note)")
    shop.execute("INSERT INTO shop.orders (id, note) VALUES (1, 'taken'), (3, 'other')")
    ruled = mapping("upsert", set={"note": "detail.note"}, conflicts={"policy": "new_wins"})
    works = [
        work(by_note("update"), "room", id=1, note="moved", n=1),
        work(by_note("update"), "bad", id=3, note="bad", n="x"),
        work(ruled, "there", id=2, note="taken"),
    ]
    assert outcomes(applier, works) == [APPLIED, ("dead_letter", "22P02"), APPLIED]
    assert count(shop, "figbridge.conflict") == 0


def test_a_value_that_a_waiting_event_is_to_give_up_is_waited_for(shop: Database, applier: Applier) -> None:
    shop.execute("ALTER TABLE shop.orders ADD UNIQUE (note)")
    shop.execute("INSERT INTO shop.orders (id, note) VALUES (1, 'taken')")
    works = [
        work(by_note("update"), "room", id=1, note="moved", n=1),
        work(by_note("insert"), "there", id=2, note="taken"),
        work(mapping("insert", into="shop.customers", set={"id": "detail.id"}), "elsewhere", id=2),
        work(mapping("insert", into="shop.customers", set={"id": "detail.id"}), "again", id=2),
    ]
    with shop.connect() as legacy, legacy.transaction():
        legacy.execute("SELECT * FROM shop.orders WHERE id = 1 FOR UPDATE")
        waits = [("retried", "55P03"), ("retried", "earlier_waits")]
        assert outcomes(applier, works) == [*waits, APPLIED, ("dead_letter", "23505")]
    assert outcomes(applier, works[:2]) == [APPLIED, APPLIED]


def test_nobody_waits_for_an_event_that_waits_for_its_row(shop: Database, applier: Applier) -> None:
    shop.execute("ALTER TABLE shop.orders ADD UNIQUE (note)")
    shop.execute("INSERT INTO shop.orders (id, note) VALUES (1, 'taken')")
    works = [
        work(by_note("update"), "waits", id=2, note="mine"),
        work(by_note("insert"), "brings", id=2, note="taken"),
    ]
    assert outcomes(applier, works) == [("retried", "update_missing"), ("dead_letter", "23505")]


# --- partial events


def test_absent_null_and_unchanged_are_three_things(shop: Database, applier: Applier) -> None:
    for action in ("update", "upsert"):
        shop.execute("TRUNCATE shop.orders")
        shop.execute("INSERT INTO shop.orders (id, status, note) SELECT n, 's', 'n' FROM generate_series(1, 4) AS n")
        partial = mapping(action)
        works = [
            work(partial, f"{action}1", id=1, status="new"),
            work(partial, f"{action}2", id=2, note=None),
            work(partial, f"{action}3", id=3),
            work(partial, f"{action}4", id=4, status=None, note="new"),
        ]
        assert outcomes(applier, works) == [APPLIED] * 4
        assert shop.execute("SELECT status, note FROM shop.orders ORDER BY id") == [
            ("new", "n"), ("s", None), ("s", "n"), (None, "new"),
        ]  # fmt: skip


def test_an_insert_leaves_an_absent_column_to_its_default(shop: Database, applier: Applier) -> None:
    shop.execute("ALTER TABLE shop.orders ALTER status SET DEFAULT 'fresh'")
    insert = mapping("insert")
    assert outcomes(applier, [work(insert, "1", id=1), work(insert, "2", id=2, status=None)]) == [APPLIED, APPLIED]
    assert orders(shop) == [(1, "fresh"), (2, None)]


# --- deletes, several statements, SQL


def test_a_soft_delete_marks_the_row(shop: Database, applier: Applier) -> None:
    shop.execute("INSERT INTO shop.orders (id, status) VALUES (1, 'new')")
    soft = mapping("delete", soft={"status": "'gone'"})
    assert outcomes(applier, [work(soft, "1", id=1), work(soft, "2", id=2)]) == [APPLIED, ("ignored", "delete_missing")]
    assert orders(shop) == [(1, "gone")]


def test_several_statements_are_one_transaction_and_keep_their_order(shop: Database, applier: Applier) -> None:
    shop.execute("CREATE TABLE shop.stock (sku text PRIMARY KEY, n int CHECK (n >= 0)); ")
    shop.execute("INSERT INTO shop.stock VALUES ('a', 3), ('''; DROP TABLE shop.stock; --', 3)")
    sell = {
        "sql": "UPDATE shop.stock SET n = n - %(n)s WHERE sku = %(sku)s",
        "with": {"n": "detail.n", "sku": "detail.sku"},
    }
    parent = {"into": "shop.customers", "action": "upsert", "key": {"id": "detail.customer"}}
    child = {"into": "shop.orders", "action": "insert", "set": {"id": "detail.id", "customer_id": "detail.customer"}}
    several = mapping(into=None, action=None, key=None, set=None, statements=[parent, child, sell])
    works = [
        work(several, "1", id=1, customer=5, n=2, sku="a"),
        work(several, "2", id=2, customer=6, n=2, sku="a"),  # more than there are: nothing of it may stay
        work(several, "3", id=3, customer=7, n=1, sku="'; DROP TABLE shop.stock; --"),
        work(several, "4", id=4, customer=8, n="1); DROP TABLE shop.stock; --", sku="a"),
    ]
    assert [it for it, _ in outcomes(applier, works)] == ["applied", "dead_letter", "applied", "dead_letter"]
    assert shop.execute("SELECT id, customer_id FROM shop.orders ORDER BY id") == [(1, 5), (3, 7)]
    assert shop.execute("SELECT id FROM shop.customers ORDER BY id") == [(5,), (7,)]
    assert shop.execute("SELECT n FROM shop.stock ORDER BY n") == [(1,), (2,)]


def test_sql_that_the_driver_refuses_is_poison_and_not_a_crash(applier: Applier) -> None:
    wrong = mapping(
        into=None, action=None, key=None, set=None, sql="SELECT %(a)s WHERE 5 % 2 = 1", **{"with": {"a": "id"}}
    )
    assert [it for it, _ in outcomes(applier, [work(wrong, "1")])] == ["dead_letter"]
    assert outcomes(applier, [work(mapping(), "2", id=1)]) == [APPLIED]


def test_sql_that_ends_the_transaction_unseen_keeps_nothing_and_is_poison(shop: Database) -> None:
    """Where a backslash is an escape in any string, which nobody has set for twenty years, it is read otherwise."""
    shop.execute(f"ALTER DATABASE {shop.name} SET standard_conforming_strings = off")
    shop.execute(f"ALTER DATABASE {shop.name} SET escape_string_warning = off")
    hidden = mapping(into=None, action=None, key=None, set=None, sql=r"SELECT '\''; ROLLBACK; SELECT '\''")
    works = [work(mapping(), "1", id=1), work(hidden, "2"), work(mapping(), "3", id=3)]
    with closing(Applier(shop.dsn, statement_timeout=10, lock_timeout=2)) as applier:
        assert [it for it, _ in outcomes(applier, works)] == ["applied", "dead_letter", "applied"]
        assert outcomes(applier, [work(hidden, "4")]) == [("dead_letter", "2D000")]
    assert orders(shop) == [(1, None), (3, None)]
    assert shop.execute("SELECT idempotency_key FROM figbridge.inbox ORDER BY 1") == [("1",), ("3",)]


def test_a_dead_letter_says_which_statement_failed(applier: Applier) -> None:
    bad = work(mapping(), "1", id=1, n="x")
    applied: Applied = applier.apply_all([bad])[bad]
    assert applied.statement.startswith('INSERT INTO "shop"."orders"')


# --- a model


class Model:
    """What should be there after each event, applied alone, in order."""

    def __init__(self) -> None:
        self.rows: dict[int, str | None] = {}
        self.versions: dict[int, int] = {}
        self.keys: dict[str, Any] = {}

    def apply(self, action: str, identity: str, row: int, version: int, status: str | None) -> str:
        payload = (action, row, version, status)
        if identity in self.keys:
            return "duplicate" if self.keys[identity] == payload else "dead_letter"
        if action == "update" and version > self.versions.get(row, -1) and row not in self.rows:
            return "retried"
        self.keys[identity] = payload
        if version <= self.versions.get(row, -1):
            return "ignored"
        self.versions[row] = version
        if action == "delete":
            return "applied" if self.rows.pop(row, "none") != "none" else "ignored"
        self.rows[row] = status
        return "applied"


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["upsert", "update", "delete"]),
        st.integers(0, 12).map(str),
        st.integers(0, 3),
        st.integers(0, 6),
        st.sampled_from([None, "a", "b"]),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=EVENTS, seed=st.integers(0, 9))
def test_batches_do_what_single_events_would(shop: Database, applier: Applier, events: list[Any], seed: int) -> None:
    """Without waiting events: the model has no park, so a run ends where one would wait."""
    shop.execute("TRUNCATE shop.orders, shop.customers, figbridge.inbox, figbridge.entity_version")
    mappings = {name: mapping(name, version="detail.v") for name in ("upsert", "update", "delete")}
    model, works, expected = Model(), [], []
    for action, identity, row, version, status in events:
        outcome = model.apply(action, identity, row, version, status)
        if outcome == "retried":
            break
        expected.append(outcome)
        works.append(work(mappings[action], identity, id=row, v=version, status=status, action=action))
    chance, found = random.Random(seed), []
    while works:
        size = chance.randint(1, 12)
        batch, works = works[:size], works[size:]
        found += [outcome for outcome, _ in outcomes(applier, batch)]
    assert found == expected
    assert dict(orders(shop)) == model.rows


def test_a_version_stops_what_is_late_even_without_its_key(shop: Database, applier: Applier) -> None:
    upsert, delete = mapping(version="detail.position"), mapping("delete", version="detail.position")

    def at(lsn: str, ordinal: int = 0) -> dict[str, Any]:
        return {"position": {"commit_lsn": lsn, "ordinal": ordinal}}

    assert outcomes(applier, [work(upsert, "1", id=1, status="a", **at("0/A0"))]) == [APPLIED]
    assert outcomes(applier, [work(upsert, "2", id=1, status="b", **at("0/A0", 1))]) == [APPLIED]
    assert outcomes(applier, [work(upsert, "3", id=1, status="late", **at("0/9F", 7))]) == [
        ("ignored", "stale_version")
    ]
    assert outcomes(applier, [work(delete, "4", id=1, **at("1/0"))]) == [APPLIED]
    shop.execute("TRUNCATE figbridge.inbox")  # as if months had passed
    replayed = [work(upsert, str(n), id=1, status="z", **at("0/A0", n)) for n in range(3)]
    assert outcomes(applier, replayed) == [("ignored", "stale_version")] * 3
    assert outcomes(applier, [work(delete, "4", id=1, **at("1/0"))]) == [("ignored", "stale_version")]
    assert orders(shop) == []
    assert outcomes(applier, [work(upsert, "5", id=1, status="again", **at("1/1"))]) == [APPLIED]
    assert orders(shop) == [(1, "again")]


@pytest.mark.parametrize("conflicts", [None, {"policy": "new_wins"}])
def test_an_insert_that_names_no_column_is_a_row_of_defaults(shop: Database, applier: Applier, conflicts: Any) -> None:
    shop.execute("CREATE TABLE shop.drafts (id serial PRIMARY KEY, status text DEFAULT 'draft')")
    insert = mapping("insert", into="shop.drafts", key=None, set={"status": "detail.status"}, conflicts=conflicts)
    works = [work(insert, "1"), work(insert, "2"), work(insert, "3", status="paid"), work(insert, "4", status=None)]
    assert outcomes(applier, works) == [APPLIED] * 4
    assert outcomes(applier, [work(insert, "5"), work(insert, "2")]) == [APPLIED, ("duplicate", "")]
    assert [status for (status,) in shop.execute("SELECT status FROM shop.drafts ORDER BY id")] == [
        "draft",
        "draft",
        "paid",
        None,
        "draft",
    ]


UUID = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"


@pytest.mark.parametrize(
    "case",
    [
        ("uuid", [UUID, UUID.upper(), UUID.replace("-", ""), f"{{{UUID}}}"], UUID),
        ("numeric", [42, "42", Decimal("42.0"), Decimal("4.2e1"), " 42 ", "42."], "42"),
        ("numeric", ["-0.50", Decimal("-0.5"), "-5e-1"], "-0.5"),
        ("numeric", [0, "-0", Decimal("0.00"), "0e-9"], "0"),
        ("numeric(8, 2)", [Decimal("42.005"), Decimal("42.01"), "42.0149"], "42.01"),
        ("numeric(8, 2)", [Decimal("-0.005"), "-0.01"], "-0.01"),
        ("numeric(8, 2)", [Decimal("0.004"), 0], "0"),
        ("float8", [42, Decimal("42.0"), "4.2e1"], "42"),
        ("int8", [42, "42", "042", " +42 "], "42"),
        ("char(4)", ["ab", "ab ", "ab   "], "ab"),
        ("shop.code", [" 42", Decimal("42.04"), "42"], "42"),
        ("text", ["ab"], "ab"),
    ],
)
@pytest.mark.parametrize("action", ["upsert", "insert"])
def test_a_key_is_one_entity_however_it_is_written(
    shop: Database, applier: Applier, case: tuple[str, list[Any], str], action: str
) -> None:
    declared, written, kept = case
    shop.execute(
        "CREATE DOMAIN shop.price AS numeric(8, 1); CREATE DOMAIN shop.code AS shop.price;"
        f"CREATE TABLE shop.keyed (id {declared}, part {declared}, status text, PRIMARY KEY (id, part));"
        f"CREATE TABLE shop.named (id {declared} PRIMARY KEY, status text)"
    )
    columns: list[dict[str, Any]] = [{"id": "detail.id"}, {"id": "detail.id", "part": "detail.part"}]
    one, both = (
        {"key": key, "set": {"status": "detail.status"}}
        if action == "upsert"
        else {"key": None, "set": {**key, "status": "detail.status"}, "conflicts": {"policy": "new_wins"}}
        for key in columns
    )
    simple = mapping(action, into="shop.named", version="detail.v", **one)
    composite = mapping(action, into="shop.keyed", version="detail.v", **both)
    mappings = Mappings([])
    mappings.all.extend([simple, composite])
    Drift(applier.connection, mappings, Metrics()).look()
    for of in (simple, composite):
        works = [
            of.prepare(parse(
                f'{{"id":"{number}","source":"shop.next","detail-type":"order","detail":'
                f'{write({"id": value, "part": value, "status": str(number), "v": 99 - number}, "detail")}}}'.encode()
            ))
            for number, value in enumerate(written, 10 if of is simple else 30)
        ]  # fmt: skip
        assert outcomes(applier, works) == [APPLIED] + [("ignored", "stale_version")] * (len(written) - 1)
    assert shop.execute("SELECT status FROM shop.named UNION ALL SELECT status FROM shop.keyed") == [("10",), ("30",)]
    assert shop.execute("SELECT identity FROM figbridge.entity_version ORDER BY scope DESC") == [
        (kept,),
        (json.dumps([kept, kept], separators=(",", ":")),),
    ]


@pytest.mark.parametrize("declared", ["uuid", "numeric", "numeric(8, 2)", "int8", "float8", "char(4)"])
@pytest.mark.parametrize(
    "value", ["", "x", "1e400000", "1e300000000", "1e-300000000", "0e-300000000", "NaN", "9" * 5000]
)
def test_a_key_that_is_no_value_of_its_type_is_for_the_server(
    shop: Database, applier: Applier, declared: str, value: str
) -> None:
    shop.execute(f"CREATE TABLE shop.named (id {declared} PRIMARY KEY, status text)")
    mappings = Mappings([])
    mappings.all.append(mapping(into="shop.named", set={"status": "detail.status"}, version="detail.v"))
    Drift(applier.connection, mappings, Metrics()).look()
    event = work(mappings.all[0], "1", id=value, status="a", v=1)
    applied = applier.apply_all([event])[event]
    known = shop.execute("SELECT count(*) FROM shop.named")[0][0]
    assert (applied.outcome.value == "applied") == bool(known)


def test_a_version_of_an_event_that_waits_is_not_kept(shop: Database, applier: Applier) -> None:
    update, upsert = mapping("update", version="detail.v"), mapping(version="detail.v")
    assert outcomes(applier, [work(update, "2", id=1, v=2, status="b")]) == [("retried", "update_missing")]
    assert count(shop, "figbridge.entity_version") == 0
    assert outcomes(applier, [work(upsert, "1", id=1, v=1, status="a"), work(update, "2", id=1, v=2, status="b")]) == [
        APPLIED,
        APPLIED,
    ]
    assert orders(shop) == [(1, "b")]


def test_what_waits_says_for_which_row(applier: Applier) -> None:
    child = work(mapping(), "1", id=1, customer=10**18 + 1)
    awaited = applier.apply_all([child])[child].awaited
    assert awaited is not None
    assert (awaited.table, awaited.columns) == (("shop", "customers"), ("id",))
    assert json.loads(awaited.document) == {"id": 10**18 + 1}
