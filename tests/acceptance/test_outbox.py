"""Outbox and logical messages by `figbridge run`, as docs/outbox.md describes them: its SQL, its JSON."""

import base64
import json
import random
import re
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import psycopg
import pytest

from fixtures.bridge import Bridge
from fixtures.clock import until
from fixtures.postgres import Database
from fixtures.running import Running

PAGE = (Path(__file__).parents[2] / "docs" / "outbox.md").read_text()
OUTBOX = """
outbox: {table: shop.outbox, message-prefix: outbox}
messages: [audit, "app.*"]
"""
ORDERS = "CREATE SCHEMA shop; CREATE TABLE shop.orders (id int PRIMARY KEY, status text)"
KILLS = 6


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def table_of_the_page() -> tuple[str, str]:
    """(the outbox table, what is done with it)."""
    table, begin, work = blocks("sql")[0].partition("BEGIN;")
    return table, begin + work


def prepared(database: Database, directory: Path, forward: str = OUTBOX) -> Running:
    database.execute(ORDERS)
    database.execute(table_of_the_page()[0])
    database.execute("INSERT INTO shop.orders VALUES (42, 'new')")
    running = Running(database.dsn, database.slot, directory, "shop.orders", "shop.outbox", forward=forward)
    running.command("init")
    return running


def stable(detail: dict[str, Any]) -> dict[str, Any]:
    """A detail without what differs from run to run: ids, positions, times. The keys stay."""
    return {
        key: sorted(value) if key == "position" else "…" if key in {"id", "outbox_id", "committed_at"} else value
        for key, value in detail.items()
    }


def test_what_the_page_says(each_database: Database, tmp_path: Path) -> None:
    running = prepared(each_database, tmp_path)
    routed, message = (json.loads(block) for block in blocks("json"))
    with running.bridge as bridge:
        bridge.until_ready()
        with psycopg.connect(each_database.dsn, autocommit=True) as application:
            for statement in re.sub(r"--.*", "", table_of_the_page()[1]).split(";")[:-1]:
                application.execute(statement)
            application.execute("SELECT pg_logical_emit_message(true, 'audit', 'user 7 looked at order 42')")
            application.execute(r"SELECT pg_logical_emit_message(false, 'app.raw', '\xff00'::bytea)")
            application.execute("SELECT pg_logical_emit_message(true, 'nobody', 'asked for it')")
            with application.transaction(force_rollback=True):
                application.execute("SELECT pg_logical_emit_message(true, 'audit', 'rolled back')")
                application.execute("SELECT pg_logical_emit_message(false, 'audit', 'not to be rolled back')")
        order, row, sent, audit, raw, loose = running.until_events(6)
        running.until_delivered()
        assert bridge.metric('figbridge_forward_outbox_ignored_total{operation="delete"}') == 1
        assert bridge.terminate() == 0
    assert len(running.events) == 6
    source = f"legacy.{each_database.name}"
    assert (order["source"], order["detail-type"]) == (source, "orders.updated")
    for event in (row, sent):
        assert (event["source"], event["detail-type"]) == (source, "OrderPaid")
        assert event["id"] == event["detail"]["id"]
        assert event["detail"]["key"] == {"aggregate_type": "order", "aggregate_id": "42"}
        assert event["detail"]["payload"] == {"total": 12.5}
    assert stable(row["detail"]) == stable(routed)
    assert row["detail"]["position"]["commit_lsn"] == order["detail"]["position"]["commit_lsn"]
    assert row["detail"]["position"]["ordinal"] == 1
    assert b'"payload":{"total": 12.50}' in running.lines[1], "digits and spaces are as they were written"
    assert (sent["detail"]["table"], sent["detail"]["position"]["ordinal"]) == (None, None)
    assert stable(audit["detail"]) == stable(message)
    assert (audit["source"], audit["detail-type"]) == (source, "audit.emitted")
    assert (raw["detail"]["encoding"], base64.b64decode(raw["detail"]["content"])) == ("base64", b"\xff\0")
    assert raw["detail-type"] == "app.raw.emitted"
    assert loose["detail"]["content"] == "not to be rolled back"
    assert loose["detail"]["position"]["commit_lsn"] is None


POISON = (
    "INSERT INTO shop.outbox (aggregate_type, aggregate_id, type) VALUES ('order', '', 'EmptyId')",
    "INSERT INTO shop.outbox (aggregate_type, aggregate_id, type) VALUES ('order', '1', '')",
    "SELECT pg_logical_emit_message(true, 'outbox', 'no JSON')",
    """SELECT pg_logical_emit_message(false, 'outbox', '{"aggregate_type": "order"}')""",
)


def good(number: int) -> str:
    return f"INSERT INTO shop.outbox (aggregate_type, aggregate_id, type, payload) VALUES ('a', 'b', 'T', '{number}')"


def test_what_is_no_outbox_event_goes_to_the_dead_letters_in_order_and_holds_nothing_up(
    database: Database, tmp_path: Path
) -> None:
    letters = tmp_path / "letters.jsonl"
    running = prepared(database, tmp_path, OUTBOX + f'dead-letters: {{type: file, path: "{letters}"}}')
    with running.bridge as bridge:
        bridge.until_ready()
        with database.connect() as application:
            with application.transaction():  # in the middle of a transaction, too
                for number, poison in enumerate(POISON[:2]):
                    application.execute(good(number))
                    application.execute(poison)
            for number, poison in enumerate(POISON[2:], 2):
                application.execute(good(number))
                application.execute(poison)
            application.execute(good(len(POISON)))
        running.until_delivered()
        assert bridge.metric("figbridge_forward_dead_letters_total") == len(POISON)
        assert bridge.terminate() == 0
    assert [event["detail"]["payload"] for event in running.events] == list(range(len(POISON) + 1))
    buried = [json.loads(line) for line in letters.read_bytes().splitlines()]
    assert {letter["reason"] for letter in buried} == {"OutboxMalformed"}
    bodies = [json.loads(letter["body"]) for letter in buried]
    assert [letter["event_id"] for letter in buried] == [body["id"] for body in bodies]
    details = [body["detail"] for body in bodies]
    assert [detail["row"]["type"] for detail in details[:2]] == ["EmptyId", ""], "whole rows, in their order"
    assert [detail["content"] for detail in details[2:]] == ["no JSON", '{"aggregate_type": "order"}']


def test_without_dead_letters_the_bridge_stops_and_the_remedy_lets_it_go_on(database: Database, tmp_path: Path) -> None:
    running = prepared(database, tmp_path)
    with running.bridge as bridge:
        bridge.until_ready()
        for statement in (good(0), POISON[0], good(1)):
            database.execute(statement)
        assert bridge.wait() == 1
        assert "OutboxMalformed: its 'aggregate_id' is empty" in bridge.log
        assert "set forward.dead-letters to keep such events aside and go on" in bridge.log
        letters = tmp_path / "letters.jsonl"
        running.configure(OUTBOX + f'dead-letters: {{type: file, path: "{letters}"}}')
        bridge.start()
        bridge.until_ready()
        running.until_delivered()
        assert bridge.terminate() == 0
    once = {event["id"]: event["detail"]["payload"] for event in running.events}
    assert list(once.values()) == [0, 1]
    assert len(letters.read_bytes().splitlines()) == 1


class Application(threading.Thread):
    """Rows, messages of both kinds and poison; what it was told is written, it remembers."""

    def __init__(self, dsn: str, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self._dsn, self._done, self._chance = dsn, stop, random.Random(7)
        self.routed: list[int] = []
        self.audits: list[int] = []
        self.poisoned = 0

    def run(self) -> None:
        number = 0
        with psycopg.connect(self._dsn) as connection:
            while not self._done.wait(0.002):
                number += 1
                self._transaction(connection, number)

    def _transaction(self, connection: psycopg.Connection, number: int) -> None:
        connection.execute("INSERT INTO shop.orders VALUES (%s, 'new')", [1000 + number])
        body = {"aggregate_type": "a", "aggregate_id": "b", "type": "T", "payload": number}
        if number % 2:
            connection.execute(good(number))
        else:
            connection.execute("SELECT pg_logical_emit_message(true, 'outbox', %s)", [json.dumps(body)])
        loose = bool(number % 3)
        connection.execute("SELECT pg_logical_emit_message(%s, 'audit', %s)", [not loose, str(number)])
        poison = number % 50 == 0
        if poison:
            connection.execute(POISON[0])
        if self._chance.random() < 0.1:
            connection.rollback()
            self.audits += [number] * loose
            return
        connection.commit()
        self.routed.append(number)
        self.audits.append(number)
        self.poisoned += poison


def kill_often(bridge: Bridge, chance: random.Random) -> None:
    for _ in range(KILLS):
        bridge.until_ready()
        threading.Event().wait(chance.random() * 0.8)  # the random moment
        bridge.kill()
    bridge.until_ready()


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.pg(">= 17")
def test_kill_9_loses_no_message_and_no_outbox_event(each_database: Database, tmp_path: Path) -> None:
    letters = tmp_path / "letters.jsonl"
    running = prepared(each_database, tmp_path, OUTBOX + f'dead-letters: {{type: file, path: "{letters}"}}')
    stop = threading.Event()
    application = Application(each_database.dsn, stop)
    with running.bridge as bridge:
        application.start()
        kill_often(bridge, random.Random(each_database.version))
        stop.set()
        application.join(60)
        until(lambda: each_database.execute("SELECT pg_switch_wal()"))  # flushes what no commit had to
        running.until_delivered()
        assert bridge.kills == KILLS
        assert bridge.terminate() == 0
    assert len(application.routed) > 500
    once: dict[str, dict[str, Any]] = {}
    for event in running.events:
        if event["detail"].get("transactional") is False:
            event["time"] = "the server's when it sent it, which may differ"
        assert once.setdefault(event["id"], event) == event
    details = [event["detail"] for event in once.values()]
    assert len(running.lines) > len(details), "no kill ever hit an unacknowledged event"
    assert [detail["payload"] for detail in details if detail["op"] == "outbox"] == application.routed
    audits = [int(detail["content"]) for detail in details if detail["op"] == "message"]
    assert Counter(audits) == Counter(application.audits)
    buried = {json.loads(line)["event_id"] for line in letters.read_bytes().splitlines()}
    assert len(buried) == application.poisoned > 0


def test_dead_letters_wait_while_the_database_takes_none(database: Database, tmp_path: Path) -> None:
    running = prepared(database, tmp_path, OUTBOX + "dead-letters: {type: table}")
    with running.bridge as bridge, database.connect() as application:
        bridge.until_ready()
        database.execute(f"ALTER DATABASE {database.name} SET default_transaction_read_only = on")
        application.execute(POISON[0])
        application.execute(good(1))
        until(lambda: '"what": "write dead letters"' in bridge.log, 20, lambda: bridge.log)
        assert "cannot execute INSERT in a read-only transaction" in bridge.log
        application.execute(f"ALTER DATABASE {database.name} SET default_transaction_read_only = off")
        running.until_delivered()
        assert bridge.terminate() == 0
    assert [event["detail"]["payload"] for event in running.events] == [1]
    assert database.execute("SELECT reason FROM figbridge.dead_letter") == [("OutboxMalformed",)]
