"""A snapshot's rate, the size of its chunks, and what it leaves to the stream, in a time of the test's own."""

import threading
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from figbridge.forward.snapshot.block import Block
from figbridge.forward.snapshot.chunk import MOST_BYTES, Chunk, Size
from figbridge.forward.snapshot.politeness import Pace
from figbridge.forward.snapshot.reads import Share
from figbridge.metrics import Metrics
from figbridge.retry import Stopped

NO_CONNECTION: Any = None  # with lag=0 no standby is asked for
METRICS = Metrics()


class Time(threading.Event):
    """The event that ends the bridge, whose waits are what time goes by in."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.waited = 1000.0, 0.0

    def wait(self, timeout: float | None = None) -> bool:
        self.now += timeout or 0
        self.waited += timeout or 0
        return self.is_set()


CHUNKS = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 3)), min_size=1, max_size=30)


@given(st.floats(10, 100_000), CHUNKS)
def test_a_rate_is_kept_over_any_stretch_and_costs_no_more_time_than_that(
    rate: float, chunks: list[tuple[float, float]]
) -> None:
    """Of each chunk: how full it is of the rows that it may have, and the seconds that its reading takes."""
    clock = Time()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: clock.now)
        pace = Pace(METRICS, rate=rate, lag=0)
        begun, read = [], [0]
        for part, seconds in chunks:
            pace.wait(NO_CONNECTION, clock)
            begun.append(clock.now)
            rows = int(pace.most * part)
            clock.now += seconds
            pace.took(rows)
            read.append(read[-1] + rows)
    for last, end in enumerate(begun):
        for first, start in enumerate(begun[: last + 1]):
            assert read[last] - read[first] <= rate * (end - start + 1) + 1e-6
    assert clock.waited <= read[-1] / rate + 1e-6


def test_without_a_rate_nothing_is_waited_for() -> None:
    pace, clock = Pace(METRICS, lag=0), Time()
    for _ in range(3):
        assert not pace.wait(NO_CONNECTION, clock)
        pace.took(pace.most)
    assert not clock.waited


def test_a_bridge_that_stops_does_not_wait_for_its_rate() -> None:
    pace, clock = Pace(METRICS, rate=10, lag=0), Time()
    pace.took(1000)
    clock.set()
    with pytest.raises(Stopped):
        pace.wait(NO_CONNECTION, clock)


@pytest.mark.parametrize(
    ("seconds", "size", "expected"),
    [
        (1e-7, 1000, MOST_BYTES // 1000),
        (1e-4, 100, 5000),  # half a second
        (1e-2, 100, 50),
        (1.0, 100, 10),  # no fewer
        (1e-9, 1, 250_000),  # no more
    ],
)
def test_a_chunk_has_as_many_rows_as_take_its_time_or_its_bytes(seconds: float, size: int, expected: int) -> None:
    """Of a table whose rows take so many seconds and bytes each."""
    asked, rows = Size(), list[int]()
    for _ in range(6):
        asked.learn(Chunk([Block(b"", asked.rows)], None, False, asked.rows * seconds, asked.rows * size))
        rows.append(asked.rows)
    assert rows[-1] == pytest.approx(expected, rel=0.1)
    assert rows[0] <= 8000, "it grows by and by"


def test_a_reader_rests_beside_a_stream_that_flows(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, slept, share = Time(), list[float](), Share()
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(time, "sleep", slept.append)
    share.rest(0.002)
    assert not slept, "nothing flows"
    share.took(1, 1e-4, read=False)
    share.rest(0.002)
    share.rest(3.0)
    assert slept == [pytest.approx(0.016), pytest.approx(0.08)], "eight times as long, and not for ever"
    clock.now += 1.0
    share.rest(0.002)
    assert len(slept) == 2


@pytest.mark.parametrize("pause", [0.1, 0.9])
def test_beside_a_stream_that_flows_few_rows_leave_at_once(pause: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a sink that takes 10 µs a row: milliseconds in which the stream's next event waits, or 50 of them at rest."""
    clock, share = Time(), Share()
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)

    def slices(count: int, *, flows: bool) -> list[int]:
        sizes = []
        for _ in range(count):
            assert share.flows == flows
            sizes.append(share.rows)
            share.took(share.rows, share.rows * 1e-5, read=True)
            if flows:
                share.took(1, 1e-4, read=False)
                clock.now += pause
        return sizes

    at_rest = slices(10, flows=False)
    assert at_rest == sorted(at_rest)
    assert at_rest[-1] == pytest.approx(5000, rel=0.01), "50 ms of it"
    share.took(1, 1e-4, read=False)
    beside = slices(10, flows=True)
    assert beside == sorted(beside, reverse=True)
    assert beside[-1] * 1e-5 <= 0.002
    clock.now += 1.0
    assert slices(10, flows=False)[-1] == at_rest[-1]
