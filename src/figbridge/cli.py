"""The command line: thin. Each command reads the file, calls one function, prints what it returns.

Exit status: 0 when all is well, 2 when the configuration or the set-up is wrong, 1 otherwise.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import click
from rich.console import Console
from rich.markup import escape

from figbridge import log
from figbridge.config import Config
from figbridge.errors import BridgeError

_MARKS = {"ok": "[green]ok[/]     ", "warning": "[yellow]warning[/]", "error": "[red]error[/]  "}

_LEVELS = ["DEBUG", "INFO", "WARNING", "ERROR"]

_config_option = click.option(
    "-c",
    "--config",
    "path",
    default="bridge.yaml",
    show_default=True,
    type=click.Path(path_type=Path),
    help="The configuration file.",
)


@contextmanager
def _reported() -> Iterator[None]:
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


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="figbridge")
@click.option("--log-level", type=click.Choice(_LEVELS), default="INFO", show_default=True)
def main(log_level: str) -> None:
    """Legacy PostgreSQL changes out as events, new-system events back in, exactly once, without loops."""
    log.configure(level=log_level)


@main.command()
@_config_option
@click.option("--only", type=click.Choice(["forward", "reverse"]), help="Run one direction of the file's two.")
def run(path: Path, only: Literal["forward", "reverse"] | None) -> None:
    """Run the bridge until SIGTERM."""
    with _reported():
        from figbridge import service  # noqa: PLC0415 (`--help` need not import the world)

        service.run(Config.load(path), only)


@main.command()
@_config_option
@click.option("--print-sql", is_flag=True, help="Print the SQL for a DBA and change nothing.")
def init(path: Path, print_sql: bool) -> None:
    """Create publication, slot and the figbridge schema; run it again after adding tables."""
    with _reported():
        from figbridge import provision  # noqa: PLC0415

        config = Config.load(path)
        if print_sql:
            click.echo(provision.script(config))
            return
        for line in provision.initialise(config):
            click.echo(line)


@main.command()
@_config_option
@click.option("--json", "as_json", is_flag=True, help="One JSON document, for a script.")
@click.option(
    "--stage",
    type=click.Choice(["init", "run"]),
    default="run",
    show_default=True,
    help="What must be in place: what `init` needs, or what `run` needs.",
)
def check(path: Path, as_json: bool, stage: Literal["init", "run"]) -> None:
    """Probe database, sink and source; every finding with its remedy."""
    with _reported():
        from figbridge import preflight  # noqa: PLC0415

        findings = preflight.inspect(Config.load(path), stage)
        if as_json:
            click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
        else:
            console = Console(soft_wrap=True, highlight=False)
            for finding in findings:
                console.print(f"{_MARKS[finding.level]} {escape(finding.where)}: {escape(finding.what)}")
                if finding.remedy and finding.level != "ok":
                    console.print(f"        remedy: {escape(finding.remedy)}")
        if any(finding.level == "error" for finding in findings):
            sys.exit(2)


@main.command()
@_config_option
@click.option(
    "--drop-schema",
    is_flag=True,
    help="Also drop the figbridge schema: the memory of what was applied, and the dead letters.",
)
@click.confirmation_option(prompt="Drop the slot and the publications? Changes from now on will not be captured.")
def teardown(path: Path, drop_schema: bool) -> None:
    """Remove what `init` made; the legacy tables stay as they are."""
    with _reported():
        from figbridge import provision  # noqa: PLC0415

        for line in provision.teardown(Config.load(path), keep_schema=not drop_schema):
            click.echo(line)


@main.group()
def schema() -> None:
    """JSON Schemas."""


@schema.command("config")
def schema_config() -> None:
    """The JSON Schema of the configuration file, for editors and CI."""
    click.echo(json.dumps(Config.model_json_schema(by_alias=True), indent=2))


@main.command()
@click.option("--duration", type=click.FloatRange(min=1), default=30.0, show_default=True, help="Seconds of work.")
@click.option(
    "--bus",
    type=click.Choice(["local", "aws-emulator"]),
    default="local",
    show_default=True,
    help="The embedded bus, or EventBridge and SQS through boto3 on an emulator.",
)
@click.option("--chaos", is_flag=True, help="kill -9 the bridge every few seconds.")
def demo(duration: float, bus: Literal["local", "aws-emulator"], chaos: bool) -> None:
    """A legacy system, the bridge and a new system, live on this machine; nothing to install."""
    with _reported():
        from figbridge.demo import story  # noqa: PLC0415

        runner: Callable[..., int] = story.run
        sys.exit(runner(duration, bus, chaos=chaos))
