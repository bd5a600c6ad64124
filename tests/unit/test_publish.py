"""Order per key and completeness, whatever a sink refuses. The sink here is a third party's: it scripts its answers."""

import queue
import random
import threading
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from datetime import UTC, datetime

import pytest
import tenacity
from hypothesis import given
from hypothesis import strategies as st

from figbridge import retry
from figbridge.deadletter import DeadLetter
from figbridge.errors import SinkRefused, SinkUnavailable
from figbridge.event import Event, Rejection
from figbridge.forward.publish import Publisher
from figbridge.metrics import Metrics
from figbridge.retry import Stopped
from figbridge.transports import Limits


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "wait_strategy", lambda _longest: tenacity.wait_none())


class MoodySink:
    """Takes some entries, refuses some for now and some for ever, and is away at times."""

    name = "moody"

    def __init__(self, seed: int, limits: Limits) -> None:
        self.limits = limits
        self.taken: list[Event] = []
        self.requests: list[list[Event]] = []
        self._random = random.Random(seed)
        self.hopeless: set[str] = set()
        self.checks = 0
        self._lock = threading.Lock()

    def size(self, event: Event) -> int:
        return len(event.detail)

    def check(self) -> None:
        self.checks += 1

    def close(self) -> None:
        pass

    def publish(self, events: Sequence[Event]) -> Sequence[Rejection]:
        with self._lock:
            return self._publish(events)

    def _publish(self, events: Sequence[Event]) -> Sequence[Rejection]:
        self.requests.append(list(events))
        if self._random.random() < 0.2:
            raise SinkUnavailable("away")
        rejections = []
        for event in events:
            if event.id in self.hopeless:
                rejections.append(Rejection(event, "Malformed", "never", retryable=False))
            elif self.limits.partial and self._random.random() < 0.3:
                rejections.append(Rejection(event, "Throttled", "later", retryable=True))
            else:
                self.taken.append(event)
        return rejections


class Letters:
    def __init__(self) -> None:
        self.letters: list[DeadLetter] = []

    def add(self, letters: Sequence[DeadLetter]) -> None:
        self.letters += letters

    def close(self) -> None:
        pass


def events(keys: Sequence[int], size: int = 10) -> list[Event]:
    now = datetime.now(UTC)
    return [Event(f"{n}", "s", "t", f"key-{key}", now, b"x" * size) for n, key in enumerate(keys)]


@given(
    st.lists(st.integers(0, 5), max_size=60),
    st.integers(),
    st.sets(st.integers(0, 59)),
    st.booleans(),
    st.sampled_from([1, 4]),
)
def test_every_event_is_taken_once_in_order_per_key_or_dead_lettered(
    keys: list[int], seed: int, hopeless: set[int], partial: bool, in_flight: int
) -> None:
    limits = Limits(entries=4, entry_bytes=100, batch_bytes=35, partial=partial, in_flight=in_flight)
    sink, letters = MoodySink(seed, limits), Letters()
    sink.hopeless = {str(number) for number in hopeless}
    made = events(keys)
    publisher = Publisher(sink, letters, Metrics(), threading.Event())
    publisher.publish(made)
    publisher.close()

    taken = [event.id for event in sink.taken]
    assert len(set(taken)) == len(taken), "an entry that was taken was sent again"
    buried = {letter.event_id for letter in letters.letters}
    assert set(taken) | buried == {event.id for event in made}
    assert not set(taken) & buried
    per_key: dict[str, list[int]] = defaultdict(list)
    for event in sink.taken:
        per_key[event.key].append(int(event.id))
    assert all(numbers == sorted(numbers) for numbers in per_key.values())
    for request in sink.requests:
        assert 0 < len(request) <= limits.entries
        assert sum(sink.size(event) for event in request) <= limits.batch_bytes
        if partial:
            assert len({event.key for event in request}) == len(request)


def test_an_event_too_large_for_the_sink_stops_the_bridge_when_there_is_nowhere_to_put_it() -> None:
    sink = MoodySink(1, Limits(entries=4, entry_bytes=5, batch_bytes=35, partial=True))
    with pytest.raises(SinkRefused, match="EntryTooLarge") as caught:
        Publisher(sink, None, Metrics(), threading.Event()).publish(events([1]))
    assert "dead-letters" in caught.value.hint
    assert sink.requests == []


def test_a_dead_letter_keeps_the_whole_event() -> None:
    sink, letters = MoodySink(1, Limits(entries=4, entry_bytes=5, batch_bytes=35, partial=True)), Letters()
    (event,) = events([1])
    Publisher(sink, letters, Metrics(), threading.Event()).publish([event])
    assert letters.letters[0].body == event.envelope()


def test_halting_ends_the_retries_and_claims_nothing() -> None:
    class Away(MoodySink):
        def publish(self, events: Sequence[Event]) -> Sequence[Rejection]:
            halt.set()
            raise SinkUnavailable(f"{len(events)} not taken")

    halt = threading.Event()
    sink = Away(1, Limits(entries=4, entry_bytes=50, batch_bytes=50, partial=True))
    with pytest.raises(Stopped):
        Publisher(sink, None, Metrics(), halt).publish(events([1, 2]))


def test_the_sink_is_looked_up_once_before_the_first_event() -> None:
    sink = MoodySink(1, Limits(entries=4, entry_bytes=50, batch_bytes=50, partial=False))
    publisher = Publisher(sink, None, Metrics(), threading.Event())
    assert sink.checks == 0
    for n in range(3):
        publisher.publish(events([n]))
    assert sink.checks == 1


class Gate(MoodySink):
    """Answers a request when it is told what to answer."""

    def __init__(self, in_flight: int) -> None:
        super().__init__(1, Limits(entries=1, entry_bytes=50, batch_bytes=50, partial=True, in_flight=in_flight))
        self.came: queue.SimpleQueue[tuple[Event, queue.SimpleQueue[BaseException | None]]] = queue.SimpleQueue()

    def publish(self, events: Sequence[Event]) -> Sequence[Rejection]:
        answer: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self.came.put((events[0], answer))
        if error := answer.get(timeout=10):
            raise error
        return ()


def in_thread(publisher: Publisher, made: Sequence[Event]) -> "Future[None]":
    ended: Future[None] = Future()

    def run() -> None:
        try:
            publisher.publish(made)
        except BaseException as error:  # noqa: BLE001 (the test reads it)
            ended.set_exception(error)
        else:
            ended.set_result(None)

    threading.Thread(target=run, daemon=True).start()
    return ended


def test_what_is_refused_for_ever_ends_the_call_when_all_that_is_out_has_been_answered() -> None:
    sink = Gate(3)
    publisher = Publisher(sink, None, Metrics(), threading.Event())
    ended = in_thread(publisher, events([1, 2, 3, 4]))
    answers = [sink.came.get(timeout=10)[1] for _ in range(3)]
    answers[0].put(SinkRefused("no right", hint="allow it"))
    with pytest.raises(FutureTimeout):
        ended.exception(timeout=0.3)
    assert sink.came.empty(), "nothing more is sent"
    for answer in answers[1:]:
        answer.put(None)
    assert isinstance(ended.exception(timeout=10), SinkRefused)
    publisher.close()


def test_a_halt_does_not_wait_for_a_service_that_does_not_answer() -> None:
    sink, halt = Gate(3), threading.Event()
    publisher = Publisher(sink, None, Metrics(), halt)
    ended = in_thread(publisher, events([1, 2, 3, 4]))
    answers = [sink.came.get(timeout=10)[1] for _ in range(3)]
    halt.set()
    assert isinstance(ended.exception(timeout=10), Stopped)
    for answer in answers:
        answer.put(None)
    publisher.close()


def test_a_sink_that_is_away_is_asked_by_one_request_at_a_time_until_it_is_back() -> None:
    sink, metrics = Gate(8), Metrics()
    publisher = Publisher(sink, None, metrics, threading.Event())
    ended = in_thread(publisher, events(range(20)))
    size = 8
    while size > 1:
        answers = [sink.came.get(timeout=10)[1] for _ in range(size)]
        for answer in answers:
            answer.put(SinkUnavailable("away"))
        size //= 2
    for _ in range(3):
        _, answer = sink.came.get(timeout=10)
        assert sink.came.empty()
        answer.put(SinkUnavailable("away"))
    seen = 0
    while seen < 20:
        sink.came.get(timeout=10)[1].put(None)
        seen += 1
    assert ended.exception(timeout=10) is None
    assert (metrics.registry.get_sample_value("figbridge_forward_requests_window", {"sink": "moody"}) or 0) > 1
    publisher.close()
