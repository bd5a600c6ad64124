"""``reverse.order: group``: nothing of a FIFO queue's message group overtakes another of it, whatever it is about."""

import threading
from contextlib import ExitStack
from typing import Any

import pytest

from conformance.test_sqs_groups import Running, locked, no_parent
from conformance.test_sqs_heartbeat import Queue
from figbridge.deadletter import TableDeadLetterStore, Wanted
from figbridge.metrics import Metrics
from figbridge.reverse.apply import Applier
from figbridge.reverse.consume import Consumer
from figbridge.reverse.mapping import Mappings
from figbridge.reverse.redrive import redrive
from fixtures.clock import until
from fixtures.postgres import Database
from fixtures.reverse import HISTORY, KIND, body, count, make_shop, mapping

STATUS = mapping("update", match={**KIND, "detail-type": "status"}, set={"status": "detail.status"})
BOTH = [mapping(), STATUS]


@pytest.fixture
def shop(database: Database) -> Database:
    make_shop(database).execute(HISTORY)
    return database


@pytest.fixture
def queue(aws_endpoint: str) -> Queue:
    return Queue(aws_endpoint, fifo=True)


def put(queue: Queue, group: str, order: int, status: str, kind: str = "order", **detail: Any) -> None:
    """An event of an order, in the group of somebody."""
    queue.put(body(f"{group}-{order}-{status}-{kind}", kind, id=order, status=status, **detail).decode(), group)


def history(database: Database) -> list[tuple[int, str]]:
    """(order, status) of all that was written, in the order in which it was."""
    return database.execute("SELECT id, status FROM shop.history ORDER BY place")


def parked(database: Database) -> int:
    return count(database, "figbridge.parked")


def applied(database: Database, expected: list[tuple[int, str]], running: Running) -> None:
    until(lambda: history(database) == expected, 30, lambda: f"{history(database)} {running.failure}")


@pytest.mark.parametrize("trouble", [no_parent, locked])
def test_what_waits_holds_up_all_of_its_group_and_no_other(shop: Database, queue: Queue, trouble: Any) -> None:
    with trouble(shop) as end:
        for order, status in (1, "a"), (2, "a"), (1, "b"), (3, "a"):  # one receive
            put(queue, "ada", order, status, customer=7 if order == 1 else None)
            put(queue, "bob", 10 + order, status)
        with Running(shop, queue, order="group") as running:
            others = [(11, "a"), (12, "a"), (11, "b"), (13, "a")]
            applied(shop, others, running)
            until(lambda: parked(shop) == 4, 30, lambda: f"{parked(shop)}")
            put(queue, "ada", 2, "c")  # comes by itself, and finds the others parked
            put(queue, "ada", 4, "a")
            put(queue, "bob", 12, "c")
            until(lambda: parked(shop) == 6, 30, lambda: f"{parked(shop)}")
            until(lambda: queue.counts == (0, 0), 30, lambda: f"the park has them: {queue.counts}")
            applied(shop, [*others, (12, "c")], running)
            end()
            group = [(1, "a"), (2, "a"), (1, "b"), (3, "a"), (2, "c"), (4, "a")]
            applied(shop, [*others, (12, "c"), *group], running)
            until(lambda: running.outcome("applied") == 11)
            assert not running.outcome("dead_letter")
            assert not parked(shop)


def test_with_the_order_of_entities_the_others_of_its_group_go_on(shop: Database, queue: Queue) -> None:
    with no_parent(shop) as end, Running(shop, queue) as running:
        for order, status in (1, "a"), (2, "a"), (1, "b"), (2, "b"):
            put(queue, "ada", order, status, customer=7 if order == 1 else None)
        applied(shop, [(2, "a"), (2, "b")], running)
        until(lambda: parked(shop) == 2)
        end()
        applied(shop, [(2, "a"), (2, "b"), (1, "a"), (1, "b")], running)


def test_a_batch_is_written_in_the_order_of_its_groups(shop: Database, queue: Queue) -> None:
    """Triggers see it, though all of it is one transaction; rows of other groups may share a statement with it."""
    for order in 5, 4, 3, 2, 1:
        put(queue, "ada", order, "a")
        put(queue, "bob", 10 + order, "a")
    with Running(shop, queue, order="group") as running:
        until(lambda: running.outcome("applied") == 10, 30, lambda: f"{running.failure}")
    assert [order for order, _ in history(shop) if order < 10] == [5, 4, 3, 2, 1]
    assert [order for order, _ in history(shop) if order > 10] == [15, 14, 13, 12, 11]


def test_two_consumers_keep_the_order_of_every_group(shop: Database, queue: Queue) -> None:
    sent: dict[str, list[tuple[int, str]]] = {}
    with no_parent(shop) as end, ExitStack() as stack:
        consumers = [stack.enter_context(Running(shop, queue, order="group")) for _ in range(2)]
        for number in range(8):
            for group in range(6):
                order, status, waits = 10 * group + number % 3, str(number), group % 2 and number in {1, 5}
                put(queue, f"g{group}", order, status, customer=7 if waits else None)
                sent.setdefault(f"g{group}", []).append((order, status))
        until(lambda: parked(shop) == 3 * 7, 30, lambda: f"{parked(shop)} {[it.failure for it in consumers]}")
        until(lambda: queue.counts == (0, 0), 30, lambda: f"{queue.counts}")
        assert len(history(shop)) == 3 * 8 + 3, "the other groups are done"
        end()
        until(lambda: len(history(shop)) == 48, 30, lambda: f"{history(shop)} {[it.failure for it in consumers]}")
    for number, events in enumerate(sent.values()):
        assert [it for it in history(shop) if it[0] // 10 == number] == events


def test_another_replica_or_a_later_one_sees_what_waits(shop: Database, queue: Queue) -> None:
    with no_parent(shop) as end:
        with Running(shop, queue, order="group"):
            put(queue, "ada", 1, "a", customer=7)
            until(lambda: parked(shop) == 1)
            until(lambda: queue.counts == (0, 0))
        put(queue, "ada", 2, "a")
        put(queue, "bob", 3, "a")
        with Running(shop, queue, order="group") as running:
            applied(shop, [(3, "a")], running)
            until(lambda: parked(shop) == 2)
            end()
            applied(shop, [(3, "a"), (1, "a"), (2, "a")], running)


def test_an_entity_keeps_its_order_across_groups_and_settings(shop: Database, queue: Queue) -> None:
    """An order changes hands; and what was parked under the other setting has no group, but an entity."""
    with no_parent(shop) as end:
        with Running(shop, queue):
            put(queue, "ada", 1, "a", customer=7)
            until(lambda: parked(shop) == 1)
            until(lambda: queue.counts == (0, 0))
        with Running(shop, queue, order="group") as running:
            put(queue, "ada", 2, "a")
            applied(shop, [(2, "a")], running)
            put(queue, "bob", 1, "b")
            until(lambda: parked(shop) == 2)
            put(queue, "bob", 3, "a")
            until(lambda: parked(shop) == 3)
            until(lambda: queue.counts == (0, 0))
        with Running(shop, queue) as running:
            put(queue, "bob", 4, "a")
            applied(shop, [(2, "a"), (4, "a")], running)
            put(queue, "bob", 3, "b")
            until(lambda: parked(shop) == 4)
            end()
            until(lambda: running.outcome("applied") == 5, 30, lambda: f"{history(shop)} {running.failure}")
    for order, expected in (1, ["a", "b"]), (3, ["a", "b"]):
        assert [status for it, status in history(shop) if it == order] == expected


def test_a_poisonous_event_is_a_dead_letter_and_its_group_goes_on(shop: Database, queue: Queue) -> None:
    for order, status, quantity in (1, "a", 1), (2, "a", "many"), (3, "a", 1), (2, "b", 1), (1, "b", 1):
        put(queue, "ada", order, status, n=quantity)
    with Running(shop, queue, order="group") as running:
        applied(shop, [(1, "a"), (3, "a"), (2, "b"), (1, "b")], running)
        until(lambda: queue.counts == (0, 0))
    assert shop.execute("SELECT reason, event_id FROM figbridge.dead_letter") == [("22P02", "ada-2-a-order")]


def test_a_dead_letter_that_is_applied_again_brings_the_row_that_its_group_waits_for(
    shop: Database, queue: Queue
) -> None:
    shop.execute("ALTER TABLE shop.orders ADD CONSTRAINT few CHECK (quantity < 10)")
    with Running(shop, queue, order="group", mappings=BOTH) as running:
        put(queue, "ada", 1, "a", n=12)
        put(queue, "ada", 1, "b", "status")
        put(queue, "ada", 2, "a")
        put(queue, "ada", 1, "c", "status")
        until(lambda: parked(shop) == 3, 30, lambda: f"{parked(shop)} {running.failure}")
        assert not history(shop)
        shop.execute("ALTER TABLE shop.orders DROP CONSTRAINT few")
        letters, stop = TableDeadLetterStore(shop.dsn), threading.Event()
        applier = Applier(shop.dsn, statement_timeout=60, lock_timeout=0.2)
        told = redrive(
            letters.scan(Wanted()),
            letters,
            lambda source: Consumer(
                source,
                Mappings([it.section for it in BOTH]),
                applier,
                source,
                Metrics(),
                park_timeout=600,
                order="group",
            ),
            stop,
        )
        assert [(it.letter.event_id, it.reason) for it in told] == [("ada-1-a-order", None)]
        applied(shop, [(1, "a"), (1, "b"), (2, "a"), (1, "c")], running)
        letters.close()


def overdue(shop: Database) -> None:
    shop.execute("UPDATE figbridge.parked SET parked_at = now() - interval '1 hour'")


def test_what_waits_in_vain_is_given_up_and_its_group_goes_on(shop: Database, queue: Queue) -> None:
    for order, status in (1, "a"), (2, "a"), (1, "b"), (3, "a"):
        put(queue, "ada", order, status, customer=404 if order == 1 else None)
    with Running(shop, queue, order="group") as running:
        until(lambda: parked(shop) == 4, 30, lambda: f"{parked(shop)} {running.failure}")
        overdue(shop)
        applied(shop, [(2, "a"), (3, "a")], running)
        until(lambda: running.outcome("dead_letter") == 2)
    letters = shop.execute("SELECT event_id, reason FROM figbridge.dead_letter ORDER BY event_id")
    assert letters == [("ada-1-a-order", "23503"), ("ada-1-b-order", "23503")]


def test_what_brings_the_row_passes_only_what_waits_for_just_that_row(shop: Database, queue: Queue) -> None:
    """So there is no circle in a group of one entity; behind another entity the order that was asked for rules."""
    done = [(1, "a"), (1, "b"), (1, "c")]
    with Running(shop, queue, order="group", mappings=BOTH) as running:
        put(queue, "ada", 1, "b", "status")
        put(queue, "ada", 1, "c", "status")
        until(lambda: parked(shop) == 2)
        put(queue, "ada", 1, "a")
        applied(shop, done, running)
        until(lambda: parked(shop) == 0)
        put(queue, "ada", 2, "b", "status")
        until(lambda: parked(shop) == 1)
        until(lambda: queue.counts == (0, 0))
    put(queue, "ada", 3, "a")  # received with what brings the row: it is not in the park yet, and not to be overtaken
    put(queue, "ada", 2, "a")
    with Running(shop, queue, order="group", mappings=BOTH) as running:
        until(lambda: parked(shop) == 3)
        assert history(shop) == done
        overdue(shop)
        applied(shop, [*done, (3, "a"), (2, "a")], running)
    assert shop.execute("SELECT event_id, reason FROM figbridge.dead_letter") == [("ada-2-b-status", "update_missing")]
