"""`figbridge schema`: JSON Schemas, and whom the way from one to another breaks."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from figbridge.commands import config_option, reported
from figbridge.config import Config
from figbridge.errors import ConfigError, Problem

if TYPE_CHECKING:
    from figbridge.contracts import Kind


@click.group()
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
@config_option
@click.option("--into", "directory", type=click.Path(path_type=Path), help="Write one file each into this directory.")
def schema_events(path: Path, directory: Path | None) -> None:
    """Contracts of the events of the file's tables, as they are now: a JSON Schema for each kind."""
    with reported():
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
    with reported():
        from figbridge.contracts import difference, of_file  # noqa: PLC0415

        if (new is None) is (path is None):
            raise ConfigError(
                "compare with what?", [Problem("NEW", "name a directory, or a file with -c", "one of both")]
            )
        if path is not None:
            from figbridge.forward import contract  # noqa: PLC0415

            after = contract.contracts(Config.load(path))
            (before,) = _loaded({"OLD": old})
        else:
            before, after = _loaded({"OLD": old, "NEW": new or old})
        breaks = [*difference.compare(before, after, lambda kind: of_file(kind).as_posix())]
        for each in breaks:
            click.echo(str(each))
        if breaks:
            sys.exit(1)
        click.echo("nobody is broken")


def _loaded(directories: dict[str, Path]) -> "list[dict[Kind, Any]]":
    """The contracts of each directory. Raises ConfigError with what is wrong in all of them."""
    from figbridge.contracts import Contracts  # noqa: PLC0415

    loaded, problems = [], list[Problem]()
    for where, directory in directories.items():
        try:
            loaded.append(Contracts.load(directory, where).schemas)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError("there is nothing to compare", problems)
    return loaded
