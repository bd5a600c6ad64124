"""Logical messages and the outbox on real servers: what leaves, under which id, and what comes again after a crash."""

import base64
import contextlib
import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from figbridge import legacy
from figbridge.change import Begin, Commit, Lsn, Operation
from figbridge.config import OutboxSection
from figbridge.event import Event, Rejection
from figbridge.forward.messages import Messages, server_codec
from figbridge.forward.outbox import Outbox
from figbridge.forward.table import Naming
from figbridge.forward.values import Encoders
from fixtures.postgres import Database
from fixtures.stream import Stream

NAMING = Naming("shop", "legacy.{database}", "{table}.{operation}")
OUTBOX = """
    CREATE TABLE outbox (
        id uuid PRIMARY KEY DEFAULT gen_random_uuid(), aggregate_type text NOT NULL, aggregate_id bigint NOT NULL,
        type text NOT NULL, payload {} , tenant int, created_at timestamptz DEFAULT '2026-11-23 10:00+00'
    )
"""


def prepared(database: Database, payload: str = "jsonb") -> None:
    database.execute("CREATE TABLE thing (id int PRIMARY KEY)")
    database.execute(OUTBOX.format(payload))
    database.execute("CREATE PUBLICATION pub FOR TABLE thing, outbox")
    database.create_slot()


def outbox(database: Database, ignored: list[Operation], **settings: Any) -> Outbox:
    section = OutboxSection(table="public.outbox", message_prefix="outbox", **settings)
    encoders = Encoders("safe", lambda oid: legacy.type_description(database.dsn, oid))
    return Outbox(section, database="shop", encoders=encoders, ignored=ignored.append)


@contextlib.contextmanager
def reading(
    database: Database, *prefixes: str, codec: str = "utf-8", ignored: list[Operation] | None = None, **settings: Any
) -> Iterator[Stream]:
    routed = outbox(database, [] if ignored is None else ignored, **settings)
    with Stream(database, Messages(prefixes, NAMING, outbox=routed, codec=codec), routed) as stream:
        yield stream


def emit(connection: psycopg.Connection, prefix: str, content: str | bytes, *, transactional: bool = True) -> Lsn:
    kind = "text" if isinstance(content, str) else "bytea"
    query = f"SELECT pg_logical_emit_message(%s, %s, %s::{kind})"
    row = connection.execute(query, [transactional, prefix, content]).fetchone()
    assert row
    # a message that is not transactional is nobody's commit: the WAL writer flushes it, or the next commit
    return Lsn.parse(row[0])


def detail(event: Event) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(event.detail)
    assert b"\n" not in event.detail
    return found


# --- logical messages


def test_messages_leave_by_prefix_with_ids_of_their_own(each_database: Database) -> None:
    prepared(each_database)
    with each_database.connect() as connection:
        with connection.transaction():
            connection.execute("INSERT INTO thing VALUES (1)")
            first = emit(connection, "audit", "one")
            emit(connection, "other", "nobody asked for it")
            emit(connection, "figbridge.anything", "ours")
            second = emit(connection, "app.order\n", '{"a": "ü"}')
            connection.execute("INSERT INTO thing VALUES (2)")
        alone = emit(connection, "audit", b"\xff\x00\n", transactional=False)
        with contextlib.suppress(ZeroDivisionError), connection.transaction():
            emit(connection, "audit", "rolled back")
            apart = emit(connection, "audit", "not transactional, so it stays", transactional=False)
            raise ZeroDivisionError
        connection.execute("INSERT INTO thing VALUES (3)")
    with reading(each_database, "audit", "app.*") as stream:
        stream.read(lambda: len(stream.changes) == 3)

        one, two, three, four = stream.events
        # rows are counted as if there were no messages
        assert [change.ordinal for change in stream.changes] == [0, 1, 0]
        begin = next(it for it in stream.decoded if isinstance(it, Begin))
        assert one.id == f"{stream._identity}-{begin.commit_lsn:016X}-m{first:016X}"
        assert two.id == f"{stream._identity}-{begin.commit_lsn:016X}-m{second:016X}"
        assert three.id == f"{stream._identity}-{alone:016X}-m"
        assert four.id == f"{stream._identity}-{apart:016X}-m"
        assert (one.source, one.detail_type, two.detail_type) == ("legacy.shop", "audit.emitted", "app.order\n.emitted")
        assert one.key == 'message:{"prefix":"audit"}'
        assert one.time == begin.committed_at
        committed = begin.committed_at.isoformat(timespec="microseconds").replace("+00:00", "Z")
        assert detail(one) == {
            "id": one.id, "op": "message", "schema": None, "table": None,
            "key": {"prefix": "audit"}, "prefix": "audit", "transactional": True,
            "encoding": "text", "content": "one",
            "position": {
                "commit_lsn": str(begin.commit_lsn), "ordinal": None, "lsn": str(first), "xid": begin.xid,
            },
            "committed_at": committed, "hops": 0, "cause": None,
        }  # fmt: skip
        assert (detail(two)["prefix"], detail(two)["content"]) == ("app.order\n", '{"a": "ü"}')
        binary = detail(three)
        assert (binary["encoding"], base64.b64decode(binary["content"])) == ("base64", b"\xff\x00\n")
        assert binary["position"] == {"commit_lsn": None, "ordinal": None, "lsn": str(alone), "xid": None}
        assert (binary["transactional"], binary["committed_at"]) == (False, None)
        assert three.time >= begin.committed_at
        assert detail(four)["content"] == "not transactional, so it stays"
    with reading(each_database, "*") as stream:
        stream.read(lambda: len(stream.changes) == 3)
    prefixes = [detail(it)["prefix"] for it in stream.events]
    assert prefixes == ["audit", "other", "app.order\n", "audit", "audit"]  # all but ours


def test_a_message_comes_again_with_the_same_id_until_its_own_lsn_is_confirmed(each_database: Database) -> None:
    """The rule of the acknowledgement: a message's LSN, the end of its record, may be confirmed like a commit's end."""
    prepared(each_database)
    with each_database.connect() as connection:
        connection.execute("INSERT INTO thing VALUES (1)")
        emit(connection, "audit", "one", transactional=False)
        emit(connection, "audit", "two", transactional=False)
        connection.execute("INSERT INTO thing VALUES (2)")

    def read() -> tuple[list[int], list[tuple[str, bytes]], Stream]:
        with reading(each_database, "audit") as stream:
            stream.read(lambda: stream.changes and stream.changes[-1].after == (b"2",))
            return [len(stream.changes)], [(it.id, it.detail) for it in stream.events], stream

    rows, events, first = read()
    assert rows == [2]
    assert [json.loads(it)["content"] for _, it in events] == ["one", "two"]
    commit = next(it.end_lsn for it in first.decoded if isinstance(it, Commit))
    one, two = (message.lsn for message in first.messages)
    # nothing confirmed; the commit before them; the first of them; both
    for confirmed, changes, repeated in ((Lsn(0), 2, events), (commit, 1, events), (one, 1, events[1:]), (two, 1, [])):
        with reading(each_database, "audit") as stream:
            stream.acknowledge(confirmed)
            stream.finish()
        rows, again, _ = read()
        assert (rows, again) == ([changes], repeated)


def test_a_message_between_transactions_comes_between_them(each_database: Database) -> None:
    """Also when its transaction, or another one, is still open where it was written."""
    prepared(each_database)
    with each_database.connect() as early, each_database.connect() as late:
        with early.transaction():
            early.execute("INSERT INTO thing VALUES (1)")
            emit(late, "audit", "before", transactional=False)
            emit(early, "audit", "inside", transactional=False)
            early.execute("INSERT INTO thing VALUES (2)")
        emit(late, "audit", "after", transactional=False)
        late.execute("INSERT INTO thing VALUES (3)")
    with reading(each_database, "audit") as stream:
        stream.read(lambda: len(stream.changes) == 3)
    kinds = [type(it).__name__ for it in stream.decoded if type(it).__name__ != "Relation"]
    message, row = ["LogicalMessage"], ["Begin", "Change", "Commit"]
    assert kinds == [*message, *message, "Begin", "Change", "Change", "Commit", *message, *row]
    assert [detail(it)["content"] for it in stream.events] == ["before", "inside", "after"]


def test_the_content_is_read_in_the_encoding_of_the_database(database: Database) -> None:
    name = f"{database.name}_latin1"
    database.execute(f"CREATE DATABASE {name} ENCODING 'LATIN1' TEMPLATE template0 LOCALE 'C'")
    other = Database(database.server, name)
    try:
        prepared(other)
        with other.connect() as connection:
            emit(connection, "audit", "Grün")
            emit(connection, "outbox", '{"aggregate_type":"ä","aggregate_id":1,"type":"t","payload":{"é":1}}')
        with other.connect() as connection:
            codec = server_codec(connection)
        with reading(other, "audit", codec=codec) as stream:
            stream.read(lambda: len(stream.left) == 2)
        assert detail(stream.events[0])["content"] == "Grün"
        assert stream.events[1].key == 'outbox:{"aggregate_type":"ä","aggregate_id":"1"}'
        assert detail(stream.events[1])["payload"] == {"é": 1}
        with reading(other, "audit") as stream:  # not told of it, nothing is lost either
            stream.read(lambda: len(stream.left) == 2)
        assert base64.b64decode(detail(stream.events[0])["content"]) == "Grün".encode("latin1")
        assert isinstance(stream.left[1], Rejection)
    finally:
        other.execute("SELECT pg_drop_replication_slot(%s)", [other.slot])
        database.execute(f"DROP DATABASE {name} WITH (FORCE)")


# --- the outbox


PAYLOAD = '{"total": 1234567890123456789012345678.90, "b": [1e400], "a": "\\u00fc"}'


@pytest.mark.parametrize("payload", ["json", "jsonb"])
def test_row_and_message_become_the_same_event(each_database: Database, payload: str) -> None:
    prepared(each_database, payload)
    content = f'{{"type": "OrderPaid", "aggregate_id": 42, "aggregate_type": "order", "id": 7, "payload": {PAYLOAD}}}'
    if payload == "jsonb":
        content = (
            content.replace("\\u00fc", "ü").replace("1e400", "1" + "0" * 400).replace(": ", ":").replace(", ", ",")
        )
    with each_database.connect() as connection, connection.transaction():
        connection.execute("INSERT INTO thing VALUES (1)")
        connection.execute(
            "INSERT INTO outbox (aggregate_type, aggregate_id, type, payload) VALUES ('order', 42, 'OrderPaid', %s)",
            [PAYLOAD.replace(", ", ",\n")],
        )
        emit(connection, "outbox", content)
    own = each_database.execute("SELECT id::text FROM outbox")[0][0]
    with reading(each_database) as stream:
        stream.read(lambda: len(stream.left) == 2)
    row, message = stream.events
    assert row.id.endswith("-00000001")  # the second row of its transaction
    assert (row.source, row.detail_type, row.key) == (message.source, message.detail_type, message.key)
    assert (row.source, row.detail_type) == ("legacy.shop", "OrderPaid")
    assert row.key == 'outbox:{"aggregate_type":"order","aggregate_id":"42"}'
    found = detail(row)
    assert (found["op"], found["schema"], found["table"]) == ("outbox", "public", "outbox")
    assert found["key"] == {"aggregate_type": "order", "aggregate_id": "42"}
    assert (found["outbox_id"], found["type"], found["fields"]) == (own, "OrderPaid", {})
    assert found["position"].keys() == {"commit_lsn", "ordinal", "xid"}
    assert detail(message)["outbox_id"] == 7
    assert (detail(message)["schema"], detail(message)["id"]) == (None, message.id)
    if payload == "json":  # as it was written, digit by digit
        assert f'"payload":{PAYLOAD},'.encode() in row.detail.replace(b",  ", b", ").replace(b", ", b", ")
        assert f'"payload":{PAYLOAD},'.encode() in message.detail
    else:
        assert b'"total": 1234567890123456789012345678.90' in row.detail
        assert b'"total":1234567890123456789012345678.90' in message.detail


def test_inserts_are_events_and_nothing_else_is(each_database: Database) -> None:
    prepared(each_database)
    with each_database.connect() as connection:
        with connection.transaction():  # the usual pattern: the table stays empty
            connection.execute(
                "INSERT INTO outbox (aggregate_type, aggregate_id, type) VALUES ('a', 1, 't') RETURNING id"
            )
            connection.execute("DELETE FROM outbox")
        connection.execute("INSERT INTO outbox (aggregate_type, aggregate_id, type) VALUES ('a', 2, 't')")
        connection.execute("UPDATE outbox SET tenant = 5")
        connection.execute("TRUNCATE outbox")
        connection.execute("INSERT INTO thing VALUES (1)")
    ignored: list[Operation] = []
    with reading(each_database, ignored=ignored) as stream:
        stream.read(lambda: stream.changes and stream.changes[-1].relation.name == "thing")
    assert [detail(it)["key"]["aggregate_id"] for it in stream.events] == ["1", "2"]
    assert [detail(it)["payload"] for it in stream.events] == [None, None]
    assert ignored == [Operation.DELETE, Operation.UPDATE, Operation.TRUNCATE]


def test_what_is_no_event_is_rejected_whole(each_database: Database) -> None:
    prepared(each_database, "text")
    with each_database.connect() as connection:
        insert = "INSERT INTO outbox (aggregate_type, aggregate_id, type, payload) VALUES (%s, 1, 't', %s)"
        connection.execute(insert, ["", '{"a": 1}'])
        connection.execute(insert, ["a", "no JSON"])
        connection.execute(insert, ["a", "[NaN]"])
        connection.execute(insert, ["a", "[" * 100_000])
        connection.execute(insert, ["a", ' {"good":\n1} '])
        emit(connection, "outbox", "no JSON")
        emit(connection, "outbox", b"\xff")
        emit(connection, "outbox", '{"aggregate_type":"a","aggregate_id":1.5,"type":"t","payload":{}}')
        emit(connection, "outbox", '{"aggregate_type":"a","aggregate_id":1,"type":"t"}')
        connection.execute("ALTER TABLE outbox RENAME type TO kind")
        connection.execute(
            "INSERT INTO outbox (aggregate_type, aggregate_id, kind, payload) VALUES ('a', 1, 't', '{}')"
        )
    with reading(each_database, expand_json=True) as stream:
        stream.read(lambda: len(stream.left) == 10)
    (event,) = stream.events
    assert detail(event)["payload"] == {"good": 1}
    rejections = [it for it in stream.left if isinstance(it, Rejection)]
    assert {(it.code, it.retryable) for it in rejections} == {("OutboxMalformed", False)}
    assert len({it.event.id for it in rejections}) == 9
    assert [it.message.partition(" (")[0] for it in rejections] == [
        "its 'aggregate_type' is empty",
        "its 'payload' is not JSON",
        "its 'payload' is not JSON",
        "its 'payload' is not JSON",
        "the content is not JSON as it must be",
        "the content is not text in the database's encoding",
        "its 'aggregate_id' is missing, or neither a text nor an integer",
        "it has no 'payload'",
        "the table had no column 'type' when the row was written; forward.outbox names it",
    ]
    whole = detail(rejections[1].event)
    assert (whole["row"]["payload"], whole["row"]["aggregate_id"], whole["table"]) == ("no JSON", 1, "outbox")
    assert detail(rejections[4].event)["content"] == "no JSON"
    assert detail(rejections[8].event)["row"]["kind"] == "t"


def test_the_form_follows_the_settings(database: Database) -> None:
    prepared(database)
    with database.connect() as connection:
        values = "VALUES ('order', 42, 'Paid', '{\"a\": 1}', 5), ('order', 42, 'Paid', '[1]', NULL)"
        connection.execute(f"INSERT INTO outbox (aggregate_type, aggregate_id, type, payload, tenant) {values}")
        head = '"aggregate_type":"order","aggregate_id":"42","type":"Paid"'
        emit(connection, "outbox", f'{{{head},"payload":"text","tenant":5.0,"unknown":1}}')
    fields = ("tenant", "created_at")
    with reading(database, fields=fields, source="shop.{aggregate_type}", detail_type="{type}.{database}") as stream:
        stream.read(lambda: len(stream.left) == 3)
    assert {(it.source, it.detail_type) for it in stream.events} == {("shop.order", "Paid.shop")}
    time = "2026-11-23T10:00:00+00:00"
    assert [detail(it)["fields"] for it in stream.events] == [
        {"tenant": 5, "created_at": time}, {"tenant": None, "created_at": time}, {"tenant": 5.0},
    ]  # fmt: skip
    assert [detail(it)["payload"] for it in stream.events] == [{"a": 1}, [1], "text"]
    with reading(database, detail="payload") as stream:
        stream.read(lambda: len(stream.left) == 3)
    assert stream.events[0].detail == b'{"a": 1}'
    assert [type(it) for it in stream.left] == [Event, Rejection, Rejection]  # a detail is an object


def test_a_partitioned_outbox_is_routed_by_its_root(each_database: Database) -> None:
    each_database.execute(
        "CREATE TABLE outbox (id int, aggregate_type text, aggregate_id text, type text, payload jsonb) "
        "PARTITION BY RANGE (id); CREATE TABLE outbox_1 PARTITION OF outbox FOR VALUES FROM (0) TO (10)"
    )
    each_database.execute("CREATE PUBLICATION pub FOR TABLE outbox WITH (publish_via_partition_root = true)")
    each_database.create_slot()
    each_database.execute("INSERT INTO outbox VALUES (1, 'a', '1', 't', '{}')")
    with reading(each_database) as stream:
        stream.read(lambda: stream.left)
    assert detail(stream.events[0])["table"] == "outbox"
