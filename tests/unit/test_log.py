"""Standard error that takes nothing: the process goes on, counts, and ends with its own status."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
import structlog
from figbridge import log
from figbridge.metrics import Metrics
from prometheus_client import generate_latest

log.configure()
metrics = Metrics()
for number in range(3):
    structlog.get_logger().warning("a line", number=number, text="x" * 5000)
try:
    raise OSError("one")
except OSError:
    structlog.get_logger().exception("an error")
lines = generate_latest(metrics.registry).decode().splitlines()
print([it for it in lines if it.startswith("figbridge_log_lost_total")])
sys.exit(3)
"""


@pytest.mark.parametrize("where", ["2>/dev/full", "2>&-", "2>/dev/null"])
def test_a_log_that_cannot_be_written_harms_nobody(where: str) -> None:
    command = ["sh", "-c", f'exec "$@" {where}', "sh", sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == 3
    assert done.stdout.strip() == f"['figbridge_log_lost_total {0.0 if where == '2>/dev/null' else 4.0}']"


def test_a_log_that_nobody_reads_any_more_harms_nobody() -> None:
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        assert process.stdout
        process.stderr.close()
        assert process.stdout.read().strip() == "['figbridge_log_lost_total 4.0']"
        assert process.wait(60) == 3


@pytest.mark.parametrize("where", ["2>/dev/full", "2>&-"])
def test_a_command_that_cannot_say_why_it_fails_ends_with_its_status(where: str) -> None:
    command = [
        "sh",
        "-c",
        f'exec "$@" {where}',
        "sh",
        sys.executable,
        "-m",
        "figbridge",
        "check",
        "-c",
        "/no/such/file",
    ]
    assert subprocess.run(command, stdout=subprocess.DEVNULL, timeout=60, check=False).returncode == 2
