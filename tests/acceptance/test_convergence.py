"""Both systems write the same rows, both directions run, and in the end both have the same; no lost write is a secret.

A real bridge, killed meanwhile, between a legacy database with applications of its own and a new system that hears of
it through events alone. One table for each policy. A trigger keeps the history of each row, and by it the conflicts are
judged: what of a system's writes is not there, or was overwritten unseen, has a record, and nothing else has one.
"""

import json
import os
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml

from figbridge.event import Event
from figbridge.transports.local import LocalSink, LocalSource
from fixtures.bridge import Bridge
from fixtures.clock import until
from fixtures.postgres import Database

ROWS, WRITERS, KILLS, ENOUGH = 4, 2, 2, 12  # conflicts of each policy
Row = dict[str, Any]
VALUE = {"v": "detail.after.v"}
SEEN = {"v": "detail.before.v"}


@dataclass(frozen=True)
class Table:
    """A table, its rules, and how the new system takes a legacy event: from (own row, before, after) to its own row."""

    columns: tuple[str, ...]
    set: dict[str, str]
    conflicts: dict[str, Any]
    hears: Callable[[Row, Row, Row], Row]


def _takes(_own: Row, _before: Row, after: Row) -> Row:
    return after


def _takes_what_changed(own: Row, before: Row, after: Row) -> Row:
    return own | {column: value for column, value in after.items() if value != before[column]}


TABLES: dict[str, Table] = {
    "new_wins": Table(
        ("v", "seq"),
        VALUE | {"seq": "detail.number"},
        {"policy": "new_wins", "before": SEEN},
        lambda own, _before, after: after if after["seq"] >= own["seq"] else own,
    ),
    "legacy_wins": Table(("v",), VALUE, {"policy": "legacy_wins", "before": SEEN}, _takes),
    "reject": Table(("v",), VALUE, {"policy": "reject", "before": SEEN}, _takes),
    "version_wins": Table(
        ("v", "version"),
        VALUE | {"version": "detail.after.version"},
        {
            "policy": "version_wins",
            "before": SEEN,
            "version": {"column": "version", "new": "detail.after.version"},
        },
        lambda own, _before, after: after if after["version"] >= own["version"] else own,
    ),
    "merge_columns": Table(
        ("a", "b"),
        {"a": "detail.after.a", "b": "detail.after.b"},
        {
            "policy": "merge_columns",
            "tie": "legacy_wins",
            "before": {"a": "detail.before.a", "b": "detail.before.b"},
        },
        _takes_what_changed,
    ),
    "delta": Table(
        ("n",),
        {"n": "detail.after.n"},
        {"policy": "delta", "before": {"n": "detail.before.n"}},
        lambda own, before, after: own | {"n": own["n"] + after["n"] - before["n"]},
    ),
    "expression": Table(
        ("n",),
        {"n": "detail.after.n"},
        {
            "policy": "reject",
            "before": {"n": "detail.before.n"},
            "groups": [{"columns": "n", "sql": "greatest(current.n, new.n)"}],
        },
        lambda own, _before, after: own | {"n": max(own["n"], after["n"])},
    ),
}
UNIQUE = ("new_wins", "legacy_wins", "reject", "version_wins")  # each write of theirs has a value of its own

SCHEMA = """
    CREATE SCHEMA shop;
    CREATE TABLE shop.history (
        place bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text, writer text, id int, before json, after json
    );
    CREATE FUNCTION shop.remember() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO shop.history (name, writer, id, before, after) VALUES
            (TG_TABLE_NAME, current_setting('application_name'), NEW.id, row_to_json(OLD), row_to_json(NEW));
        RETURN NEW;
    END $$;
""" + "".join(
    f"""
    CREATE TABLE shop.{name} (
        id int PRIMARY KEY, v bigint NOT NULL DEFAULT 0, seq int NOT NULL DEFAULT 0, version int NOT NULL DEFAULT 0,
        a bigint NOT NULL DEFAULT 0, b bigint NOT NULL DEFAULT 0, n bigint NOT NULL DEFAULT 0
    );
    ALTER TABLE shop.{name} REPLICA IDENTITY FULL;
    INSERT INTO shop.{name} (id) SELECT generate_series(1, {ROWS});
    CREATE TRIGGER remember AFTER UPDATE ON shop.{name} FOR EACH ROW EXECUTE FUNCTION shop.remember();
    """
    for name in TABLES
)


def _configuration(database: Database, directory: Path) -> dict[str, Any]:
    mappings = [
        {
            "match": {"source": "shop.next", "detail-type": name},
            "into": f"shop.{name}",
            "action": "update",
            "key": {"id": "detail.id"},
            "set": table.set,
            "conflicts": table.conflicts,
            "idempotency_key": "detail.change",
            "version": "detail.number",
        }
        for name, table in TABLES.items()
    ]
    bus = str(directory / "bus.sqlite")
    return {
        "legacy": {"dsn": "${LEGACY_DSN}", "slot": database.slot, "tables": [f"shop.{name}" for name in TABLES]},
        "forward": {"sink": {"type": "local", "path": bus}},
        "reverse": {
            "source": {"type": "local", "path": bus, "subscriber": "bridge", "sources": ["shop.next"]},
            "mappings": mappings,
        },
        "http": {"listen": "${HTTP_LISTEN}"},
    }


def _written(name: str, row: Row, chance: random.Random, unique: int) -> Row:
    """What a system writes next to a row: the columns that change."""
    match name:
        case "merge_columns":
            return {chance.choice("ab"): unique}
        case "delta" | "expression":
            return {"n": row["n"] + chance.randint(1, 9)}
        case "version_wins":
            return {"v": unique, "version": row["version"] + 1}
    return {"v": unique}


class Legacy(threading.Thread):
    """A legacy application. Its unique values are odd."""

    def __init__(self, number: int, dsn: str, stop: threading.Event) -> None:
        super().__init__(name=f"legacy-{number}", daemon=True)
        self._dsn, self._done, self._chance = dsn, stop, random.Random(number)
        self._unique = number * 10**9 + 1
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            with psycopg.connect(self._dsn, application_name="legacy") as connection:
                while not self._done.wait(self._chance.random() * 0.02):
                    try:
                        self._work(connection)
                        connection.commit()
                    except psycopg.errors.DeadlockDetected:  # with the bridge, as between any two clients
                        connection.rollback()
        except BaseException as error:
            self.error = error
            raise

    def _work(self, connection: psycopg.Connection) -> None:
        for _ in range(self._chance.choice([1, 1, 2])):
            name, identity = self._chance.choice(list(TABLES)), self._chance.randint(1, ROWS)
            self._unique += 2
            found = connection.execute(
                f"SELECT n, version FROM shop.{name} WHERE id = %s FOR UPDATE", [identity]
            ).fetchone()
            assert found is not None
            changes = _written(name, {"n": found[0], "version": found[1]}, self._chance, self._unique)
            columns = ", ".join(f"{column} = %s" for column in changes)
            connection.execute(f"UPDATE shop.{name} SET {columns} WHERE id = %s", [*changes.values(), identity])


@dataclass
class Sent:
    """An event of the new system."""

    change: str
    name: str
    id: int
    before: Row
    after: Row


@dataclass
class NewSystem:
    """Hears legacy events, acts by itself, and remembers what it sent. Its unique values are even."""

    path: Path
    rows: dict[tuple[str, int], Row] = field(default_factory=dict)
    sent: list[Sent] = field(default_factory=list)
    heard: dict[str, Row] = field(default_factory=dict)
    error: BaseException | None = None

    def __post_init__(self) -> None:
        self.acting, self.ending = threading.Event(), threading.Event()
        self._numbers: Counter[tuple[str, int]] = Counter()
        self._chance = random.Random(5)
        for name in TABLES:
            for identity in range(1, ROWS + 1):
                self.rows[name, identity] = dict.fromkeys(("v", "seq", "version", "a", "b", "n"), 0)

    def run(self) -> None:
        try:
            sink = LocalSink(self.path)
            source = LocalSource(self.path, subscriber="new-system", sources=["legacy.*"])
            while not self.ending.is_set():
                deliveries = source.receive(wait=self._chance.random() * 0.02)
                for delivery in deliveries:
                    self._hear(json.loads(delivery.body)["detail"])
                source.acknowledge(deliveries)
                if self.acting.is_set():
                    sink.publish(self._act())
            source.close()
            sink.close()
        except BaseException as error:
            self.error = error
            raise

    def _hear(self, detail: Row) -> None:
        if detail["id"] in self.heard:
            return
        self.heard[detail["id"]] = detail
        at = detail["table"], detail["key"]["id"]
        told = {column: detail["after"][column] for column in self.rows[at]}
        before = {column: detail["before"][column] for column in self.rows[at]}
        self.rows[at] = TABLES[detail["table"]].hears(self.rows[at], before, told)

    def _act(self) -> list[Event]:
        at = name, identity = self._chance.choice(list(TABLES)), self._chance.randint(1, ROWS)
        own, number = self.rows[at], len(self.sent) + 1
        self._numbers[at] += 1
        after = own | _written(name, own, self._chance, number * 2) | {"seq": self._numbers[at]}
        change = f"change-{number}"
        self.sent.append(Sent(change, name, identity, own, after))
        self.rows[at] = after
        detail = {"id": identity, "change": change, "number": self._numbers[at], "before": own, "after": after}
        body, now = json.dumps(detail).encode(), datetime.now(UTC)
        # every fifth twice, under another id
        copies = range(2 if number % 5 == 0 else 1)
        return [Event(f"{change}-{copy}", "shop.next", name, f"{at}", now, body) for copy in copies]


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


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_both_sides_end_up_equal_and_no_lost_write_is_a_secret(database: Database, tmp_path: Path) -> None:
    database.execute(SCHEMA)
    config = tmp_path / "bridge.yaml"
    config.write_text(yaml.safe_dump(_configuration(database, tmp_path)))
    environment = {"LEGACY_DSN": database.dsn}
    subprocess.run(
        [sys.executable, "-m", "figbridge", "init", "-c", str(config)],
        env={**os.environ, **environment, "HTTP_LISTEN": "127.0.0.1:0"}, check=True, timeout=60,
    )  # fmt: skip
    stop, system = threading.Event(), NewSystem(tmp_path / "bus.sqlite")
    writers = [Legacy(number, database.dsn, stop) for number in range(1, WRITERS + 1)]
    thread = threading.Thread(target=system.run, daemon=True)
    thread.start()
    with Bridge(config, tmp_path / "log", environment=environment) as bridge:
        bridge.until_ready(60)
        with _working(writers, system, stop):
            for kill in range(1, KILLS + 1):
                until(lambda kill=kill: _least(database) >= ENOUGH * kill // (KILLS + 1), 90, bridge.log[-3000:])  # type: ignore[misc]
                bridge.kill()
                bridge.until_ready(60)
            until(lambda: _least(database) >= ENOUGH, 90, lambda: f"{_conflicts(database)}\n{bridge.log[-3000:]}")
        _drained(database, system)
        assert bridge.terminate() == 0
    system.ending.set()
    thread.join(10)
    assert system.error is None
    for name, table in TABLES.items():
        listed = ", ".join(table.columns)
        legacy = {row[0]: row[1:] for row in database.execute(f"SELECT id, {listed} FROM shop.{name}")}
        new = {i: tuple(system.rows[name, i][column] for column in table.columns) for i in range(1, ROWS + 1)}
        assert new == legacy, name
    _no_loop(database, system)
    _no_secret(database, system)
    print(f"{len(system.heard)} legacy writes, {len(system.sent)} of the new system, conflicts: {_conflicts(database)}")


def _conflicts(database: Database) -> dict[str, int]:
    query = "SELECT split_part(table_name, '.', 2), count(*) FROM figbridge.conflict GROUP BY 1"
    return dict(database.execute(query))


def _least(database: Database) -> int:
    found = _conflicts(database)
    return min(found.get(name, 0) for name in TABLES)


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
    """What left is what the legacy applications wrote, in their order, and nothing of ours."""
    history = database.execute("SELECT name, id, after FROM shop.history WHERE writer = 'legacy' ORDER BY place")
    for name in TABLES:
        for identity in range(1, ROWS + 1):
            wrote = [after for table, row, after in history if (table, row) == (name, identity)]
            heard = [
                detail["after"]
                for detail in system.heard.values()
                if (detail["table"], detail["key"]["id"]) == (name, identity)
            ]
            assert heard == wrote, (name, identity)


def _no_secret(database: Database, system: NewSystem) -> None:
    records = {
        change: (kind, decision, expected, before, after)
        for change, kind, decision, expected, before, after in database.execute(
            "SELECT idempotency_key, kind, decision, expected, before, after FROM figbridge.conflict"
        )
    }
    assert {kind for kind, *_ in records.values()} == {"update_conflict"}
    assert len(records) == database.execute("SELECT count(*) FROM figbridge.conflict")[0][0], "one for each event"
    history = database.execute(
        "SELECT name, id, before, after FROM shop.history WHERE writer LIKE 'figbridge%' ORDER BY place"
    )
    for sent in system.sent:
        if sent.name in UNIQUE:
            _explained(sent, [it for it in history if it[3]["v"] == sent.after["v"]], records.get(sent.change))
        elif sent.name == "merge_columns":
            (column,) = [it for it in "ab" if sent.after[it] != sent.before[it]]
            applied = any(it[3][column] == sent.after[column] for it in history if it[0] == sent.name)
            if not applied:
                assert records[sent.change][1] in {"legacy", "merged"}
        elif sent.name == "expression" and sent.change not in records:
            values = sent.id, sent.before["n"], sent.after["n"]
            assert values in [(it[1], it[2]["n"], it[3]["n"]) for it in history if it[0] == sent.name]
    for sent in system.sent:
        if sent.name in {"delta", "expression"} and sent.change in records:
            _, _, expected, before, after = records[sent.change]
            assert before["n"] != expected["n"] == sent.before["n"]
            added = before["n"] + sent.after["n"] - expected["n"]
            assert after["n"] == (added if sent.name == "delta" else max(before["n"], sent.after["n"]))
    sums = [sent.after["n"] - sent.before["n"] for sent in system.sent if sent.name == "delta"]
    wrote = [after["n"] - before["n"] for table, _, before, after in history if table == "delta"]
    assert sorted(sums) == sorted(wrote), "each of the new system's sums was added once"


def _explained(sent: Sent, written: list[Any], record: Any) -> None:
    """A write that is not there, or that overwrote what it had not seen, has a record; another one has none."""
    if not written:
        assert record is not None, sent
        assert record[1] in {"legacy", "rejected"}
        assert record[3]["v"] != sent.before["v"], "the row was as the new system had seen it"
        return
    ((*_, before, _),) = written
    if before["v"] == sent.before["v"]:
        assert record is None, sent
    else:
        assert record[1] == "new"
        assert record[3]["v"] == before["v"], "what was overwritten is kept"
