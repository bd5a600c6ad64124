"""A failover under a running bridge: what leaves before it and after it is one unbroken history, or the bridge stops.

The oracle is the table of the promoted server, whose versions count each row's changes, and what the writers were told
is committed. Replication to the standby is synchronous, so that a commit that was told is on both servers.
"""

import contextlib
import json
import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from figbridge.change import Lsn
from figbridge.demo.postgres import installations
from fixtures.backfilled import shuffled
from fixtures.clock import until
from fixtures.cluster import Cluster, cluster
from fixtures.running import Running

SLOT = "figbridge"
WRITERS, ROWS = 2, 5


class Writer(threading.Thread):
    """The legacy application: each transaction raises the versions of some rows by one, through any failover."""

    def __init__(self, number: int, dsn: str, stop: threading.Event) -> None:
        super().__init__(name=f"writer-{number}", daemon=True)
        self._ids = list(range(number * ROWS, (number + 1) * ROWS))
        self._dsn, self._done = dsn, stop
        self.told: dict[int, int] = {}  # id → the newest version that the server said is committed

    def run(self) -> None:
        while not self._done.is_set():
            with contextlib.suppress(psycopg.OperationalError), psycopg.connect(self._dsn) as connection:
                while not self._done.is_set():
                    self._transaction(connection)
            self._done.wait(0.02)

    def _transaction(self, connection: psycopg.Connection) -> None:
        rows = connection.execute(
            "INSERT INTO shop.account AS a SELECT id, 1 FROM unnest(%s::int[]) AS id "
            "ON CONFLICT (id) DO UPDATE SET version = a.version + 1 RETURNING id, version",
            [self._ids],
        ).fetchall()
        connection.commit()
        self.told.update(rows)


class Scene(Running):
    """Two servers, one bridge, and writers."""

    def __init__(
        self, servers: Cluster, directory: Path, guard: str, wanted: str, *, failover: bool, policy: str
    ) -> None:
        self.servers = servers
        forward = f"slot-guard: {guard}\nheartbeat-seconds: 0.5\non-slot-loss: {policy}"
        super().__init__(
            servers.dsn(wanted=wanted), SLOT, directory, "shop.account", forward=forward, failover=failover
        )
        self.command("init")

    @contextlib.contextmanager
    def writing(self, at_least: int = 0) -> Iterator[list[Writer]]:
        """Writers at work during the block, which begins when `at_least` more events are at the sink."""
        stop = threading.Event()
        writers = [Writer(number, self.servers.dsn(), stop) for number in range(WRITERS)]
        for writer in writers:
            writer.start()
        try:
            self.until_more(at_least)
            yield writers
        finally:
            stop.set()
            for writer in writers:
                writer.join(60)
        assert not any(writer.is_alive() for writer in writers)

    def until_more(self, count: int) -> None:
        wanted = len(self.lines) + count
        until(lambda: len(self.lines) >= wanted, 30, lambda: f"{len(self.lines)}/{wanted}\n{self.bridge.log[-3000:]}")

    def first_from(self, timeline: int) -> None:
        """Return when an event of a transaction of that timeline is at the sink."""
        mark = f"-{SLOT}-{timeline}-".encode()
        until(lambda: any(mark in line for line in self.lines), 40, lambda: self.bridge.log[-3000:])

    def history(self) -> tuple[dict[int, list[int]], int]:
        """Row → its versions in the order of their first delivery, and how many deliveries repeated one."""
        bodies: dict[str, bytes] = {}
        versions: dict[int, list[int]] = defaultdict(list)
        for line in self.lines:
            event = json.loads(line)
            if event["id"] in bodies:
                assert bodies[event["id"]] == line, "the same id with other content"
                continue
            bodies[event["id"]] = line
            versions[event["detail"]["key"]["id"]].append(event["detail"]["after"]["version"])
        return versions, len(self.lines) - len(bodies)

    def prove(self, writers: list[Writer]) -> int:
        """That the events are the history of the promoted server's rows; how many came twice."""
        with psycopg.connect(self.servers.standby.dsn()) as connection:
            table: dict[int, int] = dict(connection.execute("SELECT id, version FROM shop.account").fetchall())
        for writer in writers:
            for row, told in writer.told.items():
                assert table[row] >= told, "the test's synchronous replication has lost a commit"
        versions, repeated = self.history()
        assert versions == {row: list(range(1, last + 1)) for row, last in table.items()}
        return repeated


@contextlib.contextmanager
def scene(
    version: int,
    directory: Path,
    *,
    guard: str = "table",
    wanted: str = "primary",
    failover: bool = True,
    synced: bool = True,
    policy: str = "halt",
) -> Iterator[Scene]:
    """A bridge that streams from the primary of a pair."""
    if version not in installations():
        pytest.skip(f"no PostgreSQL {version} here")
    with cluster(version) as servers:
        servers.primary.reload(synchronous_standby_names="*")
        with psycopg.connect(servers.primary.dsn(), autocommit=True) as admin:
            admin.execute("CREATE SCHEMA shop; CREATE TABLE shop.account (id int PRIMARY KEY, version int NOT NULL)")
        stage = Scene(servers, directory, guard, wanted, failover=failover, policy=policy)
        with stage.bridge:
            stage.bridge.until_ready()
            if synced:
                servers.until_synced(SLOT)
            yield stage


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("version", "how", "guard", "wanted"),
    [
        (17, "kill -9", "table", "primary"),
        (17, "immediate", "none", "read-write"),
        (18, "kill -9", "none", "primary"),
        (18, "immediate", "table", "read-write"),
    ],
)
def test_a_running_bridge_goes_on_without_a_gap(
    version: int, how: str, guard: str, wanted: str, tmp_path: Path
) -> None:
    with scene(version, tmp_path, guard=guard, wanted=wanted) as stage:
        with stage.writing(at_least=500) as writers:
            stage.servers.kill_primary(how)
            killed = time.monotonic()
            stage.servers.standby.promote()
            promoted = time.monotonic()
            stage.first_from(timeline=2)
            first = time.monotonic() - promoted
            print(
                f"PostgreSQL {version}, {how}: promoted in {promoted - killed:.1f} s, first event {first:.1f} s later"
            )
            stage.until_more(500)
        stage.until_delivered()
        assert "the server was promoted; the slot came along" in stage.bridge.log
        assert stage.bridge.terminate() == 0
        stage.prove(writers)


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize(("version", "guard"), [(17, "table"), (18, "none")])
def test_a_change_that_both_servers_deliver_has_one_id(version: int, guard: str, tmp_path: Path) -> None:
    with scene(version, tmp_path, guard=guard) as stage:
        with stage.writing(at_least=100):
            stage.servers.standby.reload(sync_replication_slots="off")  # the slot over there stays behind from here on
            stage.until_more(300)
        stage.until_delivered()
        before = len(stage.lines)
        stage.bridge.end()
        stage.servers.kill_primary("kill -9")
        stage.servers.standby.promote()
        stage.bridge.start()  # knows nothing by heart: the slot alone says where to go on
        stage.bridge.until_ready()
        with stage.writing(at_least=100) as writers:
            stage.first_from(timeline=2)
        stage.until_delivered()
        assert stage.bridge.terminate() == 0
        assert stage.prove(writers) >= 300
        first = {json.loads(line)["id"] for line in stage.lines[:before]}
        second = [json.loads(line)["id"] for line in stage.lines[before:]]
        assert len(first.intersection(second)) >= 300


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("version", [16, 17, 18])
def test_a_standby_that_does_not_have_the_slot_stops_the_bridge(version: int, tmp_path: Path) -> None:
    with scene(version, tmp_path, failover=False, synced=False) as stage:
        with stage.writing(at_least=100):
            pass
        stage.until_delivered()
        before = stage.lines
        stage.servers.kill_primary("kill -9")
        stage.servers.standby.promote()
        for _ in range(2):  # a supervisor that starts it again changes nothing
            assert stage.bridge.wait() in (1, 2)
            stage.bridge.start()
        assert stage.bridge.wait() == 2
        assert "replication slot 'figbridge' does not exist" in stage.bridge.log
        assert "docs/failover.md" in stage.bridge.log
        assert "copy the tables anew" in stage.bridge.log
        assert stage.lines == before
        # the remedy
        assert "slot figbridge: made" in stage.command("init")
        stage.bridge.start()
        stage.bridge.until_ready()
        with stage.writing(at_least=100):
            pass
        stage.until_delivered()
        assert stage.bridge.terminate() == 0
        versions, _ = stage.history()
        assert all(seen == list(range(1, len(seen) + 1)) for seen in versions.values()), "nothing was written meanwhile"


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize(("version", "running"), [(16, True), (18, False)])
def test_a_standby_that_does_not_have_the_slot_gets_a_new_one_and_a_backfill(
    version: int, running: bool, tmp_path: Path
) -> None:
    policy = "recreate-and-backfill"
    with scene(version, tmp_path, failover=False, synced=False, policy=policy) as stage:
        with stage.writing(at_least=100):
            pass
        stage.until_delivered()
        with contextlib.ExitStack() as stack:
            if running:
                stack.enter_context(stage.bridge.frozen())
            else:
                stage.bridge.end()
            with psycopg.connect(stage.servers.primary.dsn(), autocommit=True) as admin:
                reached = "SELECT replay_lsn >= pg_current_wal_lsn() FROM pg_stat_replication WHERE state = 'streaming'"
                until(lambda: (True,) in admin.execute(reached).fetchall(), 30)
            stage.servers.kill_primary("kill -9")
            stage.servers.standby.promote()
            with psycopg.connect(stage.servers.standby.dsn(), autocommit=True) as legacy:
                legacy.execute("DELETE FROM shop.account WHERE id % 3 = 0")
                legacy.execute("UPDATE shop.account SET version = version + 1 WHERE id = 1")
        if not running:
            stage.bridge.start()
        until(lambda: b"backfill.finished" in b"".join(stage.lines), 60, lambda: stage.bridge.log)
        with stage.writing(at_least=100):
            pass
        stage.until_delivered()
        assert stage.bridge.terminate() == 0
        with psycopg.connect(stage.servers.standby.dsn()) as legacy:
            table = {row["id"]: row for (row,) in legacy.execute("SELECT to_jsonb(t) FROM shop.account t")}
        assert shuffled(stage.lines, version, "account") == table


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("version", [17, 18])
def test_a_standby_that_is_behind_what_was_published_stops_the_bridge(version: int, tmp_path: Path) -> None:
    with scene(version, tmp_path) as stage:
        with stage.writing(at_least=100):
            pass
        stage.until_delivered()
        stage.servers.until_synced(SLOT)
        # neither the events nor the commits wait for the standby any more, and it gets nothing
        stage.servers.primary.reload(synchronized_standby_slots="", synchronous_standby_names="")
        stage.servers.standby.reload(primary_conninfo="")
        with stage.writing(at_least=100):
            pass
        stage.until_delivered()
        before = stage.history()[0]
        stage.servers.kill_primary("kill -9")
        stage.servers.standby.promote()
        assert stage.bridge.wait() == 1
        log = stage.bridge.log
        assert "timeline 2 left ours at" in log
        assert "compare its consumers with it" in log
        assert "docs/failover.md" in log
        with psycopg.connect(stage.servers.standby.dsn()) as connection:
            table: dict[int, int] = dict(connection.execute("SELECT id, version FROM shop.account").fetchall())
        assert all(before[row][-1] > last for row, last in table.items()), "there was nothing to lose"
        # what the page says of the events that are about nothing
        left = Lsn.parse(re.findall(r"timeline 2 left ours at ([0-9A-F/]+),", log)[-1])
        for event in stage.events:
            position, after = Lsn.parse(event["detail"]["position"]["commit_lsn"]), event["detail"]["after"]
            assert (position >= left) == (after["version"] > table[after["id"]])
        # the remedy, after the comparison
        stage.bridge.start()
        stage.bridge.until_ready()
        with stage.writing(at_least=200):
            pass
        stage.until_delivered()
        assert stage.bridge.terminate() == 0
        after, _ = stage.history()  # no id came twice with other content, though positions in the WAL are used again
        for row, last in table.items():
            again = after[row][len(before[row]) :]
            assert again == list(range(last + 1, last + 1 + len(again))), "from the slot on, without a gap"


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_an_old_primary_that_comes_back_as_a_primary_is_not_read(tmp_path: Path) -> None:
    with scene(18, tmp_path, guard="none") as stage:
        with stage.writing(at_least=100):
            stage.servers.kill_primary("immediate")
            stage.servers.standby.promote()
            stage.first_from(timeline=2)
        stage.until_delivered()
        before = stage.lines
        stage.servers.primary.start()
        stage.servers.primary.reload(synchronous_standby_names="")
        with psycopg.connect(stage.servers.primary.dsn(), autocommit=True) as old:
            old.execute("INSERT INTO shop.account VALUES (-1, 1)")
        with psycopg.connect(stage.servers.standby.dsn(), autocommit=True) as admin:
            admin.execute("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE active")
        assert stage.bridge.wait() == 1
        assert "a server on timeline 1 that never was on timeline 2" in stage.bridge.log
        assert "Name the real primary in legacy.dsn" in stage.bridge.log
        assert stage.lines == before


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("version", [17, 18])
def test_while_the_standby_is_away_events_wait_and_the_log_says_for_whom(version: int, tmp_path: Path) -> None:
    with scene(version, tmp_path) as stage:
        stage.servers.primary.reload(synchronous_standby_names="")  # commits do not wait for it, events do
        with stage.writing(at_least=100):
            pass
        stage.until_delivered()
        before = len(stage.lines)
        stage.servers.standby.stop()
        with stage.writing() as writers:
            until(lambda: all(writer.told for writer in writers), 30)
            until(lambda: "waiting on the standby" in stage.bridge.log, 30, lambda: stage.bridge.log)
        assert len(stage.lines) == before
        assert stage.bridge.get("/readyz")[0] == 200
        stage.servers.standby.start()
        stage.until_delivered()
        assert len(stage.lines) > before
        assert stage.bridge.terminate() == 0
