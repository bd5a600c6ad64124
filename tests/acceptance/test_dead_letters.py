"""`figbridge dead-letters` from the outside, on real stores: what is tried again arrives once, whatever happens."""

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import pytest

from bench import proc
from conformance.events import event
from figbridge.deadletter import DeadLetter, TableDeadLetterStore, Wanted
from figbridge.event import Rejection
from fixtures.checked import config_of, inspected
from fixtures.clock import until
from fixtures.postgres import Database
from fixtures.reverse import body, count, make_shop, orders

MAPPING = """
    - match: {source: shop.next, detail-type: order}
      into: shop.orders
      action: %(action)s
      key: {id: detail.id}
      set: {customer_id: detail.customer, status: detail.status}
"""
REVERSE = """
reverse:
  source: {type: local, path: "%(directory)s/bus.sqlite"}
  lock-timeout: 1
  mappings:
"""


class Command:
    """A configuration and `figbridge dead-letters` with it."""

    def __init__(self, database: Database, directory: Path, *, forward: str = "", action: str = "upsert") -> None:
        self.database, self.config, self.events = database, directory / "bridge.yaml", directory / "events.jsonl"
        text = 'legacy: {dsn: "${LEGACY_DSN}", tables: [shop.orders]}\nhttp: {listen: "127.0.0.1:0"}\n'
        if forward:
            text += f'forward:\n  sink: {{type: file, path: "{self.events}"}}\n  {forward}\n'
        else:
            text += REVERSE % {"directory": directory} + MAPPING % {"action": action}
        self.config.write_text(text)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "figbridge", "dead-letters", *arguments, "-c", str(self.config)]
        environment = {**os.environ, "LEGACY_DSN": self.database.dsn}
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )  # fmt: skip

    def __call__(self, *arguments: str, status: int = 0) -> str:
        process = self.start(*arguments)
        out, error = process.communicate(timeout=120)
        assert process.returncode == status, out + error
        return out

    def json(self, *arguments: str, status: int = 0) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self(*arguments, "--json", status=status).splitlines()]

    @property
    def published(self) -> list[bytes]:
        return self.events.read_bytes().splitlines() if self.events.exists() else []


@pytest.fixture
def shop(database: Database) -> Database:
    return make_shop(database)


def refused(number: int, **changes: Any) -> DeadLetter:
    detail = b'{"id":"%%b","schema":"shop","table":"orders","position":{"commit_lsn":"0/%X","ordinal":0},"n":12.50}'
    made = event(number, detail=detail % number, **changes)
    return DeadLetter.of(Rejection(made, "EntryTooLarge", "too large", retryable=False), attempts=1)


def unapplied(number: int, **detail: Any) -> DeadLetter:
    content = body(f"e-{number}", id=number, status="paid", **detail)
    return DeadLetter("reverse", f"e-{number}", "22P02", "m", 1, content, table="shop.orders")


def letters(database: Database) -> list[Any]:
    return database.execute("SELECT event_id, reason FROM figbridge.dead_letter ORDER BY place")


# --- looking


def test_both_directions_letters_are_listed_shown_and_discarded(shop: Database, tmp_path: Path) -> None:
    command = Command(shop, tmp_path, forward="dead-letters: {type: table}")
    command.config.write_text(
        command.config.read_text() + REVERSE % {"directory": tmp_path} + MAPPING % {"action": "upsert"}
    )
    old = datetime.now(UTC) - timedelta(days=2)
    first = refused(1)
    TableDeadLetterStore(shop.dsn).add(
        [first, replace(unapplied(7), statement="UPDATE x"), replace(refused(2), created_at=old)]
    )

    rows = command.json("list")
    assert [(it["event_id"], it["direction"], it["reason"]) for it in rows] == [
        (event(1).id, "forward", "EntryTooLarge"),
        ("e-7", "reverse", "22P02"),
        (event(2).id, "forward", "EntryTooLarge"),
    ]
    assert rows[0]["position"] == {"commit_lsn": "0/1", "ordinal": 0}
    assert [it["table"] for it in rows] == ["shop.orders"] * 3
    assert "body" not in rows[0]

    told = command("list").splitlines()
    assert told[0].split() == ["id", "since", "direction", "reason", "attempts", "table", "position", "event"]
    assert first.id[:12] in told[1]
    assert "0/1:0" in told[1]
    before = (old - timedelta(hours=1)).isoformat()
    for arguments, found in (
        (["--direction", "reverse"], {"e-7"}),
        (["--reason", "EntryTooLarge", "--since", "24h"], {event(1).id}),
        (["--table", "shop.orders", "--since", before], {event(1).id, "e-7", event(2).id}),
        (["--table", "shop.widgets"], set()),
        ([first.id[:12]], {event(1).id}),
        (["e-7"], {"e-7"}),
    ):  # fmt: skip
        assert {it["event_id"] for it in command.json("list", *arguments)} == found
    assert "more than 2" in command("list", "--limit", "2")
    assert command("list", "nobody") == "there are none\n"

    assert first.body.decode() in command("show", first.id[:12])
    (whole,) = command.json("show", "e-7")
    assert (whole["body"].encode(), whole["statement"], whole["attempts"]) == (unapplied(7).body, "UPDATE x", 1)
    for act in (["show"], ["redrive"], ["discard", "--yes"]):
        assert command(*act, "nobody", status=1) == ""

    assert command("discard", "e-7", "--yes").splitlines()[-1] == "1 discarded"
    assert [it for it, _ in letters(shop)] == [event(1).id, event(2).id]


def test_everything_at_once_has_to_be_asked_for(shop: Database, tmp_path: Path) -> None:
    command = Command(shop, tmp_path)
    TableDeadLetterStore(shop.dsn).add([unapplied(1)])
    for arguments in (
        ["redrive"], ["discard", "--yes"], ["redrive", "--all", "e-1"],
        ["redrive", ""], ["discard", "e-1", "", "--yes"],
    ):  # fmt: skip
        command(*arguments, status=2)
    assert len(letters(shop)) == 1
    command("discard", "--all", "--yes")
    assert letters(shop) == []


def test_without_a_store_the_remedy_is_said(shop: Database, tmp_path: Path) -> None:
    process = Command(shop, tmp_path, forward="numbers: safe").start("list")
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "forward.dead-letters" in error


def test_a_store_that_is_not_there_is_found_before_the_start(shop: Database, aws_endpoint: str) -> None:
    s3 = boto3.client("s3", endpoint_url=aws_endpoint)
    letters = {"type": "s3", "bucket": "letters", "endpoint_url": aws_endpoint}
    config = config_of(shop.dsn, forward={"sink": {"type": "stdout"}, "dead-letters": letters})
    assert "create the bucket letters" in inspected(config, "run").only("error", "forward.dead-letters").remedy

    s3.create_bucket(Bucket="letters", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    assert inspected(config, "run").only("ok", "forward.dead-letters")
    assert s3.list_objects_v2(Bucket="letters")["KeyCount"] == 0


# --- forward


@pytest.fixture(params=["table", "file", "s3", "sqs"])
def forward(request: pytest.FixtureRequest, shop: Database, tmp_path: Path) -> Command:
    kind: str = request.param
    section = {"type": kind}
    if kind == "file":
        section["path"] = str(tmp_path / "letters.jsonl")
    elif kind in {"s3", "sqs"}:
        endpoint: str = request.getfixturevalue("aws_endpoint")
        section["endpoint_url"] = endpoint
        if kind == "s3":
            boto3.client("s3", endpoint_url=endpoint).create_bucket(
                Bucket="letters", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"}
            )
            section["bucket"] = "letters"
        else:
            sqs = boto3.client("sqs", endpoint_url=endpoint)
            section["queue_url"] = sqs.create_queue(QueueName="letters")["QueueUrl"]
    return Command(shop, tmp_path, forward=f"dead-letters: {json.dumps(section)}")


def put(command: Command, made: list[DeadLetter]) -> None:
    from figbridge.config import Config
    from figbridge.transports import open_dead_letters

    config = Config.load(command.config, {"LEGACY_DSN": command.database.dsn})
    section = config.forward or config.relay
    assert section
    assert section.dead_letters
    store = open_dead_letters(section.dead_letters, command.database.dsn)
    store.check()
    store.add(made)
    store.close()


def test_a_redriven_event_leaves_under_its_id_and_its_letter_is_gone(forward: Command) -> None:
    made = [refused(n) for n in range(1, 13)]
    put(forward, made)

    results = forward.json("redrive", made[0].id)
    assert [(it["event_id"], it["redriven"]) for it in results] == [(event(1).id, True)]
    assert forward.published == [made[0].body]
    assert len(forward.json("list")) == 11

    assert forward("redrive", "--all").splitlines()[-1] == "11 redriven"
    assert sorted(forward.published) == [it.body for it in made]  # to the byte: 12.50 is 12.50
    assert forward("redrive", "--all") == "0 redriven\n"
    assert forward("list") == "there are none\n"


def test_redriven_events_leave_in_the_order_in_which_they_happened(shop: Database, tmp_path: Path) -> None:
    command = Command(shop, tmp_path, forward="dead-letters: {type: table}")
    made = [refused(n, key=f"k{n % 3}") for n in range(700)]
    put(command, made)

    assert command("redrive", "--all").splitlines()[-1] == "700 redriven"
    assert command.published == [it.body for it in made]


def test_redriven_events_join_the_groups_of_their_keys_in_order(
    shop: Database, tmp_path: Path, aws_endpoint: str
) -> None:
    sqs = boto3.client("sqs", endpoint_url=aws_endpoint)
    url = sqs.create_queue(QueueName="events.fifo", Attributes={"FifoQueue": "true"})["QueueUrl"]
    command = Command(shop, tmp_path, forward="dead-letters: {type: table}")
    sink = json.dumps({"type": "sqs", "queue_url": url, "endpoint_url": aws_endpoint})
    text = command.config.read_text().replace(f'{{type: file, path: "{command.events}"}}', sink)
    command.config.write_text(text)
    put(command, [refused(n, key=f"shop.orders/{n % 3}", old_key=None) for n in range(30)])
    command("redrive", "--all")

    groups: dict[str, list[str]] = {}
    while messages := sqs.receive_message(
        QueueUrl=url, MaxNumberOfMessages=10, MessageSystemAttributeNames=["MessageGroupId", "MessageDeduplicationId"]
    ).get("Messages"):
        for it in messages:
            identity = json.loads(it["Body"])["id"]
            assert it["Attributes"]["MessageDeduplicationId"] == identity
            groups.setdefault(it["Attributes"]["MessageGroupId"], []).append(identity)
            sqs.delete_message(QueueUrl=url, ReceiptHandle=it["ReceiptHandle"])
    assert groups == {f"shop.orders/{key}": [event(n).id for n in range(30) if n % 3 == key] for key in range(3)}


def test_an_event_that_breaks_its_contract_still_stays_a_letter(shop: Database, tmp_path: Path) -> None:
    contract = tmp_path / "contracts" / "legacy.shop" / "orders.updated.json"
    contract.parent.mkdir(parents=True)
    contract.write_text('{"required": ["approved"]}')
    standard = f'contracts: {{path: "{tmp_path}/contracts"}}'
    command = Command(shop, tmp_path, forward=f"{standard}\n  dead-letters: {{type: table}}")
    put(command, [refused(1)])

    (result,) = command.json("redrive", "--all", status=1)
    assert (result["redriven"], result["reason"]) == (False, "ContractBroken")
    assert command.published == []
    assert letters(shop) == [(event(1).id, "ContractBroken")]

    contract.write_text('{"required": ["n"]}')
    assert [it["redriven"] for it in command.json("redrive", "--all")] == [True]


def test_a_redriven_event_has_the_form_of_the_others(shop: Database, tmp_path: Path) -> None:
    command = Command(shop, tmp_path, forward="format: cloudevents\n  dead-letters: {type: table}")
    put(command, [refused(1)])
    command("redrive", "--all")

    (line,) = map(json.loads, command.published)
    assert (line["specversion"], line["id"], line["source"]) == ("1.0", event(1).id, "legacy.shop")


def test_an_event_that_is_refused_once_more_stays_a_letter(shop: Database, tmp_path: Path, aws_endpoint: str) -> None:
    url = boto3.client("sqs", endpoint_url=aws_endpoint).create_queue(QueueName="events")["QueueUrl"]
    command = Command(shop, tmp_path, forward="dead-letters: {type: table}")
    sink = json.dumps({"type": "sqs", "queue_url": url, "endpoint_url": aws_endpoint})
    text = command.config.read_text().replace(f'{{type: file, path: "{command.events}"}}', sink)
    command.config.write_text(text)
    huge = refused(1)
    huge = replace(huge, body=event(1, detail=b'{"id":"%%b","v":"%b"}' % (b"x" * 1_100_000)).envelope())
    broken = DeadLetter("forward", "e", "c", "m", 1, b"no envelope")
    put(command, [huge, broken, refused(2)])

    results = {it["event_id"]: (it["redriven"], it["reason"]) for it in command.json("redrive", "--all", status=1)}

    assert results == {
        event(1).id: (False, "EntryTooLarge"), "e": (False, "Unreadable"), event(2).id: (True, None),
    }  # fmt: skip
    assert [it for it, _ in letters(shop)] == [event(1).id, "e"]

    # the remedy, and once more
    boto3.client("s3", endpoint_url=aws_endpoint).create_bucket(
        Bucket="events", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"}
    )
    claims = json.dumps({"bucket": "events", "endpoint_url": aws_endpoint})
    command.config.write_text(
        command.config.read_text().replace("  dead-letters", f"  claim-check: {claims}\n  dead-letters")
    )
    assert [it["redriven"] for it in command.json("redrive", event(1).id)] == [True]
    assert [it for it, _ in letters(shop)] == ["e"]


# --- reverse


def test_a_redriven_event_is_applied_once_and_its_letter_is_gone(shop: Database, tmp_path: Path) -> None:
    command = Command(shop, tmp_path)
    made = [unapplied(n) for n in range(5)]
    TableDeadLetterStore(shop.dsn).add(made)

    assert command("redrive", "--direction", "reverse").splitlines()[-1] == "5 redriven"
    assert shop.execute("SELECT id, status FROM shop.orders ORDER BY id") == [(n, "paid") for n in range(5)]
    assert letters(shop) == []

    # the same letters once more, as a crash before their removal would leave them; the row has moved on since
    shop.execute("UPDATE shop.orders SET status = 'moved on'")
    TableDeadLetterStore(shop.dsn).add(made)
    assert command("redrive", "--all").splitlines()[-1] == "5 redriven"
    assert set(shop.execute("SELECT status FROM shop.orders")) == {("moved on",)}
    assert count(shop, "figbridge.inbox") == 5


@pytest.mark.pg(">= 14")
def test_a_redriven_event_bears_the_mark_of_the_loop_guard(shop: Database, tmp_path: Path) -> None:
    command = Command(shop, tmp_path)
    command.config.write_text(
        command.config.read_text().replace("tables: [shop.orders]", "tables: [shop.orders], loop-guard: message")
    )
    shop.execute("CREATE PUBLICATION p FOR TABLE shop.orders")
    shop.create_slot()
    TableDeadLetterStore(shop.dsn).add([unapplied(1)])
    command("redrive", "--all")

    options = "'proto_version', '1', 'publication_names', 'p', 'messages', 'true'"
    changes = shop.execute(
        f"SELECT data FROM pg_logical_slot_get_binary_changes(%s, NULL, NULL, {options})", [shop.slot]
    )  # fmt: skip
    kinds = b"".join(bytes(data)[:1] for (data,) in changes)
    assert b"BMRIC" in kinds  # Begin, Message, Relation, Insert, Commit


def test_a_reused_key_stays_a_letter(shop: Database, tmp_path: Path) -> None:
    command = Command(shop, tmp_path)
    TableDeadLetterStore(shop.dsn).add([unapplied(1)])
    command("redrive", "--all")
    other = replace(unapplied(1), body=body("e-1", id=1, status="another payload"))
    TableDeadLetterStore(shop.dsn).add([other])

    (result,) = command.json("redrive", "--all", status=1)

    assert (result["redriven"], result["reason"]) == (False, "key_reuse")
    assert letters(shop) == [("e-1", "key_reuse")]
    assert shop.execute("SELECT status FROM shop.orders") == [("paid",)]


def test_what_can_still_not_be_applied_stays_and_the_others_go(shop: Database, tmp_path: Path) -> None:
    command = Command(shop, tmp_path)
    poison = replace(unapplied(2), body=body("e-2", id="no number", status="x"))
    TableDeadLetterStore(shop.dsn).add([unapplied(1), poison, unapplied(3), replace(unapplied(4), body=b"\xff")])

    results = {it["event_id"]: it["reason"] for it in command.json("redrive", "--all", status=1)}

    assert results == {"e-1": None, "e-2": "22P02", "e-3": None, "e-4": "malformed"}
    assert [it for it, _ in letters(shop)] == ["e-2", "e-4"]


def test_a_letter_without_a_mapping_stays_whatever_becomes_of_strangers_in_the_queue(
    shop: Database, tmp_path: Path
) -> None:
    command = Command(shop, tmp_path)
    before = command.config.read_text()
    command.config.write_text(before.replace("detail-type: order", "detail-type: order.placed"))
    TableDeadLetterStore(shop.dsn).add([unapplied(1)])

    (result,) = command.json("redrive", "--all", status=1)

    assert (result["redriven"], result["reason"]) == (False, "unmapped")
    assert [it for it, _ in letters(shop)] == ["e-1"]
    command.config.write_text(before)
    assert [it["redriven"] for it in command.json("redrive", "--all")] == [True]
    assert orders(shop) == [(1, "paid")]


def test_a_letter_that_is_refused_again_says_why_and_how_often_it_was_tried(shop: Database, tmp_path: Path) -> None:
    command = Command(shop, tmp_path)
    shop.execute("ALTER TABLE shop.orders ADD CHECK (status <> 'paid')")
    first = replace(unapplied(1), reason="P0001", message="period closed")
    TableDeadLetterStore(shop.dsn).add([first, unapplied(2, customer="none"), unapplied(3)])
    for _ in range(2):
        command("redrive", "e-1", status=1)

    (told,) = command.json("show", "--reason", "23514")
    assert (told["event_id"], told["attempts"], told["table"]) == ("e-1", 3, "shop.orders")
    assert "violates check constraint" in told["message"]
    assert "INSERT INTO" in told["statement"]
    assert [it["event_id"] for it in command.json("list")] == ["e-1", "e-2", "e-3"]
    assert datetime.fromisoformat(told["created_at"]) == first.created_at


def test_what_waits_for_its_parent_leaves_the_letters_for_the_park(shop: Database, tmp_path: Path) -> None:
    command = Command(shop, tmp_path)
    TableDeadLetterStore(shop.dsn).add([unapplied(1, customer=9)])

    assert command("redrive", "--all").splitlines()[-1] == "1 redriven"

    assert letters(shop) == []
    assert shop.execute("SELECT event_id, reason FROM figbridge.parked") == [("e-1", "23503")]


# --- relay


def test_the_relays_letters_are_judged_again(shop: Database, tmp_path: Path) -> None:
    contract = tmp_path / "contracts" / "cwi.servicea" / "NEW_WIDGET.json"
    contract.parent.mkdir(parents=True)
    contract.write_text('{"required": ["widget_id"]}')
    command = Command(shop, tmp_path, forward="numbers: safe")
    command.config.write_text(f"""
relay:
  sink: {{type: file, path: "{command.events}"}}
  contracts: "{contract.parents[1]}"
  dead-letters: {{type: file, path: "{tmp_path}/letters.jsonl"}}
""")
    envelope = (
        b'{"id":"%b","source":"cwi.servicea","detail-type":"NEW_WIDGET","time":"2026-11-23T10:00:00Z","detail":{%b}}'
    )
    good, bad = envelope % (b"1", b'"widget_id":"abc123"'), envelope % (b"2", b"")
    put(command, [DeadLetter("relay", it, "contract", "m", 1, body) for it, body in (("1", good), ("2", bad))])

    results = {it["event_id"]: it["reason"] for it in command.json("redrive", "--all", status=1)}

    assert results == {"1": None, "2": "contract"}
    assert [json.loads(it)["source"] for it in command.published] == ["valid.cwi.servicea"]
    assert [it["event_id"] for it in command.json("list")] == ["2"]
    contract.write_text("{}")  # it was too strict
    assert [it["redriven"] for it in command.json("redrive", "--direction", "relay")] == [True]
    assert len(command.published) == 2


# --- whatever happens


@pytest.mark.slow
def test_kill_9_during_a_redrive_repeats_harmlessly(shop: Database, tmp_path: Path) -> None:
    command = Command(shop, tmp_path)
    shop.execute("""
        CREATE TABLE shop.writes (id bigint);
        CREATE FUNCTION shop.note() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN INSERT INTO shop.writes VALUES (NEW.id); RETURN NEW; END $$;
        CREATE TRIGGER note AFTER INSERT OR UPDATE ON shop.orders FOR EACH ROW EXECUTE FUNCTION shop.note();
    """)
    TableDeadLetterStore(shop.dsn).add([unapplied(n) for n in range(4000)])
    fate = random.Random(7)

    for _ in range(6):
        before = count(shop, "figbridge.dead_letter")
        if not before:
            break
        process = command.start("redrive", "--all")
        until(partial(_further, shop, process, 4000 - before + fate.randrange(1, 500)), 60)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=120)
    killed_at = count(shop, "figbridge.dead_letter")
    command("redrive", "--all")

    assert 0 < killed_at < 4000, "it was killed in the middle"
    assert letters(shop) == []
    assert shop.execute("SELECT count(*), count(DISTINCT id) FROM shop.writes") == [(4000, 4000)]
    assert count(shop, "shop.orders") == count(shop, "figbridge.inbox") == 4000


def _further(shop: Database, process: subprocess.Popen[str], applied: int) -> bool:
    return count(shop, "figbridge.inbox") >= applied or process.poll() is not None


@pytest.mark.slow
def test_kill_9_during_a_forward_redrive_loses_nothing(shop: Database, tmp_path: Path) -> None:
    command = Command(shop, tmp_path, forward="dead-letters: {type: table}")
    made = [refused(n) for n in range(3000)]
    put(command, made)
    process = command.start("redrive", "--all")
    until(lambda: len(command.published) >= 500, 60)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=120)

    left = {it.letter.body for it in TableDeadLetterStore(shop.dsn).scan(Wanted())}
    assert left | set(command.published) == {it.body for it in made}
    command("redrive", "--all")

    assert letters(shop) == []
    assert set(command.published) == {it.body for it in made}


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_redrive_needs_no_more_memory_for_more_letters(shop: Database, tmp_path: Path, direction: str) -> None:
    command = Command(shop, tmp_path, forward="dead-letters: {type: table}" if direction == "forward" else "")
    peaks = []
    number = 0
    for megabytes in (8, 128):
        for _ in range(megabytes // 8):
            size = b"x" * 65536
            made = []
            for _ in range(128):
                number += 1
                if direction == "forward":
                    detail = b'{"id":"%%b","v":"%b"}' % size
                    refusal = Rejection(event(number, detail=detail), "c", "m", retryable=False)
                    made.append(DeadLetter.of(refusal, 1))
                else:
                    made.append(unapplied(number, filling=size.decode()))
            TableDeadLetterStore(shop.dsn).add(made)
        process = command.start("redrive", "--all", "--json")
        assert process.stdout
        peak = 0
        for line in process.stdout:  # the peak of a process can be read while it lives
            assert json.loads(line)["redriven"]
            try:
                peak = max(peak, proc.memory(process.pid).peak)
            except ProcessLookupError:
                break
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        peaks.append(peak)
    assert letters(shop) == []
    assert peaks[1] - peaks[0] < 32 * 1024 * 1024, f"{peaks[0] >> 20} MiB for 8 MiB, {peaks[1] >> 20} MiB for 128 MiB"
