"""The file sink: the suite, and what a crash, a full disk and a second writer do to a file."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from conformance.events import event, number
from conformance.sink_suite import SinkFeatures, SinkHarness, SinkSuite
from figbridge.errors import SinkRefused, SinkUnavailable
from figbridge.event import Lines
from figbridge.transports import file
from figbridge.transports.file import FileSink


@dataclass
class FileHarness:
    directory: Path
    features: ClassVar[SinkFeatures] = SinkFeatures(exact=True, ordered=True, unique=False)

    @property
    def path(self) -> Path:
        return self.directory / "events.jsonl"

    def open(self) -> FileSink:
        return FileSink(self.path)

    def open_missing(self) -> FileSink:
        return FileSink(self.directory / "no such directory" / "events.jsonl")

    def read(self, count: int) -> list[bytes]:
        data = self.path.read_bytes()
        assert data.endswith(b"\n")
        lines = data[:-1].split(b"\n")
        assert len(lines) >= count
        return lines


class TestFile(SinkSuite):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> SinkHarness:
        return FileHarness(tmp_path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


@contextmanager
def opened(path: Path) -> Iterator[FileSink]:
    sink = FileSink(path)
    try:
        sink.check()
        yield sink
    finally:
        sink.close()


LINE = event(1).envelope() + b"\n"


@pytest.mark.parametrize("kept", [b"", LINE, LINE * 3], ids=["no line", "one line", "three lines"])
@pytest.mark.parametrize(
    "torn",
    [LINE[:1], LINE[:-1], LINE[:60], b'{"version":"0","id":"' + b"x" * 300_000, b"\0" * 4096],
    ids=["one byte", "all but the newline", "half", "longer than several blocks", "unwritten blocks"],
)
def test_a_torn_last_line_is_cut_off(path: Path, kept: bytes, torn: bytes) -> None:
    path.write_bytes(kept + torn)

    with opened(path) as sink:
        assert path.read_bytes() == kept
        sink.publish([event(2)])

    assert path.read_bytes() == kept + event(2).envelope() + b"\n"


class Parts(Lines):
    """Events that come as lines, in parts of half a megabyte."""

    def __init__(self, count: int, lines: int = 2000) -> None:
        self.each = lines
        self.parts = [(event(number).envelope() + b"\n") * lines for number in range(count)]

    def __len__(self) -> int:
        return self.each * len(self.parts)

    def __getitem__(self, _: object) -> Any:
        raise AssertionError("its lines are enough")

    def lines(self) -> Iterator[bytes]:
        return iter(self.parts)


def test_lines_that_come_in_parts(path: Path) -> None:
    parts = Parts(30)
    with opened(path) as sink:
        sink.publish([event(1)])
        sink.publish(parts)
    assert sum(map(len, parts.parts)) > 2 * file._AHEAD, "some are made durable before all are there"
    assert path.read_bytes() == LINE + b"".join(parts.parts)


def test_more_parts_than_one_call_takes(path: Path) -> None:
    parts = Parts(2 * os.sysconf("SC_IOV_MAX"), 1)
    with opened(path) as sink:
        sink.publish(parts)
    assert path.read_bytes() == b"".join(parts.parts)


def test_a_disk_that_is_full_within_parts_that_are_written_together(path: Path) -> None:
    parts = Parts(30, 20)
    with opened(path) as sink:
        sink.publish([event(1)])
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(LINE) + len(parts.parts[0]) * 5 // 2, hard))
        try:
            with pytest.raises(SinkUnavailable):
                sink.publish(parts)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == LINE
        sink.publish(parts)
    assert path.read_bytes() == LINE + b"".join(parts.parts)


def test_an_error_of_the_disk_beside_the_writing_is_not_lost(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells of it once: the sync at the end succeeds."""
    parts, sync = Parts(30), file._sync

    def broken(fd: int) -> None:
        if threading.current_thread().name.startswith("file-sync"):
            raise OSError(errno.EIO, "Input/output error")
        sync(fd)

    with opened(path) as sink:
        sink.publish([event(1)])
        with monkeypatch.context() as patch:
            patch.setattr(file, "_sync", broken)
            with pytest.raises(SinkUnavailable):
                sink.publish(parts)
        assert path.read_bytes() == LINE
        sink.publish(parts)
    assert path.read_bytes() == LINE + b"".join(parts.parts)


@pytest.mark.parametrize("foreign", [b"PK\x03\x04", b"some notes", LINE + b'{"mine": 1}'])
def test_a_tail_of_somebody_else_is_not_cut_off(path: Path, foreign: bytes) -> None:
    path.write_bytes(foreign)
    sink = FileSink(path)

    with pytest.raises(SinkRefused, match="not a line of this sink") as caught:
        sink.check()

    assert caught.value.hint
    assert path.read_bytes() == foreign


def test_the_end_of_a_huge_file_is_found_without_reading_it(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(50 << 30)  # sparse: 50 GB that take no room, and far more than a test could read
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + LINE[:50])

    with opened(path):
        assert path.stat().st_size == (50 << 30) + 1


def test_a_second_writer_is_refused_until_the_first_is_gone(path: Path) -> None:
    with opened(path) as first:
        second = FileSink(path)
        with pytest.raises(SinkUnavailable, match="locked by another process") as caught:
            second.check()
        assert caught.value.hint
        first.publish([event(1)])

    with opened(path) as sink:
        sink.publish([event(2)])
    assert path.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize("whole_lines_first", [False, True])
def test_a_full_disk_leaves_whole_lines_and_the_rest_can_follow(path: Path, *, whole_lines_first: bool) -> None:
    # RLIMIT_FSIZE makes the kernel write a part and then refuse, as a disk does that fills up
    with opened(path) as sink:
        sink.publish([event(1)])
        whole = path.stat().st_size
        batch = [event(n) for n in range(2, 2_000)]
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        room = 10 * len(LINE) + 7 if whole_lines_first else 7
        resource.setrlimit(resource.RLIMIT_FSIZE, (whole + room, hard))
        try:
            for _ in range(2):
                with pytest.raises(SinkUnavailable) as caught:
                    sink.publish(batch)
                assert path.stat().st_size == whole
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert caught.value.hint
        assert caught.value.retryable
        sink.publish(batch)

    assert [number(line) for line in path.read_bytes().splitlines()] == list(range(1, 2_000))


def test_a_failed_fsync_writes_the_lines_once_more(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # no file system at hand fails an fsync on demand, and the kernel would not report it twice
    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    with opened(path) as sink:
        sink.publish([event(1)])
        with monkeypatch.context() as patch:
            patch.setattr("figbridge.transports.file._sync", fail)
            with pytest.raises(SinkUnavailable):
                sink.publish([event(2), event(3)])
        assert path.read_bytes() == LINE
        sink.publish([event(2), event(3)])

    assert [number(line) for line in path.read_bytes().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("removed", [False, True])
def test_a_rotated_file_is_left_and_a_new_one_begun(path: Path, *, removed: bool) -> None:
    rotated = path.with_suffix(".1")
    with opened(path) as sink:
        sink.publish([event(1)])
        if removed:
            path.unlink()
        else:
            path.rename(rotated)
        sink.publish([event(2)])

    assert path.read_bytes() == event(2).envelope() + b"\n"
    if not removed:
        assert rotated.read_bytes() == LINE


def test_a_file_truncated_by_rotation_is_appended_to_at_its_new_end(path: Path) -> None:
    with opened(path) as sink:
        sink.publish([event(1), event(2)])
        os.truncate(path, 0)  # logrotate's copytruncate
        sink.publish([event(3)])

    assert path.read_bytes() == event(3).envelope() + b"\n"


@pytest.mark.parametrize("name", [".", "fifo"])
def test_what_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    sink = FileSink(tmp_path / name)

    with pytest.raises(SinkRefused) as caught:
        sink.check()
    assert caught.value.hint


_WRITER = """
import sys
import threading
from pathlib import Path
from conformance.events import event
from figbridge.transports import file
from figbridge.transports.file import FileSink
sink = FileSink(Path(sys.argv[1]))
n = int(sys.argv[2])
while True:
    group = [event(i)._replace(detail=b'{"n":%d,"fill":"%b"}' % (i, b"x" * 4000)) for i in range(n, n + 1000)]
    sink.publish(group)
    n += 1000
    print(n, flush=True)  # acknowledged up to here
"""


def test_kill_9_of_a_writer_leaves_what_it_acknowledged_and_whole_lines(path: Path) -> None:
    acknowledged = 0
    for kill in range(8):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(path), str(acknowledged)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )
        assert writer.stdout is not None
        with writer.stdout:
            for _ in range(1 + kill % 3):
                acknowledged = int(writer.stdout.readline())
            writer.send_signal(signal.SIGKILL)
            writer.wait(timeout=10)
            for line in writer.stdout.readlines():
                acknowledged = int(line) if line.endswith(b"\n") else acknowledged

        with opened(path):
            lines = path.read_bytes().split(b"\n")
        assert lines.pop() == b""
        numbers = [json.loads(line)["detail"]["n"] for line in lines]
        assert set(range(acknowledged)) <= set(numbers)
        assert len(numbers) >= acknowledged
