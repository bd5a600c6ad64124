"""A bridge that stopped for good and keeps its container: `run --stay`."""

import contextlib
import signal
from pathlib import Path

import psycopg

from fixtures.bridge import Bridge
from fixtures.clock import until
from fixtures.postgres import Database
from fixtures.running import Running


def staying(database: Database, directory: Path, seconds: str) -> Running:
    database.execute("CREATE TABLE thing (id int PRIMARY KEY)")
    running = Running(database.dsn, database.slot, directory, "public.thing")
    environment = {"LEGACY_DSN": database.dsn}
    running.bridge = Bridge(running.config, directory / "log", "--stay", seconds, environment=environment)
    return running


def test_it_is_live_and_not_ready_until_the_cause_is_mended(database: Database, tmp_path: Path) -> None:
    running = staying(database, tmp_path, "1")
    with running.bridge as bridge:
        # its set-up is missing, at the first attempt and at the next
        until(lambda: bridge.log.count("the bridge cannot run") >= 2, 60, lambda: bridge.log)
        until(lambda: bridge.get("/livez")[0] == 200, 30, lambda: bridge.log)
        running.command("init")
        bridge.until_ready(60)
        database.execute("INSERT INTO thing VALUES (1)")
        running.until_events(1)
        # in service it is as any other
        assert bridge.terminate() == 0


def test_a_signal_ends_it_with_the_status_of_the_failure(database: Database, tmp_path: Path) -> None:
    running = staying(database, tmp_path, "600")
    with running.bridge as bridge:
        until(lambda: "stays, and starts anew" in bridge.log, 60, lambda: bridge.log)
        assert bridge.get("/readyz") == (503, "not ready: forward\n")
        assert bridge.metric('figbridge_ready{part="forward"}') == 0
        bridge.signal(signal.SIGTERM)
        assert bridge.wait() == 2


def test_a_slot_that_is_lost_at_work_does_not_end_it(database: Database, tmp_path: Path) -> None:
    running = staying(database, tmp_path, "600")
    running.command("init")
    with running.bridge as bridge:
        bridge.until_ready(60)
        until(lambda: dropped(database), 30, "the bridge was always faster")
        until(lambda: "stays, and starts anew" in bridge.log, 60, lambda: bridge.log)
        assert bridge.get("/livez")[0] == 200


def dropped(database: Database) -> bool:
    """Whether the slot could be dropped between two connections of the bridge, which comes back within 0.2 s."""
    with database.connect() as connection, contextlib.suppress(psycopg.errors.ObjectInUse):
        connection.execute(
            "SELECT pg_terminate_backend(active_pid, 5000) FROM pg_replication_slots WHERE slot_name = %s",
            [database.slot],
        )
        connection.execute("SELECT pg_drop_replication_slot(%s)", [database.slot])
        return True
    return False


def test_a_log_on_a_full_disk_does_not_end_it(database: Database, tmp_path: Path) -> None:
    running = staying(database, tmp_path, "600")
    running.command("init")
    running.bridge = Bridge(
        running.config, Path("/dev/full"), "--stay", "600", environment={"LEGACY_DSN": database.dsn}
    )
    with running.bridge as bridge:
        until(lambda: bridge.get("/readyz")[0] == 200, 60)
        database.execute(
            "SELECT pg_terminate_backend(active_pid, 5000) FROM pg_replication_slots WHERE slot_name = %s",
            [database.slot],
        )
        database.execute("INSERT INTO thing VALUES (1)")
        until(lambda: len(running.lines) == 1, 30)
        assert bridge.metric("figbridge_log_lost_total") > 0
        assert bridge.terminate() == 0
