"""Where events go to and come from: two protocols, and one file for each transport.

A **sink tries once**. It returns the entries that the service refused and raises when nothing is known; retry lives
in `figbridge.retry` and order in `figbridge.forward.publish`, so that no sink can get either wrong. (Debezium
Server's sinks each retry by hand; one of them sends a failed record after its later siblings.)

A **source hands out deliveries**, each of which is settled exactly once: acknowledged after the legacy transaction
committed, or released to be delivered again.

Transports do not know each other, and only this package knows boto3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, assert_never, runtime_checkable

from figbridge.config import (
    ClaimCheckSection,
    DeadLettersSection,
    EventBridgeSinkSection,
    EventBridgeV2SinkSection,
    FileDeadLetters,
    FileSinkSection,
    FirehoseSinkSection,
    KinesisSinkSection,
    KinesisSourceSection,
    LocalSinkSection,
    LocalSourceSection,
    PluginSection,
    ReverseSourceSection,
    S3DeadLetters,
    SinkSection,
    SnsSinkSection,
    SqsDeadLetters,
    SqsSinkSection,
    SqsSourceSection,
    StdoutSinkSection,
    TableDeadLetters,
)
from figbridge.deadletter import DeadLetterStore, FileDeadLetterStore, TableDeadLetterStore
from figbridge.event import Event, Rejection


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may hold and what the service does with it, as data: nobody asks a sink what it is.

    entries      most entries in a request
    entry_bytes  most bytes of one entry, by the sink's own `Sink.size`
    batch_bytes  most bytes of a request
    partial      the service may take some entries of a request and refuse others. Then a request never holds two
                 events of one key: were the first refused and the second taken, their order would be lost whatever
                 we do next.
    ordered      a consumer can read the events of one key in the order in which they were published
    dedup        seconds in which the service drops an event that comes again; 0: it does not, inf: for ever
    in_flight    most requests that may wait for the service's answer at once; 1: `Sink.publish` is called by one thread
    lines        most entries of a request that is `event.Lines`, whose bytes are no matter; 0: it is as any other
    """

    entries: int
    entry_bytes: int
    batch_bytes: int
    partial: bool
    ordered: bool = True
    dedup: float = 0.0
    in_flight: int = 1
    lines: int = 0


class Sink(Protocol):
    """Where events are published to.

    `check` is called once before anything, `publish` any number of times, by up to `Limits.in_flight` threads at once,
    `close` last. The same event may come again, under the same id.
    """

    @property
    def name(self) -> str:
        """The label of the sink in metrics and logs."""

    @property
    def limits(self) -> Limits:
        """See `Limits`. `check` may narrow it to what the destination itself is set to."""

    def size(self, event: Event) -> int:
        """Bytes that `event` counts for, by the service's own formula."""

    def check(self) -> None:
        """Prove that the destination exists and may be written to.

        Raises SinkRefused with the remedy if not, SinkUnavailable if it did not answer.
        """

    def publish(self, events: Sequence[Event]) -> Sequence[Rejection]:
        """Try once, within `limits`. Return the refused entries; all others are durable when this returns.

        Raises SinkUnavailable when it is not known that any was accepted, SinkRefused when none ever will be.
        """

    def close(self) -> None:
        """Release what is held. May be called twice."""


@runtime_checkable
class Exclusive(Protocol):
    """A sink that nobody else can write to while this process has it."""

    def let_go(self) -> None:
        """Leave it to another replica until the next `Sink.publish`. Called while nothing is published."""


class Deposit(Protocol):
    """Where the body of an event is kept that is too large for the sink."""

    def check(self) -> None:
        """Prove that it exists. Raises SinkRefused with the remedy if not, SinkUnavailable."""

    def deposit(self, event: Event) -> Event:
        """Keep `event`; a small one of the same id that says where. Raises SinkRefused, SinkUnavailable."""

    def close(self) -> None:
        """Release what is held."""


class Delivery(Protocol):
    """One message of a source, in our hands until it is settled by exactly one of `ack` and `nack`."""

    @property
    def body(self) -> bytes:
        """The message as it came; it may be anything at all."""

    @property
    def attempts(self) -> int:
        """How often it has been delivered, this time included; 1 for the first."""

    @property
    def lost(self) -> bool:
        """Whether somebody else may have it by now, so that it must not be applied here any more."""

    @property
    def group(self) -> str | None:
        """The message group it came in, under a name that no other queue's has; None where there are no groups."""

    def ack(self) -> None:
        """It is done with. Call only after the legacy transaction committed. Raises QueueUnavailable."""

    def nack(self, *, delay: float = 0.0) -> None:
        """Deliver it again, not before `delay` seconds have passed. Raises QueueUnavailable."""


class Source(Protocol):
    """Where the new system's events come from. Called from one thread."""

    @property
    def name(self) -> str:
        """The label of the source in metrics and logs."""

    def check(self) -> None:
        """Prove that the queue exists and may be read. Raises QueueError with the remedy if not."""

    def receive(self, *, wait: float) -> Sequence[Delivery]:
        """Up to the transport's batch of messages, oldest first; empty after `wait` seconds without any.

        Raises QueueUnavailable when the queue does not answer.
        """

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """`Delivery.ack` of all of these deliveries of ours, for less. Raises QueueUnavailable; then call it again."""

    def close(self) -> None:
        """Release what is held; unsettled messages will be delivered again. May be called twice."""


def open_sink(section: SinkSection) -> Sink:  # noqa: C901, PLR0911 (one for each)
    """The sink that a configuration section describes. Imports its transport only now: boto3 costs 0.2 s."""
    match section:
        case FileSinkSection():
            from figbridge.transports.file import FileSink  # noqa: PLC0415

            return FileSink(section.path)
        case StdoutSinkSection():
            from figbridge.transports.stdout import StdoutSink  # noqa: PLC0415

            return StdoutSink()
        case LocalSinkSection():
            from figbridge.transports.local import LocalSink  # noqa: PLC0415

            return LocalSink(section.path)
        case EventBridgeSinkSection():
            from figbridge.transports.eventbridge import EventBridgeSink  # noqa: PLC0415

            return EventBridgeSink(section)
        case EventBridgeV2SinkSection():
            from figbridge.transports.eventbridge_v2 import EventBridgeV2Sink  # noqa: PLC0415

            return EventBridgeV2Sink(section)
        case KinesisSinkSection():
            from figbridge.transports.kinesis import KinesisSink  # noqa: PLC0415

            return KinesisSink(section)
        case FirehoseSinkSection():
            from figbridge.transports.firehose import FirehoseSink  # noqa: PLC0415

            return FirehoseSink(section)
        case SqsSinkSection():
            from figbridge.transports.sqs_sink import SqsSink  # noqa: PLC0415

            return SqsSink(section)
        case SnsSinkSection():
            from figbridge.transports.sns import SnsSink  # noqa: PLC0415

            return SnsSink(section)
        case PluginSection():
            opened: Sink = section.open()
            return opened
        case _:
            assert_never(section)


def open_deposit(section: ClaimCheckSection) -> Deposit:
    """Where large events are kept, as a configuration section describes it."""
    from figbridge.transports.claimcheck import ClaimChecks  # noqa: PLC0415

    return ClaimChecks(section)


def open_dead_letters(section: DeadLettersSection, dsn: str) -> DeadLetterStore:
    """The store of dead letters that a configuration section describes; `dsn` is the legacy database's."""
    match section:
        case TableDeadLetters():
            return TableDeadLetterStore(dsn)
        case FileDeadLetters():
            return FileDeadLetterStore(section.path)
        case S3DeadLetters():
            from figbridge.transports.s3_letters import S3DeadLetterStore  # noqa: PLC0415

            return S3DeadLetterStore(section)
        case SqsDeadLetters():
            from figbridge.transports.sqs_letters import SqsDeadLetterStore  # noqa: PLC0415

            return SqsDeadLetterStore(section)
        case _:
            assert_never(section)


def open_source(section: ReverseSourceSection, dsn: str = "") -> Source:
    """The source that a configuration section describes; one of a stream keeps its place in the database of `dsn`."""
    match section:
        case LocalSourceSection():
            from figbridge.transports.local import LocalSource  # noqa: PLC0415

            return LocalSource(section.path, subscriber=section.subscriber, sources=section.sources)
        case SqsSourceSection():
            from figbridge.transports.sqs import SqsSource  # noqa: PLC0415

            return SqsSource(section)
        case KinesisSourceSection():
            from figbridge.transports.kinesis_source import KinesisSource  # noqa: PLC0415

            return KinesisSource(section, dsn)
        case PluginSection():
            opened: Source = section.open()
            return opened
        case _:
            assert_never(section)
