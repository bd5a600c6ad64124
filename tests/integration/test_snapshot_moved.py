"""A row whose key changes while its table is read, from ahead of the cursor to behind it, without its large value.

The events say that the value was left alone, and no chunk comes by the row: it is read by its new key at the end.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from figbridge.config import HashSection, SelectSection
from figbridge.forward.snapshot import chunk, moved
from figbridge.forward.snapshot.loop import Snapshot
from figbridge.forward.snapshot.progress import Progress, State
from figbridge.forward.snapshot.window import Window
from fixtures.clock import until
from fixtures.forward import Forward, HeldSink
from fixtures.postgres import Database
from fixtures.snapshot import applied, differences, finished, prepare, states

# chunks have 10 rows: 1 to 10, 11 to 20, 21 to 30
DDL = """
CREATE TABLE thing (id int PRIMARY KEY, v int, big text);
ALTER TABLE thing ALTER big SET STORAGE EXTERNAL;
INSERT INTO thing SELECT n, n, CASE WHEN n > 20 THEN repeat(chr(64 + n), 5000) END FROM generate_series(1, 30) AS n;
"""
THING = ("public", "thing")
RULES: list[dict[str, Any]] = [{"mask": ["v"]}, {"hash": ["v"]}, {"truncate": {"v": 1}}, {"where": "v != `100`"}]
MOVE = "UPDATE thing SET id = -id WHERE id = 25"
Place = tuple[str, int]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(chunk.Size):
        def learn(self, _chunk: chunk.Chunk) -> None:
            """The next chunk is as large."""

    monkeypatch.setattr(chunk, "Size", lambda: Small(rows=10))


def skip(database: Database) -> None:
    """What is in the tables is told by no stream."""
    database.execute("SELECT pg_replication_slot_advance(%s, pg_current_wal_lsn())", [database.slot])


@pytest.fixture
def prepared(database: Database) -> Database:
    prepare(database, DDL, "thing")
    skip(database)
    return database


def at(database: Database, todo: Mapping[Place, str | Callable[[], object]]) -> type[Snapshot]:
    """A loop that does this in a window. They count from 1, and what is at 0 is done in each.

    ``low``: between its low watermark and its chunk; ``high``: between that and the high watermark; ``closed``: behind.
    """

    class Disturbed(Snapshot):
        windows = 0

        def _at(self, place: str) -> None:
            for number in (0, self.windows):
                what = todo.get((place, number), bool)
                database.execute(what) if isinstance(what, str) else what()

        def _until(self, event: threading.Event, window: Window) -> None:
            super()._until(event, window)
            if event is window.low_met:
                type(self).windows += 1
            self._at("low" if event is window.low_met else "closed")

        def _mark(self, *about: Any, high: Window | None = None, low: Window | None = None) -> State | None:
            if high:
                self._at("high")
            return super()._mark(*about, high=high, low=low)

    return Disturbed


def noted(database: Database) -> list[Any]:
    return [key for (key,) in database.execute("SELECT key FROM figbridge.snapshot_moved ORDER BY commit_lsn, ordinal")]


def whole(database: Database, sink: HeldSink) -> list[dict[str, Any]]:
    """The events, by which a consumer holds the table; nothing is left over."""
    wrong = differences(database, applied(["thing"], sink.details), schema="public")
    assert not wrong, "\n".join(wrong)
    assert noted(database) == []
    return sink.details


def told(database: Database, todo: Mapping[Place, str | Callable[[], object]]) -> list[dict[str, Any]]:
    """The events of a snapshot meanwhile."""
    with Forward(database, snapshot=[THING], loop=at(database, todo)) as forward:
        finished(forward, "thing")
    return whole(database, forward.sink)


def reads(details: list[dict[str, Any]], id_: int) -> list[dict[str, Any]]:
    return [it for it in details if it["op"] == "read" and it["key"] == {"id": id_}]


@pytest.mark.parametrize("place", [(place, number) for place in ("low", "high", "closed") for number in (1, 2)])
def test_it_is_read_at_the_end(prepared: Database, place: Place) -> None:
    details = told(prepared, {place: MOVE})
    (update,) = [it for it in details if it["op"] == "update"]
    assert (update["before"], update["key"], update["unchanged"]) == ({"id": 25}, {"id": -25}, ["big"])
    assert details[-1]["key"] == {"id": -25}
    assert details[-1]["after"]["big"] == "Y" * 5000
    # its id is no other read's: it has the LSN of the update
    high, low = update["position"]["commit_lsn"].split("/")
    assert details[-1]["id"].endswith(f"-{int(high, 16) << 32 | int(low, 16):016X}--25")


@pytest.mark.parametrize("place", ["low", "high", "closed"])
def test_out_of_the_chunk_that_is_read(prepared: Database, place: str) -> None:
    """Its old key was in the window, or on its way; its new one was not."""
    told(prepared, {(place, 3): MOVE})


def test_every_version(each_database: Database) -> None:
    prepare(each_database, DDL, "thing")
    skip(each_database)
    told(each_database, {("high", 2): MOVE})


@pytest.mark.parametrize("place", ["low", "high", "closed"])
def test_into_the_filter_of_the_publication(prepared: Database, place: str) -> None:
    """The server sends an INSERT, without the value that the update left alone."""
    prepared.execute("DROP PUBLICATION pub; CREATE PUBLICATION pub FOR TABLE thing WHERE (id <> 25)")
    skip(prepared)
    details = told(prepared, {(place, 2): MOVE})
    (insert,) = [it for it in details if it["op"] == "insert"]
    assert (insert["key"], insert["unchanged"]) == ({"id": -25}, ["big"])
    assert reads(details, -25) == [details[-1]]


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_where_there_are_rules(prepared: Database, rules: dict[str, Any]) -> None:
    select = [SelectSection.model_validate({"table": "public.thing", **rules})]
    hashing = HashSection.model_validate({"key": "correct horse battery"})
    loop = at(prepared, {("high", 2): MOVE})
    with Forward(prepared, snapshot=[THING], loop=loop, select=select, hashing=hashing) as forward:
        finished(forward, "thing")
    assert [it["after"]["big"] for it in reads(forward.sink.details, -25)] == ["Y" * 5000]
    assert noted(prepared) == []


def paused(database: Database) -> Callable[[], object]:
    def pause() -> None:
        with database.connect() as connection:
            assert Progress(database.slot).order(connection, THING, "paused", ["running"])

    return pause


def resume(database: Database) -> None:
    with database.connect() as connection:
        assert Progress(database.slot).order(connection, THING, "waiting", ["paused"])


def test_while_it_is_paused(prepared: Database) -> None:
    with Forward(prepared, snapshot=[THING], loop=at(prepared, {("high", 2): paused(prepared)})) as forward:
        until(lambda: forward.failure or states(prepared) == {"thing": "paused"}, 20, "it was paused")
        prepared.execute(MOVE)
        until(lambda: noted(prepared) == [{"id": "-25"}], 20, "it is noted")
        resume(prepared)
        finished(forward, "thing")
    whole(prepared, forward.sink)


@pytest.mark.parametrize("streams", [True, False], ids=["while it streams", "while nobody streams"])
def test_the_process_is_killed_before_it_is_read(prepared: Database, *, streams: bool) -> None:
    """The event is acknowledged and never comes again; or it comes to a process that has not looked at a task yet."""
    sink = HeldSink()
    with Forward(prepared, snapshot=[THING], sink=sink, loop=at(prepared, {("high", 2): paused(prepared)})) as forward:
        until(lambda: forward.failure or states(prepared) == {"thing": "paused"}, 20, "it was paused")
        if streams:
            prepared.execute(MOVE)
            end = forward.wal_end()
            until(lambda: forward.confirmed() >= end, 20, "its event is acknowledged")
        forward.halt()
    if not streams:
        prepared.execute(MOVE)
    with Forward(prepared, snapshot=[], sink=sink) as forward:
        until(lambda: noted(prepared) == [{"id": "-25"}], 20, "it is noted")
        resume(prepared)
        finished(forward, "thing")
    whole(prepared, sink)


@pytest.mark.parametrize("place", ["low", "high", "closed"])
def test_a_kill_while_it_is_read(prepared: Database, place: str) -> None:
    """The fourth window is that of the row that has moved."""
    sink, die = HeldSink(), threading.Event()
    loop = at(prepared, {("high", 2): MOVE, (place, 4): die.set})
    with Forward(prepared, snapshot=[THING], sink=sink, loop=loop) as forward:
        until(die.is_set, 20, "it is being read")
        forward.halt()
    with Forward(prepared, snapshot=[THING], sink=sink) as forward:
        finished(forward, "thing")
    details = whole(prepared, sink)
    assert len({it["id"] for it in reads(details, -25)}) == 1, "what is repeated has the id that it had"


def test_it_moves_again_and_again(prepared: Database) -> None:
    """Also within the windows in which it is looked up, before and after its chunk is read."""
    on = "UPDATE thing SET id = id - 100 WHERE id < 0"
    details = told(prepared, {
        ("high", 1): MOVE, ("high", 2): on, ("closed", 3): on, ("low", 4): on, ("high", 5): on,
    })  # fmt: skip
    assert {it["key"]["id"] for it in details if it["op"] == "update"} == {-25, -125, -225, -325, -425}
    assert len(reads(details, -425)) == 1


def test_a_row_that_changes_while_it_is_looked_up(prepared: Database) -> None:
    told(prepared, {
        ("high", 1): MOVE,
        ("high", 4): "UPDATE thing SET v = 0 WHERE id = -25",
    })  # fmt: skip


def test_it_ends_while_other_rows_move_for_ever(prepared: Database) -> None:
    """They are known whole by then; the one that is not is followed."""
    count = iter(range(100))

    def moves() -> None:
        """From key to key, in one place and the other, so in each window."""
        if windows.windows > 3:
            assert next(count) < 50, "it does not end"
            prepared.execute("UPDATE thing SET id = id + 100 WHERE id % 100 IN (22, 23, 24) AND id > 0")

    windows: Any = at(prepared, {
        ("high", 1): MOVE, ("low", 0): moves, ("high", 0): moves,
        ("closed", 3): "UPDATE thing SET id = -26 WHERE id = 26",
        ("closed", 4): "UPDATE thing SET id = -27 WHERE id = 27",
    })  # fmt: skip
    with Forward(prepared, snapshot=[THING], loop=windows) as forward:
        finished(forward, "thing")
        end = forward.wal_end()
        until(lambda: forward.confirmed() >= end, 20, "all has left")
    details = whole(prepared, forward.sink)
    assert len(reads(details, -25)) == 1
    assert not reads(details, -27), "it was known whole"


def test_its_read_is_not_taken_for_that_of_another_row(prepared: Database) -> None:
    """Which had its key, and has been read by it."""
    taken = "DELETE FROM thing WHERE id = 5; UPDATE thing SET id = 5 WHERE id = 25"
    one, other = reads(told(prepared, {("high", 2): taken}), 5)
    assert one["id"] != other["id"]
    assert (one["after"]["v"], other["after"]["v"]) == (5, 25)


def test_one_key_after_the_other_is_taken(prepared: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second row comes to the key of the first when that has been looked up; they are looked up one by one."""
    monkeypatch.setattr(moved, "_MOST", 1)

    def take() -> None:
        (first,), (second,) = prepared.execute("SELECT key ->> 'id' FROM figbridge.snapshot_moved ORDER BY name")
        prepared.execute(f"DELETE FROM thing WHERE id = {first}; UPDATE thing SET id = {first} WHERE id = {second}")

    details = told(prepared, {
        ("high", 1): "UPDATE thing SET id = -id WHERE id IN (25, 26)",
        ("closed", 4): take,
    })  # fmt: skip
    assert len({it["id"] for it in details if it["op"] == "read" and it["key"]["id"] < 0}) == 2


def test_large_rows_are_read_by_and_by(prepared: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared.execute("UPDATE thing SET big = repeat('x', 200000) WHERE id > 20")  # more than arrives at once
    skip(prepared)
    monkeypatch.setattr(chunk, "MOST_BYTES", 100_000)
    details = told(prepared, {("high", 1): "UPDATE thing SET id = -id WHERE id > 20"})
    found = [it["position"]["commit_lsn"] for it in details if it["op"] == "read" and it["key"]["id"] < 0]
    assert len(found) == 10
    assert len(set(found)) > 2, "in more windows than one"


def test_a_table_is_walked_by_the_key_that_events_have(prepared: Database) -> None:
    """By another one a row may pass the cursor without an event that says so; of several columns, one of them large."""
    prepared.execute("""
        ALTER TABLE thing ADD code text NOT NULL DEFAULT repeat('x', 2100), ADD part int;
        UPDATE thing SET part = id; ALTER TABLE thing ALTER part SET NOT NULL, ALTER code SET STORAGE EXTERNAL;
        CREATE UNIQUE INDEX code ON thing (part, code); ALTER TABLE thing REPLICA IDENTITY USING INDEX code
    """)
    skip(prepared)
    details = told(prepared, {
        ("high", 1): "UPDATE thing SET id = -id WHERE part = 25",
        ("low", 2): "UPDATE thing SET part = -part WHERE part = 26",
    })  # fmt: skip
    assert [it["after"]["part"] for it in details if it["op"] == "read"] == [*range(1, 26), *range(27, 31), -26]
    assert [it["after"]["id"] for it in details if it["op"] == "read"][24] == -25


def test_a_truncate_while_they_are_looked_up(prepared: Database) -> None:
    told(prepared, {
        ("high", 1): MOVE,
        ("high", 4): "TRUNCATE thing; INSERT INTO thing VALUES (-25, 0, 'new')",
    })  # fmt: skip


def test_the_key_becomes_another_one(prepared: Database) -> None:
    """The table is begun anew, and what was noted by the old key is forgotten."""
    loop = at(prepared, {
        ("high", 2): MOVE,
        ("high", 4): lambda: prepared.execute(
            "ALTER TABLE thing DROP CONSTRAINT thing_pkey, ALTER v SET NOT NULL, ADD PRIMARY KEY (v); "
            "UPDATE thing SET v = 0 WHERE id = -25"
        ),
    })  # fmt: skip
    with Forward(prepared, snapshot=[THING], loop=loop) as forward:
        finished(forward, "thing")
    held = applied(["thing"], [it for it in forward.sink.details if "v" in (it["key"] or {})])
    assert not differences(prepared, held, schema="public")
    assert noted(prepared) == []


@pytest.mark.parametrize("end", ["cancelled", "failed"])
def test_what_has_ended_leaves_nothing(prepared: Database, end: State) -> None:
    with Forward(prepared, snapshot=[THING], loop=at(prepared, {("high", 2): paused(prepared)})) as forward:
        until(lambda: forward.failure or states(prepared) == {"thing": "paused"}, 20, "it was paused")
        prepared.execute(MOVE)
        until(lambda: noted(prepared) == [{"id": "-25"}], 20, "it is noted")
        with prepared.connect() as connection:
            progress = Progress(prepared.slot)
            if end == "cancelled":
                assert progress.order(connection, THING, "cancelled", ["paused"])
            else:
                resume(prepared)
                (task,) = progress.tasks(connection)
                assert progress.fail(connection, task, "of no reason")
            assert noted(prepared) == []
            prepared.execute("UPDATE thing SET id = -26 WHERE id = 26")
            end_ = forward.wal_end()
            until(lambda: forward.confirmed() >= end_, 20, "its event is acknowledged")
            assert noted(prepared) == []
            assert progress.want(connection, THING)
        finished(forward, "thing")
    whole(prepared, forward.sink)


def test_nothing_is_noted_without_a_snapshot(prepared: Database) -> None:
    with Forward(prepared, snapshot=[]) as forward:
        prepared.execute(MOVE)
        forward.until_events(1)
        end = forward.wal_end()
        until(lambda: forward.confirmed() >= end, 20, "its event is acknowledged")
    assert noted(prepared) == []
