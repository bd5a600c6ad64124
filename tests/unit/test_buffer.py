"""The stream goes before what a snapshot has read, and no read undoes what the stream told."""

import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from figbridge.change import Begin, Column, Lsn, Relation
from figbridge.event import Event, Rejection
from figbridge.forward import place
from figbridge.forward.buffer import Batch, Buffer
from figbridge.forward.checkpoint import Checkpoint, Ticket
from figbridge.forward.snapshot import block as block_
from figbridge.forward.snapshot.block import Block
from figbridge.forward.snapshot.layout import Layout
from figbridge.forward.snapshot.reads import Reads, Slice
from figbridge.forward.snapshot.window import Windows
from figbridge.forward.table import Naming, Table
from figbridge.forward.values import Encoders
from figbridge.metrics import Metrics

NOW = datetime(2026, 11, 25, tzinfo=UTC)
STAMP = place.of_rows(Begin(Lsn(1), NOW, 7), "1-slot")
ONE, OTHER = 16385, 16386
Row = tuple[int, int, str]  # id, a, big


def layout(oid: int = ONE, *, keyed: bool = True) -> Layout:
    types = {"id": 23, "a": 23, "big": 25}
    relation = Relation(oid, "public", f"t{oid}", "d", tuple(Column(it, types[it], -1, it == "id") for it in types))
    naming = Naming("shop", "legacy.{database}", "{table}.{operation}")
    keys = frozenset(["id"] if keyed else ())
    return Layout(Table(relation, naming, Encoders("safe", lambda _: None), keys, {}), keyed=keyed)


def reads(
    rows: Sequence[Row], *, oid: int = ONE, keyed: bool = True, block: int = 2, ticket: Ticket | None = None
) -> Reads:
    window = Windows().begin(layout(oid, keyed=keyed), "1-slot-1-")
    text = ["\t".join([str(id_), str(a), json.dumps(big)]) + "\n" for id_, a, big in rows]
    cut = [text[first : first + block] for first in range(0, len(text), block)]
    window.offered = [Block("".join(it).encode(), len(it)) for it in cut]
    return Reads(window, STAMP, ticket or Checkpoint().track(Lsn(1)))


def event(id_: int, *, oid: int = ONE, op: str = "update", old: int | None = None, **after: Any) -> Event:
    detail = json.dumps({"op": op, "key": {"id": id_}, "after": after, "old": old})
    label = f"public.t{oid}:"
    old_key = None if old is None else f'{label}{{"id":{old}}}'
    return Event("x", "s", "d", f'{label}{{"id":{id_}}}', NOW, detail.encode(), old_key)


def stream(*events: Event, partial: Sequence[int] = ()) -> Batch:
    return Batch(Checkpoint().track(Lsn(1)), events, 10, partial=frozenset(partial))


def taken(buffer: Buffer, rows: int = 2) -> list[list[Any]]:
    """What each turn takes until nothing is left: the ids of reads, and the names of the stream's rows as ~id."""
    turns = []
    buffer.close()
    while batches := buffer.take(100, rows):
        keys = [(json.loads(it.detail)["key"] or {}).get("id") for batch in batches for it in batch.events]
        turns.append([key if batches[0].reads else f"~{key}" for key in keys])
        for batch in batches:
            buffer.left(batch)
            buffer.settle(batch)
    return turns


def one(buffer: Buffer, rows: int = 2) -> Batch:
    """A turn, of a slice or of one batch."""
    (batch,) = buffer.take(1, rows)
    buffer.left(batch)
    return batch


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def buffer(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> Buffer:
    """By a clock on which a second goes by for each look at it: a slice takes one, and the stream has two then."""
    clock = itertools.count(1)
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    return Buffer(100, metrics)


ROWS = [(number, 0, "") for number in range(1, 7)]


def test_what_came_before_goes_first_and_what_comes_later_in_turn(buffer: Buffer) -> None:
    buffer.put(stream(event(1)))
    buffer.put_reads(reads(ROWS))
    buffer.put(stream(event(20)))
    buffer.put(stream(event(21)))
    assert taken(buffer) == [["~1", "~20", "~21"], [1, 2], [3, 4], [5, 6]]


def test_a_row_of_which_the_stream_told_first_leaves_no_more(buffer: Buffer) -> None:
    buffer.put_reads(reads(ROWS))
    assert [it.key for it in one(buffer).events] == ['public.t16385:{"id":1}', 'public.t16385:{"id":2}']
    buffer.put(stream(event(1), event(3), event(9, old=6)))
    assert taken(buffer) == [["~1", "~3", "~9"], [4], [5]]


def test_what_does_not_tell_all_of_its_row_waits(buffer: Buffer) -> None:
    buffer.put_reads(reads(ROWS))
    buffer.put(stream(event(5), partial=[ONE]))
    buffer.put(stream(event(6)))
    assert taken(buffer) == [[1, 2], [3, 4], [5, 6], ["~5", "~6"]]


def test_it_waits_for_reads_of_its_own_table_alone(buffer: Buffer) -> None:
    buffer.put_reads(reads(ROWS))
    one(buffer)
    buffer.put(stream(event(5, oid=OTHER), partial=[OTHER]))
    assert taken(buffer) == [["~5"], [3, 4], [5, 6]]


def test_dead_letters_keep_their_place(buffer: Buffer) -> None:
    buffer.put_reads(reads(ROWS))
    refused = Rejection(event(3), "Odd", "odd", retryable=False)
    buffer.put(Batch(Checkpoint().track(Lsn(1)), (), 10, (refused,)))
    assert taken(buffer) == [[1, 2], [3, 4], [5, 6], []]


def test_without_a_key_nothing_goes_first(buffer: Buffer) -> None:
    buffer.put_reads(reads(ROWS[:4], keyed=False))
    buffer.put(stream(event(9)))
    assert taken(buffer) == [[None, None], [None, None], ["~9"]]


def test_beside_a_stream_with_pauses_slices_leave_in_these(buffer: Buffer) -> None:
    buffer.put_reads(reads(ROWS))
    turns = [one(buffer)]
    for number in range(2):
        buffer.put(stream(event(20 + number)))
        turns += [one(buffer) for _ in range(2)]
    assert [bool(it.reads) for it in turns] == [True, False, True, False, True]


def test_a_stream_without_pauses_has_two_thirds_of_the_time(buffer: Buffer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice takes 3 s here, and a batch 1 s."""
    now = 1.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    buffer.put_reads(reads(ROWS))
    turns = []
    for number in range(16):
        buffer.put(stream(event(20 + number)))
        (batch,) = buffer.take(1, 2)
        now += 3.0 if batch.reads else 1.0
        buffer.left(batch)
        turns.append(bool(batch.reads))
    assert [place for place, read in enumerate(turns) if read] == [0, 7, 14]


def test_when_rows_are_touched_few_leave_at_once() -> None:
    """Their values are made before they leave, which takes as much memory."""
    late = reads([(number, 0, "") for number in range(30_000)], block=30_000)
    late.overtaken([event(3)])
    assert [len(late.slice(20_000)[0]) for _ in range(3)] == [9_999, 10_000, 10_000]
    assert late.ended


def test_tables_take_turns(buffer: Buffer) -> None:
    buffer.put_reads(reads(ROWS[:4]))
    buffer.put_reads(reads([(number, 0, "") for number in range(11, 15)], oid=OTHER))
    assert taken(buffer) == [[1, 2], [11, 12], [3, 4], [13, 14]]


def test_what_is_taken_at_once_is_bounded_by_bytes_too() -> None:
    """Each byte of a call is in memory several times over while it is on its way."""
    buffer = Buffer(1 << 20, Metrics())
    for size in (10, 10, 10, 1000, 10):
        batch = stream(event(1))
        batch.size = size
        buffer.put(batch)
    buffer.close()

    turns = []
    while batches := buffer.take(100, 2, 25):
        turns.append([it.size for it in batches])
    assert turns == [[10, 10], [10], [1000], [10]]


def test_reads_do_not_fill_the_buffer_and_are_counted(buffer: Buffer, metrics: Metrics) -> None:
    def bytes_() -> float | None:
        return metrics.registry.get_sample_value("figbridge_forward_buffered_bytes")

    late = reads([(1, 0, "x" * 500)])
    buffer.put_reads(late)
    assert not buffer.full
    buffer.put(stream(event(1)))
    assert bytes_() == late.size + 10 > 500
    taken(buffer)
    assert bytes_() == 0


def test_only_the_last_slice_has_the_ticket(buffer: Buffer) -> None:
    ticket = Checkpoint().track(Lsn(5))
    buffer.put_reads(reads(ROWS, ticket=ticket))
    buffer.put_reads(reads((), oid=OTHER))
    buffer.close()
    turns = [one(buffer) for _ in range(4)]
    assert [it.ticket is ticket for it in turns] == [False, False, False, True]
    assert turns[1].ticket is not None, "a chunk without a row is acknowledged as well"
    assert not buffer.take(100)


def test_the_lines_of_a_slice_are_the_envelopes_of_its_events() -> None:
    late = reads([(1, 12345, 'a "b"'), (2, -1, "ä \\ % {x}"), (3, 0, "")])
    late.overtaken([event(2)])
    found, _ = late.slice(10)
    assert [json.loads(it.detail)["position"]["ordinal"] for it in found] == [0, 1]
    assert b"".join(found.lines()) == b"".join(it.envelope() + b"\n" for it in found)


def test_slices_can_be_asked_for_in_any_order_and_again() -> None:
    """The rows of a block are cut as they leave; a sink that fails asks once more, others never ask for the lines."""
    late = reads([(number, 0, f"note {number}") for number in range(1200)], block=1000)
    slices = [late.slice(510)[0] for _ in range(3)]
    wanted = [[f"note {number}" for number in numbers] for numbers in (range(510), range(510, 1020), range(1020, 1200))]

    def notes(lines: Iterable[bytes]) -> list[str]:
        return [json.loads(line)["detail"]["after"]["big"] for line in b"".join(lines).splitlines()]

    assert late.ended
    assert [len(it) for it in slices] == [510, 510, 180]
    assert notes(slices[1].lines()) == wanted[1]
    next(iter(slices[0].lines()))  # and there it failed
    assert [notes(it.lines()) for it in slices] == wanted
    assert [[json.loads(it.detail)["after"]["big"] for it in one] for one in slices] == wanted
    assert [notes(it.lines()) for it in slices] == wanted


def test_the_sizes_of_slices_are_the_size_of_all() -> None:
    late = reads([(number, 0, "x" * number) for number in range(20)], block=7)
    whole = late.size
    sizes = [late.slice(3)[1] for _ in range(7)]
    assert (sum(sizes), late.size, late.ended) == (whole, 0, True)


def ids(lines: Iterable[bytes]) -> list[int]:
    return [json.loads(line)["detail"]["after"]["id"] for line in b"".join(lines).splitlines()]


def test_the_stream_ends_a_slice_early(buffer: Buffer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_, "_PART", 2)
    ticket = Checkpoint().track(Lsn(5))
    late = reads(ROWS, block=5, ticket=ticket)
    buffer.put_reads(late)
    whole = late.size
    (batch,) = buffer.take(100, 6)
    assert isinstance(batch.events, Slice)
    lines = batch.events.lines()
    first = next(lines)
    buffer.put(stream(event(4), event(9)))
    assert (ids([first, *lines]), len(batch.events), late.left) == ([1, 2], 2, 6)
    buffer.left(batch)
    buffer.settle(batch)
    assert (batch.ticket, late.left, batch.size + late.size) == (None, 2, whole)
    assert [it.key for it in one(buffer).events] == [event(4).key, event(9).key]
    (batch,) = buffer.take(100, 6)
    assert isinstance(batch.events, Slice)
    assert ids(batch.events.lines()) == [3, 5, 6], "of the fourth the stream told first"
    assert [json.loads(it.detail)["position"]["ordinal"] for it in batch.events] == [2, 3, 4]
    buffer.left(batch)
    assert (batch.ticket, late.left, late.size) == (ticket, 5, 0)


def test_what_waits_for_a_slice_does_not_end_it(buffer: Buffer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_, "_PART", 2)
    buffer.put_reads(reads(ROWS))
    (batch,) = buffer.take(100, 6)
    buffer.put(stream(event(4), partial=[ONE]))
    assert isinstance(batch.events, Slice)
    assert ids(batch.events.lines()) == [1, 2, 3, 4, 5, 6]


@dataclass
class World:
    """A table, of which the stream tells what changes; some rows were there before."""

    rows: dict[int, tuple[int, str]] = field(default_factory=lambda: {it: (0, f"old {it}") for it in range(1, 6)})
    version: int = 0

    def change(self, kind: str, id_: int, other: int) -> tuple[list[Event], list[int]]:
        """Do it; its events, and the tables of which one does not tell all."""
        self.version += 1
        a, big = self.version, f"big {self.version}"
        if kind == "insert" or id_ not in self.rows:
            self.rows[id_] = a, big
            return [event(id_, a=a, big=big)], []
        if kind == "delete":
            del self.rows[id_]
            return [event(id_, op="delete")], []
        if kind == "unsent":
            self.rows[id_] = a, self.rows[id_][1]
            return [event(id_, a=a)], [ONE]
        if kind == "truncate":
            self.rows.clear()
            whole = Event("x", "s", "d", "public.t16385:null", NOW, b'{"op":"truncate"}', None, True)
            return [whole], [ONE]
        if kind == "move" and other not in self.rows:
            self.rows[other] = a, big
            del self.rows[id_]
            return [event(other, old=id_, a=a, big=big)], []
        self.rows[id_] = a, big
        return [event(id_, a=a, big=big)], []


def applied(details: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    held: dict[int, dict[str, Any]] = {}
    for detail in details:
        if detail["op"] == "truncate":
            held.clear()
            continue
        id_ = detail["key"]["id"]
        was = held.pop(detail["old"] if detail.get("old") is not None else id_, {})
        if detail["op"] != "delete":
            held[id_] = {**was, **{name: detail["after"][name] for name in ("a", "big") if name in detail["after"]}}
    return held


def delivered(batch: Batch, part: int, meanwhile: Callable[[], None]) -> Iterator[dict[str, Any]]:
    """The details of its events, as lines where it has some: after each `part` of these something happens."""
    if not (part and isinstance(batch.events, Slice)):
        yield from (json.loads(it.detail) for it in batch.events)
        return
    with mock.patch.object(block_, "_PART", part):
        for lines in batch.events.lines():
            yield from (json.loads(line)["detail"] for line in lines.splitlines())
            meanwhile()


_IDS = st.integers(1, 8)
_KINDS = st.sampled_from(["insert", "update", "delete", "unsent", "truncate", "move", "update", "update"])
_STEPS = st.lists(
    st.one_of(
        st.tuples(_KINDS, _IDS, _IDS),
        st.tuples(st.just("read"), st.integers(1, 3), _IDS),
        st.just(("take", 0, 0)),
        st.tuples(st.just("lines"), _IDS, st.integers(1, 3)),
    ),
    max_size=60,
)


@given(_STEPS)
def test_in_whatever_turns_a_consumer_ends_with_the_table(steps: Sequence[tuple[str, int, int]]) -> None:
    """A chunk of all rows is read now and then, once at least; the consumer holds what is in the table at the end.

    While a slice is written line by line, rows change.
    """
    world, buffer, told = World(), Buffer(1 << 20, Metrics()), list[dict[str, Any]]()
    pending: Reads | None = None

    def change(kind: str, id_: int, other: int) -> None:
        events, partial = world.change(kind, id_, other)
        buffer.put(stream(*events, partial=partial))

    def take(rows: int, meanwhile: int = 0, *, part: int = 0) -> bool:
        batches = buffer.take(2, rows) if buffer._batches or buffer._reads else ()
        for batch in batches:
            told.extend(delivered(batch, part, lambda: change("update", meanwhile, 0)))
            buffer.left(batch)
        return bool(batches)

    for kind, first, second in [*steps, ("read", 1, 1)]:
        if kind in ("take", "lines"):
            take(8, first, part=second) if kind == "lines" else take(1)
        elif kind == "read":
            if pending is None or pending.ended:  # of one table there is one at a time
                rows = [(id_, *row) for id_, row in sorted(world.rows.items())]
                pending = reads(rows, block=first)
                buffer.put_reads(pending)
        else:
            change(kind, first, second)
    buffer.close()
    while take(2):
        pass
    assert applied(told) == {id_: {"a": a, "big": big} for id_, (a, big) in world.rows.items()}
