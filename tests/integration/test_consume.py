"""The reverse loop on a real queue: malformed and poisonous events are set aside, and the queue goes on."""

import json
import math
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any, Self

import boto3
import pytest

from figbridge.config import MappingSection, SqsSourceSection
from figbridge.deadletter import TableDeadLetterStore
from figbridge.errors import QueueUnavailable
from figbridge.event import Event
from figbridge.metrics import Metrics
from figbridge.reverse.apply import Applier
from figbridge.reverse.consume import Consumer
from figbridge.reverse.drift import Drift
from figbridge.reverse.mapping import Mappings
from figbridge.transports import Delivery, Source
from figbridge.transports.local import LocalSink, LocalSource
from figbridge.transports.sqs import SqsSource
from fixtures.clock import until
from fixtures.postgres import Database

MAPPINGS = [
    {
        "match": {"source": "new", "detail-type": "made"},
        "into": "public.thing",
        "action": "insert",
        "set": {"id": "detail.id", "parent": "detail.parent", "note": "detail.note"},
    },
    {
        "match": {"source": "new", "detail-type": "noted"},
        "into": "public.thing",
        "action": "update",
        "key": {"id": "detail.id"},
        "set": {"note": "detail.note"},
        "idempotency_key": "detail.change",
    },
    {
        "match": {"source": "new", "detail-type": "changed"},
        "into": "public.thing",
        "action": "upsert",
        "key": {"id": "detail.id"},
        "set": {"note": "detail.note"},
        "version": "detail.version",
    },
    {
        "match": {"source": "new", "detail-type": "gone"},
        "into": "public.thing",
        "action": "delete",
        "key": {"id": "detail.id"},
    },
]


class Running:
    """A consumer in a thread of its own."""

    def __init__(self, database: Database, source: Source, park_timeout: float = 60) -> None:
        self.metrics, self._stop = Metrics(), threading.Event()
        self.failure: BaseException | None = None
        applier = Applier(database.dsn, statement_timeout=5, lock_timeout=2)
        mappings = Mappings([MappingSection.model_validate(it) for it in MAPPINGS])
        self._consumer = Consumer(
            source,
            mappings,
            applier,
            TableDeadLetterStore(database.dsn),
            self.metrics,
            drift=Drift(applier.connection, mappings, self.metrics),
            park_timeout=park_timeout,
        )
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self._consumer.run(self._stop)
        except BaseException as error:  # noqa: BLE001 (the test looks at it)
            self.failure = error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive()
        assert self.failure is None

    def all(self) -> str:
        return "\n".join(
            str(sample)
            for metric in self.metrics.registry.collect()
            for sample in metric.samples
            if sample.name == "figbridge_reverse_events_total"
        )

    def outcome(self, name: str) -> float:
        return self.metrics.registry.get_sample_value("figbridge_reverse_events_total", {"outcome": name}) or 0


@pytest.fixture(autouse=True)
def _short_receives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a test waits for one."""
    monkeypatch.setattr("figbridge.reverse.consume._WAIT", 0.1)


@pytest.fixture
def legacy(each_database: Database) -> Database:
    each_database.execute((resources.files("figbridge") / "schema.sql").read_text())
    each_database.execute("CREATE TABLE thing (id int PRIMARY KEY, parent int REFERENCES thing, note text)")
    return each_database


def event(number: int, detail_type: str, **detail: Any) -> Event:
    return Event(f"e-{number}", "new", detail_type, str(number), datetime.now(UTC), json.dumps(detail).encode())


def rows(database: Database) -> list[Any]:
    return database.execute("SELECT id, parent, note FROM thing ORDER BY id")


def test_events_that_wait_for_another_one_are_applied_after_it(legacy: Database, tmp_path: Path) -> None:
    path = tmp_path / "bus.sqlite"
    bus = LocalSink(path)
    bus.publish([
        event(1, "noted", id=1, note="last", change="c1"),  # before its row is there
        event(2, "made", id=2, parent=1),  # before its parent is there
    ])  # fmt: skip
    with Running(legacy, LocalSource(path, subscriber="s")) as running:
        until(lambda: running.outcome("retried") == 2, 30, running.all)
        bus.publish([event(3, "made", id=1, note="first"), event(4, "unheard-of", id=1)])
        until(lambda: rows(legacy) == [(1, None, "last"), (2, 1, None)], 30, lambda: f"{rows(legacy)} {running.all()}")
        until(lambda: running.outcome("applied") == 3)
        assert running.outcome("ignored") == 1
        until(lambda: legacy.execute("SELECT count(*) FROM figbridge.parked") == [(0,)])
        assert running.outcome("dead_letter") == 0
    bus.close()


class Failing(LocalSource):
    """A queue that does not answer while `away` is set."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, subscriber="s")
        self.away = threading.Event()

    def receive(self, *, wait: float) -> Sequence[Delivery]:
        if self.away.is_set():
            raise QueueUnavailable("taken away by the test")
        return super().receive(wait=wait)


def test_a_queue_that_goes_away_shows_in_the_metrics(database: Database, tmp_path: Path) -> None:
    database.execute((resources.files("figbridge") / "schema.sql").read_text())
    source = Failing(tmp_path / "bus.sqlite")
    with Running(database, source) as running:

        def age() -> float:
            labels = {"part": "reverse"}
            value = running.metrics.registry.get_sample_value("figbridge_source_receive_age_seconds", labels)
            return math.inf if value is None else value

        until(lambda: age() < 0.5, missing="an answer")
        source.away.set()
        until(lambda: 1 < age() < math.inf, missing="an age that grows")
        source.away.clear()
        until(lambda: age() < 0.5, missing="an answer")


def test_a_transaction_takes_no_more_than_a_message_to_the_server_may_have(
    legacy: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("figbridge.reverse.item._MOST", 1000)
    path, notes = tmp_path / "bus.sqlite", [400, 400, 400, 5000, 5000, 10, 10, 900]
    bus = LocalSink(path)
    bus.publish([event(number, "made", id=number, note="x" * size) for number, size in enumerate(notes)])
    with Running(legacy, LocalSource(path, subscriber="s")) as running:
        until(lambda: running.outcome("applied") == len(notes), 30, running.all)
    assert [len(note) for _, _, note in rows(legacy)] == notes
    together = legacy.execute("SELECT array_agg(event_id ORDER BY event_id) FROM figbridge.inbox GROUP BY xmin::text")
    assert sorted(ids for (ids,) in together) == [["e-0", "e-1"], ["e-2"], ["e-3"], ["e-4"], ["e-5", "e-6", "e-7"]]
    bus.close()


def test_what_is_ignored_is_counted_by_its_reason(legacy: Database, tmp_path: Path) -> None:
    path = tmp_path / "bus.sqlite"
    bus = LocalSink(path)
    late = [event(number, "changed", id=1, note="late", version=number) for number in (1, 2)]
    bus.publish([event(3, "changed", id=1, note="newest", version=3), *late, event(4, "gone", id=404)])
    with Running(legacy, LocalSource(path, subscriber="s")) as running:
        until(lambda: running.outcome("ignored") == 3, 20, running.all)
        value = running.metrics.registry.get_sample_value
        assert value("figbridge_reverse_ignored_total", {"reason": "stale_version"}) == 2
        assert value("figbridge_reverse_ignored_total", {"reason": "delete_missing"}) == 1
    assert rows(legacy) == [(1, None, "newest")]
    assert legacy.execute("SELECT count(*) FROM figbridge.inbox") == [(4,)]
    bus.close()


def test_what_waits_in_vain_becomes_a_dead_letter_and_leaves_no_claim(legacy: Database, tmp_path: Path) -> None:
    path = tmp_path / "bus.sqlite"
    bus = LocalSink(path)
    bus.publish([event(1, "noted", id=404, note="x", change="c1")])
    with Running(legacy, LocalSource(path, subscriber="s"), park_timeout=1) as running:
        until(lambda: running.outcome("dead_letter") == 1, 20)
    assert legacy.execute("SELECT reason, event_id FROM figbridge.dead_letter") == [("update_missing", "e-1")]
    assert legacy.execute("SELECT count(*) FROM figbridge.parked") == [(0,)]
    assert legacy.execute("SELECT count(*) FROM figbridge.inbox") == [(0,)]
    bus.close()


def test_a_database_that_is_away_is_waited_for_and_is_no_reason_for_a_dead_letter(
    legacy: Database, tmp_path: Path
) -> None:
    path = tmp_path / "bus.sqlite"
    bus = LocalSink(path)
    cut = """
        SELECT pg_terminate_backend(pid) FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid()
    """
    with Running(legacy, LocalSource(path, subscriber="s")) as running:
        for number in range(1, 60):
            bus.publish([event(number, "made", id=number)])
            if number % 20 == 0:
                legacy.execute(cut)
        until(lambda: len(rows(legacy)) == 59, 30, lambda: f"{len(rows(legacy))} rows")
        until(lambda: legacy.execute("SELECT count(*) FROM figbridge.inbox") == [(59,)])
        assert running.outcome("dead_letter") == 0
    bus.close()


def test_malformed_and_poisonous_messages_are_set_aside_and_the_queue_goes_on(
    legacy: Database, aws_endpoint: str
) -> None:
    sqs, events = boto3.client("sqs", endpoint_url=aws_endpoint), boto3.client("events", endpoint_url=aws_endpoint)
    url = sqs.create_queue(QueueName="reverse")["QueueUrl"]
    arn = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    events.create_event_bus(Name="bus")
    events.put_rule(Name="rule", EventBusName="bus", EventPattern=json.dumps({"source": ["new"]}))
    events.put_targets(Rule="rule", EventBusName="bus", Targets=[{"Id": "1", "Arn": arn}])
    bad = [
        "not json",
        "[1]",
        '{"source": "new"}',
        '{"id":"i","source":"new","detail-type":"made","detail":"text"}',
        '{"id":"i","source":"new","detail-type":"made","detail":{"id":NaN}}',
    ]
    for body in bad:
        sqs.send_message(QueueUrl=url, MessageBody=body)
    for detail in ({"id": "not a number"}, {"id": 1, "note": "good"}):
        put = {"Source": "new", "DetailType": "made", "Detail": json.dumps(detail), "EventBusName": "bus"}
        assert events.put_events(Entries=[put])["FailedEntryCount"] == 0  # type: ignore[list-item]
    section = SqsSourceSection(
        type="sqs", queue_url=url, region="eu-west-1", endpoint_url=aws_endpoint, visibility_timeout=30
    )
    with Running(legacy, SqsSource(section)) as running:
        until(lambda: rows(legacy) == [(1, None, "good")], 30, lambda: f"{rows(legacy)} {running.failure}")
        until(lambda: running.outcome("dead_letter") == len(bad) + 1, 20)
    letters = legacy.execute("SELECT reason, body, message FROM figbridge.dead_letter")
    assert len(letters) == len(bad) + 1
    assert {bytes(body).decode() for _, body, _ in letters} >= set(bad)
    assert [reason for reason, body, _ in letters if b"not a number" in bytes(body)] == ["22P02"]
    attributes = sqs.get_queue_attributes(
        QueueUrl=url, AttributeNames=["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
    )["Attributes"]
    assert set(attributes.values()) == {"0"}
