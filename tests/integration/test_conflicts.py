"""Conflicts: what the owner of a row did meanwhile, found under a lock, decided by the rules, and kept."""

import json
import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from figbridge import mark
from figbridge.reverse.apply import Applier
from figbridge.reverse.dryrun import Difference, Shadow
from figbridge.reverse.guard import LoopGuard
from figbridge.reverse.mapping import Mapping, Work
from figbridge.reverse.message import Malformed
from figbridge.reverse.outcome import Awaited
from figbridge.reverse.touched import Touching
from fixtures.clock import until
from fixtures.postgres import Database
from fixtures.reverse import count, event, make_shop, mapping, work

BEFORE = {"status": "detail.before.status", "note": "detail.before.note", "quantity": "detail.before.n"}
APPLIED = ("applied", "")


@pytest.fixture
def shop(database: Database) -> Database:
    make_shop(database)
    database.execute("ALTER TABLE shop.orders ADD version int")
    return database


@pytest.fixture
def applier(shop: Database) -> Iterator[Applier]:
    with closing(Applier(shop.dsn, statement_timeout=10, lock_timeout=0.2)) as found:
        yield found


def ruled(policy: str = "new_wins", action: str = "update", *, named: Any = None, **conflicts: Any) -> Mapping:
    options = named or {}
    if action == "update" and "before" not in conflicts and "version" not in conflicts:
        conflicts["before"] = BEFORE
    return mapping(action, conflicts={"policy": policy, **conflicts}, **options)


def outcomes(applier: Applier, works: list[Work]) -> list[tuple[str, str]]:
    found = applier.apply_all(works)
    return [(found[it].outcome.value, found[it].reason) for it in works]


def rows(shop: Database) -> list[Any]:
    return shop.execute("SELECT id, status, note, quantity FROM shop.orders ORDER BY id")


def kept(shop: Database) -> list[Any]:
    return shop.execute("SELECT kind, decision, state FROM figbridge.conflict ORDER BY id")


def made(shop: Database, *identities: int) -> None:
    for identity in identities or (1,):
        shop.execute("INSERT INTO shop.orders (id, status, note, quantity) VALUES (%s, 'new', 'n', 5)", [identity])


def partition(shop: Database) -> None:
    """Let shop.orders be partitioned, twice."""
    shop.execute("""
        ALTER TABLE shop.orders RENAME TO plain;
        CREATE TABLE shop.orders (
            LIKE shop.plain, PRIMARY KEY (id), FOREIGN KEY (customer_id) REFERENCES shop.customers
        ) PARTITION BY RANGE (id);
        CREATE TABLE shop.orders_low PARTITION OF shop.orders FOR VALUES FROM (0) TO (100) PARTITION BY RANGE (id);
        CREATE TABLE shop.orders_low_all PARTITION OF shop.orders_low FOR VALUES FROM (0) TO (100);
        DROP TABLE shop.plain;
    """)


SEEN = {"status": "new", "note": "n", "n": 5}


def test_what_is_as_it_was_seen_is_no_conflict(shop: Database, applier: Applier) -> None:
    made(shop, 1, 2)
    update = ruled("reject")
    shop.execute("UPDATE shop.orders SET status = 'paid' WHERE id = 2")
    works = [
        work(update, "1", id=1, status="paid", before=SEEN),
        work(update, "2", id=2, status="paid", before=SEEN),  # the owner did the same
    ]
    assert outcomes(applier, works) == [APPLIED, APPLIED]
    assert [status for _, status, *_ in rows(shop)] == ["paid", "paid"]
    assert kept(shop) == []


@pytest.mark.parametrize(
    ("policy", "outcome", "status", "decision"),
    [
        ("new_wins", APPLIED, "paid", "new"),
        ("legacy_wins", ("ignored", "update_conflict"), "cancelled", "legacy"),
        ("reject", ("ignored", "update_conflict"), "cancelled", "rejected"),
    ],
)
@pytest.mark.parametrize("action", ["update", "upsert"])
def test_the_owner_changed_the_row(
    shop: Database, applier: Applier, *, policy: str, outcome: Any, status: str, decision: str, action: str
) -> None:
    made(shop)
    shop.execute("UPDATE shop.orders SET status = 'cancelled'")
    update = ruled(policy, action, before=BEFORE)
    assert outcomes(applier, [work(update, "1", id=1, status="paid", before=SEEN)]) == [outcome]
    assert rows(shop) == [(1, status, "n", 5)]
    assert kept(shop) == [("update_conflict", decision, "open" if policy == "reject" else "decided")]
    ((before, expected, proposed, after, columns, sent),) = shop.execute(
        "SELECT before, expected, proposed, after, columns, event FROM figbridge.conflict"
    )
    assert before == {"id": 1, "customer_id": None, "status": "cancelled", "note": "n", "quantity": 5}
    assert expected == {"status": "new", "note": "n", "quantity": 5}
    assert proposed == {"id": 1, "status": "paid"}
    assert after == (proposed if decision == "new" else None)
    assert columns == {"status": decision}
    assert sent["detail"]["before"] == SEEN
    again = work(update, "1", id=1, status="paid", before=SEEN)
    assert outcomes(applier, [again]) == [("duplicate", "")], "a repetition is decided once"
    assert len(kept(shop)) == 1


def test_merging_takes_each_column_from_who_changed_it(shop: Database, applier: Applier) -> None:
    made(shop, 1, 2, 3)
    merge = ruled("merge_columns")
    shop.execute("UPDATE shop.orders SET note = 'legacy', quantity = 6")
    works = [
        work(merge, "1", id=1, status="paid", note="n", n=5, before=SEEN),
        work(merge, "2", id=2, status="paid", note="ours", n=5, before=SEEN),  # both changed the note
        work(merge, "3", id=3, status="paid", note="legacy", n=6, before=SEEN),  # both alike
    ]
    assert outcomes(applier, works) == [APPLIED, ("ignored", "update_conflict"), APPLIED]
    assert rows(shop) == [(1, "paid", "legacy", 6), (2, "new", "legacy", 6), (3, "paid", "legacy", 6)]
    assert kept(shop) == [("update_conflict", "merged", "decided"), ("update_conflict", "rejected", "open")]
    tie = ruled("merge_columns", tie="new_wins")
    assert outcomes(applier, [work(tie, "4", id=2, status="paid", note="ours", n=5, before=SEEN)]) == [APPLIED]
    assert rows(shop)[1] == (2, "paid", "ours", 6)


def test_a_delta_adds_what_the_new_system_added(shop: Database, applier: Applier) -> None:
    made(shop)
    groups = [{"columns": ["quantity"], "policy": "delta"}]
    sell = ruled("legacy_wins", groups=groups)
    assert outcomes(applier, [work(sell, "1", id=1, n=3, before=SEEN)]) == [APPLIED]
    shop.execute("UPDATE shop.orders SET quantity = quantity + 10, note = 'counted'")
    works = [work(sell, "2", id=1, n=2, note="ours", before={"n": 3, "note": "n"})]
    assert outcomes(applier, works) == [APPLIED]
    assert rows(shop) == [(1, "new", "counted", 12)]
    shop.execute("UPDATE shop.orders SET quantity = 15")
    works = [work(sell, "2b", id=1, n=15, before={"n": 12})]  # both added 3
    assert outcomes(applier, works) == [APPLIED]
    assert rows(shop) == [(1, "new", "counted", 18)]
    assert shop.execute("DELETE FROM figbridge.conflict WHERE id > 1 RETURNING kind") == [("update_conflict",)]
    assert kept(shop) == [("update_conflict", "merged", "decided")]
    assert shop.execute("SELECT columns FROM figbridge.conflict") == [({"quantity": "delta", "note": "legacy"},)]
    shop.execute("UPDATE shop.orders SET quantity = NULL")
    assert outcomes(applier, [work(sell, "3", id=1, n=2, before={"n": 3})]) == [("ignored", "update_conflict")]
    assert kept(shop)[-1] == ("update_conflict", "rejected", "open")


def test_a_delta_is_added_to_what_changed_alone(shop: Database, applier: Applier) -> None:
    """What the new system added is no int, and need not be one where the row is as it was seen."""
    made(shop, 1, 2)
    shop.execute("UPDATE shop.orders SET quantity = -10; UPDATE shop.orders SET quantity = 0 WHERE id = 2")
    sell = ruled("delta", before={"quantity": "detail.before.n"}, named={"set": {"quantity": "detail.n"}})
    works = [work(sell, str(n), id=n, n=2147483640, before={"n": -10}) for n in (1, 2)]
    assert outcomes(applier, works) == [APPLIED, ("dead_letter", "22003")]
    assert [it[3] for it in rows(shop)] == [2147483640, 0]


def test_an_expression_decides_a_column(shop: Database, applier: Applier) -> None:
    made(shop)
    shop.execute("UPDATE shop.orders SET quantity = 9, note = E'50 %\\u2028 \"x\"'")
    groups = [
        {"columns": "quantity", "sql": "greatest(current.quantity, new.quantity)"},
        {"columns": "note", "sql": "current.note || ' / ' || new.note || ' {%}'"},
    ]
    update = ruled("reject", groups=groups)
    works = [work(update, "1", id=1, n=7, note="'; DROP TABLE shop.orders; --", before=SEEN)]
    assert outcomes(applier, works) == [APPLIED]
    assert rows(shop) == [(1, "new", '50 %\u2028 "x" / \'; DROP TABLE shop.orders; -- {%}', 9)]


def test_the_higher_version_wins(shop: Database, applier: Applier) -> None:
    made(shop, 1, 2, 3)
    shop.execute("UPDATE shop.orders SET version = 5")
    version = {"column": "version", "seen": "detail.seen", "new": "detail.v"}
    columns = {"status": "detail.status", "version": "detail.v"}
    update = ruled("version_wins", version=version, named={"set": columns})
    works = [
        work(update, "1", id=1, status="a", seen=5, v=6),  # nobody wrote
        work(update, "2", id=2, status="b", seen=3, v="6"),
        work(update, "3", id=3, status="c", seen=3, v=5),  # a tie is the legacy system's
    ]
    assert outcomes(applier, works) == [APPLIED, APPLIED, ("ignored", "update_conflict")]
    assert [status for _, status, *_ in rows(shop)] == ["a", "b", "new"]
    assert kept(shop) == [("update_conflict", "new", "decided"), ("update_conflict", "legacy", "decided")]


def test_a_version_column_sees_what_was_changed_back(shop: Database, applier: Applier) -> None:
    made(shop)
    shop.execute("UPDATE shop.orders SET version = 1")
    version = {"column": "version", "seen": "detail.seen"}
    by_value, by_version = ruled("reject"), ruled("reject", version=version)
    shop.execute("UPDATE shop.orders SET status = 'x', version = 2")
    shop.execute("UPDATE shop.orders SET status = 'new', version = 3")
    assert outcomes(applier, [work(by_version, "1", id=1, status="paid", seen=1, before=SEEN)]) == [
        ("ignored", "update_conflict")
    ]
    assert outcomes(applier, [work(by_value, "2", id=1, status="paid", before=SEEN)]) == [APPLIED]


@pytest.mark.parametrize("none", [{}, {"seen": None}], ids=["nothing", "null"])
def test_an_event_that_makes_its_row_has_seen_no_version(shop: Database, applier: Applier, none: Any) -> None:
    shop.execute("CREATE DOMAIN shop.version AS int NOT NULL; ALTER TABLE shop.orders ALTER version TYPE shop.version")
    shop.execute("INSERT INTO shop.orders (id, status, version) VALUES (2, 'new', 5)")
    version = {"column": "version", "seen": "detail.seen"}
    columns = {"status": "detail.status", "version": "detail.v"}
    upsert = ruled("reject", "upsert", named={"set": columns}, version=version)
    insert = ruled("reject", "insert", named={"set": {"id": "detail.id", **columns}}, version=version)
    insert.primary_key = ("id",)
    works = [
        work(upsert, "1", id=1, status="a", v=1, **none),
        work(upsert, "2", id=2, status="a", v=1, **none),  # it knows of no row, and there is one
        work(insert, "3", id=3, status="a", v=1, **none),
        work(upsert, "4", id=2, status="b", v=6, seen=5),
    ]
    assert outcomes(applier, works) == [APPLIED, ("ignored", "update_conflict"), APPLIED, APPLIED]
    assert [it[:2] for it in rows(shop)] == [(1, "a"), (2, "b"), (3, "a")]
    with pytest.raises(Malformed, match="version seen"):
        work(ruled("reject", version=version), "5", id=1, status="paid", **none)


@pytest.mark.parametrize(
    ("policy", "outcome", "status"),
    [
        ("new_wins", APPLIED, "paid"),
        ("legacy_wins", ("ignored", "insert_exists"), "new"),
        ("reject", ("ignored", "insert_exists"), "new"),
    ],
)
def test_insert_exists(shop: Database, applier: Applier, policy: str, outcome: Any, status: str) -> None:
    made(shop)
    insert = ruled(policy, "insert")
    insert.primary_key = ("id",)
    works = [work(insert, "1", id=1, status="paid"), work(insert, "2", id=2, status="fresh")]
    assert outcomes(applier, works) == [outcome, APPLIED]
    assert [status for _, status, *_ in rows(shop)] == [status, "fresh"]
    assert [kind for kind, *_ in kept(shop)] == ["insert_exists"]
    assert outcomes(applier, [work(insert, "3", id=2, status="fresh")]) == [APPLIED], "the same row is no conflict"
    assert len(kept(shop)) == 1


def test_a_column_that_a_primary_key_only_includes_names_no_row(shop: Database, applier: Applier) -> None:
    shop.execute("ALTER TABLE shop.orders DROP CONSTRAINT orders_pkey, ADD PRIMARY KEY (id) INCLUDE (note)")
    made(shop)
    insert = ruled("new_wins", "insert")
    assert outcomes(applier, [work(insert, "1", id=1, status="paid", note="ours", n=6)]) == [APPLIED]
    assert rows(shop) == [(1, "paid", "ours", 6)]
    assert kept(shop) == [("insert_exists", "new", "decided")]


@pytest.mark.parametrize("kind", ["a table", "a partitioned table"])
def test_a_row_that_is_made_while_we_look_is_tried_again(shop: Database, applier: Applier, kind: str) -> None:
    if kind == "a partitioned table":
        partition(shop)
    insert = ruled("legacy_wins", "insert")
    insert.primary_key = ("id",)
    patient = Applier(shop.dsn, statement_timeout=10, lock_timeout=10)
    with closing(patient), shop.connect() as other:
        other.execute("BEGIN; INSERT INTO shop.orders (id, status) VALUES (1, 'theirs')")
        first = work(insert, "1", id=1, status="ours")
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(patient.apply_all([first])[first]))
        thread.start()
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        until(lambda: shop.execute(waiting) == [(1,)])
        other.execute("COMMIT")
        thread.join(60)
    assert (found[0].outcome.value, found[0].reason) == ("retried", "23505")
    assert count(shop, "figbridge.inbox") == 0
    assert outcomes(applier, [first]) == [("ignored", "insert_exists")]


def test_a_change_that_commits_while_we_wait_for_the_lock_is_seen(shop: Database) -> None:
    made(shop)
    patient = Applier(shop.dsn, statement_timeout=10, lock_timeout=10)
    with closing(patient), shop.connect() as other:
        other.execute("BEGIN; UPDATE shop.orders SET status = 'theirs'")
        update = work(ruled("legacy_wins"), "1", id=1, status="ours", before=SEEN)
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(patient.apply_all([update])[update]))
        thread.start()
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        until(lambda: shop.execute(waiting) == [(1,)])
        other.execute("COMMIT")
        thread.join(60)
    assert (found[0].outcome.value, found[0].reason) == ("ignored", "update_conflict")
    assert rows(shop)[0][1] == "theirs"


def test_a_lock_that_is_held_too_long_holds_up_only_its_event(shop: Database, applier: Applier) -> None:
    made(shop, *range(10))
    update = ruled("legacy_wins")
    with shop.connect() as other, other.transaction():
        other.execute("SELECT * FROM shop.orders WHERE id = 4 FOR UPDATE")
        found = outcomes(applier, [work(update, str(n), id=n, status="b", before=SEEN) for n in range(10)])
    assert found.count(APPLIED) == 9
    assert found[4] == ("retried", "55P03")


def test_a_row_that_was_compared_and_whose_update_a_trigger_suppresses_is_not_missing(
    shop: Database, applier: Applier
) -> None:
    made(shop, 1, 2)
    shop.execute("""
        CREATE FUNCTION shop.keep() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
        CREATE TRIGGER keep BEFORE UPDATE ON shop.orders
            FOR EACH ROW WHEN (OLD.id = 1) EXECUTE FUNCTION shop.keep();
    """)
    works = [work(ruled(), str(number), id=number, status="b", before=SEEN) for number in (1, 2)]
    assert outcomes(applier, works) == [("ignored", "suppressed"), APPLIED]


def test_a_missing_row_is_waited_for_unless_a_rule_says_otherwise(shop: Database, applier: Applier) -> None:
    assert outcomes(applier, [work(ruled(), "1", id=1, status="a", before=SEEN)]) == [("retried", "update_missing")]
    assert kept(shop) == []
    for rule, outcome in (("legacy_wins", "ignored"), ("reject", "ignored"), ("new_wins", "applied")):
        update = ruled("reject", kinds={"update_missing": rule})
        assert outcomes(applier, [work(update, rule, id=1, status="a", before=SEEN)])[0][0] == outcome
    assert [it[:2] for it in kept(shop)] == [
        ("update_missing", "legacy"), ("update_missing", "rejected"), ("update_missing", "new"),
    ]  # fmt: skip
    assert rows(shop) == [(1, "a", None, None)]


def test_a_row_that_the_owner_deleted_is_told_from_one_that_never_was(shop: Database, applier: Applier) -> None:
    upsert = ruled("legacy_wins", "upsert", named={"version": "detail.v"})
    update = ruled("legacy_wins", named={"version": "detail.v"})
    again = ruled("new_wins", "upsert", named={"version": "detail.v"})
    assert outcomes(applier, [work(upsert, "1", id=1, v=1, status="a")]) == [APPLIED]
    shop.execute("DELETE FROM shop.orders")
    works = [work(update, "2", id=1, v=2, status="b", before={}), work(upsert, "3", id=1, v=3, status="c")]
    assert outcomes(applier, works) == [("ignored", "update_deleted")] * 2
    assert rows(shop) == []
    assert outcomes(applier, [work(again, "4", id=1, v=4, status="d")]) == [APPLIED]
    assert kept(shop) == [("update_deleted", "legacy", "decided")] * 2 + [("update_deleted", "new", "decided")]
    delete = ruled("legacy_wins", "delete", named={"version": "detail.v"})
    assert outcomes(applier, [work(delete, "5", id=1, v=5)]) == [APPLIED]
    assert outcomes(applier, [work(upsert, "6", id=1, v=6, status="e")]) == [APPLIED], "its own deletion is no conflict"


def test_a_delete_of_what_the_owner_changed(shop: Database, applier: Applier) -> None:
    made(shop, 1, 2, 3)
    shop.execute("UPDATE shop.orders SET status = 'cancelled' WHERE id > 1")
    keep, drop = (ruled(it, "delete", before=BEFORE) for it in ("legacy_wins", "new_wins"))
    works = [
        work(keep, "1", id=1, before=SEEN),
        work(keep, "2", id=2, before=SEEN),
        work(drop, "3", id=3, before=SEEN),
        work(drop, "4", id=4, before=SEEN),
    ]
    expected = [APPLIED, ("ignored", "update_conflict"), APPLIED, ("ignored", "delete_missing")]
    assert outcomes(applier, works) == expected
    assert [it[0] for it in rows(shop)] == [2]
    assert [it[:2] for it in kept(shop)] == [
        ("update_conflict", "legacy"), ("update_conflict", "new"), ("delete_missing", "legacy"),
    ]  # fmt: skip
    quiet = ruled("legacy_wins", "delete", kinds={"delete_missing": "ignore"})
    assert outcomes(applier, [work(quiet, "5", id=4)]) == [("ignored", "delete_missing")]
    assert len(kept(shop)) == 3


def test_a_soft_delete_is_compared_too(shop: Database, applier: Applier) -> None:
    made(shop, 1, 2)
    shop.execute("UPDATE shop.orders SET status = 'cancelled' WHERE id = 2")
    soft = ruled("legacy_wins", "delete", before=BEFORE, named={"soft": {"status": "'gone'"}})
    works = [work(soft, "1", id=1, before=SEEN), work(soft, "2", id=2, before=SEEN)]
    assert outcomes(applier, works) == [APPLIED, ("ignored", "update_conflict")]
    assert [it[1] for it in rows(shop)] == ["gone", "cancelled"]


def test_a_stale_version_is_kept_where_rules_are(shop: Database, applier: Applier) -> None:
    upsert = ruled("new_wins", "upsert", named={"version": "detail.v"})
    quiet = ruled("new_wins", "upsert", named={"version": "detail.v"}, kinds={"stale_version": "ignore"})
    works = [work(upsert, "2", id=1, v=2, status="b"), work(upsert, "1", id=1, v=1, status="a")]
    assert outcomes(applier, works) == [APPLIED, ("ignored", "stale_version")]
    assert outcomes(applier, [work(quiet, "0", id=1, v=0, status="a")]) == [("ignored", "stale_version")]
    assert kept(shop) == [("stale_version", "legacy", "decided")]


@pytest.mark.parametrize(
    ("policy", "kinds", "outcome", "records"),
    [
        ("new_wins", {}, ("ignored", "unique_other"), [("unique_other", "rejected", "open")]),
        ("legacy_wins", {}, ("ignored", "unique_other"), [("unique_other", "legacy", "decided")]),
        ("legacy_wins", {"unique_other": "dead_letter"}, ("dead_letter", "23505"), []),
    ],
)
def test_another_row_has_the_unique_value(
    shop: Database, applier: Applier, *, policy: str, kinds: Any, outcome: Any, records: Any
) -> None:
    shop.execute("ALTER TABLE shop.orders ADD UNIQUE (note)")
    made(shop)
    upsert = ruled(policy, "upsert", kinds=kinds)
    works = [work(upsert, "1", id=2, status="a", note="n"), work(upsert, "2", id=3, status="a", note="m")]
    assert outcomes(applier, works) == [outcome, APPLIED]
    assert [it[0] for it in rows(shop)] == [1, 3]
    assert kept(shop) == records
    if records:
        assert "orders_note_key" in shop.execute("SELECT message FROM figbridge.conflict")[0][0]
        assert outcomes(applier, works[:1]) == [("duplicate", "")]


def test_a_missing_parent_waits_unless_a_rule_says_otherwise(shop: Database, applier: Applier) -> None:
    waits, rejects = (ruled("new_wins", "upsert", kinds={"fk_missing": it}) for it in ("wait", "reject"))
    assert outcomes(applier, [work(waits, "1", id=1, customer=9)]) == [("retried", "23503")]
    assert outcomes(applier, [work(rejects, "2", id=1, customer=9)]) == [("ignored", "fk_missing")]
    assert kept(shop) == [("fk_missing", "rejected", "open")]


def test_what_a_partition_refuses_is_judged_by_the_rules_of_its_table(shop: Database, applier: Applier) -> None:
    partition(shop)
    shop.execute("CREATE UNIQUE INDEX ON shop.orders_low_all (note)")
    made(shop)
    upsert, rejects, waits = (
        ruled("legacy_wins", "upsert", kinds=kinds) for kinds in ({}, {"fk_missing": "reject"}, {"fk_missing": "wait"})
    )
    works = [
        work(upsert, "1", id=2, status="a", note="n"),
        work(rejects, "2", id=3, customer=9),
        work(waits, "3", id=4, customer=9),
    ]
    found = applier.apply_all(works)
    assert [found[it].reason for it in works] == ["unique_other", "fk_missing", "23503"]
    assert found[works[2]].awaited == Awaited(("shop", "customers"), ("id",), '{"id":9}')
    assert sorted(kept(shop)) == [("fk_missing", "rejected", "open"), ("unique_other", "legacy", "decided")]
    assert [it[0] for it in rows(shop)] == [1]


def test_what_the_legacy_system_owns_is_not_written(shop: Database, applier: Applier) -> None:
    made(shop, 1, 2)
    table = mapping(owner="legacy")
    groups = [{"columns": ["note"], "owner": "legacy"}]
    column = ruled("new_wins", "update", groups=groups)
    works = [
        work(table, "1", id=1, status="paid"),
        work(table, "2", id=1, status="new"),  # it is so already
        work(column, "3", id=2, status="paid", note="ours", before={}),
        work(column, "4", id=2, status="sent", note="n", before={}),
    ]
    assert outcomes(applier, works) == [("ignored", "not_owner"), APPLIED, APPLIED, APPLIED]
    assert rows(shop) == [(1, "new", "n", 5), (2, "sent", "n", 5)]
    assert kept(shop) == [("not_owner", "legacy", "decided")] * 2
    rejecting = ruled("new_wins", "update", groups=groups, kinds={"not_owner": "reject"})
    assert outcomes(applier, [work(rejecting, "5", id=2, status="x", note="y", before={})]) == [
        ("ignored", "not_owner")
    ]
    assert rows(shop)[1] == (2, "sent", "n", 5), "a part that is rejected rejects the event"


def test_several_statements_are_decided_before_the_first_is_run(shop: Database, applier: Applier) -> None:
    made(shop, 1, 2)
    shop.execute("UPDATE shop.orders SET status = 'cancelled' WHERE id = 2")
    customer = {"into": "shop.customers", "action": "upsert", "key": {"id": "detail.customer"}}
    order = {
        "into": "shop.orders", "action": "update", "key": {"id": "detail.id"}, "set": {"status": "detail.status"},
        "conflicts": {"policy": "reject", "before": {"status": "detail.before.status"}},
    }  # fmt: skip
    note = {"sql": "UPDATE shop.orders SET note = 'seen' WHERE id = %(id)s", "with": {"id": "detail.id"}}
    several = mapping(into=None, action=None, key=None, set=None, statements=[customer, note, order])
    works = [work(several, str(n), id=n, customer=n, status="paid", before=SEEN) for n in (1, 2)]
    assert outcomes(applier, works) == [APPLIED, ("ignored", "update_conflict")]
    assert shop.execute("SELECT id FROM shop.customers") == [(1,)]
    assert rows(shop) == [(1, "paid", "seen", 5), (2, "cancelled", "n", 5)]
    assert shop.execute("SELECT statement FROM figbridge.conflict") == [(2,)]


def test_one_batch_of_many_kinds_is_one_transaction(shop: Database, applier: Applier) -> None:
    made(shop, *range(0, 300, 2))
    shop.execute("UPDATE shop.orders SET status = 'cancelled' WHERE id % 4 = 0")
    upsert, plain = ruled("legacy_wins", "upsert", before=BEFORE), mapping()
    works = [work(upsert if n % 3 else plain, str(n), id=n, status="paid", before=SEEN) for n in range(300)]
    found = outcomes(applier, works)
    dropped = [n for n in range(300) if n % 4 == 0 and n % 3]
    assert [n for n, it in enumerate(found) if it == ("ignored", "update_conflict")] == dropped
    assert found.count(APPLIED) == 300 - len(dropped)
    assert len(kept(shop)) == len(dropped)
    assert shop.execute("SELECT count(DISTINCT xmin::text) FROM figbridge.inbox") == [(1,)]


def test_a_second_event_about_a_row_in_a_batch_sees_what_the_first_one_wrote(shop: Database, applier: Applier) -> None:
    made(shop)
    update = ruled("reject")
    other = ruled("reject", named={"entity": "detail.entity"})
    works = [
        work(update, "1", id=1, status="a", before={"status": "new"}),
        work(update, "2", id=1, status="b", before={"status": "a"}),
        work(other, "3", id=1, status="c", before={"status": "b"}, entity="x"),
        work(other, "4", id=1, status="d", before={"status": "b"}, entity="y"),
    ]
    assert outcomes(applier, works) == [APPLIED, APPLIED, APPLIED, ("ignored", "update_conflict")]
    assert rows(shop)[0][1] == "c"


def test_types_without_equality_are_compared(shop: Database, applier: Applier) -> None:
    shop.execute("""
        CREATE TABLE shop.odd (id int PRIMARY KEY, j json, p point, n numeric, b bytea, f float8, x text[]);
        INSERT INTO shop.odd VALUES
            (1, '{"a": 1,  "b": 2}', '(1,2)', 1.50, 'x', 'NaN', '{a}'), (2, '[1]', '(1,2)', 1, 'x', 1, '{a}')
    """)
    columns = ("j", "p", "n", "b", "f", "x")
    update = mapping(
        "update",
        into="shop.odd",
        set={it: f"detail.{it}" for it in columns},
        conflicts={"policy": "reject", "before": {it: f"detail.before.{it}" for it in columns}},
    )
    seen = {"j": {"b": 2, "a": 1}, "p": "(1,2)", "n": 1.5, "b": "\\x78", "f": "NaN", "x": ["a"]}
    new = {"j": {"c": 3}, "p": "(3,4)", "n": 2, "b": "\\x79", "f": 2, "x": []}
    works = [work(update, str(n), id=n, **new, before=seen) for n in (1, 2)]
    assert outcomes(applier, works) == [APPLIED, ("ignored", "update_conflict")]
    assert shop.execute("SELECT columns FROM figbridge.conflict")[0][0].keys() == set(columns)


def test_a_column_of_a_domain_that_forbids_null_need_not_be_known(shop: Database, applier: Applier) -> None:
    shop.execute("""
        CREATE DOMAIN shop.present AS text NOT NULL;
        ALTER TABLE shop.orders ADD town shop.present DEFAULT 'here';
    """)
    made(shop, 1, 2, 3)
    shop.execute("UPDATE shop.orders SET note = 'theirs' WHERE id = 2")
    columns = {"note": "detail.note", "town": "detail.town"}
    by_value = ruled("legacy_wins", "upsert", named={"set": columns}, before=BEFORE)
    version = {"column": "version", "new": "detail.v"}
    by_version = ruled("version_wins", "update", named={"set": columns}, version=version)
    works = [
        work(by_value, "1", id=1, note="ours", town="there", before=SEEN),
        work(by_value, "2", id=2, note="ours", town="there", before=SEEN),
        work(by_version, "3", id=3, note="ours", town="there", v=1),
        work(by_value, "4", id=4, note="ours", before=SEEN),
        work(by_value, "5", id=1, note="more", town=None, before=SEEN),
    ]
    assert outcomes(applier, works) == [
        APPLIED, ("ignored", "update_conflict"), APPLIED, APPLIED, ("dead_letter", "23502"),
    ]  # fmt: skip
    found = [("ours", "there"), ("theirs", "here"), ("ours", "there"), ("ours", "here")]
    assert shop.execute("SELECT note, town FROM shop.orders ORDER BY id") == found


@pytest.mark.parametrize("odd", ["\0", "\ud800", "\u65e5"])
def test_a_conflict_is_kept_whatever_characters_its_event_holds(database: Database, odd: str) -> None:
    name = f"{database.name}_latin1"
    database.execute(f"CREATE DATABASE {name} ENCODING 'LATIN1' TEMPLATE template0 LOCALE 'C'")
    shop = make_shop(Database(database.server, name))
    try:
        made(shop, 1, 2)
        shop.execute("UPDATE shop.orders SET status = 'gr\xfcn' WHERE id = 1")
        update = ruled("legacy_wins")
        works = [work(update, str(n), id=n, status="paid", before=SEEN, other=[{odd: odd}]) for n in (1, 2)]
        with closing(Applier(shop.dsn, statement_timeout=10, lock_timeout=1)) as applier:
            assert outcomes(applier, works) == [("ignored", "update_conflict"), APPLIED]
        ((status, sent),) = shop.execute("SELECT before ->> 'status', event::text FROM figbridge.conflict")
        assert status == "gr\xfcn"
        assert json.loads(sent) == works[0].document
    finally:
        database.execute(f"DROP DATABASE {name} WITH (FORCE)")


def test_floats_are_compared_and_added_to_the_last_digit(database: Database) -> None:
    make_shop(database)
    database.execute(f"""
        CREATE TABLE shop.floats (id int PRIMARY KEY, x float8);
        INSERT INTO shop.floats VALUES (1, 0.1234567890123456789), (2, 0.30000000000000004), (3, 0.3);
        CREATE TABLE shop.printed (x text);
        CREATE FUNCTION shop.print() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN INSERT INTO shop.printed VALUES (NEW.x); RETURN NULL; END';
        CREATE TRIGGER print AFTER UPDATE ON shop.floats FOR EACH ROW EXECUTE FUNCTION shop.print();
        ALTER DATABASE {database.name} SET extra_float_digits = 0;
    """)

    def update(policy: str) -> Mapping:
        rules = {"policy": policy, "before": {"x": "detail.seen"}}
        return mapping("update", into="shop.floats", set={"x": "detail.x"}, conflicts=rules)

    works = [
        work(update("delta"), "1", id=1, x=0.2, seen=0.1),
        work(update("legacy_wins"), "2", id=2, x=1, seen=0.3),
        work(update("legacy_wins"), "3", id=3, x=1, seen=0.3),
    ]
    with closing(Applier(database.dsn, statement_timeout=10, lock_timeout=1)) as applier:
        assert outcomes(applier, works) == [APPLIED, ("ignored", "update_conflict"), APPLIED]
    assert database.execute("""
        SELECT id FROM shop.floats f JOIN (VALUES
            (1, 0.1234567890123456789::float8 + (0.2::float8 - 0.1::float8)), (2, 0.30000000000000004), (3, 1)
        ) AS e (id, x) USING (id) WHERE f.x = e.x ORDER BY id
    """) == [(1,), (2,), (3,)]
    assert database.execute("SELECT before ->> 'x' FROM figbridge.conflict ORDER BY id") == [
        ("0.12345678901234568",), ("0.30000000000000004",),
    ]  # fmt: skip
    assert database.execute("SELECT x FROM shop.printed ORDER BY 1") == [("0.223456789012346",), ("1",)], "as ever"


def test_columns_may_bear_the_names_that_our_queries_use(database: Database) -> None:
    make_shop(database)
    names = (
        "current", "new", "before", "it", "d", "r", "t", "p", "e", "s", "number", "document", "seen", "versions",
        "parsed", "told", "settings", "name", "setting", "rows", "awaited", "source", "json_populate_record",
    )  # fmt: skip
    columns = ", ".join(f'"{name}" text' for name in names)
    database.execute(f"CREATE TABLE shop.named (id int PRIMARY KEY, {columns}); INSERT INTO shop.named VALUES (1), (2)")
    paths = {name: f'detail."{name}"' for name in names}
    rules = {"policy": "legacy_wins", "before": paths, "version": {"column": "t", "new": "id"}}
    update = mapping("update", into="shop.named", set=dict.fromkeys(names, "'set'"), conflicts=rules)
    unseen = dict.fromkeys(names)
    works = [work(update, "1", id=1, **unseen), work(update, "2", id=2, **unseen | {"it": "another"})]
    found: dict[Work, list[Difference]] = {}
    options: dict[str, Any] = {"statement_timeout": 10, "lock_timeout": 1}
    with closing(Applier(database.dsn, examine=lambda _works: Shadow(found), **options)) as shadow:
        assert outcomes(shadow, works) == [APPLIED, ("ignored", "update_conflict")]
        assert [json.loads(after or "")["t"] for _, _, _, after in found[works[0]]] == ["set"]
        (told,) = Touching().marks(shadow.connection(), works)
        _, entries = mark.read(told.encode())
        assert [len(entry.rows or ()) for entry in entries] == [1, 1], "the list is complete"
    with closing(Applier(database.dsn, **options)) as applier:
        assert outcomes(applier, works) == [APPLIED, ("ignored", "update_conflict")]
    assert database.execute("SELECT it, r, t FROM shop.named ORDER BY id") == [("set",) * 3, (None,) * 3]
    ((before,),) = database.execute("SELECT before FROM figbridge.conflict")
    assert before == {"id": 2} | unseen


def test_no_value_of_a_conflict_is_in_the_outcome(shop: Database, applier: Applier) -> None:
    made(shop)
    shop.execute("UPDATE shop.orders SET status = 'secret-legacy'")
    update = work(ruled("legacy_wins"), "1", id=1, status="secret-new", before=SEEN)
    assert "secret" not in str(applier.apply_all([update])[update])


def test_an_event_without_the_number_that_was_seen_is_malformed() -> None:
    sell = ruled("delta", before=BEFORE, named={"set": {"quantity": "detail.n"}})
    with pytest.raises(Malformed):
        sell.prepare(event("1", id=1, n=2, before={}))


def test_on_every_version_of_the_server(each_database: Database) -> None:
    """The queries that lock and keep, and with the list of what is touched and its names between the statements."""
    make_shop(each_database)
    made(each_database, *range(20))
    each_database.execute("UPDATE shop.orders SET status = 'cancelled', quantity = quantity + 1 WHERE id % 2 = 0")
    guard = LoopGuard("message", slot=each_database.slot, touched_rows=True)
    update = ruled("legacy_wins", groups=[{"columns": "quantity", "policy": "delta"}])
    works = [work(update, str(n), id=n, status="paid", n=7, before=SEEN) for n in range(20)]
    plain = [work(mapping(), f"plain {n}", id=n, status="paid") for n in range(20, 30)]
    with closing(Applier(each_database.dsn, statement_timeout=10, lock_timeout=1, guard=guard)) as applier:
        assert outcomes(applier, works[:10] + plain + works[10:]) == [APPLIED] * 30
    expected = [(n, "cancelled" if n % 2 == 0 else "paid", "n", 8 if n % 2 == 0 else 7) for n in range(20)]
    assert rows(each_database)[:20] == expected
    assert kept(each_database) == [("update_conflict", "merged", "decided")] * 10
    assert count(each_database, "shop.orders") == 30
