"""A snapshot under a random workload, with kill -9: whoever applies all events in order holds exactly the tables.

The oracle is the database itself, asked when everything is over. The consumer is the simplest there is: it drops ids
that it has seen, and lets each event replace what it knew of the row.

The moments of kill -9 are random; a failure says their seed (`fixtures.chance`).
"""

import itertools
import json
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psycopg
import pytest

from fixtures.bridge import Bridge
from fixtures.clock import until
from fixtures.postgres import Database
from fixtures.snapshot import applied, differences, repeats

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
    "UPDATE shop.number SET id = -id, v = %(v)s WHERE id %% 1500 = %(n)s %% 1500",
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
def test_events_in_order_are_the_tables_whatever_is_killed_when(
    each_database: Database, tmp_path: Path, chance: random.Random
) -> None:
    database, config = each_database, tmp_path / "bridge.yaml"
    database.execute(SCHEMA)
    config.write_text(CONFIG % {"slot": database.slot, "directory": tmp_path})
    environment = {"LEGACY_DSN": database.dsn}
    initialise = [sys.executable, "-m", "figbridge", "init", "-c", str(config)]
    subprocess.run(initialise, env=environment | {"HTTP_LISTEN": "127.0.0.1:0"}, check=True, timeout=120)
    stop, lives = threading.Event(), [0]
    writers = [Writer(database.dsn, seed, stop, "shop.empty, shop.pair" if not seed else None) for seed in range(3)]
    with Bridge(config, tmp_path / "log", environment=environment) as bridge:
        for writer in writers:
            writer.start()
        try:
            for _ in range(KILLS):
                bridge.until_ready()
                threading.Event().wait(0.3 + chance.random() * 1.2)  # the random moment
                bridge.end()
                lives.append(_whole(tmp_path / "events.jsonl"))
                bridge.start()
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
                writer.join(60)
        _drained(database)
        assert bridge.terminate() == 0
    assert [writer.error for writer in writers] == [None] * 3
    told = _lives(tmp_path / "events.jsonl", lives)
    details = [detail for life in told for detail in life]
    wrong = differences(database, applied(TABLES, details))
    # a chunk of shop.number leaves in several windows, if the stream told less than all of some rows
    wrong += repeats([[detail for detail in life if detail["table"] != "number"] for life in told])
    assert not wrong, "\n".join(wrong)
    assert sum(it["op"] == "read" for it in details) > 20_000, "the snapshot read too little to prove anything"
    assert sum(writer.transactions for writer in writers) > 1000, "the workload was too small to prove anything"


def _drained(database: Database) -> None:
    written = database.execute("SELECT pg_current_wal_insert_lsn()")[0][0]
    query = "SELECT confirmed_flush_lsn >= %s::pg_lsn FROM pg_replication_slots WHERE slot_name = %s"
    until(lambda: database.execute(query, [written, database.slot])[0][0], 60, "the slot confirmed to its end")


def _whole(path: Path) -> int:
    """Bytes of whole lines; what is behind them was torn by a kill, and will be cut off."""
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0


def _lives(path: Path, ends: list[int]) -> list[list[dict[str, Any]]]:
    """The details of the events that each process wrote; all but the last one ended there."""
    content = path.read_bytes()
    parts = itertools.pairwise([*ends, len(content)])
    return [[json.loads(line)["detail"] for line in content[one:other].splitlines()] for one, other in parts]


SMALL = """
legacy: {dsn: "${LEGACY_DSN}", slot: %(slot)s, publication: snap, tables: [shop.keyed, shop.keyless]}
forward:
  sink: {type: file, path: "%(directory)s/events.jsonl"}
  snapshot: initial
  snapshot-parallel: 2
  snapshot-rows-per-second: 3000
http: {listen: "${HTTP_LISTEN}"}
"""
ROWS = 8000  # of each table
# at import, in the bridge's process: chunks of 600 rows or so, which leave in several slices
CHUNKS = """
from figbridge.forward.snapshot import chunk, joined, reads
chunk.MOST_BYTES, chunk._BLOCK_ROWS, joined._BLOCK_BYTES, reads._FEWEST = 40_000, 100, 8_000, 100
"""


@pytest.mark.slow
def test_a_kill_repeats_one_chunk_a_table_at_most(
    each_database: Database, tmp_path: Path, chance: random.Random
) -> None:
    """And nothing up to the cursor that is noted."""
    database, config, path = each_database, tmp_path / "bridge.yaml", tmp_path / "events.jsonl"
    database.execute(
        "CREATE SCHEMA shop; CREATE TABLE shop.keyed (id int PRIMARY KEY, note text); "
        "CREATE TABLE shop.keyless (id int, note text); ALTER TABLE shop.keyless REPLICA IDENTITY FULL;"
        f"INSERT INTO shop.keyed SELECT n, repeat('x', 50) FROM generate_series(1, {ROWS}) AS n;"
        "INSERT INTO shop.keyless SELECT * FROM shop.keyed"
    )
    config.write_text(SMALL % {"slot": database.slot, "directory": tmp_path})
    (tmp_path / "sitecustomize.py").write_text(CHUNKS)
    environment = {"LEGACY_DSN": database.dsn, "PYTHONPATH": str(tmp_path)}
    initialise = [sys.executable, "-m", "figbridge", "init", "-c", str(config)]
    subprocess.run(initialise, env=environment | {"HTTP_LISTEN": "127.0.0.1:0"}, check=True, timeout=120)
    ends, noted, states = [0], list[int](), set[str]()
    ours = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'figbridge%'"
    query = "SELECT table_name, state, (cursor -> 'key' ->> 0)::int FROM figbridge.snapshot"
    with Bridge(config, tmp_path / "log", environment=environment) as bridge:
        for third in range(3):
            enough = 1 + (third + chance.random()) * 0.6 * ROWS  # of twice as many
            until(lambda: path.exists() and path.read_bytes().count(b"\n") > enough, 40, lambda: bridge.log[-2000:])  # noqa: B023
            threading.Event().wait(chance.random() * 0.05)  # the random moment
            bridge.end()
            ends.append(_whole(path))
            until(
                lambda: not database.execute(ours), 20, "the server has noticed, and may have written the last cursor"
            )
            found = {table: (state, key) for table, state, key in database.execute(query)}
            noted.append(found["keyed"][1] or 0)
            states |= {state for state, _ in found.values()}
            bridge.start()
        until(lambda: {state for _, state, _ in database.execute(query)} == {"done"}, 40, lambda: bridge.log[-2000:])
        _drained(database)
        bridge.until_ready()  # the last one may have had nothing left to do, and may still be at its imports
        assert bridge.terminate() == 0
    told = _lives(path, ends)
    assert not repeats(told)
    for number, reached in enumerate(noted, 1):
        again = {it["after"]["id"] for life in told[number:] for it in life if it["table"] == "keyed"}
        assert min(again, default=ROWS + 1) > reached, f"process {number} repeats what was noted before"
    reads = [(it["table"], it["after"]["id"], it["position"]["commit_lsn"]) for life in told for it in life]
    assert {(table, id_) for table, id_, _ in reads} == {
        (table, id_) for table in ("keyed", "keyless") for id_ in range(1, ROWS + 1)
    }
    ids = {it["id"] for life in told for it in life}
    assert len(ids) == 2 * ROWS, "what is repeated has the id that it had"
    assert "running" in states, "no kill came while a table was read"
    assert len({lsn for _, _, lsn in reads}) > 10, "the chunks were too large to prove anything"
