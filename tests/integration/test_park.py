"""What waits: parked, released when its row is there, never overtaken, and given up in the end."""

import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import orjson
import pytest

from figbridge.config import MappingSection
from figbridge.deadletter import TableDeadLetterStore
from figbridge.event import Event
from figbridge.metrics import Metrics
from figbridge.reverse.apply import Applier
from figbridge.reverse.consume import Consumer
from figbridge.reverse.drift import Drift
from figbridge.reverse.mapping import Mappings
from figbridge.reverse.outcome import UPDATE_MISSING, Outcome
from figbridge.reverse.park import Park
from figbridge.reverse.purge import conflicts, inbox, purge
from figbridge.transports.local import LocalSink, LocalSource
from fixtures.clock import until
from fixtures.postgres import Database
from fixtures.reverse import COLUMNS, body, count, make_shop, mapping, orders, work
from fixtures.scripted import ScriptedSource

SECTIONS: list[dict[str, Any]] = [
    {
        "match": {"source": "shop.next", "detail-type": "order"},
        "into": "shop.orders",
        "action": "upsert",
        "key": {"id": "detail.id"},
        "set": COLUMNS,
    },
    {
        "match": {"source": "shop.next", "detail-type": "status"},
        "into": "shop.orders",
        "action": "update",
        "key": {"id": "detail.id"},
        "set": {"status": "detail.status"},
        "idempotency_key": "detail.change || id",
    },
    {
        "match": {"source": "shop.next", "detail-type": "customer"},
        "into": "shop.customers",
        "action": "insert",
        "set": {"id": "detail.id", "name": "detail.name"},
    },
]


class Bridge:
    """A consumer in a thread, and the bus before it."""

    def __init__(
        self, database: Database, bus: Path, park_timeout: float = 60, sections: list[dict[str, Any]] = SECTIONS
    ) -> None:
        self.metrics, self._stop = Metrics(), threading.Event()
        self._bus = LocalSink(bus)
        applier = Applier(database.dsn, statement_timeout=5, lock_timeout=0.2)
        mappings = Mappings([MappingSection.model_validate(it) for it in sections])
        self.drift = Drift(applier.connection, mappings, self.metrics)
        consumer = Consumer(
            LocalSource(bus, subscriber="s"), mappings, applier, TableDeadLetterStore(database.dsn), self.metrics,
            park_timeout=park_timeout, drift=self.drift,
        )  # fmt: skip
        self._thread = threading.Thread(target=consumer.run, args=(self._stop,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)
        self._bus.close()
        assert not self._thread.is_alive()

    def send(self, identity: str, detail_type: str, **detail: Any) -> None:
        self.send_all((identity, detail_type, detail))

    def send_all(self, *events: tuple[str, str, dict[str, Any]]) -> None:
        """Together, so that they are received together."""
        now = datetime.now(UTC)
        self._bus.publish([Event(it, "shop.next", kind, it, now, orjson.dumps(detail)) for it, kind, detail in events])

    def outcome(self, name: str) -> float:
        return self.metrics.registry.get_sample_value("figbridge_reverse_events_total", {"outcome": name}) or 0

    def until(self, **outcomes: int) -> None:
        until(lambda: {name: self.outcome(name) for name in outcomes} == outcomes, 20, self.said)

    def said(self) -> str:
        return str({name: self.outcome(name) for name in ("applied", "duplicate", "ignored", "retried", "dead_letter")})


@pytest.fixture(autouse=True)
def _short_receives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a test waits for one."""
    monkeypatch.setattr("figbridge.reverse.consume._WAIT", 0.1)


@pytest.fixture
def shop(database: Database) -> Database:
    return make_shop(database)


@pytest.fixture
def bridge(shop: Database, tmp_path: Path) -> Iterator[Bridge]:
    with Bridge(shop, tmp_path / "bus.sqlite") as running:
        yield running


@pytest.mark.parametrize("who", ["the new system", "the legacy application"])
def test_a_child_goes_when_its_parent_has_come_whoever_brings_it(shop: Database, bridge: Bridge, who: str) -> None:
    bridge.send("1", "order", id=1, customer=7, status="a")
    bridge.until(retried=1)
    bridge.send("2", "order", id=2, status="free")
    bridge.send("3", "status", id=1, status="b")
    bridge.until(retried=2, applied=1)
    assert orders(shop) == [(2, "free")], "the later event of the row waits, others do not"
    if who == "the new system":
        bridge.send("4", "customer", id=7)
    else:
        shop.execute("INSERT INTO shop.customers VALUES (7)")
    until(lambda: orders(shop) == [(1, "b"), (2, "free")], 20, bridge.said)
    until(lambda: count(shop, "figbridge.parked") == 0)
    assert bridge.outcome("dead_letter") == 0


def test_a_parent_whose_columns_are_of_a_domain_is_waited_for(shop: Database, bridge: Bridge) -> None:
    """It forbids NULL in a column that nobody asks for, and the key that another event names."""
    shop.execute("""
        CREATE DOMAIN shop.present AS text NOT NULL;
        CREATE DOMAIN shop.positive AS bigint CHECK (value > 0);
        ALTER TABLE shop.customers ALTER id TYPE shop.positive, ADD town shop.present DEFAULT 'here';
    """)
    bridge.send("1", "order", id=1, customer=7, status="a")
    bridge.send("2", "order", id=2, customer=-7, status="a")
    bridge.until(retried=2)
    bridge.send("3", "customer", id=7)
    until(lambda: orders(shop) == [(1, "a")], 20, bridge.said)
    bridge.send("4", "order", id=4, status="a")
    bridge.until(applied=3)
    assert shop.execute("SELECT event_id FROM figbridge.parked") == [("2",)]


def test_what_brings_the_row_passes_the_update_that_waits_for_it(shop: Database, bridge: Bridge) -> None:
    bridge.send("2", "status", id=1, status="b")
    bridge.send("3", "status", id=1, status="c")
    bridge.until(retried=2)
    bridge.send("1", "order", id=1, status="a")
    until(lambda: orders(shop) == [(1, "c")], 20, bridge.said)
    bridge.until(applied=3)


def test_what_brings_the_row_passes_updates_that_came_one_by_one(shop: Database) -> None:
    """The second one waits for the row as the first one does, and not only for the first: it would be a circle."""
    with closing(Applier(shop.dsn, statement_timeout=5, lock_timeout=0.2)) as applier:
        park = Park(applier.connection, timeout=60)
        for name in ("first", "second"):
            update = work(mapping("update"), name, id=1, status=name)
            outcome = applier.apply_all([update])[update]
            assert (outcome.outcome, outcome.reason) == (Outcome.RETRY, UPDATE_MISSING)
            park.add([(update, outcome, b"{}")])
        insert = work(mapping("upsert"), "insert", id=1, status="made")
        assert applier.apply_all([insert])[insert].outcome is Outcome.APPLIED


def test_a_locked_row_is_tried_again_in_a_moment(shop: Database, bridge: Bridge) -> None:
    shop.execute("INSERT INTO shop.orders (id, status) VALUES (1, 'a')")
    with shop.connect() as legacy, legacy.transaction():
        legacy.execute("SELECT * FROM shop.orders FOR UPDATE")
        bridge.send("1", "status", id=1, status="b")
        bridge.send("2", "order", id=2, status="free")
        bridge.until(applied=1)
        until(lambda: bridge.outcome("retried") >= 1)
    until(lambda: orders(shop) == [(1, "b"), (2, "free")], 20, bridge.said)


def test_a_value_that_an_earlier_event_is_to_give_up_is_waited_for(shop: Database, bridge: Bridge) -> None:
    shop.execute("CREATE UNIQUE INDEX ON shop.orders (status)")
    shop.execute("INSERT INTO shop.orders (id, status) VALUES (1, 'a')")
    with shop.connect() as legacy, legacy.transaction():
        legacy.execute("SELECT * FROM shop.orders FOR UPDATE")
        bridge.send_all(("1", "status", {"id": 1, "status": "b"}), ("2", "order", {"id": 2, "status": "a"}))
        until(lambda: bridge.outcome("retried") >= 3, 20, bridge.said)
        reasons = shop.execute("SELECT event_id, reason, attempts > 1 FROM figbridge.parked ORDER BY place")
        assert reasons == [("1", "55P03", True), ("2", "earlier_waits", False)], "it is not tried before the other"
    until(lambda: orders(shop) == [(1, "b"), (2, "a")], 20, bridge.said)
    assert bridge.outcome("dead_letter") == 0


def test_the_key_of_a_parked_event_cannot_be_used_for_another_payload(shop: Database, bridge: Bridge) -> None:
    bridge.send("1", "status", id=1, status="b", change="key")
    bridge.until(retried=1)
    bridge.send("2", "status", id=1, status="b", change="key")
    bridge.until(retried=2)
    bridge.send("3", "status", id=1, status="other", change="key")
    bridge.until(dead_letter=1)
    assert shop.execute("SELECT reason, event_id FROM figbridge.dead_letter") == [("key_reuse", "3")]
    assert shop.execute("SELECT event_id FROM figbridge.parked") == [("1",)]


def test_what_waits_is_not_overtaken_by_the_next_transaction_of_what_was_received_with_it(shop: Database) -> None:
    bodies = [body("1", id=1, customer=7, status="a"), body("2", id=1, status="b"), body("3", id=2, status="free")]
    stop = threading.Event()
    Consumer(
        ScriptedSource(bodies, stop), Mappings([mapping().section]),
        Applier(shop.dsn, statement_timeout=5, lock_timeout=0.2), TableDeadLetterStore(shop.dsn), Metrics(),
        park_timeout=60, batch_size=1,
    ).run(stop)  # fmt: skip
    assert orders(shop) == [(2, "free")]
    assert shop.execute("SELECT event_id, reason FROM figbridge.parked ORDER BY place") == [
        ("1", "23503"),
        ("2", "row_waits"),
    ]


def test_a_key_that_nothing_can_hold_is_no_end_of_the_bridge(shop: Database, bridge: Bridge) -> None:
    endless = "".join(str(number * 7919 % 104729) for number in range(4000))
    shop.execute("ALTER TABLE shop.orders DROP CONSTRAINT orders_pkey, ALTER id TYPE text")
    bridge.drift.hurry()
    bridge.send("1", "status", id=endless, status="b")
    bridge.until(retried=1)
    bridge.send("2", "status", id=endless, status="b", change=endless)
    bridge.until(dead_letter=1)
    assert shop.execute("SELECT reason FROM figbridge.dead_letter") == [("54000",)]
    shop.execute("INSERT INTO shop.orders (id) VALUES (%s)", [endless])
    bridge.until(applied=1)


def test_what_waits_for_a_mapping_that_is_gone_is_kept_as_a_dead_letter(shop: Database, tmp_path: Path) -> None:
    """It had one when it was parked, so it is not one of those on the bus that are for others."""
    with Bridge(shop, tmp_path / "bus.sqlite") as bridge:
        bridge.send("1", "order", id=1, customer=7, status="a")
        bridge.until(retried=1)
    with Bridge(shop, tmp_path / "bus.sqlite", sections=SECTIONS[1:]) as bridge:
        bridge.send("2", "order", id=2)
        bridge.send("3", "customer", id=7)
        bridge.until(applied=1, ignored=1, dead_letter=1)
    assert shop.execute("SELECT event_id, reason FROM figbridge.dead_letter") == [("1", "unmapped")]
    assert count(shop, "figbridge.parked") == 0


def test_what_waits_in_vain_is_given_up_and_what_is_behind_it_gets_its_turn(shop: Database, tmp_path: Path) -> None:
    with Bridge(shop, tmp_path / "bus.sqlite", park_timeout=1) as bridge:
        bridge.send("1", "order", id=1, customer=404, status="a")
        bridge.send("2", "order", id=1, status="b")
        until(lambda: count(shop, "figbridge.parked") == 0 and bridge.outcome("dead_letter") >= 1, 20, bridge.said)
    (letter, *_) = shop.execute("SELECT reason, event_id, message FROM figbridge.dead_letter ORDER BY created_at")
    assert letter[:2] == ("23503", "1")
    assert "in vain" in letter[2]


def test_what_only_waited_for_its_turn_is_tried_before_it_is_given_up(shop: Database, tmp_path: Path) -> None:
    """It was parked as early as what it waited for, and would be overdue with it."""
    with Bridge(shop, tmp_path / "bus.sqlite", park_timeout=60) as bridge:
        bridge.send("1", "order", id=1, customer=404, status="a")
        bridge.send("2", "order", id=1, status="b")
        bridge.send("3", "order", id=1, customer=405, status="c")
        bridge.until(retried=3)
        shop.execute("UPDATE figbridge.parked SET parked_at = now() - interval '1 hour'")
        bridge.until(applied=1, dead_letter=2)
    assert orders(shop) == [(1, "b")]
    letters = shop.execute("SELECT event_id, reason FROM figbridge.dead_letter ORDER BY event_id")
    assert letters == [("1", "23503"), ("3", "23503")]


def test_what_is_overdue_is_tried_a_last_time(shop: Database, bridge: Bridge) -> None:
    """A bridge that was down for longer than park-timeout finds both at once: the row, and that time is over."""
    bridge.send("1", "status", id=1, status="b")
    bridge.send("2", "status", id=2, status="b")
    bridge.until(retried=2)
    shop.execute("""
        UPDATE figbridge.parked SET parked_at = now() - interval '1 hour';
        INSERT INTO shop.orders (id, status) VALUES (1, 'a')
    """)
    bridge.until(applied=1, dead_letter=1)
    assert orders(shop) == [(1, "b")]
    (letter,) = shop.execute("SELECT event_id, message FROM figbridge.dead_letter")
    assert letter[0] == "2"
    assert "earlier event" in letter[1]


def test_what_a_lock_kept_from_its_row_says_so_in_the_end(shop: Database, bridge: Bridge) -> None:
    shop.execute("INSERT INTO shop.orders (id, status) VALUES (1, 'a')")
    with shop.connect() as legacy, legacy.transaction():
        legacy.execute("SELECT * FROM shop.orders FOR UPDATE")
        bridge.send("1", "status", id=1, status="b")
        until(lambda: bridge.outcome("retried") >= 1, 20, bridge.said)
        until(lambda: count(shop, "figbridge.parked") == 1)
        shop.execute("UPDATE figbridge.parked SET parked_at = now() - interval '1 hour'")
        bridge.until(dead_letter=1)
    ((reason, message),) = shop.execute("SELECT reason, message FROM figbridge.dead_letter")
    assert reason == "55P03"
    assert "earlier event" not in message


def test_a_mapping_whose_column_goes_fails_alone_and_comes_back(shop: Database, bridge: Bridge) -> None:
    bridge.send("1", "order", id=1, status="a")
    bridge.until(applied=1)
    shop.execute("ALTER TABLE shop.orders RENAME status TO state")
    bridge.drift.hurry()
    until(lambda: bridge.metrics.registry.get_sample_value("figbridge_reverse_broken_mappings") == 2, 20)
    bridge.send("2", "order", id=2, status="a")
    bridge.send("3", "customer", id=1)
    bridge.until(applied=2, dead_letter=1)
    ((reason, message),) = shop.execute("SELECT reason, message FROM figbridge.dead_letter")
    assert reason == "mapping_broken"
    assert "'status'" in message
    shop.execute("ALTER TABLE shop.orders RENAME state TO status")
    bridge.drift.hurry()
    until(lambda: bridge.metrics.registry.get_sample_value("figbridge_reverse_broken_mappings") == 0, 20)
    bridge.send("4", "order", id=4, status="a")
    bridge.until(applied=3)


def test_a_mapping_that_is_broken_at_the_start_fails_alone(shop: Database, tmp_path: Path) -> None:
    shop.execute("ALTER TABLE shop.orders RENAME status TO state")
    with Bridge(shop, tmp_path / "bus.sqlite") as bridge:
        bridge.send("1", "order", id=1, status="a")
        bridge.send("2", "customer", id=1)
        bridge.until(applied=1, dead_letter=1)
    assert shop.execute("SELECT event_id, reason FROM figbridge.dead_letter") == [("1", "mapping_broken")]


def test_a_mapping_that_a_rule_of_its_table_forbids_comes_back_without_it(shop: Database, tmp_path: Path) -> None:
    shop.execute("CREATE RULE told AS ON INSERT TO shop.orders DO ALSO NOTIFY told")
    with Bridge(shop, tmp_path / "bus.sqlite") as bridge:
        bridge.send("1", "order", id=1, status="a")
        bridge.until(dead_letter=1)
        shop.execute("DROP RULE told ON shop.orders")
        bridge.drift.hurry()
        until(lambda: bridge.metrics.registry.get_sample_value("figbridge_reverse_broken_mappings") == 0, 20)
        bridge.send("2", "order", id=2, status="a")
        bridge.until(applied=1, dead_letter=1)
    assert shop.execute("SELECT event_id, reason FROM figbridge.dead_letter") == [("1", "mapping_broken")]


def test_old_conflicts_are_purged_unless_they_are_open(shop: Database) -> None:
    shop.execute("""
        INSERT INTO figbridge.conflict (source, idempotency_key, event_id, scope, identity, kind, decision, state,
            table_name, statement, columns, message, event, created_at)
        SELECT 's', n::text, 'e', 's', 'i', 'k', 'd', (ARRAY['open', 'decided', 'resolved', 'dismissed'])[n % 4 + 1],
               't', 1, '{}', '', '{}', now() - n * interval '1 day'
        FROM generate_series(1, 40) AS n
    """)
    assert purge(shop.dsn, conflicts(20)) == 15
    kept = dict(
        shop.execute("SELECT state, max(now() - created_at) < interval '20 days' FROM figbridge.conflict GROUP BY 1")
    )
    assert kept == {"open": False, "decided": True, "resolved": True, "dismissed": True}


def test_old_keys_are_purged_in_batches_and_without_an_event(shop: Database) -> None:
    shop.execute("CREATE PUBLICATION marks FOR TABLE figbridge.inbox WITH (publish = 'insert')")
    shop.execute("""
        INSERT INTO figbridge.inbox SELECT 's', n::text, '', 'e', now() - n * interval '1 hour'
        FROM generate_series(1, 1000) AS n
    """)
    slot = shop.create_slot()
    with shop.connect() as replica, replica.transaction():
        replica.execute("SELECT pg_advisory_xact_lock(hashtext('figbridge purge'), hashtext('inbox'))")
        assert purge(shop.dsn, inbox(30)) == 0  # without waiting
    assert purge(shop.dsn, inbox(30)) == 1000 - 720 + 1
    assert purge(shop.dsn, inbox(30)) == 0
    assert shop.execute("SELECT max(now() - applied_at) < interval '30 days' FROM figbridge.inbox") == [(True,)]
    messages = shop.execute(
        "SELECT get_byte(data, 0) FROM pg_logical_slot_peek_binary_changes(%s, NULL, NULL, "
        "'proto_version', '1', 'publication_names', 'marks')",
        [slot],
    )
    assert ord("D") not in {kind for (kind,) in messages}
