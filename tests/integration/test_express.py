"""Everything but COMMIT at once: what is hoped for, what disappoints, and that nobody can tell the two ways apart."""

import itertools
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest

from figbridge.config import MappingSection
from figbridge.deadletter import TableDeadLetterStore
from figbridge.errors import LegacyUnavailable
from figbridge.metrics import Metrics
from figbridge.reverse import consume
from figbridge.reverse.apply import Applier
from figbridge.reverse.consume import Consumer
from figbridge.reverse.express import Hope, Parcel
from figbridge.reverse.mapping import Mapping, Mappings, Work
from figbridge.reverse.outcome import DELETE_MISSING, ROW_WAITS, STALE_VERSION, Applied, Outcome
from figbridge.reverse.park import Park
from fixtures.clock import until
from fixtures.postgres import Database
from fixtures.reverse import COLUMNS, KIND, body, count, make_shop, mapping, orders, work
from fixtures.scripted import ScriptedSource

DONE = Applied(Outcome.APPLIED)


@pytest.fixture
def shop(database: Database) -> Database:
    return make_shop(database)


@pytest.fixture
def applier(shop: Database) -> Iterator[Applier]:
    with closing(Applier(shop.dsn, statement_timeout=10, lock_timeout=0.2)) as found:
        yield found


def versioned(action: str = "upsert") -> Mapping:
    return mapping(action, version="detail.v")


def works(of: Mapping, numbers: range, **detail: object) -> list[Work]:
    return [work(of, f"e-{number}-{detail}", id=number, **detail) for number in numbers]


def statements_of(applier: Applier) -> set[str]:
    """What our session has been sent so far, prepared."""
    found = applier.connection().execute("SELECT statement FROM pg_prepared_statements").fetchall()
    return {text.split()[0] for (text,) in found}


def test_a_batch_is_one_pipeline_of_prepared_statements_and_a_commit(shop: Database, applier: Applier) -> None:
    outcomes = applier.apply_all(works(versioned(), range(50), v=1, status="new"))
    assert set(outcomes.values()) == {DONE}
    assert len(orders(shop)) == count(shop, "figbridge.inbox") == count(shop, "figbridge.entity_version") == 50
    assert statements_of(applier) == {"BEGIN", "SELECT", "INSERT"}


def test_the_claim_comes_before_the_rows_in_the_wal(shop: Database, applier: Applier) -> None:
    slot = shop.create_slot()
    shop.execute("CREATE PUBLICATION seen FOR TABLE figbridge.inbox, figbridge.entity_version, shop.orders")
    applier.apply_all(works(versioned(), range(3), v=1, status="new"))
    sent = shop.execute(
        "SELECT get_byte(data, 0) FROM pg_logical_slot_get_binary_changes"
        "(%s, NULL, NULL, 'proto_version', '1', 'publication_names', 'seen')",
        [slot],
    )
    messages = "".join(chr(kind) for (kind,) in sent)
    # begin, then for each table its relation and three inserts: the inbox is the first of them
    assert messages == "B" + "RIII" * 3 + "C"
    first = shop.execute("SELECT min(xmin::text::bigint), max(xmin::text::bigint) FROM figbridge.inbox")
    assert first[0][0] == first[0][1]


def test_what_disappoints_is_done_step_by_step_with_the_same_end(shop: Database, applier: Applier) -> None:
    upsert, update, delete = versioned(), versioned("update"), versioned("delete")
    first = work(upsert, "first", id=1, v=5, status="five")
    applier.apply_all([first])
    late = work(upsert, "late", id=1, v=4, status="four")
    again = work(upsert, "first", id=1, v=5, status="five")
    other = work(upsert, "first", id=1, v=6, status="another payload")
    orphan = work(update, "orphan", id=2, v=1, status="no row yet")
    gone = work(delete, "gone", id=3, v=1)
    good = work(upsert, "good", id=4, v=1, status="good")
    outcomes = applier.apply_all([late, again, orphan, gone, good])
    assert outcomes[late].reason == STALE_VERSION
    assert outcomes[again].outcome is Outcome.DUPLICATE
    assert outcomes[orphan].outcome is Outcome.RETRY
    assert outcomes[gone] == Applied(Outcome.IGNORED, DELETE_MISSING, "no row of shop.orders has this key")
    assert outcomes[good] == DONE
    assert applier.apply_all([other])[other].outcome is Outcome.DEAD_LETTER
    assert orders(shop) == [(1, "five"), (4, "good")]


def test_statements_of_an_event_that_was_applied_before_leave_no_trace(shop: Database, applier: Applier) -> None:
    """They are sent, since nobody knows yet; the rollback takes all of them back, triggers' work too."""
    shop.execute("""
        CREATE TABLE shop.seen (id bigint, status text);
        CREATE FUNCTION shop.look() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN INSERT INTO shop.seen VALUES (NEW.id, NEW.status); RETURN NULL; END $$;
        CREATE TRIGGER look AFTER INSERT OR UPDATE ON shop.orders FOR EACH ROW EXECUTE FUNCTION shop.look();
    """)
    plain = mapping("upsert")
    old, new = work(plain, "old", id=1, status="old"), work(plain, "new", id=1, status="new")
    applier.apply_all([old])
    applier.apply_all([new])
    outcomes = applier.apply_all([old, work(plain, "third", id=2, status="third")])
    assert [it.outcome for it in outcomes.values()] == [Outcome.DUPLICATE, Outcome.APPLIED]
    assert shop.execute("SELECT id, status FROM shop.seen") == [(1, "old"), (1, "new"), (2, "third")]


def test_one_entity_many_times_is_still_one_pipeline(shop: Database, applier: Applier) -> None:
    changes = [work(versioned(), f"c-{version}", id=1, v=version, status=str(version)) for version in range(1, 30)]
    assert set(applier.apply_all(changes).values()) == {DONE}
    assert orders(shop) == [(1, "29")]
    assert len(shop.execute("SELECT DISTINCT xmin::text FROM figbridge.inbox")) == 1


def test_a_locked_row_is_waited_for_once(shop: Database, applier: Applier) -> None:
    shop.execute("INSERT INTO shop.orders (id) VALUES (7)")
    with shop.connect() as application:
        application.execute("BEGIN; UPDATE shop.orders SET status = 'theirs' WHERE id = 7")
        outcomes = applier.apply_all(works(versioned(), range(5, 9), v=1, status="ours"))
        application.execute("ROLLBACK")
    assert [it.reason for it in outcomes.values()] == ["", "", "55P03", ""]
    assert [it for it in orders(shop) if it[1] == "ours"] == [(5, "ours"), (6, "ours"), (8, "ours")]


@pytest.mark.pg(">= 17")
@pytest.mark.parametrize("hopeful", [True, False])
def test_a_transaction_that_takes_too_long_is_no_events_fault(shop: Database, *, hopeful: bool) -> None:
    """transaction_timeout, which ends the session; of a pipeline that is all we are told."""
    shop.execute("INSERT INTO shop.orders (id) VALUES (7)")
    with shop.connect() as application, closing(Applier(shop.dsn, statement_timeout=10, lock_timeout=5)) as applier:
        shop.execute(f"ALTER DATABASE {shop.name} SET transaction_timeout = '300ms'")
        application.execute("BEGIN; UPDATE shop.orders SET status = 'theirs' WHERE id = 7")
        batch = works(mapping(), range(5, 9), status="ours")
        if hopeful:
            with pytest.raises(LegacyUnavailable):
                applier.apply_all(batch)
        outcomes = applier.apply_all(batch, hopeful=hopeful)
        application.execute("ROLLBACK")
        assert [(outcomes[it].outcome.value, outcomes[it].reason) for it in batch] == [
            *[("applied", "")] * 2, ("retried", "25P04"), ("applied", "")
        ]  # fmt: skip
        assert applier.apply_all(batch[2:3]) == {batch[2]: DONE}
    assert (7, "ours") in orders(shop)


def test_without_its_prepared_statements_it_goes_on_without_any(shop: Database, applier: Applier) -> None:
    applier.apply_all(works(versioned(), range(3), v=1, status="new"))
    # behind the driver's back, as a pooler does that gives our session to somebody else
    assert applier.connection().pgconn.exec_(b"DEALLOCATE ALL").status == 1
    batch = works(versioned(), range(3), v=2, status="newer")
    with pytest.raises(LegacyUnavailable):
        applier.apply_all(batch)
    assert set(applier.apply_all(batch).values()) == {DONE}
    assert orders(shop) == [(number, "newer") for number in range(3)]
    assert statements_of(applier) == set()


@pytest.mark.parametrize("own_sql", [True, False])
def test_a_rollback_leaves_what_was_prepared(shop: Database, applier: Applier, *, own_sql: bool) -> None:
    """The driver forgets those of its own by DEALLOCATE ALL, which would take the wire's with them."""
    own = mapping(into=None, action=None, key=None, set=None, sql="UPDATE shop.orders SET note = 'seen'")
    applier.apply_all(works(versioned(), range(3), v=1, status="new"))
    if own_sql:
        batch = works(own, range(3))
        for outcome in (Outcome.APPLIED, Outcome.DUPLICATE):
            assert {it.outcome for it in applier.apply_all(batch).values()} == {outcome}
    else:
        applier.apply_all(works(versioned(), range(3), v=2, status="newer"), hopeful=False)
        bad = works(versioned(), range(1), v=3, n="no number")
        assert {it.reason for it in applier.apply_all(bad, hopeful=False).values()} == {"22P02"}
    for version in (4, 5, 6):  # after a disappointment the next one or two are done step by step
        assert set(applier.apply_all(works(versioned(), range(3), v=version, status="newest")).values()) == {DONE}
    assert orders(shop) == [(number, "newest") for number in range(3)]
    assert statements_of(applier) == {"BEGIN", "SELECT", "INSERT"}
    assert applier.connection().prepare_threshold is not None


@pytest.mark.parametrize("hopeful", [True, False])
@pytest.mark.parametrize(("bad", "state"), [("sql", "26000"), ("trigger", "42P05"), ("raise", "26000")])
def test_a_statement_that_somebody_else_prepared_or_did_not_is_the_events_fault(
    shop: Database, applier: Applier, bad: str, state: str, *, hopeful: bool
) -> None:
    shop.execute("""
        CREATE FUNCTION shop.twice() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            EXECUTE 'PREPARE totals AS SELECT 1';
            EXECUTE 'PREPARE totals AS SELECT 1';
            RETURN NEW;
        END $$;
        CREATE TRIGGER twice BEFORE INSERT ON shop.orders
            FOR EACH ROW WHEN (NEW.status = 'trigger') EXECUTE FUNCTION shop.twice();
        CREATE FUNCTION shop.refuse() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE 'not this one' USING ERRCODE = '26000'; END $$;
        CREATE TRIGGER refuse BEFORE INSERT ON shop.orders
            FOR EACH ROW WHEN (NEW.status = 'raise') EXECUTE FUNCTION shop.refuse();
    """)
    own = mapping(into=None, action=None, key=None, set=None, sql="EXECUTE refresh_totals")
    batch = works(versioned(), range(4), v=1, status="new")
    batch[1] = works(own if bad == "sql" else versioned(), range(1, 2), v=1, status=bad)[0]
    outcomes = applier.apply_all(batch, hopeful=hopeful)
    assert [outcomes[it].reason for it in batch] == ["", state, "", ""]
    assert outcomes[batch[1]].outcome is Outcome.DEAD_LETTER
    assert orders(shop) == [(number, "new") for number in (0, 2, 3)]
    assert applier.connection().prepare_threshold is not None  # it goes on with ours


@pytest.mark.parametrize("hopeful", [True, False])
@pytest.mark.parametrize("action", ["upsert", "update"])
def test_two_replicas_with_the_same_rows_never_wait_in_a_circle(shop: Database, action: str, hopeful: bool) -> None:
    shop.execute("INSERT INTO shop.orders (id) SELECT generate_series(1, 60)")
    of = mapping(action)

    def replica(name: str) -> set[Applied]:
        chance, found = random.Random(name), set()
        with closing(Applier(shop.dsn, statement_timeout=30, lock_timeout=20)) as ours:
            for turn in range(15):
                numbers = chance.sample(range(1, 61), 50)
                batch = [work(of, f"{name}-{turn}-{number}", id=number, status=name) for number in numbers]
                found |= set(ours.apply_all(batch, hopeful=hopeful).values())
        return found

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(replica, "abc")) == [{DONE}] * 3
    assert shop.execute("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()") == [(0,)]


@pytest.mark.parametrize("attempts", [1, 2])
def test_what_is_delivered_again_is_not_tried_in_hope(shop: Database, attempts: int) -> None:
    """A key that is known would be an error in the server's log."""
    stop, seen = threading.Event(), []

    def look(step: str) -> None:
        if step == "executed":
            seen.append(statements_of(ours))

    ours = Applier(shop.dsn, statement_timeout=10, lock_timeout=1, on_step=look)
    section = MappingSection.model_validate({
        "match": KIND, "into": "shop.orders", "action": "upsert", "key": {"id": "detail.id"}, "set": COLUMNS,
    })  # fmt: skip
    source = ScriptedSource([body("e-1", id=1, status="new")], stop, attempts=attempts)
    letters = TableDeadLetterStore(shop.dsn)
    Consumer(source, Mappings([section]), ours, letters, Metrics(), park_timeout=60).run(stop)
    assert orders(shop) == [(1, "new")]
    assert ["BEGIN" in statements for statements in seen] == [attempts == 1]


def test_a_batch_at_hand_waits_until_what_is_left_of_the_one_before_is_parked(shop: Database) -> None:
    """The row is free again when the second batch could begin: it must not overtake the first."""
    shop.execute("INSERT INTO shop.orders (id) VALUES (1)")
    stop = threading.Event()
    bodies = [body("e-1", id=1, status="first"), body("e-2", id=1, status="second")]
    section = MappingSection.model_validate({
        "match": KIND, "into": "shop.orders", "action": "upsert", "key": {"id": "detail.id"}, "set": COLUMNS,
    })  # fmt: skip
    with shop.connect() as application:

        class Freed(Applier):
            def apply_all(self, *arguments: Any, **options: Any) -> dict[Work, Applied]:
                outcomes = super().apply_all(*arguments, **options)
                application.execute("ROLLBACK")
                return outcomes

        application.execute("BEGIN; UPDATE shop.orders SET status = 'theirs' WHERE id = 1")
        ours = Freed(shop.dsn, statement_timeout=10, lock_timeout=0.2)
        source = ScriptedSource(bodies, stop, lambda: count(shop, "figbridge.parked") == 0, at_once=1)
        letters = TableDeadLetterStore(shop.dsn)
        Consumer(source, Mappings([section]), ours, letters, Metrics(), park_timeout=60).run(stop)
    assert orders(shop) == [(1, "second")]


def test_a_parcel_is_sent_for_those_works_alone(shop: Database, applier: Applier) -> None:
    made = works(versioned(), range(4), v=1, status="made")
    parcel = applier.parcel(made, alone=True)
    assert parcel is not None
    assert set(applier.apply_all(made[1:], parcel=parcel)) == set(made[1:]), "the first one was lost meanwhile"
    assert [number for number, _ in orders(shop)] == [1, 2, 3]
    assert statements_of(applier) == {"BEGIN", "SELECT", "INSERT"}
    again = made + made[:1]
    assert applier.parcel(again, alone=True) is None, "a key comes twice: the second one is a duplicate"


def test_a_parcel_made_before_another_event_was_parked_overtakes_nothing(shop: Database, applier: Applier) -> None:
    made = works(versioned(), range(3), v=2, status="second")
    parcel = applier.parcel(made, alone=True)
    first = work(versioned("update"), "first", id=1, v=1, status="first")
    Park(applier.connection, timeout=60).add([(first, Applied(Outcome.RETRY, "55P03"), b"{}")])
    outcomes = applier.apply_all(made, parcel=parcel)
    assert [outcomes[it].reason for it in made] == ["", ROW_WAITS, ""]
    assert [number for number, _ in orders(shop)] == [0, 2]
    others = works(versioned(), range(5, 9), v=1, status="others")
    assert set(applier.apply_all(others, parcel=applier.parcel(others, alone=False)).values()) == {DONE}


def test_the_claim_tells_sources_and_ids_apart(shop: Database, applier: Applier) -> None:
    """What all events have in common is sent once; these have nothing in common."""
    keyed = mapping(idempotency_key="detail.key")
    one = work(keyed, "id-1", id=1, key="key-1", status="one")
    two = replace(work(keyed, "id-2", id=2, key="key-1", status="two"), identity=("another", "key-1"))
    assert set(applier.apply_all([one, two]).values()) == {DONE}
    rows = shop.execute("SELECT source, idempotency_key, event_id, payload_hash FROM figbridge.inbox ORDER BY event_id")
    assert rows == [
        (*one.identity, "id-1", one.payload_hash),
        (*two.identity, "id-2", two.payload_hash),
    ]


def ahead(applier: Applier, first: list[Work], second: list[Work]) -> tuple[dict[Work, Applied], Parcel]:
    """Apply `first`, with `second` behind its COMMIT; the outcomes, and what `second` was sent as."""
    parcel = applier.parcel(second, alone=True)
    assert parcel is not None
    return applier.apply_all(first, following=lambda: parcel), parcel


def sessions(shop: Database) -> set[str]:
    """The states of our sessions, as soon as none of them is at work."""
    asked = "SELECT state FROM pg_stat_activity WHERE application_name = 'figbridge-apply' AND datname = %s"

    def states() -> set[str]:
        return {state for (state,) in shop.execute(asked, [shop.name])}

    until(lambda: "active" not in states(), 30, "our session has done what it was sent")
    return states()


def test_the_next_batch_stands_behind_the_commit_and_is_committed_in_its_turn(shop: Database, applier: Applier) -> None:
    first, second = (
        works(versioned(), range(5), v=1, status="first"),
        works(versioned(), range(9), v=2, status="second"),
    )
    outcomes, parcel = ahead(applier, first, second)
    assert set(outcomes.values()) == {DONE}
    assert sessions(shop) == {"idle in transaction"}
    assert orders(shop) == [(number, "first") for number in range(5)], "nobody sees the second one yet"
    sent = int(shop.execute("SELECT pg_current_xact_id()::text::bigint")[0][0])
    assert set(applier.apply_all(second, parcel=parcel).values()) == {DONE}
    assert orders(shop) == [(number, "second") for number in range(9)]
    wrote = shop.execute("SELECT max(xmin::text::bigint) FROM shop.orders")[0][0]
    assert wrote < sent, "it is the transaction that was sent ahead"
    assert sessions(shop) == {"idle"}


def test_what_was_sent_ahead_is_taken_back_when_something_else_is_asked(shop: Database, applier: Applier) -> None:
    first, second = (
        works(versioned(), range(3), v=1, status="first"),
        works(versioned(), range(3), v=2, status="second"),
    )
    _, parcel = ahead(applier, first, second)
    assert applier.connection().execute("SELECT max(version) FROM figbridge.entity_version").fetchone() == (1,)
    assert sessions(shop) == {"idle"}
    others = works(versioned(), range(5, 7), v=1, status="others")
    assert set(ahead(applier, others, second)[0].values()) == {DONE}
    more = works(versioned(), range(3), v=3, status="more")
    assert set(applier.apply_all(more).values()) == {DONE}
    assert {it.reason for it in applier.apply_all(second, parcel=parcel).values()} == {STALE_VERSION}
    assert orders(shop) == [*((number, "more") for number in range(3)), (5, "others"), (6, "others")]


def test_a_commit_that_fails_takes_back_what_stands_behind_it(shop: Database, applier: Applier) -> None:
    """The second batch has run by then, on rows that the first one was to write before it."""
    shop.execute("""
        CREATE FUNCTION shop.refuse() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN IF NEW.status = 'bad' THEN RAISE check_violation; END IF; RETURN NULL; END $$;
        CREATE CONSTRAINT TRIGGER refuse AFTER INSERT OR UPDATE ON shop.orders DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION shop.refuse();
    """)
    first = [*works(versioned(), range(3), v=1, status="first"), work(versioned(), "bad", id=3, v=1, status="bad")]
    second = works(versioned("update"), range(3), v=2, status="second")
    outcomes, parcel = ahead(applier, first, second)
    assert [outcomes[it].outcome for it in first] == [Outcome.APPLIED] * 3 + [Outcome.DEAD_LETTER]
    assert sessions(shop) == {"idle"}
    assert orders(shop) == [(number, "first") for number in range(3)]
    assert set(applier.apply_all(second, parcel=parcel).values()) == {DONE}
    assert orders(shop) == [(number, "second") for number in range(3)]


def test_what_was_sent_ahead_may_disappoint(shop: Database, applier: Applier) -> None:
    first, again = works(versioned(), range(4), v=1, status="first"), works(versioned(), range(3), v=1, status="first")
    mixed = [*again, work(versioned("update"), "waits", id=9, v=1, status="no row yet")]
    _, parcel = ahead(applier, first, mixed)
    outcomes = applier.apply_all(mixed, parcel=parcel)
    assert [outcomes[it].outcome for it in mixed] == [Outcome.DUPLICATE] * 3 + [Outcome.RETRY]
    assert sessions(shop) == {"idle"}


def test_what_was_sent_ahead_is_not_committed_without_leave(shop: Database, applier: Applier) -> None:
    """Its receipt was lost meanwhile, say."""

    class Forbidden(Exception):
        pass

    def forbid() -> None:
        raise Forbidden

    first, second = (
        works(versioned(), range(4), v=1, status="first"),
        works(versioned(), range(4), v=2, status="second"),
    )
    _, parcel = ahead(applier, first, second)
    assert sessions(shop) == {"idle in transaction"}
    with pytest.raises(Forbidden):
        applier.apply_all(second, forbid, parcel=parcel)
    assert sessions(shop) == {"idle"}
    assert orders(shop) == [(number, "first") for number in range(4)]
    assert set(applier.apply_all(second, parcel=parcel).values()) == {DONE}


def test_what_was_sent_ahead_is_sent_again_when_its_session_is_gone(shop: Database, applier: Applier) -> None:
    first, second = (
        works(versioned(), range(4), v=1, status="first"),
        works(versioned(), range(4), v=2, status="second"),
    )
    _, parcel = ahead(applier, first, second)
    assert sessions(shop) == {"idle in transaction"}
    ours = "FROM pg_stat_activity WHERE application_name = 'figbridge-apply' AND datname = %s"
    shop.execute(f"SELECT pg_terminate_backend(pid) {ours}", [shop.name])
    with pytest.raises(LegacyUnavailable):
        applier.apply_all(second, parcel=parcel)
    assert set(applier.apply_all(second, parcel=parcel).values()) == {DONE}
    assert orders(shop) == [(number, "second") for number in range(4)]


def test_the_loop_sends_a_batch_behind_the_one_before(shop: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten batches about the same rows; the end of each waits until the next one is at hand."""
    monkeypatch.setattr(consume, "_LOOK_INTO_EMPTY", 600.0)  # seconds; such a look comes between two batches
    stop = threading.Event()
    found: list[set[str]] = []
    section = MappingSection.model_validate({
        "match": KIND, "into": "shop.orders", "action": "upsert", "key": {"id": "detail.id"}, "set": COLUMNS,
        "version": "detail.v",
    })  # fmt: skip

    class Patient(Applier):
        def apply_all(
            self, *arguments: Any, following: Callable[[], Parcel | None] = lambda: None, **options: Any
        ) -> dict[Work, Applied]:
            self.following = following
            return super().apply_all(*arguments, following=following, **options)

    def step(name: str) -> None:
        if name == "executed" and len(found) < 9:
            until(ours.following, 30, "the next batch is at hand")
        elif name == "committed":
            found.append(sessions(shop))

    bodies = [body(f"e-{number}", id=number % 7, v=number, status=str(number)) for number in range(100)]
    ours = Patient(shop.dsn, statement_timeout=60, lock_timeout=2, on_step=step)
    letters = TableDeadLetterStore(shop.dsn)
    source = ScriptedSource(bodies, stop, at_once=10)
    Consumer(source, Mappings([section]), ours, letters, Metrics(), park_timeout=60).run(stop)
    assert orders(shop) == sorted((number % 7, str(number)) for number in range(93, 100))
    assert found == [{"idle in transaction"}] * 9 + [{"idle"}]


def test_more_kinds_of_statements_than_the_server_is_to_keep(shop: Database, applier: Applier) -> None:
    columns = [f"c{number}" for number in range(8)]
    shop.execute(f"CREATE TABLE shop.wide (id bigint PRIMARY KEY, {', '.join(f'{it} text' for it in columns)})")
    of = mapping(into="shop.wide", set={it: f"detail.{it}" for it in columns})
    kinds = [[it for number, it in enumerate(columns) if kind >> number & 1] for kind in range(1, 255)]
    for some in (kinds[:150], kinds[100:], kinds):  # one transaction and many; before its answers and after
        made = [work(of, f"{len(some)}-{it}", id=1, **dict.fromkeys(it, "-".join(it))) for it in some]
        assert set(applier.apply_all(made).values()) == {DONE}
    assert len(applier.connection().execute("SELECT FROM pg_prepared_statements").fetchall()) <= 100
    assert shop.execute("SELECT c1, c7 FROM shop.wide") == [("-".join(kinds[-1]),) * 2]


def test_hope_comes_back_more_and_more_slowly() -> None:
    hope = Hope()

    def pause() -> int:
        hope.learn(fulfilled=False)
        return sum(1 for _ in itertools.takewhile(lambda there: not there, iter(hope.there, None)))

    assert [pause() for _ in range(8)] == [1, 2, 4, 8, 16, 32, 64, 64]
    hope.learn(fulfilled=True)
    assert pause() == 1
