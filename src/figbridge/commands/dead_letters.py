"""`figbridge dead-letters`; `figbridge.letters` does it."""

import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from figbridge.commands import config_option, reported
from figbridge.config import Config

if TYPE_CHECKING:
    from figbridge.deadletter import Wanted


@click.group("dead-letters")
def dead_letters() -> None:
    """Events that could not be delivered or applied: look, mend the cause, try them again."""


class _Since(click.ParamType["datetime"]):
    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        from figbridge import letters  # noqa: PLC0415

        try:
            return letters.since(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Id(click.ParamType[str]):
    name = "id"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not str(value).strip():  # the beginning of every id
            self.fail("an empty ID would mean every letter; is a variable of a script not set?", param, ctx)
        return str(value)


def _filters(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.argument("ids", nargs=-1, type=_Id(), metavar="[ID]..."),
        click.option("--since", type=_Since(), help="Letters since then: 90m, 24h, 7d, or an ISO 8601 time."),
        click.option("--table", help="Letters about this table, as schema.table."),
        click.option("--reason", help="Letters with this reason, such as EntryTooLarge or 23505."),
        click.option(
            "--direction", type=click.Choice(["forward", "reverse", "relay"]), help="Letters of one direction."
        ),
        click.option("--json", "as_json", is_flag=True, help="A JSON object a line, for a script."),
        config_option,
    ):
        command = option(command)
    return command


@dead_letters.command("list")
@_filters
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, help="Most letters to show.")
def letters_list(path: Path, as_json: bool, limit: int, **wanted: Any) -> None:
    """List letters without their content, the oldest first where the store keeps an order.

    ID is the beginning of a letter's id, or an event's whole id.
    """
    with reported():
        from figbridge import letters  # noqa: PLC0415

        for line in letters.listed(Config.load(path), letters.Wanted(**wanted), limit, as_json=as_json):
            click.echo(line)


@dead_letters.command("show")
@_filters
def letters_show(path: Path, as_json: bool, **wanted: Any) -> None:
    """Show letters whole. They hold rows of the legacy database: mind who is looking."""
    with reported():
        from figbridge import letters  # noqa: PLC0415

        for text in letters.shown(Config.load(path), letters.Wanted(**wanted), as_json=as_json):
            click.echo(text)


@dead_letters.command("redrive")
@_filters
@click.option("--all", "everything", is_flag=True, help="All letters, when no filter is given.")
def letters_redrive(path: Path, as_json: bool, everything: bool, **wanted: Any) -> None:
    """Try letters again: publish them, or apply them, with the same checks as at first, and under the same ids."""
    with reported():
        from figbridge import letters  # noqa: PLC0415

        results = letters.redrive(Config.load(path), _meant(wanted, everything), as_json=as_json)
        for line in results:
            click.echo(line)
        if results.remaining:
            sys.exit(1)


@dead_letters.command("discard")
@_filters
@click.option("--all", "everything", is_flag=True, help="All letters, when no filter is given.")
@click.confirmation_option(prompt="Remove these letters for good?")
def letters_discard(path: Path, as_json: bool, everything: bool, **wanted: Any) -> None:
    """Remove letters for good."""
    with reported():
        from figbridge import letters  # noqa: PLC0415

        for line in letters.discard(Config.load(path), _meant(wanted, everything), as_json=as_json):
            click.echo(line)


def _meant(wanted: dict[str, Any], everything: bool) -> "Wanted":
    from figbridge import letters  # noqa: PLC0415

    if everything == any(wanted.values()):
        raise click.UsageError("say which letters: by id, or by filters; or --all, and then no filter")
    return letters.Wanted(**wanted)
