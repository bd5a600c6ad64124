"""Each finding about the server and the role; most need a server of their own with the wrong settings."""

import contextlib
import socket
import threading
from collections.abc import Iterator

import psycopg
import pytest
from psycopg import conninfo

from figbridge import provision
from figbridge.demo.postgres import EmbeddedPostgres, installations
from figbridge.errors import LegacyUnavailable
from figbridge.preflight import Finding, server
from fixtures.checked import Found, config_of, inspected, mapping, role, walsender
from fixtures.clock import until
from fixtures.postgres import Database

SHOP = "CREATE SCHEMA shop; CREATE TABLE shop.orders (id int PRIMARY KEY, status text)"


def said(found: Found, level: str, part: str) -> Finding:
    """The one finding of that level about the server that says `part`."""
    (finding,) = [it for it in found if (it.level, it.where) == (level, "server") and part in it.what]
    return finding


def server_of(version: int | None = None, **settings: str) -> EmbeddedPostgres:
    if version is not None and version not in installations():
        pytest.skip(f"no PostgreSQL {version} here")
    return EmbeddedPostgres(version, settings)


@pytest.fixture
def shop(database: Database) -> Database:
    database.execute(SHOP)
    return database


def test_a_server_as_it_should_be(each_database: Database) -> None:
    each_database.execute(SHOP)
    found = inspected(config_of(each_database.dsn))
    for part in (f"PostgreSQL {each_database.version}.", "is the primary", "encoding UTF8", "wal_level is logical"):
        assert said(found, "ok", part)
    assert said(found, "ok", "wal_sender_timeout is 1min")
    assert "may open a replication connection" in found.only("ok", "role postgres").what
    # the tests' server has PostgreSQL's own default, and that is worth a word
    assert "until the disk is full" in said(found, "warning", "max_slot_wal_keep_size is -1").what


def test_versions() -> None:
    assert server.version(130023).level == "error"
    assert server.version(140000).level == "ok"


def test_a_server_that_was_set_up_for_something_else() -> None:
    """All of it in one go; and everything that is wrong is said at once."""
    with server_of(
        wal_level="replica",
        max_replication_slots="1",
        max_wal_senders="1",
        wal_sender_timeout="0",
        max_slot_wal_keep_size="1GB",
    ) as one:
        with psycopg.connect(one.dsn(), autocommit=True) as admin:
            admin.execute(SHOP)
            admin.execute("SELECT pg_create_physical_replication_slot('theirs')")
        with walsender(one.dsn()):
            found = inspected(config_of(one.dsn()))
    assert "rds.logical_replication = 1" in said(found, "error", "wal_level is replica").remedy
    assert "max_replication_slots = 6" in said(found, "error", "all 1 replication slots are taken").remedy
    assert "max_wal_senders = 6" in said(found, "error", "all 1 walsenders are busy").remedy
    assert "no replication connection" in found.only("error", "role postgres").what
    assert said(found, "ok", "wal_sender_timeout is 0; in the bridge's session at most 5s")
    assert said(found, "ok", "a slot keeps at most 1GB of WAL")
    assert found.only("ok", "table shop.orders")


@pytest.mark.parametrize(("value", "after"), [("0", "until TCP gives up"), ("1min", "for 60 s")])
def test_a_timeout_that_was_chosen_for_us_and_delays_a_take_over(shop: Database, value: str, after: str) -> None:
    shop.execute(f"ALTER DATABASE {shop.name} SET wal_sender_timeout = '{value}'")
    finding = said(inspected(config_of(shop.dsn)), "warning", f"wal_sender_timeout is {value}")
    assert after in finding.what
    assert "RESET wal_sender_timeout" in finding.remedy


def test_a_forward_path_that_is_not_there_needs_no_logical_wal() -> None:
    with server_of(wal_level="replica") as one:
        with psycopg.connect(one.dsn(), autocommit=True) as admin:
            admin.execute(SHOP)
        config = config_of(one.dsn(), forward=None, mappings=[mapping("shop.orders", "delete", ["id"])])
        assert inspected(config).errors == []
        provision.initialise(config)
        assert inspected(config, "run").errors == []


@pytest.mark.parametrize("version", [15, 16, 18])
def test_a_slot_that_is_about_to_be_lost_and_one_that_is(version: int) -> None:
    since_18 = {"idle_replication_slot_timeout": "1h"} if version >= 18 else {}
    with server_of(version, max_slot_wal_keep_size="1MB", **since_18) as one:
        config = config_of(one.dsn())
        with psycopg.connect(one.dsn(), autocommit=True) as admin:
            admin.execute(SHOP)
            provision.initialise(config)
            if since_18:
                assert said(inspected(config, "run"), "warning", "idle_replication_slot_timeout is 1h")

            def write_wal() -> None:
                admin.execute("SELECT pg_logical_emit_message(false, 'x', 'x'), pg_switch_wal()")

            def status() -> str:
                write_wal()
                row = admin.execute("SELECT wal_status FROM pg_replication_slots").fetchone()
                return str(row and row[0])

            until(lambda: status() == "unreserved")
            found = inspected(config, "run")
            assert "will be lost at the next checkpoint" in found.only("warning", "slot figbridge").what
            assert found.errors == []  # to stop now would make it certain
            admin.execute("CHECKPOINT")
            finding = inspected(config, "run").only("error", "slot figbridge")
            assert finding.what.startswith(f"is lost ({'wal_removed' if version >= 17 else 'its WAL was removed'})")
            admin.execute(finding.remedy.partition(";")[0])
            provision.initialise(config)
            assert inspected(config, "run").errors == []


def test_a_standby() -> None:
    with server_of() as one:
        with psycopg.connect(one.dsn(), autocommit=True) as admin:
            admin.execute(SHOP)
        one.stop()
        (one._data / "standby.signal").touch()
        one.start()
        found = inspected(config_of(one.dsn()))
        assert "target_session_attrs=primary" in said(found, "error", "this is a standby").remedy
        assert found.errors == ["server"]


def test_an_encoding_that_is_none(shop: Database) -> None:
    name = f"{shop.name}_ascii"
    shop.execute(f"CREATE DATABASE {name} ENCODING 'SQL_ASCII' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'")
    try:
        dsn = conninfo.make_conninfo(shop.dsn, dbname=name)
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(SHOP)
        found = inspected(config_of(dsn))
        assert said(found, "error", "encoding is SQL_ASCII")
        assert found.only("ok", "table shop.orders")
    finally:
        shop.execute(f"DROP DATABASE {name}")


def test_a_role_without_replication(each_database: Database) -> None:
    each_database.execute(SHOP)
    provision.initialise(config_of(each_database.dsn, slot=each_database.slot))
    with role(each_database, "LOGIN") as (name, dsn):
        config = config_of(dsn, slot=each_database.slot)
        finding = inspected(config, "run").only("error", f"role {name}")
        assert "no replication connection" in finding.what
        assert finding.remedy.startswith(f'ALTER ROLE "{name}" WITH REPLICATION;')
        each_database.execute(finding.remedy.partition("(")[0])
        assert inspected(config, "run").errors == []


def test_a_role_without_replication_on_rds(shop: Database) -> None:
    with role(shop, "LOGIN") as (name, dsn):
        shop.execute("CREATE ROLE rds_replication")
        try:
            finding = inspected(config_of(dsn, slot=shop.slot), "run").only("error", f"role {name}")
            assert finding.remedy == f'GRANT rds_replication TO "{name}";'
            shop.execute(finding.remedy)
            # this server knows nothing of RDS and still refuses; by now it cannot be for want of that grant
            finding = inspected(config_of(dsn, slot=shop.slot), "run").only("error", f"role {name}")
            assert finding.remedy.startswith("the role may replicate, so")
        finally:
            shop.execute("DROP ROLE rds_replication")


class Pooler:
    """As PgBouncer before 1.23: passes everything on, but refuses a connection that asks for replication."""

    def __init__(self, port: int) -> None:
        self._upstream = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                threading.Thread(target=self._serve, args=(self._listener.accept()[0],), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        startup = client.recv(4096)
        if b"replication\0" in startup:
            fields = b"SFATAL\0C08P01\0Munsupported startup parameter: replication\0\0"
            client.sendall(b"E" + (len(fields) + 4).to_bytes(4, "big") + fields)
            client.close()
            return
        upstream = socket.create_connection(("127.0.0.1", self._upstream))
        upstream.sendall(startup)
        threading.Thread(target=self._copy, args=(upstream, client), daemon=True).start()
        self._copy(client, upstream)

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError), source, target:
            while data := source.recv(65536):
                target.sendall(data)


@pytest.fixture
def pooled(shop: Database) -> Iterator[str]:
    with shop.connect() as connection:
        pooler = Pooler(connection.info.port)
    yield conninfo.make_conninfo(shop.dsn, host="127.0.0.1", port=pooler.port, sslmode="disable", gssencmode="disable")
    pooler.close()


def test_a_pooler_in_between(pooled: str) -> None:
    finding = inspected(config_of(pooled)).only("error", "role postgres")
    assert "unsupported startup parameter: replication" in finding.what
    assert "not a pooler" in finding.remedy


def test_transactions_that_stay_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_LONG_TRANSACTION", 0.0)
    with server_of(max_prepared_transactions="1") as one:
        with psycopg.connect(one.dsn(), autocommit=True) as admin:
            admin.execute(SHOP)
            admin.execute("BEGIN; INSERT INTO shop.orders VALUES (1, 'a'); PREPARE TRANSACTION 'forgotten'")
        with psycopg.connect(one.dsn(), application_name="nightly batch") as batch:
            batch.execute("INSERT INTO shop.orders VALUES (2, 'a')")
            pid = batch.info.backend_pid
            found = inspected(config_of(one.dsn()))
        assert f"(pid {pid}, nightly batch, postgres)" in said(found, "warning", "nightly batch").what
        assert "(prepared transaction forgotten, postgres)" in said(found, "warning", "forgotten").what


def test_transactions_that_have_just_begun_are_not_worth_a_word(shop: Database) -> None:
    with shop.connect() as batch, batch.transaction():
        batch.execute("INSERT INTO shop.orders VALUES (2, 'a')")
        found = inspected(config_of(shop.dsn))
    assert not [it for it in found if "a transaction is open" in it.what]


def test_no_server_is_not_a_finding() -> None:
    with pytest.raises(LegacyUnavailable):
        inspected(config_of("host=127.0.0.1 port=1 dbname=none"))
