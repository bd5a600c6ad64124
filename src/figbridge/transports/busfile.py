"""The SQLite file of the embedded bus: its tables, its making, its transactions, its errors in our words.

    event       the log: every event once, by (source, id), in the order of its commit
    subscriber  how far each has read (``frontier``)
    delivery    what a subscriber was handed and has not acknowledged; an acknowledgement deletes the row

Invariant: an event at or below a subscriber's frontier was settled, or filtered out, or is in ``delivery``.
Any program may publish with an INSERT into ``event``; the tables are the interface.

Refuses a file that is not a bus; an empty one too, because its maker may be about to fill it with something else.
"""

import contextlib
import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal
from urllib.parse import quote

from figbridge.errors import BridgeError

_APPLICATION_ID = 0x46494742  # "FIGB": how `file` and we know a bus from any other SQLite file
_SCHEMA = f"""
PRAGMA journal_mode = WAL;
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = 1;
CREATE TABLE event (
    seq    INTEGER PRIMARY KEY AUTOINCREMENT,  -- never given twice, not even after a prune
    source TEXT NOT NULL,
    id     TEXT NOT NULL,
    body   BLOB NOT NULL,                      -- as published
    UNIQUE (source, id)                        -- an id is its source's own, as in CloudEvents
);
CREATE TABLE subscriber (name TEXT PRIMARY KEY, frontier INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE delivery (
    subscriber TEXT    NOT NULL,
    seq        INTEGER NOT NULL,
    attempts   INTEGER NOT NULL,
    not_before REAL    NOT NULL,               -- seconds since 1970: it has to outlive the process
    PRIMARY KEY (subscriber, seq)
) WITHOUT ROWID;
"""
_PATIENCE = 5.0  # seconds to wait for another process's write; the longest is a group of events and its fsync
_LOOK = 0.0005  # seconds between two tries

# What passes by itself, by primary result code: https://www.sqlite.org/rescode.html
_PASSING: Final = frozenset({
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PROTOCOL,
})  # fmt: skip
_HINTS: Final = {
    sqlite3.SQLITE_NOTADB: "this is no bus: name another file",
    sqlite3.SQLITE_CORRUPT: "the file is damaged: restore it, or begin a new one",
    sqlite3.SQLITE_READONLY: "let the bridge's user write to the file and its directory",
    sqlite3.SQLITE_CANTOPEN: "let the bridge's user read and write the file and its directory",
}


class BusFile:
    """One connection to the bus at `path`, opened on first use, the bus made when missing.

    `synchronous` is SQLite's pragma. `passing` and `refused` are the errors to raise: the first for what passes by
    itself (locked, disk full), the second for what only a human mends.
    For one thread at a time; `close` may come from any.
    """

    def __init__(
        self,
        path: Path,
        synchronous: Literal["FULL", "NORMAL"],
        *,
        passing: type[BridgeError],
        refused: type[BridgeError],
    ) -> None:
        self._path = path
        self._synchronous = synchronous
        self._passing = passing
        self._refused = refused
        self._connection: sqlite3.Connection | None = None
        self._file = (0, 0)  # which file the connection has open
        self.opened = 0  # how often one was: each is a bus of its own, with numbers of its own
        self._closed = False
        # SQLite does not forgive a close in the middle of a statement; this makes it wait
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def connected(self) -> Iterator[sqlite3.Connection]:
        """The connection; what SQLite raises inside comes out as one of our errors."""
        with self._lock:
            if self._closed:
                raise self._passing(f"the bus {self._path} was closed")
            try:
                if self._connection is None:
                    self._connection = self._open()
                    self._file = _identity(self._path)
                    self.opened += 1
                self._require_same()
                yield self._connection
            except sqlite3.Error as error:
                raise self._translated(error) from error
            except OSError as error:
                raise self._refused(
                    f"{self._path}: {error.strerror or error}",
                    hint=f"make the directory {self._path.parent} and let the bridge's user write to it",
                ) from error

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A write transaction: committed at the end, undone by any error."""
        with self.connected() as connection:
            _begin(connection)
            try:
                yield connection
                self._require_same()
                connection.execute("COMMIT")
            except BaseException:
                # closed: the file was moved away; SQLite has rolled it back already when the disk is full
                if self._connection is connection and connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def _require_same(self) -> None:
        """Raise the passing error when the path leads to another file meanwhile, or to none; the next use opens it.

        SQLite does not notice, and would go on with a file that nobody else can open.
        """
        try:
            same = _identity(self._path) == self._file
        except FileNotFoundError:
            same = False
        if not same:
            self._let_go()
            raise self._passing(
                f"the bus {self._path} was moved or removed",
                hint="a new one is begun in its place, if there is none. What it held is where it was moved to",
            )

    def _let_go(self) -> None:
        if self._connection is not None:
            self._connection.close()  # which undoes what was not committed
            self._connection = None

    def close(self) -> None:
        """Close the file for good. May be called twice."""
        with self._lock:
            self._closed = True
            self._let_go()

    def _open(self) -> sqlite3.Connection:
        _create(self._path)
        connection = sqlite3.connect(
            # rw: SQLite would make a missing file anew, without our tables
            f"file:{quote(str(self._path))}?mode=rw",
            uri=True,
            timeout=_PATIENCE,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            ours = connection.execute("PRAGMA application_id").fetchone()[0] == _APPLICATION_ID
            connection.execute(f"PRAGMA synchronous = {self._synchronous}")
        except BaseException:
            connection.close()
            raise
        if not ours:
            connection.close()
            raise self._refused(
                f"{self._path} is not a figbridge bus", hint="name another file, or remove this one if it is empty"
            )
        return connection

    def _translated(self, error: sqlite3.Error) -> BridgeError:
        # errors of Python's module, such as a value it cannot store, have no code
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_MISUSE) & 0xFF
        if code in _PASSING:
            return self._passing(
                f"the bus {self._path} is not available: {error}",
                hint="look for room on its disk and for a process that holds it; the bridge tries again",
            )
        return self._refused(f"the bus {self._path}: {error}", hint=_HINTS.get(code, "see sqlite.org/rescode.html"))


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _begin(connection: sqlite3.Connection) -> None:
    """Begin to write, as soon as nobody else does. Raises sqlite3.OperationalError after `_PATIENCE`.

    SQLite's own waiting looks again after 1, 2, 5, 10, … up to 100 ms, so beside somebody who writes all the time it
    is late by that much.
    """
    connection.execute("PRAGMA busy_timeout = 0")
    try:
        deadline = time.monotonic() + _PATIENCE
        while not _begun(connection, last=time.monotonic() > deadline):
            time.sleep(_LOOK)
    finally:
        connection.execute(f"PRAGMA busy_timeout = {int(1000 * _PATIENCE)}")


def _begun(connection: sqlite3.Connection, *, last: bool) -> bool:
    """Whether nobody else writes; `last`: it is an error if somebody does."""
    try:
        # IMMEDIATE: a deferred one that reads first cannot wait for another writer, it fails with SQLITE_BUSY
        connection.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError as error:
        if last or error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
            raise
        return False
    return True


def _create(path: Path) -> None:
    """Make the bus if there is none.

    Beside its place and then linked into it, at once and only if nobody else did: two processes that switch one new
    file to WAL at the same time fail with "database is locked" (7 of 180 starts), whatever the timeout.
    """
    if path.exists():
        return
    draft = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    draft.touch()  # the error says what is wrong with the directory; SQLite says only that it cannot open
    try:
        connection = sqlite3.connect(draft, isolation_level=None)
        try:
            connection.executescript(_SCHEMA)
        finally:
            connection.close()
        with _alone(path.parent):
            if not path.exists():
                for suffix in ("-wal", "-shm"):  # of one that was moved away: SQLite would read them into the new one
                    path.with_name(path.name + suffix).unlink(missing_ok=True)
                os.link(draft, path)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Nobody else makes a bus in `directory` inside."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
