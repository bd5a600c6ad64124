"""The order of message groups and of entities at once, whatever waits: random events, batches and troubles."""

import threading
from contextlib import ExitStack
from random import Random
from typing import Any

import pytest

from figbridge.deadletter import TableDeadLetterStore
from figbridge.metrics import Metrics
from figbridge.reverse.apply import Applier
from figbridge.reverse.consume import Consumer
from figbridge.reverse.mapping import Mappings
from fixtures.postgres import Database
from fixtures.reverse import HISTORY, body, count, make_shop, mapping
from fixtures.scripted import ScriptedSource

EVENTS, GROUPS, ORDERS, CUSTOMERS = 240, 8, 16, 5


@pytest.mark.parametrize("rate", [0.01, 0.03])
@pytest.mark.parametrize(("batch_size", "at_once"), [(3, 20), (500, 60)])
def test_nothing_overtakes_what_is_before_it_in_its_group_or_its_entity(
    database: Database, chance: Random, batch_size: int, at_once: int, rate: float
) -> None:
    """Orders wander from group to group. Customers come one by one, in between, and some events are poison."""
    shop = make_shop(database)
    shop.execute(HISTORY)
    sent: list[dict[str, Any]] = []
    for number in range(EVENTS):
        group = chance.randrange(GROUPS)
        order = chance.randrange(ORDERS) if chance.random() < 0.6 else group + GROUPS * chance.randrange(2)
        waits = chance.randrange(CUSTOMERS) if chance.random() < 2 * rate else None
        poison = chance.random() < rate and waits is None
        sent.append({"number": number, "group": group, "order": order, "waits": waits, "poison": poison})

    def consume(some: list[dict[str, Any]], *, until_empty: bool = False) -> None:
        stop = threading.Event()
        bodies = [
            body(
                f"e{it['number']}",
                id=it["order"],
                status=str(it["number"]),
                customer=it["waits"],
                n="many" if it["poison"] else 1,
            )
            for it in some
        ]
        source = ScriptedSource(
            bodies,
            stop,
            (lambda: not count(shop, "figbridge.parked")) if until_empty else (lambda: True),
            at_once=at_once,
            groups=[f"queue/{it['group']}" for it in some],
        )
        applier = Applier(shop.dsn, statement_timeout=5, lock_timeout=0.05)
        letters = TableDeadLetterStore(shop.dsn)
        Consumer(
            source, Mappings([mapping().section]), applier, letters, Metrics(), park_timeout=600,
            batch_size=batch_size, order="group",
        ).run(stop)  # fmt: skip

    with ExitStack() as stack:
        application = stack.enter_context(shop.connect())
        cuts = sorted(chance.sample(range(1, EVENTS), CUSTOMERS))
        for place, (begin, end) in enumerate(zip([0, *cuts], [*cuts, EVENTS], strict=True)):
            application.execute("BEGIN; UPDATE shop.orders SET note = 'x' WHERE id IN (1, 2)")
            consume(sent[begin:end])
            application.execute("ROLLBACK")
            if place < CUSTOMERS:
                shop.execute("INSERT INTO shop.customers VALUES (%s)", [place])
        shop.execute("UPDATE figbridge.parked SET due_at = now()")
        consume([], until_empty=True)

    written = [int(status) for (status,) in shop.execute("SELECT status FROM shop.history ORDER BY place")]
    good = [it for it in sent if not it["poison"]]
    assert sorted(written) == [it["number"] for it in good]
    assert count(shop, "figbridge.dead_letter") == EVENTS - len(good)
    for what, values in ("group", range(GROUPS)), ("order", range(ORDERS)):
        for value in values:
            expected = [it["number"] for it in good if it[what] == value]
            assert [number for number in written if number in expected] == expected, (what, value)
