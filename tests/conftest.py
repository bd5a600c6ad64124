"""Lists the fixtures; each concern has a file of its own in tests/fixtures."""

import functools
import gc
import os
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import HealthCheck, settings

# Whoever waits for the tests of a change asks whether the change broke something: the same examples each time. Whoever
# looks for what nobody knows yet says so: FIGBRIDGE_TEST_SEARCH=1 make test TEST_ARGS="-k property"
# Deadlines and slowness would measure how busy the machine is.
settings.register_profile(
    "figbridge",
    deadline=None,
    derandomize="FIGBRIDGE_TEST_SEARCH" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("figbridge")

pytest_plugins = ["fixtures.postgres", "fixtures.aws", "fixtures.chance"]


def pytest_collection_finish() -> None:
    """All that was imported, and four thousand tests: to look at them again and again took a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture(autouse=True)
def _log_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A logger that cached what one test configured would hide from `capture_logs` what the next one logs."""
    monkeypatch.setattr(structlog, "configure", functools.partial(_configure, structlog.configure))
    yield
    structlog.reset_defaults()


def _configure(configure: object, **settings: object) -> None:
    assert callable(configure)
    configure(**settings | {"cache_logger_on_first_use": False})
