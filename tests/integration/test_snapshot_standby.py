"""Chunks read from a real physical standby, which is behind, cancels, or is none any more."""

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any, Self

import psycopg
import pytest

from figbridge.demo.postgres import installations
from figbridge.errors import LegacyUnavailable
from figbridge.forward.snapshot.politeness import Pace
from figbridge.forward.snapshot.standby import Standby
from figbridge.metrics import Metrics
from figbridge.retry import Stopped
from fixtures.clock import until
from fixtures.cluster import Cluster, cluster
from fixtures.forward import Forward
from fixtures.postgres import Database
from fixtures.snapshot import finished, prepare, states

DDL = """
CREATE TABLE thing (id int PRIMARY KEY, v int); INSERT INTO thing SELECT n, n FROM generate_series(1, 5000) AS n;
CREATE TABLE keyless (id int, v int); INSERT INTO keyless SELECT n, n FROM generate_series(1, 500) AS n;
ALTER TABLE keyless REPLICA IDENTITY FULL;
"""
_NUMBERS = itertools.count(1)
THING, KEYLESS = ("public", "thing"), ("public", "keyless")


@pytest.fixture(scope="module", params=[16, 18])
def pair(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    if request.param not in installations():
        pytest.skip(f"no PostgreSQL {request.param} here")
    with cluster(request.param) as servers:
        yield servers


@pytest.fixture
def database(pair: Cluster, request: pytest.FixtureRequest) -> Database:
    name = "".join(it for it in request.node.originalname if it.isalpha())[-40:] + str(next(_NUMBERS))
    with psycopg.connect(pair.primary.dsn(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    made = Database(pair.primary, name)
    prepare(made, DDL, "thing", "keyless")
    ((end,),) = made.execute("SELECT end_lsn FROM pg_replication_slot_advance(%s, pg_current_wal_lsn())", [made.slot])
    until(lambda: there(pair, f"SELECT pg_last_wal_replay_lsn() >= '{end}'") == [(True,)], 20, "the standby has it all")
    return made


def there(pair: Cluster, statement: str, database: Database | None = None) -> Any:
    """Run it on the standby."""
    with psycopg.connect(pair.standby.dsn(database.name if database else "postgres"), autocommit=True) as connection:
        cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else None


def read(forward: Forward, table: str = "thing") -> dict[int, int]:
    found = [it for it in forward.sink.details if it["op"] == "read" and it["table"] == table]
    assert len(found) == len({it["after"]["id"] for it in found})
    return {it["after"]["id"]: it["after"]["v"] for it in found}


def test_the_rows_come_from_the_standby(pair: Cluster, database: Database) -> None:
    standby = pair.standby.dsn(database.name)
    with Forward(database, snapshot=[THING, KEYLESS], standby=standby) as forward:
        finished(forward, "thing", "keyless")
        assert read(forward) == {number: number for number in range(1, 5001)}
        assert len(read(forward, "keyless")) == 500
    scans = "SELECT coalesce(sum(idx_scan), 0)::int FROM pg_stat_user_tables WHERE relname = 'thing'"
    database.execute("SELECT pg_stat_force_next_flush()" if database.version >= 15 else "SELECT 1")
    assert database.execute(scans) == [(0,)], "the primary was read"


def test_what_the_standby_has_not_replayed_is_not_undone(
    pair: Cluster, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands still from the low watermark on, while rows change on the primary: the chunk has them as they were."""
    wait, todo = Standby.wait, ["UPDATE thing SET v = 0 WHERE id = 3; DELETE FROM thing WHERE id = 4"]

    def waits(self: Standby, *about: Any) -> None:
        wait(self, *about)
        if todo:
            there(pair, "SELECT pg_wal_replay_pause()")
            database.execute(todo.pop())
            assert there(pair, "SELECT v FROM thing WHERE id = 3", database) == [(3,)]
        else:
            there(pair, "SELECT pg_wal_replay_resume()")

    monkeypatch.setattr(Standby, "wait", waits)
    try:
        with Forward(database, snapshot=[THING], standby=pair.standby.dsn(database.name)) as forward:
            until(lambda: read(forward), 20, "the first chunk")
            there(pair, "SELECT pg_wal_replay_resume()")
            finished(forward, "thing")
            rows, told = read(forward), [(it["op"], it["key"]["id"]) for it in forward.sink.details]
    finally:
        there(pair, "SELECT pg_wal_replay_resume()")
    assert told[:2] == [("update", 3), ("delete", 4)]
    assert sorted(rows) == [1, 2, *range(5, 5001)]


def test_it_waits_for_a_standby_that_is_behind(pair: Cluster, database: Database) -> None:
    there(pair, "SELECT pg_wal_replay_pause()")
    try:
        database.execute("UPDATE thing SET v = 0 WHERE id = 3")
        with Forward(database, snapshot=[THING], standby=pair.standby.dsn(database.name)) as forward:
            forward.until_events(1)
            until(lambda: states(database) == {"thing": "running"}, 20, "the snapshot has begun")
            assert not read(forward)
            there(pair, "SELECT pg_wal_replay_resume()")
            finished(forward, "thing")
            assert read(forward)[3] == 0
    finally:
        there(pair, "SELECT pg_wal_replay_resume()")


def test_it_goes_on_when_a_standby_that_was_away_is_back(pair: Cluster, database: Database) -> None:
    message = "SELECT state, message FROM figbridge.snapshot"
    pair.standby.stop()
    try:
        with Forward(database, snapshot=[THING], standby=pair.standby.dsn(database.name)) as forward:
            until(lambda: "does not answer" in str(database.execute(message)), 20, "it says what it waits for")
            assert not read(forward)
            pair.standby.start()
            finished(forward, "thing")
            assert len(read(forward)) == 5000
            assert database.execute(message) == [("done", None)]
    finally:
        if not (pair.standby._data / "postmaster.pid").exists():
            pair.standby.start()


def test_a_server_of_another_cluster_is_refused(pair: Cluster) -> None:
    with pytest.raises(LegacyUnavailable, match="another cluster"), Standby.opened(pair.standby.dsn(), "1234"):
        pass


def test_a_connection_that_may_not_ask_is_closed(pair: Cluster, database: Database) -> None:
    role = f"{database.name}_limited"
    ours = f"SELECT 1 FROM pg_stat_activity WHERE usename = '{role}'"
    dsn = pair.standby.dsn(database.name).replace("user=postgres", f"user={role}")
    database.execute(f"CREATE ROLE {role} LOGIN; REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC")
    revoked = "SELECT 1 FROM pg_proc WHERE proname = 'pg_control_system' AND proacl::text !~ '[{,]='"
    until(lambda: there(pair, revoked, database), 20, "the standby has it all")
    try:
        with pytest.raises(LegacyUnavailable, match="permission denied") as refused, Standby.opened(dsn, "1234"):
            pass
        until(lambda: not there(pair, ours), 20, lambda: f"no connection is left, after: {refused.value}")
    finally:
        database.execute(f"DROP ROLE {role}")


def test_a_primary_is_no_standby(pair: Cluster, database: Database) -> None:
    ((identifier,),) = database.execute("SELECT system_identifier::text FROM pg_control_system()")
    with (
        Standby.opened(pair.primary.dsn(), identifier) as standby,
        database.connect() as primary,
        pytest.raises(LegacyUnavailable, match="no standby"),
    ):
        standby.wait(primary, threading.Event())


THROTTLED = "figbridge_forward_snapshot_throttled"


class Walking:
    """What a loop asks of its pace, chunk after chunk, in a thread."""

    def __init__(self, database: Database, lag: float) -> None:
        self._database, self._metrics, self._stop = database, Metrics(), threading.Event()
        self._pace = Pace(self._metrics, lag=lag)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.chunks = 0

    def _run(self) -> None:
        with self._database.connect() as connection, contextlib.suppress(Stopped):
            while not self._stop.wait(0.05):
                self._pace.wait(connection, self._stop)
                self.chunks += 1

    @property
    def waits(self) -> bool:
        return self._metrics.registry.get_sample_value(THROTTLED) == 1

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)


def test_a_snapshot_waits_while_a_standby_is_behind(pair: Cluster, database: Database) -> None:
    """Whichever standby it is, and wherever the rows are read."""

    def behind() -> bool:
        database.execute("UPDATE thing SET v = v + 1 WHERE id = 1")  # lag is that of something to replay
        query = "SELECT coalesce(max(replay_lag), '0') > '0.5 s' FROM pg_stat_replication"
        return bool(database.execute(query)[0][0])

    try:
        pair.standby.reload(recovery_min_apply_delay="1s")
        until(behind, 30, "the standby is behind")
        with Walking(database, 0.5) as walking:
            until(lambda: walking.waits, 10, "the snapshot waits")
            assert not walking.chunks
            pair.standby.reload(recovery_min_apply_delay="0")
            until(lambda: not behind() and walking.chunks, 30, "the snapshot goes on")
            assert not walking.waits
    finally:
        pair.standby.reload(recovery_min_apply_delay="0")


@pytest.mark.parametrize("how", ["replay is paused", "it does not answer"])
def test_a_snapshot_waits_for_a_standby_that_stands_still_while_nobody_writes(
    pair: Cluster, database: Database, how: str
) -> None:
    """A standby that does not answer leaves pg_stat_replication.replay_lag as it was, which is NULL for an idle one."""
    ((receiver,),) = there(pair, "SELECT pid FROM pg_stat_wal_receiver")
    lag = "SELECT max(replay_lag) FROM pg_stat_replication"
    until(lambda: database.execute(lag) == [(None,)], 30, "the standby is idle")
    with Walking(database, 1.0) as walking:
        until(lambda: walking.chunks, 10, "it reads")
        assert not walking.waits
        try:
            if how == "replay is paused":
                there(pair, "SELECT pg_wal_replay_pause()")
            else:
                os.kill(receiver, signal.SIGSTOP)
            database.execute("UPDATE thing SET v = v + 1 WHERE id = 1")
            until(lambda: walking.waits, 15, lambda: f"the snapshot waits, with {database.execute(lag)}")
        finally:
            os.kill(receiver, signal.SIGCONT)
            there(pair, "SELECT pg_wal_replay_resume()")
        until(lambda: not walking.waits, 15, "the snapshot goes on")
