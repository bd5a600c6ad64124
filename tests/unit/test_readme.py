"""README and the pages of reference against the code: what a newcomer reads is what the bridge does."""

import importlib
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from figbridge import cli
from figbridge.transports.awssink import AwsSink
from fixtures import reference_page

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", ["settings", "metrics"])
def test_the_pages_of_reference_are_the_code(page: str) -> None:
    made = reference_page.settings() if page == "settings" else reference_page.metrics()

    assert (ROOT / "docs" / f"{page}.md").read_text() == made, "run `make docs`"


@pytest.mark.parametrize("type_", ["eventbridge", "eventbridge_v2", "kinesis", "sqs", "sns", "firehose"])
def test_the_rights_of_a_sink_are_what_it_calls(type_: str) -> None:
    module = importlib.import_module(f"figbridge.transports.{'sqs_sink' if type_ == 'sqs' else type_}")
    classes = [it for it in vars(module).values() if isinstance(it, type)]
    (sink,) = (it for it in classes if issubclass(it, AwsSink) and it.__module__ == module.__name__)

    (line,) = re.findall(rf"^\| `{type_}`(?:, a FIFO \w+)? \|.*$", README, re.MULTILINE)

    assert line.endswith(f"| `{sink.action}`, `{sink.look_up_action}` |")


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
