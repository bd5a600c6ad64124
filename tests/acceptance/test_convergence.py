"""Both systems write the same rows, both directions run, and in the end both have the same; no lost write is a secret.

A real bridge, killed meanwhile, between a legacy database with applications of its own and a new system that hears of
it through events alone. One table for each policy; rows are made, changed, removed and given another key by both sides
(`fixtures.two_sided` says what each policy can settle). A trigger keeps the history of each row, and by it the
conflicts are judged: what of a system's writes is not there, or was overwritten unseen, has a record, and nothing else
has one.
"""

import os
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import psycopg
import pytest
import yaml

from fixtures.bridge import Bridge
from fixtures.clock import until
from fixtures.postgres import Database, Servers
from fixtures.two_sided import SCHEMA, TABLES, UNIQUE, Row
from fixtures.two_systems import SOURCE, Legacy, LocalWire, Meeting, NewSystem, Sent, SqsWire, Wire

WRITERS = 2
KINDS = {"update_conflict", "insert_exists", "update_missing", "update_deleted", "delete_missing"}
Records = dict[tuple[str, int], Row]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_both_sides_end_up_equal_and_no_lost_write_is_a_secret(
    each_database: Database, servers: Servers, tmp_path: Path, chance: random.Random
) -> None:
    bus = str(tmp_path / "bus.sqlite")
    ways: dict[str, Row] = {
        "sink": {"type": "local", "path": bus},
        "source": {"type": "local", "path": bus, "subscriber": "bridge", "sources": [SOURCE]},
    }
    newest = each_database.version == max(servers.versions)
    much = {"kills": 2, "enough": 8} if newest else {"kills": 1, "enough": 1}
    _converge(each_database, tmp_path, chance, ways, lambda: LocalWire(tmp_path / "bus.sqlite"), **much)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_both_sides_end_up_equal_over_queues(
    database: Database, tmp_path: Path, chance: random.Random, aws_endpoint: str
) -> None:
    """FIFO queues both ways, because what is compared with what was seen must come in the order in which it was made.

    Nobody is killed: of messages that become visible by themselves, the emulator hands out the last of a group first.
    """
    client: Any = boto3.client("sqs", endpoint_url=aws_endpoint)
    urls = [
        client.create_queue(QueueName=f"{name}.fifo", Attributes={"FifoQueue": "true"})["QueueUrl"]
        for name in ("to-bridge", "from-bridge")
    ]
    aws = {"type": "sqs", "region": "eu-west-1", "endpoint_url": aws_endpoint}
    ways: dict[str, Row] = {
        "source": {**aws, "queue_url": urls[0], "visibility-timeout": 5},
        "sink": {**aws, "queue_url": urls[1]},
    }
    _converge(database, tmp_path, chance, ways, lambda: SqsWire(client, *urls), kills=0, enough=2, pause=0.2)


def _converge(
    database: Database,
    directory: Path,
    chance: random.Random,
    ways: dict[str, Row],
    wire: Callable[[], Wire],
    *,
    kills: int,
    enough: int,
    pause: float = 0.02,
) -> None:
    """`enough` conflicts in each table, `kills` of the bridge meanwhile."""
    database.execute(SCHEMA)
    config = directory / "bridge.yaml"
    config.write_text(yaml.safe_dump(_configuration(database, ways)))
    environment = {"LEGACY_DSN": database.dsn}
    subprocess.run(
        [sys.executable, "-m", "figbridge", "init", "-c", str(config)],
        env={**os.environ, **environment, "HTTP_LISTEN": "127.0.0.1:0"}, check=True, timeout=60,
    )  # fmt: skip
    meeting, stop = Meeting(), threading.Event()
    system = NewSystem(wire(), random.Random(chance.random()), meeting)
    writers = [
        Legacy(number, database.dsn, random.Random(chance.random()), meeting, stop, pause=pause)
        for number in range(1, WRITERS + 1)
    ]
    thread = threading.Thread(target=system.run, daemon=True)
    thread.start()
    with Bridge(config, directory / "log", environment=environment) as bridge, database.connect() as watch:
        bridge.until_ready(60)

        def had(least: int) -> bool:
            assert system.error is None, system.error
            return min(_conflicts(watch).values()) >= least

        with _working(writers, system, stop):
            for kill in range(1, kills + 1):
                until(lambda kill=kill: had(enough * kill // (kills + 1)), 90, bridge.log[-3000:])  # type: ignore[misc]
                bridge.kill()
                bridge.until_ready(60)
            until(
                lambda: had(enough) and len(KINDS - _kinds(watch)) <= 1,
                90,
                lambda: f"{_conflicts(watch)} {_kinds(watch)}\n{bridge.log[-3000:]}",
            )
        _drained(database, system)
        assert bridge.terminate() == 0
    system.ending.set()
    thread.join(10)
    assert system.error is None
    for name, table in TABLES.items():
        listed = ", ".join(table.columns)
        legacy = {row[0]: row[1:] for row in database.execute(f"SELECT id, {listed} FROM shop.{name}")}
        new = {key: tuple(row[column] for column in table.columns) for key, row in system.rows(name).items()}
        assert new == legacy, name
    _no_loop(database, system)
    records = _no_secret(database, system)
    ours = Counter(sent.kind for sent in system.sent)
    print(f"{len(system.heard)} legacy writes, {dict(ours)} of the new system, {len(records)} conflicts")


def _configuration(database: Database, ways: dict[str, Row]) -> dict[str, Any]:
    return {
        "legacy": {"dsn": "${LEGACY_DSN}", "slot": database.slot, "tables": [f"shop.{name}" for name in TABLES]},
        "forward": {"sink": ways["sink"]},
        "reverse": {
            "source": ways["source"],
            "mappings": [mapping for name, table in TABLES.items() for mapping in table.mappings(name)],
        },
        "http": {"listen": "${HTTP_LISTEN}"},
    }


@contextmanager
def _working(writers: list[Legacy], system: NewSystem, stop: threading.Event) -> Iterator[None]:
    system.acting.set()
    for writer in writers:
        writer.start()
    try:
        yield
    finally:
        stop.set()
        system.acting.clear()
        for writer in writers:
            writer.join(10)
    for writer in writers:
        assert writer.error is None, f"{writer.name} failed: {writer.error}"


def _conflicts(watch: psycopg.Connection) -> dict[str, int]:
    query = "SELECT split_part(table_name, '.', 2), count(*) FROM figbridge.conflict GROUP BY 1"
    return dict.fromkeys(TABLES, 0) | dict(watch.execute(query).fetchall())


def _kinds(watch: psycopg.Connection) -> set[str]:
    return {kind for (kind,) in watch.execute("SELECT DISTINCT kind FROM figbridge.conflict")}


def _drained(database: Database, system: NewSystem) -> None:
    written = "SELECT count(*) FROM shop.history WHERE writer = 'legacy'"
    applied = "SELECT count(*) FROM figbridge.inbox WHERE source = 'shop.next'"
    until(lambda: database.execute(applied)[0][0] == len(system.sent), 60, lambda: f"of {len(system.sent)} events")
    # whatever an event made the other side say would have been heard by now: no more comes than was written
    until(lambda: len(system.heard) >= database.execute(written)[0][0], 60, lambda: f"heard {len(system.heard)}")
    for table in ("parked", "dead_letter"):
        assert database.execute(f"SELECT count(*) FROM figbridge.{table}") == [(0,)]
    end = database.execute("SELECT pg_current_wal_insert_lsn()")[0][0]
    confirmed = "SELECT confirmed_flush_lsn >= %s::pg_lsn FROM pg_replication_slots WHERE slot_name = %s"
    until(lambda: database.execute(confirmed, [end, database.slot]) == [(True,)], 60)


def _no_loop(database: Database, system: NewSystem) -> None:
    """What left is what the legacy applications wrote, in their order for each key, and nothing of ours."""
    history = database.execute(
        "SELECT name, id, op, before, after FROM shop.history WHERE writer = 'legacy' ORDER BY place"
    )
    wrote: dict[tuple[str, int], list[Any]] = {}
    heard: dict[tuple[str, int], list[Any]] = {}
    for name, key, op, before, after in history:
        wrote.setdefault((name, key), []).append((op, before, after))
    for detail in system.heard.values():
        told = detail["op"], detail["before"], detail["after"]
        heard.setdefault((detail["table"], detail["key"]["id"]), []).append(told)
    assert heard == wrote


def _no_secret(database: Database, system: NewSystem) -> Records:
    names = ("kind", "decision", "expected", "before", "after")
    found = database.execute(f"SELECT idempotency_key, statement, {', '.join(names)} FROM figbridge.conflict")
    records: Records = {(change, number): dict(zip(names, it, strict=True)) for change, number, *it in found}
    assert len(records) == len(found), "one for each statement"
    history = database.execute(
        "SELECT name, op, id, before, after FROM shop.history WHERE writer LIKE 'figbridge%' ORDER BY place"
    )
    for sent in system.sent:
        removes, writes = sent.kind in {"removed", "moved"}, sent.kind != "removed"
        if removes:
            gone = [(it[3], None) for it in history if it[:3] == (sent.name, "delete", sent.id)]
            _removed(sent, gone, records.get((sent.change, 1)))
        if writes and sent.name in UNIQUE:
            there = [it[3:] for it in history if it[0] == sent.name and it[4] and it[4]["v"] == sent.after["v"]]
            _written(sent, there, records.get((sent.change, 2 if removes else 1)))
        elif sent.name == "merge_columns" and sent.kind == "changed":
            (column,) = [it for it in "ab" if sent.before and sent.after[it] != sent.before[it]]
            applied = any(it[4] and it[4][column] == sent.after[column] for it in history if it[0] == sent.name)
            assert applied or records[sent.change, 1]["decision"] in {"legacy", "merged"}
    _no_secret_sum([it for it in system.sent if it.kind == "changed"], records, history)
    return records


def _removed(sent: Sent, gone: list[Any], record: Row | None) -> None:
    """A row that is still there, or that went although it was another one, has a record; another one has none."""
    column = "v" if sent.name in UNIQUE else "b" if sent.name == "merge_columns" else "n"
    assert sent.before
    if record is None:
        assert sent.before[column] in [before[column] for before, _ in gone], sent
    elif record["decision"] == "new":
        assert record["before"][column] in [before[column] for before, _ in gone], "what went is kept"
    elif record["kind"] == "delete_missing":
        assert record["before"] is None, sent
    else:
        assert (record["kind"], record["decision"] in {"legacy", "rejected"}) == ("update_conflict", True), sent
        assert record["before"][column] != sent.before[column], "the row was as the new system had seen it"


def _written(sent: Sent, there: list[Any], record: Row | None) -> None:
    """A write that is not there, or that overwrote what it had not seen, has a record; another one has none."""
    absent = {"update_missing", "update_deleted"}
    if not there:
        assert record is not None, sent
        assert record["decision"] in {"legacy", "rejected"}, sent
        if sent.kind != "changed":
            assert record["kind"] == "insert_exists", sent
        elif record["kind"] not in absent:
            assert sent.before
            assert record["before"]["v"] != sent.before["v"], "the row was as the new system had seen it"
        return
    ((before, _),) = there
    seen = sent.before if sent.kind == "changed" else None
    if (before and before["v"]) == (seen and seen["v"]):
        assert record is None, sent
        return
    assert record is not None, sent
    assert record["decision"] == "new"
    assert record["before"] == before or record["before"]["v"] == before["v"], "what was overwritten is kept"


def _no_secret_sum(changes: list[Sent], records: Records, history: list[Any]) -> None:
    added = []
    for sent in changes:
        record = records.get((sent.change, 1))
        if sent.name not in {"delta", "expression"}:
            continue
        assert sent.before
        if record is None:
            values = sent.id, sent.before["n"], sent.after["n"]
            wrote = [(it[2], it[3]["n"], it[4]["n"]) for it in history if it[:2] == (sent.name, "update")]
            assert values in wrote, sent
        elif record["before"] is None:
            assert (record["kind"], record["decision"]) in {("update_missing", "legacy"), ("update_deleted", "legacy")}
            continue
        else:
            before, expected = record["before"], record["expected"]
            assert before["n"] != expected["n"] == sent.before["n"]
            total = before["n"] + sent.after["n"] - expected["n"]
            assert record["after"]["n"] == (total if sent.name == "delta" else max(before["n"], sent.after["n"]))
        if sent.name == "delta":
            added.append(sent.after["n"] - sent.before["n"])
    wrote = [it[4]["n"] - it[3]["n"] for it in history if it[:2] == ("delta", "update")]
    assert sorted(added) == sorted(wrote), "each of the new system's sums was added once"
