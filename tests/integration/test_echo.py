"""The loop guard on every server version: what a reverse transaction keeps for itself, and what leaves of it."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import orjson
import psycopg
import pytest
from structlog.testing import capture_logs

from figbridge import canary, mark
from figbridge.config import MappingSection
from figbridge.errors import LegacyUnavailable
from figbridge.forward.echo import EchoFilter
from figbridge.reverse.apply import Applier, Outcome
from figbridge.reverse.guard import LoopGuard
from figbridge.reverse.mapping import Mapping
from fixtures import type_matrix
from fixtures.clock import until
from fixtures.forward import Forward
from fixtures.postgres import Database
from fixtures.reverse import make_shop, mapping, work

Guard = Literal["inbox", "message", "origin"]
GUARDS: Sequence[Guard] = ("inbox", "message", "origin")
LISTING: Sequence[Guard] = ("inbox", "message")

AUDIT = """
    CREATE TABLE shop.audit (n bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, said text);
    CREATE FUNCTION shop.audited() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO shop.audit (said) VALUES (TG_OP || ' ' || coalesce(NEW.id, OLD.id));
            RETURN NULL;
        END $$;
    CREATE TRIGGER audited AFTER INSERT OR UPDATE OR DELETE ON shop.orders
        FOR EACH ROW EXECUTE FUNCTION shop.audited();
"""


def published(database: Database, guard: Guard, tables: str = "TABLES IN SCHEMA shop") -> Database:
    """A shop whose tables are published, each by name; of ours only what `guard` needs."""
    listed = database.execute("SELECT format('%I.%I', schemaname, tablename) FROM pg_tables WHERE schemaname = 'shop'")
    names = tables if tables != "TABLES IN SCHEMA shop" else f"TABLE {', '.join(name for (name,) in listed)}"
    database.execute(f"CREATE PUBLICATION pub FOR {names} WITH (publish_via_partition_root = true)")
    if guard == "inbox":
        database.execute(
            "CREATE PUBLICATION marks FOR TABLE figbridge.inbox, figbridge.canary WITH (publish = 'insert')"
        )
    if guard == "origin":
        make_origin(database)
    database.create_slot()
    return database


def make_origin(database: Database) -> None:
    database.execute("SELECT pg_replication_origin_create(%s)", [canary.origin(database.slot)])


def forward(database: Database, guard: Guard, *, touched_rows: bool = True, messages: Sequence[str] = ()) -> Forward:
    echo = EchoFilter(guard=guard, origin=canary.origin(database.slot), touched_rows=touched_rows)
    publications = ("pub", "marks") if guard == "inbox" else ("pub",)
    return Forward(database, *publications, echo=echo, messages=messages)


@contextlib.contextmanager
def applier(database: Database, guard: Guard, *, touched_rows: bool = True) -> Iterator[Applier]:
    loop_guard = LoopGuard(guard, slot=database.slot, touched_rows=touched_rows)
    made = Applier(database.dsn, statement_timeout=10, lock_timeout=2, guard=loop_guard)
    try:
        yield made
    finally:
        made.close()


def apply(database: Database, guard: Guard, *works: Any, touched_rows: bool = True) -> None:
    """In one transaction."""
    with applier(database, guard, touched_rows=touched_rows) as made:
        outcomes = made.apply_all(works)
    assert [(it.outcome, it.message) for it in outcomes.values()] == [(Outcome.APPLIED, "")] * len(works)


def last(database: Database) -> None:
    """The legacy system's own change, after which nothing comes."""
    database.execute("INSERT INTO shop.customers VALUES (999, 'the last one')")


def left(running: Forward) -> list[dict[str, Any]]:
    """The events before the last one."""
    until(lambda: any(it["key"] == {"id": 999} for it in running.sink.details), 20, lambda: str(running.failure))
    details = running.sink.details
    assert details[-1]["key"] == {"id": 999}
    assert (details[-1]["hops"], details[-1]["cause"]) == (0, None)
    return details[:-1]


def told(events: Sequence[dict[str, Any]]) -> list[Any]:
    return [(it["table"], it["op"], (it["after"] or it["key"]).get("said", it["key"]), it["cause"]) for it in events]


@pytest.mark.parametrize("guard", GUARDS)
def test_by_default_nothing_of_a_reverse_transaction_leaves(each_database: Database, guard: Guard) -> None:
    make_shop(each_database).execute(AUDIT)
    published(each_database, guard)
    apply(each_database, guard, *[work(mapping(), f"e{n}", id=n, status="new") for n in range(3)], touched_rows=False)
    last(each_database)
    with forward(each_database, guard, touched_rows=False) as running:
        assert left(running) == []


@pytest.mark.parametrize("guard", GUARDS)
def test_the_canary_is_answered(each_database: Database, guard: Guard) -> None:
    published(make_shop(each_database), guard)
    nonce = canary.write(each_database.dsn, each_database.slot, guard)
    with forward(each_database, guard, touched_rows=guard != "origin") as running:
        assert running.echo.canaries.get(timeout=20) == nonce


def test_a_canary_that_was_deleted_is_written_anew(database: Database) -> None:
    """Another replica that starts deletes those of yesterday, while the forward path may still be away."""
    make_shop(database)
    stop = threading.Event()

    def nonces() -> list[str]:
        return [nonce for (nonce,) in database.execute("SELECT nonce FROM figbridge.canary")]

    with ThreadPoolExecutor(1) as pool:
        try:
            proof = pool.submit(canary.prove, database.dsn, database.slot, stop)
            until(nonces, 20, "the canary")
            database.execute("UPDATE figbridge.canary SET written_at = now() - interval '25 hours'")
            others = canary.write(database.dsn, database.slot)
            until(lambda: len(nonces()) == 2, 20, "another canary of the replica that waits")
            for nonce in nonces():
                if nonce != others:
                    canary.answer(database.dsn, nonce)
            proof.result(20)
        finally:
            stop.set()


def test_a_canary_from_before_a_slot_that_was_made_anew_is_written_again(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canary, "_PATIENCE", 0.2)
    published(make_shop(database), "inbox")
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            proof = pool.submit(canary.prove, database.dsn, database.slot, stop)
            until(lambda: database.execute("SELECT nonce FROM figbridge.canary"), 20, "the canary")
            database.execute(f"SELECT pg_drop_replication_slot('{database.slot}')")
            database.create_slot()
            with forward(database, "inbox") as running:
                database.execute("SELECT pg_logical_emit_message(true, 'any', 'thing')")  # as heartbeats are
                canary.answer(database.dsn, running.echo.canaries.get(timeout=20))
                proof.result(20)
        finally:
            stop.set()


@pytest.mark.parametrize(("written", "read"), [("inbox", "message"), ("message", "origin"), ("message", "inbox")])
def test_a_canary_without_its_mark_is_not_answered(database: Database, written: Guard, read: Guard) -> None:
    """The two paths have different files: the reverse path must not start."""
    published(make_shop(database), written)
    canary.write(database.dsn, database.slot, written)
    last(database)
    publications: Guard = "inbox" if written == "inbox" else "message"
    running = forward(database, publications)
    running.echo._guard = read
    with capture_logs() as logs, running:
        left(running)
        assert running.echo.canaries.empty()
    assert written == "inbox" or any("without its mark" in line["event"] for line in logs)


@pytest.mark.parametrize("guard", LISTING)
def test_what_a_trigger_writes_leaves_with_its_cause(each_database: Database, guard: Guard) -> None:
    make_shop(each_database).execute(AUDIT)
    published(each_database, guard)
    works = [work(mapping(), f"e{n}", id=n, status="new", hops=n) for n in range(3)]
    apply(each_database, guard, *works)
    apply(each_database, guard, work(mapping("update"), "up", id=1, status="paid", hops=4))
    apply(each_database, guard, work(mapping("delete"), "gone", id=2))
    last(each_database)
    with forward(each_database, guard) as running:
        events = left(running)

    assert told(events) == [
        *[("audit", "insert", f"INSERT {n}", f"e{n}") for n in range(3)],
        ("audit", "insert", "UPDATE 1", "up"),
        ("audit", "insert", "DELETE 2", "gone"),
    ]
    assert [it["hops"] for it in events] == [1, 2, 3, 5, 1]


@pytest.mark.parametrize("guard", LISTING)
def test_our_own_row_leaves_if_a_trigger_altered_what_we_wrote(each_database: Database, guard: Guard) -> None:
    make_shop(each_database).execute("""
        CREATE FUNCTION shop.altered() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                IF NEW.status = 'bad' THEN NEW.status := 'mended'; END IF;
                NEW.note := 'a column of nobody''s';
                RETURN NEW;
            END $$;
        CREATE TRIGGER altered BEFORE INSERT OR UPDATE ON shop.orders FOR EACH ROW EXECUTE FUNCTION shop.altered();
    """)
    published(each_database, guard)
    into = mapping(set={"status": "detail.status"})
    works = [work(into, f"e{n}", id=n, status=status) for n, status in enumerate(["good", "bad", "good"])]
    apply(each_database, guard, *works)
    last(each_database)
    with forward(each_database, guard) as running:
        (altered,) = left(running)

    assert (altered["key"], altered["after"]["status"]) == ({"id": 1}, "mended")
    assert (altered["cause"], altered["hops"]) == ("e1", 1)


def test_what_a_trigger_adds_to_our_row_afterwards_leaves(database: Database) -> None:
    """An UPDATE of the same row, which says the same as we did in our columns: once it is ours, twice it is not."""
    make_shop(database).execute("""
        CREATE FUNCTION shop.counted() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                UPDATE shop.orders SET quantity = 1 WHERE id = NEW.id AND quantity IS NULL;
                RETURN NULL;
            END $$;
        CREATE TRIGGER counted AFTER INSERT OR UPDATE ON shop.orders FOR EACH ROW EXECUTE FUNCTION shop.counted();
    """)
    published(database, "inbox")
    into = mapping(set={"status": "detail.status"})
    apply(database, "inbox", work(into, "e1", id=1, status="a"), work(into, "e2", id=2, status="a"))
    last(database)
    with forward(database, "inbox") as running:
        events = left(running)

    assert [(it["op"], it["after"]["quantity"], it["cause"]) for it in events] == [
        ("update", 1, "e1"),
        ("update", 1, "e2"),
    ]


def test_cascades_leave_and_the_delete_itself_does_not(database: Database) -> None:
    make_shop(database).execute("""
        CREATE TABLE shop.lines (id int PRIMARY KEY, order_id bigint REFERENCES shop.orders ON DELETE CASCADE);
        INSERT INTO shop.orders (id) VALUES (1), (2);
        INSERT INTO shop.lines VALUES (10, 1), (11, 1);
    """)
    published(database, "inbox")
    apply(database, "inbox", work(mapping("delete"), "d1", id=1), work(mapping("delete"), "d2", id=2))
    last(database)
    with forward(database, "inbox") as running:
        events = left(running)

    assert [(it["table"], it["op"], it["key"]["id"], it["cause"]) for it in events] == [
        ("lines", "delete", 10, "d1"),
        ("lines", "delete", 11, "d1"),
    ]


def test_a_deferred_trigger_has_the_cause_of_its_transaction_if_that_has_one(database: Database) -> None:
    make_shop(database).execute(
        AUDIT.replace("CREATE TRIGGER audited AFTER INSERT OR UPDATE OR DELETE ON shop.orders",
                      "CREATE CONSTRAINT TRIGGER audited AFTER INSERT ON shop.orders DEFERRABLE INITIALLY DEFERRED")
    )  # fmt: skip
    published(database, "inbox")
    apply(database, "inbox", work(mapping(), "alone", id=1, hops=1))
    apply(database, "inbox", work(mapping(), "one", id=2, hops=1), work(mapping(), "other", id=3, hops=5))
    last(database)
    with forward(database, "inbox") as running:
        events = left(running)

    assert [(it["cause"], it["hops"]) for it in events] == [("alone", 2), (None, 6), (None, 6)]


def test_the_key_is_matched_also_where_the_old_key_does_not_show_it(database: Database) -> None:
    """A delete by another unique column than the replica identity, in a table whose triggers delete, too."""
    make_shop(database).execute("""
        CREATE TABLE shop.users (id int PRIMARY KEY, email text UNIQUE NOT NULL);
        INSERT INTO shop.users VALUES (1, 'a'), (2, 'b'), (3, 'c');
    """)
    published(database, "inbox")
    by_email = mapping("delete", into="shop.users", key={"email": "detail.email"}, set={})
    apply(database, "inbox", work(by_email, "d1", email="a"), work(by_email, "d3", email="c"))
    last(database)
    with forward(database, "inbox") as running:
        assert left(running) == []


def test_one_statement_may_mean_many_rows(database: Database) -> None:
    make_shop(database).execute("INSERT INTO shop.orders (id, status) SELECT n, 'new' FROM generate_series(1, 50) n")
    database.execute(AUDIT)
    published(database, "inbox")
    many = mapping("update", key={"status": "detail.was"}, set={"quantity": "detail.n"})
    apply(database, "inbox", work(many, "all", was="new", n=7))
    last(database)
    with forward(database, "inbox") as running:
        events = left(running)

    assert [(it["table"], it["cause"]) for it in events] == [("audit", "all")] * 50


def test_what_a_trigger_deletes_in_the_place_of_our_update_leaves(database: Database) -> None:
    """It archives the row, and leaves nothing to update."""
    make_shop(database).execute("""
        CREATE TABLE shop.archive (id bigint PRIMARY KEY);
        CREATE FUNCTION shop.archived() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                INSERT INTO shop.archive VALUES (OLD.id);
                DELETE FROM shop.orders WHERE id = OLD.id;
                RETURN NULL;
            END $$;
        CREATE TRIGGER archived BEFORE UPDATE ON shop.orders FOR EACH ROW EXECUTE FUNCTION shop.archived();
        INSERT INTO shop.orders (id) VALUES (1), (2);
    """)
    published(database, "inbox")
    soft = mapping("delete", soft={"note": "id"}, set={})
    with applier(database, "inbox") as made:  # as far as the server tells, there was nothing to delete
        for it in (work(soft, "soft", id=1), work(mapping(), "upsert", id=2, status="closed")):
            assert made.apply_all([it])[it].outcome in {Outcome.IGNORED, Outcome.APPLIED}
    last(database)
    with forward(database, "inbox") as running:
        events = left(running)

    assert [(it["table"], it["op"], it["key"]["id"], it["cause"]) for it in events] == [
        ("archive", "insert", 1, "soft"),
        ("orders", "delete", 1, "soft"),
        ("archive", "insert", 2, "upsert"),
        ("orders", "delete", 2, "upsert"),
    ]


def test_a_mark_of_an_older_bridge_does_not_say_whether_rows_move() -> None:
    shape = mark.Shape([["shop", "orders"]], "update", ["id"], ["status"], moves=True)
    old = {"shapes": [shape[:4]], "events": []}
    assert mark.read(orjson.dumps(old)) == ([shape], [])
    for now in (shape, shape._replace(moves=False)):
        content = mark.write([now], [])
        assert mark.read(content.encode()) == ([now], [])
        assert orjson.loads(content)["shapes"] == [list(shape[:4])]  # as an older bridge reads it


def test_a_row_that_moves_to_another_partition_is_ours(database: Database) -> None:
    make_shop(database).execute("""
        CREATE TABLE shop.parted (id int, region text, PRIMARY KEY (id, region)) PARTITION BY LIST (region);
        CREATE TABLE shop.parted_n PARTITION OF shop.parted FOR VALUES IN ('n');
        CREATE TABLE shop.parted_s PARTITION OF shop.parted FOR VALUES IN ('s');
        INSERT INTO shop.parted VALUES (1, 'n'), (2, 'n');
    """)
    published(database, "inbox", "TABLE shop.parted, shop.customers")
    moved = mapping("update", into="shop.parted", key={"id": "detail.id"}, set={"region": "detail.to"})
    leaf = mapping("insert", into="shop.parted_s", key={}, set={"id": "detail.id", "region": "detail.to"})
    apply(database, "inbox", work(moved, "m1", id=1, to="s"), work(leaf, "i3", id=3, to="s"))
    database.execute("UPDATE shop.parted SET region = 's' WHERE id = 2")
    last(database)
    with forward(database, "inbox") as running:
        events = left(running)

    assert [(it["op"], it["key"]["id"], it["cause"]) for it in events] == [("delete", 2, None), ("insert", 2, None)]


def test_what_nobody_can_list_is_an_echo(database: Database) -> None:
    """SQL of the user's own, and a view: all that is done for such an event; not for the others of its transaction."""
    make_shop(database).execute(AUDIT)
    database.execute("CREATE VIEW shop.open AS SELECT id, status FROM shop.orders")
    published(database, "inbox", "TABLE shop.orders, shop.customers, shop.audit")
    section = {"match": {"source": "shop.next", "detail-type": "order"}, "sql": "INSERT INTO shop.orders (id) VALUES "
               "(%(id)s)", "with": {"id": "detail.id"}}  # fmt: skip
    own = Mapping(MappingSection.model_validate(section))
    view = mapping("insert", into="shop.open", key={}, set={"id": "detail.id", "status": "detail.status"})
    works = [work(own, "sql", id=1), work(mapping(), "plain", id=2), work(view, "view", id=3, status="x")]
    apply(database, "inbox", *works)
    last(database)
    with forward(database, "inbox") as running:
        assert told(left(running)) == [("audit", "insert", "INSERT 2", "plain")]


def test_an_event_that_spoils_its_batch_takes_no_list_with_it(database: Database) -> None:
    make_shop(database).execute(AUDIT)
    published(database, "inbox")
    works = [work(mapping(), f"e{n}", id=n, n="seven" if n == 1 else 7) for n in range(3)]
    with applier(database, "inbox") as made:
        outcomes = made.apply_all(works)
    assert [outcomes[it].outcome for it in works] == [Outcome.APPLIED, Outcome.DEAD_LETTER, Outcome.APPLIED]
    last(database)
    with forward(database, "inbox") as running:
        assert told(left(running)) == [("audit", "insert", "INSERT 0", "e0"), ("audit", "insert", "INSERT 2", "e2")]


def test_what_a_duplicate_asked_for_is_nobodys_excuse(database: Database) -> None:
    """A trigger writes what an event of the same batch asked for that was applied long ago: that is a change."""
    make_shop(database).execute("""
        CREATE FUNCTION shop.reset() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                UPDATE shop.orders SET status = 'first' WHERE id = 1;
                RETURN NULL;
            END $$;
    """)
    into = mapping(set={"status": "detail.status"})
    with applier(database, "inbox", touched_rows=False) as made:
        made.apply_all([work(into, "old", id=1, status="first")])
    database.execute("UPDATE shop.orders SET status = 'changed' WHERE id = 1")
    database.execute("""
        CREATE TRIGGER reset AFTER INSERT ON shop.orders FOR EACH ROW WHEN (NEW.id = 2)
        EXECUTE FUNCTION shop.reset()
    """)
    published(database, "inbox")
    works = [work(into, "old", id=1, status="first"), work(into, "new", id=2, status="x")]
    with applier(database, "inbox") as made:
        outcomes = made.apply_all(works)
    assert [outcomes[it].outcome for it in works] == [Outcome.DUPLICATE, Outcome.APPLIED]
    last(database)
    with forward(database, "inbox") as running:
        assert told(left(running)) == [("orders", "update", {"id": 1}, "new")]


def test_messages_and_truncates_of_triggers_leave_too(database: Database) -> None:
    make_shop(database).execute("""
        CREATE TABLE shop.cache (id int PRIMARY KEY);
        CREATE FUNCTION shop.told() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                TRUNCATE shop.cache;
                PERFORM pg_logical_emit_message(true, 'app.order', NEW.id::text);
                RETURN NULL;
            END $$;
        CREATE TRIGGER told AFTER INSERT ON shop.orders FOR EACH ROW EXECUTE FUNCTION shop.told();
    """)
    published(database, "inbox")
    apply(database, "inbox", work(mapping(), "e1", id=1, hops=2))
    last(database)
    with forward(database, "inbox", messages=["app.*"]) as running:
        events = left(running)

    assert [(it["op"], it["cause"], it["hops"]) for it in events] == [("truncate", "e1", 3), ("message", "e1", 3)]


def test_a_large_transaction_is_listed_in_parts(database: Database) -> None:
    make_shop(database).execute(AUDIT)
    published(database, "message")
    apply(database, "message", *[work(mapping(), f"e{n}", id=n, status="x" * 50) for n in range(2500)])
    last(database)
    with forward(database, "message") as running:
        events = left(running)

    assert [it["cause"] for it in events] == [f"e{n}" for n in range(2500)]


def test_more_than_can_be_compared_is_an_echo_and_said(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("figbridge.forward.touched._MOST", 10)
    make_shop(database).execute(AUDIT)
    published(database, "inbox")
    apply(database, "inbox", *[work(mapping(), f"e{n}", id=n) for n in range(11)])
    apply(database, "inbox", work(mapping(), "next", id=50))
    last(database)
    with capture_logs() as logs, forward(database, "inbox") as running:
        assert told(left(running)) == [("audit", "insert", "INSERT 50", "next")]
    assert [line["log_level"] for line in logs if "too large to compare" in line["event"]] == ["warning"]


def test_a_transaction_without_a_list_is_an_echo(database: Database) -> None:
    """Of a reverse path that was started with the file as it was before."""
    make_shop(database).execute(AUDIT)
    published(database, "inbox")
    apply(database, "inbox", work(mapping(), "e1", id=1), touched_rows=False)
    last(database)
    with forward(database, "inbox") as running:
        assert left(running) == []


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"events":[1]}', '{"events":[["s","k",0,[[9,"a","b"]]]]}'])
def test_a_mark_that_nobody_can_read_hides_its_transaction_alone_and_is_loud(database: Database, content: str) -> None:
    published(make_shop(database), "message")
    with database.connect() as connection, connection.transaction():
        connection.execute("SELECT pg_logical_emit_message(true, %s, %s)", [mark.MARK, content])
        connection.execute("INSERT INTO shop.orders (id) VALUES (1)")
    last(database)
    with capture_logs() as logs, forward(database, "message") as running:
        assert left(running) == []
        assert running.failure is None
    assert any("cannot read" in line["event"] and line["hint"] for line in logs)


def test_a_mark_that_comes_late_is_counted(database: Database) -> None:
    published(make_shop(database), "message")
    with database.connect() as connection, connection.transaction():
        connection.execute("INSERT INTO shop.orders (id) VALUES (1)")
        connection.execute("SELECT pg_logical_emit_message(true, %s, '{}')", [mark.MARK])
        connection.execute("INSERT INTO shop.orders (id) VALUES (2)")
    last(database)
    with forward(database, "message") as running:
        assert [it["key"]["id"] for it in left(running)] == [1]
        assert running.metric("forward_late_marks_total") == 1


def test_an_origin_is_one_sessions_and_the_second_waits(database: Database) -> None:
    published(make_shop(database), "origin")
    with applier(database, "origin", touched_rows=False) as first, applier(database, "origin") as second:
        first.connection()
        with pytest.raises(LegacyUnavailable) as caught:
            second.connection()
        assert isinstance(caught.value.__cause__, psycopg.errors.ObjectInUse)
        first.close()
        until(lambda: _opens(second))


def _opens(applier: Applier) -> bool:
    try:
        applier.connection()
    except LegacyUnavailable:
        return False
    return True


def test_digests_are_those_of_the_wal_for_every_type(each_database: Database) -> None:
    """Whatever PostgreSQL makes of a literal, what we asked for is recognised, under hostile settings."""
    make_shop(each_database)
    version, works = each_database.version, []
    columns: list[tuple[str, str, str]] = []  # type, literal, column
    for section in type_matrix.SECTIONS:
        if section.needs:
            continue  # a server may lack these types: test_values.py
        each_database.execute(section.ddl or "SELECT 1")
        columns += [
            (case.kind, case.literal, f"c{len(columns) + n}")
            for n, case in enumerate(section.cases)
            if case.since <= version and _is_type(each_database, case.kind)
        ]
    assert len(columns) > 100
    tables = [columns[first : first + 100] for first in range(0, len(columns), 100)]
    for number, table in enumerate(tables):
        declared = ", ".join(f"{name} {kind}" for kind, _, name in table)
        each_database.execute(f"CREATE TABLE shop.t{number} (id int PRIMARY KEY, {declared})")
        into = mapping(
            into=f"shop.t{number}",
            key={"id": "detail.id"},
            set={name: f"detail.{name}" for _, _, name in table},
        )
        values = {name: literal for _, literal, name in table}
        works.append(work(into, f"t{number}", id=1, **values))
    published(each_database, "inbox")
    each_database.execute(
        f"ALTER DATABASE {each_database.name} SET datestyle = 'SQL, DMY'; "
        f"ALTER DATABASE {each_database.name} SET timezone = 'Asia/Kathmandu'; "
        f"ALTER DATABASE {each_database.name} SET intervalstyle = 'iso_8601'; "
        f"ALTER DATABASE {each_database.name} SET extra_float_digits = 0; "
        f"ALTER DATABASE {each_database.name} SET bytea_output = 'escape'"
    )
    apply(each_database, "inbox", *works)
    last(each_database)
    with forward(each_database, "inbox") as running:
        assert left(running) == []
        assert running.metric("forward_echoes_total") == 2 * len(works)


def _is_type(database: Database, kind: str) -> bool:
    try:
        database.execute(f"CREATE TABLE shop.probe (c {kind}); DROP TABLE shop.probe")
    except psycopg.Error:
        return False
    return True
