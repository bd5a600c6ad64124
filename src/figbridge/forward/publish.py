"""Events → sink: cut to its limits, in order per key, retried, dead-lettered, never skipped.

INVARIANT: `Publisher.publish` returns only when every event is durable, at the sink or in the dead letters.

A sink that can refuse single entries never gets two events of one key in one request: were the first refused and the
second taken, no retry could restore their order. The refused ones are repeated before anything later is sent.
"""

import threading
from collections.abc import Iterator, Sequence

import structlog

from figbridge.deadletter import DeadLetter, DeadLetters
from figbridge.errors import SinkRefused, SinkUnavailable
from figbridge.event import Event, Rejection
from figbridge.metrics import Metrics
from figbridge.retry import persist
from figbridge.transports import Sink

_log = structlog.get_logger()


class EntriesRefused(SinkUnavailable):
    """Some entries were refused for now (throttled, an internal failure); the others of the request are durable."""


class Publisher:
    """Publishes for one thread. `halt` ends all retrying: Stopped is raised then, and nothing is acknowledged."""

    def __init__(self, sink: Sink, dead_letters: DeadLetters | None, metrics: Metrics, halt: threading.Event) -> None:
        self._sink = sink
        self._dead_letters = dead_letters
        self._metrics = metrics
        self._halt = halt
        self._published = metrics.published.labels(sink.name)

    def publish(self, events: Sequence[Event]) -> None:
        """Return when every one of `events` is durable.

        Raises Stopped when `halt` is set, SinkRefused when the sink never takes an event and there is no dead-letter
        store to put it in.
        """
        for request in self._requests(events):
            self._send(request)

    def _requests(self, events: Sequence[Event]) -> Iterator[list[Event]]:
        """Cut `events` into requests within the sink's limits; what fits into none goes to the dead letters."""
        limits, size_of = self._sink.limits, self._sink.size
        request: list[Event] = []
        room, keys = limits.batch_bytes, set[str]()
        for event in events:
            size = size_of(event)
            if size > limits.entry_bytes:
                if request:  # what is before it goes first: its dead letter must not overtake them
                    yield request
                    request, room, keys = [], limits.batch_bytes, set()
                what = f"{size} bytes, and the sink takes {limits.entry_bytes}"
                self._bury([Rejection(event, "EntryTooLarge", what, retryable=False)], attempts=0)
                continue
            if request and (len(request) >= limits.entries or size > room or (limits.partial and event.key in keys)):
                yield request
                request, room, keys = [], limits.batch_bytes, set()
            request.append(event)
            room -= size
            if limits.partial:
                keys.add(event.key)
        if request:
            yield request

    def _send(self, request: list[Event]) -> None:
        remaining: Sequence[Event] = request
        attempts = 0

        def attempt() -> None:
            nonlocal remaining, attempts
            attempts += 1
            rejections = self._sink.publish(remaining)
            self._published.inc(len(remaining) - len(rejections))
            for rejection in rejections:
                self._metrics.rejected.labels(self._sink.name, rejection.code).inc()
            # what is left is recorded before anything can fail: entries that were taken are never sent again
            remaining = [rejection.event for rejection in rejections if rejection.retryable]
            hopeless = [rejection for rejection in rejections if not rejection.retryable]
            if hopeless:
                self._bury(hopeless, attempts=attempts)
            if remaining:
                codes = ", ".join(sorted({rejection.code for rejection in rejections if rejection.retryable}))
                raise EntriesRefused(f"{len(remaining)} of {len(request)} entries were refused for now: {codes}")

        persist(attempt, what=f"publish to {self._sink.name}", stop=self._halt)

    def _bury(self, rejections: Sequence[Rejection], *, attempts: int) -> None:
        first = rejections[0]
        if self._dead_letters is None:
            raise SinkRefused(
                f"the sink {self._sink.name} refuses event {first.event.id}: {first.code}: {first.message}",
                hint="nothing is skipped, so the bridge stops here. Mend the cause, or set forward.dead-letters "
                "to keep such events aside and go on",
            )
        letters = [
            DeadLetter("forward", it.event.id, it.code, it.message, attempts, it.event.envelope()) for it in rejections
        ]
        store = self._dead_letters
        persist(lambda: store.add(letters), what="write dead letters", stop=self._halt)
        self._metrics.forward_dead.inc(len(letters))
        for it in rejections:
            _log.error("event dead-lettered", event_id=it.event.id, code=it.code, reason=it.message)
