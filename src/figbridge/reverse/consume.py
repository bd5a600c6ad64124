"""The loop of the reverse path: receive, apply in order, settle.

    receive ──▶ for each delivery, in order:
                  parse, find; held back? ──▶ release       an earlier event of the same row waits
                  apply
                    APPLIED, DUPLICATE, IGNORED ──▶ acknowledge
                    RETRY           ──▶ release with a delay; after max_attempts deliveries a dead letter
                    poison          ──▶ dead letter, then acknowledge

Invariant: a delivery is acknowledged only after its transaction committed or its dead letter is durable. Whatever
ends the loop in between, the message comes again and finds its key or not.

A database or a queue that does not answer is waited for, however long it takes: that says nothing about the event,
so it is no reason for a dead letter. An exception that nobody foresaw ends the loop and so the bridge, with the
message unacknowledged: a bug must be loud, and must not eat events.

The log tells outcomes with ids, codes and names; never a value of the event, which may be personal data. Dead letters
do hold the event: guard them like the table it was for.
"""

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Final

import structlog

from figbridge.deadletter import DeadLetter, DeadLetters
from figbridge.errors import BridgeError, QueueUnavailable
from figbridge.event import Received
from figbridge.metrics import Metrics
from figbridge.retry import Stopped, persist
from figbridge.reverse.apply import UPDATE_MISSING, Applied, Applier, Outcome
from figbridge.reverse.mapping import Malformed, Mapping, Mappings, parse
from figbridge.reverse.waiting import Waiting
from figbridge.transports import Delivery, Source

_log = structlog.get_logger()

_WAIT = 2.0  # seconds of one empty receive, and so the longest that a soft stop waits for the queue
_FIRST_DELAY = 1.0  # seconds until an event that waits for another one is delivered again; doubles each time
_LONGEST_DELAY = 60.0
_SHORTEST_DELAY = 0.2  # of a held back event whose predecessor is due: without it the two of us would spin
_UNMAPPED: Final = Applied(Outcome.IGNORED, "unmapped")
_HELD_BACK: Final = Applied(Outcome.RETRY, "row_waits")


class Consumer:
    """One loop over one source, and the owner of what it is given: source, applier and store are closed at its end.

    `max_attempts` deliveries is what an event that waits for another one gets. `prepare` is called before the first
    receive (the loop guard's proof) and may raise Stopped.
    """

    name = "consume"

    def __init__(
        self,
        source: Source,
        mappings: Mappings,
        applier: Applier,
        dead_letters: DeadLetters,
        metrics: Metrics,
        *,
        max_attempts: int,
        prepare: Callable[[threading.Event], None] | None = None,
    ) -> None:
        self._source = source
        self._mappings = mappings
        self._applier = applier
        self._dead_letters = dead_letters
        self._metrics = metrics
        self._max_attempts = max_attempts
        self._prepare = prepare
        self._waiting = Waiting()

    def run(self, stop: threading.Event) -> None:
        """Consume until `stop` is set; then finish the delivery in hand and release the others.

        Raises BridgeError when only a human can help, and whatever a bug raises.
        """
        try:
            if self._prepare:
                self._prepare(stop)
            while not stop.is_set():
                deliveries = persist(lambda: self._source.receive(wait=_WAIT), what="receive", stop=stop)
                self._settle(deliveries, stop)
        except Stopped:
            pass
        finally:
            self._close()

    def _settle(self, deliveries: Sequence[Delivery], stop: threading.Event) -> None:
        for index, delivery in enumerate(deliveries):
            if stop.is_set():
                _release(deliveries[index:])
                raise Stopped
            try:
                self._handle(delivery, stop)
            except Stopped:
                # whether this one was settled is not known; released or not, a repetition is harmless
                _release(deliveries[index:])
                raise

    def _handle(self, delivery: Delivery, stop: threading.Event) -> None:
        """Apply and settle one delivery."""
        event: Received | None = None
        try:
            event = parse(delivery.body)
            mapping = self._mappings.find(event)
            if mapping is None:
                applied = _UNMAPPED
            elif (delay := self._held_back(event, mapping)) is not None:
                self._wait(delivery, event, mapping, _HELD_BACK, delay=delay, stop=stop)
                return
            else:
                applied = self._apply(event, mapping, stop)
                if applied.outcome is Outcome.RETRY and delivery.attempts < self._max_attempts:
                    self._wait(delivery, event, mapping, applied, delay=_delay(delivery.attempts), stop=stop)
                    return
        except Malformed as error:
            applied = Applied(Outcome.DEAD_LETTER, error.reason, str(error))
        if applied.outcome is Outcome.RETRY:
            message = f"{applied.message}; waited in vain for an earlier event"
            applied = Applied(Outcome.DEAD_LETTER, applied.reason, message)
        self._finish(delivery, event, applied, stop)

    def _held_back(self, event: Received, mapping: Mapping) -> float | None:
        if not self._waiting:  # nearly always; no path is evaluated for nothing
            return None
        delay = self._waiting.delay((event.source, event.id), mapping.target(event), makes_row=mapping.makes_row)
        return delay if delay is None else max(delay, _SHORTEST_DELAY)

    def _apply(self, event: Received, mapping: Mapping, stop: threading.Event) -> Applied:
        def once() -> Applied:
            with self._metrics.apply_seconds.time():
                return self._applier.apply(event, mapping)

        def count(_error: BridgeError) -> None:
            self._metrics.outcomes.labels(Outcome.RETRY.value).inc()

        return persist(once, what="apply", stop=stop, on_retry=count)

    def _wait(
        self,
        delivery: Delivery,
        event: Received,
        mapping: Mapping,
        applied: Applied,
        *,
        delay: float,
        stop: threading.Event,
    ) -> None:
        """Release `delivery` for `delay` seconds, and remember that its row waits."""
        _log.info(
            "event waits for another one",
            event_id=event.id,
            detail_type=event.detail_type,
            reason=applied.reason,
            attempts=delivery.attempts,
            delay=round(delay, 1),
        )
        key, target = (event.source, event.id), mapping.target(event)
        row_missing = applied.reason == UPDATE_MISSING or (applied is _HELD_BACK and self._waiting.for_row(key, target))
        self._waiting.add(key, target, delay, row_missing=row_missing)
        persist(lambda: delivery.nack(delay=delay), what="release", stop=stop)
        self._metrics.outcomes.labels(applied.outcome.value).inc()

    def _finish(self, delivery: Delivery, event: Received | None, applied: Applied, stop: threading.Event) -> None:
        """Tell what became of `delivery`, make its dead letter durable if it is one, and acknowledge it."""
        event_id = event.id if event else None
        if applied.outcome is Outcome.DEAD_LETTER:
            letter = DeadLetter(
                direction="reverse",
                event_id=event_id,
                reason=applied.reason,
                message=applied.message,
                attempts=delivery.attempts,
                body=delivery.body,
            )
            # before the acknowledgement: a crash between the two repeats both, and the letter stays one
            persist(lambda: self._dead_letters.add([letter]), what="write dead letter", stop=stop)
            _log.error(
                "event went to the dead letters", event_id=event_id, reason=applied.reason, dead_letter_id=letter.id
            )
        elif applied.outcome is not Outcome.APPLIED:
            _log.info(
                "event not applied",
                event_id=event_id,
                detail_type=event.detail_type if event else None,
                outcome=applied.outcome.value,
                reason=applied.reason or None,
            )
        persist(delivery.ack, what="acknowledge", stop=stop)
        if event:
            self._waiting.remove((event.source, event.id))
        self._metrics.outcomes.labels(applied.outcome.value).inc()

    def _close(self) -> None:
        with contextlib.ExitStack() as stack:  # all three, also when one of them fails
            stack.callback(self._dead_letters.close)
            stack.callback(self._applier.close)
            stack.callback(self._source.close)


def _delay(attempts: int) -> float:
    # the exponent is bounded first: the receive count of an old message would overflow a float
    return min(_FIRST_DELAY * 2.0 ** min(attempts - 1, 16), _LONGEST_DELAY)


def _release(deliveries: Sequence[Delivery]) -> None:
    """Give back at once what is not going to be handled. What cannot be given back comes again by itself."""
    for delivery in deliveries:
        with contextlib.suppress(QueueUnavailable):
            delivery.nack()
