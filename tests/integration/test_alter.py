"""DDL between rows, in one transaction and in several: each row is read in the shape in which it was written."""

import contextlib

import psycopg
import pytest

from figbridge.forward.versions import History
from fixtures.forward import Forward
from fixtures.postgres import Database
from fixtures.replay import FENCE, Detail, assert_replays, prepared, settled, told


def afters(details: list[Detail]) -> list[Detail]:
    return [it["after"] for it in details]


def test_rows_before_and_after_each_alter_of_one_transaction(each_database: Database) -> None:
    prepared(each_database, "CREATE TABLE thing (id int PRIMARY KEY, a text, b text); INSERT INTO thing VALUES (0)")
    each_database.execute(f"SELECT pg_replication_slot_advance('{each_database.slot}', pg_current_wal_lsn())")
    with each_database.connect() as connection, connection.transaction():
        for number, ddl in enumerate(
            [
                "ADD c jsonb DEFAULT '{}'", "RENAME a TO aa", "DROP b", "ALTER aa TYPE int USING 7",
                "ADD b bool", "ALTER c TYPE text", "RENAME TO other", "RENAME TO thing",
            ]
        ):  # fmt: skip
            table = "other" if number == 7 else "thing"
            connection.execute(f"INSERT INTO {table} (id) VALUES (%s)", [number + 1])
            connection.execute(f"UPDATE {table} SET id = -id WHERE id = %s", [number + 1])
            connection.execute(f"ALTER TABLE {table} {ddl}")
        connection.execute("INSERT INTO thing VALUES (9, 8, '{}', true)")
    details = told(each_database)
    assert [it["position"]["ordinal"] for it in details] == list(range(17)), "a rewrite of the table is no change"
    assert {it["position"]["commit_lsn"] for it in details} == {details[0]["position"]["commit_lsn"]}
    assert afters(details)[::2] == [
        {"id": 1, "a": None, "b": None},
        {"id": 2, "a": None, "b": None, "c": {}},
        {"id": 3, "aa": None, "b": None, "c": {}},
        {"id": 4, "aa": None, "c": {}},
        {"id": 5, "aa": None, "c": {}},
        {"id": 6, "aa": None, "c": {}, "b": None},
        {"id": 7, "aa": None, "c": "{}", "b": None},
        {"id": 8, "aa": None, "c": "{}", "b": None},
        {"id": 9, "aa": 8, "c": "{}", "b": True},
    ]
    for inserted, moved in zip(details[:-1:2], details[1::2], strict=True):
        assert moved["after"] == inserted["after"] | {"id": -inserted["key"]["id"]}
        assert moved["schema_version"] == inserted["schema_version"]
    assert [it["table"] for it in details[14:]] == ["other", "other", "thing"]
    assert len({it["schema_version"] for it in details}) == 8, "its last shape is one that it had before it was renamed"


def test_an_alter_between_the_rows_of_another_table(each_database: Database) -> None:
    prepared(
        each_database, "CREATE TABLE one (id int PRIMARY KEY, a text)", "CREATE TABLE two (LIKE one INCLUDING ALL)"
    )
    with each_database.connect() as first, each_database.connect() as second:
        first.execute("BEGIN; INSERT INTO one VALUES (1, 'a')")
        second.execute("INSERT INTO two VALUES (1, 'a'); ALTER TABLE two DROP a; INSERT INTO two VALUES (2)")
        first.execute("INSERT INTO one VALUES (2, 'b'); INSERT INTO two VALUES (3)")
        first.execute(
            "ALTER TABLE two ADD z int DEFAULT 5; INSERT INTO one VALUES (3, 'c'); INSERT INTO two VALUES (4)"
        )
        first.execute("COMMIT")
    details = told(each_database)
    said = [(it["table"], *it["after"].values()) for it in details]
    assert said == [
        ("two", 1, "a"), ("two", 2), ("one", 1, "a"), ("one", 2, "b"), ("two", 3), ("one", 3, "c"), ("two", 4, 5),
    ]  # fmt: skip
    assert_replays(each_database, details, "one")


def test_an_alter_that_is_rolled_back_was_never_there(each_database: Database) -> None:
    prepared(each_database, "CREATE TABLE thing (id int PRIMARY KEY, a text)")
    with each_database.connect() as connection, connection.transaction():
        connection.execute("INSERT INTO thing VALUES (1, 'a')")
        for ddl in (
            "ADD c int DEFAULT 3",
            "DROP a",
            "RENAME a TO b",
            "ALTER a TYPE int USING 1",
            "DROP CONSTRAINT thing_pkey",
        ):
            with contextlib.suppress(psycopg.Rollback), connection.transaction():
                connection.execute(f"ALTER TABLE thing {ddl}")
                connection.execute("INSERT INTO thing VALUES (-1)")
                raise psycopg.Rollback
            connection.execute("INSERT INTO thing SELECT max(id) + 1, 'z' FROM thing")
    details = told(each_database)
    assert len({it["schema_version"] for it in details}) == 1
    assert [it["position"]["ordinal"] for it in details] == list(range(6))
    assert_replays(each_database, details, "thing")


def test_an_alter_while_transactions_that_wrote_before_are_open(each_database: Database) -> None:
    """ADD COLUMN waits for those that wrote the table, not for those that will."""
    prepared(each_database, "CREATE TABLE thing (id int PRIMARY KEY, a text); CREATE TABLE other (id int PRIMARY KEY)")
    with each_database.connect() as early, each_database.connect() as late:
        early.execute("BEGIN; INSERT INTO other VALUES (1)")
        late.execute("INSERT INTO thing VALUES (1, 'a')")
        late.execute("ALTER TABLE thing ADD b int DEFAULT 2; ALTER TABLE thing ALTER a TYPE jsonb USING to_jsonb(a)")
        late.execute("INSERT INTO thing VALUES (2, '[]', 3)")
        early.execute("INSERT INTO thing VALUES (3, '{}', 4)")
        early.execute("COMMIT")
    details = told(each_database)
    assert [it["after"] for it in details if it["table"] == "thing"] == [
        {"id": 1, "a": "a"}, {"id": 2, "a": [], "b": 3}, {"id": 3, "a": {}, "b": 4},
    ]  # fmt: skip


@pytest.mark.parametrize("after", ["FULL", "NOTHING", "USING INDEX thing_code_key"])
def test_another_identity_in_the_middle_of_a_transaction(each_database: Database, after: str) -> None:
    prepared(each_database, "CREATE TABLE thing (id int PRIMARY KEY, code text NOT NULL UNIQUE)")
    with each_database.connect() as connection, connection.transaction():
        connection.execute("INSERT INTO thing VALUES (1, 'a'), (2, 'b')")
        connection.execute("UPDATE thing SET id = 11 WHERE id = 1")
        connection.execute(f"ALTER TABLE thing REPLICA IDENTITY {after}")
        if after != "NOTHING":
            connection.execute("UPDATE thing SET id = 12, code = 'c' WHERE id = 2")
        connection.execute("INSERT INTO thing VALUES (3, 'd')")
    details = told(each_database)
    assert [it["key"] for it in details[:3]] == [{"id": 1}, {"id": 2}, {"id": 11}]
    keys, befores = [it["key"] for it in details[3:]], [it["before"] for it in details[3:]]
    if after == "FULL":
        assert (keys, befores) == ([{"id": 12}, {"id": 3}], [{"id": 2, "code": "b"}, None])
    elif after == "NOTHING":
        assert (keys, befores) == ([None], [None])
    else:
        assert (keys, befores) == ([{"code": "c"}, {"code": "d"}], [{"code": "b"}, None])


def test_a_primary_key_that_moves_to_other_columns(each_database: Database) -> None:
    prepared(each_database, "CREATE TABLE thing (id int PRIMARY KEY, code text NOT NULL)")
    with Forward(each_database, messages=[FENCE], history=History()) as forward:
        each_database.execute("INSERT INTO thing VALUES (1, 'a')")
        each_database.execute("ALTER TABLE thing DROP CONSTRAINT thing_pkey, ADD PRIMARY KEY (code)")
        each_database.execute("UPDATE thing SET code = 'b'")
        details = settled(forward)
    assert [(it["op"], it["key"], it.get("before")) for it in details] == [
        ("insert", {"id": 1}, None), ("schema.changed", None, None), ("update", {"code": "b"}, {"code": "a"}),
    ]  # fmt: skip


def test_a_table_that_is_dropped_and_made_again(each_database: Database) -> None:
    prepared(each_database, "CREATE TABLE thing (id int PRIMARY KEY, a text)")
    each_database.execute("INSERT INTO thing VALUES (1, 'a')")
    each_database.execute(
        "BEGIN; UPDATE thing SET a = 'b'; DROP TABLE thing; "
        "CREATE TABLE thing (a text, id int PRIMARY KEY); INSERT INTO thing VALUES ('c', 2); COMMIT"
    )
    each_database.execute("INSERT INTO thing VALUES ('d', 3)")
    details = told(each_database)
    # the DROP took the rows away without a word
    assert afters(details) == [{"id": 1, "a": "a"}, {"id": 1, "a": "b"}, {"a": "c", "id": 2}, {"a": "d", "id": 3}]


def test_what_rewrites_a_table_changes_no_row(each_database: Database) -> None:
    prepared(each_database, "CREATE TABLE thing (id int PRIMARY KEY, a text)")
    each_database.execute("INSERT INTO thing SELECT n, n::text FROM generate_series(1, 500) n")
    for ddl in (
        "ALTER TABLE thing ALTER id TYPE bigint", "ALTER TABLE thing ADD r float DEFAULT random()",
        "VACUUM FULL thing", "ALTER TABLE thing SET UNLOGGED", "ALTER TABLE thing SET LOGGED",
        "ALTER TABLE thing ALTER r TYPE text",
    ):  # fmt: skip
        each_database.execute(ddl)
    each_database.execute("UPDATE thing SET a = NULL WHERE id = 5")
    details = told(each_database)
    assert [it["op"] for it in details] == ["insert"] * 500 + ["update"]
    ((row,),) = each_database.execute("SELECT to_jsonb(it) FROM thing it WHERE id = 5")
    assert details[-1]["after"] == row
