"""The demo as a person runs it, without a terminal: status 0, and the three proofs in plain lines."""

import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [[], ["--bus", "aws-emulator"], ["--chaos"]], ids=lambda it: "".join(it) or "local"
)
def test_the_demo_proves_what_it_shows(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "figbridge", "demo", "--duration", "6", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("\nproven ") == 3
    assert "nothing looped" in done.stdout
    assert "\x1b" not in done.stdout, "control characters where no terminal is"
    if "--chaos" in arguments:
        assert "killed with kill -9" in done.stdout
