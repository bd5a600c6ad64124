"""A change of schema is announced once, in its place, however often and from wherever the stream comes again."""

import itertools
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from figbridge.change import Lsn
from figbridge.forward.versions import History, Version

Announced = dict[int, tuple[Any, Any]]


def version(position: int, name: str) -> Version:
    return Version(1, Lsn(position // 3), position % 3, {"schema_version": name})


def walk(history: History, stream: list[str], start: int, end: int) -> Announced:
    """Where between `start` and `end` something was announced: position → (previous, new)."""
    announced = {}
    for position in range(start, end):
        if previous := history.meet(version(position, stream[position])):
            announced[position] = previous["schema_version"], stream[position]
    return announced


def truth(stream: list[str]) -> Announced:
    pairs = itertools.pairwise(stream)
    return {index: (old, new) for index, (old, new) in enumerate(pairs, 1) if old != new}


def test_the_first_version_is_no_change() -> None:
    history = History()
    assert walk(history, ["a", "a"], 0, 2) == {}
    assert [it.described["schema_version"] for it in history.take()] == ["a"]
    assert not history.take()


# how far a connection comes; whether what it brought is handed over, and then kept; whether the process is killed
_CONNECTIONS = st.lists(st.tuples(st.integers(0, 20), st.booleans(), st.booleans()), max_size=8)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=20), _CONNECTIONS)
def test_any_number_of_repetitions(stream: list[str], connections: list[tuple[int, bool, bool]]) -> None:
    """Only what was acknowledged is certainly in the table, and only what lies behind it is needed."""
    history, table, acknowledged = History(), list[Version](), 0
    announced: Announced = {}
    for reach, handed, killed in [*connections, (len(stream), True, True)]:
        end = max(acknowledged, min(reach, len(stream)))
        for position, pair in walk(history, stream, acknowledged, end).items():
            assert announced.setdefault(position, pair) == pair, "in one place, always the same"
        if handed:
            table += history.take()
            acknowledged = end
            before = [it for it in table if it.position < version(acknowledged, "").position]
            table = [*before[-1:], *[it for it in table if it not in before]]  # what `VersionStore.add` prunes
        if killed:
            history = History()
            history.learn(table)
        else:
            history.forget()
    assert announced == truth(stream)


def test_two_processes_know_the_same() -> None:
    """Or a replica that waited for the slot would announce what the other one has announced."""
    stream = ["a", "a", "b", "b", "c"]
    first, second = History(), History()
    walk(first, stream, 0, 4)
    second.learn(first.take())
    assert walk(second, stream, 3, 5) == {4: ("b", "c")}
    first.learn(second.take())
    assert walk(first, stream, 2, 5) == {2: ("a", "b"), 4: ("b", "c")}
