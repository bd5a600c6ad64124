"""What the commands share: how the file is named, and how a failure is said. A large group has a file here."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from figbridge.errors import BridgeError

config_option = click.option(
    "-c",
    "--config",
    "path",
    default="bridge.yaml",
    show_default=True,
    type=click.Path(path_type=Path),
    help="The configuration file.",
)


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


def _say(error: BridgeError) -> None:
    click.echo(f"figbridge: {error}", err=True)
    if error.hint:
        click.echo(f"  remedy: {error.hint}", err=True)
