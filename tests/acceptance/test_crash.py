"""Nothing lost, nothing twice, no loop: real processes, real kill -9, and an oracle outside of them.

The writers record what they committed, in the order of its commit per key; nobody kills them. What the file sink
holds and what the tables hold is then compared with that record, never with anything the bridge says of itself.
"""

import contextlib
import json
import random
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest

from figbridge.event import Event
from figbridge.transports.local import LocalSink
from fixtures.bridge import Bridge
from fixtures.clock import until
from fixtures.postgres import Database, Servers

KILLS = 10  # of each direction, on the newest version
FEWER = 4  # on each older one
WRITERS = 3
CONFIG = """
legacy:
  dsn: "${LEGACY_DSN}"
  slot: %(slot)s
  publication: crash
  tables: [shop.account, shop.arrival]
forward:
  sink: {type: file, path: "%(directory)s/events.jsonl"}
reverse:
  source: {type: local, path: "%(directory)s/bus.sqlite", subscriber: bridge, sources: [shop.next]}
  mappings:
    - match: {source: shop.next, detail-type: arrived}
      into: shop.arrival
      action: insert
      set: {change_id: detail.change_id, written_by: "'figbridge'"}
      idempotency_key: detail.change_id
http: {listen: "${HTTP_LISTEN}"}
"""
SCHEMA = """
CREATE SCHEMA shop;
CREATE TABLE shop.account (id int PRIMARY KEY, version int NOT NULL, note text);
-- no unique constraint on change_id: an event that is applied twice shows as two rows
CREATE TABLE shop.arrival (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, change_id text, written_by text);
"""


@dataclass
class Record:
    """What was committed, by those who committed it."""

    rows: dict[int, list[tuple[str, int | None]]] = field(default_factory=lambda: defaultdict(list))
    arrivals: set[str] = field(default_factory=set)
    transactions: int = 0
    emitted: set[str] = field(default_factory=set)


class Writer(threading.Thread):
    """The legacy application: transactions of 1 to 40 rows over keys of its own, some rolled back."""

    def __init__(self, number: int, dsn: str, record: Record, stop: threading.Event) -> None:
        super().__init__(name=f"writer-{number}", daemon=True)
        self._keys = range(number * 1000, number * 1000 + 40)
        self._dsn, self._record, self._done = dsn, record, stop
        self._random = random.Random(number)
        self._live: dict[int, int] = {}
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            with psycopg.connect(self._dsn) as connection:
                while not self._done.is_set():
                    self._transaction(connection)
                    self._done.wait(0.002)
        except BaseException as error:
            self.error = error
            raise

    def _transaction(self, connection: psycopg.Connection) -> None:
        live = dict(self._live)
        keys = self._random.sample(self._keys, self._random.choice([1, 1, 2, 5, 40]))
        made = [(key, self._change(connection, key, live)) for key in keys]
        arrival = None
        if self._random.random() < 0.1:
            arrival = f"legacy-{self.name}-{self._record.transactions}-{self._random.random()}"
            connection.execute("INSERT INTO shop.arrival (change_id, written_by) VALUES (%s, 'legacy')", [arrival])
        if self._random.random() < 0.1:
            connection.rollback()
            return
        connection.commit()
        self._live = live
        for key, change in made:
            self._record.rows[key].append(change)
        if arrival:
            self._record.arrivals.add(arrival)
        self._record.transactions += 1

    def _change(self, connection: psycopg.Connection, key: int, live: dict[int, int]) -> tuple[str, int | None]:
        if key not in live:
            # versions go on growing over deletions, so that an old row can never pass for a new one
            version = live[key] = self._versions(key) + 1
            connection.execute("INSERT INTO shop.account VALUES (%s, %s, %s)", [key, version, "note " * 5])
            return "insert", version
        if self._random.random() < 0.1:
            del live[key]
            connection.execute("DELETE FROM shop.account WHERE id = %s", [key])
            return "delete", None
        live[key] += 1
        connection.execute("UPDATE shop.account SET version = %s WHERE id = %s", [live[key], key])
        return "update", live[key]

    def _versions(self, key: int) -> int:
        return max((version or 0 for _, version in self._record.rows[key]), default=0)


class Emitter(threading.Thread):
    """The new system: events on the bus, every tenth sent twice under another id, as a careless producer would."""

    def __init__(self, bus: Path, record: Record, stop: threading.Event) -> None:
        super().__init__(name="emitter", daemon=True)
        self._bus, self._record, self._done = bus, record, stop
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            sink = LocalSink(self._bus)
            number = 0
            while not self._done.wait(0.01):
                batch = [self._event(number, 0)]
                if number % 10 == 0:
                    batch.append(self._event(number, 1))
                sink.publish(batch)
                self._record.emitted.add(f"change-{number}")
                number += 1
            sink.close()
        except BaseException as error:
            self.error = error
            raise

    @staticmethod
    def _event(number: int, copy: int) -> Event:
        detail = json.dumps({"change_id": f"change-{number}"}).encode()
        return Event(f"event-{number}-{copy}", "shop.next", "arrived", f"{number}", datetime.now(UTC), detail)


@contextlib.contextmanager
def _working(writers: list[Writer], emitter: Emitter, stop: threading.Event) -> Iterator[None]:
    threads: list[Writer | Emitter] = [*writers, emitter]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    for thread in threads:
        assert thread.error is None, f"{thread.name} failed: {thread.error}"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kill_9_at_random_moments_loses_nothing_repeats_nothing_and_loops_nothing(
    each_database: Database, servers: Servers, tmp_path: Path
) -> None:
    newest = each_database.version == max(servers.versions)
    kills, enough = (KILLS, 2000) if newest else (FEWER, 500)
    each_database.execute(SCHEMA)
    config = tmp_path / "bridge.yaml"
    config.write_text(CONFIG % {"slot": each_database.slot, "directory": tmp_path})
    environment = {"LEGACY_DSN": each_database.dsn}
    initialise = [sys.executable, "-m", "figbridge", "init", "-c", str(config)]
    subprocess.run(initialise, env=environment | {"HTTP_LISTEN": "127.0.0.1:0"}, check=True, timeout=120)

    record, stop, chance = Record(), threading.Event(), random.Random(each_database.version)
    writers = [Writer(number, each_database.dsn, record, stop) for number in range(WRITERS)]
    emitter = Emitter(tmp_path / "bus.sqlite", record, stop)
    with (
        Bridge(config, tmp_path / "forward.log", "--only", "forward", environment=environment) as forward,
        Bridge(config, tmp_path / "reverse.log", "--only", "reverse", environment=environment) as reverse,
    ):
        with _working(writers, emitter, stop):
            killers = [
                threading.Thread(target=_kill_often, args=(it, kills, chance.random)) for it in (forward, reverse)
            ]
            for killer in killers:
                killer.start()
            for killer in killers:
                killer.join()
        forward.until_ready()
        reverse.until_ready()
        _drained(each_database, record)
        assert (forward.kills, reverse.kills) == (kills, kills)
        assert forward.terminate() == 0
        assert reverse.terminate() == 0

    assert record.transactions > enough, "the workload was too small to prove anything"
    _prove_forward(tmp_path / "events.jsonl", record)
    _prove_reverse(each_database, record)


def _kill_often(bridge: Bridge, times: int, chance: Callable[[], float]) -> None:
    for _ in range(times):
        bridge.until_ready(90)  # the canary waits for a forward path that is killed as often, on a machine that is busy
        threading.Event().wait(chance() * 0.8)  # the random moment
        bridge.kill()


def _drained(database: Database, record: Record) -> None:
    written = database.execute("SELECT pg_current_wal_insert_lsn()")[0][0]

    def forward() -> bool:
        query = "SELECT confirmed_flush_lsn >= %s::pg_lsn FROM pg_replication_slots WHERE slot_name = %s"
        return bool(database.execute(query, [written, database.slot])[0][0])

    def reverse() -> bool:
        query = "SELECT count(*) FROM figbridge.inbox WHERE source = 'shop.next'"
        return bool(database.execute(query)[0][0] == len(record.emitted))

    until(reverse, 60, lambda: f"inbox of {len(record.emitted)}")
    until(forward, 60, "the slot to be confirmed up to the last write")


def _prove_forward(path: Path, record: Record) -> None:
    events: dict[str, Any] = {}
    bodies: dict[str, bytes] = {}
    repeated = 0
    for line in path.read_bytes().splitlines():
        event = json.loads(line)
        if event["id"] in events:
            repeated += 1
            assert bodies[event["id"]] == line, "the same id with other content"
        else:
            events[event["id"]], bodies[event["id"]] = event, line
    seen: dict[int, list[tuple[str, int | None]]] = defaultdict(list)
    arrivals = []
    for event in events.values():  # in order of first appearance
        detail = event["detail"]
        if detail["table"] == "account":
            seen[detail["key"]["id"]].append((detail["op"], detail["after"] and detail["after"]["version"]))
        else:
            arrivals.append(detail["after"])
    for key, expected in record.rows.items():
        assert seen[key] == expected, f"key {key}"
    assert seen.keys() == record.rows.keys()
    assert {row["written_by"] for row in arrivals} == {"legacy"}, "an echo was published"
    assert sorted(row["change_id"] for row in arrivals) == sorted(record.arrivals)
    assert repeated, "no kill ever hit an unacknowledged event: the test proves less than it says"


def _prove_reverse(database: Database, record: Record) -> None:
    rows = database.execute("SELECT change_id FROM shop.arrival WHERE written_by = 'figbridge'")
    assert sorted(change for (change,) in rows) == sorted(record.emitted)
    assert database.execute("SELECT count(*) FROM figbridge.dead_letter") == [(0,)]
