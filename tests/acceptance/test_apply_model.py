"""The reverse path against a model that applies one event after the other, under whatever hypothesis thinks of.

Duplicates, shuffled events, late versions, deleted rows, keys used twice, poison, orders before their customer, batches
cut anywhere, backends killed before and after COMMIT, processes that end between COMMIT and acknowledgement. After each
batch the tables are the model's. The consumer is the real one, on a real server; only its queue is a list.
"""

import itertools
import json
import os
import secrets
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from figbridge.config import MappingSection
from figbridge.deadletter import TableDeadLetterStore
from figbridge.metrics import Metrics
from figbridge.provision.statements import schema_sql
from figbridge.reverse.apply import Applier
from figbridge.reverse.consume import Consumer
from figbridge.reverse.mapping import Mappings
from fixtures.postgres import Database
from fixtures.reverse import count
from fixtures.scripted import ScriptedSource

PATIENCE = 25  # seconds of the long run
SCHEMA = """
    CREATE SCHEMA shop;
    CREATE TABLE shop.account (id int PRIMARY KEY, n int, note text);
    CREATE TABLE shop.customers (id int PRIMARY KEY);
    CREATE TABLE shop.orders (id int PRIMARY KEY, customer_id int NOT NULL REFERENCES shop.customers, status text);
    -- no unique constraint: an event that is applied twice shows as two rows
    CREATE TABLE shop.ledger (id bigint GENERATED ALWAYS AS IDENTITY, event text);
"""
TABLES = "shop.account, shop.customers, shop.orders, shop.ledger, figbridge.inbox, figbridge.entity_version"
LEDGER = {"into": "shop.ledger", "action": "insert", "set": {"event": "id"}}
ACCOUNT = {"into": "shop.account", "key": {"id": "detail.id"}}
ORDER = {"into": "shop.orders", "key": {"id": "detail.id"}}
MAPPINGS: list[dict[str, Any]] = [
    {
        "match": {"source": "new", "detail-type": "account"},
        "statements": [{**ACCOUNT, "action": "upsert", "set": {"n": "detail.n", "note": "detail.note"}}, LEDGER],
        "version": "detail.version",
    },
    {
        "match": {"source": "new", "detail-type": "closed"},
        "statements": [{**ACCOUNT, "action": "delete"}, LEDGER],
        "version": "detail.version",
    },
    {
        "match": {"source": "new", "detail-type": "customer"},
        "statements": [{"into": "shop.customers", "action": "insert", "set": {"id": "detail.id"}}, LEDGER],
    },
    {
        "match": {"source": "new", "detail-type": "order"},
        "statements": [
            {**ORDER, "action": "upsert", "set": {"customer_id": "detail.customer", "status": "detail.status"}},
            LEDGER,
        ],
    },
    {
        "match": {"source": "new", "detail-type": "order-moved"},
        "statements": [{**ORDER, "action": "update", "set": {"status": "detail.status"}}, LEDGER],
    },
]


class Crash(BaseException):
    """The process ends here."""


@dataclass
class Model:
    """What one event after the other does. Orders are only looked at in the end: until then they wait."""

    keys: dict[str, str] = field(default_factory=dict)  # applied or ignored → its body
    versions: dict[int, int] = field(default_factory=dict)
    accounts: dict[int, tuple[int, str]] = field(default_factory=dict)
    customers: set[int] = field(default_factory=set)
    orders: dict[int, str] = field(default_factory=dict)  # the last status that arrived
    made: dict[int, int] = field(default_factory=dict)  # order → its customer
    applied: set[str] = field(default_factory=set)
    dead: set[str] = field(default_factory=set)

    def look(self, keys: set[str], dead: set[str]) -> None:
        """Adopt what became of poison whose batch was cut: both are right, and only the tables say which it was.

        It is set aside, and what follows it in the batch is committed before it is in the dead letters. If a newer
        version was, what is delivered again is late, and a late event is not looked at any more.
        """
        for body in sorted(self.dead):
            envelope = json.loads(body)
            key, detail = envelope["id"], envelope["detail"]
            if key in keys and key not in self.keys and detail["version"] <= self.versions.get(detail["id"], 0):
                self.keys[key] = body
                if body not in dead:  # it may be there since an earlier delivery
                    self.dead.remove(body)

    def apply(self, body: str) -> None:
        envelope = json.loads(body)
        key, kind, detail = envelope["id"], envelope["detail-type"], envelope["detail"]
        if key in self.keys:
            if self.keys[key] != body:
                self.dead.add(body)
            return
        entity = detail["id"]
        if kind in {"account", "closed"}:
            if detail["version"] > self.versions.get(entity, 0):
                if not self._account(kind, entity, detail, body):
                    return
                self.applied.add(key)
        else:
            self._order(kind, entity, detail)
            self.applied.add(key)
        self.keys[key] = body

    def _account(self, kind: str, entity: int, detail: dict[str, Any], body: str) -> bool:
        if kind == "closed":
            self.accounts.pop(entity, None)
        elif isinstance(detail["n"], str):
            self.dead.add(body)
            return False
        else:
            self.accounts[entity] = (detail["n"], detail["note"])
        self.versions[entity] = detail["version"]
        return True

    def _order(self, kind: str, entity: int, detail: dict[str, Any]) -> None:
        if kind == "customer":
            self.customers.add(entity)
            return
        if kind == "order":
            self.made[entity] = detail["customer"]
            if entity in self.orders:  # an update is there already, and waits for the row
                return
        self.orders[entity] = detail["status"]


class Applying(RuleBasedStateMachine):
    """Events are made, then delivered in some order and in some cut."""

    database: Database

    @initialize(batch_size=st.sampled_from([1, 3, 500]))
    def begin(self, batch_size: int) -> None:
        self.database.execute(f"TRUNCATE {TABLES}, figbridge.parked, figbridge.dead_letter")
        self.model = Model()
        self.batch_size = batch_size
        self.waiting: list[str] = []
        self.sent: list[str] = []
        self.faults: list[str] = []
        self.cut = False  # whether a fault has hit the last delivery
        self.kinds: Counter[str] = Counter()
        self.orders = 0

    def _make(self, kind: str, key: str | None = None, **detail: Any) -> None:
        identity = key or f"{kind}-{self.kinds[kind]}"
        self.kinds[kind] += 1
        self.waiting.append(json.dumps({"id": identity, "source": "new", "detail-type": kind, "detail": detail}))

    @rule(
        entity=st.integers(0, 2),
        version=st.integers(1, 9),
        n=st.integers(0, 9),
        bad=st.sampled_from([False] * 7 + [True]),
    )
    def change_account(self, entity: int, version: int, n: int, bad: bool) -> None:
        self._make("account", id=entity, version=version, n="many" if bad else n, note=f"it's {n}'; DROP TABLE x; --")

    @rule(entity=st.integers(0, 2), version=st.integers(1, 9))
    def close_account(self, entity: int, version: int) -> None:
        self._make("closed", id=entity, version=version)

    @rule(updates=st.integers(0, 2), customer_last=st.booleans(), order_last=st.booleans())
    def make_order(self, updates: int, customer_last: bool, order_last: bool) -> None:
        number, self.orders = self.orders, self.orders + 1
        steps: list[tuple[str, dict[str, Any]]] = [
            ("order-moved", {"id": number, "status": f"moved {it}"}) for it in range(updates)
        ]
        made = ("order", {"id": number, "customer": number, "status": "made"})
        steps = [*steps, made] if order_last else [made, *steps]
        customer: tuple[str, dict[str, Any]] = ("customer", {"id": number})
        for kind, detail in [*steps, customer] if customer_last else [customer, *steps]:
            self._make(kind, **detail)

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def send_again(self, data: st.DataObject) -> None:
        self.waiting.append(data.draw(st.sampled_from(self.sent)))

    @precondition(lambda self: any('"account"' in body and '"many"' not in body for body in self.sent))
    @rule(data=st.data())
    def use_a_key_twice(self, data: st.DataObject) -> None:
        sent = [body for body in self.sent if '"account"' in body and (not self.faults or '"many"' not in body)]
        old = json.loads(data.draw(st.sampled_from(sent)))
        self._make("account", key=old["id"], **{**old["detail"], "note": "another payload"})

    @rule(
        fault=st.sampled_from(["kill before commit", "kill after commit", "crash before commit", "crash after commit"])
    )
    def arm(self, fault: str) -> None:
        self.faults = [*self.faults, fault][-2:]

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), shuffled=st.booleans())
    def deliver(self, data: st.DataObject, shuffled: bool) -> None:
        bodies = self.waiting
        if shuffled:  # accounts only: an order and its updates are in order per entity, as a FIFO group would be
            accounts = data.draw(st.permutations([it for it in bodies if '"account"' in it or '"closed"' in it]))
            bodies = [*accounts, *(it for it in bodies if '"account"' not in it and '"closed"' not in it)]
        for body in bodies:
            self.model.apply(body)
        self.sent += bodies
        self.waiting = []
        self.cut = False
        self._consume([body.encode() for body in bodies])

    def _consume(self, bodies: list[bytes], *, attempts: int = 1, until_nothing_waits: bool = False) -> None:
        def done() -> bool:
            return not until_nothing_waits or count(self.database, "figbridge.parked") == 0

        while True:
            stop, metrics = threading.Event(), Metrics()
            source = ScriptedSource(bodies, stop, done, attempts=attempts)
            applier = Applier(self.database.dsn, statement_timeout=10, lock_timeout=2, on_step=self._step)
            self._applier = applier
            mappings = Mappings([MappingSection.model_validate(it) for it in MAPPINGS])
            consumer = Consumer(
                source,
                mappings,
                applier,
                TableDeadLetterStore(self.database.dsn),
                metrics,
                park_timeout=600,
                batch_size=self.batch_size,
            )
            try:
                consumer.run(stop)
            except Crash:  # what was not acknowledged comes again
                bodies, attempts = [delivery.body for delivery in source.left], attempts + 1
                continue
            assert not source.left
            return

    def _step(self, step: str) -> None:
        when = {"executed": "before commit", "committed": "after commit"}[step]
        if not self.faults or not self.faults[0].endswith(when):
            return
        self.cut = True
        if self.faults.pop(0).startswith("crash"):
            raise Crash
        pid = self._applier.connection().info.backend_pid
        self.database.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])

    @invariant()
    def the_tables_are_the_models(self) -> None:
        if not hasattr(self, "model"):
            return
        with self.database.connect() as connection:
            accounts = connection.execute("SELECT id, n, note FROM shop.account").fetchall()
            ledger = [event for (event,) in connection.execute("SELECT event FROM shop.ledger")]
            keys = {key for (key,) in connection.execute("SELECT idempotency_key FROM figbridge.inbox")}
            parked = {key for (key,) in connection.execute("SELECT idempotency_key FROM figbridge.parked")}
            dead = {bytes(body).decode() for (body,) in connection.execute("SELECT body FROM figbridge.dead_letter")}
        if self.cut:
            self.model.look(keys, dead)
        assert {identity: (n, note) for identity, n, note in accounts} == self.model.accounts
        assert len(ledger) == len(set(ledger)), "an event was applied twice"
        assert set(ledger) | parked == self.model.applied
        assert keys | parked == self.model.keys.keys()
        assert dead == self.model.dead

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        self.faults = []
        self._consume([body.encode() for body in self.sent], until_nothing_waits=True)  # a replay of everything
        for body in self.sent:
            self.model.apply(body)
        self.the_tables_are_the_models()
        orders = self.database.execute("SELECT id, customer_id, status FROM shop.orders")
        assert {identity: (customer, status) for identity, customer, status in orders} == {
            number: (customer, self.model.orders[number]) for number, customer in self.model.made.items()
        }
        assert {it for (it,) in self.database.execute("SELECT id FROM shop.customers")} == self.model.customers


def _run(database: Database, examples: int, steps: int, *, story: int | None = None) -> None:
    machine = type("Machine", (Applying,), {"database": database})
    run_state_machine_as_test(
        machine if story is None else seed(story)(machine),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.explicit, Phase.reuse, Phase.generate),  # to shrink a story takes minutes
            print_blob=True,
        ),
    )


@pytest.fixture
def shop(database: Database) -> Database:
    database.execute(schema_sql())
    database.execute(SCHEMA)
    return database


@pytest.mark.timeout(180)
def test_whatever_happens_the_tables_are_those_of_one_event_after_the_other(shop: Database) -> None:
    _run(shop, examples=20, steps=25)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_for_as_long_as_we_have_the_patience(shop: Database) -> None:
    """Longer stories, each run with a seed of its own; in a search with others than the last time."""
    end, search = time.monotonic() + PATIENCE, "FIGBRIDGE_TEST_SEARCH" in os.environ
    stories = itertools.count(secrets.randbelow(1 << 32) if search else 0)
    while time.monotonic() < end:
        story = next(stories)
        print(f"story {story}")  # pytest shows it beside a failure
        _run(shop, examples=4, steps=80, story=story)
