"""The interpreter's switch interval, which is everybody's."""

import sys
from collections.abc import Iterator

import pytest

from figbridge.turns import TURN, Turns

USUAL = 0.004


@pytest.fixture(autouse=True)
def usual() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(USUAL)
    yield
    sys.setswitchinterval(before)


def now() -> float:
    """In seconds, to the tenth of a millisecond or, below that, the hundredth."""
    interval = sys.getswitchinterval()
    return round(interval, 4 if interval > TURN else 5)


def test_turns_are_short_while_anybody_is_within() -> None:
    turns = Turns()
    with turns:
        with turns:
            assert now() == TURN
        assert now() == TURN
    assert now() == USUAL


def test_a_turn_is_held() -> None:
    turns = Turns()
    with turns:
        with turns.held():
            assert now() == 0.005
            with turns.held():
                assert now() == 0.005
            assert now() == 0.005
        assert now() == TURN
    with turns.held():
        assert now() == 0.005
    assert now() == USUAL


def test_whoever_fails_leaves_no_trace() -> None:
    turns = Turns()
    with pytest.raises(ZeroDivisionError), turns, turns.held():
        raise ZeroDivisionError
    assert now() == USUAL


def test_they_are_not_made_longer() -> None:
    turns = Turns()
    sys.setswitchinterval(TURN / 2 + 1e-6)  # it is kept in microseconds, rounded down
    with turns:
        assert now() == TURN / 2
    assert now() == TURN / 2
