"""A table, its key or the order of its rows becomes another one while it is read: a snapshot of it is begun anew.

Rows in another order may be behind the cursor, and would be read by nobody. They have other ids than those that were
read before, of which a consumer that drops repeated ids has seen some.
"""

import json
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NoReturn

import pytest

from figbridge.forward.snapshot import chunk
from figbridge.forward.snapshot.loop import Snapshot
from figbridge.forward.snapshot.progress import State
from figbridge.forward.snapshot.window import Window
from figbridge.retry import Stopped
from fixtures.clock import until
from fixtures.forward import Forward, HeldSink
from fixtures.postgres import Database
from fixtures.snapshot import finished, prepare, states

THING = ("public", "thing")
FILL = "INSERT INTO thing SELECT n, 101 - n FROM generate_series(1, 100) AS n"
KEYED = f"CREATE TABLE thing (id int CONSTRAINT key PRIMARY KEY, v int NOT NULL); {FILL}"
KEYLESS = f"CREATE TABLE thing (id int, v int) WITH (fillfactor = 10); ALTER TABLE thing REPLICA IDENTITY FULL; {FILL}"
LETTERS = (
    'CREATE TABLE thing (id text COLLATE "C" PRIMARY KEY, v int); '
    "INSERT INTO thing SELECT CASE n % 2 WHEN 0 THEN 'A' ELSE 'a' END || lpad(n::text, 3, '0'), n "
    "FROM generate_series(1, 100) AS n"
)
OTHER = "CREATE TABLE other (LIKE thing INCLUDING ALL); INSERT INTO other SELECT id, v + 1000 FROM thing"
SWAP = "ALTER TABLE thing RENAME TO old; ALTER TABLE other RENAME TO thing"
FULL = "ALTER TABLE other REPLICA IDENTITY FULL"
MADE = f"DROP TABLE thing; {KEYED}; UPDATE thing SET v = -v; ALTER PUBLICATION pub ADD TABLE thing"
DOWN = "CREATE UNIQUE INDEX down ON thing (v DESC); ALTER TABLE thing REPLICA IDENTITY USING INDEX down"

BY_V = "ALTER TABLE thing DROP CONSTRAINT key, ADD PRIMARY KEY (v)"

CHANGES = [
    pytest.param(KEYED, BY_V, id="another key"),
    pytest.param(KEYED, "ALTER TABLE thing ALTER id TYPE text", id="another type"),
    pytest.param(KEYED, "ALTER TABLE thing RENAME id TO nr", id="another name"),
    pytest.param(KEYED, DOWN, id="in the same order by other names"),
    pytest.param(KEYED, "ALTER TABLE thing DROP CONSTRAINT key; ALTER TABLE thing REPLICA IDENTITY FULL", id="no key"),
    pytest.param(KEYLESS, "ALTER TABLE thing ADD PRIMARY KEY (v)", id="a key"),
    pytest.param(f"{KEYED}; {OTHER}", SWAP, id="another table"),
    pytest.param(f"{KEYLESS}; {OTHER}; {FULL}", SWAP, id="another table without a key"),
    pytest.param(KEYED, MADE, id="made anew"),
    pytest.param(LETTERS, 'ALTER TABLE thing ALTER id TYPE text COLLATE "POSIX"', id="another collation"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(chunk.Size):
        def learn(self, _chunk: chunk.Chunk) -> None:
            """The next chunk is as large."""

    monkeypatch.setattr(chunk, "Size", lambda: Small(rows=10))
    monkeypatch.setattr("figbridge.forward.snapshot.plan._BLOCKS", 1)


def prepared(database: Database, ddl: str) -> None:
    prepare(database, ddl, "thing, other" if "TABLE other" in ddl else "thing")
    database.execute("SELECT pg_replication_slot_advance(%s, pg_current_wal_lsn())", [database.slot])


def when(number: int, what: Callable[[], object], *, left: bool = False) -> type[Snapshot]:
    """A loop that does this before the high watermark of a window, or once its chunk has `left`."""

    class Disturbed(Snapshot):
        windows = 0

        def _mark(self, *about: Any, high: Window | None = None, low: Window | None = None) -> State | None:
            type(self).windows += high is not None
            this = high is not None and self.windows == number
            if this and not left:
                what()
            state = super()._mark(*about, high=high, low=low)
            if this and left:
                what()
            return state

    return Disturbed


def end(forward: Forward) -> NoReturn:
    """As near to it as a thread allows; by a loop of its own."""
    forward.supervisor.halt.set()
    forward.supervisor.stop.set()
    raise Stopped


def read(sink: HeldSink) -> list[dict[str, Any]]:
    return [it for it in sink.details if it["op"] == "read"]


def told(database: Database, sink: HeldSink) -> None:
    """Whoever drops repeated ids holds each row of the table, and the last run has told each once."""
    seen = dict[str, dict[str, Any]]()
    runs = defaultdict[int, set[str]](set)
    for detail in read(sink):
        runs[int(detail["id"].split("-")[2])].add(detail["id"])
        seen.setdefault(detail["id"], detail["after"])
    held = {json.dumps(row, sort_keys=True) for row in seen.values()}
    rows = {json.dumps(row, sort_keys=True) for (row,) in database.execute("SELECT to_json(t) FROM thing t")}
    assert len(rows) == 100
    assert not rows - held
    ((run, count),) = database.execute("SELECT run, rows FROM figbridge.snapshot")
    assert (count, len(runs[run])) == (100, 100)
    assert sorted(runs) == [run - 1, run]


@pytest.mark.parametrize(("ddl", "change"), CHANGES)
def test_while_it_is_read(each_database: Database, ddl: str, change: str) -> None:
    prepared(each_database, ddl)
    loop = when(4, lambda: each_database.execute(change))
    with Forward(each_database, snapshot=[THING], loop=loop) as forward:
        finished(forward, "thing")
    told(each_database, forward.sink)


@pytest.mark.parametrize(("ddl", "change"), CHANGES)
def test_while_no_bridge_runs(database: Database, ddl: str, change: str) -> None:
    prepared(database, ddl)
    loop = when(4, lambda: database.execute("UPDATE figbridge.snapshot SET state = 'paused'"))
    with Forward(database, snapshot=[THING], loop=loop) as forward:
        until(lambda: forward.failure or states(database) == {"thing": "paused"}, 20)
    database.execute(f"{change}; UPDATE figbridge.snapshot SET state = 'waiting'")
    with Forward(database, snapshot=[], sink=forward.sink) as again:
        finished(again, "thing")
    told(database, forward.sink)


def test_of_its_first_chunk_nothing_is_noted_yet(database: Database) -> None:
    """It has left, and the process is killed."""
    prepared(database, KEYED)

    def kill() -> None:
        until(lambda: len(read(forward.sink)) == 10, 20, "it has left")
        end(forward)

    with Forward(database, snapshot=[THING], loop=when(1, kill, left=True)) as forward:
        forward.ended()
    database.execute(BY_V)
    with Forward(database, snapshot=[], sink=forward.sink) as again:
        finished(again, "thing")
    told(database, forward.sink)


def test_what_is_repeated_of_the_next_run_has_the_same_ids(database: Database) -> None:
    prepared(database, KEYED)

    class Killed(when(4, lambda: database.execute(BY_V))):  # type: ignore[misc]
        def _mark(self, *about: Any, high: Window | None = None, low: Window | None = None) -> State | None:
            state: State | None = super()._mark(*about, high=high, low=low)
            if high and self.windows == 7:
                until(lambda: len(read(forward.sink)) >= 70, 20, "its chunk has left")
                end(forward)
            return state

    with Forward(database, snapshot=[THING], loop=Killed) as forward:
        forward.ended()
    first = {it["id"]: it["after"] for it in read(forward.sink)}
    with Forward(database, snapshot=[]) as again:
        finished(again, "thing")
    repeated = {it["id"]: it["after"] for it in read(again.sink) if it["id"] in first}
    assert repeated
    assert repeated == {id_: first[id_] for id_ in repeated}
    forward.sink.events += again.sink.events
    told(database, forward.sink)
