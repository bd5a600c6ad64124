"""The command line: thin. Each command reads the file, calls one function, prints what it returns.

Exit status: 0 when all is well, 2 when the configuration or the set-up is wrong, 1 otherwise.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import click
from rich.console import Console
from rich.markup import escape

from figbridge import log
from figbridge.commands import config_option as _config_option
from figbridge.commands import reported as _reported
from figbridge.commands.dead_letters import dead_letters
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


main.add_command(dead_letters)


@main.command()
@_config_option
@click.option("--only", type=click.Choice(["forward", "reverse", "relay"]), help="Run only this of what the file has.")
@click.option(
    "--stay",
    type=click.FloatRange(min=1),
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


@main.group()
def conflicts() -> None:
    """What the events of the new system found otherwise than they expected, and who won."""


@conflicts.command("list")
@_config_option
@click.option("--all", "everything", is_flag=True, help="Also those that are decided, resolved or dismissed.")
@click.option("--kind", help="Only conflicts of this kind, such as update_conflict.")
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, help="At most so many.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document, with the values.")
def conflicts_list(path: Path, kind: str | None, limit: int, *, everything: bool, as_json: bool) -> None:
    """The conflicts that wait for a person, the newest first; without values."""
    with _reported():
        from figbridge.reverse import resolve  # noqa: PLC0415

        found = resolve.find(Config.load(path), state=None if everything else "open", kind=kind, most=limit)
        if as_json:
            click.echo(json.dumps([it.document() for it in found], indent=2))
            return
        for line in [resolve.told(it) for it in found] or ["there is none"]:
            click.echo(line)


@conflicts.command("show")
@_config_option
@click.argument("number", type=int)
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def conflicts_show(path: Path, number: int, *, as_json: bool) -> None:
    """One conflict, with the values: expected, before, proposed, after, and the event."""
    with _reported():
        from figbridge.reverse import resolve  # noqa: PLC0415

        found = resolve.get(Config.load(path), number)
        if as_json:
            click.echo(json.dumps(found.document(), indent=2))
            return
        for line in resolve.shown(found):
            click.echo(line)


@conflicts.command("resolve")
@_config_option
@click.argument("number", type=int)
@click.option(
    "--take",
    type=click.Choice(["new", "legacy", "dismiss"]),
    required=True,
    help="new: write the event's values. legacy: the row is right as it is. dismiss: it does not matter.",
)
@click.option("--force", is_flag=True, help="With new: also when the row has changed since.")
def conflicts_resolve(path: Path, number: int, take: Literal["new", "legacy", "dismiss"], *, force: bool) -> None:
    """Close a conflict, once; the new values are written as the bridge would write them."""
    with _reported():
        from figbridge.reverse import resolve  # noqa: PLC0415

        click.echo(resolve.resolve(Config.load(path), number, take, force=force))


@main.command()
@_config_option
@click.argument("tables", nargs=-1, metavar="[TABLE]...")
@click.option("--where", metavar="SQL", help="Only the rows for which this holds; with exactly one table.")
@click.option("--pause", "order", flag_value="pause", help="Stop reading after the chunk at hand.")
@click.option("--resume", "order", flag_value="resume", help="Go on where it was paused.")
@click.option("--cancel", "order", flag_value="cancel", help="Give it up; what has left has left.")
@click.option("--status", "only_status", is_flag=True, help="Say how far it is.")
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
    order: Literal["pause", "resume", "cancel"] | None,
    *,
    only_status: bool,
    followed: bool | None,
) -> None:
    """Send the rows that are there already, of all tables of the file or of TABLEs, through the running bridge."""
    with _reported():
        from figbridge.forward.snapshot import command  # noqa: PLC0415

        config = Config.load(path)
        if order:
            lines = command.order(config, tables, order)
        elif only_status:
            lines = [command.told(task) for task in command.status(config)] or ["there is none"]
        else:
            lines = command.request(config, tables, where)
        for line in lines:
            click.echo(line)
        console = Console(soft_wrap=True, highlight=False)
        if followed is None:
            followed = console.is_terminal and not order and not only_status
        try:
            if followed and not command.follow(config, console):
                sys.exit(1)
        except KeyboardInterrupt:
            click.echo("the snapshot goes on; `figbridge snapshot --status` says how far it is", err=True)
            sys.exit(130)


@main.group()
def schema() -> None:
    """JSON Schemas."""


@schema.command("config")
def schema_config() -> None:
    """The JSON Schema of the configuration file, for editors and CI."""
    click.echo(json.dumps(Config.model_json_schema(by_alias=True), indent=2))


@schema.command("event")
def schema_event() -> None:
    """The JSON Schema of the detail of every event of the forward path."""
    from importlib import resources  # noqa: PLC0415

    click.echo(
        resources.files("figbridge.contracts").joinpath("event.schema.json").read_text(encoding="utf-8"), nl=False
    )


@schema.command("events")
@_config_option
@click.option("--into", "directory", type=click.Path(path_type=Path), help="Write one file each into this directory.")
def schema_events(path: Path, directory: Path | None) -> None:
    """Contracts of the events of the file's tables, as they are now: a JSON Schema for each kind."""
    with _reported():
        from figbridge.contracts import of_file, write  # noqa: PLC0415
        from figbridge.forward import contract  # noqa: PLC0415

        found = contract.contracts(Config.load(path))
        if directory is None:
            click.echo(json.dumps({of_file(kind).as_posix(): made for kind, made in found.items()}, indent=2))
            return
        for written in write(directory, found):
            click.echo(written)


@schema.command("diff")
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", required=False, type=click.Path(path_type=Path))
@click.option("-c", "--config", "path", type=click.Path(path_type=Path), help="Instead of NEW: the live tables.")
def schema_diff(old: Path, new: Path | None, path: Path | None) -> None:
    """Say whom the way from the contracts in OLD to those in NEW breaks; exit status 1 if anybody."""
    with _reported():
        from figbridge.contracts import Contracts, difference, of_file  # noqa: PLC0415

        if (new is None) is (path is None):
            raise ConfigError(
                "compare with what?", [Problem("NEW", "name a directory, or a file with -c", "one of both")]
            )
        if path is not None:
            from figbridge.forward import contract  # noqa: PLC0415

            schemas = contract.contracts(Config.load(path))
        else:
            schemas = Contracts.load(new or old, "NEW").schemas
        breaks = [
            *difference.compare(Contracts.load(old, "OLD").schemas, schemas, lambda kind: of_file(kind).as_posix())
        ]
        for each in breaks:
            click.echo(str(each))
        if breaks:
            sys.exit(1)
        click.echo("nobody is broken")


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
