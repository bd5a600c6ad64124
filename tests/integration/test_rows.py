"""Rows as the stream tells them: what was not sent, what names a row, what is a truncate. The oracle is the server.

Transactions are in test_transactions.py, partitions in test_partitions.py, filters and generated
columns in test_selection.py, DDL in test_alter.py.
"""

import hashlib
from collections.abc import Sequence

import orjson
import psycopg
import pytest

from figbridge.event import Event, Rejection
from figbridge.transports import Limits
from fixtures.checked import config_of, inspected
from fixtures.forward import Forward, HeldSink
from fixtures.postgres import Database
from fixtures.replay import FENCE, assert_replays, prepared, settled, told

NOTE = "CREATE TABLE note (id int PRIMARY KEY, title text, body text); ALTER TABLE note ALTER body SET STORAGE EXTERNAL"
BIG = "repeat('ab', 20000)"


def whole(database: Database) -> list[Event]:
    """The events themselves, with what a sink orders by."""
    with Forward(database, messages=[FENCE]) as forward:
        settled(forward)
        return [event for event in forward.sink.events if ".emitted" not in event.detail_type]


# --- TOAST


@pytest.mark.parametrize("identity", ["DEFAULT", "FULL", "USING INDEX note_title"])
def test_a_value_that_was_not_sent_is_named_or_filled_in(each_database: Database, identity: str) -> None:
    prepared(
        each_database,
        NOTE,
        "ALTER TABLE note ALTER title SET NOT NULL, ADD small text, ADD more text; "
        "ALTER TABLE note ALTER more SET STORAGE EXTERNAL; CREATE UNIQUE INDEX note_title ON note (title)",
        f"ALTER TABLE note REPLICA IDENTITY {identity}",
    )
    for statement in (
        f"INSERT INTO note VALUES (1, 'a', {BIG}, 's', {BIG}), (2, 'b', NULL, NULL, {BIG}), (3, 'c', 'short', '', '')",
        "UPDATE note SET small = 't'",
        "UPDATE note SET title = title || '!', id = id + 10",
        "UPDATE note SET body = NULL WHERE id = 11",
        f"UPDATE note SET body = {BIG} || 'c', small = NULL WHERE id = 12",
        "UPDATE note SET more = more || 'x' WHERE id = 12",
        "DELETE FROM note WHERE id = 13",
    ):
        each_database.execute(statement)
    details = told(each_database)
    updates = [it for it in details if it["op"] == "update"]
    if identity == "FULL":
        assert not any(it["unchanged"] for it in updates)
        assert all(it["before"].keys() == it["after"].keys() for it in updates)
    else:
        assert [it["unchanged"] for it in updates] == [
            ["body", "more"], ["more"], [], ["body", "more"], ["more"], [], ["more"], ["more"], ["body"],
        ]  # fmt: skip
    for it in updates:
        assert not set(it["unchanged"]) & it["after"].keys()
    assert_replays(each_database, details, "note")


def test_a_key_that_is_toasted_itself_is_always_told(each_database: Database) -> None:
    """Compressed it is short enough for an index and too long to stay in the table: the new row comes without it."""
    long = "repeat('ab', 100000)"
    prepared(each_database, "CREATE TABLE note (id text PRIMARY KEY, n int)")
    each_database.execute(f"INSERT INTO note VALUES ({long}, 1), ({long} || 'c', 1)")
    ((toast,),) = each_database.execute(
        "SELECT pg_relation_size(reltoastrelid) FROM pg_class WHERE oid = 'note'::regclass"
    )
    assert toast, "the key is not outside of the table: this test proves nothing"
    each_database.execute("UPDATE note SET n = 2")
    each_database.execute(f"UPDATE note SET id = {long} || 'd' WHERE id = {long}")
    each_database.execute(f"DELETE FROM note WHERE id = {long} || 'c'")
    events = whole(each_database)
    details = [orjson.loads(event.detail) for event in events]
    assert [len(it["key"]["id"]) for it in details] == [200000, 200001, 200000, 200001, 200001, 200001]
    assert [event.old_key is not None for event in events] == [False] * 4 + [True, False]
    assert not any(it["unchanged"] for it in details)
    assert_replays(each_database, details, "note")


def test_a_value_of_twenty_megabytes(each_database: Database) -> None:
    size = 20_000_000
    prepared(each_database, NOTE, "ALTER TABLE note REPLICA IDENTITY FULL")
    each_database.execute("INSERT INTO note VALUES (1, 'a', repeat('x\"', %s))", [size // 2])
    each_database.execute("UPDATE note SET title = 'b'")
    inserted, updated = told(each_database)
    ((expected,),) = each_database.execute("SELECT md5(body) FROM note")
    for value in (inserted["after"]["body"], updated["after"]["body"], updated["before"]["body"]):
        assert len(value) == size
        assert hashlib.md5(value.encode()).hexdigest() == expected


# --- what names a row


def test_the_replica_identity_decides_what_an_old_row_is(each_database: Database) -> None:
    prepared(
        each_database,
        "CREATE TABLE by_key (id int PRIMARY KEY, code text NOT NULL UNIQUE, n int)",
        "CREATE TABLE by_index (LIKE by_key INCLUDING ALL); CREATE TABLE by_row (LIKE by_key INCLUDING ALL)",
        "ALTER TABLE by_index REPLICA IDENTITY USING INDEX by_index_code_key; ALTER TABLE by_row REPLICA IDENTITY FULL",
    )
    tables = ["by_key", "by_index", "by_row"]
    for table in tables:
        for statement in (
            f"INSERT INTO {table} VALUES (1, 'a', 1)",
            f"UPDATE {table} SET n = 2",
            f"UPDATE {table} SET id = 2",
            f"UPDATE {table} SET code = 'b'",
            f"DELETE FROM {table}",
        ):
            each_database.execute(statement)
    details = told(each_database)
    one, two, three, four = ({"id": 1, "code": "a", "n": 1}, {"id": 1, "code": "a", "n": 2},
                             {"id": 2, "code": "a", "n": 2}, {"id": 2, "code": "b", "n": 2})  # fmt: skip
    assert [(it["key"], it["before"], it["after"]) for it in details] == [
        ({"id": 1}, None, one), ({"id": 1}, None, two), ({"id": 2}, {"id": 1}, three), ({"id": 2}, None, four),
        ({"id": 2}, {"id": 2}, None),
        ({"code": "a"}, None, one), ({"code": "a"}, None, two), ({"code": "a"}, None, three),
        ({"code": "b"}, {"code": "a"}, four), ({"code": "b"}, {"code": "b"}, None),
        ({"id": 1}, None, one), ({"id": 1}, one, two), ({"id": 2}, two, three), ({"id": 2}, three, four),
        ({"id": 2}, four, None),
    ]  # fmt: skip
    assert_replays(each_database, details, *tables)


@pytest.mark.parametrize("identity", ["FULL", "DEFAULT", "USING INDEX kept_pkey"])
def test_a_column_that_a_key_only_includes_is_none_of_it(database: Database, identity: str) -> None:
    prepared(
        database,
        "CREATE TABLE kept (id int, note text, PRIMARY KEY (id) INCLUDE (note))",
        f"ALTER TABLE kept REPLICA IDENTITY {identity}",
    )
    database.execute("INSERT INTO kept VALUES (1, 'a')")
    database.execute("UPDATE kept SET note = 'b'")
    assert [it["key"] for it in told(database)] == [{"id": 1}, {"id": 1}]


def test_a_key_of_several_columns_in_an_order_of_its_own(each_database: Database) -> None:
    prepared(each_database, "CREATE TABLE pair (a int, b text, c int, PRIMARY KEY (c, a))")
    each_database.execute("INSERT INTO pair VALUES (1, 'x', 2)")
    each_database.execute("UPDATE pair SET a = 9")
    _, moved = details = told(each_database)
    assert (moved["key"], moved["before"]) == ({"a": 9, "c": 2}, {"a": 1, "c": 2})
    assert_replays(each_database, details, "pair")


class Picky(HeldSink):
    """Takes every second entry of a request, the others when they come again."""

    limits = Limits(entries=10, entry_bytes=1 << 30, batch_bytes=1 << 30, partial=True)

    def publish(self, events: Sequence[Event]) -> Sequence[Rejection]:
        self.events += events[1::2] or events
        return [Rejection(event, "Throttled", "later", retryable=True) for event in events[::2] if len(events) > 1]


def test_a_change_of_key_keeps_the_order_of_both_keys(database: Database) -> None:
    prepared(database, "CREATE TABLE thing (id int PRIMARY KEY, n int)")
    database.execute("INSERT INTO thing SELECT n, 0 FROM generate_series(1, 6) n")
    with database.connect() as connection:
        for turn in range(4):
            connection.execute("UPDATE thing SET n = n + 1")
            connection.execute("UPDATE thing SET id = id + 100 WHERE id = %s", [turn + 1])
            connection.execute("INSERT INTO thing VALUES (%s, 0)", [turn + 1])
            connection.execute("DELETE FROM thing WHERE id = %s", [turn + 101])
    with Forward(database, sink=Picky()) as forward:
        forward.until_events(6 + 4 * 9, 60)
        events = forward.sink.events
    moved = [it for it in events if it.old_key is not None]
    assert sorted((it.old_key, it.key) for it in moved) == [
        (f'public.thing:{{"id":{n}}}', f'public.thing:{{"id":{n + 100}}}') for n in range(1, 5)
    ]
    assert [it.id for it in events] != sorted(it.id for it in events), "nothing was ever out of order"
    for key in {it.key for it in events}:
        of_key = [it.id for it in events if key in (it.key, it.old_key)]
        assert of_key == sorted(of_key), key


def test_tables_without_a_key(each_database: Database) -> None:
    """Equal rows stay as many as they are. NOTHING publishes inserts alone, or the application could not update."""
    prepared(
        each_database,
        "CREATE TABLE bag (a int, b text); ALTER TABLE bag REPLICA IDENTITY FULL",
        "CREATE TABLE log (id int PRIMARY KEY, a text); ALTER TABLE log REPLICA IDENTITY NOTHING",
        publication="FOR TABLE bag",
    )
    each_database.execute("CREATE PUBLICATION logs FOR TABLE log WITH (publish = 'insert, truncate')")
    each_database.execute(f"SELECT pg_drop_replication_slot('{each_database.slot}')")
    each_database.create_slot()
    each_database.execute("INSERT INTO bag VALUES (1, 'a'), (1, 'a'), (2, NULL), (NULL, NULL)")
    each_database.execute("UPDATE bag SET b = 'b' WHERE ctid = (SELECT min(ctid) FROM bag WHERE a = 1)")
    each_database.execute("DELETE FROM bag WHERE a IS NULL; INSERT INTO bag VALUES (2, NULL)")
    each_database.execute("INSERT INTO log VALUES (1, 'x'), (2, 'y')")
    details = told(each_database, "pub", "logs")
    assert {it["key"] for it in details} == {None}
    assert_replays(each_database, details, "bag", "log")
    each_database.execute("UPDATE log SET a = 'z' WHERE id = 1; DELETE FROM log WHERE id = 2")
    assert told(each_database, "pub", "logs") == []


def test_a_publication_that_breaks_the_owners_update_is_what_the_preflight_refuses(each_database: Database) -> None:
    each_database.execute("CREATE TABLE keyless (a int); INSERT INTO keyless VALUES (1)")
    found = inspected(config_of(each_database.dsn, "public.keyless", slot=each_database.slot))
    assert "the application's own UPDATE and DELETE would fail" in found.only("error", "table public.keyless").what
    prepared(each_database, publication="FOR TABLE keyless")
    for statement in ("UPDATE keyless SET a = 2", "DELETE FROM keyless"):
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
            each_database.execute(statement)
    assert told(each_database) == []


# --- TRUNCATE


def test_a_truncate_is_one_event_for_each_table_that_is_published(each_database: Database) -> None:
    prepared(
        each_database,
        "CREATE TABLE parent (id int PRIMARY KEY); CREATE TABLE child (id serial PRIMARY KEY, p int REFERENCES parent)",
        "CREATE TABLE secret (id int REFERENCES child); CREATE TABLE alone (id int PRIMARY KEY)",
        publication="FOR TABLE parent, child, alone",
    )
    for statement in (
        "INSERT INTO parent VALUES (1); INSERT INTO child (p) VALUES (1); INSERT INTO alone VALUES (1)",
        "TRUNCATE parent RESTART IDENTITY CASCADE",
        "INSERT INTO parent VALUES (2); INSERT INTO child (p) VALUES (2)",
        "BEGIN; INSERT INTO alone VALUES (2); TRUNCATE alone, parent CASCADE; INSERT INTO alone VALUES (3); COMMIT",
        "TRUNCATE secret",
        "BEGIN; TRUNCATE alone; ROLLBACK",
    ):
        each_database.execute(statement)
    events = whole(each_database)
    details = [orjson.loads(event.detail) for event in events]
    assert [event.whole_table for event in events] == [it["op"] == "truncate" for it in details]
    assert {it["position"]["ordinal"] for it in details if it["op"] == "truncate"} == {0, 1, 2, 3}
    assert [it["table"] for it in details if it["op"] == "truncate"][:2] == ["parent", "child"]
    assert sorted(it["table"] for it in details if it["op"] == "truncate") == [
        "alone", "child", "child", "parent", "parent",
    ]  # fmt: skip
    assert len({event.id for event in events}) == len(events)
    assert_replays(each_database, details, "parent", "child", "alone")
