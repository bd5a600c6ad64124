"""What a publication leaves out: rows by a filter, columns by a list, generated columns. The rest still replays.

https://www.postgresql.org/docs/current/logical-replication-row-filter.html
https://www.postgresql.org/docs/current/logical-replication-col-lists.html
https://www.postgresql.org/docs/current/logical-replication-gencols.html
"""

import pytest

from figbridge.errors import SourceError
from fixtures.forward import Forward
from fixtures.postgres import Database
from fixtures.replay import Replica, assert_replays, rows_of, told


def prepared(database: Database, ddl: str, publication: str) -> None:
    database.execute(ddl)
    database.execute(f"CREATE PUBLICATION pub {publication}")
    database.create_slot()


def run(database: Database, *statements: str) -> None:
    for statement in statements:
        database.execute(statement)


ORDERS = "CREATE TABLE orders (id int PRIMARY KEY, state text, note text); ALTER TABLE orders REPLICA IDENTITY FULL;"


@pytest.mark.pg(">= 15")
def test_an_update_moves_a_row_into_a_filter_and_out_of_it(each_database: Database) -> None:
    prepared(each_database, ORDERS, "FOR TABLE orders WHERE (state = 'paid')")
    run(
        each_database,
        "INSERT INTO orders VALUES (1, 'paid', 'a'), (2, 'open', repeat('x', 9000)), (3, NULL, 'c')",
        "UPDATE orders SET state = 'paid' WHERE id = 2",  # in
        "UPDATE orders SET note = 'b' WHERE id IN (1, 3)",  # stays in; stays out
        "UPDATE orders SET state = 'gone' WHERE id = 1",  # out
        "DELETE FROM orders WHERE id = 3",
        "UPDATE orders SET id = 4, state = NULL WHERE id = 2",  # out, and another key
    )
    details = told(each_database)
    assert [(it["op"], it["key"]["id"]) for it in details] == [
        ("insert", 1), ("insert", 2), ("update", 1), ("delete", 1), ("delete", 2),
    ]  # fmt: skip
    replica = Replica(details)
    assert replica.rows("orders") == [row for row in rows_of(each_database, "orders") if row["state"] == "paid"]


@pytest.mark.pg(">= 15")
def test_a_filter_of_the_key_alone_with_toast(each_database: Database) -> None:
    prepared(
        each_database,
        "CREATE TABLE orders (id int PRIMARY KEY, note text); ALTER TABLE orders ALTER note SET STORAGE EXTERNAL",
        "FOR TABLE orders WHERE (id < 10)",
    )
    run(
        each_database,
        "INSERT INTO orders VALUES (1, repeat('x', 9000)), (11, repeat('y', 9000))",
        "UPDATE orders SET id = 2 WHERE id = 1",
        "UPDATE orders SET id = 12 WHERE id = 2",
    )
    details = told(each_database)
    assert [(it["op"], it["key"]["id"], it["unchanged"]) for it in details] == [
        ("insert", 1, []), ("update", 2, ["note"]), ("delete", 2, []),
    ]  # fmt: skip
    assert Replica(details).rows("orders") == []


@pytest.mark.pg(">= 15")
def test_a_row_that_comes_into_a_filter_without_its_toast(each_database: Database) -> None:
    """The server makes an insert of the update, and the value was not in the WAL: it is named, not null."""
    prepared(
        each_database,
        "CREATE TABLE orders (id int PRIMARY KEY, note text); ALTER TABLE orders ALTER note SET STORAGE EXTERNAL",
        "FOR TABLE orders WHERE (id < 10)",
    )
    run(each_database, "INSERT INTO orders VALUES (11, repeat('y', 9000))", "UPDATE orders SET id = 3")
    (inserted,) = told(each_database)
    assert (inserted["op"], inserted["after"], inserted["unchanged"]) == ("insert", {"id": 3}, ["note"])


@pytest.mark.pg(">= 15")
def test_columns_of_a_list(each_database: Database) -> None:
    prepared(
        each_database,
        "CREATE TABLE orders (secret text, id int PRIMARY KEY, note text, state text)",
        "FOR TABLE orders (state, id)",
    )
    run(
        each_database,
        "INSERT INTO orders VALUES ('s', 1, 'n', 'open'), ('s', 2, 'n', NULL)",
        "UPDATE orders SET secret = 't'",  # nothing of the list changes, and yet it is an event
        "UPDATE orders SET id = 3, state = 'paid' WHERE id = 1",
        "ALTER TABLE orders DROP secret, ADD late text",
        "UPDATE orders SET late = 'l', note = 'm'",
        "DELETE FROM orders WHERE id = 2",
    )
    details = told(each_database)
    assert {tuple(it["after"]) for it in details if it["after"]} == {("id", "state")}
    wanted = [{"id": row["id"], "state": row["state"]} for row in rows_of(each_database, "orders")]
    assert Replica(details).rows("orders") == wanted
    assert b"secret" not in str(details).encode()


@pytest.mark.pg(">= 15")
def test_a_list_or_a_filter_that_changes_while_the_stream_runs(each_database: Database) -> None:
    prepared(each_database, "CREATE TABLE orders (id int PRIMARY KEY, a text, b text)", "FOR TABLE orders (id, a)")
    run(
        each_database,
        "INSERT INTO orders VALUES (1, 'a', 'b')",
        "ALTER PUBLICATION pub SET TABLE orders (id, b)",
        "INSERT INTO orders VALUES (2, 'a', 'b')",
        "ALTER PUBLICATION pub SET TABLE orders WHERE (id > 3)",
        "INSERT INTO orders VALUES (3, 'a', 'b'), (4, 'a', 'b')",
    )
    assert [it["after"] for it in told(each_database)] == [
        {"id": 1, "a": "a"}, {"id": 2, "b": "b"}, {"id": 4, "a": "a", "b": "b"},
    ]  # fmt: skip


@pytest.mark.pg(">= 15")
def test_two_lists_of_one_table_stop_the_bridge(database: Database) -> None:
    """PostgreSQL refuses to guess, and so do we: a publication is to be mended, nothing is skipped."""
    prepared(database, "CREATE TABLE orders (id int PRIMARY KEY, a text, b text)", "FOR TABLE orders (id, a)")
    database.execute("CREATE PUBLICATION other FOR TABLE orders (id, b)")
    database.execute("INSERT INTO orders VALUES (1, 'a', 'b')")
    with Forward(database, "pub", "other") as forward:
        failure = forward.ended()
    assert isinstance(failure, SourceError)
    assert "different column lists" in str(failure)


@pytest.mark.pg(">= 15")
def test_all_tables_of_a_schema(each_database: Database) -> None:
    prepared(
        each_database,
        "CREATE SCHEMA shop; CREATE TABLE shop.a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY)",
        "FOR TABLES IN SCHEMA shop",
    )
    run(
        each_database,
        "INSERT INTO shop.a VALUES (1); INSERT INTO b VALUES (1)",
        "CREATE TABLE shop.later (id int PRIMARY KEY); INSERT INTO shop.later VALUES (1)",
        "ALTER TABLE b SET SCHEMA shop; INSERT INTO shop.b VALUES (2)",
        "ALTER TABLE shop.a SET SCHEMA public; INSERT INTO a VALUES (2)",
    )
    assert [(it["schema"], it["table"], it["key"]["id"]) for it in told(each_database)] == [
        ("shop", "a", 1), ("shop", "later", 1), ("shop", "b", 2),
    ]  # fmt: skip


@pytest.mark.parametrize("operations", ["insert", "update", "delete", "truncate"])
def test_operations_of_a_publication(each_database: Database, operations: str) -> None:
    prepared(
        each_database,
        "CREATE TABLE orders (id int PRIMARY KEY, n int)",
        f"FOR TABLE orders WITH (publish = '{operations}')",
    )
    run(each_database, "INSERT INTO orders VALUES (1, 1)", "UPDATE orders SET n = 2", "DELETE FROM orders")
    run(each_database, "TRUNCATE orders")
    assert [(it["op"], it["position"]["ordinal"]) for it in told(each_database)] == [(operations, 0)]


GENERATED = "CREATE TABLE sums (a int PRIMARY KEY, twice int GENERATED ALWAYS AS (a * 2) STORED, b int)"


@pytest.mark.parametrize("identity", ["DEFAULT", "FULL"])
def test_generated_columns_are_absent(each_database: Database, identity: str) -> None:
    if identity == "FULL" and each_database.version >= 18:
        pytest.skip("18 refuses the application's UPDATE then, which the preflight finds")
    prepared(each_database, f"{GENERATED}; ALTER TABLE sums REPLICA IDENTITY {identity}", "FOR TABLE sums")
    run(each_database, "INSERT INTO sums (a, b) VALUES (1, 1)", "UPDATE sums SET a = 2", "UPDATE sums SET b = 2")
    run(each_database, "DELETE FROM sums")
    details = told(each_database)
    assert [it["after"] for it in details] == [{"a": 1, "b": 1}, {"a": 2, "b": 1}, {"a": 2, "b": 2}, None]
    assert not any("twice" in (it["before"] or {}) for it in details)
    assert Replica(details).rows("sums") == []


@pytest.mark.pg(">= 18")
def test_stored_generated_columns_are_published_where_the_publication_says_so(database: Database) -> None:
    prepared(
        database,
        f"{GENERATED}; ALTER TABLE sums ADD thrice int GENERATED ALWAYS AS (a * 3) VIRTUAL",
        "FOR TABLE sums WITH (publish_generated_columns = stored)",
    )
    run(
        database, "INSERT INTO sums (a, b) VALUES (1, 1), (2, 2)", "UPDATE sums SET a = a + 10", "UPDATE sums SET b = 3"
    )
    details = told(database)
    assert list(details[0]["after"]) == ["a", "twice", "b"]
    wanted = [{name: row[name] for name in ("a", "twice", "b")} for row in rows_of(database, "sums")]
    assert Replica(details).rows("sums") == wanted


@pytest.mark.pg(">= 18")
def test_a_generated_column_may_be_part_of_the_identity_when_it_is_published(database: Database) -> None:
    prepared(
        database,
        f"{GENERATED}; ALTER TABLE sums REPLICA IDENTITY FULL",
        "FOR TABLE sums WITH (publish_generated_columns = stored)",
    )
    run(database, "INSERT INTO sums (a, b) VALUES (1, 1)", "UPDATE sums SET a = 5")
    details = told(database)
    assert details[1]["before"] == {"a": 1, "twice": 2, "b": 1}
    assert_replays(database, details, "sums")
