"""The reverse path as a Lambda function: the events that AWS documents, on a real PostgreSQL."""

import json
import uuid
from collections.abc import Callable, Iterator
from importlib import reload
from typing import Any

import pytest

from figbridge.errors import ConfigError
from figbridge.functions import reverse as function
from fixtures.clock import until
from fixtures.postgres import Database
from fixtures.reverse import HISTORY, count, make_shop, orders

QUEUE = "https://sqs.eu-west-1.amazonaws.com/123456789012/reverse"
MAPPING = {
    "match": {"source": "shop.next", "detail-type": "order"},
    "into": "shop.orders",
    "action": "upsert",
    "key": {"id": "detail.id"},
    "set": {"status": "detail.status", "customer_id": "detail.customer", "quantity": "detail.n"},
}


class Context:
    """What of Lambda's context is used."""

    def __init__(self, seconds: float = 30) -> None:
        self._seconds = seconds

    def get_remaining_time_in_millis(self) -> int:
        return int(self._seconds * 1000)


def configured(dsn: str, **options: Any) -> str:
    reverse = {"source": {"type": "sqs", "queue_url": QUEUE}, "mappings": [MAPPING], **options}
    return json.dumps({"legacy": {"dsn": dsn, "tables": ["shop.orders"]}, "reverse": reverse})


@pytest.fixture(autouse=True)
def _environment_ends() -> Iterator[None]:
    yield
    if function._function:
        function._function.consumer.close()


@pytest.fixture
def shop(database: Database, monkeypatch: pytest.MonkeyPatch) -> Database:
    monkeypatch.setenv("FIGBRIDGE_CONFIG", configured(database.dsn))
    reload(function)  # as a new execution environment
    return make_shop(database)


def envelope(identity: str, **detail: Any) -> str:
    return json.dumps({"id": identity, "source": "shop.next", "detail-type": "order", "detail": detail})


def record(body: str, group: str | None = None) -> dict[str, Any]:
    """https://docs.aws.amazon.com/lambda/latest/dg/with-sqs.html#example-standard-queue-message-event"""
    attributes = {
        "ApproximateReceiveCount": "1",
        "SentTimestamp": "1545082649183",
        "SenderId": "AIDAIENQZJOLO23YVJ4VO",
        "ApproximateFirstReceiveTimestamp": "1545082649185",
    }
    if group:
        fifo = {"SequenceNumber": "18849496460467696128", "MessageGroupId": group, "MessageDeduplicationId": "1"}
        attributes |= fifo
    return {
        "messageId": str(uuid.uuid4()),
        "receiptHandle": "AQEBwJnKyrHigUMZj6rYigCgxlaS3SLy0a...",
        "body": body,
        "attributes": attributes,
        "messageAttributes": {},
        "md5OfBody": "e4e68fb7bd0e697a0ae8f1bb342846b3",
        "eventSource": "aws:sqs",
        "eventSourceARN": f"arn:aws:sqs:eu-west-1:123456789012:reverse{'.fifo' if group else ''}",
        "awsRegion": "eu-west-1",
    }


def call(*records: dict[str, Any], seconds: float = 30) -> list[str]:
    """The ids of the failures."""
    answer = function.handler({"Records": list(records)}, Context(seconds))
    assert set(answer) == {"batchItemFailures"}
    return [it["itemIdentifier"] for it in answer["batchItemFailures"]]


def test_messages_become_rows_and_none_is_a_failure(shop: Database) -> None:
    assert call(*[record(envelope(f"e{n}", id=n, status="new")) for n in range(10)]) == []
    assert orders(shop) == [(n, "new") for n in range(10)]
    again = record(envelope("e3", id=3, status="new"))
    assert call(again) == []
    assert count(shop, "figbridge.inbox") == 10


def test_the_connection_is_used_again(shop: Database) -> None:
    backends = "SELECT pid FROM pg_stat_activity WHERE application_name = 'figbridge-apply' AND datname = %s"
    call(record(envelope("e1", id=1)))
    first = shop.execute(backends, [shop.name])
    call(record(envelope("e2", id=2)))
    assert len(first) == 1
    assert shop.execute(backends, [shop.name]) == first


def test_a_connection_that_was_cut_between_two_events_is_opened_again(shop: Database) -> None:
    call(record(envelope("e1", id=1)))
    cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'figbridge-apply' "
    shop.execute(cut + "AND datname = %s", [shop.name])
    assert call(record(envelope("e2", id=2))) == []
    assert count(shop, "shop.orders") == 2


def test_what_is_poison_or_has_to_wait_is_no_failure(shop: Database) -> None:
    """It is safe where it is: Lambda may delete it."""
    assert call(record("not json"), record(envelope("e1", id=1, n="many")), record(envelope("e2", id=2))) == []
    assert count(shop, "figbridge.dead_letter") == 2
    assert call(record(envelope("child", id=3, customer=7))) == []
    assert count(shop, "figbridge.parked") == 1
    shop.execute("INSERT INTO shop.customers VALUES (7, 'x')")
    # a schedule sends no records; it looks into the park, and purges
    shop.execute("UPDATE figbridge.inbox SET applied_at = now() - interval '40 days'")
    scheduled = {
        "version": "0",
        "id": "53dc4d37",
        "detail-type": "Scheduled Event",
        "source": "aws.events",
        "detail": {},
    }
    assert function.handler(scheduled, Context()) == {"batchItemFailures": []}
    assert orders(shop) == [(2, None), (3, None)]
    assert shop.execute("SELECT idempotency_key FROM figbridge.inbox") == [("child",)]


@pytest.mark.parametrize(
    ("order", "at_once", "in_the_end"),
    [
        ("group", [(3, "b")], [(3, "b"), (1, "a"), (2, "a"), (1, "b"), (4, "a")]),
        ("entity", [(2, "a"), (3, "b"), (4, "a")], [(2, "a"), (3, "b"), (4, "a"), (1, "a"), (1, "b")]),
    ],
)
def test_what_waits_holds_up_its_entity_or_its_group(
    shop: Database, monkeypatch: pytest.MonkeyPatch, order: str, at_once: list[Any], in_the_end: list[Any]
) -> None:
    shop.execute(HISTORY)
    fifo = {"type": "sqs", "queue_url": f"{QUEUE}.fifo"}
    monkeypatch.setenv("FIGBRIDGE_CONFIG", configured(shop.dsn, order=order, source=fifo))
    reload(function)

    def happened() -> list[Any]:
        return shop.execute("SELECT id, status FROM shop.history ORDER BY place")

    waits = record(envelope("e1", id=1, status="a", customer=7), "ada")
    other = record(envelope("e2", id=2, status="a"), "ada")
    assert call(waits, record(envelope("e3", id=3, status="b"), "bob"), other) == []
    later = [
        record(envelope("e4", id=1, status="b", customer=7), "ada"),
        record(envelope("e5", id=4, status="a"), "ada"),
    ]
    assert call(*later) == []  # of another invocation, perhaps of another environment
    assert happened() == at_once
    shop.execute("INSERT INTO shop.customers VALUES (7, 'x')")
    assert function.handler({}, Context()) == {"batchItemFailures": []}
    assert happened() == in_the_end
    assert count(shop, "figbridge.parked") == 0


def test_when_the_database_is_away_all_fail_before_the_time_is_over(
    database: Database, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FIGBRIDGE_CONFIG", configured("host=127.0.0.1 port=9 dbname=x connect_timeout=1"))
    reload(function)
    records = [record(envelope(f"e{n}", id=n), "g") for n in range(3)]
    assert call(*records, seconds=3.5) == [it["messageId"] for it in records]
    assert "messages are left for another try" in capsys.readouterr().err
    assert function._function
    function._function.consumer.close()
    make_shop(database)
    monkeypatch.setenv("FIGBRIDGE_CONFIG", configured(database.dsn))
    reload(function)
    assert call(*records) == []
    assert count(database, "shop.orders") == 3


def test_in_a_fifo_queue_the_rest_of_a_group_fails_behind_its_first_failure() -> None:
    records = [function._Record(str(n), group, b"", 1) for n, group in enumerate(["a", "b", "a", "c", "b", "a"])]
    assert function._failed(records, {"0", "1", "3", "4", "5"}) == ["2", "5"]
    assert function._failed(records, {"0", "2", "3", "4", "5"}) == ["1", "4"]
    assert function._failed(records, set("012345")) == []
    standard = [function._Record(str(n), None, b"", 1) for n in range(4)]
    assert function._failed(standard, {"0", "2", "3"}) == ["1"]


def test_a_lock_of_the_application_parks_and_later_messages_of_the_row_wait_behind(shop: Database) -> None:
    call(record(envelope("e0", id=1, status="new"), "g"))
    with shop.connect() as application:
        application.execute("BEGIN; UPDATE shop.orders SET note = 'x' WHERE id = 1")
        assert call(record(envelope("e1", id=1, status="a"), "g"), record(envelope("e2", id=1, status="b"), "g")) == []
        application.execute("COMMIT")
    until(lambda: function.handler({}, Context()) and count(shop, "figbridge.parked") == 0, 20)
    assert orders(shop) == [(1, "b")]


BODIES: dict[str, Callable[[], str]] = {
    "eventbridge": lambda: envelope("e", id=1),
    "sns": lambda: json.dumps({"Type": "Notification", "MessageId": "m", "Message": envelope("e", id=1)}),
    "custom bus": lambda: json.dumps(
        {"Data": json.loads(envelope("e", id=1)), "Metadata": {}, "SystemMetadata": {"aws:EventId": "bus-id"}}
    ),
}


@pytest.mark.parametrize("form", BODIES)
def test_every_envelope_is_understood(shop: Database, form: str) -> None:
    assert call(record(BODIES[form]())) == []
    assert shop.execute("SELECT idempotency_key FROM figbridge.inbox") == [("e",)]


@pytest.mark.parametrize("value", ["", "  ", "legacy: {dsn: x"])
def test_a_configuration_that_is_none_is_an_error_of_the_function(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("FIGBRIDGE_CONFIG", f"{value}\n")
    reload(function)
    with pytest.raises(ConfigError):
        call(record(envelope("e", id=1)))


def test_a_file_without_a_reverse_path_has_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = {"legacy": {"dsn": "host=x", "tables": ["a.b"]}, "forward": {"sink": {"type": "stdout"}}}
    monkeypatch.setenv("FIGBRIDGE_CONFIG", json.dumps(tree))
    reload(function)
    with pytest.raises(ConfigError, match="nothing to do"):
        call(record(envelope("e", id=1)))
