"""`figbridge conflicts`; `figbridge.reverse.resolve` does it."""

from pathlib import Path
from typing import Literal

import click
import orjson

from figbridge.commands import config_option, reported
from figbridge.config import Config


@click.group()
def conflicts() -> None:
    """What the events of the new system found otherwise than they expected, and who won."""


@conflicts.command("list")
@config_option
@click.option("--all", "everything", is_flag=True, help="Also those that are decided, resolved or dismissed.")
@click.option("--kind", help="Only conflicts of this kind, such as update_conflict.")
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, help="At most so many.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document, with the values.")
def conflicts_list(path: Path, kind: str | None, limit: int, *, everything: bool, as_json: bool) -> None:
    """The conflicts that wait for a person, the newest first; without values."""
    with reported():
        from figbridge.reverse import resolve  # noqa: PLC0415

        found = resolve.find(Config.load(path), state=None if everything else "open", kind=kind, most=limit)
        if as_json:
            click.echo(orjson.dumps([it.document() for it in found], option=orjson.OPT_INDENT_2))
            return
        for line in [resolve.told(it) for it in found] or ["there is none"]:
            click.echo(line)


@conflicts.command("show")
@config_option
@click.argument("number", type=int)
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def conflicts_show(path: Path, number: int, *, as_json: bool) -> None:
    """One conflict, with the values: expected, before, proposed, after, and the event."""
    with reported():
        from figbridge.reverse import resolve  # noqa: PLC0415

        found = resolve.get(Config.load(path), number)
        if as_json:
            click.echo(orjson.dumps(found.document(), option=orjson.OPT_INDENT_2))
            return
        for line in resolve.shown(found):
            click.echo(line)


@conflicts.command("resolve")
@config_option
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
    with reported():
        from figbridge.reverse import resolve  # noqa: PLC0415

        click.echo(resolve.resolve(Config.load(path), number, take, force=force))
