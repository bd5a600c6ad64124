"""Events as JSON lines on standard output: for a first look and for pipes.

Invariant: when `StdoutSink.publish` returns, the lines have been handed to the reader of the pipe.
They are as durable as that reader makes them; nothing here can prove more.

Refuses to go on after a failed write: nobody knows then where the last line ended.
"""

import os
import sys
from collections.abc import Sequence
from typing import Final

from figbridge.errors import SinkRefused
from figbridge.event import Event, Rejection
from figbridge.transports import Limits

_LIMITS: Final = Limits(entries=1_000, entry_bytes=1 << 31, batch_bytes=1024 * 1024, partial=False)
_FRAME = 128  # bytes of a line that are neither attribute nor detail: keys, quotes, time


class StdoutSink:
    """Writes to ``sys.stdout``, whatever that is at the time."""

    name = "stdout"
    limits = _LIMITS

    def size(self, event: Event) -> int:
        """Bytes of the line, to within its escapes."""
        return len(event.detail) + len(event.id) + len(event.source) + len(event.detail_type) + _FRAME

    def check(self) -> None:
        """Standard output is there, if not closed. Raises SinkRefused."""
        if sys.stdout is None or sys.stdout.closed:
            raise SinkRefused("standard output is closed", hint="open it, or choose another sink")

    def publish(self, events: Sequence[Event]) -> Sequence[Rejection]:
        """Write `events`, a line each, and flush. Raises SinkRefused when the reader is gone."""
        if not events:
            return ()
        output = sys.stdout.buffer
        try:
            output.write(b"\n".join([event.body() for event in events]) + b"\n")
            output.flush()
        except BrokenPipeError as error:
            _discard_output()
            raise SinkRefused(
                "the reader of standard output is gone",
                hint="start it together with the bridge; what it did not read comes again under the same ids",
            ) from error
        except OSError as error:
            _discard_output()
            raise SinkRefused(
                f"cannot write to standard output: {error.strerror or error}",
                hint="mend what it is connected to and start again; the events come again under the same ids",
            ) from error
        return ()

    def close(self) -> None:
        """Standard output is not ours to close."""


def _discard_output() -> None:
    # What is left in the buffer would fail once more when the interpreter ends, with an exit status of 120:
    # https://docs.python.org/3/library/signal.html#note-on-sigpipe
    devnull = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(devnull, sys.stdout.fileno())
    finally:
        os.close(devnull)
