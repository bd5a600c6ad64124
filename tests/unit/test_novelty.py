"""When rows are taken for new: only after all of a batch were, and after each mistake less readily."""

import itertools
import random

from figbridge.reverse.novelty import Novelty, Rows


def test_who_was_told_that_all_were_new_goes_on_so_until_one_was_not() -> None:
    novelty = Novelty()
    assert novelty.next() is Rows.ASKED
    novelty.learn(Rows.ASKED, new=True)
    assert [novelty.next() for _ in range(3)] == [Rows.NEW] * 3
    novelty.learn(Rows.NEW, new=True)
    assert novelty.next() is Rows.NEW
    novelty.learn(Rows.NEW, new=False)
    assert [novelty.next() for _ in range(2)] == [Rows.UNKNOWN, Rows.ASKED]


def test_what_was_not_asked_about_teaches_nothing() -> None:
    novelty = Novelty()
    for new in (True, False):
        novelty.learn(Rows.UNKNOWN, new=new)
        assert novelty.next() is Rows.ASKED


def test_rows_that_are_always_there_are_looked_for_ever_more_rarely() -> None:
    novelty, asked = Novelty(), list[int]()
    for batch in range(20_000):
        rows = novelty.next()
        if rows is not Rows.UNKNOWN:
            asked.append(batch)
        novelty.learn(rows, new=False)
    pauses = [later - earlier - 1 for earlier, later in itertools.pairwise(asked)]
    assert pauses[:11] == [1 << number for number in range(11)]
    assert set(pauses[11:]) == {1024}


def test_batches_for_nothing_stay_few_whatever_part_of_them_is_new() -> None:
    """Each gains a fifth of its time where all of it is new; so what is done for nothing must cost less."""
    for part in (0.0, 0.3, 0.5, 0.8, 0.9, 0.97, 1.0):
        chance, novelty, gained, lost = random.Random(7), Novelty(), 0, 0
        for _ in range(20_000):
            rows, new = novelty.next(), chance.random() < part
            if rows is Rows.NEW:
                gained, lost = gained + new, lost + (not new)
            novelty.learn(rows, new=new)
        assert lost <= 0.03 * 20_000, part
        assert lost <= 0.2 * gained + 20, part
