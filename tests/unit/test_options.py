"""Options that no clock can hold."""

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
