"""Batches in hand: applied in their order, and none behind one that waits or failed."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from figbridge.reverse.hands import Hand, Hands
from figbridge.reverse.item import Item, Part
from fixtures.clock import PATIENCE


class Applying:
    """Notes what is applied; each batch ends when it is let go, with what it is told to end with."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ends: dict[str, bool | Exception] = {}
        self.free = threading.Semaphore(0)

    def __call__(self, parts: Sequence[Part]) -> bool:
        name = str(parts[0].parcel)
        self.begun.append(name)
        assert self.free.acquire(timeout=PATIENCE)
        end = self.ends.get(name, False)
        if isinstance(end, Exception):
            raise end
        return end


@pytest.fixture
def applying() -> Applying:
    return Applying()


@pytest.fixture
def stop() -> threading.Event:
    return threading.Event()


@pytest.fixture
def hands(applying: Applying, stop: threading.Event) -> Iterator[Hands]:
    with ThreadPoolExecutor(1) as pool:
        yield Hands(pool, applying, stop)
        applying.free.release(100)


def part(parcel: Any) -> Part:
    return Part([], [], first=True, parcel=parcel)


def taken(hands: Hands, *names: str) -> list[Hand]:
    made = [Hand([], [part(name)]) for name in names]
    for hand in made:
        hands.take(hand)
    return made


def test_they_are_applied_in_their_order_and_some_are_ready(hands: Hands, applying: Applying) -> None:
    made = taken(hands, *"abcd")
    assert not hands.full
    made += taken(hands, "e")
    assert hands.full, "one at work and four behind it"
    applying.free.release(5)
    for hand in made:
        assert hands.oldest() == (hand, False)
        hands.leave()
    assert (len(hands), applying.begun) == (0, [*"abcde"])


def test_of_large_messages_there_are_fewer(hands: Hands, applying: Applying) -> None:
    large = Item(SimpleNamespace(body=bytes(9 * 1024 * 1024)))  # it is only weighed
    for number in range(2):
        assert not hands.full
        hands.take(Hand([large], [part(number)]))
    assert hands.full
    applying.free.release(2)


def test_one_that_is_done_is_to_be_settled_whatever_room_there_is(hands: Hands, applying: Applying) -> None:
    taken(hands, "a")
    applying.free.release()
    hands.oldest()
    assert hands.full


def test_behind_one_that_holds_up_nothing_is_done_until_it_is_asked_anew(hands: Hands, applying: Applying) -> None:
    applying.ends["a"] = True
    _, second, third = taken(hands, "a", "b", "c")
    applying.free.release()
    assert hands.oldest()[1] is True
    assert (second.done.result(PATIENCE), third.done.result(PATIENCE), applying.begun) == (None, None, ["a"])
    hands.leave()
    hands.renew()
    applying.free.release(2)
    for hand in (second, third):
        assert hands.oldest() == (hand, False)
        hands.leave()
    assert applying.begun == ["a", "b", "c"]


def test_a_failure_is_raised_in_its_turn_and_stays_in_hand(hands: Hands, applying: Applying) -> None:
    applying.ends["b"] = RuntimeError("a bug")
    *_, third = taken(hands, "a", "b", "c")
    applying.free.release(3)
    assert hands.oldest()[1] is False
    hands.leave()
    with pytest.raises(RuntimeError, match="a bug"):
        hands.oldest()
    assert third.done.result(PATIENCE) is None
    assert (len(hands), applying.begun) == (2, ["a", "b"])


def test_after_the_stop_nothing_is_begun(hands: Hands, applying: Applying, stop: threading.Event) -> None:
    _, second = taken(hands, "a", "b")
    stop.set()
    applying.free.release()
    assert hands.oldest()[1] is False
    assert (second.done.result(PATIENCE), applying.begun) == (None, ["a"])


def test_the_last_transaction_of_a_batch_knows_the_first_of_the_next(hands: Hands, applying: Applying) -> None:
    items = [Item(SimpleNamespace(body=b"")) for _ in range(2)]  # nobody looks at them
    first, second = [part("a"), part("b")], [part("c"), part("d")]
    hands.take(Hand(items[:1], first))
    hands.take(Hand(items[1:], second))
    behind: list[Any] = [it.behind for it in (*first, *second)]
    assert behind == [None, "c", None, None]
    assert hands.deliveries() == [item.delivery for item in items]
    applying.free.release(2)
