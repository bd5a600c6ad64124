"""Partitioned tables: under whose name a row leaves, in which shape, and what a consumer has to know.

With ``publish_via_partition_root`` all is told of the table above, without it of the partitions.
https://www.postgresql.org/docs/current/sql-createpublication.html
"""

import pytest

from figbridge.errors import SinkRefused
from fixtures.checked import Found, config_of, inspected
from fixtures.forward import Forward
from fixtures.postgres import Database
from fixtures.replay import FENCE, Replica, assert_replays, rows_of, settled, told

MEASURES = """
CREATE TABLE measure (id int, region text, n numeric, note text, PRIMARY KEY (id, region)) PARTITION BY LIST (region);
CREATE TABLE north PARTITION OF measure FOR VALUES IN ('n');
-- another order of columns, a column that was dropped, and two levels
CREATE TABLE south (junk int, note text, n numeric, region text NOT NULL, id int NOT NULL) PARTITION BY RANGE (id);
ALTER TABLE south DROP junk, ADD PRIMARY KEY (id, region);
CREATE TABLE south_low (gone text, id int NOT NULL, also text, region text NOT NULL, note text, n numeric,
    PRIMARY KEY (id, region));
ALTER TABLE south_low DROP gone, DROP also;
ALTER TABLE south ATTACH PARTITION south_low FOR VALUES FROM (0) TO (100);
ALTER TABLE measure ATTACH PARTITION south FOR VALUES IN ('s');
ALTER TABLE south_low ALTER note SET STORAGE EXTERNAL; ALTER TABLE north ALTER note SET STORAGE EXTERNAL;
"""
WORKLOAD = [
    "INSERT INTO measure VALUES (1, 'n', 1.50, 'a'), (2, 's', NULL, repeat('x', 9000)), (3, 's', 3, NULL)",
    "INSERT INTO south_low (id, region, n) VALUES (4, 's', 4)",
    "UPDATE measure SET n = n + 1",
    "UPDATE measure SET id = id + 10 WHERE id = 2",
    "UPDATE measure SET region = 'n' WHERE id = 12",  # from one partition to another
    "UPDATE measure SET region = 's', n = 0 WHERE id = 1",
    "DELETE FROM measure WHERE id = 3",
]
LEAVES = ("north", "south_low")


def prepared(database: Database, publication: str, ddl: str = MEASURES) -> None:
    database.execute(ddl)
    database.execute(f"CREATE PUBLICATION pub FOR TABLE {publication}")
    database.create_slot()


def run(database: Database, *statements: str) -> None:
    for statement in statements:
        database.execute(statement)


@pytest.mark.parametrize("identity", ["DEFAULT", "FULL"])
@pytest.mark.parametrize("by_root", [True, False])
def test_rows_of_partitions(each_database: Database, identity: str, *, by_root: bool) -> None:
    prepared(each_database, f"measure WITH (publish_via_partition_root = {by_root})")
    for table in ("measure", "south", *LEAVES):
        each_database.execute(f"ALTER TABLE {table} REPLICA IDENTITY {identity}")
    run(each_database, *WORKLOAD)
    details = told(each_database)
    if by_root:
        assert {it["table"] for it in details} == {"measure"}
        assert all(
            list(it["after"]) == ["id", "region", "n", "note"][: len(it["after"])] for it in details if it["after"]
        )
        assert_replays(each_database, details, "measure")
    else:
        assert {it["table"] for it in details} == set(LEAVES)
        assert {tuple(it["key"]) for it in details} == {("id", "region")}
        assert_replays(each_database, details, *LEAVES)
    moved = [(it["op"], it["key"]["id"], it["key"]["region"]) for it in details if it["key"]["id"] in (1, 12)]
    assert moved[-4:] == [("delete", 12, "s"), ("insert", 12, "n"), ("delete", 1, "n"), ("insert", 1, "s")]


def test_a_row_that_moves_is_whole_though_its_toast_was_not_touched(each_database: Database) -> None:
    prepared(each_database, "measure WITH (publish_via_partition_root = true)")
    run(each_database, "INSERT INTO measure VALUES (2, 's', 2, repeat('x', 9000))")
    run(each_database, "UPDATE measure SET region = 'n'")
    _, deleted, inserted = details = told(each_database)
    assert (deleted["op"], inserted["op"], inserted["unchanged"]) == ("delete", "insert", [])
    assert len(inserted["after"]["note"]) == 9000
    assert_replays(each_database, details, "measure")


MEMBERS = """
CREATE TABLE member (id int, r text, code text NOT NULL, n text, PRIMARY KEY (id, r)) PARTITION BY LIST (r);
CREATE UNIQUE INDEX member_code ON member (code, r);
CREATE TABLE member_e PARTITION OF member FOR VALUES IN ('e');
CREATE UNIQUE INDEX member_e_code ON member_e (code, r);
"""
UNLIKE = {
    ("FULL", "DEFAULT"): "its old rows would say NULL of all but the key",
    ("DEFAULT", "USING INDEX member_e_code"): "its old keys would say NULL of id",
    ("USING INDEX member_code", "DEFAULT"): "its old keys would say NULL of code",
}


MOVES = [
    "INSERT INTO member VALUES (1, 'e', 'c', 'n')",
    "UPDATE member SET id = 2; UPDATE member SET code = 'd'",
    "DELETE FROM member",
]


def members(database: Database, above: str, below: str) -> Found:
    prepared(database, "member WITH (publish_via_partition_root = true)", MEMBERS)
    database.execute(f"ALTER TABLE member REPLICA IDENTITY {above}; ALTER TABLE member_e REPLICA IDENTITY {below}")
    return inspected(config_of(database.dsn, "public.member", slot=database.slot))


@pytest.mark.parametrize("below", ["FULL", "DEFAULT"])
def test_a_partition_with_an_identity_that_has_the_key_of_its_table(each_database: Database, below: str) -> None:
    assert "table public.member" not in members(each_database, "DEFAULT", below).errors
    run(each_database, *MOVES)
    assert_replays(each_database, told(each_database), "member")


@pytest.mark.parametrize(("above", "below"), UNLIKE)
def test_a_partition_with_another_identity_than_its_table(each_database: Database, above: str, below: str) -> None:
    """The server describes the old key of one as that of the other. The preflight does not let it pass."""
    said = members(each_database, above, below).only("error", "table public.member").what
    assert UNLIKE[above, below] in said
    run(each_database, *MOVES)
    if above == "FULL":  # nothing in the stream tells it from a row of NULLs
        *_, deleted = told(each_database)
        assert deleted["before"] == {"id": 2, "r": "e", "code": None, "n": None}
    else:  # such a partition may be attached when nobody looks: an event with half a key is never published
        with Forward(each_database) as forward:
            failure = forward.ended()
        assert isinstance(failure, SinkRefused)
        assert "KeyNotSent" in str(failure)
        assert "REPLICA IDENTITY" in str(failure)
        assert all(None not in it["key"].values() for it in forward.sink.details)


# PostgreSQL 14 goes on as before with a table that it has met, until the publication itself is altered.
REMEDY = "ALTER PUBLICATION pub SET (publish = 'insert, update, delete, truncate');"
EAST = [
    "CREATE TABLE east (note text, region text NOT NULL, id int NOT NULL, n numeric, PRIMARY KEY (id, region))",
    "INSERT INTO east VALUES (NULL, 'e', 20, 0)",
]


@pytest.mark.parametrize("by_root", [True, False])
def test_a_partition_comes_and_goes_while_the_stream_runs(each_database: Database, *, by_root: bool) -> None:
    """From ATTACH to DETACH its rows are told. Those that it brings or takes away are not: no row was written."""
    prepared(each_database, f"measure WITH (publish_via_partition_root = {by_root})")
    remedy = REMEDY if each_database.version < 15 else ""
    with Forward(each_database, messages=[FENCE]) as forward:
        run(
            each_database,
            "INSERT INTO measure VALUES (1, 'n', 1)",
            *EAST,
            f"BEGIN; ALTER TABLE measure ATTACH PARTITION east FOR VALUES IN ('e'); {remedy} COMMIT",
            "INSERT INTO measure VALUES (21, 'e', 2.0), (22, 'n', 3)",
            "INSERT INTO east VALUES ('direct', 'e', 23, 4)",
        )
        attached = settled(forward)
        run(
            each_database,
            "BEGIN; UPDATE measure SET n = 9 WHERE id = 21; ALTER TABLE measure DETACH PARTITION east; "
            f"{remedy} UPDATE east SET n = 10 WHERE id = 21; COMMIT",
            "INSERT INTO east VALUES ('free', 'e', 24, 5)",
            "INSERT INTO measure VALUES (25, 'n', 6)",
        )
        details = settled(forward)
    north, east = ("measure", "measure") if by_root else ("north", "east")
    assert [(it["op"], it["table"], it["key"]["id"]) for it in details] == [
        ("insert", north, 1), ("insert", east, 21), ("insert", north, 22), ("insert", east, 23),
        ("update", east, 21), ("insert", north, 25),
    ]  # fmt: skip
    assert attached[-1]["after"] == {"id": 23, "region": "e", "n": 4, "note": "direct"}


@pytest.mark.pg("< 15")
def test_an_attached_table_that_14_has_met_is_what_the_preflight_warns_of(database: Database) -> None:
    prepared(database, "measure")
    found = inspected(config_of(database.dsn, "public.measure", slot=database.slot))
    assert "ATTACH PARTITION" in found.only("warning", "table public.measure").what
    assert "SET (publish" in found.only("warning", "table public.measure").remedy
    run(database, *EAST, "ALTER TABLE measure ATTACH PARTITION east FOR VALUES IN ('e')")
    run(database, "INSERT INTO measure VALUES (21, 'e', 2)")
    assert told(database) == []  # the server's fault; where it is mended this test fails, and the warning can go


@pytest.mark.parametrize("by_root", [True, False])
def test_a_truncate_of_partitions(each_database: Database, *, by_root: bool) -> None:
    """By root, a TRUNCATE of a partition itself is told by no one: PostgreSQL leaves it out, as its manual says."""
    prepared(each_database, f"measure WITH (publish_via_partition_root = {by_root})")
    run(each_database, *WORKLOAD, "TRUNCATE north")
    partition = [(it["op"], it["table"]) for it in told(each_database)][len(WORKLOAD) :]
    assert [it for it in partition if it[0] == "truncate"] == ([] if by_root else [("truncate", "north")])
    run(each_database, "TRUNCATE measure")
    assert {it["table"] for it in told(each_database)} == ({"measure"} if by_root else set(LEAVES))
    assert rows_of(each_database, "measure") == []


def test_a_partition_published_alone(each_database: Database) -> None:
    """What moves out of it is deleted, what moves in inserted: it is a table like any other."""
    prepared(each_database, "south_low")
    run(each_database, *WORKLOAD)
    assert_replays(each_database, told(each_database), "south_low")


def test_a_partition_and_its_root_in_two_publications_leave_once(each_database: Database) -> None:
    prepared(each_database, "measure WITH (publish_via_partition_root = true)")
    each_database.execute("CREATE PUBLICATION leaf FOR TABLE north")
    each_database.execute(f"SELECT pg_drop_replication_slot('{each_database.slot}')")
    each_database.create_slot()
    run(each_database, *WORKLOAD)
    assert_replays(each_database, told(each_database, "pub", "leaf"), "measure")


def test_inherited_tables_leave_each_under_its_own_name(each_database: Database) -> None:
    prepared(
        each_database,
        "base, derived",
        "CREATE TABLE base (id int PRIMARY KEY, a text); "
        "CREATE TABLE derived (b text, PRIMARY KEY (id)) INHERITS (base)",
    )
    run(
        each_database,
        "INSERT INTO base VALUES (1, 'a'); INSERT INTO derived VALUES (2, 'a', 'b')",
        "UPDATE base SET a = 'c'",
        "DELETE FROM base WHERE id = 1",
    )
    replica = Replica(told(each_database))
    assert replica.rows("base") == rows_of(each_database, "ONLY base")
    assert replica.rows("derived") == rows_of(each_database, "derived")


@pytest.mark.parametrize("by_root", [True, False])
def test_a_column_added_above_in_the_middle_of_a_transaction(each_database: Database, *, by_root: bool) -> None:
    prepared(each_database, f"measure WITH (publish_via_partition_root = {by_root})")
    with Forward(each_database, messages=[FENCE]) as forward:
        run(
            each_database,
            *WORKLOAD,
            "BEGIN; INSERT INTO measure VALUES (50, 's', 1, 'old'); ALTER TABLE measure ADD more jsonb DEFAULT '[1]'; "
            "INSERT INTO measure VALUES (51, 's', 1, 'new', '{}'); UPDATE measure SET more = '2' WHERE id = 50; "
            "ALTER TABLE measure RENAME note TO text; COMMIT",
            "INSERT INTO measure VALUES (52, 'n', 1, 'b', NULL)",
        )
        last = settled(forward)[-4:]
    assert [it["after"] for it in last] == [
        {"id": 50, "region": "s", "n": 1, "note": "old"},
        {"id": 51, "region": "s", "n": 1, "note": "new", "more": {}},
        {"id": 50, "region": "s", "n": 1, "note": "old", "more": 2},
        {"id": 52, "region": "n", "n": 1, "text": "b", "more": None},
    ]
