"""The real bridge on a connection that fails in every way we know; the file it wrote is held against the ledger.

After each fault: every committed row is there, in order per key, under one id, and what came twice came the same.
How long each recovery took is printed; docs/faults.md has the figures.
"""

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from psycopg import conninfo

from figbridge import provision
from figbridge.config import Config
from figbridge.demo.port import HeldPort
from figbridge.demo.postgres import EmbeddedPostgres
from fixtures import workload
from fixtures.bridge import Bridge
from fixtures.checked import mapping
from fixtures.clock import until
from fixtures.postgres import Database
from fixtures.proxy import Direction, Proxy
from fixtures.workload import Writers, change

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

CUT = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = %s AND active_pid > 0"


@dataclass
class Run:
    """A bridge that works, its database, and the file it writes."""

    database: Database
    bridge: Bridge
    events: Path

    def until_published(self, key: int, timeout: float) -> float:
        """Commit one more version of `key`; the seconds until it is in the file."""
        with self.database.connect(connect_timeout=5) as connection:
            change(connection, [key])
            ((version,),) = connection.execute("SELECT version FROM shop.account WHERE id = %s", [key]).fetchall()
        needle = f'"after":{{"id":{key},"version":{version},'.encode()
        began = time.monotonic()
        until(lambda: needle in self.events.read_bytes(), timeout, lambda: f"{needle!r}\n{self.bridge.log[-3000:]}")
        return time.monotonic() - began

    def finish(self, *, repeats: bool = False) -> None:
        """Drain, stop softly, and compare. With `repeats` some event must have come twice."""
        workload.until_drained(self.database.dsn, self.database.slot, [self.bridge])
        assert self.bridge.terminate() == 0, self.bridge.log[-3000:]
        repeated = workload.prove(self.database.dsn, self.events.read_bytes().splitlines())
        assert repeated or not repeats, "nothing came twice: the fault hit nothing"


@contextlib.contextmanager
def running(
    database: Database, directory: Path, *, dsn: str = "", prefix: Sequence[str] = (), ready: bool = True
) -> Iterator[Run]:
    """A bridge on `database`, by `dsn` if its way leads through something."""
    database.execute(workload.SCHEMA)
    config = workload.configured(directory, database.slot, init={"LEGACY_DSN": database.dsn})
    environment = {"LEGACY_DSN": dsn or database.dsn}
    with Bridge(config, directory / "bridge.log", environment=environment, prefix=prefix) as bridge:
        if ready:
            bridge.until_ready()
        yield Run(database, bridge, directory / "events.jsonl")


@pytest.fixture
def proxy(database: Database) -> Iterator[Proxy]:
    parts = conninfo.conninfo_to_dict(database.dsn)
    with Proxy((str(parts["host"]), int(parts["port"] or 5432))) as made:
        yield made


@pytest.fixture
def own_database() -> Iterator[Database]:
    """On a server that the test may restart."""
    with EmbeddedPostgres() as server:
        yield Database(server, "postgres")


def through(proxy: Proxy, database: Database, **more: str) -> str:
    return conninfo.make_conninfo(database.dsn, host=proxy.host, port=proxy.port, **more)


def told(what: str, seconds: float) -> None:
    print(f"recovered after {seconds:.1f} s: {what}")


def connections(run: Run) -> float:
    return run.bridge.metric("figbridge_forward_connections_total")


# --- the way to the server


@pytest.mark.parametrize("reset", [True, False], ids=["RST", "FIN"])
def test_a_connection_that_is_cut_in_the_middle_of_a_transaction(
    database: Database, proxy: Proxy, tmp_path: Path, reset: bool
) -> None:
    with running(database, tmp_path, dsn=through(proxy, database)) as run, Writers(database.dsn) as writers:
        for number in range(4):
            cuts: list[int] = []
            proxy.after(200_000 * (number + 1), lambda cuts=cuts: cuts.append(proxy.cut(reset=reset)))  # type: ignore[misc]
            with database.connect() as connection:
                change(connection, range(5000, 9000), size=100)  # 2 MB in one transaction
            until(partial(len, cuts), 20)
            assert cuts[0] > 0
            told("cut in the middle of a transaction", run.until_published(4000, 15))
            writers.until_more(10)
        assert connections(run) > 4
        writers.stop()
        run.finish(repeats=True)


@pytest.mark.parametrize("directions", [("to_server",), ("to_client",), ()], ids=lambda it: "-".join(it) or "both")
def test_a_connection_that_passes_nothing_on(
    database: Database, proxy: Proxy, tmp_path: Path, directions: Sequence[Direction]
) -> None:
    """With 2 s for either side, chosen in the DSN. New connections go through, as with a firewall that forgot ours."""
    dsn = through(proxy, database, options="-c wal_sender_timeout=2s")
    with running(database, tmp_path, dsn=dsn) as run, Writers(database.dsn) as writers:
        writers.until_more(100)
        before = connections(run)
        proxy.stall(*directions)
        began = time.monotonic()
        until(lambda: connections(run) > before, 30, run.bridge.log)
        run.until_published(4000, 10)
        told(f"limits of 2 s, stalled {directions or 'both ways'}", time.monotonic() - began)
        proxy.resume()  # what was held comes too late for anybody
        writers.until_more(50)
        writers.stop()
        run.finish()


def test_a_stall_is_noticed_with_the_limits_that_nobody_chose(database: Database, proxy: Proxy, tmp_path: Path) -> None:
    with running(database, tmp_path, dsn=through(proxy, database)) as run:
        run.until_published(1, 10)
        proxy.stall()
        told("stalled both ways, default limits", run.until_published(1, 40))
        assert "the server said nothing for 20" in run.bridge.log
        run.finish()


def test_a_stall_that_passes_by_is_no_fault(database: Database, proxy: Proxy, tmp_path: Path) -> None:
    with running(database, tmp_path, dsn=through(proxy, database)) as run, Writers(database.dsn) as writers:
        before = connections(run)
        proxy.stall(new=True)
        writers.until_more(200)
        proxy.resume()
        told("stalled for a moment", run.until_published(4000, 10))
        assert connections(run) == before
        writers.stop()
        run.finish()


def test_a_proxy_that_accepts_and_never_answers(database: Database, proxy: Proxy, tmp_path: Path) -> None:
    """Every connection is given up after connect_timeout and tried again; nobody has to wake the bridge."""
    with running(database, tmp_path, dsn=through(proxy, database, connect_timeout="2")) as run:
        run.until_published(1, 10)
        proxy.deafen()
        proxy.cut()
        accepted = proxy.accepted
        until(lambda: proxy.accepted > accepted + 5, 30, run.bridge.log)
        assert run.bridge.get("/livez")[0] == 200
        assert run.bridge.get("/readyz")[0] == 503
        assert "connection timeout expired" in run.bridge.log
        proxy.resume()
        told("a deaf proxy answers again", run.until_published(1, 15))
        run.finish()


def test_a_name_that_moves_to_another_address(database: Database, proxy: Proxy, tmp_path: Path) -> None:
    """The name is looked up at each connection, not once: /etc/hosts of the bridge's own mount namespace changes."""
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 legacy.test\n")
    mount = 'mount --bind "$0" /etc/hosts && exec "$@"'
    prefix = ["unshare", "--mount", "sh", "-c", mount, str(hosts)]
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a mount namespace of one's own needs CAP_SYS_ADMIN")
    dsn = conninfo.make_conninfo(database.dsn, host="legacy.test", port=proxy.port)
    target = conninfo.conninfo_to_dict(database.dsn)
    with (
        Proxy((str(target["host"]), int(target["port"] or 5432)), host="127.0.0.2", port=proxy.port) as moved,
        running(database, tmp_path, dsn=dsn, prefix=prefix) as run,
        Writers(database.dsn) as writers,
    ):
        writers.until_more(50)
        assert (proxy.accepted > 0, moved.accepted) == (True, 0)
        hosts.write_text("127.0.0.2 legacy.test\n")
        proxy.close()  # the old address refuses
        told("the name moved", run.until_published(4000, 15))
        assert moved.accepted > 0
        writers.stop()
        run.finish()


# --- the server


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_server_that_is_restarted_under_load(own_database: Database, tmp_path: Path, mode: str) -> None:
    server = own_database.server
    assert isinstance(server, EmbeddedPostgres)
    with running(own_database, tmp_path) as run, Writers(own_database.dsn) as writers:
        for _ in range(3):
            writers.until_more(50)
            server.stop(mode)
            server.start()
            told(f"{mode} restart", run.until_published(4000, 15))
        writers.stop()
        run.finish()


def test_a_walsender_that_is_terminated_again_and_again(database: Database, tmp_path: Path) -> None:
    with running(database, tmp_path) as run, Writers(database.dsn, steadfast=True) as writers:
        for _ in range(20):
            until(lambda: database.execute(CUT, [database.slot]), 10)
            writers.until_more(20)
        told("20 times pg_terminate_backend", run.until_published(4000, 15))
        assert connections(run) > 10
        writers.stop()
        run.finish()


# --- the password


@dataclass
class Secret:
    """A role with a password, on a server that asks for it."""

    database: Database
    passfile: Path

    def rotate(self, password: str) -> None:
        """Let only the new one in, and end what was let in with the old one."""
        self.database.execute(f"ALTER ROLE bridge PASSWORD '{password}'")
        self.database.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'bridge'")

    def write(self, password: str) -> None:
        """Into the passfile, in one step, as a mounted secret changes."""
        aside = self.passfile.with_suffix(".new")
        aside.touch(0o600)
        aside.write_text(f"*:*:*:bridge:{password}\n")
        aside.replace(self.passfile)


@pytest.fixture
def secret(own_database: Database, tmp_path: Path) -> Secret:
    server = own_database.server
    assert isinstance(server, EmbeddedPostgres)
    own_database.execute("CREATE ROLE bridge LOGIN REPLICATION SUPERUSER PASSWORD 'first'")
    hba = server._data / "pg_hba.conf"
    hba.write_text("host all bridge 127.0.0.1/32 scram-sha-256\n" + hba.read_text())
    server.reload()
    return Secret(own_database, tmp_path / "pgpass")


def test_a_password_that_is_rotated_is_read_again_from_the_passfile(secret: Secret, tmp_path: Path) -> None:
    secret.write("first")
    dsn = conninfo.make_conninfo(secret.database.dsn, user="bridge", passfile=str(secret.passfile))
    with running(secret.database, tmp_path, dsn=dsn) as run, Writers(secret.database.dsn) as writers:
        secret.write("second")
        secret.rotate("second")
        told("the password was there before", run.until_published(4000, 15))
        secret.rotate("third")
        until(lambda: "refuses the connection" in run.bridge.log, 20, run.bridge.log)
        until(lambda: run.bridge.get("/readyz")[0] == 503, 20)
        writers.until_more(20)
        secret.write("third")
        told("the password came later", run.until_published(4000, 15))
        writers.stop()
        run.finish()


def test_a_password_in_the_dsn_that_is_rotated_waits_for_a_human_and_says_so(secret: Secret, tmp_path: Path) -> None:
    dsn = conninfo.make_conninfo(secret.database.dsn, user="bridge", password="first")
    with running(secret.database, tmp_path, dsn=dsn) as run:
        run.until_published(1, 10)
        secret.rotate("second")
        until(lambda: "refuses the connection" in run.bridge.log, 20, run.bridge.log)
        line = next(it for it in run.bridge.log.splitlines() if "refuses the connection" in it)
        assert "error" in line.lower()
        assert "password authentication failed" in line
        assert "a password inside the DSN only when the bridge starts" in line
        assert run.bridge.get("/livez")[0] == 200, "a crash loop would be the same retry with less to read"
        assert "first" not in run.bridge.log.replace("first failure", "")
        run.bridge.signal(signal.SIGTERM)
        assert run.bridge.wait() == 0
        with Bridge(
            tmp_path / "bridge.yaml",
            tmp_path / "again.log",
            environment={"LEGACY_DSN": conninfo.make_conninfo(dsn, password="second")},
        ) as again:
            again.until_ready()
            Run(secret.database, again, run.events).finish()


def test_the_forward_path_does_not_wait_for_the_pooler_of_the_reverse_path(database: Database, tmp_path: Path) -> None:
    """It is away when the bridge starts; when it is there, the reverse path is looked at and begins."""
    database.execute("CREATE SCHEMA shop; CREATE TABLE shop.orders (id int PRIMARY KEY)")
    target, events = conninfo.conninfo_to_dict(database.dsn), tmp_path / "events.jsonl"
    with HeldPort() as held:
        tree = {
            "legacy": {
                "dsn": database.dsn,
                "reverse-dsn": conninfo.make_conninfo(database.dsn, host="127.0.0.1", port=held.number),
                "slot": database.slot,
                "tables": ["shop.orders"],
            },
            "forward": {"sink": {"type": "file", "path": str(events)}},
            "reverse": {
                "source": {"type": "local", "path": str(tmp_path / "bus.sqlite")},
                "mappings": [mapping("shop.orders", "insert", values=["id"])],
            },
            "http": {"listen": "${HTTP_LISTEN}"},
        }
        config = tmp_path / "bridge.yaml"
        config.write_text(json.dumps(tree))
        provision.initialise(Config.load(config, {"HTTP_LISTEN": "127.0.0.1:0"}))
        with Bridge(config, tmp_path / "log") as bridge:
            database.execute("INSERT INTO shop.orders VALUES (1)")
            until(lambda: events.exists() and len(events.read_bytes().splitlines()) == 1, 30, lambda: bridge.log)
            assert bridge.get("/readyz") == (503, "not ready: reverse\n")
            until(lambda: "preflight of legacy.reverse-dsn" in bridge.log, 30, lambda: bridge.log)
            held.close()
            with Proxy((str(target["host"]), int(target["port"] or 5432)), port=held.number):
                bridge.until_ready(60)
            assert bridge.terminate() == 0
