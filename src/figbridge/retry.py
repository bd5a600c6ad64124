"""The one retry policy, and the only importer of tenacity.

What to retry is a value: an error says of itself whether another try may help (`BridgeError.retryable`).
When is full jitter under an exponential ceiling, which empties a throttled service's queue fastest
(https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/), unless the error names a fixed pace
(`BridgeError.retry_after`): a stand-by replica that backed off would take the slot over a minute late.
Waiting ends the moment the bridge is asked to stop.

What the log says: every new trouble at once, the same one again every 30 s, so that a replica that waits for days
fills no disk. ERROR when only a human can end it (`BridgeError.urgent`), WARNING otherwise.
"""

import copy
import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

import structlog
import tenacity

from figbridge.errors import BridgeError

_log = structlog.get_logger()
T = TypeVar("T")

_SAY_AGAIN: Final = 30.0  # seconds between two lines of the log about the same trouble


class Stopped(Exception):
    """The bridge was asked to stop while something was still being tried."""


def wait_strategy(longest: float) -> tenacity.wait.wait_base:
    """Full jitter from 0 to an exponentially growing ceiling of at most `longest` seconds."""
    return tenacity.wait_random_exponential(multiplier=0.1, max=longest)


class _Pace(tenacity.wait.wait_base):
    """The error's own pace, or else backing off. Paced tries do not count as failures.

    A replica that has waited for days and then meets a connection that is cut must not wait 30 s for its next try.
    """

    def __init__(self, longest: float) -> None:
        self._backing_off = wait_strategy(longest)
        self._paced = 0

    def __call__(self, retry_state: tenacity.RetryCallState) -> float:
        error = retry_state.outcome.exception() if retry_state.outcome else None
        if isinstance(error, BridgeError) and error.retry_after is not None:
            self._paced = retry_state.attempt_number
            return error.retry_after
        failures = copy.copy(retry_state)
        failures.attempt_number -= self._paced
        return self._backing_off(failures)


class _Told:
    """What was logged last, and when."""

    def __init__(self) -> None:
        self._last: tuple[str, float] = ("", 0.0)

    def is_news(self, text: str) -> bool:
        """Whether the log should say `text` now."""
        now = time.monotonic()
        if text == self._last[0] and now - self._last[1] < _SAY_AGAIN:
            return False
        self._last = (text, now)
        return True


class Backoff:
    """The same policy for a caller that has other things to do meanwhile: it says how long, the caller waits."""

    def __init__(self, what: str, *, longest: float = 30.0) -> None:
        self._what = what
        self._longest = longest
        self._told = _Told()

    def seconds(self, error: BridgeError, attempt: int) -> float:
        """Until the next try, after the `attempt`-th failed with `error`; logged as `persist` does."""
        _tell(self._told, self._what, error, attempt)
        if error.retry_after is not None:
            return error.retry_after
        state = tenacity.RetryCallState(tenacity.Retrying(), None, (), {})
        state.attempt_number = attempt
        return wait_strategy(self._longest)(state)


def _tell(told: _Told, what: str, error: BridgeError, attempt: int) -> None:
    if told.is_news(str(error)):
        log = _log.error if error.urgent else _log.warning
        log("retrying", what=what, attempt=attempt, error=str(error), hint=error.hint or None)


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
    try:
        return action()  # nearly always; tenacity's own first try costs as much as applying a small batch does
    except BridgeError as error:
        if not error.retryable:
            raise
        failed: list[BridgeError] = [error]
    told = _Told()

    def again() -> T:
        if failed:
            raise failed.pop()
        return action()

    def before_sleep(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if not isinstance(error, BridgeError):
            return
        _tell(told, what, error, state.attempt_number)
        if on_retry:
            on_retry(error)

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, BridgeError) and error.retryable),
        wait=_Pace(longest),
        stop=tenacity.stop_when_event_set(stop),
        sleep=tenacity.sleep_using_event(stop),
        before_sleep=before_sleep,
    )
    try:
        return retrying(again)
    except tenacity.RetryError as error:
        raise Stopped from error
