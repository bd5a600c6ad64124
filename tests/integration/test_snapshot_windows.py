"""What happens between the two watermarks: the test writes in the middle of a window, and looks at what leaves."""

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from figbridge.config import HashSection, SelectSection
from figbridge.forward.snapshot import chunk
from figbridge.forward.snapshot.loop import Snapshot
from figbridge.forward.snapshot.progress import State
from figbridge.forward.snapshot.window import Window
from fixtures.clock import until
from fixtures.forward import Forward, HeldSink
from fixtures.postgres import Database
from fixtures.snapshot import finished, prepare, states

DDL = """
CREATE TABLE thing (id int PRIMARY KEY, v int, big text);
ALTER TABLE thing ALTER big SET STORAGE EXTERNAL;
INSERT INTO thing SELECT n, n, CASE WHEN n = 5 THEN repeat('x', 5000) END FROM generate_series(1, 10) AS n;
"""
BY_CTID = """
ALTER TABLE thing DROP CONSTRAINT thing_pkey, ALTER id SET NOT NULL; CREATE UNIQUE INDEX one ON thing (id DESC);
ALTER TABLE thing REPLICA IDENTITY USING INDEX one;
"""
THING = ("public", "thing")
HASHING = HashSection.model_validate({"key": "correct horse battery"})
RULES: list[dict[str, Any]] = [{"mask": ["v"]}, {"hash": ["v"]}, {"truncate": {"v": 1}}, {"where": "v != `100`"}]


def skip(database: Database) -> None:
    """What is in the tables is told by no stream."""
    database.execute("SELECT pg_replication_slot_advance(%s, pg_current_wal_lsn())", [database.slot])


@pytest.fixture
def prepared(database: Database) -> Database:
    prepare(database, DDL, "thing", "figbridge.inbox")
    skip(database)
    return database


def within(
    database: Database, rules: dict[str, Any] | None = None, *, before: str = "", after: str = ""
) -> list[dict[str, Any]]:
    """The events of a snapshot in whose first window this SQL runs, `before` or `after` the chunk is read."""
    return sent(database, rules, before=before, after=after).details


def sent(database: Database, rules: dict[str, Any] | None = None, *, before: str = "", after: str = "") -> HeldSink:
    """The sink that has them."""
    select = [SelectSection.model_validate({"table": "public.thing", **rules})] if rules else []
    todo = {"low": before, "high": after}

    class Disturbed(Snapshot):
        def _mark(self, *about: Any, high: Window | None = None, low: Window | None = None) -> State | None:
            if high and (statement := todo.pop("high", "")):
                database.execute(statement)
            return super()._mark(*about, high=high, low=low)

        def _until(self, event: threading.Event, window: Window) -> None:
            super()._until(event, window)
            if statement := todo.pop("low", ""):
                database.execute(statement)

    with Forward(database, snapshot=[THING], loop=Disturbed, select=select, hashing=HASHING) as forward:
        finished(forward, "thing")
        return forward.sink


def told(events: list[dict[str, Any]]) -> list[tuple[str, int | None]]:
    return [(it["op"], (it["key"] or {}).get("id")) for it in events]


@pytest.mark.parametrize("place", ["before", "after"])
def test_the_stream_wins(prepared: Database, place: str) -> None:
    statements = """
    UPDATE thing SET v = 0 WHERE id = 3; DELETE FROM thing WHERE id = 4; UPDATE thing SET id = 20 WHERE id = 6;
    INSERT INTO thing VALUES (11, 11);
    """
    events = told(within(prepared, None, **{place: statements}))
    assert events[:4] == [("update", 3), ("delete", 4), ("update", 20), ("insert", 11)]
    assert events[4:] == [("read", id_) for id_ in (1, 2, 5, 7, 8, 9, 10)]


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_the_stream_wins_where_there_are_rules(prepared: Database, rules: dict[str, Any], place: str) -> None:
    statements = """
    UPDATE thing SET v = 0 WHERE id IN (3, 5); DELETE FROM thing WHERE id = 4; UPDATE thing SET id = 20 WHERE id = 6;
    """
    events = within(prepared, rules, **{place: statements})
    assert told(events[:4]) == [("update", 3), ("update", 5), ("delete", 4), ("update", 20)]
    assert told(events[4:]) == [("read", id_) for id_ in (1, 2, 7, 8, 9, 10, 5)], "5 is read again: its big was unsent"
    assert events[-1]["after"]["big"] == "x" * 5000


def test_the_stream_wins_where_the_key_stays(prepared: Database) -> None:
    statements = (
        "UPDATE thing SET v = 33 WHERE id = 3; UPDATE thing SET v = 55 WHERE id = 5; DELETE FROM thing WHERE id = 4"
    )
    events = within(prepared, {"mask": ["id"]}, after=statements)
    assert [(it["op"], (it["after"] or {}).get("v")) for it in events] == [
        ("update", 33), ("update", 55), ("delete", None), *(("read", v) for v in (1, 2, 6, 7, 8, 9, 10, 55)),
    ]  # fmt: skip


def test_what_comes_before_the_window_is_no_touch(prepared: Database) -> None:
    prepared.execute("UPDATE thing SET v = 0 WHERE id = 3")
    assert told(within(prepared)) == [("update", 3), *(("read", id_) for id_ in range(1, 11))]


def test_a_value_that_the_stream_did_not_send_is_read_again(prepared: Database) -> None:
    events = within(prepared, after="UPDATE thing SET v = 0 WHERE id = 5")
    assert events[0]["unchanged"] == ["big"]
    assert told(events) == [("update", 5), *(("read", id_) for id_ in (1, 2, 3, 4, 6, 7, 8, 9, 10)), ("read", 5)]
    assert (events[-1]["after"]["v"], len(events[-1]["after"]["big"])) == (0, 5000)


def test_a_value_that_the_old_row_tells_is_not_read_again(prepared: Database) -> None:
    prepared.execute("ALTER TABLE thing REPLICA IDENTITY FULL")
    events = within(prepared, after="UPDATE thing SET v = 0 WHERE id = 5")
    assert (events[0]["unchanged"], len(events[0]["after"]["big"])) == ([], 5000)
    assert told(events) == [("update", 5), *(("read", id_) for id_ in (1, 2, 3, 4, 6, 7, 8, 9, 10))]


@pytest.mark.parametrize("ddl", ["", BY_CTID], ids=["by key", "by ctid"])
def test_a_hot_row_does_not_stop_its_table(prepared: Database, monkeypatch: pytest.MonkeyPatch, ddl: str) -> None:
    """It changes again and again, each time while the sink has not taken the chunk before."""
    if ddl:
        prepared.execute(ddl)
    size = chunk.Size(rows=6)  # more rows follow
    monkeypatch.setattr(chunk, "Size", lambda: size)

    class Hot(Snapshot):
        changes = 0

        def _change(self) -> None:
            Hot.changes += 1
            prepared.execute("UPDATE thing SET v = v + 1 WHERE id = 5")

        def _mark(self, *about: Any, high: Window | None = None, low: Window | None = None) -> State | None:
            if high and not self.changes:
                self._change()
            return super()._mark(*about, high=high, low=low)

        def _until(self, event: threading.Event, window: Window) -> None:
            super()._until(event, window)
            if event is window.closed and self.changes < 50:
                self._change()

    with Forward(prepared, snapshot=[THING], loop=Hot) as forward:
        finished(forward, "thing")
        assert Hot.changes < 10
        read = {it["key"]["id"]: it["after"] for it in forward.sink.details if it["op"] == "read"}
        assert len([it for it in forward.sink.details if it["op"] == "read"]) == len(read) == 10, "each of them once"
    assert len(read[5]["big"]) == 5000


def of_key(database: Database, type_: str, value: str) -> None:
    """Five rows whose key is such a value of n, each with a value that is not sent where it stays."""
    prepare(database, f"CREATE TABLE thing (id {type_} PRIMARY KEY, v int, big text)", "thing")
    database.execute("ALTER TABLE thing ALTER big SET STORAGE EXTERNAL; CREATE CAST (bytea AS text) WITHOUT FUNCTION")
    database.execute(f"INSERT INTO thing SELECT {value}, n, repeat('x', 5000) FROM generate_series(1, 5) AS n")
    skip(database)


@pytest.mark.parametrize(
    ("type_", "value"), [("int[]", "ARRAY[n]"), ("jsonb", "to_jsonb('k' || n)"), ("text[]", "ARRAY['a,\"b', n::text]")]
)
def test_a_row_that_is_read_again_is_found_by_any_key(database: Database, type_: str, value: str) -> None:
    of_key(database, type_, value)
    events = within(database, after="UPDATE thing SET v = 0 WHERE v = 3")
    assert [(it["op"], it["after"]["v"]) for it in events] == [
        ("update", 0), ("read", 1), ("read", 2), ("read", 4), ("read", 5), ("read", 0),
    ]  # fmt: skip
    assert len(events[-1]["after"]["big"]) == 5000


def test_a_row_that_is_read_again_by_ctid_where_no_literal_names_it(database: Database) -> None:
    """Its chunk is read once more."""
    of_key(database, "text", "CASE n WHEN 3 THEN '\\x62ff'::bytea::text ELSE n::text END")
    database.execute(BY_CTID)
    events = [json.loads(it.detail) for it in sent(database, after="UPDATE thing SET v = 0 WHERE v = 3").events]
    read = {it["id"]: it["after"] for it in events if it["op"] == "read"}
    assert sorted((it["v"], len(it["big"])) for it in read.values()) == [(v, 5000) for v in (0, 1, 2, 4, 5)]


@pytest.mark.parametrize(("type_", "value"), [("int[]", "ARRAY[n]"), ("jsonb", "to_jsonb('k' || n)")])
def test_a_row_that_is_read_again_by_ctid_is_found_by_its_key(database: Database, type_: str, value: str) -> None:
    of_key(database, type_, value)
    database.execute(BY_CTID)
    events = within(database, after="UPDATE thing SET v = 0 WHERE v = 3")
    assert [it["after"]["v"] for it in events] == [0, 1, 2, 4, 5, 0]


def test_a_row_that_is_to_be_read_again_and_cannot_be_looked_up_fails_the_table(database: Database) -> None:
    of_key(database, "text", "CASE n WHEN 3 THEN '\\x62ff'::bytea::text ELSE n::text END")
    with pytest.raises(AssertionError, match="bytes that are not UTF-8"):
        within(database, after="UPDATE thing SET v = 0 WHERE v = 3")


def test_a_row_that_the_reverse_path_wrote_is_read_again(prepared: Database) -> None:
    """Its own event is dropped, and what the chunk has of it is old."""
    ours = (
        "BEGIN; INSERT INTO figbridge.inbox (source, idempotency_key, payload_hash, event_id) "
        "VALUES ('s', 'k', '', 'e'); UPDATE thing SET v = 0 WHERE id = 3; COMMIT"
    )
    events = within(prepared, after=ours)
    assert told(events) == [*(("read", id_) for id_ in (1, 2, 4, 5, 6, 7, 8, 9, 10)), ("read", 3)]
    assert events[-1]["after"]["v"] == 0


def test_after_a_truncate_nothing_of_the_chunk_leaves(prepared: Database) -> None:
    assert told(within(prepared, after="TRUNCATE thing; INSERT INTO thing VALUES (3, 0)")) == [
        ("truncate", None), ("insert", 3), ("read", 3),
    ]  # fmt: skip


def test_a_changed_schema_voids_the_chunk(prepared: Database) -> None:
    events = within(prepared, after="ALTER TABLE thing ADD more int DEFAULT 7; UPDATE thing SET v = 0 WHERE id = 3")
    assert told(events) == [("update", 3), *(("read", id_) for id_ in range(1, 11))]
    assert all(it["after"]["more"] == 7 for it in events)
    assert len({it["schema_version"] for it in events}) == 1


def test_a_key_that_moves_voids_the_chunk(prepared: Database) -> None:
    """Under REPLICA IDENTITY FULL the stream describes the table as before."""
    prepared.execute("ALTER TABLE thing REPLICA IDENTITY FULL, ALTER v SET NOT NULL")
    moved = "ALTER TABLE thing DROP CONSTRAINT thing_pkey, ADD PRIMARY KEY (v); UPDATE thing SET id = 0 WHERE id = 3"
    events = within(prepared, after=moved)
    assert [(it["op"], it["key"]) for it in events] == [
        ("update", {"v": 3}), *(("read", {"v": number}) for number in range(1, 11)),
    ]  # fmt: skip


def test_a_schema_that_changes_before_the_chunk_is_read(prepared: Database) -> None:
    events = within(prepared, before="ALTER TABLE thing DROP big")
    assert told(events) == [("read", id_) for id_ in range(1, 11)]
    assert list(events[0]["after"]) == ["id", "v"]


def test_a_lost_connection_voids_the_window(prepared: Database) -> None:
    kill = "SELECT pg_terminate_backend(active_pid, 5000) FROM pg_replication_slots WHERE slot_name = '{}'"
    events = within(prepared, after=kill.format(prepared.slot))
    assert told(events) == [("read", id_) for id_ in range(1, 11)]


def test_the_table_vanishes(prepared: Database) -> None:
    with pytest.raises(AssertionError, match="there is no table"):
        within(prepared, before="DROP TABLE thing")


def test_a_commit_that_waits_for_a_standby_is_not_undone(prepared: Database) -> None:
    """It is in the WAL, so its event leaves; and no other session sees it, so a chunk would have the row as it was."""

    class Watching(Snapshot):
        waited = threading.Event()

        def _some(self) -> bool:
            try:
                return super()._some()
            finally:
                self.waited.set()

    def write() -> None:
        prepared.execute("UPDATE thing SET v = 0 WHERE id = 3")

    with _no_standby(prepared) as release, Forward(prepared, snapshot=(), loop=Watching) as forward:
        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        forward.until_events(1)
        assert prepared.execute("SELECT v FROM thing WHERE id = 3") == [(3,)], "the commit did not wait"
        with prepared.connect(options="-c synchronous_commit=local") as session:
            forward.snapshot._progress.want(session, THING)
        until(lambda: states(prepared) == {"thing": "running"}, 10, "the snapshot has begun")
        Watching.waited.clear()
        assert Watching.waited.wait(10), "the loop gave up once, and tries again"
        assert told(forward.sink.details) == [("update", 3)]
        release()
        writer.join(60)
        finished(forward, "thing")
        read = {it["key"]["id"]: it["after"]["v"] for it in forward.sink.details if it["op"] == "read"}
    assert read[3] == 0


class _no_standby:  # noqa: N801 (a context manager)
    """Every commit waits for a standby that is not there; a call of what it yields ends that."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def __enter__(self) -> Callable[[], None]:
        self._set("'nobody'")
        return lambda: self._set("''")

    def __exit__(self, *_: object) -> None:
        self._set("''")

    def _set(self, names: str) -> None:
        self._database.execute(f"ALTER SYSTEM SET synchronous_standby_names = {names}")
        self._database.execute("SELECT pg_reload_conf()")
        shown = "SHOW synchronous_standby_names"
        until(lambda: f"'{self._database.execute(shown)[0][0]}'" == names, 10, "the server has read its configuration")


def test_what_is_broken_off_is_gone_on_with(prepared: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are wider than the chunk before let expect: what came is the chunk."""
    prepared.execute("INSERT INTO thing SELECT n, n, repeat('y', 3000) FROM generate_series(11, 3000) AS n")
    skip(prepared)
    monkeypatch.setattr(chunk, "MOST_BYTES", 100_000)
    assert told(within(prepared)) == [("read", id_) for id_ in range(1, 3001)]


@pytest.fixture
def keyless(database: Database) -> Database:
    prepare(database, "CREATE TABLE thing (id int, v int); ALTER TABLE thing REPLICA IDENTITY FULL;", "thing")
    database.execute("INSERT INTO thing SELECT n, n FROM generate_series(1, 5) AS n")
    skip(database)
    return database


def test_without_a_key_a_row_is_all_that_it_is(keyless: Database) -> None:
    events = within(keyless, after="UPDATE thing SET v = 0 WHERE id = 3; INSERT INTO thing VALUES (6, 6)")
    assert [(it["op"], it["after"]["id"]) for it in events] == [
        ("update", 3), ("insert", 6), ("read", 1), ("read", 2), ("read", 4), ("read", 5),
    ]  # fmt: skip


def test_a_table_that_is_rewritten_is_begun_anew(keyless: Database) -> None:
    keyless.execute("INSERT INTO thing SELECT n, n FROM generate_series(6, 40000) AS n")
    keyless.execute("DELETE FROM thing WHERE id < 100")
    skip(keyless)
    events = within(keyless, after="VACUUM FULL thing")
    assert {it["after"]["id"] for it in events if it["op"] == "read"} == set(range(100, 40001))


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_without_a_key_where_there_are_rules(keyless: Database, rules: dict[str, Any]) -> None:
    statements = "UPDATE thing SET v = 0 WHERE id = 3; DELETE FROM thing WHERE id = 4; INSERT INTO thing VALUES (6, 6)"
    events = within(keyless, rules, after=statements)
    assert [(it["op"], (it["after"] or it["before"])["id"]) for it in events] == [
        ("update", 3), ("delete", 4), ("insert", 6), ("read", 1), ("read", 2), ("read", 5),
    ]  # fmt: skip
