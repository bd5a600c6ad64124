"""Whatever changes while a snapshot runs, and whenever the process dies: the events in order are the tables.

Hypothesis writes the workload and the places where it strikes: before a chunk is read, between that and its high
watermark, and behind it, while its rows are on their way. Processes end as near to a kill as a thread can
(`Forward.halt`; tests/acceptance/test_snapshot.py has kill -9, and writers that know nothing of windows).
"""

import itertools
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from figbridge.forward.snapshot import chunk, loop
from figbridge.forward.snapshot.loop import Snapshot
from figbridge.forward.snapshot.progress import State
from figbridge.forward.snapshot.window import Window
from fixtures.clock import until
from fixtures.forward import Forward, HeldSink
from fixtures.postgres import Database
from fixtures.snapshot import applied, differences, finished, prepare

TABLES = ("number", "word", "keyless", "part", "wide", "single", "empty")
DDL = """
CREATE TABLE number (id int PRIMARY KEY, v int);
CREATE TABLE word (a text COLLATE "C", b uuid, v int, PRIMARY KEY (a, b));
CREATE TABLE keyless (id int, v int); ALTER TABLE keyless REPLICA IDENTITY FULL;
CREATE TABLE part (id int, region int, v int, PRIMARY KEY (id, region)) PARTITION BY LIST (region);
CREATE TABLE part_0 PARTITION OF part FOR VALUES IN (0);
CREATE TABLE part_1 PARTITION OF part FOR VALUES IN (1);
CREATE TABLE wide (id int PRIMARY KEY, v int, big text); ALTER TABLE wide ALTER big SET STORAGE EXTERNAL;
CREATE TABLE single (id int PRIMARY KEY, v int);
CREATE TABLE empty (id int PRIMARY KEY, v int);
"""
# keys with gaps (n * 7), and a hot end (the largest)
ROWS = """
TRUNCATE number, word, keyless, part, wide, single, empty;
INSERT INTO number SELECT n * 7, n FROM generate_series(1, 150) AS n;
INSERT INTO word SELECT 'k' || n % 9, md5(n::text)::uuid, n FROM generate_series(1, 90) AS n;
INSERT INTO keyless SELECT n, n FROM generate_series(1, 90) AS n;
INSERT INTO part SELECT n, n % 2, n FROM generate_series(1, 90) AS n;
INSERT INTO wide SELECT n, n, repeat(n::text, 2500) FROM generate_series(1, 60) AS n;
INSERT INTO single VALUES (1, 1);
"""
# %(n)s is drawn, %(v)s never comes twice
STATEMENTS = {
    "number": [
        "INSERT INTO number VALUES (%(n)s, %(v)s) ON CONFLICT (id) DO UPDATE SET v = %(v)s",
        "UPDATE number SET v = %(v)s WHERE id %% 10 = %(n)s %% 10",
        "UPDATE number SET v = %(v)s WHERE id = (SELECT max(id) FROM number)",
        "INSERT INTO number SELECT coalesce(max(id), 0) + 1, %(v)s FROM number",
        "UPDATE number SET id = -id, v = %(v)s WHERE id %% 20 = %(n)s %% 20",
        "DELETE FROM number WHERE id %% 30 = %(n)s %% 30",
        "TRUNCATE number",
    ],
    "word": [
        "UPDATE word SET v = %(v)s WHERE v %% 7 = %(n)s %% 7",
        "UPDATE word SET a = 'm' || %(n)s, v = %(v)s WHERE v %% 20 = %(n)s %% 20",
        "DELETE FROM word WHERE v %% 30 = %(n)s %% 30",
        "TRUNCATE word",
    ],
    "keyless": [
        "INSERT INTO keyless VALUES (%(n)s, %(v)s)",
        "UPDATE keyless SET v = %(v)s WHERE ctid = (SELECT min(ctid) FROM keyless WHERE id > %(n)s %% 90)",
        "DELETE FROM keyless WHERE id %% 30 = %(n)s %% 30",
        "TRUNCATE keyless",
    ],
    "part": [
        "UPDATE part SET v = %(v)s WHERE id %% 10 = %(n)s %% 10",
        "UPDATE part SET region = 1 - region, v = %(v)s WHERE id %% 20 = %(n)s %% 20",
        "DELETE FROM part WHERE id %% 30 = %(n)s %% 30",
        "TRUNCATE part",
    ],
    "wide": [
        "UPDATE wide SET v = %(v)s WHERE id %% 10 = %(n)s %% 10",
        "UPDATE wide SET v = %(v)s, big = repeat('y', 6000) WHERE id %% 20 = %(n)s %% 20",
        "UPDATE wide SET id = -id, v = %(v)s WHERE id %% 20 = %(n)s %% 20",
        "UPDATE wide SET id = -id, v = %(v)s, big = repeat(%(v)s::text, 2500) WHERE id %% 20 = %(n)s %% 20",
        "TRUNCATE wide",
    ],
    "single": ["UPDATE single SET v = %(v)s", "DELETE FROM single", "TRUNCATE single"],
    "empty": ["INSERT INTO empty VALUES (%(n)s %% 5, %(v)s) ON CONFLICT (id) DO UPDATE SET v = %(v)s"],
}
_NUMBERS = itertools.count(1000)
# at each place: nothing, the end of the process, or a statement about the table that is read
STEPS = st.lists(
    st.one_of(st.none(), *[st.tuples(st.integers(0, 6), st.integers(0, 1000))] * 4, st.just("die")),
    min_size=20, max_size=90,
)  # fmt: skip


class ScriptFailed(Exception):
    """A statement of this file is wrong. Not psycopg's error: the loop would book that as its table's failure."""


class Script:
    """The steps, which the snapshot loop takes as it comes by the places."""

    def __init__(self, database: Database, steps: Sequence[Any]) -> None:
        self._database, self._steps = database, deque(steps)
        self.die = threading.Event()

    def next(self, table: str) -> None:
        step = self._steps.popleft() if self._steps else None
        if step == "die":
            self.die.set()
        elif step:
            which, number = step
            statement = STATEMENTS[table][which % len(STATEMENTS[table])]
            try:
                self._database.execute(statement, {"n": number, "v": next(_NUMBERS)})
            except psycopg.errors.UniqueViolation:
                pass  # a key that changes into one that is there: the WAL has a transaction that was rolled back
            except psycopg.Error as error:
                raise ScriptFailed(f"{statement}: {error}") from error


def disturbed(script: Script) -> type[Snapshot]:
    class Disturbed(Snapshot):
        def _mark(self, *about: Any, high: Window | None = None, low: Window | None = None) -> State | None:
            if high:
                script.next(high.layout.table.relation.name)  # the chunk is read
            state = super()._mark(*about, high=high, low=low)
            if high:
                script.next(high.layout.table.relation.name)  # its window is closed, as the stream has it
            return state

        def _until(self, event: threading.Event, window: Window) -> None:
            super()._until(event, window)
            if event is window.low_met:
                script.next(window.layout.table.relation.name)

    return Disturbed


@pytest.fixture
def prepared(database: Database) -> Database:
    prepare(database, DDL, *TABLES)
    return database


@pytest.mark.slow
@pytest.mark.timeout(400)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS, st.sampled_from([800, 4000, 1 << 20]))
@example([(4, 7), (0, 7), (4, 7)], 1 << 20)  # 7 becomes -7, 7 comes again, and cannot become -7
@example([(6, 0), (3, 0), (2, 0)], 1 << 20)  # the hot end of a table that was truncated
def test_the_events_in_order_are_the_tables(
    prepared: Database, monkeypatch: pytest.MonkeyPatch, steps: Sequence[Any], size: int
) -> None:
    active = "SELECT active FROM pg_replication_slots WHERE slot_name = %s"
    until(lambda: prepared.execute(active, [prepared.slot]) == [(False,)], 20, "the last example let the slot go")
    prepared.execute(ROWS)
    prepared.execute("DELETE FROM figbridge.snapshot")
    prepared.execute("SELECT pg_replication_slot_advance(%s, pg_current_wal_lsn())", [prepared.slot])
    monkeypatch.setattr(chunk, "MOST_BYTES", size)
    monkeypatch.setattr(loop, "_LOOK", 0.02)  # for the stream, which is not there yet when a process starts
    sink, script = HeldSink(), Script(prepared, steps)
    tables = [("public", table) for table in TABLES]
    died = True
    while died:
        script.die.clear()
        with Forward(prepared, sink=sink, snapshot=tables, loop=disturbed(script)) as forward:
            finished(forward, *TABLES, timeout=60, or_=script.die.is_set)
            died = script.die.is_set()
            if died:
                forward.halt()
            else:
                _drained(forward)
    wrong = differences(prepared, applied(TABLES, sink.details), schema="public")
    assert not wrong, "\n".join(wrong)


def _drained(forward: Forward) -> None:
    end = forward.wal_end()
    until(lambda: forward.confirmed() >= end, 20, "the slot confirmed to the end")
