"""`figbridge run` with rules about columns and rows: its log, its claim checks, its file of dead letters."""

import json
from pathlib import Path
from typing import Any

import boto3

from fixtures.bridge import Bridge
from fixtures.clock import until
from fixtures.postgres import Database

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
