"""Heartbeats by `figbridge run`: an idle publication keeps no WAL, and the ages tell where it hurts.

Nothing depends on a heartbeat: where none can be written, the stream goes on.
"""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

import pytest

from fixtures.checked import role
from fixtures.clock import until
from fixtures.postgres import Database
from fixtures.running import Running

EVERY = 0.2  # seconds
AGE = 'figbridge_forward_heartbeat_age_seconds{stage="%s"}'
COUNT = 'figbridge_forward_heartbeat_seconds_count{stage="%s"}'
SEGMENT = 16 * 1024 * 1024


def prepared(database: Database, directory: Path, *, dsn: str = "", guard: str = "none") -> Running:
    database.execute("CREATE TABLE quiet (id int PRIMARY KEY); CREATE TABLE busy (id int, filler text)")
    forward = f"heartbeat-seconds: {EVERY}\nslot-guard: {guard}"
    running = Running(database.dsn, database.slot, directory, "public.quiet", forward=forward)
    running.command("init")
    if dsn:
        running.bridge.use(LEGACY_DSN=dsn)
    return running


def until_heartbeats(running: Running, stage: str = "acknowledged") -> None:
    """Return when two more have come round."""
    before = running.bridge.metric(COUNT % stage)
    until(lambda: running.bridge.metric(COUNT % stage) >= before + 2, 20, lambda: running.bridge.log[-3000:])


@contextlib.contextmanager
def held(sink: Path) -> Iterator[None]:
    """During the block the file sink waits for another process, as a standby's does."""
    sink.touch()
    sink.rename(sink.with_suffix(".before"))
    with sink.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_an_idle_publication_on_a_busy_server_keeps_no_wal(each_database: Database, tmp_path: Path) -> None:
    running = prepared(each_database, tmp_path)
    place = "SELECT %s - '0/0' FROM pg_replication_slots WHERE slot_name = %%s"

    def at(column: str) -> int:
        return int(each_database.execute(place % column, [running.slot])[0][0])

    with running.bridge as bridge:
        bridge.until_ready()
        begun = at("restart_lsn")
        for _ in range(5):
            each_database.execute("INSERT INTO busy SELECT 1, repeat('x', 1000) FROM generate_series(1, 1000)")
            each_database.execute("SELECT pg_switch_wal()")
            running.until_delivered()  # the slot is confirmed up to here, though nothing was published
        each_database.execute("CHECKPOINT")  # which notes a snapshot, as the server does every 15 s on its own
        until(lambda: at("restart_lsn") > begun + 4 * SEGMENT, 20, lambda: str(at("restart_lsn") - begun))
        ((retained,),) = each_database.execute(
            "SELECT pg_current_wal_lsn() - restart_lsn FROM pg_replication_slots WHERE slot_name = %s", [running.slot]
        )
        assert retained < SEGMENT
        until_heartbeats(running)
        assert bridge.metric(COUNT % "seen") >= bridge.metric(COUNT % "acknowledged") > 0
        assert 0 <= bridge.metric(AGE % "acknowledged") < 5
        assert bridge.terminate() == 0
    assert running.lines == []


def test_the_ages_tell_a_sink_that_takes_nothing_from_a_stream_that_does_not_come(
    database: Database, tmp_path: Path
) -> None:
    running = prepared(database, tmp_path)
    with running.bridge as bridge:
        bridge.until_ready()
        until_heartbeats(running)
        with held(running.events_path):
            database.execute("INSERT INTO quiet VALUES (1)")
            until(lambda: bridge.metric(AGE % "acknowledged") > 3, 20)
            until_heartbeats(running, "seen")
            assert bridge.metric(AGE % "seen") < 2
            assert bridge.metric("figbridge_forward_buffered_events") == 1
            assert bridge.get("/readyz")[0] == bridge.get("/livez")[0] == 200, "a restart would not help"
        running.until_delivered()
        until(lambda: bridge.metric(AGE % "acknowledged") < 2, 20)
        assert bridge.terminate() == 0
    assert [event["detail"]["key"] for event in running.events] == [{"id": 1}]


def test_a_role_that_may_not_emit_messages(each_database: Database, tmp_path: Path) -> None:
    function = "pg_logical_emit_message(boolean, text, text%s)" % (", boolean" if each_database.version >= 17 else "")
    with role(each_database) as (name, dsn):
        running = prepared(each_database, tmp_path, dsn=dsn)
        each_database.execute(f"GRANT SELECT ON quiet TO {name}")
        with running.bridge as bridge:
            bridge.until_ready()
            until_heartbeats(running)
            each_database.execute(f"REVOKE EXECUTE ON FUNCTION {function} FROM PUBLIC")
            until(lambda: "no heartbeat can be written; the forward path goes on" in bridge.log, 20)
            assert "permission denied for function pg_logical_emit_message" in bridge.log
            until(lambda: bridge.metric(AGE % "acknowledged") > 2, 20)
            assert bridge.metric(AGE % "seen") > 2
            each_database.execute("INSERT INTO quiet VALUES (1)")
            running.until_events(1)
            running.until_delivered()
            each_database.execute(f"GRANT EXECUTE ON FUNCTION {function} TO PUBLIC")
            until(lambda: "heartbeats are written again" in bridge.log, 20)
            until(lambda: bridge.metric(AGE % "acknowledged") < 2, 20)
            assert bridge.log.count("no heartbeat can be written") == 1, "said once"
            assert bridge.terminate() == 0


@pytest.mark.parametrize("guard", ["none", "table"])
def test_a_database_that_is_set_read_only(database: Database, tmp_path: Path, guard: str) -> None:
    """As for a cut-over, or by a service whose disk is nearly full. What was written before must still leave."""
    running = prepared(database, tmp_path, guard=guard)
    with running.bridge as bridge:
        bridge.until_ready()
        until_heartbeats(running)
        writer = database.connect()
        database.execute(f"ALTER DATABASE {database.name} SET default_transaction_read_only = on")
        # every new connection of the bridge is read-only from here on
        database.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name LIKE 'figbridge-%'"
        )
        writer.execute("INSERT INTO quiet VALUES (1)")
        writer.execute(
            "SELECT pg_logical_emit_message(false, 'noise', repeat('x', 1000000)) FROM generate_series(1, 3)"
        )
        writer.close()
        running.until_events(1)
        running.until_delivered()
        until_heartbeats(running)
        assert bridge.terminate() == 0
        bridge.start()
        bridge.until_ready()
        assert bridge.terminate() == 0
