"""The forward path against pg_recvlogical, on one backlog.

The same backlog for both: N rows of a 10-column orders table, in 10-row transactions and in one transaction. Each run
reads it from a slot of its own, all slots made before the first row. pg_recvlogical writes what it receives to
/dev/null, undecoded: the most a reader of this server can do. figbridge decodes, makes events with the default
envelope, and appends them to a file, with fsync.

Printed: the median of each, the ratio of the medians, and our CPU time a change.
"""

import contextlib
import logging
import multiprocessing
import resource
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import psycopg
import structlog

from figbridge.demo.postgres import EmbeddedPostgres
from figbridge.forward.checkpoint import Checkpoint
from figbridge.forward.echo import EchoFilter
from figbridge.forward.pipeline import Buffer, Capture, Publish
from figbridge.forward.publish import Publisher
from figbridge.forward.shape import Naming, Shaper
from figbridge.forward.source import ReplicationSource
from figbridge.metrics import Metrics
from figbridge.transports.file import FileSink

_TABLE = """
CREATE TABLE orders (
    id bigint PRIMARY KEY, customer text, total numeric(12,2), currency char(3), placed_at timestamptz,
    paid boolean, note text, document jsonb, changed_at timestamp, quantity int
);
CREATE PUBLICATION bench FOR TABLE orders;
"""
_ROWS = """
INSERT INTO orders SELECT n, 'customer ' || n, n * 1.01, 'EUR', now(), n %% 2 = 0, 'a "quoted" note, with a comma',
    jsonb_build_object('tags', jsonb_build_array('a', 'b'), 'n', n), localtimestamp, n %% 100
FROM generate_series(%s::bigint, %s::bigint) AS n
"""


def _backlog(connection: psycopg.Connection, rows: int, per_transaction: int) -> str:
    with connection.cursor() as cursor, connection.pipeline():
        for first in range(0, rows, per_transaction):
            cursor.execute(_ROWS, [first, first + per_transaction - 1])
            connection.commit()
    row = connection.execute("SELECT pg_current_wal_insert_lsn()").fetchone()
    connection.commit()
    assert row
    return str(row[0])


def _peer(server: EmbeddedPostgres, slot: str, end: str) -> float:
    command = [
        str(server.program("pg_recvlogical")), "-d", server.dsn(), "-S", slot, "--start", "-f", "/dev/null", "-E", end,
        "-o", "proto_version=1", "-o", "publication_names=bench", "--no-loop",
    ]  # fmt: skip
    began = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - began


def ours(dsn: str, slot: str, end: str, answer: "multiprocessing.Queue[tuple[float, float]]") -> None:
    """In a process of its own, so that its CPU time is all ours."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    metrics, checkpoint, stop, halt = Metrics(), Checkpoint(), threading.Event(), threading.Event()
    with tempfile.TemporaryDirectory() as directory, contextlib.closing(FileSink(Path(directory) / "events")) as sink:
        source, buffer = ReplicationSource(dsn, slot, ("bench",)), Buffer(64 << 20, metrics)
        naming = Naming("bench", "legacy.{database}", "{table}.{operation}")
        capture = Capture(
            source, slot=slot, echo=EchoFilter(), shaper=Shaper(naming, "safe", lambda _: ()), buffer=buffer,
            checkpoint=checkpoint, metrics=metrics, halt=halt,
        )  # fmt: skip
        publish = Publish(buffer, Publisher(sink, None, metrics, halt), checkpoint, source, metrics)
        high, low = (int(part, 16) for part in end.split("/"))
        target = (high << 32) | low
        began, cpu = time.perf_counter(), _cpu()
        threads = [threading.Thread(target=loop.run, args=(stop,)) for loop in (capture, publish)]
        for thread in threads:
            thread.start()
        while checkpoint.flushed < target:
            stop.wait(0.01)
        seconds, used = time.perf_counter() - began, _cpu() - cpu
        stop.set()
        for thread in threads:
            thread.join()
        source.close()
        answer.put((seconds, used))


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def compare(rows: int, runs: int, per_transaction: int) -> None:
    """Measure and print one line."""
    spawn = multiprocessing.get_context("spawn")
    with EmbeddedPostgres(settings={"max_replication_slots": "50"}) as server:
        with psycopg.connect(server.dsn()) as connection:
            connection.execute(_TABLE)
            connection.commit()
            slots = [f"{who}_{run}" for run in range(runs) for who in ("peer", "ours")]
            for slot in slots:
                connection.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [slot])
                connection.commit()
            end = _backlog(connection, rows, per_transaction)
        peer, own, cpu = [], [], []
        for run in range(runs):  # in turn, so that a slow minute of the machine hits both
            peer.append(_peer(server, f"peer_{run}", end))
            answer: multiprocessing.Queue[tuple[float, float]] = spawn.Queue()
            process = spawn.Process(target=ours, args=(server.dsn(), f"ours_{run}", end, answer))
            process.start()
            seconds, used = answer.get(timeout=600)
            process.join()
            own.append(seconds)
            cpu.append(used)
    fast, slow = rows / statistics.median(peer), rows / statistics.median(own)
    print(
        f"{rows} rows, {per_transaction} a transaction, PostgreSQL {server.version}, median of {runs}: "
        f"pg_recvlogical {fast:,.0f} rows/s, figbridge {slow:,.0f} rows/s, ratio {slow / fast:.2f}, "
        f"{1e6 * statistics.median(cpu) / rows:.1f} µs CPU a change"
    )
