"""What timed out before is tried alone, fairly, and leaves time for others."""

import dataclasses

import pytest

from figbridge.reverse.item import Item
from figbridge.reverse.outcome import DONE, Applied, Outcome
from figbridge.reverse.park import Parked
from figbridge.reverse.slow import Slow

TIMEOUT = Applied(Outcome.RETRY, "57014", "canceling statement due to statement timeout")
PARKED = Parked("shop.next", "", b"{}", 1, "57014", "", None, overdue=False)


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("figbridge.reverse.slow.time", made)
    return made


def items(**attempts: int) -> list[Item]:
    return [Item(dataclasses.replace(PARKED, key=key, attempts=number)) for key, number in attempts.items()]


def keys(tried: list[Item]) -> list[str]:
    return [it.delivery.key for it in tried if isinstance(it.delivery, Parked)]


def test_one_timeout_ends_the_turn_and_others_have_three_times_as_long(clock: Clock) -> None:
    slow, hurried = Slow(), []

    def apply(item: Item, briefly: bool) -> None:
        hurried.append(briefly)
        clock.now += 1 if item.delivery.attempts > 1 else 5
        item.applied = TIMEOUT if item.delivery.attempts > 1 else DONE

    assert keys(slow.apply(items(often=4, once=1, twice=2), apply)) == ["once", "twice"], "the least tried come first"
    assert not slow.due
    clock.now += 2.9
    assert not slow.due
    clock.now += 0.2
    assert slow.due
    assert keys(slow.apply(items(often=4), apply)) == ["often"]
    assert hurried == [True, True, False], "one try of four waits for as long as it may"


def test_what_is_applied_needs_no_pause(clock: Clock) -> None:
    slow = Slow()

    def apply(item: Item, _briefly: bool) -> None:
        clock.now += 1
        item.applied = DONE

    assert keys(slow.apply(items(a=1, b=1, c=1), apply)) == ["a", "b", "c"]
    assert slow.due
