"""The standard output sink: the suite, and a reader that goes away."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from conformance.events import event
from conformance.sink_suite import SinkFeatures, SinkHarness, SinkSuite
from figbridge.transports.stdout import StdoutSink


@dataclass
class StdoutHarness:
    capture: pytest.CaptureFixture[bytes]
    monkeypatch: pytest.MonkeyPatch
    features: ClassVar[SinkFeatures] = SinkFeatures(exact=True, ordered=True, unique=False)

    def open(self) -> StdoutSink:
        return StdoutSink()

    def open_missing(self) -> StdoutSink:
        self.monkeypatch.setattr(sys, "stdout", None)  # what Python makes of a closed file descriptor
        return StdoutSink()

    def read(self, count: int) -> list[bytes]:
        lines = self.capture.readouterr().out.split(b"\n")
        assert lines.pop() == b""
        assert len(lines) >= count
        return lines


class TestStdout(SinkSuite):
    @pytest.fixture
    def harness(self, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> SinkHarness:
        return StdoutHarness(capfdbinary, monkeypatch)


_WRITER = """
import sys
from conformance.events import event
from figbridge.errors import SinkRefused
from figbridge.transports.stdout import StdoutSink
sink = StdoutSink()
sink.check()
try:
    while True:
        sink.publish([event(n) for n in range(100)])
except SinkRefused as error:
    sys.exit(f"{error} / {error.hint}")
"""


@pytest.mark.parametrize(
    ("output", "message"), [("pipe", b"the reader of standard output is gone / start it"), ("/dev/full", b"No space")]
)
def test_a_lost_reader_and_a_full_disk_are_refused_and_the_process_ends_cleanly(output: str, message: bytes) -> None:
    reader = None
    if output == "pipe":
        reader, writer = os.pipe()
    else:
        writer = os.open(output, os.O_WRONLY)
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITER],
        stdout=writer,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    os.close(writer)
    if reader is not None:
        assert os.read(reader, len(event(0).envelope())) == event(0).envelope()
        os.close(reader)

    _, stderr = process.communicate(timeout=120)
    assert message in stderr
    assert b"Traceback" not in stderr
    assert b"Exception ignored" not in stderr
    assert process.returncode == 1  # and not 120, Python's status when it cannot flush at exit
