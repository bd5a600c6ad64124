"""A FIFO queue before a running consumer: what fails holds up its own, in order, and the other groups go on."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, Literal, Self

import psycopg
import pytest

from conformance.test_sqs import section
from conformance.test_sqs_heartbeat import Queue
from figbridge.deadletter import TableDeadLetterStore
from figbridge.metrics import Metrics
from figbridge.reverse.apply import Applier
from figbridge.reverse.consume import Consumer
from figbridge.reverse.mapping import Mapping, Mappings
from figbridge.transports.sqs import SqsSource
from fixtures.clock import until
from fixtures.postgres import Database
from fixtures.reverse import HISTORY, body, count, make_shop, mapping


class Running:
    """A consumer in a thread. What it holds is nobody else's for ten minutes, unless it gives it back."""

    def __init__(
        self,
        database: Database,
        queue: Queue,
        *,
        lock_timeout: float = 0.2,
        order: Literal["entity", "group"] = "entity",
        mappings: Sequence[Mapping] | None = None,
    ) -> None:
        self.metrics, self._stop, self.failure = Metrics(), threading.Event(), list[BaseException]()
        source = SqsSource(section(queue.url, queue.endpoint, **{"visibility-timeout": 600}))
        self._consumer = Consumer(
            source, Mappings([it.section for it in mappings or [mapping()]]),
            Applier(database.dsn, statement_timeout=60, lock_timeout=lock_timeout),
            TableDeadLetterStore(database.dsn), self.metrics, park_timeout=600, order=order,
        )  # fmt: skip
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self._consumer.run(self._stop)
        except BaseException as error:  # noqa: BLE001 (the test looks at it)
            self.failure.append(error)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive()
        assert not self.failure

    def outcome(self, name: str) -> float:
        return self.metrics.registry.get_sample_value("figbridge_reverse_events_total", {"outcome": name}) or 0


@pytest.fixture
def shop(database: Database) -> Database:
    make_shop(database).execute(HISTORY)
    return database


@pytest.fixture
def queue(aws_endpoint: str) -> Queue:
    return Queue(aws_endpoint, fifo=True)


def put(queue: Queue, order: int, status: str, **detail: Any) -> None:
    """An event of an order, in the order's group."""
    queue.put(body(f"{order}-{status}", id=order, status=status, **detail).decode(), str(order))


def statuses(database: Database, order: int) -> list[str]:
    """All that the order ever was."""
    rows = database.execute("SELECT status FROM shop.history WHERE id = %s ORDER BY place", [order])
    return [status for (status,) in rows]


@contextmanager
def no_parent(shop: Database) -> Iterator[Callable[[], object]]:
    yield lambda: shop.execute("INSERT INTO shop.customers VALUES (7)")


@contextmanager
def locked(shop: Database) -> Iterator[Callable[[], object]]:
    shop.execute("INSERT INTO shop.customers VALUES (7); INSERT INTO shop.orders VALUES (1); DELETE FROM shop.history")
    with shop.connect() as application:
        application.execute("BEGIN; UPDATE shop.orders SET note = 'x' WHERE id = 1")
        yield lambda: application.execute("ROLLBACK")


@pytest.mark.parametrize("trouble", [no_parent, locked])
def test_a_group_waits_in_order_until_its_trouble_is_over(shop: Database, queue: Queue, trouble: Any) -> None:
    with trouble(shop) as end, Running(shop, queue) as running:
        put(queue, 1, "a", customer=7)
        for status in "bc":
            put(queue, 2, status)
            put(queue, 1, status, customer=7)
        until(lambda: statuses(shop, 2) == ["b", "c"], 30, lambda: f"{statuses(shop, 2)} {running.failure}")
        until(lambda: count(shop, "figbridge.parked") == 3, 30, lambda: f"{count(shop, 'figbridge.parked')}")
        for order in 1, 2:  # what comes later finds the others parked
            put(queue, order, "d")
        until(lambda: statuses(shop, 2) == ["b", "c", "d"], 30, lambda: f"{statuses(shop, 2)}")
        until(lambda: count(shop, "figbridge.parked") == 4, 30, lambda: f"{count(shop, 'figbridge.parked')}")
        until(lambda: queue.counts == (0, 0), 30, lambda: f"the park has them: {queue.counts}")
        assert not statuses(shop, 1)
        end()
        until(lambda: statuses(shop, 1) == ["a", "b", "c", "d"], 30, lambda: f"{statuses(shop, 1)}")
        until(lambda: running.outcome("applied") == 7)
        assert not running.outcome("dead_letter")


def test_a_poisonous_event_is_taken_out_of_its_group(shop: Database, queue: Queue) -> None:
    with Running(shop, queue) as running:
        for order, status, quantity in (1, "a", 1), (1, "b", "many"), (2, "a", 1), (1, "c", 1), (2, "b", 1):
            put(queue, order, status, n=quantity)
        until(lambda: running.outcome("applied") == 4, 30, lambda: f"{running.outcome('applied')} {running.failure}")
        until(lambda: queue.counts == (0, 0), 30, lambda: f"{queue.counts}")
    assert (statuses(shop, 1), statuses(shop, 2)) == (["a", "c"], ["a", "b"])
    assert shop.execute("SELECT reason, event_id FROM figbridge.dead_letter") == [("22P02", "1-b")]


def test_what_a_consumer_could_not_apply_is_there_at_once_for_the_next_one(shop: Database, queue: Queue) -> None:
    """It is stopped while the database is away: with a batch in hand, and with one behind it."""
    for number in range(5):
        put(queue, 1, str(number))
        put(queue, 2, str(number))
    for number in range(3):
        put(queue, 3, str(number))
    waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'shop.orders'::regclass"
    with closing(shop.connect()) as application:
        application.execute("BEGIN; LOCK TABLE shop.orders")
        with Running(shop, queue, lock_timeout=60) as running:
            until(lambda: shop.execute(waits) == [(1,)], 30, lambda: f"{running.failure}")
            until(lambda: queue.counts == (0, 13), 30, lambda: f"{queue.counts}")
            with closed(shop, but=application):
                until(lambda: running.outcome("retried"), 30, lambda: f"{running.failure}")
                running.stop()
                assert queue.counts == (13, 0), "visible, in flight"
    with Running(shop, queue) as running:
        until(lambda: running.outcome("applied") == 13, 30, lambda: f"{running.outcome('applied')} {running.failure}")
    for order, most in (1, 5), (2, 5), (3, 3):
        assert statuses(shop, order) == [str(number) for number in range(most)]


@contextmanager
def closed(database: Database, *, but: psycopg.Connection) -> Iterator[None]:
    """Nobody is let in any more, and whoever was in is out, but one."""
    allow = f"ALTER DATABASE {database.name} ALLOW_CONNECTIONS "
    with psycopg.connect(database.server.dsn(), autocommit=True) as admin:
        admin.execute(f"{allow} false")
        try:
            admin.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = %s AND pid <> %s",
                [database.name, but.info.backend_pid],
            )
            yield
        finally:
            admin.execute(f"{allow} true")
