"""Heartbeats on real servers: how soon they come, what they cost, what they need, and what happens without them."""

import contextlib
import threading
from collections.abc import Iterator

import psycopg
import pytest
from structlog.testing import capture_logs

from figbridge.demo.postgres import EmbeddedPostgres
from figbridge.forward.heartbeat import PREFIX, Heartbeat, Heartbeats
from figbridge.forward.messages import Messages
from figbridge.forward.table import Naming
from figbridge.metrics import Metrics
from fixtures.clock import until
from fixtures.postgres import Database
from fixtures.stream import Stream

END = (
    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
    "WHERE application_name = 'figbridge-heartbeat' AND datname = %s"
)
NAMING = Naming("shop", "legacy.{database}", "{table}.{operation}")


class Beating:
    """A running heartbeat loop, and the router that sees its messages."""

    def __init__(self, slot: str) -> None:
        self.metrics = Metrics()
        self.beats = Heartbeats(slot, self.metrics)
        self.messages = Messages(["*"], NAMING, heartbeats=self.beats)

    @contextlib.contextmanager
    def loop(self, dsn: str, interval: float = 0.05) -> Iterator[Heartbeat]:
        stop = threading.Event()
        heartbeat = Heartbeat(dsn, self.beats, interval)
        thread = threading.Thread(target=heartbeat.run, args=(stop,), daemon=True)
        thread.start()
        try:
            yield heartbeat
            assert thread.is_alive(), "the loop has ended by itself"
        finally:
            stop.set()
            thread.join(60)
        assert not thread.is_alive()

    def count(self, stage: str) -> float:
        labels = {"stage": stage}
        return self.metrics.registry.get_sample_value("figbridge_forward_heartbeat_seconds_count", labels) or 0.0

    def mean(self, stage: str) -> float:
        labels = {"stage": stage}
        total = self.metrics.registry.get_sample_value("figbridge_forward_heartbeat_seconds_sum", labels) or 0.0
        return total / self.count(stage)


def prepared(database: Database) -> None:
    database.execute("CREATE TABLE quiet (id int PRIMARY KEY)")
    database.execute("CREATE PUBLICATION pub FOR TABLE quiet")
    database.create_slot()


def confirmed(database: Database) -> int:
    query = "SELECT confirmed_flush_lsn - '0/0' FROM pg_replication_slots WHERE slot_name = %s"
    return int(database.execute(query, [database.slot])[0][0])


def test_a_heartbeat_goes_round_and_moves_the_slot_of_a_quiet_publication(each_database: Database) -> None:
    prepared(each_database)
    beating = Beating(each_database.slot)
    before = confirmed(each_database)
    with Stream(each_database, beating.messages) as stream:
        beating.beats.opened()
        with beating.loop(each_database.dsn):
            for _ in range(3):
                seen = beating.count("seen")
                stream.read(lambda seen=seen: beating.count("seen") > seen, timeout=5)  # type: ignore[misc]  # mypy infers no type for a lambda's default
                stream.acknowledge(stream.end)
                beating.beats.acknowledged(stream.end)
            assert beating.count("acknowledged") == beating.count("seen")
            assert 0 < beating.beats.age("acknowledged") < 5
            # 17 flushes at once; before, the WAL writer does it within wal_writer_delay, 200 ms
            assert beating.mean("seen") < 2
        assert stream.left == []  # the prefix * is everything but ours
        stream.finish()
    assert confirmed(each_database) == stream.end > before


def test_it_needs_no_privilege_and_costs_no_transaction_id(each_database: Database) -> None:
    prepared(each_database)
    role = f"{each_database.name}_nobody"
    each_database.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'x'")
    beating = Beating(each_database.slot)
    try:
        with Stream(each_database, beating.messages) as stream, each_database.connect() as connection:
            state = "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::int"
            before = connection.execute(state).fetchone()
            beating.beats.opened()
            dsn = psycopg.conninfo.make_conninfo(each_database.dsn, user=role, password="x")
            with beating.loop(dsn, 0.001):
                stream.read(lambda: beating.count("seen") >= 20)
            after = connection.execute(state).fetchone()
            assert before
            assert after
            assert after[0] - before[0] < 10  # the server's own jobs may take a few
            sizes = {len(message.content) for message in stream.messages}
            assert max(sizes) < 160
    finally:
        each_database.execute(f"DROP ROLE {role}")


def test_without_the_privilege_it_says_so_once_and_goes_on_when_it_has_it(database: Database) -> None:
    prepared(database)
    role = f"{database.name}_nobody"
    database.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'x'")
    signatures = database.execute(
        "SELECT oid::regprocedure::text FROM pg_proc WHERE proname = 'pg_logical_emit_message'"
    )
    beating = Beating(database.slot)
    try:
        for (signature,) in signatures:
            database.execute(f"REVOKE EXECUTE ON FUNCTION {signature} FROM PUBLIC")
        with Stream(database, beating.messages) as stream, capture_logs() as logs:
            beating.beats.opened()
            with beating.loop(psycopg.conninfo.make_conninfo(database.dsn, user=role, password="x"), 0.01):
                until(lambda: beating.beats._sequence > 5, 10, "several attempts")
                assert [(it["log_level"], "permission denied" in it["reason"]) for it in logs] == [("warning", True)]
                for (signature,) in signatures:
                    database.execute(f"GRANT EXECUTE ON FUNCTION {signature} TO PUBLIC")
                stream.read(lambda: beating.count("seen"))
                until(lambda: len(logs) == 2)
            assert logs[1]["event"] == "heartbeats are written again"
    finally:
        for (signature,) in signatures:
            database.execute(f"GRANT EXECUTE ON FUNCTION {signature} TO PUBLIC")
        database.execute(f"DROP ROLE {role}")


def test_a_connection_that_ended_costs_no_heartbeat(database: Database) -> None:
    prepared(database)
    beating = Beating(database.slot)
    with Stream(database, beating.messages) as stream, capture_logs() as logs:
        beating.beats.opened()
        with beating.loop(database.dsn):
            for _ in range(3):
                # one that was begun after the last end: what was on its way then is tried again, and only once
                before = beating.beats._sequence
                stream.read(lambda before=before: beating.beats._seen > before)  # type: ignore[misc]  # mypy infers no type for a lambda's default
                until(lambda: database.execute(END, [database.name]) == [(True,)])
    assert logs == []


def test_only_the_replica_that_has_the_stream_writes(database: Database) -> None:
    prepared(database)
    beating, waiting = Beating(database.slot), Beating(database.slot)
    with Stream(database, beating.messages) as stream, beating.loop(database.dsn), waiting.loop(database.dsn):
        beating.beats.opened()
        stream.read(lambda: beating.count("seen") >= 3)
        instances = {message.content.partition(b'"instance":"')[2][:16] for message in stream.messages}
    assert instances == {beating.beats._instance.encode()}
    assert waiting.beats._sequence == 0


@pytest.mark.parametrize("version", [15, 18])
def test_on_a_standby_it_says_so_once_and_the_loop_goes_on(version: int) -> None:
    try:
        server = EmbeddedPostgres(version)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    beating = Beating("slot")
    with server:
        server.stop()
        (server._data / "standby.signal").touch()  # recovery without an end
        server.start()
        with capture_logs() as logs, beating.loop(server.dsn(), 0.01):
            beating.beats.opened()
            until(lambda: beating.beats._sequence > 5, 10, "several attempts")
    assert [(it["log_level"], it["reason"]) for it in logs] == [("warning", "the server is a standby")]


def test_another_bridges_heartbeat_and_an_earlier_life_are_not_counted(database: Database) -> None:
    prepared(database)
    beating, other = Beating(database.slot), Beating("other_slot")
    with database.connect() as connection:
        for content in (other.beats.content(), Beating(database.slot).beats.content(), "{}", "[]", "no JSON", "1"):
            connection.execute("SELECT pg_logical_emit_message(false, %s, %s::text)", [PREFIX, content])
        connection.execute("INSERT INTO quiet VALUES (1)")
    with Stream(database, beating.messages) as stream:
        stream.read(lambda: stream.changes)
    assert len(stream.messages) == 6
    assert (beating.count("seen"), stream.left) == (0, [])
