"""A standby that snapshots are read from: what `figbridge check` says of it, and what a promotion does to a run."""

import json
from collections.abc import Callable, Iterator

import psycopg
import pytest
from psycopg import conninfo
from structlog.testing import capture_logs

from figbridge.config import Config
from figbridge.demo.postgres import installations
from figbridge.preflight import require
from fixtures.checked import inspected
from fixtures.clock import until
from fixtures.cluster import Cluster, cluster
from fixtures.forward import Forward
from fixtures.postgres import Database
from fixtures.snapshot import finished, prepare, states

PLACE, THING = "forward.snapshot-standby", ("public", "thing")
DDL = "CREATE TABLE thing (id int PRIMARY KEY, v int); INSERT INTO thing SELECT n, n FROM generate_series(1, 3000) AS n"


@pytest.fixture(params=[14, 18])
def pair(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    if request.param not in installations():
        pytest.skip(f"no PostgreSQL {request.param} here")
    with cluster(request.param) as servers:
        yield servers


def on(dsn: str, statement: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(statement)


def config(database: Database, standby: str, user: str = "postgres") -> Config:
    dsn = conninfo.make_conninfo(database.dsn, user=user)
    legacy = {"dsn": dsn, "slot": database.slot, "publication": "pub", "tables": ["public.thing"]}
    forward = {"sink": {"type": "stdout"}, "snapshot": "initial", "snapshot-standby": standby}
    return Config.parse(json.dumps({"legacy": legacy, "forward": forward}), {})


def test_a_standby_and_what_becomes_of_a_snapshot_when_it_is_promoted(pair: Cluster, database: Database) -> None:
    on(pair.primary.dsn(), "CREATE DATABASE shop")
    on(pair.primary.dsn(), "CREATE ROLE reader LOGIN")
    shop, standby = Database(pair.primary, "shop"), pair.standby.dsn("shop")
    prepare(shop, DDL, "thing")
    ((end,),) = shop.execute("SELECT end_lsn FROM pg_replication_slot_advance(%s, pg_current_wal_lsn())", [shop.slot])
    caught_up = f"SELECT pg_last_wal_replay_lsn() >= '{end}'"

    def replayed() -> bool:
        with psycopg.connect(pair.standby.dsn(), autocommit=True) as connection:
            return connection.execute(caught_up).fetchone() == (True,)

    until(replayed, 20, "the standby has it all")

    def finding(level: str, dsn: str = standby) -> str:
        found = inspected(config(shop, dsn)).only(level, PLACE)
        return f"{found.what}; {found.remedy}"

    assert "is a standby of legacy.dsn" in finding("ok")
    assert "does not answer" in finding("warning", conninfo.make_conninfo(standby, port="1"))
    assert "is a server of another cluster" in finding("error", database.dsn)
    assert "is no standby (any more)" in finding("error", shop.dsn)
    assert "dbname=shop" in finding("error", pair.standby.dsn("postgres"))
    assert 'GRANT SELECT ON "public"."thing" TO "reader";' in finding(
        "error", conninfo.make_conninfo(standby, user="reader")
    )
    _policed(shop, lambda: finding("error", conninfo.make_conninfo(standby, user="reader")))
    pair.standby.reload(hot_standby_feedback="off", max_standby_streaming_delay="0")
    until(lambda: _shown(standby, "max_standby_streaming_delay") == "0", 10)
    assert "hot_standby_feedback = on" in finding("warning")
    pair.standby.reload(hot_standby_feedback="on", max_standby_streaming_delay="30s")
    until(lambda: _shown(standby, "hot_standby_feedback") == "on", 10)
    on(standby, "SELECT pg_wal_replay_pause()")
    assert "pg_wal_replay_resume" in finding("warning")
    on(standby, "SELECT pg_wal_replay_resume()")

    with (
        capture_logs() as logs,
        Forward(shop, snapshot=[THING], standby=standby, rate=500) as forward,
    ):
        until(lambda: forward.sink.events, 20, lambda: f"the first chunk: {states(shop)}")
        pair.standby.promote()
        on(standby, "UPDATE thing SET v = -1")  # another history
        message = "SELECT state, message FROM figbridge.snapshot"
        why = "forward.snapshot-standby is no standby (any more): it was promoted?"
        until(lambda: shop.execute(message) == [("running", why)], 30, lambda: f"{shop.execute(message)}")
        before = len(forward.sink.events)
        assert before < 3000
        shop.execute("UPDATE thing SET v = 0 WHERE id = 3000")
        assert forward.until_events(before + 1)[-1]["op"] == "update", "the stream goes on"
        assert forward.failure is None
    (told,) = [it for it in logs if it["event"] == "retrying"]
    assert (told["log_level"], told["error"]) == ("error", why)
    assert "target_session_attrs=standby" in told["hint"]
    assert "is no standby (any more)" in finding("error")
    assert PLACE in [it.where for it in require(config(shop, standby), "init") if it.level == "error"], "nobody stops"

    with Forward(shop, snapshot=[THING], sink=forward.sink) as forward:  # from the primary
        finished(forward, "thing")
    assert shop.execute("SELECT message FROM figbridge.snapshot") == [(None,)]
    read = [it["after"] for it in forward.sink.details if it["op"] == "read"]
    values = {row["id"]: row["v"] for row in read}
    assert values == {n: n for n in range(1, 3000)} | {3000: 0}, "what the promoted server says is in no event"
    assert len(read) <= 3000 + 500


def _policed(shop: Database, said: Callable[[], str]) -> None:
    """Rows may be hidden from the role: a snapshot would fail."""
    on(shop.dsn, "GRANT SELECT ON thing TO reader; ALTER TABLE thing ENABLE ROW LEVEL SECURITY")
    until(lambda: 'ALTER ROLE "reader" BYPASSRLS;' in said(), 20, said)


def _shown(dsn: str, setting: str) -> str:
    with psycopg.connect(dsn, autocommit=True) as connection:
        return str((connection.execute(f"SHOW {setting}").fetchone() or ("",))[0])
