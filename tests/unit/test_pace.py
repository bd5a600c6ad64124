"""How many requests may be out, after what the sink answered."""

import time

import pytest
import tenacity

from figbridge import retry
from figbridge.delivery.pace import Pace
from figbridge.errors import SinkUnavailable

AWAY = SinkUnavailable("away")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    monkeypatch.setattr(retry, "wait_strategy", lambda longest: tenacity.wait_exponential(max=longest))
    return clock


def test_requests_that_were_out_together_narrow_the_window_once(clock: Clock) -> None:
    pace = Pace("publish", 16)
    sent = clock.now
    for clock.now in (101.0, 101.1, 101.2):
        pace.refused(sent, AWAY, 1, most=True)
    assert pace.window == 8

    pace.refused(clock.now, AWAY, 1, most=True)
    assert pace.window == 4


def test_a_few_refused_entries_do_not_narrow_the_window(clock: Clock) -> None:
    pace = Pace("publish", 16)
    assert pace.refused(clock.now, AWAY, 1, most=False) > 0
    assert pace.window == 16
    assert pace.resume == 0


def test_the_window_never_closes_and_opens_again_step_by_step(clock: Clock) -> None:
    pace = Pace("publish", 4)
    for _ in range(10):
        clock.now += 1
        pace.refused(clock.now, AWAY, 1, most=True)
    assert pace.window == 1
    widths = []
    for _ in range(20):
        pace.taken()
        widths.append(pace.window)
    assert widths == sorted(widths)
    assert widths[0] == 2
    assert widths[-1] == 4


def test_a_sink_that_does_not_answer_is_left_alone_for_longer_each_time(clock: Clock) -> None:
    pace = Pace("publish", 16)
    waits = []
    for _ in range(8):
        sent = clock.now
        pace.unanswered(sent, AWAY)
        pace.unanswered(sent - 1, AWAY)  # was out at the same time
        waits.append(pace.resume - clock.now)
        clock.now = pace.resume
    assert waits == sorted(waits)
    assert waits[-1] == 30

    pace.taken()
    pace.unanswered(clock.now, AWAY)
    assert pace.resume - clock.now == waits[0]


def test_an_errors_own_pace_is_kept(clock: Clock) -> None:
    pace, error = Pace("publish", 2), SinkUnavailable("in use")
    error.retry_after = 0.5
    pace.unanswered(clock.now, error)
    assert pace.resume == clock.now + 0.5
