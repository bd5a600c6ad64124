"""A snapshot under a random workload, with kill -9: whoever applies all events in order holds exactly the tables.

The oracle is the database itself, asked when everything is over. The consumer is the simplest there is: it drops ids
that it has seen, and lets each event replace what it knew of the row.
"""

import json
import random
import subprocess
import sys
import threading
from pathlib import Path

import psycopg
import pytest

from fixtures.bridge import Bridge
from fixtures.clock import until
from fixtures.postgres import Database
from fixtures.snapshot import applied, differences

KILLS = 5
CONFIG = """
legacy:
  dsn: "${LEGACY_DSN}"
  slot: %(slot)s
  publication: snap
  tables: [shop.number, shop.pair, shop.keyless, shop.part, shop.empty, shop.single]
forward:
  sink: {type: file, path: "%(directory)s/events.jsonl"}
  snapshot: initial
  snapshot-parallel: 2
  snapshot-rows-per-second: 4000
http: {listen: "${HTTP_LISTEN}"}
"""
BIG = "(SELECT string_agg(md5(random()::text), '') FROM generate_series(1, 200) WHERE v IS NOT NULL)"
SCHEMA = f"""
CREATE SCHEMA shop;
CREATE TABLE shop.number (id bigint PRIMARY KEY, v bigint, big text);
CREATE TABLE shop.pair (a text COLLATE "C", b uuid, v bigint, PRIMARY KEY (a, b));
CREATE TABLE shop.keyless (id bigint, v bigint); ALTER TABLE shop.keyless REPLICA IDENTITY FULL;
CREATE TABLE shop.part (id int, region int, v bigint, PRIMARY KEY (id, region)) PARTITION BY LIST (region);
CREATE TABLE shop.part_0 PARTITION OF shop.part FOR VALUES IN (0);
CREATE TABLE shop.part_1 PARTITION OF shop.part FOR VALUES IN (1);
CREATE TABLE shop.empty (id int PRIMARY KEY, v bigint);
CREATE TABLE shop.single (id int PRIMARY KEY, v bigint);
ALTER TABLE shop.number ALTER big SET STORAGE EXTERNAL;
INSERT INTO shop.number SELECT v * 3, v, CASE WHEN v % 50 = 0 THEN {BIG} END FROM generate_series(1, 12000) AS v;
INSERT INTO shop.pair SELECT 'k' || v % 100, md5(v::text)::uuid, v FROM generate_series(1, 6000) AS v;
INSERT INTO shop.keyless SELECT v, v FROM generate_series(1, 6000) AS v;
INSERT INTO shop.part SELECT v, v % 2, v FROM generate_series(1, 6000) AS v;
INSERT INTO shop.single VALUES (1, 1);
"""
# What a legacy application does; %(n)s is random, %(v)s never comes twice.
STATEMENTS = [
    "INSERT INTO shop.number VALUES (%(n)s, %(v)s, repeat('x', 4000)) ON CONFLICT (id) DO UPDATE SET v = %(v)s",
    "UPDATE shop.number SET v = %(v)s WHERE id %% 1000 = %(n)s %% 1000",
    "UPDATE shop.number SET v = %(v)s WHERE id = (SELECT max(id) FROM shop.number)",
    "DELETE FROM shop.number WHERE id %% 5000 = %(n)s %% 5000",
    "UPDATE shop.number SET id = -id, v = %(v)s, big = repeat(v::text, 500) WHERE id %% 9000 = %(n)s %% 9000",
    "UPDATE shop.pair SET v = %(v)s WHERE a = 'k' || %(n)s %% 100 AND v %% 7 = 0",
    "UPDATE shop.pair SET a = 'm' || %(n)s, v = %(v)s WHERE b = (SELECT b FROM shop.pair ORDER BY b LIMIT 1)",
    "DELETE FROM shop.pair WHERE v %% 1000 = %(n)s %% 1000",
    "INSERT INTO shop.pair VALUES ('k' || %(n)s, gen_random_uuid(), %(v)s)",
    "INSERT INTO shop.keyless VALUES (%(n)s, %(v)s)",
    "UPDATE shop.keyless SET v = %(v)s WHERE ctid = (SELECT min(ctid) FROM shop.keyless WHERE id > %(n)s %% 6000)",
    "DELETE FROM shop.keyless WHERE id %% 3000 = %(n)s %% 3000",
    "UPDATE shop.part SET v = %(v)s WHERE id %% 500 = %(n)s %% 500",
    "UPDATE shop.part SET region = 1 - region, v = %(v)s WHERE id %% 2000 = %(n)s %% 2000",
    "INSERT INTO shop.part VALUES (%(n)s, 0, %(v)s) ON CONFLICT DO NOTHING",
    "INSERT INTO shop.empty VALUES (%(n)s, %(v)s) ON CONFLICT DO NOTHING",
]
TABLES = ("number", "pair", "keyless", "part", "empty", "single")


class Writer(threading.Thread):
    """Transactions of a few statements, every tenth rolled back."""

    def __init__(self, dsn: str, seed: int, stop: threading.Event, truncates: str | None) -> None:
        super().__init__(daemon=True)
        self._dsn, self._done, self._random, self._seed = dsn, stop, random.Random(seed), seed
        self._truncates = truncates
        self.transactions = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            with psycopg.connect(self._dsn) as connection:
                while not self._done.wait(0.003):
                    self._transaction(connection)
        except BaseException as error:
            self.error = error
            raise

    def _transaction(self, connection: psycopg.Connection) -> None:
        chance = self._random
        try:
            for number in range(chance.choice([1, 1, 2, 4])):
                value = (self.transactions * 10 + number) * 10 + self._seed + 10**6
                connection.execute(chance.choice(STATEMENTS), {"n": chance.randrange(40_000), "v": value})
            if self._truncates and chance.random() < 0.002:
                connection.execute(f"TRUNCATE {self._truncates}")
        except (psycopg.errors.OperationalError, psycopg.errors.UniqueViolation):  # deadlock, moved row
            connection.rollback()
        if chance.random() < 0.1:
            connection.rollback()
        else:
            connection.commit()
        self.transactions += 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_events_in_order_are_the_tables_whatever_is_killed_when(each_database: Database, tmp_path: Path) -> None:
    database, config = each_database, tmp_path / "bridge.yaml"
    database.execute(SCHEMA)
    config.write_text(CONFIG % {"slot": database.slot, "directory": tmp_path})
    environment = {"LEGACY_DSN": database.dsn}
    initialise = [sys.executable, "-m", "figbridge", "init", "-c", str(config)]
    subprocess.run(initialise, env=environment | {"HTTP_LISTEN": "127.0.0.1:0"}, check=True, timeout=60)
    stop, chance = threading.Event(), random.Random(database.version)
    writers = [Writer(database.dsn, seed, stop, "shop.empty, shop.pair" if not seed else None) for seed in range(3)]
    with Bridge(config, tmp_path / "log", environment=environment) as bridge:
        for writer in writers:
            writer.start()
        try:
            for _ in range(KILLS):
                bridge.until_ready()
                threading.Event().wait(0.3 + chance.random() * 1.2)  # the random moment
                bridge.kill()
            bridge.until_ready()
            query = "SELECT table_name, state, rows, estimate, message FROM figbridge.snapshot"
            until(
                lambda: {state for _, state, *_ in database.execute(query)} == {"done"},
                90,
                lambda: f"{database.execute(query)}\n{bridge.log[-2000:]}",
            )
        finally:
            stop.set()
            for writer in writers:
                writer.join(20)
        _drained(database)
        assert bridge.terminate() == 0
    assert [writer.error for writer in writers] == [None] * 3
    lines = (tmp_path / "events.jsonl").read_bytes().splitlines()
    ids = [json.loads(line)["id"] for line in lines if b'"op":"read"' in line]
    details = [json.loads(line)["detail"] for line in lines]
    wrong = differences(database, applied(TABLES, details))
    assert not wrong, "\n".join(wrong)
    assert len(ids) > 20_000, "the snapshot read too little to prove anything"
    assert sum(writer.transactions for writer in writers) > 1000, "the workload was too small to prove anything"


def _drained(database: Database) -> None:
    written = database.execute("SELECT pg_current_wal_insert_lsn()")[0][0]
    query = "SELECT confirmed_flush_lsn >= %s::pg_lsn FROM pg_replication_slots WHERE slot_name = %s"
    until(lambda: database.execute(query, [written, database.slot])[0][0], 60, "the slot confirmed to its end")
