"""A slot that is lost in the middle of a large transaction, while the sink takes nothing and nothing more is read."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import psycopg
import pytest

from figbridge import provision
from figbridge.change import Lsn
from figbridge.demo.postgres import EmbeddedPostgres, installations
from figbridge.forward import guarded
from figbridge.forward.guard import SlotGuard
from figbridge.forward.guarded import GuardedSource
from figbridge.forward.source import ReplicationSource
from figbridge.forward.watch import SlotWatch
from figbridge.preflight import stream
from fixtures.checked import config_of
from fixtures.clock import until
from fixtures.forward import Forward
from fixtures.postgres import Database

# a segment of WAL, as a busy server fills it
SEGMENT = "SELECT pg_logical_emit_message(false, 'noise', 'x'), pg_switch_wal()"
ROWS = 4000  # of 5 kB: more than the sockets hold
STUCK = (
    "SELECT wait_event = 'WalSenderWriteData' FROM pg_stat_activity a JOIN pg_replication_slots s "
    "ON s.active_pid = a.pid WHERE s.slot_name = %s"
)


class Recreating(Forward):
    """The forward path with forward.on-slot-loss: recreate-and-backfill, and the loop that reads tables."""

    def __init__(self, database: Database) -> None:
        sections = {"sink": {"type": "stdout"}, "on-slot-loss": "recreate-and-backfill"}
        config = config_of(database.dsn, "public.thing", slot=database.slot, forward=sections)
        provision.initialise(config)
        self._recreate = partial(provision.recreate, config)
        self.guard = SlotGuard(database.dsn, database.slot, table=True)
        super().__init__(database, "figbridge", buffer_bytes=1 << 20, snapshot=())
        assert isinstance(self.source, GuardedSource)
        published = {"figbridge": ([("public", "thing")], stream.PUBLISHED)}
        self._loops.append(SlotWatch(self.guard, self.source, published, self.metrics, every=0.3))

    def make_source(self, dsn: str, publications: tuple[str, ...]) -> ReplicationSource:
        return GuardedSource(dsn, self.database.slot, publications, self.guard, recreate=self._recreate)


@contextmanager
def nobody_recreates(database: Database) -> Iterator[None]:
    """Another replica seems to do it: what is missing meanwhile is missing for good."""
    with database.connect() as other:
        other.execute("SELECT pg_advisory_lock(hashtext('figbridge ' || %s))", [database.slot])
        yield


def _lost(database: Database) -> bool:
    database.execute(SEGMENT)
    database.execute("CHECKPOINT")
    query = "SELECT wal_status FROM pg_replication_slots WHERE slot_name = %s"
    return database.execute(query, [database.slot]) == [("lost",)]


def _dropped(database: Database) -> bool:
    with database.connect() as connection:
        connection.execute(
            "SELECT pg_terminate_backend(active_pid, 5000) FROM pg_replication_slots WHERE slot_name = %s",
            [database.slot],
        )
        with contextlib.suppress(psycopg.errors.ObjectInUse):
            connection.execute("SELECT pg_drop_replication_slot(%s)", [database.slot])
            return True
    return False


def consumer(details: list[dict[str, Any]]) -> set[int]:
    """The rows that a consumer holds that takes events in order, and drops those that docs/slot-loss.md tells it to."""
    held: dict[int, int] = {}
    for detail in details:
        if detail["op"] == "backfill.finished":
            held = {key: told for key, told in held.items() if told > Lsn.parse(detail["since"])}
        elif detail["op"] == "delete":
            held.pop(detail["key"]["id"], None)
        elif detail["key"]:
            held[detail["key"]["id"]] = Lsn.parse(detail["position"]["commit_lsn"])
    return set(held)


@pytest.mark.parametrize(("version", "how"), [(14, "removed"), (18, "removed"), (18, "dropped")])
def test_consumers_end_with_the_rows_of_the_table_and_no_checkpoint_waits(
    version: int, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarded, "_UNREAD", 1.0)
    if version not in installations():
        pytest.skip(f"no PostgreSQL {version} here")
    with EmbeddedPostgres(version, {"max_slot_wal_keep_size": "64MB", "wal_keep_size": "0"}) as server:
        database = Database(server, "postgres")
        database.execute("CREATE TABLE thing (id int PRIMARY KEY, v text); INSERT INTO thing VALUES (0, 'old')")
        with Recreating(database) as forward:
            forward.until_streaming()
            forward.sink.open.clear()
            database.execute(f"INSERT INTO thing SELECT n, repeat('x', 5000) FROM generate_series(1, {ROWS}) n")
            until(lambda: forward.buffer.full and database.execute(STUCK, [database.slot]) == [(True,)])
            with nobody_recreates(database):
                until(partial(_dropped if how == "dropped" else _lost, database), missing=lambda: str(forward.failure))
                database.execute("DELETE FROM thing WHERE id % 2 = 1; INSERT INTO thing VALUES (-1, 'new')")
            forward.sink.open.set()
            states = "SELECT state FROM figbridge.snapshot"
            until(lambda: database.execute(states) == [("done",)], missing=lambda: str(forward.failure))
            database.execute("INSERT INTO thing VALUES (-2, 'newer')")
            until(lambda: consumer(forward.sink.details) >= {-2})
        assert forward.failure is None
        told = [detail["key"]["id"] for detail in forward.sink.details if detail["op"] == "insert"]
        part = [key for key in told if key > 0]
        assert 0 < len(part) < ROWS, "it was not lost in the middle of the transaction"
        assert part == list(range(1, len(part) + 1))
        assert consumer(forward.sink.details) == {key for (key,) in database.execute("SELECT id FROM thing")}
