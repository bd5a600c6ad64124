"""Debezium's envelope, read by a consumer that knows Debezium's documentation and nothing of figbridge.

https://debezium.io/documentation/reference/stable/connectors/postgresql.html#postgresql-events
"""

import base64
import json
from typing import Any

import orjson
import pytest

from figbridge.change import Lsn
from figbridge.event import Event
from figbridge.forward.source import ReplicationSource
from figbridge.forward.table import Naming
from figbridge.forward.versions import History
from fixtures.clock import until
from fixtures.forward import Forward, HeldSink
from fixtures.postgres import Database
from fixtures.replay import FENCE, prepared
from fixtures.snapshot import prepare

DEBEZIUM = Naming("db", "legacy.{database}", "{table}.{operation}", form="debezium")
Rows = dict[Any, dict[str, Any]]


class Consumer:
    """A copy of a table, kept as Debezium's documentation tells consumers to.

    A value may have a schema around it (``payload``). c, r and u bring the whole row, d takes it away, t all of them;
    what `unavailable` stands for is as it was. Of one row what is not newer by ``source.lsn`` was seen before.
    """

    unavailable = "__debezium_unavailable_value"

    def __init__(self, key: str = "id") -> None:
        self.key, self.rows = key, Rows()
        self.seen: dict[Any, int] = {}
        self.operations = ""

    def take(self, message: bytes) -> None:
        value = json.loads(message)
        payload = value.get("payload", value)
        operation, source = payload["op"], payload["source"]
        assert source["connector"] == "postgresql"
        assert source["ts_ms"] == source["ts_us"] // 1000 == source["ts_ns"] // 1_000_000 == payload["ts_ms"]
        if operation == "t":
            self.rows.clear()
            self.operations += operation
            return
        row = payload["before"] if operation == "d" else payload["after"]
        name = row[self.key]
        if source["lsn"] <= self.seen.get(name, -1):
            return
        self.seen[name] = source["lsn"]
        self.operations += operation
        if operation == "d":
            assert payload["after"] is None
            del self.rows[name]
            return
        old = self.rows.get(name, {})
        assert operation == "u" or not old
        self.rows[name] = {column: old[column] if it == self.unavailable else it for column, it in row.items()}


class Mute(ReplicationSource):
    """Reads, and never tells the server how far: all of it comes again."""

    def send_status(self, *, written: Lsn, flushed: Lsn) -> None:  # noqa: ARG002 (that is the point)
        super().send_status(written=written, flushed=Lsn(0))


class MuteForward(Forward):
    def make_source(self, dsn: str, publications: tuple[str, ...]) -> ReplicationSource:
        return Mute(dsn, self.database.slot, publications)


def sent(
    database: Database, *prefixes: str, history: History | None = None, wired: type[Forward] = Forward
) -> list[Event]:
    """The events of all that has been committed behind the slot's place."""
    sink, fenced = HeldSink(), f"{FENCE}.emitted"
    with wired(database, messages=[FENCE, *prefixes], naming=DEBEZIUM, history=history, sink=sink) as forward:
        database.execute("SELECT pg_logical_emit_message(true, %s, '')", [FENCE])
        until(lambda: forward.failure or any(event.detail_type == fenced for event in sink.events), 20)
        assert forward.failure is None
        forward.halt()
    return [event for event in sink.events if event.detail_type != fenced]


NOTE = """
    CREATE TABLE note (id bigint PRIMARY KEY, title text, total numeric, paid bool, body text);
    ALTER TABLE note ALTER body SET STORAGE EXTERNAL
"""
BIG = "repeat('ab', 20000)"


@pytest.mark.parametrize("identity", ["DEFAULT", "FULL"])
def test_a_consumer_of_debezium_ends_with_the_rows_of_the_table(each_database: Database, identity: str) -> None:
    prepared(each_database, NOTE, f"ALTER TABLE note REPLICA IDENTITY {identity}")
    for statement in (
        f"INSERT INTO note SELECT n, 'note ' || n, n + 0.5, n % 2 = 0, {BIG} FROM generate_series(1, 20) AS n",
        "TRUNCATE note",
        f"INSERT INTO note SELECT n, 'note ' || n, n + 0.5, n % 2 = 0, {BIG} FROM generate_series(1, 20) AS n",
        "UPDATE note SET title = title || '!', paid = NULL WHERE id < 10",
        "UPDATE note SET total = total * 2; UPDATE note SET total = total + 1; UPDATE note SET title = 'last' || id",
        f"UPDATE note SET body = body || 'x' WHERE id = 3; UPDATE note SET body = {BIG} WHERE id = 4",
        "DELETE FROM note WHERE id > 15",
        "UPDATE note SET id = id + 100, body = 'moved' WHERE id = 7",
        "INSERT INTO note VALUES (7, 'new', 1, true, 'new')",
    ):
        each_database.execute(statement)
    events, consumer = sent(each_database), Consumer()

    for event in [*events, *events[-5:]]:  # and some of them twice: at least once
        consumer.take(event.detail)

    (expected,) = each_database.execute("SELECT json_object_agg(id, to_json(n)) FROM note n")[0]
    assert {str(name): row for name, row in consumer.rows.items()} == expected
    assert consumer.operations.startswith("c" * 20 + "t" + "c" * 20 + "u" * 9)
    assert consumer.operations.endswith("d" * 5 + "dcc"), "a change of the key is a delete and a create"
    assert len({event.id for event in events}) == len(events)


def test_a_delete_has_every_column_and_an_update_what_the_identity_says(database: Database) -> None:
    prepared(database, "CREATE TABLE thing (id int PRIMARY KEY, note text)")
    for statement in ("INSERT INTO thing VALUES (1, 'a')", "UPDATE thing SET note = 'b'", "DELETE FROM thing"):
        database.execute(statement)
    database.execute("ALTER TABLE thing REPLICA IDENTITY FULL")
    for statement in ("INSERT INTO thing VALUES (1, 'a')", "UPDATE thing SET note = 'b'", "DELETE FROM thing"):
        database.execute(statement)
    details = [orjson.loads(event.detail) for event in sent(database)]

    one, other = {"id": 1, "note": "a"}, {"id": 1, "note": "b"}
    assert [(it["op"], it["before"], it["after"]) for it in details] == [
        ("c", None, one),
        ("u", None, other),
        ("d", {"id": 1, "note": None}, None),
        ("c", None, one),
        ("u", one, other),
        ("d", other, None),
    ]
    assert all(it["figbridge"]["key"] == {"id": 1} for it in details)


def test_where_and_when_is_said_in_debeziums_words(database: Database) -> None:
    prepared(database, "CREATE TABLE thing (id int PRIMARY KEY)")
    with database.connect() as connection, connection.transaction():
        (xid,) = connection.execute("SELECT pg_current_xact_id()::text::bigint").fetchone() or ()
        for number in range(3):
            connection.execute("INSERT INTO thing VALUES (%s)", [number])
    events = sent(database)
    details = [orjson.loads(event.detail) for event in events]
    sources, transactions = [it["source"] for it in details], [it["transaction"] for it in details]

    assert {(it["name"], it["db"], it["schema"], it["table"], it["snapshot"]) for it in sources} == {
        ("legacy.db", "db", "public", "thing", "false")
    }
    assert {it["txId"] for it in sources} == {xid}
    assert {it["ts_us"] for it in sources} == {int(events[0].time.timestamp() * 1e6 + 0.5)}
    lsns = [it["lsn"] for it in sources]
    assert lsns == sorted(set(lsns)), "each row's own"
    ((name,), commits) = {it["id"] for it in transactions}, [json.loads(it["sequence"]) for it in sources]
    assert [it["total_order"] for it in transactions] == [1, 2, 3]
    assert name == f"{xid}:{commits[0][0]}"
    assert [int(own) for _, own in commits] == lsns
    assert all(lsn < int(commit) for lsn, (commit, _) in zip(lsns, commits, strict=True))
    assert f"-{int(commits[0][0]):016X}-" in events[0].id


def test_what_comes_again_is_the_same_byte_by_byte(database: Database) -> None:
    prepared(database, NOTE)
    database.execute(f"INSERT INTO note SELECT n, 'n', n, true, {BIG} FROM generate_series(1, 50) AS n")
    database.execute("UPDATE note SET id = id + 1000 WHERE id < 9")
    once = {event.id: event for event in sent(database, wired=MuteForward)}
    again = sent(database)
    assert len(again) == 50 + 2 * 8
    assert {event.id: event for event in again} == once


def test_a_row_of_a_snapshot_is_a_read(database: Database) -> None:
    prepare(database, "CREATE TABLE thing (id int PRIMARY KEY, note text)", "thing")
    database.execute("INSERT INTO thing SELECT n, 'n' || n FROM generate_series(1, 30) AS n")
    with Forward(database, snapshot=[("public", "thing")], naming=DEBEZIUM) as forward:
        until(lambda: sum(event.detail_type == "thing.read" for event in forward.sink.events) >= 30, 20)
        details = [it for it in forward.sink.details if it["op"] == "r"]
    assert [it["after"] for it in details] == [{"id": n, "note": f"n{n}"} for n in range(1, 31)]
    assert {it["source"]["snapshot"] for it in details} == {"incremental"}
    assert {it["source"]["table"] for it in details} == {"thing"}


def test_a_logical_message_is_an_m(database: Database) -> None:
    prepared(database, "CREATE TABLE thing (id int PRIMARY KEY)")
    for transactional in (True, False):
        database.execute("SELECT pg_logical_emit_message(%s, 'audit', 'said ä')", [transactional])
    events = sent(database, "audit")
    assert {event.detail_type for event in events} == {"audit.emitted"}
    details = [orjson.loads(event.detail) for event in events]
    assert [it["op"] for it in details] == ["m", "m"]
    assert {(it["message"]["prefix"], base64.b64decode(it["message"]["content"])) for it in details} == {
        ("audit", "said ä".encode())
    }
    assert [it["source"]["txId"] is None for it in details] == [False, True]
    assert all(Lsn(it["source"]["lsn"]) > 0 for it in details)


def test_a_change_of_the_schema_has_no_op(database: Database) -> None:
    """So that whoever looks at ``op`` passes it by."""
    prepared(database, "CREATE TABLE thing (id int PRIMARY KEY)")
    database.execute("INSERT INTO thing VALUES (1)")
    database.execute("ALTER TABLE thing ADD note text")
    database.execute("INSERT INTO thing VALUES (2, 'a')")
    first, told, last = [orjson.loads(event.detail) for event in sent(database, history=History())]
    assert (first["op"], last["op"], "op" in told) == ("c", "c", False)
    (change,) = told["tableChanges"]
    assert (told["databaseName"], told["schemaName"], change["id"]) == ("db", "public", '"public"."thing"')
    assert [it["name"] for it in change["table"]["columns"]] == ["id", "note"]
    assert change["table"]["primaryKeyColumnNames"] == ["id"]
    assert told["source"]["lsn"] == last["source"]["lsn"]
