"""What the kernel knows of a process. Linux only.

https://man7.org/linux/man-pages/man5/proc_pid_status.5.html: VmHWM is the peak of the resident set, VmRSS its size now.
Not getrusage's ru_maxrss, which a child inherits from the process that started it.
"""

import contextlib
import re
import resource
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_LOOK = 0.05  # seconds between two looks at a program's memory


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes, those of shared libraries included."""

    resident: int
    peak: int


@dataclass(frozen=True, slots=True)
class Finished:
    """A program that ended well: wall clock and CPU (user and system) seconds, peak memory in bytes, its output."""

    seconds: float
    cpu: float
    peak: int
    output: str


def memory(pid: int) -> Memory:
    """Of a process that runs. Raises ProcessLookupError when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError as error:
        raise ProcessLookupError(pid) from error
    found = re.findall(r"^(Vm\w+):\s+(\d+) kB$", status, re.MULTILINE)
    sizes = {name: 1024 * int(kilobytes) for name, kilobytes in found}
    if "VmHWM" not in sizes:  # a zombie has no memory any more
        raise ProcessLookupError(pid)
    return Memory(sizes["VmRSS"], sizes["VmHWM"])


def run(command: Sequence[str], *, deadline: float, cwd: str | None = None) -> Finished:
    """Run a program to its end; one at a time, for the CPU time of all children that ended meanwhile is its own.

    Raises RuntimeError with what it said when it fails; after `deadline` seconds it is killed, which is a failure.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        ended, peaks, used = threading.Event(), [0], cpu_seconds(resource.RUSAGE_CHILDREN)
        began = time.monotonic()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, cwd=cwd)

        def watch() -> None:
            while not ended.wait(_LOOK):
                with contextlib.suppress(ProcessLookupError):  # ended at this moment
                    peaks.append(memory(process.pid).peak)
                if time.monotonic() - began > deadline:
                    process.kill()

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            process.wait()  # without a timeout, with which it would look 20 times a second: too coarse a clock
            seconds = time.monotonic() - began
        finally:
            process.kill()
            process.wait()
            ended.set()
            watcher.join()
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"{command[0]} ended with {process.returncode}: {errors.read()[-3000:]}")
        return Finished(seconds, cpu_seconds(resource.RUSAGE_CHILDREN) - used, max(peaks), output.read())


def cpu_seconds(who: int = resource.RUSAGE_SELF) -> float:
    """User and system time of this process, or of its ended children (RUSAGE_CHILDREN)."""
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime
