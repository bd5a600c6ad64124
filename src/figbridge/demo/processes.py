"""The processes of the demo: each in a session of its own, its diagnostics in a log file, its end guaranteed.

A part of the story (the legacy application, the new system) reads orders from standard input and reports on standard
output, one JSON object a line; the bridge does neither, because a sidecar does not.
"""

import dataclasses
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Generic, TextIO, TypeVar

from figbridge.demo.guard import Guard

STOP: Final = "stop"
_TAIL: Final = 3000  # characters of a log that a failure shows

R = TypeVar("R")


class ProcessDied(Exception):
    """A process ended that should not have. Carries the end of its log."""


class Child:
    """One running process. `log` is where its standard error goes."""

    def __init__(
        self, name: str, command: Sequence[str], *, log: Path, guard: Guard, environment: Mapping[str, str], talks: bool
    ) -> None:
        self.name, self.log, self._guard = name, log, guard
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talks else output,
                stderr=output,
                env=environment,
                start_new_session=True,  # Ctrl-C at the terminal is the demo's, which then ends all in order
            )
        guard.process(self._process.pid)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def check(self) -> None:
        """Raise ProcessDied if it has ended."""
        if (status := self._process.poll()) is not None:
            raise ProcessDied(f"the {self.name} ended with exit status {status}:\n{self.tail()}")

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-_TAIL:].strip() or "(its log is empty)"

    def kill(self) -> None:
        """As ``kill -9`` does."""
        self._process.kill()
        self._reap(None)

    def end(self, *, patience: float = 20.0) -> int:
        """Ask it to end (SIGTERM) and return its exit status. Raises ProcessDied when it does not within `patience`."""
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._reap(patience)
        except subprocess.TimeoutExpired:
            raise ProcessDied(f"the {self.name} did not end within {patience:.0f} s:\n{self.tail()}") from None

    def _reap(self, patience: float | None) -> int:
        status = self._process.wait(patience)
        self._guard.ended(self._process.pid)
        return status

    @property
    def pipes(self) -> tuple[Any, Any]:
        """(its standard input, its standard output); None where it has none."""
        return self._process.stdin, self._process.stdout


class Part(Generic[R]):
    """A child that reports: `report` is the newest one, made by `parse` from its JSON object."""

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        *,
        parse: Callable[..., R],
        log: Path,
        guard: Guard,
        environment: Mapping[str, str],
    ) -> None:
        self._child = Child(
            name,
            [sys.executable, "-m", module, *arguments],
            log=log,
            guard=guard,
            environment=environment,
            talks=True,
        )
        self._parse = parse
        self._reported = threading.Condition()
        self._report: R | None = None
        self._ended = False
        threading.Thread(target=self._listen, name=name, daemon=True).start()

    @property
    def report(self) -> R | None:
        """The newest report; None before the first."""
        return self._report

    def check(self) -> None:
        """Raise ProcessDied if it has ended."""
        self._child.check()

    def stop(self) -> None:
        """Tell it to change nothing any more. It goes on with the rest."""
        commands, _ = self._child.pipes
        commands.write(f"{STOP}\n".encode())
        commands.flush()

    def wait(self, condition: Callable[[R], bool], *, patience: float) -> R:
        """The first report for which `condition` holds, within `patience` seconds.

        Raises ProcessDied when it ends before, TimeoutError when it takes longer.
        """

        def satisfied() -> R | None:
            return self._report if self._report is not None and condition(self._report) else None

        with self._reported:
            found = self._reported.wait_for(lambda: self._ended or satisfied(), timeout=patience)
            if (report := satisfied()) is not None:
                return report
        if found:
            self._child.end()
            raise ProcessDied(f"the {self._child.name} ended:\n{self._child.tail()}")
        raise TimeoutError(f"the {self._child.name} did not get there within {patience:.0f} s: {self._report}")

    def _listen(self) -> None:
        _, lines = self._child.pipes
        try:
            for line in lines:
                report = self._parse(**json.loads(line))
                with self._reported:
                    self._report = report
                    self._reported.notify_all()
        finally:  # also when a line was no report, so that nobody waits for the next one
            with self._reported:
                self._ended = True
                self._reported.notify_all()


class Orders:
    """The other end, inside the part: what the demo has ordered.

    ``stop`` sets `stopping`. The end of standard input means that the demo is gone: `gone` is set, and `stopping` too.
    """

    def __init__(self, commands: TextIO = sys.stdin) -> None:
        self.stopping = threading.Event()
        self.gone = threading.Event()
        threading.Thread(target=self._listen, args=(commands,), name="orders", daemon=True).start()

    def _listen(self, commands: TextIO) -> None:
        for line in commands:
            if line.strip() == STOP:
                self.stopping.set()
        self.stopping.set()
        self.gone.set()


def say(report: Any, output: TextIO | None = None) -> None:
    """Report to the demo: a dataclass as one line of JSON, on `output` or standard output."""
    print(json.dumps(dataclasses.asdict(report)), file=output, flush=True)
