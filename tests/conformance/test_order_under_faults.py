"""The publisher against services that fail, over real HTTP: nothing lost, no key reordered, ids stable.

What is looked at is the first time that the service took an event: a repetition after a lost answer is allowed, a
consumer knows it by its id.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Final, Literal

import pytest
import tenacity
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conformance.events import event
from figbridge import retry
from figbridge.deadletter import DeadLetter
from figbridge.delivery.pack import Packing
from figbridge.event import Event
from figbridge.forward.publish import Publisher
from figbridge.metrics import Metrics
from figbridge.transports import Sink, aws
from fixtures.clock import PATIENCE
from fixtures.fake_aws import Cut, Document, FakeAws, Refused, Reset
from fixtures.sinks import SERVICES, Service, Taken, service

Pack = Literal["none", "transaction", "key"]
TIMEOUT = 0.2  # seconds that the client waits for an answer
FAULTS: Final = (
    "none", "some", "never", "throttle", "fail", "cut", "reset", "taken-cut", "taken-reset", "taken-fail", "slow",
)  # fmt: skip


class Letters:
    def __init__(self) -> None:
        self.ids: list[str] = []

    def add(self, letters: Sequence[DeadLetter]) -> None:
        self.ids += [it.event_id or "" for it in letters]

    def close(self) -> None:
        pass


BEFORE: Final = {
    "throttle": Refused(400, "ThrottlingException"),
    "fail": Refused(500, "InternalFailure"),
    "cut": Cut(),
    "reset": Reset(),
}
AFTER: Final = {"taken-cut": Cut(), "taken-reset": Reset(), "taken-fail": Refused(503, "ServiceUnavailable")}


def told(detail: Document) -> list[str]:
    """The ids of the changes in a detail: its own, or those of a pack."""
    return [it["detail"]["id"] for it in detail["events"]] if detail.get("op") == "pack" else [detail["id"]]


class Faulty:
    """Stands before a service: each request meets the next fault of the script, a name and a mask of entries."""

    def __init__(self, behind: Service, fake: FakeAws) -> None:
        self._behind = behind
        self._lock = threading.Lock()
        fake.handlers[behind.operation] = self.answer
        self.begin(())

    def begin(self, faults: Sequence[tuple[str, int]]) -> None:
        self._faults = deque(faults)
        self.refused: set[str] = set()  # for ever
        self._behind.taken.clear()

    def first(self, events: Sequence[Event]) -> list[str]:
        """Ids in the order in which the service first took them; requests of earlier events may still come in."""
        ours = {it.id for it in events}
        taken = [id_ for it in tuple(self._behind.taken) for id_ in told(it.envelope["detail"])]
        return [id_ for id_ in dict.fromkeys(taken) if id_ in ours]

    def answer(self, parameters: Document) -> Document:
        with self._lock:
            fault, mask = self._faults.popleft() if self._faults else ("none", 0)
            if fault in BEFORE:
                raise BEFORE[fault]
            self._behind.judge = self._judge(fault, mask)
            answer = self._behind.take(parameters)
        if fault in AFTER:
            raise AFTER[fault]
        if fault == "slow":
            threading.Event().wait(2 * TIMEOUT)
        return answer

    def _judge(self, fault: str, mask: int) -> Callable[[Taken], tuple[str, bool] | None]:
        numbers = itertools.count()

        def judge(entry: Taken) -> tuple[str, bool] | None:
            hit = mask >> next(numbers) % 8 & 1
            if hit and fault == "never":
                self.refused.add(entry.envelope["detail"]["id"])
                return "InvalidParameterValue", True
            return ("InternalFailure", False) if hit and fault == "some" else None

        return judge


@pytest.fixture(autouse=True)
def _hardly_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "wait_strategy", lambda _longest: tenacity.wait_random(0, 0.002))
    monkeypatch.setattr(aws, "_READ_TIMEOUT", TIMEOUT)


@pytest.fixture(params=SERVICES)
def behind(request: pytest.FixtureRequest) -> Service:
    return service(request.param)


@pytest.fixture
def fake(behind: Service) -> Iterator[FakeAws]:
    with behind.fake() as fake:
        yield fake


@pytest.fixture
def sink(behind: Service, fake: FakeAws) -> Iterator[Sink]:
    sink = behind.sink(fake, **{"in-flight": 6})
    yield sink
    sink.close()


EVENT = st.tuples(
    st.integers(0, 6),  # its key
    st.none() | st.integers(0, 6),  # the one that it had before
    st.integers(0, 19).map(lambda n: n == 0),  # whether it is about the whole table
)
FAULT = st.tuples(st.sampled_from(FAULTS), st.integers(0, 255))


NUMBERS: Final = itertools.count()


def made(shapes: Sequence[tuple[int, int | None, bool]]) -> list[Event]:
    """Events of those keys, three of each transaction; no id comes twice in the whole run."""
    found = []
    for key, old, whole in shapes:
        number = next(NUMBERS)
        name = f"7423-1-{number // 3:016X}-{number % 3:08X}"
        one = event(number, key=f"k{key}", old_key=None if old is None else f"k{old}", whole_table=whole)
        found.append(one._replace(id=name, detail=one.detail.replace(one.id.encode(), name.encode())))
    return found


def ordered(events: Sequence[Event], first: Sequence[str]) -> list[tuple[Event, Event]]:
    """Pairs of events that the service took the wrong way round."""
    place = {id_: n for n, id_ in enumerate(first)}
    there = [it for it in events if it.id in place]
    return [
        (one, other)
        for one, other in itertools.combinations(there, 2)
        if (one.whole_table or other.whole_table or {one.key, one.old_key} & {other.key, other.old_key} - {None})
        and place[one.id] > place[other.id]
    ]


@pytest.mark.parametrize("pack", ["none", "transaction", "key"])
def test_nothing_is_lost_and_no_key_is_reordered(behind: Service, fake: FakeAws, sink: Sink, pack: Pack) -> None:
    faulty, letters, metrics = Faulty(behind, fake), Letters(), Metrics()
    packing = None if pack == "none" else Packing(pack, sink, 65_536)
    publisher = Publisher(sink, letters, metrics, threading.Event(), packing=packing)

    counted = [0.0]

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(EVENT, min_size=1, max_size=80), st.lists(FAULT, min_size=3, max_size=25))
    def check(shapes: list[tuple[int, int | None, bool]], faults: list[tuple[str, int]]) -> None:
        slow = [n for n, (fault, _) in enumerate(faults) if fault == "slow"]
        script = [it for n, it in enumerate(faults) if n not in slow[1:]]  # one of them is enough
        events = made(shapes)
        letters.ids.clear()
        faulty.begin(script)

        publisher.publish(events)

        published = metrics.registry.get_sample_value("figbridge_forward_published_total", {"sink": sink.name})
        assert published == counted.pop() + len(events) - len(letters.ids), "each change counts, also in a pack"
        counted.append(published)
        first, dead = faulty.first(events), set(letters.ids)
        assert set(first) | dead == {it.id for it in events}
        assert dead <= faulty.refused  # the answer may have been lost, and a later one be better
        # one that timed out and was then refused for ever may still be taken, late
        assert ordered([it for it in events if it.id not in dead], first) == []

    check()
    publisher.close()


def test_a_refused_entry_holds_back_its_own_key_only(behind: Service, fake: FakeAws, sink: Sink) -> None:
    """The key k0 is refused until everything of the others was taken."""
    events = made([(n % 5, None, False) for n in range(60)])
    faulty = Faulty(behind, fake)
    others = {it.id for it in events if it.key != "k0"}
    refusals = 0

    def judge(entry: Taken) -> tuple[str, bool] | None:
        nonlocal refusals
        id_ = entry.envelope["detail"]["id"]
        if id_ in others or others <= set(faulty.first(events)):
            return None
        refusals += 1
        return "InternalFailure", False

    behind.judge = judge
    fake.handlers[behind.operation] = behind.take
    publisher = Publisher(sink, None, Metrics(), threading.Event())

    publisher.publish(events)

    assert refusals > 0
    first = faulty.first(events)
    assert set(first[: len(others)]) == others
    assert ordered(events, first) == []
    publisher.close()


def test_several_requests_are_in_flight_at_once(behind: Service, fake: FakeAws, sink: Sink) -> None:
    """Each request is answered when six are there: with fewer none ever would be."""
    together = threading.Barrier(6)

    def answer(parameters: Document) -> Document:
        together.wait(PATIENCE)
        return behind.take(parameters)

    fake.handlers[behind.operation] = answer
    publisher = Publisher(sink, None, Metrics(), threading.Event())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sink, "limits", replace(sink.limits, entries=5))
        patch.setattr(sink, "check", lambda: None)  # which would read the limits anew
        publisher.publish([event(n, key=f"k{n}") for n in range(30)])
    # a client that waits for too long asks again
    assert {it.envelope["detail"]["id"] for it in behind.taken} == {event(n, key=f"k{n}").id for n in range(30)}
    publisher.close()
