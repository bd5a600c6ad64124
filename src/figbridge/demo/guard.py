"""Clears up after the demo, however the demo ended.

A process of its own that reads from a pipe what exists: processes, the database server, directories. The end of the
pipe is its order to clear up, and the kernel sends it even when the demo was killed with -9.

A pipe, because the alternatives reach less far: PR_SET_PDEATHSIG is Linux only, follows the *thread* that started the
child, and cannot stop a server that pg_ctl has detached or remove a directory. And it is no rare path: every run of
the demo ends through it, so every run tests it.

It ends only what it was told about, by process id.
"""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

_PATIENCE: Final = 10.0  # seconds for the server to end; then the kernel ends it


class Guard:
    """The demo's end of the pipe."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C at the terminal is for the demo; the guard must outlive it
        )

    def process(self, pid: int) -> None:
        """`pid` leads a session of its own; the guard ends the whole session."""
        self._tell("process", pid)

    def ended(self, pid: int) -> None:
        """`pid` was reaped, so the number may soon be somebody else's."""
        self._tell("ended", pid)

    def server(self, root: Path) -> None:
        """A PostgreSQL server with its data in `root`/data: stop it, then remove `root`."""
        self._tell("server", root)

    def directory(self, path: Path) -> None:
        """Remove `path` in the end."""
        self._tell("directory", path)

    def keep(self, path: Path) -> None:
        """Do not remove `path` after all: somebody will want to read it."""
        self._tell("keep", path)

    def clear(self) -> None:
        """Clear up now and return when nothing is left. May be called twice."""
        if self._process.stdin:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        self._process.wait()

    def _tell(self, what: str, value: object) -> None:
        pipe = self._process.stdin
        if pipe is None or pipe.closed:
            raise RuntimeError("the guard has cleared up already")
        print(what, value, file=pipe, flush=True)


def watch(lines: Iterable[str]) -> None:
    """Remember what `lines` say until they end; then end and remove it all."""
    processes: set[int] = set()
    servers: set[Path] = set()
    directories: set[Path] = set()
    for line in lines:
        what, _, value = line.rstrip("\n").partition(" ")
        match what:
            case "process":
                processes.add(int(value))
            case "ended":
                processes.discard(int(value))
            case "server":
                servers.add(Path(value))
            case "directory":
                directories.add(Path(value))
            case "keep":
                directories.discard(Path(value))
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    for root in servers:
        _end_server(root / "data" / "postmaster.pid")
    for path in (*servers, *directories):
        shutil.rmtree(path, ignore_errors=True)


def _end_server(pid_file: Path) -> None:
    """Immediate shutdown: the data are about to be removed. https://www.postgresql.org/docs/current/server-shutdown.html"""
    try:
        pid = int(pid_file.read_text().split()[0])
        os.kill(pid, signal.SIGQUIT)
    except (OSError, ValueError, IndexError):
        return  # it never started, or is gone
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        select.select([], [], [], 0.02)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    watch(sys.stdin)
