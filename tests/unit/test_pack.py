"""Packs: nothing is lost or doubled, no key is reordered, none is too large; and what a refused one becomes."""

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conformance.events import event
from figbridge.deadletter import DeadLetter
from figbridge.delivery.order import keys_of
from figbridge.delivery.pack import DETAIL_TYPE, GROUP, Packing
from figbridge.demo.replica import Change
from figbridge.event import Event, Rejection
from figbridge.formats import KINDS
from figbridge.forward.publish import Publisher
from figbridge.metrics import Metrics
from figbridge.transports import Limits

By = Literal["transaction", "key"]
LIMITS = Limits(entries=10, entry_bytes=1 << 20, batch_bytes=1 << 20, partial=True, ordered=False)


class Kept:
    """Keeps what it takes; refuses for ever what holds one of `bad`."""

    name = "kept"

    def __init__(self, limits: Limits = LIMITS, bad: Sequence[str] = ()) -> None:
        self.limits, self.bad = limits, bad
        self.taken: list[Event] = []
        self.requests = 0

    def size(self, event: Event) -> int:
        return event.body_size()

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass

    def publish(self, events: Sequence[Event]) -> Sequence[Rejection]:
        self.requests += 1
        refused = [it for it in events if any(name.encode() in it.body() for name in self.bad)]
        self.taken += [it for it in events if it not in refused]
        return [Rejection(it, "MalformedDetail", "said the test", retryable=False) for it in refused]


class Letters:
    def __init__(self) -> None:
        self.ids: list[str | None] = []
        self.keys: list[tuple[str | None, str | None]] = []

    def add(self, letters: Sequence[DeadLetter]) -> None:
        self.ids += [it.event_id for it in letters]
        self.keys += [(it.event_id, it.key) for it in letters]

    def close(self) -> None:
        pass


def unpacked(entry: Event) -> list[str]:
    """Ids of the changes in an entry, as a consumer reads them."""
    detail = json.loads(entry.detail)
    events = detail["events"] if detail.get("op") == "pack" else [{"detail": detail}]
    return [(it["detail"] if "detail" in it else it["data"])["id"] for it in events]


def made(shapes: Sequence[tuple[int, int, int | None, bool, int]]) -> list[Event]:
    """(transaction's changes of which it is one, key, old key, about the whole table, bytes)"""
    events, transaction, ordinal = [], 0, 0
    for length, key, old, whole, size in shapes:
        name = f"7423-1-{transaction:016X}-{ordinal:08X}"
        detail = b'{"id":"%b","x":"%b"}' % (name.encode(), b"x" * size)
        old_key = None if old is None else f"k{old}"
        events.append(event(0)._replace(id=name, key=f"k{key}", old_key=old_key, whole_table=whole, detail=detail))
        transaction, ordinal = (transaction, ordinal + 1) if ordinal < length else (transaction + 1, 0)
    return events


SHAPE = st.tuples(
    st.integers(0, 6),
    st.integers(0, 3),
    st.none() | st.none() | st.integers(0, 3),
    st.integers(0, 15).map(lambda it: it == 0),
    st.sampled_from([0, 100, 1500, 9000]),
)


@pytest.mark.parametrize("kind", ["native", "cloudevents"])
@pytest.mark.parametrize("by", ["transaction", "key"])
@given(shapes=st.lists(SHAPE, max_size=40), ordered=st.booleans())
def test_packs_are_the_same_changes_in_the_same_order_of_each_key(
    by: By, kind: str, shapes: list[tuple[int, int, int | None, bool, int]], *, ordered: bool
) -> None:
    events = [tuple.__new__(KINDS[kind], it) for it in made(shapes)]
    sink = Kept(replace(LIMITS, ordered=ordered))

    entries, packs = Packing(by, sink, 8192).pack(events)

    ids = [id_ for entry in entries for id_ in unpacked(entry)]
    assert sorted(ids) == sorted(it.id for it in events)
    assert len({entry.id for entry in entries}) == len(entries)
    place = {id_: number for number, id_ in enumerate(ids)}
    for number, one in enumerate(events):
        for other in events[number + 1 :]:
            if one.whole_table or other.whole_table or set(keys_of(one)) & set(keys_of(other)):
                assert place[one.id] < place[other.id]
    for entry in entries:
        members = unpacked(entry)
        assert type(entry) is KINDS[kind]
        assert len(members) == 1 or entry.body_size() <= 8192
        assert (entry.detail_type == DETAIL_TYPE) == (len(members) > 1)
        if by == "transaction":
            assert len({name.rpartition("-")[0] for name in members}) == 1
            assert (entry.key == GROUP) or not ordered
            of_entry = [it for it in events if it.id in members]
            if entry.id in packs:
                assert set(packs[entry.id].keys) == {key for it in of_entry for key in keys_of(it)}
        else:
            assert len({it.key for it in events if it.id in members}) == 1


def test_a_pack_says_what_is_in_it() -> None:
    events = [
        event(n)._replace(id=f"7-A-{n:08X}", detail_type=f"orders.{kind}", key=f"k{n}", resources=("arn:a",))
        for n, kind in enumerate(("inserted", "updated", "inserted"))
    ]
    (entry,), packs = Packing("transaction", Kept(), 65_536).pack(events)
    detail = json.loads(entry.detail)
    assert entry.id == detail["id"] == "7-A-00000000+2"
    assert (detail["op"], detail["count"]) == ("pack", 3)
    assert detail["detail-types"] == ["orders.inserted", "orders.updated"]
    assert detail["events"] == [json.loads(it.envelope()) for it in events]
    assert (entry.source, entry.detail_type, entry.resources) == ("legacy.shop", "figbridge.pack", ("arn:a",))
    assert packs[entry.id].keys == ("k0", "k1", "k2")


def test_a_pack_cut_otherwise_has_another_id() -> None:
    """Or a service that drops repeated ids would drop the changes that were not in the first one."""
    events = [event(n)._replace(id=f"7-A-{n:08X}") for n in range(5)]
    packing = Packing("transaction", Kept(), 65_536)
    names = {packing.pack(events[:count])[0][0].id for count in (2, 3, 5)}
    assert len(names) == 3


@pytest.mark.parametrize("by", ["transaction", "key"])
def test_of_a_pack_that_is_refused_for_ever_only_the_change_at_fault_is_a_dead_letter(by: By) -> None:
    events = [event(n)._replace(id=f"7-A-{n:08X}", detail=b'{"id":"7-A-%08X","n":%d}' % (n, n)) for n in range(9)]
    sink, letters = Kept(bad=[events[4].id]), Letters()
    metrics = Metrics()
    publisher = Publisher(sink, letters, metrics, threading.Event(), packing=Packing(by, sink, 65_536))

    publisher.publish(events)

    assert letters.ids == [events[4].id]
    assert [id_ for it in sink.taken for id_ in unpacked(it)] == [it.id for it in events if it != events[4]]
    assert metrics.registry.get_sample_value("figbridge_forward_published_total", {"sink": "kept"}) == 8
    publisher.close()


@pytest.mark.parametrize("partial", [True, False])
def test_what_was_in_a_pack_stays_in_its_group_and_its_letter_has_its_own_key(*, partial: bool) -> None:
    """In another group a consumer could see it after what follows; and a redrive goes by the letter's key."""
    made = [event(n, key="ABC"[n % 3])._replace(id=f"7-A-{n:08X}", detail=b'{"id":"7-A-%08X"}' % n) for n in range(4)]
    large = event(4, key="D")._replace(id="7-B-00000000", detail=b'{"x":"%b"}' % (b"x" * (1 << 20)))
    alone = event(5, key="A")._replace(id="7-C-00000000")
    sink = Kept(replace(LIMITS, ordered=True, partial=partial), bad=[made[1].id, alone.id])
    letters = Letters()
    publisher = Publisher(sink, letters, Metrics(), threading.Event(), packing=Packing("transaction", sink, 65_536))

    publisher.publish([*made, large, alone])

    assert [(it.id, it.key) for it in sink.taken] == [(it.id, GROUP) for it in made if it != made[1]]
    assert sorted(letters.keys) == sorted([(made[1].id, "B"), (large.id, "D"), (alone.id, "A")])
    publisher.close()


def test_a_sink_that_takes_a_request_as_a_whole_gets_packs_too() -> None:
    events = [event(n)._replace(id=f"7-{n // 10:X}-{n % 10:08X}") for n in range(100)]
    sink, metrics = Kept(replace(LIMITS, entries=5000, partial=False, ordered=True)), Metrics()
    Publisher(sink, None, metrics, threading.Event(), packing=Packing("transaction", sink, 65_536)).publish(events)
    assert len(sink.taken) == 10
    assert metrics.registry.get_sample_value("figbridge_forward_published_total", {"sink": "kept"}) == 100


def test_the_consumer_to_copy_unpacks() -> None:
    changes = [
        b'{"id":"7-A-%08X","op":"update","table":"orders","key":{"id":%d},"after":{"id":%d},"unchanged":[],'
        b'"position":{"commit_lsn":"0/A","ordinal":%d}}' % (n, n, n, n)
        for n in range(3)
    ]
    events = [event(n)._replace(id=f"7-A-{n:08X}", detail=detail) for n, detail in enumerate(changes)]
    (entry,), _ = Packing("transaction", Kept(), 65_536).pack(events)
    assert Change.unpack(entry.envelope()) == [Change.parse(it.envelope()) for it in events]
