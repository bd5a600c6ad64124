"""The relay as an AWS Lambda function: handler ``figbridge.functions.relay.handler``, event source an SQS queue.

The event source mapping must ask for partial batch responses (``ReportBatchItemFailures``), or a batch of which one
message failed comes again as a whole:
https://docs.aws.amazon.com/lambda/latest/dg/services-sqs-errorhandling.html#services-sqs-batchfailurereporting

INVARIANT. Only a message that is durable at the sink, in quarantine or in the dead letters is not in the answer's
failures. What the service refuses for now is tried again until shortly before the function's time is over; what is left
then comes again, and so does all that was on its way: delivery is at least once, as everywhere.

Of a FIFO queue nothing behind a failure is published before it, as what fails is the end of a batch: Lambda hands out
no later message of a group whose batch failed.

`figbridge.relay` says what becomes of an event. Section ``relay`` of the configuration, without ``source``.
"""

import threading
from dataclasses import dataclass
from typing import Any, Final

import structlog

from figbridge import log
from figbridge.config import FileDeadLetters, FileSinkSection, LocalSinkSection, RelaySection
from figbridge.contracts import Contracts
from figbridge.errors import BridgeError, ConfigError, Problem
from figbridge.functions import configuration
from figbridge.metrics import Metrics
from figbridge.relay.judge import Judge
from figbridge.relay.outlet import Outlet
from figbridge.relay.relayer import Relayer
from figbridge.relay.seen import Seen
from figbridge.retry import Stopped

_log = structlog.get_logger()

_RESERVE: Final = 2.0  # seconds before the function's end at which nothing is tried any more, to answer in time


@dataclass(frozen=True, slots=True)
class _Record:
    """A record of the event. https://docs.aws.amazon.com/lambda/latest/dg/with-sqs.html"""

    id: str
    body: bytes
    attempts: int


class Function:
    """One execution environment: its clients live from one event to the next."""

    def __init__(self) -> None:
        log.configure(level="INFO")
        config = configuration()
        if config.relay is None:
            problem = Problem("relay", "is missing", "add the section; docs/relay.md has an example")
            raise ConfigError("the function has nothing to do", [problem])
        _require_durable(config.relay)
        section, metrics = config.relay, Metrics()
        contracts = Contracts.load(section.contracts, "relay.contracts")
        self.halt = threading.Event()
        outlet = Outlet.open(section, config.dsn_for(section.dead_letters), metrics, self.halt)
        self.relayer = Relayer(Judge(section, contracts), outlet, Seen(section.remember), metrics)


_function: Function | None = None


def handler(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """``{"batchItemFailures": [{"itemIdentifier": message id}, …]}`` of an SQS event; Lambda's entry point.

    Raises ConfigError when the configuration, the contracts or the ends are not as they must be.
    """
    global _function  # noqa: PLW0603 (Lambda keeps a module from one event to the next, and nothing else)
    if _function is None:
        _function = Function()
    function = _function
    records = [_record(it) for it in event["Records"]]
    done: set[int] = set()
    left = max(0.0, context.get_remaining_time_in_millis() / 1000 - _RESERVE)
    timer = threading.Timer(left, function.halt.set)
    timer.daemon = True
    timer.start()
    try:
        function.relayer.relay(records, done)
    except (Stopped, BridgeError) as error:
        # requests may still be on their way, and a key must not be in two at once: the next event begins anew
        _function = None
        function.halt.set()
        function.relayer.close()
        _log.error(
            "messages are left for another try",
            messages=len(records) - len(done),
            error=str(error) or "the function's time is over",
            hint=getattr(error, "hint", "") or "nothing is lost: the queue delivers them again",
        )
    finally:
        timer.cancel()
    failed = [record for index, record in enumerate(records) if index not in done]
    return {"batchItemFailures": [{"itemIdentifier": record.id} for record in failed]}


def _record(record: dict[str, Any]) -> _Record:
    attempts = int(record.get("attributes", {}).get("ApproximateReceiveCount", 1))
    return _Record(record["messageId"], record["body"].encode(errors="surrogatepass"), attempts)


def _require_durable(section: RelaySection) -> None:
    """A function's own disk is gone with it, and with it what was to be kept."""
    ends = [("relay.sink", section.sink), ("relay.quarantine", section.quarantine)]
    wrong = [where for where, end in ends if isinstance(end, FileSinkSection | LocalSinkSection)]
    wrong += ["relay.dead-letters"] * isinstance(section.dead_letters, FileDeadLetters)
    if wrong:
        what, remedy = "is on the function's own disk, which does not last", "name an end in AWS"
        raise ConfigError("nothing would be kept", [Problem(where, what, remedy) for where in wrong])
