"""What the commands share: how the file is named, and how a failure is said. A large group has a file here."""

import math
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import click

from figbridge.errors import BridgeError

_WRITERS: Final = ("click.utils", "rich.console")

config_option = click.option(
    "-c",
    "--config",
    "path",
    default="bridge.yaml",
    show_default=True,
    type=click.Path(path_type=Path),
    help="The configuration file.",
)


class Seconds(click.FloatRange):
    """At least one second, at most a week: longer than that nobody waits, and a clock cannot at all."""

    def __init__(self) -> None:
        super().__init__(min=1, max=604_800)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """As click's, which lets nan pass."""
        seconds: float = super().convert(value, param, ctx)
        if math.isnan(seconds):
            self.fail(f"{value} is no number of seconds", param, ctx)
        return seconds


@contextmanager
def reported() -> Iterator[None]:
    """Say a failure as a person would want it at 3 a.m.: what, then the remedy; never a traceback for a known one."""
    try:
        yield
    except BridgeError as error:
        _say(error)
        sys.exit(error.exit_status)
    except ExceptionGroup as group:  # several loops failed at once
        known, unknown = group.split(BridgeError)
        if unknown is not None or known is None:
            raise
        errors = [error for error in known.exceptions if isinstance(error, BridgeError)]
        for failure in errors:
            _say(failure)
        sys.exit(max(failure.exit_status for failure in errors))


@contextmanager
def written() -> Iterator[None]:
    """Say when standard output takes nothing more, as on a full disk, and end with 1. What was done stays done."""
    try:
        yield
    except OSError as error:
        *_, (last, _) = traceback.walk_tb(error.__traceback__)
        if last.f_globals["__name__"] not in _WRITERS:
            raise
        click.echo(f"figbridge: standard output cannot be written: {error.strerror}", err=True)
        click.echo("  remedy: make room where it leads; what the command did until then is done", err=True)
        # what is left of it would fail once more at the end of the process
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _say(error: BridgeError) -> None:
    with suppress(OSError, ValueError):  # standard error may take nothing, and the exit status is to tell still
        click.echo(f"figbridge: {error}", err=True)
        if error.hint:
            click.echo(f"  remedy: {error.hint}", err=True)
