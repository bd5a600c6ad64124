"""The forward path against real servers: what is told, what is acknowledged, and what it survives."""

import json
import os
import socket
import threading
from importlib import resources
from pathlib import Path

import psycopg
import pytest

from figbridge import canary, legacy
from figbridge.change import Lsn, Relation
from figbridge.demo.postgres import EmbeddedPostgres
from figbridge.errors import LegacyUnavailable, SlotLost, SourceError
from figbridge.forward.keys import PrimaryKeys
from figbridge.forward.source import ReplicationSource
from fixtures.clock import Stopwatch, until
from fixtures.forward import Forward
from fixtures.postgres import Database

TABLE = "CREATE TABLE thing (id int PRIMARY KEY, name text, big text)"


def prepared(database: Database, *tables: str, publication: str = "FOR ALL TABLES") -> None:
    for table in tables or (TABLE,):
        database.execute(table)
    database.execute(f"CREATE PUBLICATION pub {publication}")
    database.create_slot()


def test_every_operation_as_documented(each_database: Database) -> None:
    prepared(
        each_database,
        TABLE,
        "CREATE TABLE whole (id int PRIMARY KEY, name text, big text); ALTER TABLE whole REPLICA IDENTITY FULL",
        "ALTER TABLE thing ALTER big SET STORAGE EXTERNAL; ALTER TABLE whole ALTER big SET STORAGE EXTERNAL",
        'CREATE SCHEMA "Odd ""Schema"; CREATE TABLE "Odd ""Schema"."Tä b.le" ("a ""key" int PRIMARY KEY, "é" text)',
    )
    for table in ("thing", "whole"):
        each_database.execute(f"INSERT INTO {table} VALUES (1, 'one', repeat('x', 10000)), (2, NULL, '')")
        each_database.execute(f"UPDATE {table} SET name = 'uno' WHERE id = 1")
        each_database.execute(f"UPDATE {table} SET id = 3 WHERE id = 2")
        each_database.execute(f"DELETE FROM {table} WHERE id = 1")
    each_database.execute('INSERT INTO "Odd ""Schema"."Tä b.le" VALUES (1, $1)'.replace("$1", "'ü'"))
    each_database.execute("TRUNCATE thing, whole")
    with Forward(each_database) as forward:
        events = forward.until_events(13)
        assert [event.detail_type for event in forward.sink.events[:4]] == [
            "thing.inserted", "thing.inserted", "thing.updated", "thing.updated",
        ]  # fmt: skip
    one, two, update, moved, deleted = events[:5]
    big = "x" * 10000
    assert (one["key"], one["before"], one["after"]) == ({"id": 1}, None, {"id": 1, "name": "one", "big": big})
    assert (one["position"]["ordinal"], two["position"]["ordinal"]) == (0, 1)
    assert one["position"]["commit_lsn"] == two["position"]["commit_lsn"]
    assert two["after"] == {"id": 2, "name": None, "big": ""}
    assert (update["before"], update["after"], update["unchanged"]) == (None, {"id": 1, "name": "uno"}, ["big"])
    assert (moved["key"], moved["before"], moved["after"]["id"]) == ({"id": 3}, {"id": 2}, 3)
    assert (deleted["key"], deleted["before"], deleted["after"]) == ({"id": 1}, {"id": 1}, None)
    # FULL: the primary key is still the key, the old row is whole, and what was not sent is filled in from it
    _, _, update, moved, deleted = events[5:10]
    assert (update["key"], update["unchanged"]) == ({"id": 1}, [])
    assert update["before"] == {"id": 1, "name": "one", "big": big}
    assert update["after"] == {"id": 1, "name": "uno", "big": big}
    assert (moved["key"], moved["before"]["id"]) == ({"id": 3}, 2)
    assert deleted["before"] == {"id": 1, "name": "uno", "big": big}
    assert (events[10]["schema"], events[10]["table"], events[10]["after"]) == (
        'Odd "Schema', "Tä b.le", {'a "key': 1, "é": "ü"},
    )  # fmt: skip
    assert {(it["op"], it["table"], it["key"]) for it in events[11:]} == {
        ("truncate", "thing", None), ("truncate", "whole", None),
    }  # fmt: skip


def test_the_same_change_has_the_same_id_and_bytes_when_it_comes_again(each_database: Database) -> None:
    prepared(each_database)
    each_database.execute("INSERT INTO thing SELECT n, 'n', 'b' FROM generate_series(1, 3) n")
    each_database.execute("UPDATE thing SET name = 'm'")
    seen = []
    for _ in range(3):
        with Forward(each_database) as forward:
            forward.source.send_status = lambda **_: None  # type: ignore[method-assign]  # nothing is acknowledged
            forward.until_events(6)
            seen.append([(event.id, event.detail) for event in forward.sink.events])
    assert len({identity for identity, _ in seen[0]}) == 6
    assert seen[1] == seen[0]
    assert seen[2] == seen[0]


def test_a_sink_that_refuses_for_longer_than_wal_sender_timeout(each_database: Database) -> None:
    prepared(each_database)
    limit = 200_000
    with Forward(each_database, options="-c wal_sender_timeout=2s", buffer_bytes=limit) as forward:
        forward.until_streaming()
        assert forward.source.sender_timeout == 2.0
        forward.sink.open.clear()
        each_database.execute("INSERT INTO thing SELECT n, repeat('y', 500), 'b' FROM generate_series(1, 8000) n")
        until(lambda: forward.buffer.full, 20)
        walsender = "SELECT active_pid, confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = %s"
        before = each_database.execute(walsender, [each_database.slot])[0][0]
        timeouts = "SELECT now() > %s::timestamptz + interval '6 seconds'"
        began = each_database.execute("SELECT now()")[0][0]
        most = 0.0

        def passed() -> bool:
            nonlocal most
            most = max(most, forward.metric("forward_buffered_bytes"))
            return bool(each_database.execute(timeouts, [began])[0][0])

        until(passed, 20)
        ((pid, confirmed),) = each_database.execute(walsender, [each_database.slot])
        assert pid is not None
        assert pid == before
        assert most <= limit + 1000 * 2000, "more than one batch beyond the limit"
        forward.sink.open.set()
        events = forward.until_events(8000, 60)
        assert [it["after"]["id"] for it in events] == list(range(1, 8001))
        assert Lsn.parse(confirmed) <= Lsn.parse(events[0]["position"]["commit_lsn"]), "confirmed what was held"
        assert forward.metric("forward_connections_total") == 1


def test_what_the_sink_has_not_taken_is_not_confirmed(each_database: Database) -> None:
    prepared(each_database)
    with Forward(each_database) as forward:
        each_database.execute("INSERT INTO thing VALUES (1)")
        forward.until_events(1)
        forward.sink.open.clear()
        each_database.execute("INSERT INTO thing SELECT n FROM generate_series(2, 5000) n")
        each_database.execute("INSERT INTO thing VALUES (5001)")
        until(lambda: forward.sink.refused > 2, 20)
        confirmed = forward.confirmed()
        forward.sink.open.set()
        held = forward.until_events(5001, 60)[1]
        assert confirmed <= Lsn.parse(held["position"]["commit_lsn"]), "confirmed what the sink had not taken"
        end = forward.wal_end()
        until(lambda: forward.confirmed() >= end, 20)


def test_an_idle_publication_on_a_busy_database_retains_no_wal(each_database: Database) -> None:
    prepared(each_database, TABLE, "CREATE TABLE noise (n int)", publication="FOR TABLE thing")
    with Forward(each_database, options="-c wal_sender_timeout=2s") as forward:
        forward.until_streaming()
        each_database.execute("INSERT INTO noise SELECT n FROM generate_series(1, 10000) n")
        end = forward.wal_end()
        until(lambda: forward.confirmed() >= end, 30)
        assert forward.sink.events == []


def test_a_soft_stop_publishes_what_was_read_and_says_so_to_the_server(each_database: Database) -> None:
    prepared(each_database)
    with Forward(each_database) as forward:
        each_database.execute("INSERT INTO thing SELECT n FROM generate_series(1, 2000) n")
        forward.until_events(2000)
        end = int(forward.checkpoint.tracked)
        forward.stop()
        assert forward.failure is None
        assert forward.confirmed() >= end
        idle = "SELECT active_pid IS NULL FROM pg_replication_slots WHERE slot_name = %s"
        until(lambda: each_database.execute(idle, [each_database.slot])[0][0])


def test_rolled_back_rows_never_leave(each_database: Database) -> None:
    prepared(each_database)
    with each_database.connect() as connection:
        with connection.transaction():
            connection.execute("INSERT INTO thing VALUES (1)")
            with connection.transaction():
                connection.execute("INSERT INTO thing VALUES (2)")
                raise psycopg.Rollback
            connection.execute("INSERT INTO thing VALUES (3)")
        connection.execute("BEGIN")
        connection.execute("INSERT INTO thing VALUES (4)")
        connection.execute("ROLLBACK")
        connection.execute("INSERT INTO thing VALUES (5)")
    with Forward(each_database) as forward:
        assert [it["key"]["id"] for it in forward.until_events(3)] == [1, 3, 5]


def test_a_row_is_read_by_the_shape_it_was_written_in(each_database: Database) -> None:
    prepared(each_database, "CREATE TABLE thing (id int PRIMARY KEY, a text)")
    each_database.execute("INSERT INTO thing VALUES (1, 'a')")
    each_database.execute("ALTER TABLE thing ADD b jsonb DEFAULT '{}'; ALTER TABLE thing RENAME a TO c")
    each_database.execute("INSERT INTO thing VALUES (2, 'c', '[1]')")
    each_database.execute("ALTER TABLE thing DROP c")
    each_database.execute("INSERT INTO thing VALUES (3, '{}')")
    with Forward(each_database) as forward:
        afters = [it["after"] for it in forward.until_events(3)]
    assert afters == [{"id": 1, "a": "a"}, {"id": 2, "c": "c", "b": [1]}, {"id": 3, "b": {}}]


def test_our_own_transactions_do_not_leave_and_the_next_ones_do(each_database: Database) -> None:
    each_database.execute((resources.files("figbridge") / "schema.sql").read_text())
    prepared(each_database, publication="FOR TABLE thing")
    each_database.execute(
        "CREATE PUBLICATION inbox FOR TABLE figbridge.inbox, figbridge.canary WITH (publish = 'insert')"
    )
    each_database.execute(f"SELECT pg_drop_replication_slot('{each_database.slot}')")
    each_database.create_slot()
    claim = "INSERT INTO figbridge.inbox VALUES ('s', '{}', '', 'e')"
    with each_database.connect() as connection:
        with connection.transaction():
            connection.execute(claim.format("1"))
            connection.execute("INSERT INTO thing VALUES (1)")
        connection.execute("INSERT INTO thing VALUES (2)")
        with connection.transaction():  # somebody's mistake: the mark comes after the data
            connection.execute("INSERT INTO thing VALUES (3)")
            connection.execute(claim.format("2"))
            connection.execute("INSERT INTO thing VALUES (4)")
    nonce = canary.write(each_database.dsn, each_database.slot)
    each_database.execute("DELETE FROM figbridge.inbox")
    each_database.execute("INSERT INTO thing VALUES (5)")
    with Forward(each_database, "pub", "inbox") as forward:
        assert [it["key"]["id"] for it in forward.until_events(3)] == [2, 3, 5]
        assert forward.echo.canaries.get(timeout=5) == nonce
        assert forward.metric("forward_late_marks_total") == 1
        assert forward.metric("forward_echoes_total") == 6
        assert {event.detail_type.split(".")[0] for event in forward.sink.events} == {"thing"}


def test_a_missing_slot_stops_with_the_remedy(each_database: Database) -> None:
    with Forward(each_database) as forward:
        failure = forward.ended()
    assert isinstance(failure, SlotLost)
    assert "figbridge init" in failure.hint


# from 18 on the server leaves the changes out and warns, where an older one fails
@pytest.mark.parametrize("made_anew", [False, True])
def test_a_publication_that_is_gone_stops_with_the_remedy_whatever_is_made_since(
    each_database: Database, made_anew: bool
) -> None:
    prepared(each_database)
    role = "SET client_min_messages = 'error'"  # nobody shall keep the server from telling us
    each_database.execute(f"ALTER DATABASE {each_database.name} {role}")
    with Forward(each_database) as forward:
        each_database.execute("INSERT INTO thing VALUES (1)")
        forward.until_events(1)
        each_database.execute("DROP PUBLICATION pub")
        each_database.execute("INSERT INTO thing VALUES (2)")
        if made_anew:
            each_database.execute("CREATE PUBLICATION pub FOR TABLE thing")
        each_database.execute("INSERT INTO thing VALUES (3)")
        failure = forward.ended()
        assert [it["key"]["id"] for it in forward.sink.details] == [1]
    assert isinstance(failure, SourceError)
    assert '"pub"' in str(failure)
    assert "drop_replication_slot" in failure.hint
    assert "copy the tables anew" in failure.hint
    with Forward(each_database) as again:  # nothing of it was acknowledged: whoever starts it again is told again
        assert '"pub"' in str(again.ended())
        # the first one's acknowledgement may have been on its way still
        assert {it["id"] for it in again.sink.details} <= {it["id"] for it in forward.sink.details}


def test_a_parameter_that_only_the_machine_can_judge(database: Database) -> None:
    with pytest.raises(LegacyUnavailable, match="refuses the connection") as refused:
        legacy.connect(f"{database.dsn} service=none-such", purpose="test")
    assert refused.value.urgent
    assert "mend `service=`" in refused.value.hint


def test_an_encoding_of_the_dsn_means_nothing(database: Database) -> None:
    with legacy.connect(f"{database.dsn} client_encoding=none-such", purpose="test") as connection:
        assert connection.info.encoding == "utf-8"


def test_an_invalidated_slot_stops_with_the_remedy() -> None:
    settings = {"max_slot_wal_keep_size": "1MB", "min_wal_size": "32MB", "max_wal_size": "32MB"}
    with EmbeddedPostgres(settings=settings) as server:
        database = Database(server, "postgres")
        prepared(database)
        for _ in range(4):
            database.execute("INSERT INTO thing SELECT n, repeat('z', 900) FROM generate_series(1, 10000) n")
            database.execute("TRUNCATE thing")
            database.execute("SELECT pg_switch_wal()")
            database.execute("CHECKPOINT")
        assert database.execute("SELECT wal_status FROM pg_replication_slots") == [("lost",)]
        with Forward(database) as forward:
            failure = forward.ended()
    assert isinstance(failure, SlotLost)
    assert "reload" in failure.hint


def test_a_cut_connection_and_a_restarted_server_lose_nothing() -> None:
    with EmbeddedPostgres() as server:
        database = Database(server, "postgres")
        prepared(database)
        with Forward(database) as forward:
            forward.until_streaming()
            database.execute("INSERT INTO thing SELECT n FROM generate_series(1, 3000) n")
            forward.until_events(1)
            database.execute("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots")
            database.execute("INSERT INTO thing SELECT n FROM generate_series(3001, 4000) n")
            forward.until_events(4000)
            server.stop("immediate")
            server.start()
            database.execute("INSERT INTO thing VALUES (4001)")
            until(lambda: any('"id":4001' in event.key for event in forward.sink.events), 30)
            assert forward.metric("forward_connections_total") >= 3
        first_seen = list(dict.fromkeys(event.id for event in forward.sink.events))
        assert len(first_seen) == 4001
        by_id = {event.id: event for event in forward.sink.events}
        assert [json.loads(by_id[it].detail)["key"]["id"] for it in first_seen] == list(range(1, 4002))


class Forgetful(Forward):
    """The catalogue does not answer the first time it is asked for a key."""

    asked = 0

    def primary_keys(self, dsn: str, relation: Relation) -> PrimaryKeys:
        self.asked += 1
        if self.asked == 1:
            raise LegacyUnavailable("no answer, says the test")
        return super().primary_keys(dsn, relation)


def test_what_was_read_and_not_handed_over_is_not_acknowledged(each_database: Database) -> None:
    """A commit was read, and the connection given up before its events were handed to the sink."""
    prepared(each_database, TABLE, "CREATE TABLE whole (id int PRIMARY KEY); ALTER TABLE whole REPLICA IDENTITY FULL")
    forward = Forgetful(each_database)
    forward.sink.open.clear()
    before = forward.wal_end()
    each_database.execute("INSERT INTO thing VALUES (1)")
    each_database.execute("INSERT INTO thing VALUES (2)")
    each_database.execute("INSERT INTO whole VALUES (3)")
    with forward:
        until(lambda: forward.asked == 2, missing="a second look at the key")
        until(lambda: forward.sink.refused > 3)
        assert forward.checkpoint.flushed <= before
        forward.sink.open.set()
        until(lambda: any(it["key"]["id"] == 3 for it in forward.sink.details))
        told = {it["id"]: it["key"]["id"] for it in forward.sink.details}  # one that was handed over may come again
        assert list(told.values()) == [1, 2, 3]


@pytest.mark.timeout(120)
def test_a_server_that_is_away_is_looked_for_every_few_seconds(database: Database) -> None:
    prepared(database)
    with socket.create_server(("127.0.0.1", 0)) as away:
        away.settimeout(30)
        port = away.getsockname()[1]
        with Forward(database, dsn=f"host=127.0.0.1 port={port} user=nobody sslmode=disable gssencmode=disable"):
            watch = Stopwatch()
            for _ in range(11):  # enough for waits that grow and grow to take a minute
                away.accept()[0].close()
            assert watch.unhindered < 16, "a failover would last longer for the bridge than for the application"


class SlowSource(ReplicationSource):
    """On a machine that is slower than the server: whenever it looks, there is more."""

    told = 0  # status updates

    def receive(self) -> list[bytes]:
        threading.Event().wait(0.02)
        return super().receive()

    def send_status(self, *, written: Lsn, flushed: Lsn) -> None:
        self.told += 1
        super().send_status(written=written, flushed=flushed)


class SlowForward(Forward):
    def make_source(self, dsn: str, publications: tuple[str, ...]) -> ReplicationSource:
        return SlowSource(dsn, self.database.slot, publications)


def test_a_server_that_is_faster_than_we_are_hears_from_us(database: Database) -> None:
    """wal_sender_timeout does not wait until there is nothing more to read."""
    prepared(database, "CREATE TABLE thing (id int PRIMARY KEY)")
    database.execute("INSERT INTO thing SELECT generate_series(1, 250000)")
    # a status is due every second, and a machine of many other things to do has two more until the server gives up
    with SlowForward(database, options="-c wal_sender_timeout=4s", buffer_bytes=1 << 40) as forward:
        forward.sink.open.clear()
        until(lambda: forward.metric("forward_buffered_events") >= 250_000, 120)
        assert isinstance(forward.source, SlowSource)
        assert forward.source.told >= 3
        forward.halt()


def test_waiting_reads_nothing(database: Database) -> None:
    """Or libpq would keep, in a buffer that it doubles and never gives back, what the full buffer has no room for."""
    prepared(database)
    database.execute("INSERT INTO thing SELECT n, repeat('x', 1000) FROM generate_series(1, 50000) n")
    source = ReplicationSource(database.dsn, database.slot, ("pub",))
    try:
        source.connect(Lsn(0))
        until(source.receive, missing="the first messages")
        before = _resident()
        for _ in range(2000):
            source.wait(0.001, reading=True)
        assert _resident() - before < 10_000_000
    finally:
        source.close()


def _resident() -> int:
    """Bytes. https://man7.org/linux/man-pages/man5/proc_pid_statm.5.html"""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.pg(">= 15")
def test_what_the_server_can_never_send_is_not_hammered_and_the_bridge_is_not_ready(database: Database) -> None:
    prepared(database, publication="FOR TABLE thing WHERE (10 / (id - 5) > -100)")
    with Forward(database) as forward:
        database.execute("INSERT INTO thing VALUES (1)")
        forward.until_events(1)
        database.execute("INSERT INTO thing VALUES (5)")
        until(lambda: forward.metric("forward_connections_total") >= 4)
        assert forward.metric("ready", part="forward") == 0
        assert forward.failure is None
        assert [it["key"]["id"] for it in forward.sink.details] == [1]
