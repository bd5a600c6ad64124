"""What becomes of one message, and of a batch, at the relay."""

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from figbridge.config import Config, RelaySection
from figbridge.contracts import Contract, Contracts
from figbridge.deadletter import DeadLetter
from figbridge.errors import QueueUnavailable, SinkRefused
from figbridge.event import Event, Rejection
from figbridge.metrics import Metrics
from figbridge.relay.judge import Dropped, Invalid, Judge, Valid
from figbridge.relay.loop import Relay
from figbridge.relay.outlet import Outlet
from figbridge.relay.relayer import Relayer
from figbridge.relay.seen import Seen
from figbridge.transports import Delivery, Limits

CONTRACTS = Contracts({("cwi.servicea", "NEW_WIDGET"): Contract("widget.json", {"required": ["widget_id"]})})
OWN = {"id": "7-f-1-0A-00", "op": "update", "schema": "shop", "table": "orders", "position": {}, "hops": 0}


def section(**options: Any) -> RelaySection:
    given = {"sink": {"type": "stdout"}, "quarantine": {"type": "stdout"}, "contracts": "contracts"}
    return RelaySection.model_validate(given | options)


def judge(**options: Any) -> Judge:
    return Judge(section(**options), CONTRACTS)


def message(detail: Any = None, **envelope: Any) -> bytes:
    given = {
        "version": "0",
        "id": "e-1",
        "detail-type": "NEW_WIDGET",
        "source": "cwi.servicea",
        "account": "111122223333",
        "time": "2026-11-23T10:08:02Z",
        "detail": {"widget_id": "abc123"} if detail is None else detail,
    }
    return json.dumps(given | envelope).encode()


def valid(verdict: object) -> Event:
    assert isinstance(verdict, Valid), verdict
    return verdict.event


def test_the_article_s_event_goes_on_under_a_new_source() -> None:
    event = valid(judge().judge(message()))

    assert (event.id, event.source, event.detail_type) == ("e-1", "valid.cwi.servicea", "NEW_WIDGET")
    assert event.time.isoformat() == "2026-11-23T10:08:02+00:00"
    assert json.loads(event.detail) == {
        "widget_id": "abc123",
        "relayed": {"id": "e-1", "source": "cwi.servicea", "account": "111122223333", "hops": 1},
    }


def test_a_cloud_event_is_the_same_event() -> None:
    sent = {"specversion": "1.0", "id": "e-1", "source": "cwi.servicea", "type": "NEW_WIDGET"}
    more = {"time": "2026-11-23T10:08:02Z", "datacontenttype": "application/json", "data": {"widget_id": "abc123"}}

    event = valid(judge().judge(json.dumps(sent | more).encode()))

    assert (event.id, event.source, event.detail_type) == ("e-1", "valid.cwi.servicea", "NEW_WIDGET")
    assert event.time.isoformat() == "2026-11-23T10:08:02+00:00"
    assert json.loads(event.detail)["widget_id"] == "abc123"
    assert isinstance(judge().judge(json.dumps(sent | more | {"data": {}}).encode()), Invalid)


def test_an_event_is_forwarded_once() -> None:
    event = valid(judge().judge(message()))

    assert judge().judge(event.envelope()) == Dropped("valid_already", "e-1", "valid.cwi.servicea")
    # two relays that mark differently would pass it to and fro for ever
    assert judge(prefix="checked.").judge(event.envelope()) == Dropped("hops", "e-1", "valid.cwi.servicea")
    again = judge(prefix="checked.", unknown="forward", **{"max-hops": 2}).judge(event.envelope())
    assert json.loads(valid(again).detail)["relayed"]["hops"] == 2
    assert valid(again).detail.count(b'"relayed"') == 1


@pytest.mark.parametrize("hops", [1, 40, "many"])
def test_only_the_relay_s_own_mark_counts_how_often_it_was_forwarded(hops: int | str) -> None:
    """``hops`` of a detail is the reverse path's count in figbridge's own events, or a service's own field."""
    for body in (message({"widget_id": "a", "hops": hops}), message(OWN | {"widget_id": "a", "hops": hops})):
        event = valid(judge().judge(body))
        assert json.loads(event.detail)["hops"] == hops
        assert json.loads(event.detail)["relayed"]["hops"] == 1
        assert judge(prefix="checked.").judge(event.envelope()) == Dropped("hops", event.id, event.source)


def test_what_was_set_aside_is_not_judged_again() -> None:
    verdict = judge().judge(message({}))
    assert isinstance(verdict, Invalid)

    assert judge().judge(verdict.event.envelope()) == Dropped("quarantined_already", "e-1", "invalid.cwi.servicea")


def test_the_detail_is_passed_on_to_the_last_digit_and_on_one_line() -> None:
    body = message().replace(b'"abc123"', b'"\\u00e4\xc3\xa4",\r\n "n": 12345678901234567890.50, "e": 1e5, "z": 1.0')

    detail = valid(judge().judge(body)).detail

    assert b'"n": 12345678901234567890.50, "e": 1e5, "z": 1.0' in detail
    assert b'"\\u00e4\xc3\xa4"' in detail
    assert b"\n" not in detail


def test_an_empty_detail_is_one_too() -> None:
    event = valid(judge(unknown="forward").judge(message({}, source="other")))

    assert set(json.loads(event.detail)) == {"relayed"}


@pytest.mark.parametrize(
    ("body", "reason", "path"),
    [
        (message({}), "contract", "/detail/widget_id"),
        (message(source="cwi.serviceb"), "no_contract", ""),
        (message({"widget_id": "a", "relayed": "by train"}), "reserved", "/detail/relayed"),
        (message({"widget_id": "a", "relayed": {"hops": 3}}), "reserved", "/detail/relayed"),
        (message(source=7), "malformed", "/source"),
        (message(source=""), "malformed", "/source"),
        (message(id=None), "malformed", "/id"),
        (message([]), "malformed", "/detail"),
        (message(time="yesterday"), "malformed", "/time"),
        (message(source="\ud800"), "malformed", "/source"),
        (b'{"a":1,"a":2}', "malformed", ""),
        (b"[]", "malformed", ""),
        (b"\xff", "malformed", ""),
        (b"", "malformed", ""),
    ],
)
def test_what_is_not_as_it_must_be_is_set_aside_with_the_path(body: bytes, reason: str, path: str) -> None:
    verdict = judge().judge(body)

    assert isinstance(verdict, Invalid)
    assert verdict.reason == reason
    said = json.loads(verdict.event.detail)
    assert said["reason"] == reason
    assert said["breaches"][0]["path"] == path
    assert verdict.event.source.startswith("invalid.")
    assert judge().judge(body) == verdict or reason == "malformed"  # whose time is that of the look
    assert judge().judge(body).event.id == verdict.event.id  # type: ignore[union-attr]


def test_what_is_set_aside_is_kept_whole() -> None:
    body = message({"price": 1}).replace(b'"price": 1', b'"price": 1.00')
    for whole in (body, b"no event", b"\xff\x00"):
        verdict = judge().judge(whole)
        assert isinstance(verdict, Invalid)
        assert verdict.body == whole
    assert b'"price": 1.00' in judge().judge(body).event.detail  # type: ignore[union-attr]
    assert json.loads(judge().judge(b"\xff\x00").event.detail)["body_base64"] == "/wA="  # type: ignore[union-attr]


def test_an_sns_notification_is_opened() -> None:
    notification = json.dumps({"Type": "Notification", "Message": message().decode()}).encode()

    assert valid(judge().judge(notification)).source == "valid.cwi.servicea"


def test_figbridge_s_own_events_keep_their_id_and_the_order_of_their_row() -> None:
    """PutEvents gives a repetition another envelope id; the id in the detail stays."""
    one = OWN | {"key": {"id": 42}, "before": {"id": 41}, "after": {"id": 42}}
    event = valid(judge(unknown="forward").judge(message(one, source="legacy.shop")))

    assert event.id == "7-f-1-0A-00"
    assert event.key == 'shop.orders:{"id":42}'
    assert event.old_key == 'shop.orders:{"id":41}'
    truncate = OWN | {"op": "truncate", "key": None, "before": None}
    assert valid(judge(unknown="forward").judge(message(truncate, source="legacy.shop"))).whole_table


def test_id_and_key_may_be_elsewhere() -> None:
    configured = judge(**{"event-id": "detail.change_id", "key": "detail.widget_id"})

    event = valid(configured.judge(message({"widget_id": "w", "change_id": 7})))
    assert (event.id, event.key) == ("7", 'cwi.servicea:"w"')
    verdict = configured.judge(message({"widget_id": "w"}))
    assert isinstance(verdict, Invalid)
    assert verdict.reason == "malformed"


@pytest.mark.parametrize("path", ["detail.one < detail.other", "ceil(detail.huge)", "sort(detail.list)"])
def test_a_path_that_does_not_fit_the_values_is_the_event_s_fault(path: str) -> None:
    body = message({"widget_id": "w", "one": 1, "other": "x", "list": [1, "x"]}).replace(
        b'"one"', b'"huge":1e999,"one"'
    )
    verdict = judge(**{"event-id": path}).judge(body)
    assert isinstance(verdict, Invalid)
    assert verdict.reason == "malformed"
    assert judge(key=path, unknown="forward").judge(body)


# --- a batch


class Given(NamedTuple):
    body: bytes
    attempts: int = 1


class Place:
    """A sink of the test; `never` and `once` are ids that it refuses for ever, and the first time."""

    name = "test"

    def __init__(self, never: Sequence[str] = (), once: Sequence[str] = (), limits: Limits | None = None) -> None:
        self.events: list[Event] = []
        self.limits = limits or Limits(entries=3, entry_bytes=2000, batch_bytes=4000, partial=True)
        self._never, self._once = set(never), set(once)

    def size(self, event: Event) -> int:
        return len(event.detail)

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass

    def publish(self, events: Sequence[Event]) -> Sequence[Rejection]:
        rejections = []
        for event in events:
            if event.id in self._never:
                rejections.append(Rejection(event, "MalformedDetail", "never", retryable=False))
            elif event.id in self._once:
                self._once.discard(event.id)
                rejections.append(Rejection(event, "ThrottlingException", "later", retryable=True))
            else:
                self.events.append(event)
        return rejections


class Letters:
    def __init__(self) -> None:
        self.letters: list[DeadLetter] = []

    def add(self, letters: Sequence[DeadLetter]) -> None:
        self.letters += letters

    def close(self) -> None:
        pass


class Bench:
    """A relayer between places of the test."""

    def __init__(self, sink: Place, quarantine: Place | None, letters: Letters | None = None, **options: Any) -> None:
        self.sink, self.quarantine, self.letters, self.metrics = sink, quarantine, letters, Metrics()
        outlet = Outlet(sink, quarantine, letters, self.metrics, threading.Event())
        configured = section(**options)
        self.relayer = Relayer(judge(**options), outlet, Seen(configured.remember), self.metrics)

    def relay(self, *bodies: bytes) -> set[int]:
        done: set[int] = set()
        self.relayer.relay([Given(body) for body in bodies], done)
        return done

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"figbridge_relay_{name}_total", labels) or 0


def test_a_batch_goes_where_each_belongs_and_all_is_counted() -> None:
    bench = Bench(Place(), Place())

    done = bench.relay(message(id="1"), message({}, id="2"), message(id="3", source="valid.x"), b"?", message(id="5"))

    assert done == {0, 1, 2, 3, 4}
    assert [it.id for it in bench.sink.events] == ["1", "5"]
    assert bench.quarantine
    assert [it.source for it in bench.quarantine.events] == ["invalid.cwi.servicea", "invalid.unreadable"]
    assert bench.count("events", sink="test") == 2
    assert bench.count("quarantined", sink="test") == 2
    assert bench.count("invalid", reason="contract") == 1
    assert bench.count("invalid", reason="malformed") == 1
    assert bench.count("dropped", reason="valid_already") == 1


def test_a_repetition_is_dropped_also_within_a_batch() -> None:
    bench = Bench(Place(), Place())

    assert bench.relay(message(), message()) == {0, 1}
    assert bench.relay(message()) == {0}

    assert len(bench.sink.events) == 1
    assert bench.count("dropped", reason="duplicate") == 2
    # the same id of another service is another event
    assert bench.relay(message(source="other")) == {0}
    assert bench.quarantine
    assert [it.source for it in bench.quarantine.events] == ["invalid.other"]


def test_loops_of_a_process_share_their_memory() -> None:
    seen = Seen(1000)

    def fill(part: int) -> None:
        for number in range(1000):
            seen.add(("s", f"{part}-{number}"), b"x")

    threads = [threading.Thread(target=fill, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    known = [seen.known(("s", f"{part}-{number}"), b"x") for part in range(4) for number in range(1000)]
    assert known.count("same") == 1000


def test_the_memory_is_bounded() -> None:
    bench = Bench(Place(), Place(), remember=2)
    for name in ("1", "2", "3", "1"):
        bench.relay(message(id=name))

    assert [it.id for it in bench.sink.events] == ["1", "2", "3", "1"]


def test_another_event_under_a_known_id_is_not_taken_for_a_repetition() -> None:
    bench = Bench(Place(), Place())

    assert bench.relay(message(), message({"widget_id": "other"})) == {0, 1}
    assert bench.relay(message({"widget_id": "third"})) == {0}

    assert len(bench.sink.events) == 1
    assert bench.count("invalid", reason="id_reused") == 2


def test_what_the_sink_never_takes_is_set_aside() -> None:
    roomy = Limits(entries=3, entry_bytes=9000, batch_bytes=9000, partial=True)
    bench = Bench(Place(never=["1"]), Place(limits=roomy))

    assert bench.relay(message(id="1"), message(id="2"), message({"widget_id": "x" * 3000}, id="3")) == {0, 1, 2}

    assert [it.id for it in bench.sink.events] == ["2"]
    assert bench.quarantine
    assert [json.loads(it.detail)["breaches"][0]["message"] for it in bench.quarantine.events] == [
        "MalformedDetail: never",
        "EntryTooLarge: 3096 bytes, and the sink takes 2000",
    ]
    assert bench.count("invalid", reason="refused") == 2


def test_what_the_quarantine_never_takes_goes_to_the_dead_letters() -> None:
    letters = Letters()
    bench = Bench(Place(), Place(never=["1"]), letters, **{"dead-letters": {"type": "file", "path": "x"}})

    assert bench.relay(message({}, id="1"), message({}, id="2")) == {0, 1}

    (letter,) = letters.letters
    assert (letter.direction, letter.event_id, letter.reason) == ("relay", "1", "contract")
    assert letter.body == message({}, id="1")
    assert "MalformedDetail" in letter.message
    assert "/detail/widget_id" in letter.message


def test_without_dead_letters_the_relay_stops_and_the_valid_ones_are_done() -> None:
    bench = Bench(Place(), Place(never=["1"]))
    done: set[int] = set()

    with pytest.raises(SinkRefused, match="event 1"):
        bench.relayer.relay([Given(message({}, id="1")), Given(message(id="2"))], done)

    assert done == {1}
    assert [it.id for it in bench.sink.events] == ["2"]


def test_without_a_quarantine_letters_are_enough() -> None:
    letters = Letters()
    bench = Bench(Place(), None, letters)

    assert bench.relay(b"?", message()) == {0, 1}
    assert [it.reason for it in letters.letters] == ["malformed"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=20), st.sets(st.integers(0, 19)))
def test_no_row_is_reordered_by_entries_that_are_refused_for_now(
    given: list[tuple[int, bool]], refused: set[int]
) -> None:
    bench = Bench(Place(once=[str(it) for it in refused]), Place(), unknown="forward")
    bodies = [
        message(OWN | {"id": str(n), "key": {"id": row}, "table": "orders"}, source="s", id=f"e{n}")
        for n, (row, _) in enumerate(given)
    ]

    assert bench.relay(*bodies) == set(range(len(bodies)))

    for row in range(4):
        sent = [int(it.id) for it in bench.sink.events if it.key == f'shop.orders:{{"id":{row}}}']
        assert sent == [n for n, (of, _) in enumerate(given) if of == row]


def test_the_log_says_why_and_repeats_no_value() -> None:
    bench = Bench(Place(), Place())
    with capture_logs() as logs:
        bench.relay(message({"secret": "Ada Lovelace"}), b'{"Ada Lovelace":1,"Ada Lovelace":2}')

    assert [it["reason"] for it in logs] == ["contract", "malformed"]
    assert "widget_id" in str(logs)
    assert "Ada" not in str(logs)


def test_what_has_been_forwarded_often_enough_is_told_in_the_log() -> None:
    bench = Bench(Place(), Place())
    forwarded = valid(judge(prefix="checked.").judge(message())).envelope()
    with capture_logs() as logs:
        assert bench.relay(forwarded, message(source="valid.x")) == {0, 1}

    assert bench.count("dropped", reason="hops") == 1
    assert [(it["reason"], it["event_id"], it["source"]) for it in logs] == [("hops", "e-1", "checked.cwi.servicea")]
    assert bench.sink.events == []


# --- the section


def test_a_relay_needs_no_legacy_database(tmp_path: Path) -> None:
    text = f"relay: {{sink: {{type: stdout}}, contracts: {tmp_path}, dead-letters: {{type: file, path: x}}}}"

    config = Config.parse(text, {})

    assert config.relay
    assert config.database is None


@pytest.mark.parametrize(
    ("options", "where", "what"),
    [
        ({"quarantine": None}, "relay", "quarantine"),
        ({"prefix": "in"}, "relay", "begin alike"),
        ({"prefix": "aws.valid."}, "relay.prefix", "aws."),
        ({"max-hops": 0}, "relay.max-hops", ""),
        ({"parallel": 2}, "relay", "parallel"),
        ({"event-id": "a["}, "relay.event-id", "JMESPath"),
        ({"dead-letters": {"type": "table"}}, "legacy", "relay.dead-letters"),
    ],
)
def test_what_is_wrong_with_the_section_is_told_at_load(options: dict[str, Any], where: str, what: str) -> None:
    from figbridge.errors import ConfigError

    tree = {"sink": {"type": "stdout"}, "quarantine": {"type": "stdout"}, "contracts": "c"} | options
    with pytest.raises(ConfigError) as caught:
        Config.parse(json.dumps({"relay": {k: v for k, v in tree.items() if v is not None}}), {})

    (problem,) = caught.value.problems
    assert problem.where == where
    assert what in problem.what


class Queue:
    """Away at first, then empty, then the loop is to end. ``ages``: what the metrics said whenever it was asked."""

    name = "queue"

    def __init__(self, metrics: Metrics, stop: threading.Event) -> None:
        self._metrics, self._stop = metrics, stop
        self.ages: list[float | None] = []

    def check(self) -> None:
        pass

    def receive(self, *, wait: float) -> Sequence[Delivery]:  # noqa: ARG002 (as a source has it)
        series = "figbridge_source_receive_age_seconds"
        self.ages.append(self._metrics.registry.get_sample_value(series, {"part": "relay"}))
        if len(self.ages) < 5:
            raise QueueUnavailable("away")
        if len(self.ages) == 6:
            self._stop.set()
        return ()

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        pass

    def close(self) -> None:
        pass


def test_a_queue_that_does_not_answer_shows_in_the_metrics() -> None:
    bench, stop = Bench(Place(), Place()), threading.Event()
    queue = Queue(bench.metrics, stop)

    Relay(queue, bench.relayer, bench.metrics).run(stop)

    ages = [age for age in queue.ages if age is not None]
    assert len(ages) == 6  # also before it has answered at all
    assert ages[:5] == sorted(ages[:5])
    assert ages[5] < ages[4]
