"""When the next try comes, and what the log says meanwhile."""

import threading
import time

import pytest
import structlog
import tenacity
from structlog.testing import capture_logs

from figbridge import retry
from figbridge.errors import LegacyUnavailable, SlotInUse
from figbridge.retry import Stopped, persist


class Waits:
    """Stands for the clock: what it was asked to wait, without waiting; stops the bridge after `most` tries."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
        self.stop, self.seconds, self._most = threading.Event(), list[float](), most
        monkeypatch.setattr(tenacity, "sleep_using_event", lambda _event: self._wait)
        structlog.reset_defaults()

    def _wait(self, seconds: float) -> None:
        self.seconds.append(seconds)
        if len(self.seconds) >= self._most:
            self.stop.set()


def test_a_replica_that_waits_for_the_slot_asks_at_a_fixed_pace_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits = Waits(monkeypatch, most=100)

    def action() -> None:
        raise SlotInUse("in use by PID 7")

    with capture_logs() as lines, pytest.raises(Stopped):
        persist(action, what="start", stop=waits.stop)
    assert set(waits.seconds) == {SlotInUse.retry_after}
    assert waits.seconds[0] <= 1
    assert [(line["log_level"], line["attempt"]) for line in lines] == [("warning", 1)]


def test_a_failure_after_long_waiting_is_a_first_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = Waits(monkeypatch, most=60)
    tries = iter(range(100))

    def action() -> None:
        raise SlotInUse("in use") if next(tries) < 50 else LegacyUnavailable("cut")

    with pytest.raises(Stopped):
        persist(action, what="start", stop=waits.stop)
    assert waits.seconds[50] <= 0.1, "the first wait after a failure must be short"
    assert waits.seconds[51] <= 0.2


def test_what_only_a_human_can_end_is_an_error_in_the_log_with_its_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = Waits(monkeypatch, most=3)
    texts = iter(["password refused", "password refused", "another trouble", "another trouble"])

    def action() -> None:
        error = LegacyUnavailable(next(texts), hint="put the right one there")
        error.urgent = True
        raise error

    with capture_logs() as lines, pytest.raises(Stopped):
        persist(action, what="start", stop=waits.stop)
    assert [(line["log_level"], line["error"]) for line in lines] == [
        ("error", "password refused"), ("error", "another trouble"),
    ]  # fmt: skip
    assert lines[0]["hint"] == "put the right one there"


def test_the_same_trouble_is_told_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    told = retry._Told()
    assert told.is_news("gone")
    assert not told.is_news("gone")
    now[0] += 31
    assert told.is_news("gone")
    assert told.is_news("other")
