"""Dead letters as JSON lines in a file.

A letter is removed by writing blanks over its line, in place: the bridge that appends meanwhile is not disturbed, the
rows are gone from the disk, and what is left is JSON lines still. The first byte goes first, so a line that a crash
left half blank does not begin as a letter does. The file does not shrink; without a bridge that writes to it, an empty
one may be put in its place.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

from figbridge.deadletter.letter import DeadLetter, Kept, Unreadable, Wanted, dump, parse
from figbridge.errors import BridgeError, SinkRefused, SinkUnavailable

_BLANKS: Final = b" " * 65536


class _Line(NamedTuple):
    at: int
    length: int  # without its newline


class FileDeadLetterStore:
    """Appends to `path`, synced to disk. A repeated letter is written again, under the same id."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self.name = str(path)

    def add(self, letters: Sequence[DeadLetter]) -> None:
        """See `DeadLetters.add`. Raises SinkUnavailable, SinkRefused."""
        try:
            begun = self._file is not None
            file = self._file = self._file or self._path.open("ab")
            # another loop or process may write here too, and half of its line would look like what a crash left
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                if not begun:
                    _end_last_line(self._path)
                file.write(b"".join(dump(letter) + b"\n" for letter in letters))
                file.flush()
                os.fsync(file.fileno())
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)
        except OSError as error:
            self.close()  # what was not written is still in its buffer
            raise _translated(error, self._path) from error

    def check(self) -> None:
        """The file may be written to, or its directory if it is not there yet. Nothing is made. Raises SinkRefused."""
        there = self._path.exists()
        asked, right = (self._path, os.W_OK) if there else (self._path.parent, os.W_OK | os.X_OK)
        if (there and not self._path.is_file()) or not os.access(asked, right):
            what = "is no file that may be written to" if there else "cannot be made"
            raise SinkRefused(
                f"{self._path} {what}", hint=f"let the bridge's user write to {asked}; name a file in a directory of it"
            )

    def scan(self, wanted: Wanted) -> Generator[Kept, None, None]:
        """See `DeadLetterStore.scan`: in the order of their arrival. A letter that was repeated comes repeatedly."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:  # nothing was ever written
            return
        except OSError as error:
            raise _translated(error, self._path) from error
        with file:
            at = 0
            for number, line in enumerate(file, 1):
                where, at = _Line(at, len(line) - 1), at + len(line)
                if not line.startswith(b"{") or not line.endswith(b"\n"):
                    continue  # removed; or being written at this moment
                try:
                    letter = parse(line)
                except Unreadable as error:
                    raise BridgeError(
                        f"{self._path}, line {number}: {error}", hint="move that line to another file, then try again"
                    ) from error
                if letter in wanted:
                    yield Kept(letter, where)

    def remove(self, kept: Sequence[Kept]) -> None:
        """See `DeadLetterStore.remove`. Raises SinkUnavailable, SinkRefused."""
        try:
            fd = os.open(self._path, os.O_WRONLY)  # not for appending: that would write at the end
            try:
                for _, line in kept:
                    _blank(fd, line)
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise _translated(error, self._path) from error

    def update(self, kept: Sequence[Kept]) -> None:
        """See `DeadLetterStore.update`: a line cannot grow, and at the end it would be out of its order."""

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


def _end_last_line(path: Path) -> None:
    """Blank what a crash left of a line, which was never acknowledged, and end it: the next letter needs its own."""
    fd = os.open(path, os.O_RDWR)
    try:
        size = at = os.fstat(fd).st_size
        while at:
            begin = max(0, at - len(_BLANKS))
            newline = os.pread(fd, at - begin, begin).rfind(b"\n")
            if newline >= 0:
                at = begin + newline + 1
                break
            at = begin
        if at < size:
            _blank(fd, _Line(at, size - at))
            os.pwrite(fd, b"\n", size)
    finally:
        os.close(fd)


def _blank(fd: int, line: _Line) -> None:
    at, end = line.at, line.at + line.length
    while at < end:
        at += os.pwrite(fd, _BLANKS[: end - at], at)


def _translated(error: OSError, path: Path) -> BridgeError:
    what = f"the dead letters' file {path}: {error.strerror or error}"
    if isinstance(error, FileNotFoundError | NotADirectoryError | PermissionError | IsADirectoryError):
        return SinkRefused(what, hint="mend the path, or let the bridge's user write there")
    if error.errno == errno.EROFS:
        return SinkRefused(what, hint="name a file on a file system that is mounted for writing")
    return SinkUnavailable(what, hint="make room on its file system; nothing is lost meanwhile")
