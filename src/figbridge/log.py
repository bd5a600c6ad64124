"""One event a line on standard error: the message constant, the data in fields. JSON where nobody watches.

INVARIANT. A line that cannot be written, on a disk that is full or a pipe that nobody reads, is lost and counted, and
harms nobody: the bridge has changes to deliver.
"""

import atexit
import contextlib
import logging
import os
import sys
from collections.abc import Callable
from typing import Final

import structlog

LOST: Final[list[Callable[[], object]]] = []  # each is called for each line that is lost


def configure(*, level: str = "INFO") -> None:
    """Set structlog up for a process. Standard output stays free for the stdout sink."""
    watched = sys.stderr is not None and sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _without_empty,
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer() if watched else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level]),
        logger_factory=_Lines,
        cache_logger_on_first_use=True,
    )
    atexit.unregister(_give_up)
    atexit.register(_give_up)


class _Lines(structlog.PrintLogger):
    """Standard error, which may take nothing."""

    def __init__(self, *_: object) -> None:
        self._closed = sys.stderr is None  # as by `2>&-`; without a file the lines would go to standard output
        super().__init__(sys.stderr)

    def msg(self, message: str) -> None:
        """Print it, if that can be."""
        try:
            if not self._closed:
                super().msg(message)
                return
        except (OSError, ValueError):  # ValueError: somebody has closed it
            pass
        for told in LOST:
            told()

    log = debug = info = warn = warning = msg
    fatal = failure = err = error = critical = exception = msg


def _give_up() -> None:
    """What is in its buffer still would fail again at the end of the process, and change the exit status."""
    if sys.stderr is None:
        return
    try:
        sys.stderr.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _without_empty(_logger: object, _name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    return {key: value for key, value in event.items() if value is not None}
