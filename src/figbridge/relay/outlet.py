"""Where the relay's events go: the sink, the quarantine, the dead letters.

INVARIANT. `publish` and `set_aside` return only when every event they were given is durable somewhere, or, for
`publish`, is among those it returns because the sink never takes them. What the quarantine never takes goes to the dead
letters, and without these the relay stops: nothing is skipped.
"""

import threading
from collections.abc import Sequence

from prometheus_client import Counter

from figbridge.config import RelaySection
from figbridge.deadletter import DeadLetter, DeadLetters
from figbridge.delivery.flight import Flight, Shrink, Tally
from figbridge.errors import SinkRefused
from figbridge.event import Event, Rejection
from figbridge.metrics import Metrics
from figbridge.relay.judge import Invalid, Valid
from figbridge.retry import persist
from figbridge.transports import Sink, open_dead_letters, open_sink


class Outlet:
    """The ends of one loop, which closes them. `halt` ends all retrying: Stopped is raised then. For one thread."""

    def __init__(
        self,
        sink: Sink,
        quarantine: Sink | None,
        dead_letters: DeadLetters | None,
        metrics: Metrics,
        halt: threading.Event,
    ) -> None:
        self._sink = sink
        self._quarantine = quarantine
        self._dead_letters = dead_letters
        self._metrics = metrics
        self._halt = halt
        self._refused: list[Rejection] = []
        self._flights: dict[bool, Flight] = {}

    @classmethod
    def open(cls, section: RelaySection, dsn: str, metrics: Metrics, halt: threading.Event) -> "Outlet":
        """The ends that a configuration section describes. `dsn` is for dead letters in a table."""
        return cls(
            open_sink(section.sink),
            open_sink(section.quarantine) if section.quarantine else None,
            open_dead_letters(section.dead_letters, dsn) if section.dead_letters else None,
            metrics,
            halt,
        )

    def check(self) -> None:
        """Look the ends up, which also narrows their limits. Raises SinkRefused, SinkUnavailable."""
        for sink in (self._sink, self._quarantine):
            if sink is not None:
                sink.check()

    def publish(self, valid: Sequence[Valid]) -> list[Rejection]:
        """Return when the sink has all of them but those that it never takes, which are returned."""
        return self._fly(self._sink, [it.event for it in valid], self._tally(self._metrics.relayed))

    def set_aside(self, invalid: Sequence[Invalid], attempts: Sequence[int]) -> None:
        """Return when all of them are in the quarantine or the dead letters. `attempts`: how often each was received.

        Raises Stopped, and SinkRefused when there is no place for one.
        """
        left = list(range(len(invalid)))
        why: dict[str, str] = {}
        if self._quarantine is not None and invalid:
            tally = self._tally(self._metrics.quarantined)
            refused = self._fly(self._quarantine, [it.event for it in invalid], tally)
            why = {it.event.id: f"the quarantine: {it.code}: {it.message}; " for it in refused}
            left = [index for index in left if invalid[index].event.id in why]
        if not left:
            return
        store = self._dead_letters
        if store is None:
            event = invalid[left[0]].event
            raise SinkRefused(
                f"the quarantine does not take event {event.id}: {why[event.id]}",
                hint="nothing is skipped, so the relay stops here. Mend the cause, or set relay.dead-letters",
            )
        letters = [_letter(invalid[index], attempts[index], why) for index in left]
        persist(lambda: store.add(letters), what="write dead letters", stop=self._halt)
        self._metrics.relay_dead.inc(len(letters))

    def close(self) -> None:
        """Close the ends."""
        for flight in self._flights.values():
            flight.close()
        for end in (self._sink, self._quarantine, self._dead_letters):
            if end is not None:
                end.close()

    def _tally(self, taken: Counter) -> Tally:
        return Tally(taken, self._metrics.relay_rejected, self._metrics.relay_window)

    def _fly(self, sink: Sink, events: Sequence[Event], tally: Tally) -> list[Rejection]:
        if not events:
            return []
        flight = self._flights.get(sink is self._sink)
        if flight is None:
            persist(sink.check, what=f"look up {sink.name}", stop=self._halt)
            flight = Flight(sink, tally, self._halt, bury=self._bury, shrink=self._too_large(sink))
            self._flights[sink is self._sink] = flight
        self._refused = []
        flight.publish(events)
        return self._refused

    def _bury(self, rejections: Sequence[Rejection], _attempts: int) -> None:
        self._refused += rejections

    def _too_large(self, sink: Sink) -> Shrink:
        def refuse(event: Event, size: int) -> None:
            what = f"{size} bytes, and the sink takes {sink.limits.entry_bytes}"
            self._refused.append(Rejection(event, "EntryTooLarge", what, retryable=False))

        return refuse


def _letter(invalid: Invalid, attempts: int, why: dict[str, str]) -> DeadLetter:
    reasons = "; ".join(f"{it.path or '/'}: {it.message}" for it in invalid.breaches)
    message = why.get(invalid.event.id, "") + reasons
    return DeadLetter("relay", invalid.event.id, invalid.reason, message, attempts, invalid.body)
