"""README's tables against the code: what a newcomer reads is what the bridge does.

A failure prints the table as it should be; paste it between the markers.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
from click.testing import CliRunner
from prometheus_client import Counter, Histogram
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from figbridge import cli
from figbridge.config import Config
from figbridge.metrics import Metrics

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def _between(name: str) -> str:
    match = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", README, re.DOTALL)
    assert match, f"README has no part marked {name}"
    return match[1]


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Annotated, Union, UnionType, tuple):
        for argument in get_args(annotation):
            yield from _models(argument)


def _settings(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        models = list(_models(field.annotation))
        if name == "type":
            continue
        if field.description or not models:
            default = "required" if field.is_required() else field.get_default(call_default_factory=True)
            default = "" if default in (None, PydanticUndefined) or isinstance(default, BaseModel) else default
            shown = f"`{default}`" if default not in ("required", "", (), {}) else default or ""
            yield f"| `{key}` | {shown} | {(field.description or '').replace('|', '/').replace('<', '&lt;')} |"
        for inner in models:
            kind = inner.model_fields.get("type")
            label = f"({get_args(kind.annotation)[0]})" if kind else ""
            several = "[]" if get_origin(field.annotation) is tuple else ""
            yield from _settings(inner, f"{key}{label}{several}.")


def settings_table() -> str:
    return "\n".join(["| setting | default | meaning |", "|---|---|---|", *_settings(Config)])


def metrics_table() -> str:
    rows = ["| series | labels | meaning |", "|---|---|---|"]
    for metric in vars(Metrics()).values():
        if not hasattr(metric, "_documentation"):
            continue
        suffix = "_total" if isinstance(metric, Counter) else ""
        kind = " (histogram)" if isinstance(metric, Histogram) else ""
        labels = ", ".join(f"`{label}`" for label in metric._labelnames)
        rows.append(f"| `{metric._name}{suffix}`{kind} | {labels} | {metric._documentation} |")
    return "\n".join(rows)


def test_the_settings_table_is_the_configuration() -> None:
    assert _between("settings") == settings_table(), f"the table should be:\n{settings_table()}"


def test_the_metrics_table_is_what_is_exposed() -> None:
    assert _between("metrics") == metrics_table(), f"the table should be:\n{metrics_table()}"


@pytest.mark.parametrize("command", sorted(cli.main.commands))
def test_every_command_is_documented_and_answers_help(command: str) -> None:
    assert f"figbridge {command}" in README
    assert CliRunner().invoke(cli.main, [command, "--help"]).exit_code == 0


def test_the_quickstart_names_the_two_commands() -> None:
    assert "make demo" in README
    assert "make test" in README


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!http|#)([^)#]+)\)", README))))
def test_every_link_into_the_repository_leads_somewhere(path: str) -> None:
    assert (ROOT / path).exists()
