"""Which events wait for which: only later ones, only of a row that may be the same, and never for ever."""

from hypothesis import given
from hypothesis import strategies as st

from figbridge.reverse.mapping import Target
from figbridge.reverse.waiting import Waiting


def row(**columns: str) -> Target:
    return Target(("shop", "orders"), frozenset(columns.items()))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


FIRST, SECOND, THIRD = (("shop.next", name) for name in ("first", "second", "third"))


def test_nothing_waits_at_the_start() -> None:
    waiting = Waiting()
    assert not waiting
    assert waiting.delay(FIRST, row(id="1")) is None


def test_a_later_event_of_the_row_waits_until_the_earlier_one_is_due() -> None:
    clock = Clock()
    waiting = Waiting(clock)
    waiting.add(FIRST, row(id="1"), 4.0)
    clock.now += 1
    assert waiting.delay(SECOND, row(id="1")) == 3.0
    assert waiting.delay(SECOND, row(id="2")) is None


def test_the_first_event_of_a_row_never_waits_for_those_behind_it() -> None:
    waiting = Waiting(Clock())
    waiting.add(FIRST, row(id="1"), 1.0)
    waiting.add(SECOND, row(id="1"), 1.0)
    waiting.add(FIRST, row(id="1"), 2.0)  # it came again and still waits; its place is kept
    assert waiting.delay(FIRST, row(id="1")) is None
    assert waiting.delay(SECOND, row(id="1")) == 2.0
    assert waiting.delay(THIRD, row(id="1")) == 2.0


def test_what_is_done_holds_nobody_back() -> None:
    waiting = Waiting(Clock())
    waiting.add(FIRST, row(id="1"), 1.0)
    waiting.remove(FIRST)
    waiting.remove(FIRST)
    assert waiting.delay(SECOND, row(id="1")) is None


def test_an_event_that_does_not_come_back_is_forgotten() -> None:
    clock = Clock()
    waiting = Waiting(clock)
    waiting.add(FIRST, row(id="1"), 1.0)
    clock.now += 10
    assert waiting.delay(SECOND, row(id="1")) == 0.0, "overdue, but the queue may be long"
    clock.now += 10
    assert waiting.delay(SECOND, row(id="1")) is None
    assert not waiting


COLUMNS = st.dictionaries(st.sampled_from("abc"), st.sampled_from("12"))


@given(COLUMNS, COLUMNS)
def test_being_the_same_row_is_mutual(one: dict[str, str], other: dict[str, str]) -> None:
    assert row(**one).may_be(row(**one))
    assert row(**one).may_be(row(**other)) == row(**other).may_be(row(**one))
