"""A snapshot beside a stream that is behind, and before a sink that is: it is never ahead of either."""

import threading
from typing import Any

import pytest

from figbridge.change import Lsn
from figbridge.forward.checkpoint import Checkpoint
from figbridge.forward.snapshot import chunk
from figbridge.forward.snapshot.loop import Snapshot
from figbridge.forward.snapshot.window import Window
from fixtures.clock import until
from fixtures.forward import Forward, HeldSink
from fixtures.postgres import Database
from fixtures.snapshot import finished, prepare, states

THING = ("public", "thing")
ROWS = 9000


@pytest.fixture
def prepared(database: Database) -> Database:
    prepare(database, "CREATE TABLE thing (id int PRIMARY KEY)", "thing")
    database.execute("INSERT INTO thing SELECT generate_series(1, %s)", [ROWS])
    database.execute("SELECT pg_replication_slot_advance(%s, pg_current_wal_lsn())", [database.slot])
    return database


def closed() -> HeldSink:
    sink = HeldSink()
    sink.open.clear()
    return sink


def ids(forward: Forward) -> list[int]:
    return sorted(it["after"]["id"] for it in forward.sink.details if it["op"] == "read")


def test_nothing_is_read_before_the_stream_is_where_the_snapshot_began(prepared: Database) -> None:
    """The stream has a backlog which fills the buffer, so that the low watermark is not met."""
    backlog = 50
    with prepared.connect() as application:
        for number in range(1, backlog + 1):
            application.execute("INSERT INTO thing VALUES (%s)", [-number])
    sink, waits, told = closed(), threading.Event(), list[int]()

    class Watched(Snapshot):
        def _until(self, event: threading.Event, window: Window) -> None:
            if event is window.low_met:
                waits.set()
            super()._until(event, window)

        def _read(self, *about: Any) -> chunk.Chunk | str:
            told.append(len(sink.events))
            return super()._read(*about)

    with Forward(prepared, snapshot=[THING], sink=sink, loop=Watched, buffer_bytes=1) as forward:
        until(lambda: waits.is_set() or told, 20, lambda: f"{states(prepared)}")
        assert not told
        sink.open.set()
        finished(forward, "thing")
        assert told[0] >= backlog // 2, "what fits into the buffer may be on its way"
        assert ids(forward) == [*range(-backlog, 0), *range(1, ROWS + 1)]


def test_one_chunk_is_read_ahead_of_the_sink_and_no_other(prepared: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop asks again and again whether the chunk before is durable."""
    sink, reads, asked = closed(), list[int](), list[Lsn]()
    flushed = vars(Checkpoint)["flushed"].fget
    monkeypatch.setattr(chunk, "MOST_BYTES", 10_000)

    class Watched(Snapshot):
        def _read(self, *about: Any) -> chunk.Chunk | str:
            reads.append(len(sink.events))
            return super()._read(*about)

    def noted(checkpoint: Checkpoint) -> Lsn:
        found: Lsn = flushed(checkpoint)
        if threading.current_thread().name == "snapshot-1":
            asked.append(found)
        return found

    monkeypatch.setattr(Checkpoint, "flushed", property(noted))
    with Forward(prepared, snapshot=[THING], sink=sink, loop=Watched) as forward:
        until(lambda: len(asked) > 100 or len(reads) > 2, 20, lambda: f"{reads} {forward.failure}")
        assert reads == [0, 0]
        sink.open.set()
        finished(forward, "thing")
        assert ids(forward) == [*range(1, ROWS + 1)]
        assert len(reads) > 3
    for before, told in zip(reads, reads[2:], strict=False):
        assert told > before, "the chunk before the one before it had left"
