"""A slot that its server gives up, met by `figbridge run`: exit status, message, and the remedy to the letter."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from figbridge.demo.postgres import EmbeddedPostgres, installations
from fixtures.clock import until
from fixtures.postgres import Database
from fixtures.running import Running

# a segment of WAL, as a busy server fills it
SEGMENT = "SELECT pg_logical_emit_message(false, 'noise', 'x'), pg_switch_wal()"


class Scene(Running):
    """A server of its own, and a bridge that is set up and not started."""

    def __init__(self, server: EmbeddedPostgres, directory: Path) -> None:
        self.database = Database(server, "postgres")
        self.database.execute("CREATE TABLE thing (id int PRIMARY KEY)")
        super().__init__(self.database.dsn, "bridge", directory, "public.thing", forward="slot-guard: table")
        self.command("init")

    def seen(self, column: str) -> str | None:
        """A column of the slot's row in pg_replication_slots."""
        ((value,),) = self.database.execute(f"SELECT {column} FROM pg_replication_slots")
        return None if value is None else str(value)

    def delivers(self, number: int) -> None:
        """That a row leaves as an event and is acknowledged."""
        self.database.execute("INSERT INTO thing VALUES (%s)", [number])
        self.until_delivered()
        assert self.delivered[-1] == number

    @property
    def delivered(self) -> list[int]:
        return [event["detail"]["key"]["id"] for event in self.events]

    def follow_the_remedy(self, number: int) -> None:
        """What the last message says, word for word; the bridge then delivers that row."""
        remedy = self.bridge.log[self.bridge.log.rindex("remedy: ") :]
        wanted = r"remedy: (SELECT pg_drop_replication_slot\('\w+'\);) then run `figbridge (init)` and copy the tables"
        match = re.match(wanted, remedy)
        assert match, self.bridge.log
        self.database.execute(match[1])
        assert "slot bridge: made" in self.command(match[2])
        self.bridge.start()
        self.bridge.until_ready()
        self.delivers(number)
        assert self.bridge.terminate() == 0


@contextlib.contextmanager
def scene(version: int, directory: Path, **settings: str) -> Iterator[Scene]:
    if version not in installations():
        pytest.skip(f"no PostgreSQL {version} here")
    with EmbeddedPostgres(version) as server:
        server.reload(**settings)  # not on the command line, which ALTER SYSTEM could not override
        stage = Scene(server, directory)
        with stage.bridge:
            stage.bridge.until_ready()
            stage.delivers(1)
            yield stage


@pytest.mark.parametrize("version", [14, 16, 18])
def test_a_bridge_that_stands_still_until_its_slot_is_lost(version: int, tmp_path: Path) -> None:
    with scene(version, tmp_path, max_slot_wal_keep_size="32MB", wal_keep_size="0") as stage:
        with stage.bridge.frozen():

            def lost() -> bool:
                stage.database.execute(SEGMENT)
                stage.database.execute("CHECKPOINT")
                return stage.seen("wal_status") == "lost"

            until(lost, 30, lambda: f"{stage.seen('wal_status')}")
            stage.database.execute("INSERT INTO thing VALUES (2)")
        assert stage.bridge.wait() == 1
        assert "slot bridge is lost" in stage.bridge.log
        assert "max_slot_wal_keep_size" in stage.bridge.log
        for status in (2, 2):  # a supervisor that starts it again changes nothing
            stage.bridge.start()
            assert stage.bridge.wait() == status
        assert stage.delivered == [1]
        stage.follow_the_remedy(3)
        assert stage.delivered == [1, 3], "what was lost is not made up"


@pytest.mark.parametrize("version", [14, 18])
def test_a_slot_that_is_about_to_be_lost_is_saved_by_the_remedy(version: int, tmp_path: Path) -> None:
    with scene(version, tmp_path, max_slot_wal_keep_size="32MB", wal_keep_size="0") as stage:
        assert stage.bridge.terminate() == 0
        stage.database.execute("INSERT INTO thing VALUES (2)")

        def unreserved() -> bool:
            stage.database.execute(SEGMENT)
            return stage.seen("wal_status") == "unreserved"

        until(unreserved, 30, lambda: f"{stage.seen('wal_status')}")
        said = stage.command("check")
        assert "slot bridge: will be lost at the next checkpoint" in said
        remedy = re.search(r"remedy: at once (ALTER SYSTEM [^;]*); (SELECT pg_reload_conf\(\));", said)
        assert remedy, said
        for statement in remedy.groups():
            stage.database.execute(statement)
        stage.bridge.start()
        stage.bridge.until_ready()
        stage.delivers(3)
        # a slot that was read to the end still holds its WAL for a while, and would be lost here without the remedy
        for _ in range(3):
            stage.database.execute("CHECKPOINT")
        until(lambda: stage.seen("wal_status") == "reserved", 30)
        assert stage.bridge.terminate() == 0
        assert stage.delivered == [1, 2, 3]


def test_a_slot_that_idled_for_too_long(tmp_path: Path) -> None:
    """The setting is in seconds, and a checkpoint looks at it; a slot that keeps no WAL is left alone."""
    with scene(18, tmp_path, idle_replication_slot_timeout="1s") as stage:
        stage.delivers(2)  # a bridge that runs keeps its slot, however many checkpoints there are
        stage.database.execute("CHECKPOINT")
        assert stage.seen("invalidation_reason") is None
        assert stage.bridge.terminate() == 0

        def invalid() -> bool:
            stage.database.execute(SEGMENT)
            stage.database.execute("CHECKPOINT")
            return stage.seen("invalidation_reason") == "idle_timeout"

        until(invalid, 30)
        stage.bridge.start()
        assert stage.bridge.wait() == 2
        assert "slot bridge: is lost (idle_timeout)" in stage.bridge.log
        assert "idle_replication_slot_timeout" in stage.bridge.log
        stage.follow_the_remedy(4)
