"""What a transaction is in the stream, and tables at the edges of what PostgreSQL allows. The oracle is the server."""

import contextlib

import psycopg
import pytest

from figbridge.demo.postgres import EmbeddedPostgres, installations
from fixtures.forward import Forward
from fixtures.postgres import Database
from fixtures.replay import FENCE, assert_replays, prepared, settled, told


def test_savepoints_rolled_back_leave_no_gap_in_the_ordinals(each_database: Database) -> None:
    prepared(each_database, "CREATE TABLE thing (id int PRIMARY KEY, n int)")
    with each_database.connect() as connection, connection.transaction():
        connection.execute("INSERT INTO thing SELECT n, 0 FROM generate_series(1, 3) n")
        for depth in range(4):
            with contextlib.suppress(psycopg.errors.DivisionByZero), connection.transaction():
                connection.execute("INSERT INTO thing VALUES (%s, 1)", [10 + depth])
                with contextlib.suppress(psycopg.errors.DivisionByZero), connection.transaction():
                    connection.execute("UPDATE thing SET n = n + 1 WHERE id < 3")
                    connection.execute("SELECT 1 / %s", [depth % 2])
                connection.execute("SELECT 1 / %s", [depth // 2])
        connection.execute("DELETE FROM thing WHERE id = 3")
    details = told(each_database)
    assert [it["position"]["ordinal"] for it in details] == list(range(len(details)))
    assert [(it["op"], it["key"]["id"]) for it in details] == [
        ("insert", 1), ("insert", 2), ("insert", 3), ("insert", 12), ("insert", 13), ("update", 1), ("update", 2),
        ("delete", 3),
    ]  # fmt: skip
    assert_replays(each_database, details, "thing")


def test_rows_that_share_an_lsn_have_ids_of_their_own(each_database: Database) -> None:
    """COPY and INSERT … SELECT write many rows in one WAL record."""
    prepared(each_database, "CREATE TABLE thing (id int PRIMARY KEY, n int)")
    with each_database.connect() as connection:
        with connection.cursor().copy("COPY thing FROM STDIN") as copy:
            for number in range(1000):
                copy.write_row((number, 0))
        connection.execute("INSERT INTO thing SELECT n, 0 FROM generate_series(1000, 1999) n")
        connection.execute("UPDATE thing SET n = 1 WHERE id % 2 = 0")
    details = told(each_database)
    assert len({it["id"] for it in details}) == len(details) == 3000
    assert len({it["position"]["commit_lsn"] for it in details}) == 3
    assert_replays(each_database, details, "thing")


def test_transactions_that_interleave_leave_whole_and_in_the_order_of_their_commits(each_database: Database) -> None:
    prepared(each_database, "CREATE TABLE thing (id int PRIMARY KEY, n int)")
    with each_database.connect() as first, each_database.connect() as second:
        first.execute("BEGIN; INSERT INTO thing VALUES (1, 1)")
        second.execute("BEGIN; INSERT INTO thing VALUES (2, 2)")
        first.execute("INSERT INTO thing VALUES (3, 1)")
        second.execute("INSERT INTO thing VALUES (4, 2); COMMIT")
        first.execute("COMMIT")
    details = told(each_database)
    assert [it["key"]["id"] for it in details] == [2, 4, 1, 3]
    assert_replays(each_database, details, "thing")


def test_what_is_prepared_leaves_when_it_is_committed(each_version: int) -> None:
    if each_version not in installations():
        pytest.skip("needs a server of its own, with max_prepared_transactions")
    with EmbeddedPostgres(each_version, {"max_prepared_transactions": "5"}) as server:
        database = Database(server, "postgres")
        prepared(database, "CREATE TABLE thing (id int PRIMARY KEY, n int)")
        with Forward(database, messages=[FENCE]) as forward:
            database.execute("BEGIN; INSERT INTO thing VALUES (1, 1), (2, 1); PREPARE TRANSACTION 'kept'")
            database.execute("BEGIN; INSERT INTO thing VALUES (3, 1); PREPARE TRANSACTION 'lost'")
            database.execute("INSERT INTO thing VALUES (4, 1)")
            assert [it["key"]["id"] for it in settled(forward)] == [4]
            database.execute("ROLLBACK PREPARED 'lost'")
            forward.halt()
        server.stop("immediate")  # what is prepared outlives a crash of both
        server.start()
        with Forward(database, messages=[FENCE]) as forward:
            database.execute("COMMIT PREPARED 'kept'")
            database.execute("UPDATE thing SET n = 2 WHERE id = 1")
            again = settled(forward)
    assert [(it["op"], it["key"]["id"]) for it in again if it["key"]["id"] != 4] == [
        ("insert", 1), ("insert", 2), ("update", 1),
    ]  # fmt: skip


# --- tables at the edges


def test_what_is_not_in_the_wal_makes_no_event(each_database: Database) -> None:
    prepared(
        each_database,
        "CREATE UNLOGGED TABLE scratch (id int PRIMARY KEY); CREATE TABLE thing (id int PRIMARY KEY)",
        "CREATE VIEW seen AS SELECT * FROM thing; CREATE MATERIALIZED VIEW kept AS SELECT * FROM thing",
    )
    each_database.execute(
        "CREATE TEMP TABLE passing (id int PRIMARY KEY); INSERT INTO passing VALUES (1); UPDATE passing SET id = 2; "
        "INSERT INTO scratch VALUES (1); DELETE FROM scratch; INSERT INTO seen VALUES (1); TRUNCATE scratch"
    )
    each_database.execute("REFRESH MATERIALIZED VIEW kept; CREATE SEQUENCE s; SELECT nextval('s')")
    each_database.execute("VACUUM FULL thing")
    each_database.execute("BEGIN; SELECT txid_current(); COMMIT")
    each_database.execute("CLUSTER thing USING thing_pkey")
    each_database.execute("ALTER TABLE scratch SET LOGGED; INSERT INTO scratch VALUES (7)")
    details = told(each_database)
    assert [(it["table"], it["key"]) for it in details] == [("thing", {"id": 1}), ("scratch", {"id": 7})]


def test_a_table_without_columns(each_database: Database) -> None:
    prepared(each_database, "CREATE TABLE empty (); ALTER TABLE empty REPLICA IDENTITY FULL")
    each_database.execute("INSERT INTO empty DEFAULT VALUES")
    each_database.execute("INSERT INTO empty DEFAULT VALUES")
    each_database.execute("DELETE FROM empty WHERE ctid = (SELECT min(ctid) FROM empty)")
    details = told(each_database)
    assert [(it["op"], it["before"], it["after"]) for it in details] == [
        ("insert", None, {}), ("insert", None, {}), ("delete", {}, None),
    ]  # fmt: skip
    assert_replays(each_database, details, "empty")


def test_as_many_columns_as_a_table_can_have(each_database: Database) -> None:
    columns = [f"c{number}" for number in range(1600)]
    prepared(
        each_database,
        f"CREATE TABLE wide (c0 int PRIMARY KEY, {', '.join(f'{name} bool' for name in columns[1:])})",
        "ALTER TABLE wide REPLICA IDENTITY FULL",
    )
    each_database.execute("INSERT INTO wide (c0) VALUES (1)")  # all but one NULL, to the last
    each_database.execute("INSERT INTO wide (c0, c1599) VALUES (2, true)")
    each_database.execute(f"UPDATE wide SET {', '.join(f'{name} = c0 = 1' for name in columns[1:])}")
    each_database.execute("ALTER TABLE wide DROP c1599")
    each_database.execute("INSERT INTO wide VALUES (3, NULL, true)")
    details = told(each_database)
    assert [len(it["after"]) for it in details] == [1600] * 4 + [1599]
    with_all = [{**it, "after": {k: v for k, v in it["after"].items() if k != "c1599"}} for it in details]
    with_all = [{**it, "before": it["before"] and {k: v for k, v in it["before"].items() if k != "c1599"}}
                for it in with_all]  # fmt: skip
    assert_replays(each_database, with_all, "wide")
