"""A snapshot as a guest: what it needs, what it holds while it waits, where it goes on, and when it begins again."""

import threading
from typing import Any

import pytest

from figbridge import provision
from figbridge.forward.snapshot import chunk
from figbridge.forward.snapshot.loop import Snapshot
from figbridge.forward.snapshot.politeness import Pace
from fixtures.checked import config_of, role
from fixtures.clock import until
from fixtures.forward import Forward, HeldSink
from fixtures.postgres import Database
from fixtures.snapshot import finished, prepare, states

DDL = """
CREATE TABLE thing (id int PRIMARY KEY, v int UNIQUE NOT NULL); CREATE TABLE other (id int PRIMARY KEY);
INSERT INTO thing SELECT n, -n FROM generate_series(1, 10) AS n; INSERT INTO other VALUES (1);
"""
THING, OTHER = ("public", "thing"), ("public", "other")


@pytest.fixture
def prepared(database: Database) -> Database:
    prepare(database, DDL, "thing", "other")
    skip(database)
    return database


def skip(database: Database) -> None:
    database.execute("SELECT pg_replication_slot_advance(%s, pg_current_wal_lsn())", [database.slot])


def read(forward: Forward, table: str = "thing") -> list[int]:
    return [it["after"]["id"] for it in forward.sink.details if it["op"] == "read" and it["table"] == table]


def test_a_role_that_may_write_to_no_table_but_its_own_is_enough(prepared: Database) -> None:
    with role(prepared) as (name, dsn):
        prepared.execute(
            f"GRANT USAGE ON SCHEMA public, figbridge TO {name}; GRANT SELECT ON thing TO {name}; "
            f"GRANT SELECT, INSERT, UPDATE ON figbridge.snapshot TO {name}; "
            f"GRANT SELECT, INSERT, UPDATE, DELETE ON figbridge.snapshot_moved TO {name}"
        )
        with Forward(prepared, dsn=dsn, snapshot=[THING]) as forward:
            finished(forward, "thing")
            assert read(forward) == [*range(1, 11)]


def test_nothing_is_held_open_while_a_chunk_waits_for_the_sink(prepared: Database) -> None:
    """No transaction, so no xmin, and no lock."""
    prepared.execute("INSERT INTO thing SELECT n, -n FROM generate_series(11, 9000) AS n")
    skip(prepared)
    sink = HeldSink()
    sink.open.clear()
    query = (
        "SELECT state, xact_start, backend_xmin FROM pg_stat_activity "
        "WHERE application_name = 'figbridge-snapshot' AND datname = current_database()"
    )
    with Forward(prepared, snapshot=[THING], sink=sink) as forward:
        until(lambda: sink.refused, 20, "a chunk is on its way")
        until(lambda: prepared.execute(query) == [("idle", None, None)], 20, lambda: f"{prepared.execute(query)}")
        prepared.execute("ALTER TABLE thing ADD more int")  # takes the one lock that a SELECT's is in the way of
        sink.open.set()
        finished(forward, "thing")
        assert sorted(set(read(forward))) == [*range(1, 9001)]


def test_a_lock_that_is_not_granted_is_given_up_and_asked_for_later(prepared: Database) -> None:
    """Who waits for a lock makes others wait behind it."""
    message = "SELECT message FROM figbridge.snapshot"
    with prepared.connect() as theirs, Forward(prepared, snapshot=[THING]) as forward:
        with theirs.transaction():
            theirs.execute("LOCK TABLE thing IN ACCESS EXCLUSIVE MODE")
            until(lambda: "lock timeout" in str(prepared.execute(message)), 20, lambda: f"{prepared.execute(message)}")
            assert not read(forward)
        finished(forward, "thing")
        assert read(forward) == [*range(1, 11)]


def test_a_lock_on_another_table_of_the_publication_is_nothing_to_it(each_database: Database) -> None:
    """Neither before a table is taken up nor before a chunk; with a row filter, whose text only the server can say."""
    prepare(each_database, DDL, "thing WHERE (id > 5)" if each_database.version >= 15 else "thing", "other")
    skip(each_database)
    with each_database.connect() as theirs, Forward(each_database, snapshot=[THING]) as forward, theirs.transaction():
        theirs.execute("LOCK TABLE other IN ACCESS EXCLUSIVE MODE")
        finished(forward, "thing")
        assert read(forward) == [*range(6 if each_database.version >= 15 else 1, 11)]
    assert each_database.execute("SELECT message FROM figbridge.snapshot") == [(None,)]


def test_a_table_that_is_locked_lets_the_tables_behind_it_go_first(prepared: Database) -> None:
    with prepared.connect() as theirs, Forward(prepared, snapshot=[OTHER, THING]) as forward:
        with theirs.transaction():
            theirs.execute("LOCK TABLE other IN ACCESS EXCLUSIVE MODE")
            finished(forward, "thing")
            assert states(prepared) == {"other": "running", "thing": "done"}
        finished(forward, "other")
        assert (read(forward, "other"), read(forward)) == ([1], [*range(1, 11)])


def test_a_chunk_whose_reading_takes_long_is_broken_off(prepared: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """What came by then is the chunk."""
    prepared.execute("INSERT INTO thing SELECT n, -n FROM generate_series(11, 3000) AS n")
    skip(prepared)
    monkeypatch.setattr(chunk, "_SECONDS", 0.0)
    with Forward(prepared, snapshot=[THING]) as forward:
        finished(forward, "thing")
        assert read(forward) == [*range(1, 3001)]
        assert len({it["position"]["commit_lsn"] for it in forward.sink.details}) > 1


def test_tables_are_read_side_by_side(prepared: Database) -> None:
    sink, stop = HeldSink(), threading.Event()
    sink.open.clear()
    with Forward(prepared, snapshot=[THING, OTHER], sink=sink) as forward:
        second = Snapshot(forward.snapshot._bridge, Pace(forward.metrics), number=2)
        thread = threading.Thread(target=second.run, args=[stop], daemon=True)
        thread.start()
        until(lambda: states(prepared) == {"thing": "running", "other": "running"}, 20, lambda: f"{states(prepared)}")
        sink.open.set()
        finished(forward, "thing", "other")
        stop.set()
        thread.join(20)
        assert (read(forward), read(forward, "other")) == ([*range(1, 11)], [1])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("", range(6, 11)),
        ("""UPDATE figbridge.snapshot SET cursor = '{"columns": ["id"], "key": ["5"]}'""", range(1, 11)),  # of old
        ("ALTER TABLE thing DROP CONSTRAINT thing_pkey, ADD PRIMARY KEY (v)", range(10, 0, -1)),  # by v
        ("ALTER TABLE thing ADD more int", range(6, 11)),
    ],
)
def test_it_goes_on_behind_the_cursor_unless_the_key_has_changed(
    prepared: Database, change: str, expected: range
) -> None:
    with Forward(prepared, snapshot=[THING]) as forward:
        finished(forward, "thing")
    prepared.execute(
        """UPDATE figbridge.snapshot SET state = 'running', cursor = jsonb_set(cursor::jsonb, '{key}', '["5"]')"""
    )
    prepared.execute(change or "SELECT")
    with Forward(prepared, snapshot=()) as forward:
        finished(forward, "thing")
        assert read(forward) == [*expected]


@pytest.mark.parametrize(("setting", "again"), [("initial", 0), ("when-needed", 3)])
def test_after_init_has_made_the_slot_anew(database: Database, setting: str, again: int) -> None:
    database.execute("CREATE TABLE thing (id int PRIMARY KEY); INSERT INTO thing SELECT generate_series(1, 3)")
    forward: dict[str, Any] = {"sink": {"type": "stdout"}, "snapshot": setting}
    config = config_of(database.dsn, "public.thing", slot=database.slot, forward=forward)
    reads, active = [], "SELECT active FROM pg_replication_slots WHERE slot_name = %s"
    for _ in range(2):
        provision.initialise(config)
        with Forward(database, "figbridge", snapshot=config.snapshot_tables) as running:
            finished(running, "thing")
            reads.append(len(read(running)))
        until(lambda: database.execute(active, [database.slot]) == [(False,)], 20, "nobody reads the slot any more")
        database.execute("SELECT pg_drop_replication_slot(%s)", [database.slot])
    assert reads == [3, again]


@pytest.mark.parametrize("by", ["init", "script"])
def test_what_init_forgets_takes_along_what_was_still_to_be_read(database: Database, by: str) -> None:
    """The part of one slot, and no other."""
    database.execute("CREATE TABLE thing (id int PRIMARY KEY)")
    forward: dict[str, Any] = {"sink": {"type": "stdout"}, "snapshot": "initial"}
    config = config_of(database.dsn, "public.thing", slot=database.slot, forward=forward)
    provision.initialise(config)
    database.execute("SELECT pg_drop_replication_slot(%s)", [database.slot])
    for slot in (database.slot, "other"):
        about = "%s, (SELECT system_identifier::text FROM pg_control_system()), 'public', 'thing'"
        database.execute(
            "INSERT INTO figbridge.snapshot (slot, system_identifier, schema_name, table_name, run, state) "
            f"VALUES ({about}, 1, 'paused')",
            [slot],
        )
        database.execute(
            f"""INSERT INTO figbridge.snapshot_moved VALUES ({about}, 'a', '{{"id": "1"}}', '0/1', 0)""", [slot]
        )
    if by == "init":
        provision.initialise(config)
    else:
        database.execute(provision.script(config))
    for table in ("snapshot", "snapshot_moved"):
        assert database.execute(f"SELECT slot FROM figbridge.{table}") == [("other",)]
