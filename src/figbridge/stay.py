"""`figbridge run --stay`: a bridge that stopped for good keeps its process, and with it its container.

    run ──fails──▶ says why ──▶ live and not ready, for so many seconds ──▶ the same command anew, under the same number
                                └── SIGTERM, SIGINT ──▶ ends with the status of the failure

A pod is ready only while each of its containers runs. A sidecar that ends, and again at each restart until a person has
mended the cause (a lost slot, an event that the sink refuses), would take the legacy database out of its Service:
https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/#pod-conditions

The next attempt replaces the process (exec) and begins as a restarted container would, whatever the failed one left.

INVARIANT. No signal is lost on the way. To process 1 of a container one that it does not handle never came, and the
platform would wait for nothing until it kills. So between two who handle it, it is blocked, and waits.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence

import structlog

from figbridge.errors import SetupError
from figbridge.http import HttpServer
from figbridge.metrics import Metrics
from figbridge.service import GRACE
from figbridge.supervise import SIGNALS, Supervisor

_log = structlog.get_logger()


@contextlib.contextmanager
def staying(seconds: float, address: tuple[str, int], parts: Sequence[str]) -> Iterator[Supervisor]:
    """Run the block; when it fails, answer at `address` for `seconds` that no part is ready, and start anew.

    Yields what the block's loops run under. Its failure is raised when a signal came, before it or after.
    """
    supervisor = Supervisor(grace=GRACE)
    with supervisor.signals():
        try:
            yield supervisor
        except (Exception, SystemExit) as failure:
            if not isinstance(failure, SystemExit):  # nobody has reported a defect yet
                _log.exception("the bridge failed")
            _wait(seconds, address, parts, supervisor)
            raise


def _wait(seconds: float, address: tuple[str, int], parts: Sequence[str], failed: Supervisor) -> None:
    """Replace this process after `seconds`; return when a signal came, also before, or where nobody can be answered."""
    metrics, waiting = Metrics(), Supervisor(grace=0)
    for part in parts:
        metrics.ready.labels(part).set(0)
    with waiting.signals(), contextlib.suppress(SetupError):
        if failed.asked:
            return
        http = HttpServer(address, metrics, parts=parts, alive=lambda: True)
        try:
            _log.warning("stays, and starts anew", seconds=seconds, hint="the error before this says what to mend")
            waiting.stop.wait(seconds)
        finally:
            http.close()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        if not waiting.asked:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError, AttributeError):  # full, closed, or none at all
                    stream.flush()
            os.execv(sys.executable, sys.orig_argv)  # noqa: S606 (the command that we are)
