"""How long a replication connection may be silent, on real servers: while it is opened, and while it streams."""

import time
from collections.abc import Iterator

import pytest
from psycopg import conninfo

from figbridge import legacy
from figbridge.change import Lsn
from figbridge.errors import LegacyUnavailable, SlotInUse, SourceDisconnected
from figbridge.forward.liveness import SENDER
from figbridge.forward.source import KEEPALIVE, ReplicationSource, read_keepalive
from fixtures.clock import PATIENCE, Stopwatch, until
from fixtures.postgres import Database
from fixtures.proxy import Proxy

HOLDER = "SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s"


def source_of(database: Database, dsn: str = "") -> ReplicationSource:
    return ReplicationSource(dsn or database.dsn, database.slot, ("pub",))


def prepare(database: Database) -> None:
    database.execute("CREATE TABLE thing (id int PRIMARY KEY); CREATE PUBLICATION pub FOR TABLE thing")
    database.create_slot()


@pytest.fixture
def proxy(database: Database) -> Iterator[Proxy]:
    prepare(database)
    parts = conninfo.conninfo_to_dict(database.dsn)
    with Proxy((str(parts["host"]), int(parts["port"] or 5432))) as made:
        yield made


def test_a_client_that_says_nothing_loses_the_slot_and_has_more_time_then(each_database: Database) -> None:
    prepare(each_database)
    source = source_of(each_database)
    try:
        source.connect(Lsn(0))
        watch = Stopwatch()
        until(lambda: each_database.execute(HOLDER, [each_database.slot]) == [(None,)])
        assert watch.elapsed > SENDER - 1
        assert watch.unhindered < SENDER + 3
        with pytest.raises(
            SourceDisconnected, match=r"this process said nothing for \d+\.\d s, and its wal_sender_timeout is 5 s"
        ):
            drain(source)
        source.connect(Lsn(0))
        assert source.sender_timeout == 2 * SENDER
        until(lambda: connects(source, Lsn(1)))  # it got on
        assert source.sender_timeout == SENDER
    finally:
        source.close()


def connects(source: ReplicationSource, start: Lsn) -> bool:
    """Whether the slot was free: the walsender of a connection that was closed is there for a moment longer."""
    try:
        source.connect(start)
    except SlotInUse:
        return False
    return True


def drain(source: ReplicationSource) -> None:
    """Read until the end of the stream."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        source.wait(0.1, reading=True)
        source.receive()


@pytest.mark.parametrize("where", ["database", "role", "dsn"])
def test_a_timeout_that_was_chosen_stays(database: Database, where: str) -> None:
    prepare(database)
    dsn = database.dsn
    if where == "database":
        database.execute(f"ALTER DATABASE {database.name} SET wal_sender_timeout = '7s'")
    elif where == "role":
        database.execute(
            "CREATE ROLE patient LOGIN SUPERUSER REPLICATION; ALTER ROLE patient SET wal_sender_timeout = 7000"
        )
        dsn = conninfo.make_conninfo(dsn, user="patient")
    else:
        dsn = conninfo.make_conninfo(dsn, options="-c wal_sender_timeout=7s")
    source = source_of(database, dsn)
    try:
        source.connect(Lsn(0))
        assert source.sender_timeout == 7
    finally:
        source.close()
        if where == "role":
            database.execute("DROP ROLE patient")


def test_an_idle_server_is_asked_and_answers(database: Database) -> None:
    """All it sent is acknowledged and nothing is written: only an answer that we asked for can break the silence."""
    prepare(database)
    source = source_of(database, conninfo.make_conninfo(database.dsn, options="-c wal_sender_timeout=2s"))
    try:
        source.connect(Lsn(0))
        deadline, end = time.monotonic() + 5, Lsn(0)
        while time.monotonic() < deadline:
            source.wait(0.25, reading=True)
            end = max([end, *(read_keepalive(it)[0] for it in source.receive() if it[0] == KEEPALIVE)])
            source.send_status(written=end, flushed=end)
    finally:
        source.close()


@pytest.mark.parametrize("share", [0.01, 0.5, 0.8, 0.9])  # behind that a first keepalive may count
def test_a_server_that_falls_silent_while_a_connection_is_opened(
    database: Database, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """After a share of the bytes: before it lets us in, at IDENTIFY_SYSTEM, before the stream begins."""
    monkeypatch.setattr(legacy, "BRIEF", 0.5)
    dsn = conninfo.make_conninfo(database.dsn, host=proxy.host, port=proxy.port, connect_timeout="2")
    source = source_of(database, dsn)
    try:
        source.connect(Lsn(0))
        whole = proxy.passed
        source.disconnect()
        until(lambda: database.execute(HOLDER, [database.slot]) == [(None,)], 10)
        proxy.after(int(whole * share), proxy.stall)
        watch = Stopwatch()
        with pytest.raises(LegacyUnavailable):
            source.connect(Lsn(0))
        assert watch.unhindered < 4
        proxy.resume()
        until(lambda: connected(source), 10)
    finally:
        source.close()


def connected(source: ReplicationSource) -> bool:
    """False while the walsender of the attempt that was given up still has the slot."""
    try:
        source.connect(Lsn(0))
    except SlotInUse:
        return False
    return True
