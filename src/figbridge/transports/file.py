"""Events as JSON lines in one file: the body of an event is a line.

Invariant: when `FileSink.publish` returns, every line is on disk (an fsync behind the last of the group), and the file
ends with a whole line. What a crash in the middle of a write left behind was never acknowledged, so it is cut
off when the file is opened again and comes back under the same ids.

Refuses to share the file with a second writer, whose lines would interleave with ours, and to cut a tail that this
sink did not write.
"""

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

from figbridge.errors import SinkError, SinkRefused, SinkUnavailable
from figbridge.event import Event, Lines, Rejection
from figbridge.transports import Limits

_BLOCK = 64 * 1024  # bytes read at once when looking for the last newline
# how each of our lines begins, by format
_HEADS: Final = (b'{"version":"0","id":', b'{"specversion":"1.0","id":', b'{"figbridge":{"id":', b'{"id":')
# The file does not care how long a line is; what groups writes is how much memory and how many fsyncs they cost.
_LIMITS: Final = Limits(entries=10_000, entry_bytes=1 << 31, batch_bytes=16 * 1024 * 1024, partial=False, lines=100_000)
_AHEAD = 4 * 1024 * 1024  # bytes that are written before they are made durable beside what comes
# that one call writes: where a file system takes large pieces, each of them costs as much as a small one
_TOGETHER = 1024 * 1024
_MOST_TOGETHER = 64  # pieces: a call takes 1024, at most (IOV_MAX)
_FRAME = 256  # bytes of a line beside its detail, more or less

# fdatasync leaves out the modification time, which nobody needs to be durable; it writes the size, which we do need
_sync = getattr(os, "fdatasync", os.fsync)


class FileSink:
    """Appends to `path`. Opened by `check` or by `publish`, locked (flock) until `close` or `let_go`.

    A file that was renamed or removed meanwhile (log rotation) is left as it is, and a new one is begun.
    """

    name = "file"
    limits = _LIMITS

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None
        self._torn_at: int | None = None  # where a failed write has to be cut off before the next

    def size(self, event: Event) -> int:
        """About the bytes of the line: it groups writes and refuses nothing."""
        return len(event.detail) + _FRAME

    def check(self) -> None:
        """Open and lock the file, and cut off a torn last line. Raises SinkRefused, SinkUnavailable."""
        self._descriptor()

    def publish(self, events: Sequence[Event]) -> Sequence[Rejection]:
        """Append `events`; on disk when this returns. Raises SinkUnavailable (nothing was appended), SinkRefused."""
        if not events:
            return ()
        fd = self._descriptor()
        try:
            self._mend(fd)
            self._torn_at = os.fstat(fd).st_size
            if isinstance(events, Lines):
                _append(fd, events.lines(), self._torn_at)
            else:
                _write_all(fd, [b"\n".join([*events[0].bodies(events), b""])])
                _sync(fd)
        except OSError as error:
            # After a failed fsync as well: the kernel drops what it could not write and calls the next fsync a
            # success (https://wiki.postgresql.org/wiki/Fsync_Errors), so the lines have to be written once more.
            with contextlib.suppress(OSError):  # then the next publish tries to cut it off
                self._mend(fd)
            raise _translated(error, self._path) from error
        self._torn_at = None
        return ()

    def close(self) -> None:
        """Close the file, which releases the lock."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def let_go(self) -> None:
        """See `Exclusive`."""
        self.close()

    def _mend(self, fd: int) -> None:
        if self._torn_at is not None:
            os.ftruncate(fd, self._torn_at)
            self._torn_at = None

    def _descriptor(self) -> int:
        if self._fd is not None and not _is_file(self._fd, self._path):
            with contextlib.suppress(OSError):
                self._mend(self._fd)  # whoever took it away shall find whole lines
            self.close()
            self._torn_at = None
        if self._fd is None:
            self._fd = _open(self._path)
        return self._fd


def _is_file(fd: int, path: Path) -> bool:
    """Whether `fd` is still what `path` names."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _translated(error, path) from error
    return os.path.samestat(os.fstat(fd), there)


def _open(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise _translated(error, path) from error
    try:
        _take(fd, path)
    except BaseException as error:
        os.close(fd)
        if isinstance(error, OSError):
            raise _translated(error, path) from error
        raise
    return fd


def _take(fd: int, path: Path) -> None:
    """Make the open file ours: locked, ending with a whole line, its name durable."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise SinkRefused(f"{path} is not a regular file", hint="name a file, or use the sink type stdout")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        # unavailable, not refused: a stand-by replica waits for the lock as it waits for the slot
        raise SinkUnavailable(
            f"{path} is locked by another process",
            hint="another bridge writes to this file; this one waits for it. Give each a file of its own, or stop one",
        ) from error
    _cut_torn_line(fd, path)
    _sync_directory(path.parent)


def _cut_torn_line(fd: int, path: Path) -> None:
    """Truncate after the last newline. Reads the torn line only, from the end: the file may be 100 GB."""
    size = end = os.fstat(fd).st_size
    while end:
        start = max(0, end - _BLOCK)
        newline = os.pread(fd, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end == size:
        return
    torn = os.pread(fd, min(size - end, *map(len, _HEADS)), end)
    # NUL: blocks that a power failure left unwritten
    if not torn.startswith(b"\0") and not any(head.startswith(torn) for head in _HEADS):
        raise SinkRefused(
            f"{path} ends with {size - end} bytes that are not a line of this sink",
            hint="it is not cut off, for it may be someone else's; name another file, or end its last line",
        )
    os.ftruncate(fd, end)
    _sync(fd)


def _sync_directory(directory: Path) -> None:
    """Make a new file's name durable; fsync of the file alone does not (fsync(2))."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _append(fd: int, parts: Iterable[bytes], end: int) -> None:
    """Write `parts` behind `end`, durably. Raises OSError.

    What has come together becomes durable while the next parts are made: a disk has its cache, too, and only a sync
    empties that. To ask for one at the end alone took a fifth of the time.
    """
    sync: Future[None] | None = None
    waiting = 0  # bytes of which no sync knows
    with ThreadPoolExecutor(1, "file-sync") as syncing:
        for together in _grouped(parts):
            waiting += _write_all(fd, together)
            if waiting > _AHEAD and (sync is None or sync.done()):
                if sync:
                    sync.result()
                end += waiting
                sync, waiting = syncing.submit(_put_away, fd, end - waiting, waiting), 0
        _sync(fd)  # beside the one that is out
    if sync:
        sync.result()  # the kernel tells of an error once: the other would know nothing of it


def _put_away(fd: int, offset: int, size: int) -> None:
    """Make what was written durable, and let the page cache have the room: a database beside us has a use for it.

    https://man7.org/linux/man-pages/man2/posix_fadvise.2.html (POSIX_FADV_DONTNEED)
    """
    _sync(fd)
    if hasattr(os, "posix_fadvise"):  # macOS has none
        with contextlib.suppress(OSError):  # it is an advice: a file system need not take it
            os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)


def _grouped(parts: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Neighbours together, some of them, as they come: none is held back for long, nor are there many."""
    group, size = list[bytes](), 0
    for part in parts:
        group.append(part)
        size += len(part)
        if size >= _TOGETHER or len(group) == _MOST_TOGETHER:
            yield group
            group, size = [], 0
    if group:
        yield group


def _write_all(fd: int, parts: Sequence[bytes]) -> int:
    """How many bytes they are. Raises OSError."""
    size = sum(map(len, parts))
    written = os.writev(fd, parts)
    if written < size:  # a full disk, say
        rest = memoryview(b"".join(parts))[written:]
        while rest:
            rest = rest[os.write(fd, rest) :]
    return size


def _translated(error: OSError, path: Path) -> SinkError:
    reason = error.strerror or str(error)
    match error:
        case FileNotFoundError() | NotADirectoryError():
            return SinkRefused(f"{path}: {reason}", hint=f"make the directory {path.parent}, or mount it")
        case PermissionError():
            return SinkRefused(f"{path}: {reason}", hint="let the bridge's user write to the file and its directory")
        case IsADirectoryError():
            return SinkRefused(f"{path}: {reason}", hint="name a file in it")
    if error.errno == errno.EROFS:
        return SinkRefused(f"{path}: {reason}", hint="name a file on a file system that is mounted for writing")
    return SinkUnavailable(
        f"cannot write to {path}: {reason}", hint="make room on its file system; nothing is lost meanwhile"
    )
