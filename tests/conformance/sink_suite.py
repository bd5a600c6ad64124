"""What every sink does, whatever is behind it: subclass `SinkSuite` and give it a `harness`.

What transports legitimately differ in is data (`SinkFeatures`), so that a test says what it expects of each.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import pytest

from conformance.events import ODD_DETAILS, event, number
from figbridge.errors import SinkRefused
from figbridge.transports import Sink


@dataclass(frozen=True, slots=True)
class SinkFeatures:
    """What transports differ in.

    exact      what is read back is `Event.envelope` to the byte; otherwise the same JSON values in AWS's envelope
    ordered    events are read back in the order in which they were published
    unique     an event that is published twice is there once
    quoting    source and detail-type may hold what JSON has to escape (moto pastes them into its envelope as they are)
    most       bytes of a request that what is behind it takes, where an emulator's limit is an older, smaller one
    """

    exact: bool
    ordered: bool
    unique: bool
    quoting: bool = True
    most: int = 1 << 62


class SinkHarness(Protocol):
    """A place to publish to, and a way to look into it that does not go through figbridge."""

    @property
    def features(self) -> SinkFeatures:
        """What to expect."""

    def open(self) -> Sink:
        """The sink, on the same place each time."""

    def open_missing(self) -> Sink:
        """A sink whose destination is not there."""

    def read(self, count: int) -> list[bytes]:
        """Everything published so far, `count` events at least."""


class SinkSuite:
    """The tests."""

    @pytest.fixture
    def harness(self) -> SinkHarness:
        raise NotImplementedError

    @pytest.fixture
    def sink(self, harness: SinkHarness) -> Iterator[Sink]:
        sink = harness.open()
        sink.check()
        yield sink
        sink.close()

    @pytest.mark.parametrize("detail", ODD_DETAILS.values(), ids=ODD_DETAILS)
    def test_what_is_published_is_read_back(self, harness: SinkHarness, sink: Sink, detail: bytes) -> None:
        odd = '"\\\n' if harness.features.quoting else ""
        sent = event(7, detail=detail, source=f"legacy.żółw{odd}", detail_type=f"orders.🌳{odd}")

        assert not sink.publish([sent])

        (got,) = harness.read(1)
        if harness.features.exact:
            assert got == sent.envelope()
        assert _values(got) == _values(sent.envelope())

    def test_a_request_as_large_as_the_limits_allow_is_taken(self, harness: SinkHarness, sink: Sink) -> None:
        limits = sink.limits
        count = limits.entries
        room = min(limits.batch_bytes, harness.features.most) // count
        sent = []
        for n in range(count):
            filler = room - sink.size(event(n, detail=b'{"id":"%b","n":1,"fill":""}', key=f"k{n}"))
            text = "ż" * (filler // 2) + "x" * (filler % 2)  # two bytes a letter: a limit of bytes, not of letters
            sent.append(event(n, detail=b'{"id":"%%b","n":1,"fill":"%b"}' % text.encode(), key=f"k{n}"))
        assert sum(sink.size(it) for it in sent) == room * count

        assert not sink.publish(sent)

        assert len(harness.read(count)) == count

    def test_size_counts_bytes_not_letters(self, sink: Sink) -> None:
        plain = event(1, detail=b'{"id":"%b","v":"aaaa"}')
        wide = event(1, detail='{"id":"%b","v":"🌳🌳🌳🌳"}'.encode())

        assert sink.size(wide) - sink.size(plain) == 4 * 3

    def test_an_event_published_twice_is_harmless(self, harness: SinkHarness, sink: Sink) -> None:
        for _ in range(2):
            for n in (1, 2):
                assert not sink.publish([event(n)])

        got = harness.read(2 if harness.features.unique else 4)
        assert {number(it) for it in got} == {1, 2}
        assert len(got) == (2 if harness.features.unique else 4)

    def test_events_of_one_key_keep_their_order(self, harness: SinkHarness, sink: Sink) -> None:
        # one request each where a request may be taken in part: as the publisher does
        numbers = list(range(12))
        if sink.limits.partial:
            for n in numbers:
                assert not sink.publish([event(n)])
        else:
            assert not sink.publish([event(n) for n in numbers])

        got = [number(it) for it in harness.read(len(numbers))]
        if harness.features.ordered:
            assert got == numbers
        assert sorted(got) == numbers

    def test_a_sink_opened_again_goes_on_where_it_was(self, harness: SinkHarness) -> None:
        for n in (1, 2):
            sink = harness.open()
            sink.check()
            assert not sink.publish([event(n)])
            sink.close()

        assert sorted(number(it) for it in harness.read(2)) == [1, 2]

    def test_publishing_nothing_publishes_nothing(self, harness: SinkHarness, sink: Sink) -> None:
        assert not sink.publish([])
        assert not sink.publish([event(1)])

        assert len(harness.read(1)) == 1

    def test_close_may_be_called_twice_and_before_anything(self, harness: SinkHarness) -> None:
        sink = harness.open()
        sink.close()
        sink.close()

    def test_a_missing_destination_is_refused_with_a_remedy(self, harness: SinkHarness) -> None:
        sink = harness.open_missing()
        try:
            with pytest.raises(SinkRefused) as caught:
                sink.check()
        finally:
            sink.close()
        assert caught.value.hint

    def test_its_name_and_limits_are_usable(self, sink: Sink) -> None:
        assert sink.name.isidentifier()
        assert sink.limits.entries >= 1
        assert sink.limits.entry_bytes > 0
        assert sink.limits.batch_bytes > 0
        assert sink.limits.in_flight >= 1

    def test_its_capabilities_are_what_the_service_does(self, harness: SinkHarness, sink: Sink) -> None:
        assert sink.limits.ordered >= harness.features.ordered
        assert (sink.limits.dedup > 0) == harness.features.unique


def _values(envelope: bytes) -> Any:
    document = json.loads(envelope)
    return {name: document[name] for name in ("source", "detail-type", "detail")}
