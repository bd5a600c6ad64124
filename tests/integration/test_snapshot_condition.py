"""Snapshots of the rows that satisfy a condition, which the server looks for."""

from math import inf
from typing import Any

import psycopg
import pytest
from psycopg.pq import TransactionStatus

from figbridge import legacy
from figbridge.forward.snapshot import chunk, plan
from figbridge.forward.snapshot.layout import Layout
from figbridge.forward.snapshot.loop import Snapshot
from figbridge.forward.snapshot.progress import Progress, State
from figbridge.forward.table import Naming, Table
from figbridge.forward.values import Encoders
from fixtures.clock import until
from fixtures.forward import Forward
from fixtures.postgres import Database
from fixtures.snapshot import finished, prepare, states

THING = ("public", "thing")
DDL = """
CREATE TABLE thing (id int PRIMARY KEY, v int);
INSERT INTO thing SELECT n, n - 700 FROM generate_series(1, 1000) AS n;
"""


def order(database: Database, condition: str | None) -> None:
    """Ask for the rows of ``thing`` that no stream has told."""
    database.execute("SELECT pg_replication_slot_advance(%s, pg_current_wal_lsn())", [database.slot])
    with database.connect() as connection:
        Progress(database.slot).want(connection, THING, condition)


def test_a_condition_that_fails_at_some_row_fails_the_table_with_the_reason(each_database: Database) -> None:
    """Rows came before the error did."""
    prepare(each_database, DDL, "thing")
    order(each_database, "100 / v <> 5")
    with Forward(each_database, snapshot=[]) as forward:
        until(lambda: forward.failure or states(each_database)["thing"] == "failed", 20)
        assert forward.failure is None
    assert "division by zero" in each_database.execute("SELECT message FROM figbridge.snapshot")[0][0]


def test_a_statement_that_is_cancelled_behind_rows_says_so_and_the_connection_can_be_used(database: Database) -> None:
    prepare(database, DDL, "thing")
    with legacy.connect(database.dsn, purpose="test", autocommit=True) as connection:
        found = plan.describe(connection, THING, "pub")
        assert found is not None
        encoders = Encoders("safe", lambda _: None)
        table = Table(found.relation, Naming("db", "db", "{table}"), encoders, frozenset({"id"}), {})
        layout = Layout(table, keyed=True)
        condition = "CASE WHEN id < 800 THEN true ELSE pg_sleep(60) IS NOT NULL END"

        def read() -> None:
            with chunk.locked(connection, THING, lambda _: False):
                connection.execute("SET LOCAL statement_timeout = '50ms'")
                chunk.read(connection, found, layout, None, condition, most=1000, width=inf)

        with pytest.raises(psycopg.errors.QueryCanceled, match="statement timeout"):
            read()
        assert connection.info.transaction_status == TransactionStatus.IDLE


@pytest.mark.parametrize("way", ["condition", "filter"])
@pytest.mark.parametrize("key", ["id", "part, id"])
def test_a_table_is_looked_through_in_stretches(
    each_database: Database, monkeypatch: pytest.MonkeyPatch, way: str, key: str
) -> None:
    """Of which each is a chunk, also if no row in it satisfies the condition: what was looked at is not again."""
    if way == "filter" and each_database.version < 15:
        pytest.skip("publications of this server have no filters")

    class Small(chunk.Size):
        def learn(self, _chunk: chunk.Chunk) -> None:
            """The next chunk is as large."""

    monkeypatch.setattr(chunk, "Size", lambda: Small(rows=30, looks=100))
    prepare(
        each_database,
        f'CREATE TABLE thing (id int, part text COLLATE "C", v int, PRIMARY KEY ({key})); '
        "INSERT INTO thing SELECT n, 'p' || n % 3, n FROM generate_series(1, 1000) AS n",
        "thing",
    )
    wanted = "v < 4 OR v > 950"
    if way == "filter":
        each_database.execute(f"ALTER PUBLICATION pub SET TABLE thing WHERE ({wanted})")
        each_database.execute("ALTER TABLE thing REPLICA IDENTITY FULL")
    order(each_database, wanted if way == "condition" else None)
    cursors: list[object] = []

    class Noting(Snapshot):
        def _mark(self, *about: Any, **more: Any) -> State | None:
            cursors.append(about[2].noted.get("key"))
            return super()._mark(*about, **more)

    with Forward(each_database, snapshot=[], loop=Noting) as forward:
        finished(forward, "thing")
        read = [it["after"]["id"] for it in forward.sink.details if it["op"] == "read"]
    assert sorted(read) == [1, 2, 3, *range(951, 1001)]
    assert len({str(it) for it in cursors}) >= 10


def test_fewer_rows_are_looked_at_where_that_took_too_long() -> None:
    size = chunk.Size()
    before = size.looks
    size.tired()
    assert 10 <= size.looks <= before // 10
    size.learn(chunk.Chunk((), None, end=False, seconds=0.01, size=0, looked=size.looks))
    assert size.looks == 4 * (before // 10)
