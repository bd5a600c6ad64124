"""Named loops in threads: the first that fails stops all; stop softly, then hard.

    running ──signal, failure──▶ stopping (no new reads, drain, last acknowledgement) ──all ended──▶ stopped
                                    └──grace over, or second signal──▶ halting (retries end) ─────────▲

A loop is one thread that owns its resources. It ends when `stop` is set and its work is drained, or at once when `halt`
is set. Nothing is lost either way: what was not acknowledged comes again.
"""

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Final, Protocol

import structlog

from figbridge.retry import Stopped
from figbridge.turns import TURN

_log = structlog.get_logger()
_YOUNG: Final = 50_000  # objects made since the last look of the collector; 700 by default
SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_HALT_PATIENCE: Final = 5.0  # seconds that loops get to end once they are halted


def tune(*, answers: bool) -> None:
    """Set the interpreter up for loops that work for each other with many short-lived objects.

    Events are trees, which die without the collector's help; by default it would look at them every hundred events, and
    at everything that was ever imported now and then (a quarter of the CPU time of the reverse path, a sixth of the
    forward one's). With `answers` a loop waits for answers of a server while another computes: it would get its turn
    up to 5 ms late, several times a batch.
    """
    gc.freeze()
    gc.set_threshold(_YOUNG, 20, 50)
    if answers:
        sys.setswitchinterval(TURN)


class Loop(Protocol):
    """Something that runs until it is told to stop."""

    name: str

    def run(self, stop: threading.Event) -> None:
        """Return when `stop` is set and the work in hand is done. Called once, in a thread of its own."""


class Supervisor:
    """Runs the loops of one bridge. `grace` is how many seconds a soft stop may take."""

    def __init__(self, *, grace: float) -> None:
        self.stop = threading.Event()
        self.halt = threading.Event()
        self.asked = False  # to stop, by a signal
        self._grace = grace
        self._lock = threading.Lock()
        self._errors: list[Exception] = []
        self._threads: list[threading.Thread] = []

    @property
    def alive(self) -> bool:
        """Whether every loop that was started still runs."""
        return all(thread.is_alive() for thread in self._threads)

    def run(self, loops: Sequence[Loop]) -> None:
        """Run `loops` until `stop`, or until one of them ends. Call from the main thread.

        Raises the failure of the loop that failed, an ExceptionGroup when several failed of different things.
        """
        # daemons: a loop that hangs in a system call must not keep a halted process alive
        self._threads = [
            threading.Thread(target=self._run, args=(loop,), name=loop.name, daemon=True) for loop in loops
        ]
        for thread in self._threads:
            thread.start()
        self.stop.wait()
        self._join(self._grace)
        self.halt.set()
        self._join(_HALT_PATIENCE)
        for thread in self._threads:
            if thread.is_alive():
                _log.error("loop did not end", loop=thread.name, hint="nothing is lost, it was not acknowledged")
        if len(self._errors) == 1:
            raise self._errors[0]
        if self._errors:
            raise ExceptionGroup("several loops failed", self._errors)

    @contextmanager
    def signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT stop softly, a second one hard. One that waits, blocked, since before is heard, too.

        A handler runs in the middle of whatever the main thread does, which may have the lock of an event, or of the
        log: to ask for it there is to wait for oneself, for ever. So it does next to nothing; a thread does the rest.
        https://docs.python.org/3/library/signal.html#signal.set_wakeup_fd
        """

        def note(_number: int, _frame: FrameType | None) -> None:
            self.asked = True

        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        listener = threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True)
        listener.start()
        outer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        before = {number: signal.signal(number, note) for number in SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(outer)
            os.close(writer)  # the listener hears what is there, and ends
            listener.join(_HALT_PATIENCE)

    def _listen(self, reader: int) -> None:
        with open(reader, "rb", buffering=0) as heard:
            while number := heard.read(1):
                if number[0] not in SIGNALS:
                    continue
                if self.stop.is_set():
                    self.halt.set()
                self.stop.set()
                _log.info("stopping", signal=signal.Signals(number[0]).name, hard=self.halt.is_set())

    def _run(self, loop: Loop) -> None:
        try:
            loop.run(self.stop)
        except Stopped:
            pass
        except Exception as error:  # noqa: BLE001 (raised again by `run`, in the main thread)
            with self._lock:
                if (type(error), str(error)) not in [(type(it), str(it)) for it in self._errors]:
                    self._errors.append(error)  # two may find the same at the same time
            _log.error("loop failed", loop=loop.name, error=str(error))
        finally:
            self.stop.set()  # half a bridge is none: the others must not go on alone

    def _join(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            while thread.is_alive() and (left := deadline - time.monotonic()) > 0 and not self._hurried(seconds):
                thread.join(min(left, 0.1))

    def _hurried(self, seconds: float) -> bool:
        # a second signal cuts the soft stop short, not the few seconds that follow it
        return self.halt.is_set() and seconds == self._grace
