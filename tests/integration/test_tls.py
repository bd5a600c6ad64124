"""TLS with a real certificate of a CA of our own: what passes, and what the operator is told when it does not.

A connection that is refused is tried again, because certificates are rotated and CAs mounted late; but never in
silence: at ERROR, with what to do.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from psycopg import conninfo

from figbridge import legacy
from figbridge.change import Lsn
from figbridge.demo.postgres import EmbeddedPostgres, installations
from figbridge.errors import LegacyUnavailable
from figbridge.forward.source import ReplicationSource
from fixtures import workload
from fixtures.bridge import Bridge
from fixtures.clock import until
from fixtures.forward import Forward
from fixtures.postgres import Database
from fixtures.workload import change

NAME = "legacy.test"


class Authority:
    """A certificate authority in `directory`; it signs with OpenSSL's own program."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory, self._name = directory, name
        self.certificate = directory / f"{name}.crt"
        self._openssl(
            "req", "-x509", "-days", "2", "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.crt",
            "-addext", "basicConstraints=critical,CA:TRUE", *_NEW_KEY,
        )  # fmt: skip

    def sign(self, host: str, days: int = 2) -> tuple[Path, Path]:
        """(certificate, key) of a server that is reached as `host`; with a negative `days` it has expired."""
        stem = f"{host}{days}"
        self._openssl("req", "-subj", f"/CN={host}", "-keyout", f"{stem}.key", "-out", f"{stem}.csr", *_NEW_KEY)
        (self._directory / f"{stem}.ext").write_text(f"subjectAltName=DNS:{host}\n")
        self._openssl(
            "x509", "-req", "-in", f"{stem}.csr", "-out", f"{stem}.crt", "-days", str(days), "-extfile", f"{stem}.ext",
            "-CA", f"{self._name}.crt", "-CAkey", f"{self._name}.key", "-CAcreateserial",
        )  # fmt: skip
        return self._directory / f"{stem}.crt", self._directory / f"{stem}.key"

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self._directory, check=True, capture_output=True, timeout=120)


_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass
class Encrypted:
    """A server with TLS, and the CA that it is known by."""

    database: Database
    server: EmbeddedPostgres
    authority: Authority

    def dsn(self, **more: Any) -> str:
        """By the name in the certificate, checked in full."""
        given = {"host": NAME, "hostaddr": "127.0.0.1", "sslmode": "verify-full"}
        return conninfo.make_conninfo(
            self.database.dsn, **{**given, "sslrootcert": str(self.authority.certificate), **more}
        )

    def present(self, certificate: Path, key: Path) -> None:
        """Let the server show this one from the next connection on."""
        for source, name in ((certificate, "server.crt"), (key, "server.key")):
            target = self.server._root / name
            shutil.copyfile(source, target)
            target.chmod(0o600)
            if self.server._user:
                os.chown(target, self.server._user.pw_uid, self.server._user.pw_gid)
        if self.server.running:
            self.server.reload()


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Encrypted]:
    if not shutil.which("openssl"):
        pytest.skip("the certificates are made with the program openssl")
    authority = Authority(tmp_path_factory.mktemp("ca"), "authority")
    for version in sorted(installations(), reverse=True):
        server = EmbeddedPostgres(version)
        files = {f"ssl_{kind}_file": str(server._root / f"server.{end}") for kind, end in _FILES.items()}
        server._settings |= {"ssl": "on", **files}
        made = Encrypted(Database(server, "postgres"), server, authority)
        made.present(*authority.sign(NAME))
        try:
            with server:
                made.database.execute("CREATE TABLE thing (id int PRIMARY KEY); CREATE PUBLICATION pub FOR TABLE thing")
                made.database.create_slot()
                yield made
                return
        except RuntimeError as error:
            if "SSL is not supported by this build" not in str(error):
                raise
    pytest.skip("no PostgreSQL here was built with OpenSSL")


_FILES = {"cert": "crt", "key": "key"}


def refused(dsn: str, slot: str = "any") -> LegacyUnavailable:
    """How both ways to the server are refused, which must be the same."""
    source = ReplicationSource(dsn, slot, ("pub",))
    try:
        with pytest.raises(LegacyUnavailable) as by_source:
            source.connect(Lsn(0))
    finally:
        source.close()
    with pytest.raises(LegacyUnavailable) as by_connection:
        legacy.connect(dsn, purpose="test")
    assert by_source.value.hint == by_connection.value.hint
    assert by_source.value.urgent
    assert by_source.value.retryable
    return by_source.value


def test_a_certificate_that_is_right_in_full(encrypted: Encrypted) -> None:
    database = encrypted.database
    with Forward(database, dsn=encrypted.dsn()) as forward:
        forward.until_streaming()
        database.execute("INSERT INTO thing VALUES (1)")
        forward.until_events(1)
        query = "SELECT ssl, version FROM pg_stat_ssl JOIN pg_replication_slots ON pid = active_pid"
        ((ssl, version),) = database.execute(query)
        assert ssl
        assert version.startswith("TLSv1.")


@pytest.mark.parametrize(
    ("more", "said", "remedy"),
    [
        ({"host": "other.test"}, "does not match host name", "a host name that is in the certificate"),
        ({"host": "127.0.0.1"}, "does not match host name", "a host name that is in the certificate"),
        ({"sslrootcert": "stranger"}, "certificate verify failed", "the certificate of the CA that signed"),
        ({"sslrootcert": "/nowhere.crt"}, "does not exist", "`sslrootcert=` in the DSN must name"),
    ],
)
def test_a_certificate_that_is_not_the_one_expected(
    encrypted: Encrypted, tmp_path: Path, more: dict[str, str], said: str, remedy: str
) -> None:
    if more.get("sslrootcert") == "stranger":
        more = {"sslrootcert": str(Authority(tmp_path, "stranger").certificate)}
    failure = refused(encrypted.dsn(**more))
    assert said in str(failure)
    assert remedy in failure.hint
    assert "Do not lower sslmode" in failure.hint


def test_a_certificate_that_has_expired(encrypted: Encrypted) -> None:
    encrypted.present(*encrypted.authority.sign(NAME, days=-1))
    try:
        until(lambda: _fails(encrypted.dsn()), 10)  # the server reads it a moment after the reload
        failure = refused(encrypted.dsn())
    finally:
        encrypted.present(*encrypted.authority.sign(NAME))
    assert "certificate verify failed" in str(failure)
    assert "expired" in failure.hint
    until(lambda: not _fails(encrypted.dsn()), 10)


def _fails(dsn: str) -> bool:
    try:
        legacy.connect(dsn, purpose="test").close()
    except LegacyUnavailable:
        return True
    return False


def test_a_server_that_speaks_no_tls(encrypted: Encrypted) -> None:
    with EmbeddedPostgres() as plain:
        failure = refused(encrypted.dsn(port=plain.port))
    assert "server does not support SSL" in str(failure)
    assert "ssl = off" in failure.hint


def test_a_server_that_insists_on_tls(encrypted: Encrypted) -> None:
    hba = encrypted.server._data / "pg_hba.conf"
    before = hba.read_text()
    hba.write_text("hostnossl all all all reject\n" + before)
    encrypted.server.reload()
    dsn = conninfo.make_conninfo(encrypted.database.dsn, sslmode="disable")
    try:
        until(lambda: _fails(dsn), 10)
        failure = refused(dsn)
    finally:
        hba.write_text(before)
        encrypted.server.reload()
    assert "no encryption" in str(failure)
    assert "sslmode=require" in failure.hint
    until(lambda: not _fails(dsn), 10)


@pytest.mark.slow
def test_a_bridge_that_is_refused_says_so_and_goes_on_when_the_certificate_is_right(
    encrypted: Encrypted, tmp_path: Path
) -> None:
    database = encrypted.database
    database.execute(workload.SCHEMA)
    config = workload.configured(tmp_path, "tls", init={"LEGACY_DSN": encrypted.dsn()})
    encrypted.present(*encrypted.authority.sign("wrong.test"))
    until(lambda: _fails(encrypted.dsn()), 10)
    environment = {"LEGACY_DSN": encrypted.dsn()}
    with Bridge(config, tmp_path / "bridge.log", environment=environment) as bridge:
        until(lambda: "does not match host name" in bridge.log, 20, lambda: bridge.log)
        line = next(json.loads(it) for it in bridge.log.splitlines() if "does not match host name" in it)
        assert line["level"] == "error"
        assert "a host name that is in the certificate" in line["hint"]
        assert (bridge.get("/livez")[0], bridge.get("/readyz")[0]) == (200, 503)
        encrypted.present(*encrypted.authority.sign(NAME))
        bridge.until_ready(15)
        with database.connect() as connection:
            change(connection, [1])
        workload.until_drained(database.dsn, "tls", [bridge])
        assert bridge.terminate() == 0
    workload.prove(database.dsn, (tmp_path / "events.jsonl").read_bytes().splitlines())
