"""What is counted of a heartbeat's way, by a clock that the test winds."""

import math
from typing import Any

import pytest

from figbridge.change import LogicalMessage, Lsn
from figbridge.forward.heartbeat import PREFIX, Heartbeats
from figbridge.metrics import Metrics


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Round:
    def __init__(self) -> None:
        self.clock, self.metrics = Clock(), Metrics()
        self.beats = Heartbeats("slot", self.metrics, self.clock)

    def after(self, seconds: float) -> "Round":
        self.clock.now += seconds
        return self

    def message(self, lsn: int) -> LogicalMessage:
        return LogicalMessage(False, Lsn(lsn), PREFIX, self.beats.content().encode())

    def sample(self, name: str, stage: str) -> Any:
        return self.metrics.registry.get_sample_value(f"figbridge_forward_heartbeat_{name}", {"stage": stage})

    def ages(self) -> tuple[float, float]:
        return self.sample("age_seconds", "seen"), self.sample("age_seconds", "acknowledged")


@pytest.fixture
def round_() -> Round:
    return Round()


def test_the_age_is_unknown_until_the_stream_opens_and_grows_from_then(round_: Round) -> None:
    assert all(math.isnan(age) for age in round_.ages())
    round_.beats.opened()
    assert round_.after(5).ages() == (5, 5)
    round_.beats.closed()
    assert not round_.beats.streaming
    assert round_.after(5).ages() == (10, 10)
    round_.beats.opened()  # another connection is not a younger heartbeat
    assert round_.ages() == (10, 10)


def test_each_stage_has_its_age_and_its_latency(round_: Round) -> None:
    round_.beats.opened()
    message = round_.message(100)
    round_.after(2).beats.seen(message)
    assert round_.ages() == (2, 2)
    round_.after(1).beats.acknowledged(Lsn(99))
    assert round_.sample("seconds_count", "acknowledged") == 0
    round_.after(1).beats.acknowledged(Lsn(100))
    assert round_.after(1).ages() == (5, 5)
    assert (round_.sample("seconds_sum", "seen"), round_.sample("seconds_sum", "acknowledged")) == (2, 4)


def test_while_the_sink_takes_nothing_only_the_acknowledged_age_grows(round_: Round) -> None:
    round_.beats.opened()
    for n in range(10):
        message = round_.message(100 + n)
        round_.beats.seen(message)
        round_.beats.acknowledged(Lsn(100))
        round_.after(10)
    assert round_.ages() == (10, 100)
    round_.beats.acknowledged(Lsn(1000))
    assert round_.ages() == (10, 10)
    assert round_.sample("seconds_count", "acknowledged") == 10


def test_what_a_new_connection_repeats_is_counted_once(round_: Round) -> None:
    round_.beats.opened()
    message = round_.message(100)
    for _ in range(2):
        round_.beats.seen(message)
    round_.beats.closed()
    round_.beats.opened()
    round_.beats.seen(message)
    round_.beats.acknowledged(Lsn(100))
    assert (round_.sample("seconds_count", "seen"), round_.sample("seconds_count", "acknowledged")) == (1, 1)


def test_a_sink_that_is_away_for_days_costs_no_memory(round_: Round) -> None:
    round_.beats.opened()
    for n in range(5000):
        round_.beats.seen(round_.message(n))
    assert len(round_.beats._waiting) == 1000
    round_.beats.acknowledged(Lsn(5000))
    assert round_.sample("seconds_count", "acknowledged") == 1000
    round_.beats.seen(round_.message(5001))
    round_.beats.acknowledged(Lsn(5001))
    assert round_.ages() == (0, 0)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"{}", b"[]", b"1", b"null", b'{"instance":"x","sequence":1,"written":1}',
     b'{"instance":"%b","sequence":"x","written":1}', b'{"instance":"%b","sequence":1,"written":null}'],
)  # fmt: skip
def test_what_others_write_under_our_prefix_is_nothing(round_: Round, content: bytes) -> None:
    round_.beats.opened()
    content = content.replace(b"%b", round_.beats._instance.encode())
    round_.beats.seen(LogicalMessage(False, Lsn(1), PREFIX, content))
    assert round_.sample("seconds_count", "seen") == 0


def test_two_processes_do_not_take_each_others_heartbeats(round_: Round) -> None:
    other = Round()
    round_.beats.opened()
    round_.beats.seen(other.message(1))
    assert round_.sample("seconds_count", "seen") == 0
