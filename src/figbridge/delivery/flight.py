"""Several requests in flight to one sink, in order per key.

INVARIANT: `Flight.publish` returns only when every event is durable or dead-lettered, and `figbridge.delivery.order`
says which may be out at the same time. One thread decides; the others do nothing but wait for the sink's answer.

What an answer means:

* taken            the next event of the key may go
* refused for now  the event waits, and holds back its own key
* refused          it goes to the dead letters, and the next event of the key may go
* no answer        nothing is known, so all of the request go again, under the same ids

Nothing is pipelined from one call to the next: the caller acknowledges what a call was given, as a whole. It costs the
wait for the last answers of each call, about one round trip.
"""

import heapq
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from prometheus_client import Counter, Gauge

from figbridge.delivery.crew import Crew
from figbridge.delivery.order import Order
from figbridge.delivery.pace import Pace
from figbridge.delivery.pack import Packs
from figbridge.errors import BridgeError, SinkUnavailable
from figbridge.event import Event, Rejection
from figbridge.retry import Stopped
from figbridge.transports import Sink

_NONE: Final[Packs] = {}
_LOOK: Final = 0.1  # seconds between two looks at whether the bridge is to stop, while answers are awaited

# Takes what is refused for ever; the second is how often it was sent.
Bury = Callable[[Sequence[Rejection], int], None]
# Takes an event that is too large, and its size; gives one that is not, or None when it was dead-lettered.
Shrink = Callable[[Event, int], Event | None]


class EntriesRefused(SinkUnavailable):
    """Some entries were refused for now (throttled, an internal failure); the others of the request are durable."""


class Tally(NamedTuple):
    """What is counted: durable events by sink, refused entries by sink and code, and the size of the window."""

    published: Counter
    rejected: Counter
    window: Gauge


class _Answer(NamedTuple):
    request: Sequence[int]
    sent: float
    result: Sequence[Rejection] | BaseException


class Flight:
    """Publishes to a sink that takes single entries, or several requests at once. For one thread."""

    def __init__(self, sink: Sink, tally: Tally, halt: threading.Event, bury: Bury, shrink: Shrink) -> None:
        self._sink = sink
        self._rejected = tally.rejected
        self._halt = halt
        self._bury = bury
        self._shrink = shrink
        self._published = tally.published.labels(sink.name)
        self._window = tally.window.labels(sink.name)
        self._pace = Pace(f"publish to {sink.name}", sink.limits.in_flight)
        self._crew = Crew(sink.limits.in_flight)
        self._begin(())

    def _begin(self, events: Sequence[Event], packs: Packs = _NONE) -> None:
        self._events = list(events)
        self._packs = packs
        self._order = Order(self._events, {id_: pack.keys for id_, pack in packs.items()})
        self._attempts = [0] * len(events)
        self._later: list[tuple[float, int]] = []  # a heap: when, which
        # of this call alone: an answer that comes after a halt must not be taken for one of the next call
        self._answers: queue.SimpleQueue[_Answer] = queue.SimpleQueue()
        self._out = 0

    def publish(self, events: Sequence[Event], packs: Packs = _NONE) -> None:
        """Return when every one of `events` is durable or dead-lettered. `packs` says what is in those that are packs.

        Raises Stopped when `halt` is set, and what the sink, or the dead letters, raised that no repetition helps.
        """
        self._begin(events, packs)
        try:
            while self._order.unsettled:
                if self._halt.is_set():
                    raise Stopped
                self._send()
                self._wait()
                self._window.set(self._pace.window)
        finally:
            # whoever calls again must not have two requests of a key out; a bridge that is halted calls no more
            while self._out and not self._halt.is_set():
                self._next(_LOOK)
            self._begin(())

    def close(self) -> None:
        """End the threads, each after the answer that it waits for."""
        self._crew.close()

    def _send(self) -> None:
        """As many requests as may go now."""
        ready, pace, now = self._order.ready, self._pace, time.monotonic()
        while self._later and self._later[0][0] <= now:
            ready.append(heapq.heappop(self._later)[1])
        while ready and now >= pace.resume and self._out < pace.window:
            if request := self._cut():
                self._out += 1
                self._crew.do(self._attempt(request))
            now = time.monotonic()

    def _cut(self) -> list[int]:
        """A request within the limits, of the oldest events that are ready; none if all of those were too large."""
        size, limits, ready, events = self._sink.size, self._sink.limits, self._order.ready, self._events
        request: list[int] = []
        room = limits.batch_bytes
        while ready and len(request) < limits.entries:
            index = ready[0]
            weight = size(events[index])
            if weight > limits.entry_bytes:
                ready.popleft()
                smaller = self._shrink(events[index], weight)
                if smaller is None:
                    self._order.settle(index)
                else:
                    events[index] = smaller
                    ready.appendleft(index)
            elif weight > room and request:
                break
            else:
                ready.popleft()
                request.append(index)
                room -= weight
                self._attempts[index] += 1
        return request

    def _attempt(self, request: Sequence[int]) -> Callable[[], None]:
        """What a thread of the crew does: the request, and its answer, whatever it is."""
        sink, answers, events = self._sink, self._answers, [self._events[index] for index in request]

        def attempt() -> None:
            sent = time.monotonic()
            try:
                answers.put(_Answer(request, sent, sink.publish(events)))
            except BaseException as error:  # noqa: BLE001 (raised where it is read)
                answers.put(_Answer(request, sent, error))

        return attempt

    def _wait(self) -> None:
        """For answers, or until something may be sent."""
        due = [self._later[0][0]] if self._later else []
        if self._order.ready and self._out < self._pace.window:
            due.append(self._pace.resume)
        timeout = max(0.0, min(due) - time.monotonic()) if due else _LOOK
        if self._out:
            answer = self._next(min(timeout, _LOOK))
            while answer:
                self._read(answer)
                answer = self._next(0)
        elif self._order.unsettled:
            self._halt.wait(timeout)

    def _next(self, timeout: float) -> _Answer | None:
        try:
            answer = self._answers.get(timeout=timeout) if timeout else self._answers.get_nowait()
        except queue.Empty:
            return None
        self._out -= 1
        return answer

    def _read(self, answer: _Answer) -> None:
        if not isinstance(answer.result, BaseException):
            self._judge(answer.request, answer.sent, answer.result)
        elif isinstance(answer.result, BridgeError) and answer.result.retryable:
            self._pace.unanswered(answer.sent, answer.result)
            self._order.ready.extendleft(reversed(answer.request))
        else:
            raise answer.result

    def _judge(self, request: Sequence[int], sent: float, rejections: Sequence[Rejection]) -> None:
        refused = {it.event.id: it for it in rejections}
        taken = len(request) - len(refused)
        again: list[tuple[int, Rejection]] = []
        for index in request:
            rejection = refused.get(self._events[index].id) if refused else None
            if rejection is None:
                if self._packs and (pack := self._packs.get(self._events[index].id)):
                    taken += len(pack.members) - 1
                self._order.settle(index)
                continue
            self._rejected.labels(self._sink.name, rejection.code).inc()
            if rejection.retryable:
                again.append((index, rejection))
            else:
                self._bury([rejection], self._attempts[index])
                self._order.settle(index)
        self._published.inc(taken)
        if not again:
            self._pace.taken()
            return
        error = EntriesRefused(f"entries were refused for now: {', '.join(sorted({it.code for _, it in again}))}")
        most = 2 * len(again) >= len(request)
        for index, _ in again:
            seconds = self._pace.refused(sent, error, self._attempts[index], most=most)
            heapq.heappush(self._later, (time.monotonic() + seconds, index))
