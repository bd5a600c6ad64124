"""Two bridges on one slot: one works, the other waits, and no death, freeze or hidden end of the worker stops the flow.

Both publish to one bus, which writes down what came in the order in which it came, whoever sent it.
"""

import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import conninfo, sql

from figbridge.forward.liveness import SENDER
from fixtures import workload
from fixtures.bridge import Bridge
from fixtures.clock import Stopwatch, until
from fixtures.fake_eventbridge import FakeEventBridge
from fixtures.postgres import Database
from fixtures.proxy import Proxy
from fixtures.workload import Writers, change

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

PROMISE = 5.0  # seconds from the kill -9 of the worker to an event that the other one published
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}


class Pair:
    """Bridges on one slot and one bus; what the slot confirmed is watched for going back."""

    def __init__(self, database: Database, directory: Path, bus: FakeEventBridge) -> None:
        self.database, self._directory, self._bus = database, directory, bus
        self._confirmed = 0
        database.execute(workload.SCHEMA)
        sink = f'{{type: eventbridge, bus: orders, region: eu-west-1, endpoint_url: "{bus.url}"}}'
        init = {"LEGACY_DSN": database.dsn, **CREDENTIALS}
        self._config = workload.configured(directory, database.slot, sink=sink, init=init)

    def bridge(self, name: str, dsn: str = "") -> Bridge:
        environment = {"LEGACY_DSN": dsn or self.database.dsn, **CREDENTIALS}
        return Bridge(self._config, self._directory / f"{name}.log", environment=environment)

    @property
    def events(self) -> list[bytes]:
        """As envelopes, in the order of their coming."""
        return [_envelope(entry) for entries in list(self._bus.puts) for entry in entries]

    def until_published(self, key: int, watch: Stopwatch, what: str) -> float:
        """Commit one more version of `key`; what `watch` says when it is on the bus. `what` is for the log."""
        with self.database.connect() as connection:
            change(connection, [key])
            ((version,),) = connection.execute("SELECT version FROM shop.account WHERE id = %s", [key]).fetchall()
        needle = f'"after":{{"id":{key},"version":{version},'
        looked_at = 0

        def published() -> bool:
            nonlocal looked_at
            fresh = self._bus.requests[looked_at:]
            looked_at += len(fresh)
            return any(needle in entry["Detail"] for _, document in fresh for entry in document.get("Entries", ()))

        until(published, missing=needle)
        took = watch.unhindered
        print(f"taken over after {watch.elapsed:.2f} s, of which {took:.2f} s were not spent waiting for a CPU: {what}")
        return took

    def holder(self) -> int | None:
        """The pid of the walsender that has the slot. Fails when the slot went back."""
        query = "SELECT active_pid, confirmed_flush_lsn - '0/0' FROM pg_replication_slots WHERE slot_name = %s"
        ((pid, confirmed),) = self.database.execute(query, [self.database.slot])
        assert confirmed >= self._confirmed, "the slot went back"
        self._confirmed = confirmed
        return int(pid) if pid else None

    def finish(self, *bridges: Bridge, repeats: bool = False) -> None:
        workload.until_drained(self.database.dsn, self.database.slot, bridges)
        for bridge in bridges:
            assert bridge.terminate() == 0, bridge.log[-3000:]
        assert workload.prove(self.database.dsn, self.events) or not repeats, "nothing came twice"


def _envelope(entry: dict[str, Any]) -> bytes:
    detail = json.loads(entry["Detail"])
    return json.dumps({"id": detail.get("id"), "detail-type": entry["DetailType"], "detail": detail}).encode()


@pytest.fixture
def pair(database: Database, tmp_path: Path) -> Iterator[Pair]:
    with FakeEventBridge() as bus:
        yield Pair(database, tmp_path, bus)


@contextlib.contextmanager
def working(pair: Pair, dsn: str = "") -> Iterator[tuple[Bridge, Bridge]]:
    """(the one that works, the one that waits)."""
    with pair.bridge("one", dsn) as worker:
        worker.until_ready()
        with pair.bridge("two") as waiter:
            until_waiting(waiter)
            yield worker, waiter


def until_waiting(bridge: Bridge, since: int = 0) -> None:
    """`since` is where its log ended before."""
    until(lambda: "is in use by pid" in bridge.log[since:], 20, lambda: bridge.log)
    assert bridge.get("/readyz")[0] == 503


def test_a_worker_that_is_killed_is_replaced_within_the_promise(pair: Pair) -> None:
    with working(pair) as both, Writers(pair.database.dsn, 1, pause=0.02) as writers:
        for number in range(4):
            worker = both[number % 2]
            writers.until_more(40)
            watch = Stopwatch()
            worker.end()
            assert pair.until_published(4000, watch, f"kill -9, {number + 1}") < PROMISE
            written = len(worker.log)
            worker.start()
            until_waiting(worker, written)
        writers.stop()
        pair.finish(*both)


def test_a_worker_that_is_frozen_loses_the_slot_and_does_no_harm_when_it_wakes(pair: Pair) -> None:
    with working(pair) as (worker, waiter), Writers(pair.database.dsn, 1, pause=0.02) as writers:
        writers.until_more(40)
        frozen = pair.holder()
        worker.signal(signal.SIGSTOP)
        assert pair.until_published(4000, Stopwatch(), "SIGSTOP") < SENDER + PROMISE
        taken = pair.holder()
        assert taken not in {frozen, None}
        until(lambda: (pair.holder(), waiter.get("/readyz")[0]) == (taken, 200), 10)
        writers.until_more(40)
        worker.signal(signal.SIGCONT)
        until(lambda: '"what": "stream"' in worker.log, 20, worker.log)
        until_waiting(worker)
        writers.until_more(40)
        assert pair.holder() == taken, "it must wait"
        # and what it still knows does no harm when it works again: the slot does not go back
        waiter.end()
        assert pair.until_published(4000, Stopwatch(), "kill -9, by the one that was frozen") < PROMISE
        for _ in range(20):
            writers.until_more(5)
            pair.holder()
        writers.stop()
        pair.finish(worker, repeats=True)


def test_a_worker_that_dies_behind_a_proxy_that_hides_it(pair: Pair) -> None:
    parts = conninfo.conninfo_to_dict(pair.database.dsn)
    with Proxy((str(parts["host"]), int(parts["port"] or 5432))) as proxy:
        dsn = conninfo.make_conninfo(pair.database.dsn, host=proxy.host, port=proxy.port)
        with working(pair, dsn) as (worker, waiter), Writers(pair.database.dsn, 1, pause=0.02) as writers:
            writers.until_more(40)
            held = pair.holder()
            proxy.hiding = True
            watch = Stopwatch()
            worker.end()
            took = pair.until_published(4000, watch, "kill -9 behind a proxy that hides it")
            assert pair.holder() != held
            assert took < SENDER + PROMISE
            writers.stop()
            pair.finish(waiter)


def test_a_stranger_with_our_name_is_named_and_left_alone(pair: Pair) -> None:
    """It may be a replica in good health. Here it is a walsender whose session waits a minute for its client."""
    database = pair.database
    with psycopg.connect(
        database.dsn, replication="database", autocommit=True, application_name=f"figbridge-{database.slot}"
    ) as zombie:
        command = "START_REPLICATION SLOT {} LOGICAL 0/0 (proto_version '1', publication_names 'faults')"
        zombie.execute(sql.SQL(command).format(sql.Identifier(database.slot)))
        pid = zombie.info.backend_pid
        with pair.bridge("one") as waiter:
            until_waiting(waiter)
            visitors = "SELECT pid FROM pg_stat_activity WHERE application_name = 'figbridge-slot-guard'"
            seen: set[Any] = set()

            def came_again() -> bool:
                seen.update(database.execute(visitors))
                return len(seen) > 4

            until(came_again, 20)
            assert pair.holder() == pid, "it was terminated"
            line = next(it for it in waiter.log.splitlines() if "is in use by" in it)
            assert f"in use by pid {pid}, figbridge-{database.slot}, from 127.0.0.1, since" in line
            assert f"SELECT pg_terminate_backend({pid})" in line
            assert waiter.log.count("is in use by") == 1, "the same trouble is not news twice a second"
            zombie.pgconn.finish()
            assert pair.until_published(1, Stopwatch(), "a stranger that left") < PROMISE
            pair.finish(waiter)
