"""The one retry policy, and the only importer of tenacity.

What to retry is a value: an error says of itself whether another try may help (`BridgeError.retryable`).
When is full jitter under an exponential ceiling, which empties a throttled service's queue fastest
(https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).
Waiting ends the moment the bridge is asked to stop.
"""

import threading
from collections.abc import Callable
from typing import TypeVar

import structlog
import tenacity

from figbridge.errors import BridgeError

_log = structlog.get_logger()
T = TypeVar("T")


class Stopped(Exception):
    """The bridge was asked to stop while something was still being tried."""


def wait_strategy(longest: float) -> tenacity.wait.wait_base:
    """Full jitter from 0 to an exponentially growing ceiling of at most `longest` seconds."""
    return tenacity.wait_random_exponential(multiplier=0.1, max=longest)


def persist(
    action: Callable[[], T],
    *,
    what: str,
    stop: threading.Event,
    longest: float = 30.0,
    on_retry: Callable[[BridgeError], None] | None = None,
) -> T:
    """Call `action` until it returns; retry while its error says `retryable`.

    There is no last attempt: a bridge that gives up at 3 a.m. helps nobody, and the slot keeps our place.
    `longest` is the longest wait between two tries, in seconds.
    Raises Stopped once `stop` is set, and at once whatever is not retryable.
    """

    def before_sleep(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if not isinstance(error, BridgeError):
            return
        _log.warning("retrying", what=what, attempt=state.attempt_number, error=str(error), hint=error.hint or None)
        if on_retry:
            on_retry(error)

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, BridgeError) and error.retryable),
        wait=wait_strategy(longest),
        stop=tenacity.stop_when_event_set(stop),
        sleep=tenacity.sleep_using_event(stop),
        before_sleep=before_sleep,
    )
    try:
        return retrying(action)
    except tenacity.RetryError as error:
        raise Stopped from error
