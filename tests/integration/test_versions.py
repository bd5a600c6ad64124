"""``schema.changed`` on real servers: before the first row of each version, once, also over restarts."""

import itertools
from importlib import resources

import orjson
import pytest

from figbridge.change import Lsn
from figbridge.errors import BridgeError
from figbridge.forward.snapshot.progress import Progress
from figbridge.forward.versions import History, Version, VersionStore
from fixtures.clock import until
from fixtures.forward import Forward
from fixtures.postgres import Database
from fixtures.replay import FENCE, settled
from fixtures.snapshot import finished, prepare


@pytest.fixture
def prepared(each_database: Database) -> Database:
    each_database.execute(resources.files("figbridge").joinpath("schema.sql").read_text())
    each_database.execute("CREATE TABLE thing (id int PRIMARY KEY, name text)")
    each_database.execute("CREATE PUBLICATION pub FOR TABLE thing")
    each_database.create_slot()
    return each_database


def bridge(database: Database, *, kept: bool = True) -> Forward:
    return Forward(database, history=History(), versions=VersionStore(database.dsn, database.slot) if kept else None)


def told(forward: Forward) -> list[tuple[str, str]]:
    """(what it is, the version it names) of each event."""
    return [(event.detail_type, orjson.loads(event.detail)["schema_version"]) for event in forward.sink.events]


def test_each_kind_of_change(prepared: Database) -> None:
    """Also in the middle of a transaction; and what changes nothing that an event shows is not announced."""
    with bridge(prepared) as forward, prepared.connect() as session:
        session.execute("INSERT INTO thing VALUES (1, 'a')")
        with session.transaction():
            session.execute("INSERT INTO thing VALUES (2, 'b')")
            session.execute("ALTER TABLE thing ADD COLUMN more numeric(12,2) DEFAULT 0")
            session.execute("INSERT INTO thing VALUES (3, 'c', 3), (4, 'd', 4)")
        session.execute("ALTER TABLE thing RENAME name TO label; INSERT INTO thing VALUES (5, 'e', 5)")
        session.execute("ALTER TABLE thing ALTER more TYPE text; INSERT INTO thing VALUES (6, 'f', '6')")
        session.execute("ALTER TABLE thing ADD UNIQUE (label, id)")
        session.execute("ALTER TABLE thing ALTER label SET NOT NULL")
        session.execute("ALTER TABLE thing REPLICA IDENTITY USING INDEX thing_label_id_key")
        session.execute("INSERT INTO thing VALUES (7, 'g', '7')")
        session.execute("ALTER TABLE thing RENAME TO item; INSERT INTO item VALUES (8, 'h', '8')")
        session.execute("ALTER TABLE item DROP COLUMN more; INSERT INTO item VALUES (9, 'i')")
        session.execute("COMMENT ON TABLE item IS 'x'; ANALYZE item; ALTER TABLE item SET (fillfactor = 50)")
        session.execute("INSERT INTO item VALUES (10, 'j')")
        events = forward.until_events(16)
        kinds = [kind for kind, _ in told(forward)]
        inserted, changed = "thing.inserted", "thing.schema.changed"
        assert kinds == [
            inserted, inserted, changed, inserted, inserted, changed, inserted, changed, inserted, changed, inserted,
            "item.schema.changed", "item.inserted", "item.schema.changed", "item.inserted", "item.inserted",
        ]  # fmt: skip
    changes = [event for event in events if event["op"] == "schema.changed"]
    for event, after in itertools.pairwise(changes):
        this = {key: event[key] for key in ("schema_version", "schema", "table", "identity", "columns")}
        assert after["previous"] == this, "each says what the one before said"
    first = changes[0]
    assert first["previous"]["columns"] == [
        {"name": "id", "type": "int4", "key": True},
        {"name": "name", "type": "text", "key": False},
    ]
    assert first["columns"][2] == {"name": "more", "type": "numeric(12,2)", "key": False}
    assert (first["key"], first["identity"], first["position"]["ordinal"]) == (None, "default", 1)
    assert [it["name"] for it in changes[1]["columns"]] == ["id", "label", "more"]
    assert changes[2]["columns"][2]["type"] == "text"
    assert changes[3]["identity"] == "index"
    assert [it["name"] for it in changes[3]["columns"] if it["key"]] == ["id", "label"]
    assert (changes[4]["table"], changes[4]["previous"]["table"]) == ("item", "thing")
    version = None
    for event in events:
        assert event["op"] == "schema.changed" or version in (None, event["schema_version"])
        version = event["schema_version"]


def test_a_change_while_no_bridge_runs(prepared: Database) -> None:
    with bridge(prepared) as forward:
        prepared.execute("INSERT INTO thing VALUES (1, 'a')")
        forward.until_events(1)
    prepared.execute("ALTER TABLE thing DROP COLUMN name; INSERT INTO thing VALUES (2)")
    with bridge(prepared) as forward:
        change, _ = forward.until_events(2)
    assert (change["op"], [it["name"] for it in change["previous"]["columns"]]) == ("schema.changed", ["id", "name"])
    with bridge(prepared) as forward:
        prepared.execute("INSERT INTO thing VALUES (3)")
        forward.until_events(1)
        assert [kind for kind, _ in told(forward)] == ["thing.inserted"], "it was announced before"


def test_without_the_table_a_process_knows_what_it_met(prepared: Database) -> None:
    with bridge(prepared, kept=False) as forward:
        prepared.execute("INSERT INTO thing VALUES (1, 'a')")
        prepared.execute("ALTER TABLE thing DROP COLUMN name; INSERT INTO thing VALUES (2)")
        forward.until_events(3)
        assert [kind for kind, _ in told(forward)] == ["thing.inserted", "thing.schema.changed", "thing.inserted"]
    assert prepared.execute("SELECT * FROM figbridge.table_version") == []


def test_what_comes_again_is_announced_again_in_its_place(prepared: Database) -> None:
    """After a halt, as near to a kill as a thread allows, and after a connection that was cut."""
    prepared.execute("INSERT INTO thing VALUES (1, 'a')")
    with bridge(prepared) as forward:
        forward.until_events(1)
        until(lambda: forward.checkpoint.pending == 0)
        forward.sink.open.clear()
        statement = "ALTER TABLE thing ADD more int; INSERT INTO thing VALUES (2, 'b', 2); ALTER TABLE thing DROP more"
        prepared.execute(f"{statement}; INSERT INTO thing VALUES (3, 'c')")
        until(lambda: forward.sink.refused)
        prepared.execute("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE active")
        until(lambda: forward.metric("forward_connections_total") == 2, missing="a second connection")
        forward.sink.open.set()
        prepared.execute("INSERT INTO thing VALUES (4, 'd')")
        once = forward.until_events(6)[1:]
        assert [it["op"] for it in once] == ["schema.changed", "insert", "schema.changed", "insert", "insert"]
        forward.halt()
    prepared.execute("INSERT INTO thing VALUES (5, 'e')")
    with bridge(prepared) as forward:
        until(lambda: any(it["key"] == {"id": 5} for it in forward.sink.details))
        repeated = {it["id"]: it for it in forward.sink.details[:-1]}
    assert repeated == {it["id"]: it for it in once if it["id"] in repeated}, "the same ids, the same contents"


def test_versions_that_nothing_needs_are_dropped(prepared: Database) -> None:
    store = VersionStore(prepared.dsn, prepared.slot)
    versions = [Version(7, Lsn(number), 0, {"schema_version": str(number)}) for number in range(1, 6)]
    store.add(versions[:4], Lsn(0))
    assert store.load() == versions[:4]
    store.add(versions[4:], Lsn(3))
    assert store.load() == versions[2:], "the last one that was acknowledged, and all behind it"
    store.add(versions[4:], Lsn(3))
    assert store.load() == versions[2:]
    assert VersionStore(prepared.dsn, "another").load() == []
    prepared.execute("UPDATE figbridge.table_version SET system_identifier = '1'")
    assert store.load() == [], "another cluster's"


def test_a_table_that_is_not_there_is_an_error_and_nothing_is_acknowledged(prepared: Database) -> None:
    prepared.execute("DROP TABLE figbridge.table_version")
    with bridge(prepared) as forward:
        failure = forward.ended()
    assert isinstance(failure, BridgeError)
    assert "table_version" in str(failure)
    assert "figbridge check" in failure.hint


def test_a_type_that_is_renamed(each_database: Database) -> None:
    """The stream tells of it when it describes the table anew, a snapshot before that: all bear the version since."""
    ddl = "CREATE TYPE mood AS ENUM ('calm'); CREATE TABLE thing (id int PRIMARY KEY, m mood)"
    prepare(each_database, ddl, "thing")
    each_database.execute("INSERT INTO thing VALUES (1, 'calm')")
    with Forward(each_database, snapshot=(), history=History(), messages=[FENCE]) as forward:
        settled(forward)
        each_database.execute("ALTER TYPE mood RENAME TO temper")
        with each_database.connect() as connection:
            Progress(each_database.slot).want(connection, ("public", "thing"))
        finished(forward, "thing")
        each_database.execute("INSERT INTO thing VALUES (2, 'calm')")
        settled(forward)
        each_database.execute("ALTER TYPE temper RENAME TO spirit")
        each_database.execute("SELECT pg_terminate_backend(active_pid, 5000) FROM pg_replication_slots WHERE active")
        each_database.execute("INSERT INTO thing VALUES (3, 'calm')")
        details = settled(forward)
    assert [it["op"] for it in details] == ["insert", "schema.changed", "read", "insert", "schema.changed", "insert"]
    versions = [it["schema_version"] for it in details]
    assert versions == [versions[0], *[versions[1]] * 3, *[versions[4]] * 2]
    assert [it["columns"][1]["type"] for it in details if "columns" in it] == ["public.temper", "public.spirit"]
