"""The reverse path as an AWS Lambda function: ``figbridge.functions.reverse.handler``, event source an SQS queue.

The event source mapping must ask for partial batch responses (``ReportBatchItemFailures``), or a batch of which one
message failed comes again as a whole; nothing would be applied twice, but what is dead would never leave the queue.
https://docs.aws.amazon.com/lambda/latest/dg/services-sqs-errorhandling.html#services-sqs-batchfailurereporting

INVARIANT. Only a message whose transaction has committed, or whose dead letter or place in the park is durable, is not
in the answer's failures. The same code as the sidecar's decides that (`figbridge.reverse.consume`); here it is given
deliveries instead of a queue, and Lambda deletes, or does not.

FIFO. After the first failure of a message group the rest of that group is in the failures, too, so that SQS hands the
group out again from there. https://docs.aws.amazon.com/lambda/latest/dg/services-sqs-fifo.html
What waits in the park is no failure. Which later events wait behind it, ``reverse.order`` says, as for the sidecar.

An event without ``Records``, such as EventBridge Scheduler sends, is for what else the sidecar does by itself: it looks
into the park and purges old keys. Without a schedule what is parked waits for the next message.

The database connection, the mappings and the clients live as long as the execution environment. Behind PgBouncer or
Amazon RDS Proxy (``legacy.reverse-dsn``) many environments share few connections. Section ``reverse`` of the
configuration; its ``source`` is not read here.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import structlog

from figbridge import canary, log
from figbridge.config import Config, ReverseSection
from figbridge.deadletter import TableDeadLetterStore
from figbridge.errors import BridgeError, ConfigError, Problem
from figbridge.functions import configuration
from figbridge.metrics import Metrics
from figbridge.retry import Stopped
from figbridge.reverse.purge import purge
from figbridge.reverse.setup import open_consumer, purged
from figbridge.transports import Delivery

_log = structlog.get_logger()

_RESERVE: Final = 2.0  # seconds before the function's end at which nothing is tried any more, to answer in time


@dataclass(frozen=True, slots=True)
class _Record:
    """A record of the event, as a delivery. https://docs.aws.amazon.com/lambda/latest/dg/with-sqs.html"""

    id: str
    group: str | None
    body: bytes
    attempts: int

    lost: ClassVar[bool] = False  # Lambda hides it for at least as long as the function may run

    @classmethod
    def of(cls, record: dict[str, Any]) -> "_Record":
        """Raises KeyError for what is no record of SQS."""
        attributes = record.get("attributes", {})
        group = attributes.get("MessageGroupId")
        body: str = record["body"]
        return cls(
            record["messageId"],
            None if group is None else f"{record['eventSourceARN'].rpartition(':')[2]}/{group}",
            body.encode(errors="surrogatepass"),
            int(attributes.get("ApproximateReceiveCount", 1)),
        )

    def ack(self) -> None:
        """Never called: messages are acknowledged together, by `_Records`."""
        raise NotImplementedError

    def nack(self, *, delay: float = 0.0) -> None:
        """Nothing to do: what is not acknowledged is in the answer's failures."""


class _Records:
    """The source of the consumer: it only notes what was acknowledged. See `figbridge.transports.Source`."""

    name = "lambda"

    def __init__(self) -> None:
        self.done: set[str] = set()

    def check(self) -> None:
        """Lambda has read the queue."""

    def receive(self, *, wait: float) -> Sequence[Delivery]:  # noqa: ARG002 (nothing comes later)
        """Nothing: Lambda calls."""
        return ()

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """Lambda deletes these."""
        self.done |= {it.id for it in deliveries if isinstance(it, _Record)}

    def close(self) -> None:
        """Nothing is held."""


class Function:
    """One execution environment."""

    def __init__(self) -> None:
        log.configure(level="INFO")
        self._config: Config = configuration()
        if self._config.reverse is None:
            problem = Problem("reverse", "is missing", "add the section; docs/reverse.md has an example")
            raise ConfigError("the function has nothing to do", [problem])
        self._section: ReverseSection = self._config.reverse
        self._dsn = self._config.legacy.write_dsn
        self.records = _Records()
        letters = TableDeadLetterStore(self._dsn)
        self.consumer = open_consumer(self._config, self._section, self.records, letters, Metrics())
        # without a forward path, or a commit, nothing can loop
        self._proven = self._config.forward is None or self._section.mode == "dry-run"

    def apply(self, records: Sequence[_Record], stop: threading.Event) -> None:
        """Handle `records` and what of the park may go. Raises Stopped, or BridgeError when only a human can help."""
        if not self._proven:
            canary.prove(self._dsn, self._config.legacy.slot, stop, self._config.legacy.loop_guard)
            self._proven = True
        self.consumer.handle(records, stop)

    def tidy(self) -> None:
        """What nobody else does where no sidecar runs. Raises LegacyUnavailable or BridgeError."""
        for kept in purged(self._section):
            purge(self._dsn, kept)


_function: Function | None = None


def handler(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """``{"batchItemFailures": [{"itemIdentifier": message id}, …]}`` of an SQS event; Lambda's entry point.

    Raises ConfigError when the configuration is not as it must be, KeyError for an event of another kind.
    """
    global _function  # noqa: PLW0603 (Lambda keeps a module from one event to the next, and nothing else)
    if _function is None:
        _function = Function()
    function, stop = _function, threading.Event()
    records = [_Record.of(it) for it in event.get("Records", ())]
    function.records.done = set()
    timer = threading.Timer(max(0.0, context.get_remaining_time_in_millis() / 1000 - _RESERVE), stop.set)
    timer.daemon = True
    timer.start()
    try:
        function.apply(records, stop)
        if not records:
            function.tidy()
    except (Stopped, BridgeError) as error:
        _log.error(
            "messages are left for another try",
            messages=len(records) - len(function.records.done),
            error=str(error) or "the function's time is over",
            hint=getattr(error, "hint", "") or "nothing is lost: the queue delivers them again",
        )
    except Exception:
        _function = None  # a bug: whatever it left behind, the next event begins anew
        function.consumer.close()
        raise
    finally:
        timer.cancel()
    return {"batchItemFailures": [{"itemIdentifier": it} for it in _failed(records, function.records.done)]}


def _failed(records: Sequence[_Record], done: set[str]) -> list[str]:
    """Those that are not done, and in a FIFO queue what is behind one of them in its group, in the order they came."""
    failed: list[str] = []
    stopped: set[str] = set()
    for record in records:
        if record.id not in done or record.group in stopped:
            failed.append(record.id)
            if record.group is not None:
                stopped.add(record.group)
    return failed
