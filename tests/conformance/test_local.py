"""The embedded bus: both suites, and what several processes do to one file."""

import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from conformance.events import event, number
from conformance.sink_suite import SinkFeatures, SinkHarness, SinkSuite
from conformance.source_suite import SourceFeatures, SourceHarness, SourceSuite, drain, take
from figbridge.errors import BridgeError, QueueError, QueueUnavailable, SinkRefused, SinkUnavailable
from figbridge.transports import busfile
from figbridge.transports.local import LocalSink, LocalSource

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}


@dataclass
class LocalSinkHarness:
    directory: Path
    features: ClassVar[SinkFeatures] = SinkFeatures(exact=True, ordered=True, unique=True)

    def open(self) -> LocalSink:
        return LocalSink(self.directory / "bus.sqlite")

    def open_missing(self) -> LocalSink:
        return LocalSink(self.directory / "no such directory" / "bus.sqlite")

    def read(self, count: int) -> list[bytes]:
        with closing(sqlite3.connect(self.directory / "bus.sqlite")) as connection:
            bodies = [body for (body,) in connection.execute("SELECT body FROM event ORDER BY seq")]
        assert len(bodies) >= count
        return bodies


class TestLocalSink(SinkSuite):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> SinkHarness:
        return LocalSinkHarness(tmp_path)


@dataclass
class LocalSourceHarness:
    directory: Path
    features: ClassVar[SourceFeatures] = SourceFeatures(any_bytes=True, patience=1.0)
    put_so_far: int = 0

    def open(self) -> LocalSource:
        return LocalSource(self.directory / "bus.sqlite", subscriber="suite")

    def open_missing(self) -> LocalSource:
        return LocalSource(self.directory / "no such directory" / "bus.sqlite", subscriber="suite")

    def put(self, bodies: Sequence[bytes]) -> None:
        with closing(sqlite3.connect(self.directory / "bus.sqlite")) as connection, connection:
            for body in bodies:
                self.put_so_far += 1
                connection.execute(
                    "INSERT INTO event (source, id, body) VALUES ('test', ?, ?)", [str(self.put_so_far), body]
                )


class TestLocalSource(SourceSuite):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> SourceHarness:
        return LocalSourceHarness(tmp_path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bus %41?#ü.sqlite"  # a name that a careless URI would misread


@pytest.fixture
def sink(path: Path) -> Iterator[LocalSink]:
    with closing(LocalSink(path)) as sink:
        sink.check()
        yield sink


@contextmanager
def subscribed(path: Path, name: str = "reader", sources: Sequence[str] | None = None) -> Iterator[LocalSource]:
    with closing(LocalSource(path, subscriber=name, sources=sources)) as source:
        source.check()
        yield source


def numbers(bodies: Sequence[bytes]) -> list[int]:
    return [number(body) for body in bodies]


def test_each_subscriber_gets_everything_from_the_beginning(sink: LocalSink, path: Path) -> None:
    sink.publish([event(n) for n in range(3)])
    for name in ("one", "two"):
        with subscribed(path, name) as source:
            assert numbers(drain(source, 3)) == [0, 1, 2]


def test_more_than_a_batch_is_delivered_in_order(sink: LocalSink, path: Path) -> None:
    sink.publish([event(n) for n in range(1_050)])
    with subscribed(path) as source:
        assert len(source.receive(wait=0)) == 500
    with subscribed(path) as source:
        assert numbers(drain(source, 1_050)) == list(range(1_050))
        assert not source.receive(wait=0)


def test_acknowledged_in_any_order_leaves_no_hole(sink: LocalSink, path: Path) -> None:
    sink.publish([event(n) for n in range(250)])
    with subscribed(path) as source:
        deliveries = take(source, 250)
        for delivery in reversed(deliveries):
            if number(delivery.body) % 50:
                delivery.ack()
    with subscribed(path) as source:
        left = take(source, 5)
        assert numbers([it.body for it in left]) == [0, 50, 100, 150, 200]
        for delivery in left:
            delivery.ack()
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM delivery").fetchone() == (0,)


def test_many_at_once_are_those_and_not_what_lies_between(sink: LocalSink, path: Path) -> None:
    sink.publish([event(n) for n in range(1, 8)])
    with subscribed(path) as source:
        first, second, third, *rest = take(source, 7)
        third.nack(delay=0.0)
        source.acknowledge([first, *rest[:2], rest[3]])  # not the second, the third, nor the one before the last
        assert numbers([it.body for it in source.receive(wait=0)]) == [3]
        source.acknowledge([second, rest[0]])  # one of them a second time
    with subscribed(path) as source:
        assert numbers([it.body for it in source.receive(wait=0)]) == [3, 6]
        assert source.receive(wait=0) == ()


def test_what_is_repeated_comes_before_what_is_new(sink: LocalSink, path: Path) -> None:
    sink.publish([event(n) for n in range(3)])
    with subscribed(path) as source:
        first, second, third = take(source, 3)
        sink.publish([event(3)])
        third.nack()
        first.nack()
        again = take(source, 3)
        assert [(number(it.body), it.attempts) for it in again] == [(0, 2), (2, 2), (3, 1)]
        second.ack()


def test_attempts_are_counted_on_after_a_restart(sink: LocalSink, path: Path) -> None:
    sink.publish([event(1)])
    for attempt in range(1, 5):
        with subscribed(path) as source:
            assert take(source, 1)[0].attempts == attempt


def test_a_delay_outlives_the_process(sink: LocalSink, path: Path) -> None:
    sink.publish([event(1)])
    with subscribed(path) as source:
        take(source, 1)[0].nack(delay=3600)
    with subscribed(path) as source:
        assert not source.receive(wait=0)


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (None, [0, 1, 2, 3, 4]),
        (("next.orders",), [1]),
        (("next.*",), [1, 2]),
        (("legacy", "next.stock"), [0, 2]),
        (("*",), [0, 1, 2, 3, 4]),
        (("50%_[a]*",), [3]),
        (("5*",), [3, 4]),
        (("NEXT.*", "nobody"), []),
    ],
)
def test_a_subscriber_may_choose_sources(
    sink: LocalSink, path: Path, sources: tuple[str, ...] | None, expected: list[int]
) -> None:
    names = ["legacy", "next.orders", "next.stock", "50%_[a]b", "50xya"]
    sink.publish([event(n, source=source) for n, source in enumerate(names)])

    with subscribed(path, sources=sources) as source:
        assert numbers([it.body for it in source.receive(wait=0)]) == expected
        assert not source.receive(wait=0)


def test_what_is_passed_over_is_not_read_again_and_again(sink: LocalSink, path: Path) -> None:
    sink.publish([event(n) for n in range(2_000)])
    with subscribed(path, sources=["nobody"]) as source:
        assert not source.receive(wait=0)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT frontier FROM subscriber").fetchone() == (2_000,)


def test_the_same_id_of_another_source_is_another_event(sink: LocalSink, path: Path) -> None:
    sink.publish([event(1), event(1, source="other")])
    with subscribed(path) as source:
        assert len(take(source, 2)) == 2


def test_a_repeated_event_keeps_its_place_and_its_settlement(sink: LocalSink, path: Path) -> None:
    sink.publish([event(n) for n in range(3)])
    with subscribed(path) as source:
        drain(source, 3)
        sink.publish([event(1), event(3)])
        assert numbers(drain(source, 1)) == [3]
        assert not source.receive(wait=0)


def test_prune_deletes_what_everybody_has_settled(sink: LocalSink, path: Path) -> None:
    sink.publish([event(n) for n in range(4)])
    assert sink.prune() == 0  # nobody has read anything, and somebody may come
    with subscribed(path, "slow") as slow, subscribed(path, "fast") as fast:
        drain(fast, 4)
        assert sink.prune() == 0
        deliveries = take(slow, 4)
        for delivery in deliveries[:1] + deliveries[2:]:
            delivery.ack()
        assert sink.prune() == 3
        deliveries[1].nack()
        assert numbers(drain(slow, 1)) == [1]
        sink.publish([event(4)])
        assert numbers(drain(fast, 1)) == numbers(drain(slow, 1)) == [4]


def test_another_process_is_heard_within_the_wait(sink: LocalSink, path: Path) -> None:
    with subscribed(path) as source:
        publisher = threading.Timer(0.3, lambda: sink.publish([event(1)]))
        publisher.start()
        start = time.monotonic()
        (delivery,) = source.receive(wait=30)
        assert time.monotonic() - start < 10
        assert number(delivery.body) == 1
        publisher.join()


def test_a_delay_that_ends_during_the_wait_ends_the_wait(sink: LocalSink, path: Path) -> None:
    sink.publish([event(1)])
    with subscribed(path) as source:
        start = time.monotonic()
        take(source, 1)[0].nack(delay=0.3)
        (delivery,) = source.receive(wait=30)
        assert 0.29 <= time.monotonic() - start < 10
        assert delivery.attempts == 2


def test_close_from_another_thread_ends_the_wait(path: Path) -> None:
    source = LocalSource(path, subscriber="reader")
    source.check()
    closer = threading.Timer(0.2, source.close)
    closer.start()
    start = time.monotonic()
    assert not source.receive(wait=30)
    assert time.monotonic() - start < 10
    closer.join()


def test_settling_after_close_says_that_it_will_come_again(sink: LocalSink, path: Path) -> None:
    sink.publish([event(1)])
    with subscribed(path) as source:
        (delivery,) = take(source, 1)
    with pytest.raises(QueueUnavailable):
        delivery.ack()


@pytest.mark.parametrize("content", [b"", b"not a database at all, whatever its name says" * 40, None])
def test_a_file_that_is_no_bus_is_refused_and_left_alone(path: Path, content: bytes | None) -> None:
    if content is None:
        with closing(sqlite3.connect(path)) as other, other:
            other.execute("CREATE TABLE theirs (a)")
        content = path.read_bytes()
    path.write_bytes(content)

    for transport, error in ((LocalSink(path), SinkRefused), (LocalSource(path, subscriber="x"), QueueError)):
        with closing(transport), pytest.raises(error) as caught:
            transport.check()
        assert caught.value.hint
        assert not caught.value.retryable
    assert path.read_bytes() == content


def test_a_locked_bus_is_unavailable_for_the_time_being(
    sink: LocalSink, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink.publish([event(1)])
    monkeypatch.setattr(busfile, "_PATIENCE", 0.05)
    with closing(LocalSink(path)) as blocked, subscribed(path) as source, closing(sqlite3.connect(path)) as other:
        source.check()
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(SinkUnavailable) as publishing:
            blocked.publish([event(2)])
        with pytest.raises(QueueUnavailable) as receiving:
            source.receive(wait=0)
        other.execute("ROLLBACK")

        for caught in (publishing, receiving):
            error: BridgeError = caught.value
            assert error.retryable
            assert error.hint
        blocked.publish([event(2)])
        assert numbers(drain(source, 2)) == [1, 2]


@pytest.mark.parametrize("removed", [False, True])
def test_a_bus_that_is_moved_away_is_noticed_and_one_is_begun_in_its_place(
    sink: LocalSink, path: Path, *, removed: bool
) -> None:
    sink.publish([event(0)])
    with subscribed(path) as source:
        (old,) = source.receive(wait=0)
        if removed:
            path.unlink()
        else:
            path.rename(path.with_name("elsewhere.sqlite"))
        with pytest.raises(SinkUnavailable, match="moved or removed"):
            sink.publish([event(1)])
        sink.publish([event(1)])  # as who has no answer does
        with pytest.raises(QueueUnavailable, match="moved or removed"):
            source.receive(wait=0)
        (new,) = source.receive(wait=0)
        assert number(new.body) == 1
        old.ack()  # it has the same number as the new one
        source.acknowledge([old])
    with subscribed(path) as source:
        assert numbers(drain(source, 1)) == [1]
    with subscribed(path, "another") as source:
        assert numbers(drain(source, 1)) == [1], "what the old one had not written back yet is not in the new one"


def test_a_bus_that_is_moved_away_while_it_is_written_to_has_confirmed_nothing(
    sink: LocalSink, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = busfile._begin

    def late(connection: sqlite3.Connection) -> None:
        begin(connection)
        path.rename(path.with_name("elsewhere.sqlite"))

    monkeypatch.setattr(busfile, "_begin", late)
    with pytest.raises(SinkUnavailable, match="moved or removed"):
        sink.publish([event(0)])
    monkeypatch.undo()
    sink.publish([event(0)])
    with subscribed(path) as source:
        assert numbers(drain(source, 1)) == [0]


def test_a_full_disk_is_unavailable_and_nothing_is_half_published(sink: LocalSink, path: Path) -> None:
    sink.publish([event(1)])
    many = [event(n, detail=b'{"id":"%%b","n":%d,"fill":"%b"}' % (n, b"x" * 4000)) for n in range(2, 300)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(SinkUnavailable) as caught:
            sink.publish(many)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.hint

    sink.publish(many)
    with subscribed(path) as source:
        assert numbers(drain(source, 299)) == list(range(1, 300))


_PUBLISHER = """
import sys
from pathlib import Path
from conformance.events import event
from figbridge.transports.local import LocalSink
sink = LocalSink(Path(sys.argv[1]))
sys.stdin.readline()  # all at once
sink.check()
for start in range(int(sys.argv[3]), int(sys.argv[4]), 5):
    sink.publish([event(n, source=sys.argv[2]) for n in range(start, start + 5)])
    print(start + 5, flush=True)  # acknowledged up to here
"""


def publisher(path: Path, source: str, start: int, end: int) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-c", _PUBLISHER, str(path), source, str(start), str(end)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=ENVIRONMENT,
    )


def test_processes_that_publish_at_once_lose_nothing_and_keep_their_order(path: Path) -> None:
    # three publishers that also race to make the file, and a subscriber that reads while they write
    names = ["a", "b", "c"]
    processes = [publisher(path, name, 0, 300) for name in names]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()

    with subscribed(path) as source:
        documents = [json.loads(body) for body in drain(source, 900)]
        for process in processes:
            process.communicate(timeout=120)
            assert process.returncode == 0
        assert not source.receive(wait=0)
    for name in names:
        assert [it["detail"]["n"] for it in documents if it["source"] == name] == list(range(300))
    assert not list(path.parent.glob(".*"))  # no draft is left over


def test_kill_9_of_a_publisher_keeps_what_it_acknowledged(path: Path) -> None:
    acknowledged = 0
    with closing(LocalSink(path)) as sink:
        sink.check()
        for kill in range(5):
            with publisher(path, "a", acknowledged, 1_000_000) as process:
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(b"\n")
                process.stdin.flush()
                for _ in range(3 + 7 * kill):
                    acknowledged = int(process.stdout.readline())
                process.send_signal(signal.SIGKILL)
                for line in process.stdout.readlines():
                    acknowledged = int(line) if line.endswith(b"\n") else acknowledged
        with subscribed(path) as source:
            got: list[bytes] = []
            while batch := source.receive(wait=0):
                got += [delivery.body for delivery in batch]
        assert len(got) in {acknowledged, acknowledged + 5}  # the last group may be there and not reported
        assert numbers(got) == list(range(len(got)))


_CONSUMER = """
import sys
from pathlib import Path
from figbridge.transports.local import LocalSource
source = LocalSource(Path(sys.argv[1]), subscriber="reader")
while True:
    for delivery in source.receive(wait=1):
        print(delivery.body.decode(), flush=True)
        delivery.ack()
"""


def test_kill_9_of_a_subscriber_repeats_at_most_what_it_held(sink: LocalSink, path: Path) -> None:
    # more than the consumer can print ahead of us: a pipe holds 64 KiB, some hundred lines, in each round
    total = 4000
    sink.publish([event(n) for n in range(total)])
    seen: list[int] = []
    for kill in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", _CONSUMER, str(path)], stdout=subprocess.PIPE, env=ENVIRONMENT
        ) as process:
            assert process.stdout is not None
            seen += [number(process.stdout.readline()) for _ in range(20 + 31 * kill)]
            process.send_signal(signal.SIGKILL)
            seen += [number(line) for line in process.stdout.readlines() if line.endswith(b"\n")]
    with subscribed(path) as source:
        deliveries = [it for _ in range(total // 100 + 1) for it in source.receive(wait=0)]

    # each kill repeats the one that was printed and not yet acknowledged, at most
    assert set(seen) | {number(it.body) for it in deliveries} == set(range(total))
    assert len(seen) - len(set(seen)) <= 4
