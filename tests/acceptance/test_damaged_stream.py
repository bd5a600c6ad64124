"""A stream that is damaged on its way: the process ends with status 1, says where, and loses nothing.

The oracle is the table: what the file holds in the end, replayed, is what PostgreSQL holds.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from figbridge.change import Lsn
from fixtures.bridge import Bridge
from fixtures.clock import until
from fixtures.damage import DamagingProxy
from fixtures.postgres import Database
from fixtures.replay import Replica, rows_of

CONFIG = """
legacy: {dsn: "${LEGACY_DSN}", slot: %s, publication: damaged, tables: [public.thing]}
forward: {sink: {type: file, path: "%s"}}
http: {listen: "${HTTP_LISTEN:-127.0.0.1:0}"}
"""


def _longer(message: bytes, at: int) -> bytes:
    """The first length behind `at` says 2 GB more."""
    where = message.index(b"t\0", at) + 1
    return message[:where] + b"\x80" + message[where + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda message: message[:-1],
    "a length that lies": lambda message: _longer(message, 33),
    "another kind": lambda message: message[:25] + b"Z" + message[26:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_nothing_behind_a_damaged_message_is_acknowledged(database: Database, tmp_path: Path, damage: str) -> None:
    database.execute("CREATE TABLE thing (id int PRIMARY KEY, name text)")
    config, events = tmp_path / "bridge.yaml", tmp_path / "events.jsonl"
    config.write_text(CONFIG % (database.slot, events))
    with DamagingProxy(database.dsn) as proxy:
        environment = {"LEGACY_DSN": proxy.dsn}
        initialise = [sys.executable, "-m", "figbridge", "init", "-c", str(config)]
        subprocess.run(initialise, env=environment, check=True, timeout=120, capture_output=True)
        damaged: list[int] = []

        def change(message: bytes) -> bytes:
            if message[:1] != b"w" or message[25:26] != b"I" or b"marked" not in message:
                return message
            damaged.append(int.from_bytes(message[1:9]))
            return DAMAGES[damage](message)

        proxy.change = change
        with Bridge(config, tmp_path / "log", environment=environment) as bridge:
            bridge.until_ready()
            database.execute("INSERT INTO thing SELECT n, 'before' FROM generate_series(1, 100) n")
            until(lambda: len(lines(events)) == 100, 20, lambda: bridge.log)
            with database.connect() as connection, connection.transaction():
                connection.execute("INSERT INTO thing SELECT n, 'with it' FROM generate_series(101, 200) n")
                ((before,),) = connection.execute("SELECT pg_current_wal_insert_lsn()").fetchall()
                connection.execute("INSERT INTO thing VALUES (201, 'marked'), (202, 'behind')")
            database.execute("INSERT INTO thing VALUES (203, 'later'); DELETE FROM thing WHERE id = 1")
            assert bridge.wait() == 1
            assert f"LSN {Lsn(damaged[0])}" in bridge.log
            assert "keep the slot" in bridge.log
            assert "Traceback" not in bridge.log
            assert {line["detail"]["after"]["name"] for line in lines(events)} <= {"before", "with it"}
            confirmed = "SELECT confirmed_flush_lsn <= %s::pg_lsn FROM pg_replication_slots WHERE slot_name = %s"
            assert database.execute(confirmed, [before, database.slot]) == [(True,)]

            bridge.start()  # as a container platform would: it ends again, in the same place
            assert bridge.wait() == 1
            assert len(damaged) == 2
            assert damaged[0] == damaged[1]
            assert database.execute(confirmed, [before, database.slot]) == [(True,)]

            proxy.change = None
            bridge.start()
            until(lambda: lines(events)[-1]["detail"]["op"] == "delete", 20, lambda: bridge.log)
            assert bridge.terminate() == 0
    once = {line["id"]: line["detail"] for line in lines(events)}
    assert Replica(once.values()).rows("thing") == rows_of(database, "thing")


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
