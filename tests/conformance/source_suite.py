"""What every source does, whatever is behind it: subclass `SourceSuite` and give it a `harness`."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import pytest

from figbridge.errors import QueueError
from figbridge.transports import Delivery, Source
from fixtures.clock import PATIENCE, Stopwatch

ODD_TEXTS: Sequence[bytes] = [
    b"not json",
    b"{",
    b"null",
    b" leading and trailing \t",
    b"line\nfeed\r\ntab\t",
    "żółw 中文 🌳 \u2028 \u00a0".encode(),
    b"<a>&amp;</a> %s {0} ${x} \\u0000 \"'",
]
ODD_BYTES: Sequence[bytes] = [b"", b"\0", b"\xff\xfe\x80", bytes(range(256))]


@dataclass(frozen=True, slots=True)
class SourceFeatures:
    """What transports differ in.

    any_bytes   a message may be any bytes, not only text that XML could hold
    patience    seconds after which what a closed source held is handed out again, at the latest
    singly      each message is settled for itself; if not, what comes after the first that is not settled comes again
                in the next process
    counts      the queue counts deliveries; if not, a process does
    """

    any_bytes: bool
    patience: float
    singly: bool = True
    counts: bool = True


class SourceHarness(Protocol):
    """A queue, and a way to fill it that does not go through figbridge."""

    features: ClassVar[SourceFeatures]

    def open(self) -> Source:
        """The source, on the same queue and place each time."""

    def open_missing(self) -> Source:
        """A source whose queue is not there."""

    def put(self, bodies: Sequence[bytes]) -> None:
        """Append messages to the queue."""


def take(source: Source, count: int, *, wait: float = PATIENCE) -> list[Delivery]:
    """`count` deliveries exactly, unsettled, in however many batches."""
    found: list[Delivery] = []
    deadline = time.monotonic() + max(wait, PATIENCE)
    while len(found) < count and time.monotonic() < deadline:
        found += source.receive(wait=1.0)
    assert len(found) == count, [it.body for it in found]
    return found


def drain(source: Source, count: int) -> list[bytes]:
    """The bodies of `count` messages, each acknowledged."""
    found: list[bytes] = []
    deadline = time.monotonic() + PATIENCE
    while len(found) < count and time.monotonic() < deadline:
        for delivery in source.receive(wait=1.0):
            found.append(delivery.body)
            delivery.ack()
    return found


class SourceSuite:
    """The tests."""

    @pytest.fixture
    def harness(self) -> SourceHarness:
        raise NotImplementedError

    @pytest.fixture
    def source(self, harness: SourceHarness) -> Iterator[Source]:
        source = harness.open()
        source.check()
        yield source
        source.close()

    def test_delivers_in_order(self, harness: SourceHarness, source: Source) -> None:
        bodies = [b"%d" % n for n in range(25)]
        harness.put(bodies)

        assert drain(source, 25) == bodies

    def test_the_first_delivery_is_attempt_one(self, harness: SourceHarness, source: Source) -> None:
        harness.put([b"a"])

        assert take(source, 1)[0].attempts == 1

    def test_acknowledged_is_gone_also_for_the_next_process(self, harness: SourceHarness, source: Source) -> None:
        harness.put([b"a", b"b"])
        assert drain(source, 2) == [b"a", b"b"]
        source.close()

        again = harness.open()
        harness.put([b"c"])
        try:
            assert drain(again, 1) == [b"c"]
            assert not again.receive(wait=0)
        finally:
            again.close()

    def test_many_are_acknowledged_at_once(self, harness: SourceHarness, source: Source) -> None:
        harness.put([b"%d" % n for n in range(25)])
        held = take(source, 25)
        source.acknowledge(held[:24])
        source.acknowledge(held[:24])  # an answer that was lost
        source.acknowledge([])
        source.close()

        again = harness.open()
        try:
            (left,) = take(again, 1, wait=harness.features.patience)
            assert left.body == held[24].body
            left.ack()
            assert not again.receive(wait=0)
        finally:
            again.close()

    def test_released_comes_again_and_is_counted(self, harness: SourceHarness, source: Source) -> None:
        harness.put([b"a"])
        for attempt in (1, 2, 3):
            (delivery,) = take(source, 1)
            assert (delivery.body, delivery.attempts) == (b"a", attempt)
            delivery.nack()

    def test_released_comes_not_before_its_delay(self, harness: SourceHarness, source: Source) -> None:
        harness.put([b"a"])
        (delivery,) = take(source, 1)
        start = time.monotonic()
        delivery.nack(delay=1.0)

        assert not source.receive(wait=0)
        assert take(source, 1)[0].body == b"a"
        assert time.monotonic() - start >= 0.9  # SQS counts whole seconds of its own clock

    def test_unsettled_comes_again_for_the_next_process(self, harness: SourceHarness, source: Source) -> None:
        harness.put([b"a", b"b", b"c"])
        held = take(source, 3)
        held[1].ack()
        source.close()

        again = harness.open()
        try:
            expected = [b"a", b"c"] if harness.features.singly else [b"a", b"b", b"c"]
            repeated = take(again, len(expected), wait=harness.features.patience)
            assert [it.body for it in repeated] == expected
            assert {it.attempts for it in repeated} == {2 if harness.features.counts else 1}
            for delivery in repeated:
                delivery.ack()
        finally:
            again.close()

    def test_held_is_not_handed_out_twice(self, harness: SourceHarness, source: Source) -> None:
        harness.put([b"a"])
        take(source, 1)

        assert not source.receive(wait=0)

    def test_odd_bodies_survive_to_the_byte(self, harness: SourceHarness, source: Source) -> None:
        bodies = [*ODD_TEXTS, *(ODD_BYTES if harness.features.any_bytes else ())]
        harness.put(bodies)

        assert drain(source, len(bodies)) == bodies

    def test_an_empty_queue_gives_nothing_after_the_wait(self, source: Source) -> None:
        watch = Stopwatch()

        assert not source.receive(wait=0)
        assert watch.unhindered < 1.0

    def test_close_may_be_called_twice_and_before_anything(self, harness: SourceHarness) -> None:
        source = harness.open()
        source.close()
        source.close()

    def test_a_missing_queue_is_refused_with_a_remedy(self, harness: SourceHarness) -> None:
        source = harness.open_missing()
        try:
            with pytest.raises(QueueError) as caught:
                source.check()
        finally:
            source.close()
        assert caught.value.hint
        assert not caught.value.retryable
