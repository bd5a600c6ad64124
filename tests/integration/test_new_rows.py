"""Rows that are expected to be new are inserted as such; and what was expected never changes the end."""

import random
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import pytest

from figbridge.reverse.apply import Applier
from figbridge.reverse.mapping import Mapping, Work
from figbridge.reverse.novelty import Rows
from figbridge.reverse.outcome import STALE_VERSION, Applied, Outcome
from fixtures.clock import until
from fixtures.postgres import Database
from fixtures.reverse import make_shop, mapping, orders, work

DONE = Applied(Outcome.APPLIED)


@pytest.fixture
def shop(database: Database) -> Database:
    return make_shop(database)


@pytest.fixture
def applier(shop: Database) -> Iterator[Applier]:
    with closing(Applier(shop.dsn, statement_timeout=10, lock_timeout=1)) as found:
        yield found


def batch(numbers: range, *, version: int = 1, of: Mapping | None = None, status: str = "new") -> list[Work]:
    of = of or mapping("upsert", version="detail.v")
    return [work(of, f"e-{number}-{version}", id=number, v=version, status=status) for number in numbers]


def applied(applier: Applier, works: Sequence[Work]) -> tuple[dict[Work, Applied], Rows]:
    """The outcomes, and what was expected of the rows."""
    parcel = applier.parcel(works, alone=True)
    return applier.apply_all(works, parcel=parcel), parcel.rows if parcel else Rows.UNKNOWN


def warmed(applier: Applier) -> None:
    """From here on rows are taken for new."""
    outcomes, rows = applied(applier, batch(range(100, 110)))
    assert (set(outcomes.values()), rows) == ({DONE}, Rows.ASKED)


def test_after_a_batch_of_new_rows_nothing_is_provided_for_those_that_are_there(
    shop: Database, applier: Applier
) -> None:
    warmed(applier)
    outcomes, rows = applied(applier, batch(range(10)))
    assert (set(outcomes.values()), rows) == ({DONE}, Rows.NEW)
    asked = "SELECT statement FROM pg_prepared_statements WHERE statement LIKE %s ORDER BY prepare_time"
    for table in ('%"shop"."orders"%', "%INSERT INTO figbridge.entity_version%"):
        sent = [statement for (statement,) in applier.connection().execute(asked, [table])]
        assert ["ON CONFLICT" in statement for statement in sent] == [True, False]
    assert [number for number, _ in orders(shop)] == [*range(10), *range(100, 110)]


def test_a_row_that_only_the_legacy_application_had_is_updated_after_all(shop: Database, applier: Applier) -> None:
    warmed(applier)
    shop.execute("INSERT INTO shop.orders (id, status) VALUES (3, 'theirs')")
    outcomes, rows = applied(applier, batch(range(10)))
    assert (set(outcomes.values()), rows) == ({DONE}, Rows.NEW)
    assert orders(shop)[3] == (3, "new")
    assert applied(applier, batch(range(20, 30)))[1] is Rows.UNKNOWN, "once bitten"
    assert applied(applier, batch(range(30, 40)))[1] is Rows.ASKED


def test_an_older_event_of_a_known_entity_is_ignored(shop: Database, applier: Applier) -> None:
    applied(applier, batch(range(3), version=5))
    late, others = batch(range(1), version=4, status="late"), batch(range(10, 20))
    outcomes, rows = applied(applier, [*others, *late])
    assert rows is Rows.NEW
    assert outcomes[late[0]].reason == STALE_VERSION
    assert {outcomes[it] for it in others} == {DONE}
    assert orders(shop)[0] == (0, "new")


def test_a_key_that_is_known_says_nothing_of_rows(shop: Database, applier: Applier) -> None:
    """It is an error in the server's log, once: to try again with ON CONFLICT would make it two."""
    warmed(applier)
    known, new = batch(range(100, 101)), batch(range(10))
    failed = "SELECT xact_rollback FROM pg_stat_database WHERE datname = current_database()"
    outcomes, rows = applied(applier, [*new, *known])
    assert (outcomes[known[0]].outcome, rows) == (Outcome.DUPLICATE, Rows.NEW)
    assert {outcomes[it] for it in new} == {DONE}
    applier.connection().execute("SELECT pg_stat_force_next_flush()")
    applier.connection().execute("SELECT 1")
    until(lambda: shop.execute(failed)[0][0] > 0, 20)
    assert shop.execute(failed) == [(1,)]
    applied(applier, batch(range(20, 30)))  # step by step, after a disappointment
    assert applied(applier, batch(range(30, 40)))[1] is Rows.NEW


def test_rows_that_are_there_are_never_taken_for_new(shop: Database, applier: Applier) -> None:
    """No error in the server's log, then."""
    shop.execute("INSERT INTO shop.orders (id) SELECT generate_series(0, 9)")
    seen = [applied(applier, batch(range(10), version=version))[1] for version in range(1, 12)]
    assert Rows.NEW not in seen
    assert seen.count(Rows.ASKED) == 4


def test_what_waits_for_nothing_new_is_as_ever(applier: Applier) -> None:
    """Deletes, updates, events without a version, an entity that comes twice: none of them is looked for."""
    once, plain = batch(range(1)), mapping("upsert")
    for works in (
        batch(range(3), of=mapping("delete", version="detail.v")),
        batch(range(3), of=mapping("update", version="detail.v")),
        [work(plain, "a", id=1, status="plain")],
        [*once, *batch(range(1), version=2)],
    ):
        parcel = applier.parcel(works, alone=True)
        assert parcel is not None
        assert parcel.rows is Rows.UNKNOWN


def test_another_unique_index_speaks_as_it_always_does(shop: Database, applier: Applier) -> None:
    shop.execute("CREATE UNIQUE INDEX note ON shop.orders (note); INSERT INTO shop.orders (id, note) VALUES (999, 'x')")
    warmed(applier)
    of = mapping("upsert", version="detail.v")
    bad, good = work(of, "bad", id=1, v=1, note="x"), work(of, "good", id=2, v=1, note="y")
    outcomes, rows = applied(applier, [bad, good])
    assert rows is Rows.NEW
    assert (outcomes[bad].outcome, outcomes[good]) == (Outcome.DEAD_LETTER, DONE)
    assert outcomes[bad].reason == "23505"


@pytest.mark.parametrize("seed", range(4))
def test_nobody_can_tell_what_was_expected(shop: Database, seed: int) -> None:
    """The same events in batches, with and without: the same outcomes, the same rows."""
    chance, ends, expected = random.Random(seed), list[Any](), set[Rows]()
    upsert, insert, delete = (mapping(it, version="detail.v") for it in ("upsert", "insert", "delete"))
    plans = [
        [
            (
                chance.choices((upsert, insert, delete), (8, 1, 1))[0],
                # one batch in two has rows of its own, others come back to what there is
                chance.randrange(1000 * turn, 1000 * turn + 900) if turn % 2 else chance.randrange(2000),
                chance.randrange(1, 4),
            )
            for _ in range(chance.randrange(1, 12))
        ]
        for turn in range(40)
    ]
    for makes in (True, False):
        shop.execute("TRUNCATE shop.orders, figbridge.inbox, figbridge.entity_version, figbridge.parked")
        told = []
        with closing(Applier(shop.dsn, statement_timeout=10, lock_timeout=1)) as ours:
            for turn, plan in enumerate(plans):
                works = [
                    work(of, f"{turn}-{place}", id=number, v=version, status=f"{turn}-{place}")
                    for place, (of, number, version) in enumerate(plan)
                ]
                parcel = ours.parcel(works, alone=True) if makes else None
                expected |= {parcel.rows} if parcel else set()
                outcomes = ours.apply_all(works, parcel=parcel)
                told.append([(outcomes[it].outcome, outcomes[it].reason) for it in works])
        versions = shop.execute("SELECT scope, identity, version, deleted FROM figbridge.entity_version ORDER BY 1, 2")
        ends.append((told, orders(shop), versions))
    assert ends[0] == ends[1]
    assert expected == set(Rows)
