"""The command line: thin. Each command reads the file, calls one function, prints what it returns.

Exit status: 0 when all is well, 2 when the configuration or the set-up is wrong, 1 otherwise.
"""

import json
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import click
from rich.console import Console
from rich.markup import escape

from figbridge import log
from figbridge.commands import Seconds as _Seconds
from figbridge.commands import config_option as _config_option
from figbridge.commands import reported as _reported
from figbridge.commands.conflicts import conflicts
from figbridge.commands.dead_letters import dead_letters
from figbridge.commands.schema import schema
from figbridge.config import Config, Direction
from figbridge.errors import ConfigError, Problem

_MARKS = {"ok": "[green]ok[/]     ", "warning": "[yellow]warning[/]", "error": "[red]error[/]  "}

_LEVELS = ["DEBUG", "INFO", "WARNING", "ERROR"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="figbridge")
@click.option("--log-level", type=click.Choice(_LEVELS), default="INFO", show_default=True)
def main(log_level: str) -> None:
    """Legacy PostgreSQL changes out as events, new-system events back in, exactly once, without loops."""
    log.configure(level=log_level)


main.add_command(conflicts)
main.add_command(dead_letters)
main.add_command(schema)


@main.command()
@_config_option
@click.option("--only", type=click.Choice(["forward", "reverse", "relay"]), help="Run only this of what the file has.")
@click.option(
    "--stay",
    type=_Seconds(),
    metavar="SECONDS",
    help="Do not end where no retry helps: say why, be live and not ready, and start anew after so many seconds. For a "
    "sidecar, whose end makes its whole pod unready.",
)
def run(path: Path, only: Direction | None, stay: float | None) -> None:
    """Run the bridge until SIGTERM."""
    from figbridge import service  # noqa: PLC0415 (`--help` need not import the world)

    with _reported():  # without a file that can be read nobody knows where to listen, so nothing stays
        config = Config.load(path)
        parts = service.parts(config, only)
    if not stay:
        with _reported():
            service.run(config, only)
        return
    from figbridge.stay import staying  # noqa: PLC0415

    with staying(stay, config.http.address, parts) as supervisor, _reported():
        service.run(config, only, supervisor)


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
        # as Ctrl-C does: the server is told, or it would go on waiting for the slot and leave one behind
        signal.signal(signal.SIGTERM, signal.default_int_handler)
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
def mapping() -> None:
    """Try the mappings of the reverse path."""


@mapping.command("test")
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path))
@click.option(
    "--event",
    "event",
    required=True,
    type=click.Path(path_type=Path),
    help="A file with one event, as the queue has it.",
)
@click.option(
    "--execute",
    is_flag=True,
    help="Run the statements, show the rows' difference and what the rules for conflicts decide, and roll back.",
)
def mapping_test(path: Path, event: Path, execute: bool) -> None:
    """Show what an event becomes: its keys, its statements and, with --execute, what they would change."""
    with _reported():
        from figbridge.reverse import rehearse  # noqa: PLC0415
        from figbridge.reverse.bare import Bare  # noqa: PLC0415
        from figbridge.reverse.mapping import Mappings  # noqa: PLC0415

        config = Config.load(path)
        try:
            body = event.read_bytes()
        except OSError as error:
            what = error.strerror or "cannot be read"
            raise ConfigError("no event to test with", [Problem(str(event), what, "name a file")]) from error
        section = config.reverse
        bare = Bare(section.bare) if section and section.bare else None
        work = rehearse.prepare(Mappings(section.mappings if section else ()), body, bare)
        for line in rehearse.show(work):
            click.echo(line)
        if execute:
            dsn = config.legacy.dsn.get_secret_value()
            for line in rehearse.decide(config, work) if any(work.expected) else rehearse.rehearse(dsn, work):
                click.echo(line)


@main.command()
@_config_option
@click.argument("tables", nargs=-1, metavar="[TABLE]...")
@click.option(
    "--where",
    metavar="SQL",
    help="Only the rows for which this holds; with exactly one table. Times without a zone are UTC.",
)
@click.option("--pause", is_flag=True, help="Stop reading after the chunk at hand.")
@click.option("--resume", is_flag=True, help="Go on where it was paused.")
@click.option("--cancel", is_flag=True, help="Give it up; what has left has left.")
@click.option("--status", is_flag=True, help="Say how far it is.")
@click.option(
    "--follow/--no-follow",
    "followed",
    default=None,
    help="Stay, and show the progress until it has ended; by default in a terminal, when one is asked for.",
)
def snapshot(
    path: Path,
    tables: tuple[str, ...],
    where: str | None,
    *,
    followed: bool | None,
    **orders: bool,
) -> None:
    """Send the rows that are there already, of all tables of the file or of TABLEs, through the running bridge."""
    given = [name for name, is_given in orders.items() if is_given]
    if len(given) > 1:
        raise click.UsageError(f"--{given[0]} or --{given[1]}: give one of them")
    if given and where is not None:
        raise click.UsageError(f"--where is for a new snapshot: leave it out, or --{given[0]}")
    order = given[0] if given else None
    with _reported():
        from figbridge.forward.snapshot import command  # noqa: PLC0415

        config, well = Config.load(path), True
        match order:
            case "pause" | "resume" | "cancel":
                lines = command.order(config, tables, order)
            case "status":
                lines = command.report(config, tables) or ["there is none"]
            case _:
                lines, well = command.request(config, tables, where)
        for line in lines:
            click.echo(line)
        console = Console(soft_wrap=True, highlight=False)
        if followed is None:
            followed = console.is_terminal and not order
        try:
            if followed:
                well = command.follow(config, tables, console) and well
        except KeyboardInterrupt:
            click.echo("the snapshot goes on; `figbridge snapshot --status` says how far it is", err=True)
            sys.exit(130)
        if not well:
            sys.exit(1)


@main.command()
@click.option("--duration", type=_Seconds(), default=30.0, show_default=True, help="Seconds of work.")
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
