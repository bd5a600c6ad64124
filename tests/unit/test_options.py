"""Commands that are refused before anything is asked: times that no clock can hold, stores that nobody named."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from figbridge import cli


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--stay", "inf"],
        ["run", "--stay", "nan"],
        ["run", "--stay", "1e12"],
        ["demo", "--duration", "inf"],
        ["dead-letters", "list", "--since", "999999d"],
        ["dead-letters", "list", "--since", "0001-01-01T00:00:00+14:00"],
        ["dead-letters", "list", "--since", "yesterday"],
    ],
)
def test_a_time_that_cannot_be_is_refused(arguments: list[str]) -> None:
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 2, result.output
    assert f"Invalid value for '{arguments[-2]}'" in result.output


def test_a_relay_without_a_store_is_told_of_its_own_setting(tmp_path: Path) -> None:
    ends = "sink: {type: stdout}, quarantine: {type: file, path: aside}, contracts: contracts"
    (tmp_path / "relay.yaml").write_text(f"relay: {{{ends}}}")
    result = CliRunner().invoke(cli.main, ["dead-letters", "list", "-c", str(tmp_path / "relay.yaml")])
    assert result.exit_code == 2
    assert "name a store in relay.dead-letters" in result.output
    assert "forward" not in result.output
