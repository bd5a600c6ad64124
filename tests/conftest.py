"""Lists the fixtures; each concern has a file of its own in tests/fixtures."""

pytest_plugins = ["fixtures.postgres", "fixtures.aws"]
