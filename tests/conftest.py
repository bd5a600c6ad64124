"""Lists the fixtures; each concern has a file of its own in tests/fixtures."""

import functools
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import HealthCheck, settings

# both would measure how busy the machine is
settings.register_profile("figbridge", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("figbridge")

pytest_plugins = ["fixtures.postgres", "fixtures.aws", "fixtures.chance"]


@pytest.fixture(autouse=True)
def _log_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A logger that cached what one test configured would hide from `capture_logs` what the next one logs."""
    monkeypatch.setattr(structlog, "configure", functools.partial(_configure, structlog.configure))
    yield
    structlog.reset_defaults()


def _configure(configure: object, **settings: object) -> None:
    assert callable(configure)
    configure(**settings | {"cache_logger_on_first_use": False})
