"""`figbridge run` with rules about columns and rows: its log, its claim checks, its file of dead letters."""

import json
from pathlib import Path
from typing import Any

import boto3

from fixtures.bridge import Bridge
from fixtures.clock import until
from fixtures.postgres import Database
from fixtures.running import Running

CONFIG = """
legacy: {dsn: "${LEGACY_DSN}", slot: %(slot)s, tables: [shop.people, shop.orders], failover: false}
forward:
  sink: {type: sqs, queue_url: "%(queue)s", endpoint_url: "%(endpoint)s"}
  claim-check: {bucket: large, endpoint_url: "%(endpoint)s"}
  dead-letters: {type: file, path: %(letters)s}
  hash: {key: "${PSEUDONYM_KEY}", id: "2026-11"}
  select:
    - {table: shop.people, exclude: [ssn], hash: [email], mask: [id], where: "state != 'hidden'"}
http: {listen: "${HTTP_LISTEN:-127.0.0.1:0}"}
"""


def test_nothing_forbidden_leaves_the_process(database: Database, aws_endpoint: str, tmp_path: Path) -> None:
    sqs: Any = boto3.client("sqs", endpoint_url=aws_endpoint)
    s3: Any = boto3.client("s3", endpoint_url=aws_endpoint)
    queue = sqs.create_queue(QueueName="events")["QueueUrl"]
    s3.create_bucket(Bucket="large", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    database.execute(
        "CREATE SCHEMA shop; CREATE TABLE shop.orders (id int PRIMARY KEY);"
        "CREATE TABLE shop.people (id text PRIMARY KEY, ssn text, email text, state text, cv text)"
    )
    database.execute("CREATE PUBLICATION figbridge FOR TABLE shop.people, shop.orders")
    database.create_slot()
    config = tmp_path / "bridge.yaml"
    names = {"slot": database.slot, "queue": queue, "endpoint": aws_endpoint, "letters": tmp_path / "letters"}
    config.write_text(CONFIG % names)
    key = "correct horse battery staple"
    bridge = Bridge(config, tmp_path / "log", environment={"LEGACY_DSN": database.dsn, "PSEUDONYM_KEY": key})
    with bridge:
        bridge.until_ready()
        database.execute("INSERT INTO shop.people VALUES ('secret-1', 'secret', 'secret@x', 'ok', 'cv')")
        database.execute(
            "INSERT INTO shop.people VALUES ('secret-2', 'secret', 'secret@x', 'ok', repeat('x', 2000000))"
        )
        database.execute("INSERT INTO shop.people VALUES ('secret-3', 'secret', 'secret@x', 'hidden', 'cv')")
        database.execute("UPDATE shop.people SET id = 'secret-4', state = 'ok' WHERE id = 'secret-1'")
        database.execute("INSERT INTO shop.orders VALUES (1)")
        published = 'figbridge_forward_published_total{sink="sqs"}'
        until(lambda: bridge.metric(published) == 4, 30, lambda: bridge.log)
        assert bridge.metric('figbridge_forward_filtered_total{table="shop.people"}') == 1
        assert bridge.metric("figbridge_forward_claim_checks_total") == 1
        assert bridge.terminate() == 0

    (stored,) = s3.list_objects_v2(Bucket="large")["Contents"]
    body = s3.get_object(Bucket="large", Key=stored["Key"])["Body"].read()
    messages = sqs.receive_message(QueueUrl=queue, MaxNumberOfMessages=10, AttributeNames=["All"])["Messages"]
    left = body.decode() + json.dumps(messages) + bridge.log
    assert json.loads(body)["detail"]["after"]["id"] == "***"
    assert len(messages) == 4
    assert not (tmp_path / "letters").exists()
    assert "secret" not in left
    assert key not in left
    logged = [json.loads(line) for line in bridge.log.splitlines() if "what leaves" in line]
    assert [(it["table"], it["columns"]) for it in logged] == [
        (
            "shop.people",
            (
                "leave as they are: state, cv; hashed (key 2026-11): email; masked: id; stay: ssn; only rows where "
                "state != 'hidden'"
            ),
        ),
        ("shop.orders", "leave as they are: id"),
    ]


def test_a_table_renamed_while_no_bridge_runs_leaves_by_its_rules(database: Database, tmp_path: Path) -> None:
    def rules(*names: str) -> str:
        former = f", former-names: [{', '.join(names[1:])}]" if names[1:] else ""
        return f"slot-guard: table\nselect:\n  - {{table: {names[0]}, exclude: [ssn]{former}}}"

    database.execute("CREATE TABLE people (id int PRIMARY KEY, ssn text)")
    before = Running(database.dsn, database.slot, tmp_path, "public.people", forward=rules("public.people"))
    before.command("init")
    database.execute("INSERT INTO people VALUES (1, 'secret')")
    database.execute("ALTER TABLE people RENAME TO folk")
    database.execute("INSERT INTO folk VALUES (2, 'secret')")
    assert "former-names" in before.command("check", 2)

    running = Running(database.dsn, database.slot, tmp_path, "public.folk", forward=rules("public.folk"))
    running.command("init")
    with running.bridge as bridge:
        assert bridge.wait() == 1
        assert "public.people" in bridge.log
        assert running.lines == []
    running.configure(rules("public.folk", "public.people"))
    with running.bridge as bridge:
        bridge.until_ready()
        details = [it["detail"] for it in running.until_events(3)]
        assert [it.get("after") for it in details] == [{"id": 1}, None, {"id": 2}]
        assert details[1]["op"] == "schema.changed"
        assert bridge.terminate() == 0
    assert b"secret" not in running.events_path.read_bytes()
    assert b"ssn" not in running.events_path.read_bytes()
