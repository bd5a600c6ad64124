"""The loop of the reverse path: receive, apply, settle; while a batch is applied, others are received and parsed.

    batch n     apply, in a thread of its own ─────▶ park what waits ▶ dead letters ▶ acknowledge
    batch n+1   receive ▶ prepare, in this thread ─▶ apply, as soon as nothing of n waits any more ▶ …

    APPLIED, DUPLICATE, IGNORED ──▶ acknowledged
    RETRY                       ──▶ parked, then acknowledged; comes again from the park (`park`)
    poison                      ──▶ dead letter, then acknowledged

Invariant: a delivery is acknowledged only after its transaction committed, or its dead letter or its place in the park
is durable, and only while it is ours: one that the source has lost meanwhile is rolled back before COMMIT
(`Delivery.lost`), for whoever has it now. Whatever ends the loop in between, the message comes again and finds its key
or not. A batch is applied only after what waits of the batch before it is parked, so no event overtakes another one of
its entity, or, where ``reverse.order`` says so, of its message group.

A database or a queue that does not answer is waited for, however long it takes: that says nothing about the event,
so it is no reason for a dead letter. An exception that nobody foresaw ends the loop and so the bridge, with the
message unacknowledged: a bug must be loud, and must not eat events.

The log tells outcomes with ids, codes and names; never a value of the event, which may be personal data. Dead letters
do hold the event: guard them like the table it was for.
"""

import contextlib
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import attrgetter
from typing import Any, Final, Literal

import structlog

from figbridge.deadletter import DeadLetters
from figbridge.errors import BridgeError, QueueUnavailable
from figbridge.event import Named
from figbridge.metrics import Metrics
from figbridge.retry import Stopped, persist
from figbridge.reverse.apply import Applier
from figbridge.reverse.drift import Drift
from figbridge.reverse.hands import Hand, Hands
from figbridge.reverse.item import NOBODYS, UNMAPPED, Item, Part, broken, cut, given_up, letter, tell
from figbridge.reverse.mapping import Mappings, Work
from figbridge.reverse.message import Enveloping, Malformed, parse
from figbridge.reverse.outcome import DONE, PING_PONG, TIMEOUTS, Applied, Outcome, contention
from figbridge.reverse.park import Park, Parked
from figbridge.reverse.slow import Slow
from figbridge.transports import Delivery, Source

_log = structlog.get_logger()

_LOST: Final = attrgetter("lost")
_WAIT: Final = 2.0  # seconds of one empty receive, and so the longest that a soft stop waits for the queue
_LOOK: Final = 0.25  # seconds between two looks into a park that is not empty
_LOOK_INTO_EMPTY: Final = 2.0  # and into one that was: another replica may have parked something


class Consumer:
    """One loop over one source, and the owner of what it is given: source, applier and store are closed at its end.

    `park_timeout` is how many seconds an event may wait for another one, `batch_size` the most events of a transaction,
    `max_hops` the most bridges that an event may have passed, `bare` what makes an envelope where there is none,
    `unmapped` what becomes of an event that no mapping is for (a parked one is a dead letter), `order` what events
    wait in: their entity alone, or also their message group (`Delivery.group`).
    `prepare` is called before the first receive (the loop guard's proof) and may raise Stopped.
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
        park_timeout: float,
        batch_size: int = 500,
        max_hops: int = 8,
        bare: Enveloping | None = None,
        unmapped: Literal["ignore", "dead-letter"] = "ignore",
        order: Literal["entity", "group"] = "entity",
        drift: Drift | None = None,
        prepare: Callable[[threading.Event], None] | None = None,
    ) -> None:
        self._source = source
        self._mappings = mappings
        self._applier = applier
        self._dead_letters = dead_letters
        self._metrics = metrics
        self._batch_size = batch_size
        self._max_hops = max_hops
        self._bare = bare
        self._unmapped = UNMAPPED if unmapped == "ignore" else NOBODYS
        self._in_groups = order == "group"
        self._drift = drift
        self._prepare_start = prepare
        self._park = Park(applier.connection, timeout=park_timeout)
        self._slow = Slow()
        self._parked = 0
        self._look_at = 0.0

    def run(self, stop: threading.Event) -> None:
        """Consume until `stop` is set; then finish the batch in hand and release what was received since.

        Raises BridgeError when only a human can help, and whatever a bug raises.
        """
        try:
            if self._prepare_start:
                self._prepare_start(stop)
            with ThreadPoolExecutor(1, thread_name_prefix="apply") as pool:
                self._loop(pool, stop)
        except Stopped:
            pass
        finally:
            self.close()

    def handle(self, deliveries: Sequence[Delivery], stop: threading.Event) -> None:
        """Apply and settle `deliveries`, and what of the park may go, for a caller that has no queue; once and now.

        Raises Stopped when `stop` is set before all of it is done: what is not acknowledged then is to come again.
        Call `close` in the end.
        """
        if self._drift:
            persist(self._drift.look, what="look at the catalogue", stop=stop)
        items = [self._prepared(delivery) for delivery in deliveries]
        self._apply(self._parts(items), stop)
        self._keep_waiting(items, stop)
        self._settle(items, stop)
        self._look_at = 0.0
        self._look_around(stop)

    def _loop(self, pool: ThreadPoolExecutor, stop: threading.Event) -> None:
        hands = Hands(pool, partial(self._apply, stop=stop), stop)
        received: list[Item] = []
        if self._drift:  # before the first event: an insert's entity is its primary key
            persist(self._drift.look, what="look at the catalogue", stop=stop)
        self._metrics.answered("reverse")
        try:
            while not stop.is_set():
                wait = 0.0 if hands else _LOOK if self._parked else _WAIT
                deliveries = persist(lambda wait=wait: self._source.receive(wait=wait), what="receive", stop=stop)  # type: ignore[misc]
                self._metrics.answered("reverse")
                received = [self._prepared(delivery) for delivery in deliveries]
                parts = self._parts(received)
                idle = not received or self._due()
                while hands and (idle or hands.full):
                    self._finish(hands, stop)
                if not hands:  # so the connection is idle
                    self._look_around(stop)
                if received:
                    hands.take(Hand(received, parts))
                    received = []
        finally:
            # whether a batch in hand was settled is not known; a repetition is harmless
            with contextlib.suppress(Stopped):
                while hands:
                    hand, held_up = hands.oldest()
                    if held_up is None:  # it was not begun
                        break
                    self._keep_waiting(hand.items, stop)
                    self._settle(hand.items, stop)
                    hands.leave()
            _release([*hands.deliveries(), *[it.delivery for it in received]])

    def _finish(self, hands: Hands, stop: threading.Event) -> None:
        """Wait for the oldest of them; then nothing of it is left to do."""
        hand, held_up = hands.oldest()
        self._keep_waiting(hand.items, stop)
        hands.leave()
        if held_up:  # those behind it did nothing, so the connection is idle
            self._look_around(stop)
            hands.renew()
        self._settle(hand.items, stop)

    def _prepared(self, delivery: Delivery | Parked) -> Item:
        """Everything about a delivery that needs no database."""
        item, event = Item(delivery), None
        try:
            event = parse(delivery.body, self._bare)
            mapping = self._mappings.find(event)
            if mapping is not None and mapping.broken is None:
                work = mapping.prepare(event, again=isinstance(delivery, Parked))
                item.event = work.event
                if self._in_groups:
                    work.group = delivery.group
                if work.hops <= self._max_hops:
                    item.work = work
                else:
                    item.applied = self._held()
                return item
            item.applied = broken(mapping) if mapping else self._unmapped
            if mapping is None and isinstance(delivery, Parked):  # it had one: it is not others' on the bus
                item.applied = NOBODYS
        except Malformed as error:
            item.applied = Applied(Outcome.DEAD_LETTER, error.reason, str(error))
        if event is not None:
            item.event = Named(event.id, event.source, event.detail_type)
        return item

    def _held(self) -> Applied:
        self._metrics.ping_pongs.labels("reverse").inc()
        message = f"it has passed more than {self._max_hops} bridges (hops): two systems answer each other"
        return Applied(Outcome.DEAD_LETTER, PING_PONG, message)

    def _parts(self, items: Sequence[Item]) -> list[Part]:
        """What can be applied, a transaction each. Made where the events were read: they are at hand there."""
        parts = []
        for chosen in cut(items, self._batch_size):
            works = [item.work for item in chosen if item.work is not None]
            first = all(item.delivery.attempts == 1 for item in chosen)
            parcel = self._applier.parcel(works, alone=not self._parked) if first else None
            parts.append(Part(chosen, works, first, parcel))
        for part, behind in itertools.pairwise(parts):
            part.behind = behind.parcel
        return parts

    def _due(self) -> bool:
        """Whether something is to be done before the next batch, when the connection is idle."""
        return bool(self._parked) or time.monotonic() >= self._look_at or (self._drift is not None and self._drift.due)

    def _holds_up(self, outcomes: Iterable[Applied]) -> bool:
        """Whether something is to be done about these before the next batch."""
        return any(it.outcome is Outcome.RETRY for it in outcomes if it is not DONE)

    def _apply(self, parts: Sequence[Part], stop: threading.Event, *, hurried: bool = False) -> bool:
        """Apply them; the outcomes go into the items. Whether these hold up the next batch. `hurried` as `apply_all`.

        Of the thread that owns the connection.
        """

        def count(_error: BridgeError) -> None:
            self._metrics.outcomes.labels(Outcome.RETRY.value).inc()

        before: dict[Work, Applied] = {}  # what waits of these parts: it is parked when all of them are done
        held_up = False
        for part in parts:

            def once(part: Part = part) -> dict[Work, Applied]:
                while True:
                    works, deliveries = part.works, [item.delivery for item in part.items]
                    if _lost(deliveries):
                        works = [work for work, it in zip(works, deliveries, strict=True) if not it.lost]
                        deliveries = [it for it in deliveries if not it.lost]
                    if not works:
                        return {}
                    try:
                        with self._metrics.apply_seconds.time():
                            return self._applier.apply_all(
                                works,
                                partial(_require, deliveries),
                                hopeful=part.first,
                                parcel=part.parcel,
                                following=lambda: part.behind,
                                before=before,
                                hurried=hurried,
                            )
                    except _Lost:
                        pass  # rolled back; without those that are not ours any more

            outcomes = persist(once, what="apply", stop=stop, on_retry=count)
            for item, work in zip(part.items, part.works, strict=True):
                item.applied = applied = outcomes.get(work)
                if applied is not DONE and applied and applied.outcome is Outcome.RETRY:
                    before[work] = applied
            held_up |= self._holds_up(outcomes.values())
        return held_up

    def _keep_waiting(self, items: Sequence[Item], stop: threading.Event) -> None:
        """Park what waits, before anything later is applied."""
        waiting = [
            (item.work, item.applied, item.delivery.body)
            for item in items
            if item.applied is not DONE and item.work and item.applied and item.applied.outcome is Outcome.RETRY
        ]
        if not waiting:
            return
        refused = persist(lambda: self._park.add(waiting), what="park", stop=stop)
        for item in items:
            if item.work in refused:
                item.applied = refused[item.work]
            elif item.applied and item.applied.outcome is Outcome.RETRY:
                what = "cannot be applied now" if contention(item.applied.reason) else "waits for another one"
                _log.info(
                    f"event {what}",
                    event_id=item.event.id if item.event else None,
                    reason=item.applied.reason,
                    tables=[".".join(it) for it in item.work.mapping.tables] if item.work else None,
                    attempts=item.delivery.attempts,
                )
        self._parked += len(waiting)
        self._look_at = min(self._look_at, time.monotonic() + _LOOK)

    def _look_around(self, stop: threading.Event) -> None:
        """Between two batches, when the connection is idle: the catalogue, and what of the park may go."""
        if self._drift:
            persist(self._drift.look, what="look at the catalogue", stop=stop)
        if time.monotonic() < self._look_at:
            return

        def look() -> list[Parked]:
            return self._park.ready(slow=self._slow.due)

        def alone(item: Item, hurried: bool) -> bool:
            return self._apply(self._parts([item]), stop, hurried=hurried)

        while self._count(stop) and (ready := persist(look, what="look into the park", stop=stop)):
            quick = [it for it in ready if it.reason not in TIMEOUTS]
            items = [self._prepared(parked) for parked in quick if not parked.overdue]
            # for the last time, and so when the others may have brought their rows
            last = [self._prepared(parked) for parked in quick if parked.overdue]
            self._apply(self._parts(items), stop)
            self._apply(self._parts(last), stop)
            items += last
            items += self._slow.apply([self._prepared(it) for it in ready if it.reason in TIMEOUTS], alone)
            for item in items:
                overdue = isinstance(item.delivery, Parked) and item.delivery.overdue
                if overdue and item.applied and item.applied.outcome is Outcome.RETRY:
                    item.applied = given_up(item.applied)
            self._keep_waiting(items, stop)
            self._settle(items, stop)
            if all(item.applied and item.applied.outcome is Outcome.RETRY for item in items):
                break
        self._look_at = time.monotonic() + (_LOOK if self._parked else _LOOK_INTO_EMPTY)

    def _count(self, stop: threading.Event) -> int:
        self._parked = persist(self._park.count, what="look into the park", stop=stop)
        self._metrics.parked.set(self._parked)
        return self._parked

    def _settle(self, items: Sequence[Item], stop: threading.Event) -> None:
        """Make dead letters durable, then acknowledge, then count."""
        others = [item for item in items if item.applied is not DONE]
        letters = [
            letter(item, self._bare) for item in others if item.applied and item.applied.outcome is Outcome.DEAD_LETTER
        ]
        if letters:
            # before the acknowledgement: a crash between the two repeats both, and the letter stays one
            persist(lambda: self._dead_letters.add(letters), what="write dead letter", stop=stop)
            if self._drift and any(letter.reason.startswith("42") for letter in letters):
                self._drift.hurry()
        for item in others:
            if item.applied and item.applied.outcome is not Outcome.APPLIED:
                tell(item, self._bare)
        if items and isinstance(items[0].delivery, Parked):  # so they are all: a batch is of one place
            done = [it for it in items if it.applied and it.applied.outcome is not Outcome.RETRY]
            if gone := [it.delivery for it in done if isinstance(it.delivery, Parked)]:
                persist(lambda: self._park.remove(gone), what="leave the park", stop=stop)
        else:
            handed: list[Any] = [item.delivery for item in items]
            if ours := [it for it in handed if not it.lost] if _lost(handed) else handed:
                persist(lambda: self._source.acknowledge(ours), what="acknowledge", stop=stop)
        self._tally(others, len(items) - len(others))

    def _tally(self, items: Sequence[Item], done: int) -> None:
        self._metrics.outcomes.labels(Outcome.APPLIED.value).inc(done)
        for outcome, number in Counter(it.applied.outcome for it in items if it.applied).items():
            self._metrics.outcomes.labels(outcome.value).inc(number)
        reasons = Counter(it.applied.reason for it in items if it.applied and it.applied.outcome is Outcome.IGNORED)
        for reason, number in reasons.items():
            self._metrics.ignored.labels(reason).inc(number)
        for it in items:
            for kind, decision in it.applied.conflicts if it.applied else ():
                self._metrics.conflicts.labels(kind, decision).inc()

    def close(self) -> None:
        """Release what it was given. `run` does so by itself."""
        with contextlib.ExitStack() as stack:  # all three, also when one of them fails
            stack.callback(self._dead_letters.close)
            stack.callback(self._applier.close)
            stack.callback(self._source.close)


class _Lost(Exception):
    """A message in hand is somebody else's: nothing may be committed for it."""


def _lost(deliveries: Sequence[Delivery | Parked]) -> bool:
    return any(map(_LOST, deliveries))


def _require(deliveries: Sequence[Delivery | Parked]) -> None:
    if _lost(deliveries):
        raise _Lost


def _release(deliveries: Sequence[Delivery | Parked]) -> None:
    """Give back at once what is not going to be handled. What cannot be given back comes again by itself."""
    for delivery in deliveries:
        if not (isinstance(delivery, Parked) or delivery.lost):
            with contextlib.suppress(QueueUnavailable):
                delivery.nack()
