"""Order per key and completeness, whatever a sink refuses. The sink here is a third party's: it scripts its answers."""

import random
import threading
from collections import defaultdict
from collections.abc import Sequence
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

    def size(self, event: Event) -> int:
        return len(event.detail)

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass

    def publish(self, events: Sequence[Event]) -> Sequence[Rejection]:
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


@given(st.lists(st.integers(0, 5), max_size=60), st.integers(), st.sets(st.integers(0, 59)), st.booleans())
def test_every_event_is_taken_once_in_order_per_key_or_dead_lettered(
    keys: list[int],
    seed: int,
    hopeless: set[int],
    partial: bool,
) -> None:
    limits = Limits(entries=4, entry_bytes=100, batch_bytes=35, partial=partial)
    sink, letters = MoodySink(seed, limits), Letters()
    sink.hopeless = {str(number) for number in hopeless}
    made = events(keys)
    Publisher(sink, letters, Metrics(), threading.Event()).publish(made)

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
