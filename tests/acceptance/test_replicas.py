"""Three replicas on one queue: events repeated and shuffled, processes killed, the database restarted; and a model.

The queue is a standard SQS queue, which promises neither order nor once. Whatever happens, the tables end up as if each
key had been applied once and every entity had only moved forward. What is sent, who is killed and after how many
messages is another story in each run; a failure says its seed (`fixtures.chance`).
"""

import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import psycopg
import pytest

from figbridge.demo.postgres import EmbeddedPostgres
from fixtures.bridge import Bridge
from fixtures.clock import until

REPLICAS, KILLS, ENTITIES, ROUNDS, OTHERS = 3, 6, 20, 12, 60
SCHEMA = """
    CREATE SCHEMA shop;
    CREATE TABLE shop.customers (id int PRIMARY KEY);
    CREATE TABLE shop.orders (id int PRIMARY KEY, customer_id int NOT NULL REFERENCES shop.customers, n int);
    CREATE TABLE shop.account (id int PRIMARY KEY, n int, note text);
    -- no unique constraint on change_id: an event that is applied twice shows as two rows
    CREATE TABLE shop.ledger (id bigint GENERATED ALWAYS AS IDENTITY, change_id text);
"""
CONFIG = """
legacy: {dsn: "${LEGACY_DSN}", tables: [shop.account]}
reverse:
  source: {type: sqs, queue_url: "%(url)s", region: eu-west-1, endpoint_url: "%(endpoint)s", visibility-timeout: 5}
  mappings:
    - match: {source: new, detail-type: account}
      into: shop.account
      action: upsert
      key: {id: detail.id}
      set: {n: detail.n, note: detail.note}
      version: detail.version
    - match: {source: new, detail-type: account-closed}
      into: shop.account
      action: delete
      key: {id: detail.id}
      version: detail.version
    - match: {source: new, detail-type: counted}
      into: shop.ledger
      action: insert
      set: {change_id: detail.change}
      idempotency_key: detail.change
    - match: {source: new, detail-type: customer}
      into: shop.customers
      action: insert
      set: {id: detail.id}
    - match: {source: new, detail-type: order}
      statements:
        - {into: shop.orders, action: insert, set: {id: detail.id, customer_id: detail.customer, n: {value: 0}}}
        - {sql: "UPDATE shop.orders SET n = n + 1 WHERE id = %%(id)s", with: {id: detail.id}}
http: {listen: "${HTTP_LISTEN}"}
"""


@dataclass
class Model:
    """What was sent, and what must be there in the end."""

    chance: random.Random
    bodies: list[str] = field(default_factory=list)
    accounts: dict[int, tuple[int, str]] = field(default_factory=dict)
    keys: set[str] = field(default_factory=set)
    changes: list[str] = field(default_factory=list)
    customers: list[int] = field(default_factory=list)

    def fill(self) -> None:
        numbers = itertools.count(1)
        for version in range(1, ROUNDS + 1):
            for entity in range(ENTITIES):
                last = (version, entity) == (ROUNDS, 0)  # one at least is closed in the end
                if last or self.chance.random() < 0.2:
                    self.accounts.pop(entity, None)
                    self._add(next(numbers), "account-closed", id=entity, version=version)
                else:
                    self.accounts[entity] = (version, "note '; DROP TABLE shop.account; --")
                    self._add(next(numbers), "account", id=entity, version=version, n=version, note=self._note(entity))
        for number in range(OTHERS):
            change = f"change-{number}"
            self.changes.append(change)
            self._add(next(numbers), "counted", key=change, change=change)
            self.customers.append(number)
            self._add(next(numbers), "customer", id=number)
            self._add(next(numbers), "order", id=number, customer=number)

    def _note(self, entity: int) -> str:
        return self.accounts[entity][1]

    def _add(self, number: int, kind: str, key: str = "", **detail: Any) -> None:
        identity = f"event-{number}"
        self.keys.add(key or identity)
        envelope = {"id": identity, "source": "new", "detail-type": kind, "detail": detail}
        self.bodies.append(json.dumps(envelope))
        if self.chance.random() < 0.15:  # a careless producer; under another id where it has a key of its own
            self.bodies.append(json.dumps(envelope | ({"id": f"again-{number}"} if key else {})))

    def shuffled(self) -> list[str]:
        """Every message up to some hundred places from where it was."""
        order = [(place + self.chance.uniform(-150, 150), body) for place, body in enumerate(self.bodies)]
        return [body for _, body in sorted(order)]


@pytest.fixture
def server() -> Iterator[EmbeddedPostgres]:
    with EmbeddedPostgres() as found:
        yield found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_three_replicas_apply_each_key_once_whatever_is_killed(
    server: EmbeddedPostgres, aws_endpoint: str, tmp_path: Path, chance: random.Random
) -> None:
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute(SCHEMA)
    sqs = boto3.client("sqs", endpoint_url=aws_endpoint)
    url = sqs.create_queue(QueueName="replicas")["QueueUrl"]
    config = tmp_path / "bridge.yaml"
    config.write_text(CONFIG % {"url": url, "endpoint": aws_endpoint})
    environment = {"LEGACY_DSN": server.dsn()}
    subprocess.run(
        [sys.executable, "-m", "figbridge", "init", "-c", str(config)],
        env={**os.environ, **environment, "HTTP_LISTEN": "127.0.0.1:0"}, check=True, timeout=120,
    )  # fmt: skip
    model = Model(chance)
    model.fill()
    with contextlib.ExitStack() as stack:
        replicas = [
            stack.enter_context(Bridge(config, tmp_path / f"{number}.log", environment=environment))
            for number in range(REPLICAS)
        ]
        for replica in replicas:
            replica.until_ready()
        bodies = model.shuffled()
        batches = [bodies[begin : begin + 10] for begin in range(0, len(bodies), 10)]
        # before which batch; the last ones when all is sent, and what is left is applied
        moments = [chance.randint(1, len(batches) + 4) for _ in range(KILLS)]
        restart = chance.randint(1, len(batches))
        for number in range(1, len(batches) + 5):
            if number == restart:
                server.stop("immediate")
                server.start()
            for _ in range(moments.count(number)):
                threading.Event().wait(chance.random() * 0.2)  # anywhere between two batches
                chance.choice(replicas).kill()
            if number <= len(batches):
                _send(sqs, url, batches[number - 1])
        for replica in replicas:
            replica.until_ready()
        _until_done(server, model)
        _until_empty(sqs, url)
        assert [replica.terminate() for replica in replicas] == [0] * REPLICAS
    _prove(server, model)


def _send(sqs: Any, url: str, bodies: list[str]) -> None:
    entries = [{"Id": str(number), "MessageBody": text} for number, text in enumerate(bodies)]
    assert not sqs.send_message_batch(QueueUrl=url, Entries=entries).get("Failed")


def _query(server: EmbeddedPostgres, query: str) -> list[Any]:
    with psycopg.connect(server.dsn()) as connection:
        return connection.execute(query).fetchall()


def _until_done(server: EmbeddedPostgres, model: Model) -> None:
    def said() -> str:
        rest = _query(server, "SELECT reason, count(*) FROM figbridge.parked GROUP BY 1")
        letters = _query(server, "SELECT reason, message FROM figbridge.dead_letter LIMIT 3")
        return f"{inbox()} of {len(model.keys)} keys; parked: {rest}; dead: {letters}"

    def inbox() -> int:
        return int(_query(server, "SELECT count(*) FROM figbridge.inbox WHERE source = 'new'")[0][0])

    # an event that was tried in vain waits up to a minute for its next try (park._LONGEST)
    until(lambda: inbox() == len(model.keys), 150, said)


def _until_empty(sqs: Any, url: str) -> None:
    names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]

    def left() -> set[str]:
        return set(sqs.get_queue_attributes(QueueUrl=url, AttributeNames=names)["Attributes"].values())

    until(lambda: left() == {"0"}, 30, lambda: f"messages left: {left()}")


def _prove(server: EmbeddedPostgres, model: Model) -> None:
    accounts = _query(server, "SELECT id, n, note FROM shop.account")
    assert {identity: (n, note) for identity, n, note in accounts} == model.accounts
    assert sorted(change for (change,) in _query(server, "SELECT change_id FROM shop.ledger")) == sorted(model.changes)
    assert sorted(_query(server, "SELECT id, customer_id, n FROM shop.orders")) == [
        (it, it, 1) for it in model.customers
    ]
    assert {key for (key,) in _query(server, "SELECT idempotency_key FROM figbridge.inbox")} == model.keys
    for table in ("parked", "dead_letter"):
        assert _query(server, f"SELECT count(*) FROM figbridge.{table}") == [(0,)]
    closed = _query(server, "SELECT count(*) FROM figbridge.entity_version WHERE deleted")
    assert closed == [(ENTITIES - len(model.accounts),)], "a tombstone of each account that is closed"
