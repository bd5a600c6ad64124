"""The reverse path behind PgBouncer in transaction mode: every statement may meet another server connection."""

import contextlib
import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import psycopg
import pytest

from figbridge import canary, preflight, provision
from figbridge.config import Config
from figbridge.deadletter import TableDeadLetterStore
from figbridge.errors import SetupError
from figbridge.event import Event
from figbridge.metrics import Metrics
from figbridge.reverse.apply import Applied, Applier, Outcome
from figbridge.reverse.consume import Consumer
from figbridge.reverse.drift import Drift
from figbridge.reverse.guard import LoopGuard
from figbridge.reverse.mapping import Mappings
from figbridge.reverse.purge import inbox, purge
from figbridge.transports.local import LocalSink, LocalSource
from fixtures.bridge import Bridge
from fixtures.clock import until
from fixtures.pgbouncer import needs_pgbouncer, pgbouncer
from fixtures.postgres import Database
from fixtures.reverse import count, make_shop, mapping, work

pytestmark = needs_pgbouncer

SESSION = ("statement_timeout", "lock_timeout", "synchronous_commit", "timezone", "datestyle", "bytea_output")


@pytest.fixture
def shop(database: Database) -> Database:
    return make_shop(database)


@pytest.fixture
def pooled(shop: Database) -> Iterator[str]:
    with pgbouncer(shop, size=2) as dsn:
        yield dsn


@contextlib.contextmanager
def applier(
    dsn: str, shop: Database, guard: Literal["inbox", "message"] = "inbox", *, touched_rows: bool = True
) -> Iterator[Applier]:
    loop_guard = LoopGuard(guard, slot=shop.slot, touched_rows=touched_rows) if touched_rows else None
    with contextlib.closing(Applier(dsn, statement_timeout=5, lock_timeout=2, guard=loop_guard)) as made:
        yield made


def settings(dsn: str) -> set[Any]:
    """Of both server connections, as the next client finds them."""
    found = set()
    with psycopg.connect(dsn, prepare_threshold=None) as one, psycopg.connect(dsn, prepare_threshold=None) as other:
        for connection in (one, other):
            row = [connection.execute(f"SHOW {name}").fetchone() for name in SESSION]
            pid = connection.execute("SELECT pg_backend_pid()").fetchone()
            found.add((str(pid), str(row)))
    assert len(found) == 2
    return {row for _, row in found}


@pytest.mark.parametrize("touched_rows", [False, True])
def test_batches_of_every_kind_are_applied(shop: Database, pooled: str, *, touched_rows: bool) -> None:
    before = settings(pooled)
    insert, update, delete = mapping("insert"), mapping("update"), mapping("delete")
    versioned = mapping(version="detail.v")
    with applier(pooled, shop, touched_rows=touched_rows) as made:
        for number in range(0, 60, 20):  # more than once: whatever is prepared would be missed the next time
            works = [work(insert, f"i{number + n}", id=number + n, status="new") for n in range(20)]
            works += [work(update, f"u{number + n}", id=number + n, note="seen") for n in range(10)]
            works += [work(delete, f"d{number}", id=number), work(versioned, f"v{number}", id=900, v=number, n=number)]
            works += [work(versioned, f"w{number}", id=900, v=number - 1, n=-1)]
            outcomes = made.apply_all(works)
            assert [outcomes[it].outcome for it in works[:-1]] == [Outcome.APPLIED] * 32
            assert outcomes[works[-1]].outcome is Outcome.IGNORED
            assert set(made.apply_all(works).values()) == {Applied(Outcome.DUPLICATE)}
        bad = [work(insert, f"x{n}", id=500 + n, n="many" if n == 3 else 1) for n in range(6)]
        assert [made.apply_all(bad)[it].outcome for it in bad].count(Outcome.DEAD_LETTER) == 1
    assert count(shop, "shop.orders WHERE note = 'seen'") == 27
    assert shop.execute("SELECT quantity FROM shop.orders WHERE id = 900") == [(40,)]
    assert settings(pooled) == before


def test_many_replicas_share_few_connections(shop: Database, pooled: str) -> None:
    """And nobody meets another one's session: each event once, nothing left behind."""
    failures: list[BaseException] = []

    def replica(number: int) -> None:
        try:
            with applier(pooled, shop, "message", touched_rows=number % 2 == 0) as made:
                for first in range(0, 200, 10):
                    made.apply_all([work(mapping(), f"e{n}", id=n, status=str(n)) for n in range(first, first + 10)])
        except BaseException as error:  # noqa: BLE001 (the test looks at it)
            failures.append(error)

    threads = [threading.Thread(target=replica, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert (count(shop, "shop.orders"), count(shop, "figbridge.inbox")) == (200, 200)
    assert shop.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == [(0,)]


def test_the_whole_path_parks_purges_and_writes_letters(shop: Database, pooled: str, tmp_path: Path) -> None:
    sink = LocalSink(tmp_path / "bus.sqlite")

    def send(identity: str, **detail: Any) -> None:
        body = json.dumps(detail).encode()
        sink.publish([Event(identity, "shop.next", "order", "k", datetime.now(UTC), body)])

    metrics, stop = Metrics(), threading.Event()
    mappings = Mappings([mapping().section])
    made = Applier(pooled, statement_timeout=5, lock_timeout=2)
    consumer = Consumer(
        LocalSource(tmp_path / "bus.sqlite", subscriber="s"), mappings, made, TableDeadLetterStore(pooled), metrics,
        park_timeout=60, drift=Drift(made.connection, mappings, metrics),
    )  # fmt: skip
    thread = threading.Thread(target=consumer.run, args=(stop,), daemon=True)
    thread.start()
    send("child", id=1, customer=7)
    until(lambda: count(shop, "figbridge.parked") == 1)
    send("poison", id=2, n="many")
    until(lambda: count(shop, "figbridge.dead_letter") == 1)
    shop.execute("INSERT INTO shop.customers VALUES (7, 'x')")
    until(lambda: count(shop, "shop.orders") == 1)
    until(lambda: count(shop, "figbridge.parked") == 0)
    stop.set()
    thread.join(60)
    shop.execute("UPDATE figbridge.inbox SET applied_at = now() - interval '40 days'")
    assert purge(pooled, inbox(30)) == 1


@pytest.mark.parametrize("guard", ["inbox", "message"])
def test_a_bridge_runs_both_ways(shop: Database, pooled: str, tmp_path: Path, guard: str) -> None:
    """Two connection strings: replication goes to the server itself, for it cannot pass the pooler."""
    shop.execute("""
        CREATE TABLE shop.audit (n bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, id bigint);
        CREATE FUNCTION shop.audited() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN INSERT INTO shop.audit (id) VALUES (NEW.id); RETURN NULL; END $$;
        CREATE TRIGGER audited AFTER INSERT ON shop.orders FOR EACH ROW EXECUTE FUNCTION shop.audited();
    """)
    tree = bridge(shop, tmp_path, guard) | {"http": {"listen": "${HTTP_LISTEN}"}}
    tree["legacy"]["reverse-dsn"] = pooled
    config = Config.parse(json.dumps(tree), {"HTTP_LISTEN": "127.0.0.1:0"})
    assert provision.initialise(config)
    told = [it for it in preflight.inspect(config, "run") if it.where == "legacy.reverse-dsn"]
    assert [(it.level, "pooler" in it.what) for it in told] == [("ok", True)]
    file = tmp_path / "bridge.yaml"
    file.write_text(json.dumps(tree))
    events = tmp_path / "events.jsonl"
    with Bridge(file, tmp_path / "log") as running:
        running.until_ready()
        bus = LocalSink(tmp_path / "bus.sqlite")
        for number in range(50):
            body = json.dumps({"id": number, "hops": 1}).encode()
            bus.publish([Event(f"e{number}", "shop.next", "order", "k", datetime.now(UTC), body)])
        shop.execute("INSERT INTO shop.customers VALUES (1, 'theirs')")
        until(lambda: events.exists() and events.read_text().count("\n") == 51, 30, lambda: running.log[-3000:])
        assert running.terminate() == 0
    details = [json.loads(line)["detail"] for line in events.read_text().splitlines()]
    caused = sorted(it["cause"] for it in details if it["table"] == "audit")
    assert caused == sorted(f"e{n}" for n in range(50))
    assert {it["hops"] for it in details if it["table"] == "audit"} == {2}
    assert [it["table"] for it in details if it["cause"] is None] == ["customers"]


def bridge(shop: Database, directory: Path, guard: str) -> dict[str, Any]:
    return {
        "legacy": {
            "dsn": shop.dsn,
            "slot": shop.slot,
            "publication": f"{shop.name}_pub",
            "tables": ["shop.orders", "shop.customers", "shop.audit"],
            "loop-guard": guard,
        },
        "forward": {"sink": {"type": "file", "path": str(directory / "events.jsonl")}, "echo": "touched_rows"},
        "reverse": {
            "source": {"type": "local", "path": str(directory / "bus.sqlite")},
            "mappings": [
                {
                    "match": {"source": "shop.next", "detail-type": "order"},
                    "into": "shop.orders",
                    "action": "insert",
                    "set": {"id": "detail.id"},
                }
            ],
        },
    }


def test_an_origin_is_refused_behind_a_pooler(shop: Database, pooled: str, tmp_path: Path) -> None:
    shop.execute("CREATE TABLE shop.audit (n int PRIMARY KEY)")
    tree = bridge(shop, tmp_path, "origin")
    tree["legacy"]["reverse-dsn"] = pooled
    tree["forward"].pop("echo")
    config = Config.parse(json.dumps(tree), {})
    lines = provision.initialise(config)
    assert f"replication origin {canary.origin(shop.slot)}: made" in lines
    with pytest.raises(SetupError, match="outlives ROLLBACK"):
        preflight.require(config, "run")
    tree["legacy"].pop("reverse-dsn")
    findings = preflight.require(Config.parse(json.dumps(tree), {}), "run")
    assert [it.level for it in findings if it.where == "legacy.loop-guard"] == ["ok", "warning"]


def test_a_replication_connection_through_the_pooler_is_found_before_anything_runs(
    shop: Database, pooled: str, tmp_path: Path
) -> None:
    shop.execute("CREATE TABLE shop.audit (n int PRIMARY KEY)")
    tree = bridge(shop, tmp_path, "inbox")
    provision.initialise(Config.parse(json.dumps(tree), {}))
    tree["legacy"]["dsn"] = pooled
    findings = preflight.inspect(Config.parse(json.dumps(tree), {}), "run")
    assert any(it.level == "error" and "replication" in it.what for it in findings), findings
