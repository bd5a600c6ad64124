import fcntl
import gc
import signal
import subprocess
import sys
import termios
import threading
import time

import pytest

from figbridge.errors import SlotLost
from figbridge.retry import Stopped
from figbridge.supervise import SIGNALS, Supervisor, tune
from fixtures.clock import until


class Obedient:
    name = "obedient"

    def __init__(self) -> None:
        self.ended = False

    def run(self, stop: threading.Event) -> None:
        stop.wait()
        self.ended = True


class Failing:
    name = "failing"

    def __init__(self, error: Exception, after: threading.Event | None = None) -> None:
        self._error, self._after = error, after

    def run(self, stop: threading.Event) -> None:
        (self._after or stop).wait(0 if self._after is None else 10)
        raise self._error


class Hanging:
    name = "hanging"

    def __init__(self) -> None:
        self.release = threading.Event()

    def run(self, _stop: threading.Event) -> None:
        self.release.wait(30)


def test_the_first_failure_stops_all_and_is_raised() -> None:
    obedient = Obedient()
    with pytest.raises(SlotLost, match="gone"):
        Supervisor(grace=5).run([obedient, Failing(SlotLost("gone"))])
    assert obedient.ended


def test_several_failures_are_raised_together() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        Supervisor(grace=5).run([Failing(SlotLost("one")), Failing(SlotLost("two"))])
    assert {str(error) for error in caught.value.exceptions} == {"one", "two"}


def test_what_several_found_alike_is_raised_once() -> None:
    with pytest.raises(SlotLost, match="gone"):
        Supervisor(grace=5).run([Failing(SlotLost("gone")), Failing(SlotLost("gone"))])


def test_a_signal_that_came_while_it_was_blocked_is_heard() -> None:
    supervisor = Supervisor(grace=5)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    signal.raise_signal(signal.SIGTERM)
    assert not supervisor.asked
    with supervisor.signals():
        assert supervisor.stop.wait(5)
    assert supervisor.asked


def test_a_signal_in_the_middle_of_waiting_for_one() -> None:
    """Whoever waits for the event, or sets it, has its lock for a moment: the main thread itself."""
    supervisor = Supervisor(grace=5)
    lock = supervisor.stop._cond  # type: ignore[attr-defined]
    with supervisor.signals():
        with lock:
            signal.raise_signal(signal.SIGTERM)
        assert supervisor.stop.wait(5)
        with lock:
            signal.raise_signal(signal.SIGTERM)
        assert supervisor.halt.wait(5)
    assert supervisor.asked


PROGRAM = """
import structlog
from figbridge import log
from figbridge.supervise import Supervisor

class Loop:
    name = "loop"
    def run(self, stop):
        stop.wait()

log.configure()
supervisor = Supervisor(grace=60)
with supervisor.signals():
    structlog.get_logger().info("long", text="x" * 1_000_000)
    supervisor.run([Loop()])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a full pipe is recognised by an ioctl of Linux")
def test_a_signal_in_the_middle_of_a_line_of_the_log() -> None:
    """Nobody reads the log at that moment: its line stands in a full pipe."""
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stderr=subprocess.PIPE) as process:
        assert process.stderr

        def waiting() -> int:
            return int.from_bytes(fcntl.ioctl(process.stderr or 0, termios.FIONREAD, bytes(4)), sys.byteorder)

        until(lambda: waiting() >= 65536, 30, "the pipe is full")
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read().decode()
        assert process.wait(30) == 0
    assert '"event": "stopping"' in said


def test_stopped_is_a_clean_end() -> None:
    Supervisor(grace=5).run([Obedient(), Failing(Stopped())])


def test_a_loop_that_ends_by_itself_stops_the_others() -> None:
    class Short:
        name = "short"

        def run(self, stop: threading.Event) -> None:
            assert not stop.is_set()

    obedient = Obedient()
    Supervisor(grace=5).run([obedient, Short()])
    assert obedient.ended


def test_a_loop_that_hangs_is_halted_and_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("figbridge.supervise._HALT_PATIENCE", 0.2)
    supervisor, hanging = Supervisor(grace=0.2), Hanging()
    supervisor.stop.set()
    began = time.monotonic()
    supervisor.run([hanging])
    assert time.monotonic() - began < 5
    assert supervisor.halt.is_set()
    hanging.release.set()


def test_the_collector_looks_rarely_and_not_at_what_was_there_before() -> None:
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    interval = sys.getswitchinterval()
    try:
        tune(answers=True)
        assert gc.get_freeze_count() > frozen
        assert gc.get_threshold()[0] > before[0]
        assert sys.getswitchinterval() < interval
        assert gc.isenabled()
    finally:
        gc.set_threshold(*before)
        sys.setswitchinterval(interval)
