"""forward.on-slot-loss: recreate-and-backfill: whatever befalls the slot, consumers end with the rows of the tables."""

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psycopg
import pytest

from figbridge.demo.postgres import EmbeddedPostgres, installations
from fixtures.backfilled import POLICY, Scene
from fixtures.bridge import Bridge
from fixtures.clock import until
from fixtures.postgres import Database

SEGMENT = "SELECT pg_logical_emit_message(false, 'noise', 'x'), pg_switch_wal()"
RECREATED = "figbridge_forward_slot_recreated_total"


@contextlib.contextmanager
def told(scene: Scene) -> Iterator[Bridge]:
    """The bridge runs, and consumers know the tables."""
    with scene.bridge as bridge:
        bridge.until_ready()
        scene.until_told()
        scene.prove()
        yield bridge


def _recreated(bridge: Bridge, times: int) -> bool:
    return bridge.metric(RECREATED) == times


def _beyond(database: Database, query: str, least: int) -> bool:
    return database.execute(query) > [(least,)]


def finish(scene: Scene) -> None:
    scene.until_told()
    assert scene.bridge.terminate() == 0, scene.bridge.log[-3000:]
    scene.prove()


def test_a_slot_that_is_dropped_while_the_bridge_is_down(each_database: Database, tmp_path: Path) -> None:
    scene = Scene(each_database, tmp_path)
    with told(scene) as bridge:
        assert bridge.terminate() == 0
        scene.drop_slot()
        scene.gap(1)
        assert "the bridge will make it anew and read every table again" in scene.command("check")
        bridge.start()
        bridge.until_ready()
        assert bridge.metric(RECREATED) == 1
        scene.gap(5, beside=True)
        finish(scene)
    started, finished = scene.backfills()
    assert (started["op"], finished["op"]) == ("backfill.started", "backfill.finished")
    assert (started["run"], started["since"]) == (finished["run"], finished["since"])
    assert "does not exist" in started["reason"]
    assert started["key"] is None
    assert len(scene.backfills("keyless")) == 2
    assert "the slot is lost: changes are in no event" in scene.bridge.log


def test_a_slot_that_is_dropped_while_the_bridge_runs(database: Database, tmp_path: Path) -> None:
    scene = Scene(database, tmp_path)
    with told(scene) as bridge:
        for number in (1, 5):
            with bridge.frozen():  # or it would be back before anything is missing
                scene.drop_slot()
                scene.gap(number)
            until(partial(_recreated, bridge, (number + 3) // 4), 30, lambda: bridge.log)
            scene.until_told()
            scene.prove()
        finish(scene)
    assert len(scene.backfills()) == 4
    assert len({notice["run"] for notice in scene.backfills()}) == 2


@pytest.mark.parametrize("version", [14, 18])
@pytest.mark.parametrize("running", [True, False])
def test_a_slot_whose_wal_was_removed(version: int, running: bool, tmp_path: Path) -> None:
    if version not in installations():
        pytest.skip(f"no PostgreSQL {version} here")
    with EmbeddedPostgres(version, {"max_slot_wal_keep_size": "32MB", "wal_keep_size": "0"}) as server:
        database = Database(server, "postgres", "bridge")
        scene = Scene(database, tmp_path)

        def lost() -> bool:
            database.execute(SEGMENT)
            database.execute("CHECKPOINT")
            return bool(database.execute("SELECT wal_status = 'lost' FROM pg_replication_slots")[0][0])

        with told(scene) as bridge, contextlib.ExitStack() as stack:
            if running:
                stack.enter_context(bridge.frozen())
            else:
                assert bridge.terminate() == 0
            until(lost, 60)
            scene.gap(1)
            stack.close()
            if not running:
                bridge.start()
            until(lambda: bridge.metric(RECREATED) == 1, 30, lambda: bridge.log)
            finish(scene)
            assert "is lost" in scene.backfills()[0]["reason"]


def test_a_slot_that_idled_for_too_long(tmp_path: Path) -> None:
    if 18 not in installations():
        pytest.skip("no PostgreSQL 18 here")
    with EmbeddedPostgres(18, {"idle_replication_slot_timeout": "1s"}) as server:
        database = Database(server, "postgres", "bridge")
        scene = Scene(database, tmp_path)
        with told(scene) as bridge:
            assert bridge.terminate() == 0
            scene.gap(1)

            def invalid() -> bool:
                database.execute(SEGMENT)
                database.execute("CHECKPOINT")
                return bool(database.execute("SELECT invalidation_reason FROM pg_replication_slots")[0][0])

            until(invalid, 30)
            bridge.start()
            until(lambda: bridge.metric(RECREATED) == 1, 30, lambda: bridge.log)
            finish(scene)
        assert "is lost (idle_timeout)" in scene.backfills()[0]["reason"]


def test_an_outbox_is_no_state_to_read_again(database: Database, tmp_path: Path) -> None:
    scene = Scene(database, tmp_path)
    database.execute(
        "CREATE TABLE shop.outbox "
        "(id int PRIMARY KEY, aggregate_type text, aggregate_id text, type text, payload jsonb)"
    )
    scene.add("shop.outbox", f"{POLICY}\noutbox: {{table: shop.outbox}}")
    with told(scene) as bridge:
        assert bridge.terminate() == 0
        scene.drop_slot()
        database.execute("INSERT INTO shop.outbox VALUES (1, 'order', '1', 'Lost', '{}')")
        bridge.start()
        finish(scene)
        assert database.execute("SELECT count(*) FROM figbridge.snapshot WHERE table_name = 'outbox'") == [(0,)]
    assert b"Lost" not in b"".join(scene.lines)


def test_a_slot_that_somebody_else_has_moved(database: Database, tmp_path: Path) -> None:
    scene = Scene(database, tmp_path)
    with told(scene) as bridge:
        assert bridge.terminate() == 0
        scene.gap(1)
        database.execute("SELECT pg_logical_emit_message(true, 'noise', repeat('x', 500000))")
        database.execute("SELECT pg_replication_slot_advance(%s, pg_current_wal_lsn())", [scene.slot])
        scene.gap(5)  # what the slot still holds is not thrown away
        bridge.start()
        bridge.until_ready()
        assert bridge.metric(RECREATED) == 1
        finish(scene)
    assert "somebody else moved it" in scene.backfills()[0]["reason"]
    deleted = [event["detail"]["before"]["id"] for event in scene.events if event["detail-type"] == "orders.deleted"]
    assert deleted == [5]


def test_whatever_is_killed_the_backfill_is_finished_once(database: Database, tmp_path: Path) -> None:
    scene = Scene(database, tmp_path, forward=f"{POLICY}\nsnapshot-rows-per-second: 200")
    database.execute("INSERT INTO shop.orders SELECT n, 'many' FROM generate_series(3001, 4000) n")
    with told(scene) as bridge:
        bridge.end()
        scene.drop_slot()
        scene.gap(1)
        bridge.start()
        progress = "SELECT rows FROM figbridge.snapshot WHERE table_name = 'orders' AND state = 'running'"
        for least in (1, 300, 600):
            until(partial(_beyond, database, progress, least), 60, lambda: bridge.log)
            bridge.kill()
        finish(scene)
    runs = [(notice["run"], notice["op"]) for notice in scene.backfills()]
    assert sorted(set(runs)) == [(runs[0][0], "backfill.finished"), (runs[0][0], "backfill.started")]


def test_two_replicas_make_one_slot(database: Database, tmp_path: Path) -> None:
    scene = Scene(database, tmp_path)
    with told(scene) as worker:
        other = Bridge(scene.config, tmp_path / "other", environment={"LEGACY_DSN": database.dsn})
        with other:
            until(lambda: "is in use by pid" in other.log, 30, lambda: other.log)
            with worker.frozen(), other.frozen():
                scene.drop_slot()
                scene.gap(1)
            until(lambda: worker.metric(RECREATED) + other.metric(RECREATED) >= 1, 30, lambda: worker.log + other.log)
            until(lambda: 200 in {it.get("/readyz")[0] for it in (worker, other)}, 30)
            scene.until_told()
            assert other.terminate() == 0, other.log[-3000:]
        finish(scene)


def test_a_replica_that_lost_the_slot_leaves_the_file_to_the_one_that_has_it(
    database: Database, tmp_path: Path
) -> None:
    scene = Scene(database, tmp_path)
    with told(scene) as worker:
        other = Bridge(scene.config, tmp_path / "other", environment={"LEGACY_DSN": database.dsn})
        with other:
            until(lambda: "is in use by pid" in other.log, 30, lambda: other.log)
            with worker.frozen():
                scene.drop_slot()
                scene.gap(1)
                until(lambda: other.metric(RECREATED) == 1, 30, lambda: other.log)
                until(lambda: "is locked by another process" in other.log, 30, lambda: other.log)
            scene.until_told()
            assert other.terminate() == 0, other.log[-3000:]
        finish(scene)


def test_a_slot_that_init_makes_anew_leaves_no_gap_either(database: Database, tmp_path: Path) -> None:
    """As an init container does, before every start."""
    scene = Scene(database, tmp_path)
    with told(scene) as bridge:
        assert bridge.terminate() == 0
        assert "every table will be read again" not in scene.command("init")
        scene.drop_slot()
        scene.gap(1)
        assert "every table will be read again" in scene.command("init")
        bridge.start()
        finish(scene)
    assert [notice["op"] for notice in scene.backfills()] == ["backfill.started", "backfill.finished"]


def test_transactions_that_are_open_are_waited_for(database: Database, tmp_path: Path) -> None:
    scene = Scene(database, tmp_path)
    with told(scene) as bridge:
        assert bridge.terminate() == 0
        scene.drop_slot()
        with psycopg.connect(database.dsn) as open_one:
            open_one.execute("INSERT INTO shop.orders VALUES (99, 'open', 'z')")
            bridge.start()
            until(lambda: "the slot waits for transactions to end" in bridge.log, 30, lambda: bridge.log)
            bridge.kill()  # the order for the backfill is committed, and outlives it
            open_one.commit()
        finish(scene)
    assert scene.backfills()


# --- where it stops


def halted(scene: Scene, *texts: str) -> None:
    """For whatever starts it again, too."""
    for _ in range(2):
        scene.bridge.start()
        assert scene.bridge.wait() == 1, scene.bridge.log
        for text in texts:
            assert text in scene.bridge.log
        query = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = %s"
        assert scene.database.execute(query, [scene.slot]) == [(0,)], "it made a slot"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("system_identifier = '1'", "leads to another cluster: system identifier"),
        ("timeline = 7", "never was on timeline 7"),
    ],
)
def test_another_database_stops_it(database: Database, tmp_path: Path, change: str, said: str) -> None:
    scene = Scene(database, tmp_path)
    with told(scene) as bridge:
        assert bridge.terminate() == 0
        scene.drop_slot()
        database.execute(f"UPDATE figbridge.slot_guard SET {change}")
        halted(scene, said, "mend legacy.dsn" if "system" in change else "Name the real primary")


def test_by_default_it_stops(database: Database, tmp_path: Path) -> None:
    scene = Scene(database, tmp_path, forward="snapshot: initial")
    with told(scene) as bridge:
        with bridge.frozen():
            scene.drop_slot()
        assert bridge.wait() == 1
        assert "does not exist" in bridge.log
        assert database.execute("SELECT count(*) FROM pg_replication_slots WHERE slot_name = %s", [scene.slot]) == [
            (0,)
        ]
        assert scene.backfills() == []


def test_a_slot_of_somebody_elses_is_never_dropped(database: Database, tmp_path: Path) -> None:
    scene = Scene(database, tmp_path)
    with told(scene) as bridge:
        assert bridge.terminate() == 0
        scene.drop_slot()
        database.execute("SELECT pg_create_physical_replication_slot(%s)", [scene.slot])
        bridge.start()
        assert bridge.wait() == 2
        assert "is somebody else's" in bridge.log
        kind = "SELECT slot_type FROM pg_replication_slots WHERE slot_name = %s"
        assert database.execute(kind, [scene.slot]) == [("physical",)]
        database.execute("SELECT pg_drop_replication_slot(%s)", [scene.slot])


def test_without_our_table_the_preflight_names_it(database: Database, tmp_path: Path) -> None:
    scene = Scene(database, tmp_path)
    database.execute("DROP TABLE figbridge.snapshot")
    scene.bridge.start()
    assert scene.bridge.wait() == 2
    assert "there is no table snapshot" in scene.bridge.log
    assert "`figbridge init`" in scene.bridge.log
