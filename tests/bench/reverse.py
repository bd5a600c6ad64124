"""The reverse path's figures: events a second from the embedded bus into a table, beside PostgreSQL's own apply worker.

figbridge    a backlog on the bus ─▶ LocalSource ─▶ Consumer ─▶ orders      one mapping: claim, version check, upsert
apply worker a backlog in the WAL ─▶ walsender ─▶ a subscription ─▶ orders  the same rows, ten a transaction

Both write into one server, each into a database of its own, one after the other. The bridge runs in a process of its
own: the loop of `figbridge run` with every default but the size of a batch. Its clock runs from the start of the loop
to the commit after which every row is there; the worker's from the moment it is enabled.
"""

import json
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from datetime import UTC, datetime
from importlib import resources
from multiprocessing.connection import Connection
from pathlib import Path

import psycopg

from bench.backlog import CALM, Legacy
from bench.forward import Size, percentile
from bench.proc import Finished, cpu_seconds, memory
from bench.report import Applied, Latency, Report, say
from figbridge import log
from figbridge.config import MappingSection
from figbridge.deadletter import TableDeadLetterStore
from figbridge.event import Event
from figbridge.metrics import Metrics
from figbridge.reverse.apply import Applier
from figbridge.reverse.consume import Consumer
from figbridge.reverse.drift import Drift
from figbridge.reverse.mapping import Mappings
from figbridge.supervise import tune
from figbridge.transports.local import LocalSink, LocalSource
from fixtures.clock import until

_TABLE = """
    CREATE TABLE orders (
        id bigint PRIMARY KEY, customer text, total numeric(12,2), currency char(3), placed_at timestamptz,
        paid boolean, note text, document jsonb, changed_at timestamp, quantity int
    );
"""
_COLUMNS = ("customer", "total", "currency", "placed_at", "paid", "note", "document", "changed_at", "quantity")
_MAPPING = {
    "match": {"source": "bench", "detail-type": "order.changed"},
    "into": "public.orders",
    "action": "upsert",
    "key": {"id": "detail.id"},
    "set": {column: f"detail.{column}" for column in _COLUMNS},
    "version": "detail.version",
}
_THERE = "SELECT idempotency_key FROM figbridge.inbox WHERE source = 'bench' AND idempotency_key = ANY (%s)"
_DEADLINE = 300.0
_RATE = 500  # events a second when latency is measured


def event(number: int) -> Event:
    """The same row as `bench.backlog`'s."""
    detail = {
        "id": number,
        "version": 1,
        "customer": f"customer {number}",
        "total": round(number * 1.01, 2),
        "currency": "EUR",
        "placed_at": "2026-11-23T10:08:02.69654Z",
        "paid": number % 2 == 0,
        "note": 'a "quoted" note, with a comma',
        "document": {"tags": ["a", "b"], "n": number},
        "changed_at": "2026-11-23T10:08:02.69654",
        "quantity": number % 100,
    }
    body = json.dumps(detail).encode()
    return Event(f"order-{number}-1", "bench", "order.changed", str(number), datetime.now(UTC), body)


def measure(dsn: str, bus: Path, batch: int, rows: int, channel: Connection) -> None:
    """Consume `rows` events into the database; send what it took. In a process of its own."""
    log.configure(level="ERROR")
    tune(answers=True)
    metrics, stop, times = Metrics(), threading.Event(), []
    applier = Applier(dsn, statement_timeout=10, lock_timeout=2, on_step=lambda _step: times.append(time.time()))
    mappings = Mappings([MappingSection.model_validate(_MAPPING)])
    consumer = Consumer(
        LocalSource(bus, subscriber="bench"),
        mappings,
        applier,
        TableDeadLetterStore(dsn),
        metrics,
        park_timeout=60,
        batch_size=batch,
        drift=Drift(applier.connection, mappings, metrics),
    )
    thread = threading.Thread(target=consumer.run, args=(stop,))
    began, used = time.monotonic(), cpu_seconds()
    thread.start()
    done = metrics.outcomes.labels("applied")
    while done._value.get() < rows and thread.is_alive() and time.monotonic() - began < _DEADLINE:
        stop.wait(0.02)
    seconds, cpu = time.monotonic() - began, cpu_seconds() - used
    stop.set()
    thread.join()

    channel.send((int(done._value.get()), Finished(seconds, cpu, memory(os.getpid()).peak, "")))


def _figbridge(dsn: str, bus: Path, batch: int, rows: int) -> Finished:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("TRUNCATE orders, figbridge.inbox, figbridge.entity_version")
        connection.execute("CHECKPOINT")
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=measure, args=(dsn, bus, batch, rows, theirs))
    process.start()
    theirs.close()
    try:
        applied, finished = ours.recv()
    finally:
        process.join(60)
    with psycopg.connect(dsn) as connection:
        counted = connection.execute("SELECT count(*) FROM orders").fetchone()
    if (applied, counted) != (rows, (rows,)):
        raise RuntimeError(f"{applied} events were applied and {counted} rows are there, of {rows}")
    return finished  # type: ignore[no-any-return]  # what came through the pipe


def _worker(publisher: str, subscriber: str, rows: int) -> float:
    """Seconds that a subscription takes to apply `rows` rows, ten a transaction."""
    with (
        psycopg.connect(publisher, autocommit=True) as source,
        psycopg.connect(subscriber, autocommit=True) as target,
    ):
        target.execute("TRUNCATE orders")
        source.execute("TRUNCATE orders")
        source.execute("SELECT pg_create_logical_replication_slot('worker', 'pgoutput')")
        source.execute("CALL fill(%s, 10)", [rows])
        target.execute("CHECKPOINT")
        target.execute(
            f"CREATE SUBSCRIPTION worker CONNECTION '{publisher}' PUBLICATION bench "
            "WITH (create_slot = false, slot_name = 'worker', copy_data = false, enabled = false)"
        )
        began = time.monotonic()
        target.execute("ALTER SUBSCRIPTION worker ENABLE")
        there = "SELECT count(*) FROM orders"
        until(lambda: target.execute(there).fetchone() == (rows,), _DEADLINE, "the rows of the subscription")
        seconds = time.monotonic() - began
        target.execute("ALTER SUBSCRIPTION worker DISABLE")
        target.execute("ALTER SUBSCRIPTION worker SET (slot_name = NONE)")
        target.execute("DROP SUBSCRIPTION worker")
        active = "SELECT 1 FROM pg_replication_slots WHERE slot_name = 'worker' AND active"
        until(lambda: source.execute(active).fetchone() is None, 30, "the worker's slot is free")
        source.execute("SELECT pg_drop_replication_slot('worker')")
    return seconds


def reverse(legacy: Legacy, size: Size, report: Report) -> None:
    """Rate in batches of 500 and of 10, beside the apply worker; then latency at a fixed rate."""
    rows = min(size.rows, 200_000)
    dsn, peer = legacy.database("reverse"), legacy.database("subscriber")
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute((resources.files("figbridge") / "schema.sql").read_text())
        connection.execute(_TABLE)
    with psycopg.connect(peer, autocommit=True) as connection:
        connection.execute(_TABLE)
    with tempfile.TemporaryDirectory(prefix="figbridge-bench-") as directory:
        say(f"reverse: {rows:,} events onto the bus")
        buses = {}
        for batch, events in ((500, rows), (10, rows // 4)):
            for run in range(size.runs):
                buses[batch, run] = Path(directory) / f"bus-{batch}-{run}.sqlite"
                _fill(buses[batch, run], events)
        ours: list[Finished] = []
        small: list[Finished] = []
        worker: list[float] = []
        for run in range(size.runs):
            say(f"reverse: run {run + 1} of {size.runs}")
            worker.append(_worker(legacy.dsn, peer, rows))
            legacy.settle()
            ours.append(_figbridge(dsn, buses[500, run], 500, rows))
            legacy.settle()
            small.append(_figbridge(dsn, buses[10, run], 10, rows // 4))
        best = rows / statistics.median(worker)
        report.applied += [
            Applied("PostgreSQL's apply worker, 10 rows a transaction", best, None, None, None),
            Applied.of("figbridge, 500 events a batch", rows, ours, best),
            Applied.of("figbridge, 10 events a batch", rows // 4, small, best),
        ]
        say(f"reverse: latency at {_RATE} events/s, for {size.latency_seconds} s")
        legacy.settle(CALM)
        report.reverse_latency = _latency(dsn, Path(directory) / "latency.sqlite", size.latency_seconds)


def _fill(path: Path, rows: int) -> None:
    sink = LocalSink(path)
    for begin in range(0, rows, 5_000):
        sink.publish([event(number) for number in range(begin, min(begin + 5_000, rows))])
    sink.close()


def _latency(dsn: str, bus: Path, seconds: int) -> Latency:
    """From before the publish to the moment at which a look from outside finds the key committed."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("TRUNCATE orders, figbridge.inbox, figbridge.entity_version")
    sink = LocalSink(bus)
    sink.check()
    rows = _RATE * seconds
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=measure, args=(dsn, bus, 500, rows + 1, theirs))
    process.start()
    theirs.close()
    sent: dict[str, float] = {}
    seen: dict[str, float] = {}
    over, pause = threading.Event(), threading.Event()

    def watch() -> None:
        """A key's commit is seen at most one look late, so latencies are too high rather than too low.

        It asks for the keys that are under way, which are few: to look through all of the table takes the bridge's
        core from it.
        """
        with psycopg.connect(dsn, autocommit=True) as connection:
            while not over.is_set() or len(seen) < rows:
                waiting = list(sent.keys() - seen.keys())
                found = connection.execute(_THERE, [waiting]).fetchall()
                clock = time.monotonic()
                seen.update([(identity, clock) for (identity,) in found])
                pause.wait(0.002)
                if clock > deadline:
                    return

    sink.publish([event(0)])  # the process has started when this one is there
    with psycopg.connect(dsn, autocommit=True) as connection:
        until(lambda: connection.execute("SELECT 1 FROM orders").fetchone(), 60, "the first event")
    deadline = time.monotonic() + seconds + 60
    watcher = threading.Thread(target=watch)
    watcher.start()
    tick, began = threading.Event(), time.monotonic()
    for number in range(1, rows + 1):
        tick.wait(max(0.0, began + number / _RATE - time.monotonic()))
        made = event(number)
        sent[made.id] = time.monotonic()
        sink.publish([made])
    over.set()
    watcher.join()
    ours.recv()
    process.join(60)
    sink.close()
    times = sorted(1000 * (seen[identity] - clock) for identity, clock in sent.items())
    took = max(seen.values()) - began
    return Latency(rows / took, rows, percentile(times, 50), percentile(times, 99), times[-1])
