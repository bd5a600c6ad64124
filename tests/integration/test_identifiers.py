"""Names that nobody should give a table, and that a legacy database has: each is a name, never syntax.

The names go through SQL, the RELATION message, compiled code, JSON, templates and an ordering key. The oracle is
PostgreSQL, which is asked for the rows under the same name.
"""

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql

from figbridge.forward.versions import History
from figbridge.transports.file import FileSink
from fixtures.forward import Forward
from fixtures.postgres import Database
from fixtures.replay import FENCE, Replica, rows_of, settled

LONG = "a" * 63  # NAMEDATALEN - 1
LONG_MULTIBYTE = "é" * 31 + "x"  # 63 bytes
ODD = [
    'quo"te', "apo'strophe", "per%cent", "%s", "%(id)b", "{table}", "{0}", "{", "}}", "new\nline", "\r\n", "tab\t",
    "\x01\x1f\x7f", "back\\slash", "\\u0041", "a.b", " ", " lead", "select", "SELECT", "null", "id'", "ünï", "表",
    "\U0001f600", "\u202eabc", "\ufeff", "\u2028", "e\u0301", "é", "C:\\path", "$1", ";--", "/*", "__proto__", "0",
    LONG, LONG_MULTIBYTE,
]  # fmt: skip


def create(database: Database, schema: str, table: str, columns: list[str]) -> sql.Composed:
    """A table in a publication of its own; its name in SQL."""
    name = sql.SQL("{}.{}").format(sql.Identifier(schema), sql.Identifier(table))
    first, *others = [sql.Identifier(column) for column in columns]
    definitions = [sql.SQL("{} int PRIMARY KEY").format(first), *(sql.SQL("{} text").format(it) for it in others)]
    with database.connect() as connection:
        connection.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(sql.Identifier(schema)))
        connection.execute(sql.SQL("CREATE TABLE {} ({})").format(name, sql.SQL(", ").join(definitions)))
    return name


def work(database: Database, table: sql.Composed, key: str, other: str) -> None:
    names = {"table": table, "key": sql.Identifier(key), "other": sql.Identifier(other)}
    with database.connect() as connection:
        for statement in (
            "INSERT INTO {table} ({key}, {other}) VALUES (1, 'a'), (2, 'b'), (3, 'c')",
            "UPDATE {table} SET {other} = 'd' WHERE {key} = 1",
            "UPDATE {table} SET {key} = 12 WHERE {key} = 2",
            "DELETE FROM {table} WHERE {key} = 3",
        ):
            connection.execute(sql.SQL(statement).format(**names))


def spelt(database: Database, table: sql.Composed) -> str:
    with database.connect() as connection:
        return table.as_string(connection)


def test_odd_names_of_schemas_tables_and_columns(each_database: Database) -> None:
    """All of them together: a name that is taken for another one shows as a row in the wrong table."""
    tables = {
        (schema, name): create(each_database, schema, name, [name, *(it for it in ODD if it != name)])
        for schema, name in [*(("public", name) for name in ODD), *((name, "t") for name in ODD)]
    }
    each_database.execute("CREATE PUBLICATION pub FOR ALL TABLES")
    each_database.create_slot()
    for (schema, name), table in tables.items():
        work(each_database, table, name, ODD[0] if name != ODD[0] else ODD[1])
        assert schema
    with Forward(each_database, messages=[FENCE]) as forward:
        details = settled(forward)
        events = forward.sink.events
    assert len(details) == 6 * len(tables)
    replica = Replica(details)
    for (schema, name), table in tables.items():
        assert replica.rows(name, schema) == rows_of(each_database, spelt(each_database, table)), name
    assert not [event for event in events if b"\n" in event.detail]
    assert not [event for event in events if b"\n" in event.envelope() or b"\r" in event.envelope()]
    said = {(event.source, event.detail_type) for event in events if ".emitted" not in event.detail_type}
    assert {kind for _, kind in said} >= {f"{name}.inserted" for name in ODD}


def test_names_that_differ_in_case_or_form_alone_are_different(each_database: Database) -> None:
    same_to_a_careless_eye = ["order", "Order", "ORDER", "oRDER", "öde", "o\u0308de", "order "]
    for name in same_to_a_careless_eye:
        create(each_database, "public", name, ["id", "Id", "ID", "\u0131d"])
    each_database.execute("CREATE PUBLICATION pub FOR ALL TABLES")
    each_database.create_slot()
    with each_database.connect() as connection:
        for number, name in enumerate(same_to_a_careless_eye):
            insert = sql.SQL("INSERT INTO {} VALUES (%s, 'b', 'c', 'd')").format(sql.Identifier(name))
            connection.execute(insert, [number])
    with Forward(each_database, messages=[FENCE]) as forward:
        details = settled(forward)
        keys = {event.key for event in forward.sink.events if ".emitted" not in event.detail_type}
    assert [it["table"] for it in details] == same_to_a_careless_eye
    assert [it["after"] for it in details] == [{"id": n, "Id": "b", "ID": "c", "\u0131d": "d"} for n in range(7)]
    assert len(keys) == 7


def test_odd_names_of_publications(each_database: Database) -> None:
    """They are in a list, in a string of a grammar that is not SQL's."""
    each_database.execute("CREATE TABLE thing (id int PRIMARY KEY)")
    with each_database.connect() as connection:
        for name in ODD:
            connection.execute(sql.SQL("CREATE PUBLICATION {} FOR TABLE thing").format(sql.Identifier(name)))
    each_database.create_slot()
    each_database.execute("INSERT INTO thing VALUES (1)")
    with Forward(each_database, *ODD, messages=[FENCE]) as forward:
        assert [it["key"] for it in settled(forward)] == [{"id": 1}]


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20).filter(
    lambda name: len(name.encode()) <= 63 and not name.startswith("pg_")
)
# what breaks templates, JSON and code more often than chance does
SPITEFUL = st.text("%{}()sbd\"'\\\n\r\t,:;#\x00".replace("\x00", "\x0b"), min_size=1, max_size=20)


def test_any_name_survives(database: Database, tmp_path_factory: pytest.TempPathFactory) -> None:
    database.execute("CREATE PUBLICATION pub FOR ALL TABLES")
    database.create_slot()
    path = tmp_path_factory.mktemp("names") / "events.jsonl"
    sink = FileSink(path)
    with Forward(database, messages=[FENCE], history=History()) as forward:
        forward.until_streaming()

        @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
        @given(NAMES | SPITEFUL, NAMES | SPITEFUL, st.lists(NAMES | SPITEFUL, min_size=2, max_size=4, unique=True))
        def check(schema: str, name: str, columns: list[str]) -> None:
            seen = len(forward.sink.events)
            table = create(database, schema, name, columns)
            work(database, table, columns[0], columns[1])
            settled(forward)
            events = forward.sink.events[seen:-1]
            details = [orjson.loads(event.detail) for event in events]
            wanted = rows_of(database, spelt(database, table))
            assert Replica(details).rows(name, schema) == wanted
            sink.publish(events)
            lines = path.read_bytes().splitlines()[-len(events) :]
            assert [orjson.loads(line)["detail"] for line in lines] == details
            with database.connect() as connection:
                connection.execute(sql.SQL("DROP TABLE {}").format(table))

        check()
    sink.close()
