"""What a snapshot says of a table beside what the server's own view says that its publication publishes."""

from collections import defaultdict
from typing import Any

import pytest
from psycopg import sql

from figbridge.errors import BridgeError
from figbridge.forward.snapshot import plan
from fixtures.postgres import Database

DDL = """
CREATE SCHEMA a; CREATE SCHEMA b;
CREATE TABLE a.plain (id int PRIMARY KEY, gone int, secret text, twice int GENERATED ALWAYS AS (id * 2) STORED);
ALTER TABLE a.plain DROP gone;
CREATE TABLE a.bare (); ALTER TABLE a.bare REPLICA IDENTITY FULL;
CREATE UNLOGGED TABLE a.cheap (id int PRIMARY KEY);
CREATE TABLE a.root (id int, part int, PRIMARY KEY (id, part)) PARTITION BY LIST (part);
CREATE TABLE a.leaf PARTITION OF a.root FOR VALUES IN (1);
CREATE TABLE b.middle PARTITION OF a.root FOR VALUES IN (2, 3) PARTITION BY LIST (part);
CREATE TABLE b.bottom PARTITION OF b.middle FOR VALUES IN (2);
CREATE TABLE b.parent (id int PRIMARY KEY); CREATE TABLE b.child () INHERITS (b.parent);
CREATE VIEW a.seen AS SELECT * FROM a.plain;
"""
OF_ROOT = ["TABLE a.root", "TABLE b.middle", "TABLE b.bottom", "TABLE a.leaf, a.plain"]
PUBLICATIONS = {
    14: ["TABLE a.plain", "TABLE a.bare", "TABLE b.parent", "TABLE ONLY b.parent", *OF_ROOT, "ALL TABLES"],
    15: [
        "TABLE a.plain (id, secret)",
        "TABLE a.plain WHERE (id > 3 AND secret <> 'it''s'), b.parent (id) WHERE (id < 5)",
        "TABLES IN SCHEMA a",
        "TABLES IN SCHEMA b",
        "TABLES IN SCHEMA a, b",
        "TABLES IN SCHEMA a, TABLE a.plain WHERE (id > 3), b.parent WHERE (id > 3), b.bottom",
        "TABLES IN SCHEMA b, TABLE a.root",
        "TABLES IN SCHEMA a, TABLE b.middle",
    ],
    18: ["TABLE a.plain (id, twice)"],
}
ONLY_ROOT = ["TABLE a.root WHERE (id > 3)", "TABLE b.middle (id, part) WHERE (part = 2)"]  # from 15 on


def definitions(version: int) -> list[str]:
    found = [it for since, them in PUBLICATIONS.items() if since <= version for it in them]
    options = ["false", "true"]
    if version >= 18:
        options += ["false, publish_generated_columns = stored", "true, publish_generated_columns = none"]
    made = [f"FOR {it} WITH (publish_via_partition_root = {option})" for it in found for option in options]
    return made + [f"FOR {it} WITH (publish_via_partition_root = true)" for it in ONLY_ROOT if version >= 15]


def test_it_is_what_the_server_says(each_database: Database) -> None:
    """Which tables, under which names, which of their columns, and with which row filter."""
    each_database.execute(DDL)
    made = {f"p{number}": definition for number, definition in enumerate(definitions(each_database.version))}
    for publication, definition in made.items():
        each_database.execute(f"CREATE PUBLICATION {publication} {definition}")
    expected, found = _told(each_database), _planned(each_database, list(made))
    assert expected.keys() == made.keys()
    for publication, tables in expected.items():
        assert found[publication] == tables, f"a publication {made[publication]}"


def _told(database: Database) -> dict[str, Any]:
    """Publication → table → columns, filter."""
    generated = "" if database.version >= 18 else "AND a.attgenerated = ''"
    rows = database.execute(
        f"""
        SELECT t.pubname, t.schemaname || '.' || t.tablename, to_jsonb(t) ->> 'rowfilter',
               ARRAY(SELECT a.attname::text FROM pg_attribute a
                     WHERE a.attrelid = format('%I.%I', t.schemaname, t.tablename)::regclass AND a.attnum > 0
                       AND NOT a.attisdropped {generated}
                       AND coalesce(to_jsonb(t) -> 'attnames' ? a.attname, a.attgenerated = '') ORDER BY a.attnum)
        FROM pg_publication_tables t WHERE t.schemaname IN ('a', 'b')
        """
    )
    found = defaultdict[str, Any](dict)
    for publication, table, filter_, columns in rows:
        found[publication][table] = columns, filter_
    return found


def _planned(database: Database, publications: list[str]) -> dict[str, Any]:
    query = "SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
    tables = database.execute(f"{query} WHERE n.nspname IN ('a', 'b')")
    found = defaultdict[str, Any](dict)
    with database.connect() as connection:
        for publication in publications:
            for name in tables:
                try:
                    it = plan.describe(connection, name, publication)
                except BridgeError as error:
                    assert "does not publish" in str(error)  # noqa: PT017 (which tables raise it is what is compared)
                    continue
                if it is not None:
                    columns = [column.name for column in it.relation.columns]
                    found[publication][".".join(name)] = columns, it.filter
    return found


@pytest.mark.parametrize("name", [("a", "nothing"), ("a", "seen"), ("nowhere", "plain")])
def test_what_is_no_table(database: Database, name: tuple[str, str]) -> None:
    database.execute(f"{DDL} CREATE PUBLICATION pub FOR ALL TABLES")
    with database.connect() as connection:
        assert plan.describe(connection, name, "pub") is None


def test_a_partition_beside_a_parent_of_it_changes_under_the_name_of_the_parent(each_database: Database) -> None:
    """The view lists both until 15."""
    each_database.execute(f"{DDL} CREATE PUBLICATION pub FOR TABLE a.root, b.bottom WITH (publish_via_partition_root)")
    with each_database.connect() as connection:
        assert plan.describe(connection, ("a", "root"), "pub")
        with pytest.raises(BridgeError, match=r"does not publish b\.bottom under this name"):
            plan.describe(connection, ("b", "bottom"), "pub")


@pytest.mark.parametrize("partitioned", ["", "PARTITION BY LIST (b)"], ids=["plain", "partitioned"])
def test_rows_are_looked_up_by_their_key_and_no_others_with_them(each_database: Database, partitioned: str) -> None:
    """As a chunk looks for them, which may not scan a table from its beginning to its end. The key has two columns."""
    each_database.execute(f'CREATE TABLE t (a text COLLATE "C", b int, PRIMARY KEY (a, b)) {partitioned}')
    if partitioned:
        each_database.execute(
            "CREATE TABLE t_0 PARTITION OF t FOR VALUES IN (0); CREATE TABLE t_1 PARTITION OF t DEFAULT"
        )
    each_database.execute("INSERT INTO t SELECT 'k' || n, n % 2 FROM generate_series(1, 20000) AS n; ANALYZE t")
    each_database.execute("CREATE PUBLICATION pub FOR TABLE t WITH (publish_via_partition_root = true)")
    with each_database.connect() as connection:
        found = plan.describe(connection, ("public", "t"), "pub")
        assert found is not None
        statement = plan.rows_chunk(found, sql.SQL("*"), [(f"k{n}", str(n % 2)) for n in range(1, 501)], None)
        connection.execute("SET enable_seqscan = off; SET enable_bitmapscan = off")
        assert len(connection.execute(statement).fetchall()) == 500
        lines = [line for (line,) in connection.execute(sql.SQL("EXPLAIN ") + statement).fetchall()]
    assert any("Index Cond: ((a = " in line for line in lines), lines
    assert not any("Filter" in line for line in lines), lines
