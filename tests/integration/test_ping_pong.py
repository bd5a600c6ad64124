"""Two systems that answer each other: the breaker ends it, loudly, and leaves everybody else alone."""

import contextlib
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import psycopg
import pytest
from structlog.testing import capture_logs

from figbridge.change import Change, Column, Operation, Relation
from figbridge.deadletter import FileDeadLetterStore, TableDeadLetterStore
from figbridge.errors import BridgeError
from figbridge.event import Event
from figbridge.forward.echo import EchoFilter
from figbridge.forward.pingpong import PingPong
from figbridge.forward.publish import Publisher
from figbridge.metrics import Metrics
from figbridge.reverse.apply import Applier
from figbridge.reverse.consume import Consumer
from figbridge.reverse.mapping import Mappings
from figbridge.transports.local import LocalSink, LocalSource
from fixtures.clock import until
from fixtures.forward import Forward
from fixtures.postgres import Database
from fixtures.reverse import count, make_shop, mapping

CLAIM = "INSERT INTO figbridge.inbox VALUES ('shop.next', '{}', '', 'e')"
RELATION = Relation(7, "shop", "orders", "d", (Column("id", 20, -1, True), Column("status", 25, -1, False)))


def row(identity: int, status: str, operation: Operation = Operation.UPDATE) -> Change:
    return Change(operation, RELATION, 0, None, False, (str(identity).encode(), status.encode()), False)


def ready(database: Database) -> Database:
    make_shop(database).execute("INSERT INTO shop.orders (id, quantity) VALUES (1, 0), (2, 0)")
    database.execute("CREATE PUBLICATION pub FOR TABLE shop.orders, shop.customers")
    database.execute("CREATE PUBLICATION marks FOR TABLE figbridge.inbox WITH (publish = 'insert')")
    database.create_slot()
    return database


def bounce(database: Database, rounds: int, first: int = 0) -> None:
    """We write row 1, a job of the legacy system answers; row 2 is the legacy system's own."""
    with database.connect() as connection:
        for number in range(first, first + rounds):
            with connection.transaction():
                connection.execute(CLAIM.format(number))
                connection.execute("UPDATE shop.orders SET status = 'ours' WHERE id = 1")
            connection.execute("UPDATE shop.orders SET status = 'theirs', quantity = quantity + 1 WHERE id = 1")
            connection.execute("UPDATE shop.orders SET status = 'alone', quantity = quantity + 1 WHERE id = 2")


def test_a_row_that_bounces_is_held_and_the_others_go_on(database: Database, tmp_path: Path) -> None:
    ready(database)
    bounce(database, 30)
    letters = tmp_path / "letters"
    forward = Forward(database, "pub", "marks", echo=EchoFilter(ping_pong=PingPong(10, 60)))
    with capture_logs() as logs, with_letters(forward, letters):
        until(lambda: sum(it["key"] == {"id": 2} for it in forward.sink.details) == 30)
        until(lambda: forward.metric("ping_pongs_total", direction="forward") > 0)
        left = [it["after"]["quantity"] for it in forward.sink.details if it["key"] == {"id": 1}]
        held = int(forward.metric("ping_pongs_total", direction="forward"))
        until(lambda: letters.read_text().count("\n") == held)

    # it is watched after half as many of our writes, and from then on may bounce as often as it is allowed to
    assert left == list(range(1, len(left) + 1))
    assert 10 <= len(left) <= 16
    assert held == 30 - len(left)
    assert letters.read_text().count('"reason":"ping_pong"') == held
    assert sum(line["log_level"] == "error" and "to and fro" in line["event"] for line in logs) == held
    assert not any("'theirs'" in str(line) for line in logs)


@contextlib.contextmanager
def with_letters(forward: Forward, path: Path) -> Iterator[None]:
    publish: Any = forward._loops[1]
    with contextlib.closing(FileDeadLetterStore(path)) as store:
        publish._publisher = Publisher(forward.sink, store, forward.metrics, forward.supervisor.halt)
        with forward:
            yield


def test_without_dead_letters_the_bridge_stops_and_says_why(database: Database) -> None:
    ready(database)
    bounce(database, 30)
    with Forward(database, "pub", "marks", echo=EchoFilter(ping_pong=PingPong(10, 60))) as forward:
        failure = forward.ended()
    assert isinstance(failure, BridgeError)
    assert "ping_pong" in str(failure)
    assert failure.hint


def test_by_the_time_of_the_commits_a_slow_answer_is_no_loop() -> None:
    breaker, at = PingPong(10, 60), datetime.now(UTC)
    for number in range(200):
        breaker.begin((at + timedelta(seconds=15 * number)).timestamp())
        breaker.ours(row(1, "ours"))
        assert not breaker.theirs(row(1, "theirs"))


def test_who_writes_alone_may_write_as_often_as_they_like() -> None:
    breaker, at = PingPong(10, 60), datetime.now(UTC).timestamp()
    for number in range(1000):
        breaker.begin(at + number / 100)
        breaker.ours(row(1, "ours"))
        assert not breaker.theirs(row(2, "theirs"))
    assert breaker.watched == {RELATION.oid}
    breaker.begin(at + 500)
    breaker.begin(at + 1000)
    assert breaker.watched == set()


def test_it_knows_a_limited_number_of_rows() -> None:
    breaker, at = PingPong(2, 60), datetime.now(UTC).timestamp()
    for number in range(50_000):
        breaker.begin(at)
        breaker.ours(row(number, "ours"))
    assert len(breaker._now) + len(breaker._before) < 25_000


def test_a_loop_is_found_that_both_paths_make(database: Database, tmp_path: Path) -> None:
    """Both paths, a legacy job that answers each write of ours, and a new system that answers each event."""
    ready(database)
    bus = tmp_path / "bus.sqlite"
    forward = Forward(database, "pub", "marks", echo=EchoFilter(ping_pong=PingPong(5, 60)))
    stop = threading.Event()
    consumer = consume(database, bus)
    threads = [
        threading.Thread(target=consumer.run, args=(stop,), daemon=True),
        threading.Thread(target=legacy_job, args=(database, stop), daemon=True),
        threading.Thread(target=new_system, args=(forward, bus, stop), daemon=True),
    ]
    with with_letters(forward, tmp_path / "letters"):
        for thread in threads:
            thread.start()
        database.execute("UPDATE shop.orders SET status = 'theirs' WHERE id = 1")
        until(lambda: forward.metric("ping_pongs_total", direction="forward") == 1, 60)
        stop.set()
        for thread in threads:
            thread.join(60)
    answers = database.execute("SELECT count(*) FROM figbridge.inbox")[0][0]
    assert 5 < answers < 20  # and it is quiet


def consume(database: Database, bus: Path, **options: Any) -> Consumer:
    into = mapping("update", set={"status": "detail.status"})
    return Consumer(
        LocalSource(bus, subscriber="s"),
        Mappings([into.section]),
        Applier(database.dsn, statement_timeout=5, lock_timeout=2),
        TableDeadLetterStore(database.dsn),
        Metrics(),
        park_timeout=60,
        **options,
    )


def legacy_job(database: Database, stop: threading.Event) -> None:
    with psycopg.connect(database.dsn, autocommit=True) as connection:
        while not stop.wait(0.01):
            connection.execute("UPDATE shop.orders SET status = 'theirs' WHERE id = 1 AND status = 'ours'")


def new_system(forward: Forward, bus: Path, stop: threading.Event) -> None:
    sink, seen = LocalSink(bus), 0
    while not stop.wait(0.01):
        events = forward.sink.events
        while seen < len(events):
            seen += 1
            detail = b'{"id":1,"status":"ours"}'
            sink.publish([Event(f"answer-{seen}", "shop.next", "order", "k", datetime.now(UTC), detail)])


@pytest.mark.parametrize(("hops", "letters"), [(8, 0), (9, 1), (10**9, 1), ("9", 0), (-1, 0), (None, 0), (True, 0)])
def test_an_event_that_has_passed_too_many_bridges_is_held(
    database: Database, tmp_path: Path, hops: Any, letters: int
) -> None:
    make_shop(database).execute("INSERT INTO shop.orders (id) VALUES (1)")
    bus, stop = tmp_path / "bus.sqlite", threading.Event()
    detail = orjson.dumps({"id": 1, "status": "ours", "hops": hops})
    LocalSink(bus).publish([Event("e", "shop.next", "order", "k", datetime.now(UTC), detail)])
    consumer = consume(database, bus)
    thread = threading.Thread(target=consumer.run, args=(stop,), daemon=True)
    thread.start()
    until(lambda: count(database, "figbridge.inbox") + count(database, "figbridge.dead_letter") == 1)
    stop.set()
    thread.join(60)
    reasons = database.execute("SELECT reason FROM figbridge.dead_letter")
    assert reasons == [("ping_pong",)] * letters
    assert consumer._metrics.ping_pongs.labels("reverse")._value.get() == letters
