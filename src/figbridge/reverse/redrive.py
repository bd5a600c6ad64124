"""Dead letters of the reverse path, applied again: they re-enter by the consumer itself, like deliveries of any queue.

    letters, oldest first ─▶ Consumer: parse, map, claim the key, compare the version, apply, park
                                └─▶ a dead letter again: it stays where it is, and says what this try met

So whatever protects a queue's messages protects these. A key that was applied meanwhile is a duplicate, a late event is
stale, one that waits for a row is parked; and a letter is removed (the acknowledgement) only after its transaction
committed or its place in the park is durable. Killed in between, it is there still and its key tells the next redrive.

The bridge may run meanwhile: this is one more replica.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from figbridge.deadletter import DeadLetter, DeadLetterStore, Kept, Redriven
from figbridge.reverse.consume import Consumer
from figbridge.transports import Delivery

_BATCH: Final = 100  # letters
_BATCH_BYTES: Final = 4 * 1024 * 1024  # of their bodies, and one letter more


@dataclass(frozen=True, slots=True)
class LetterDelivery:
    """See `figbridge.transports.Delivery`."""

    kept: Kept

    lost: ClassVar[bool] = False  # at worst it was redriven by two, and is a duplicate
    # its group went on without it: it waits for its own entity alone, and brings the row that its group may wait for
    group: ClassVar[str | None] = None

    @property
    def body(self) -> bytes:
        """The message as it came."""
        return self.kept.letter.body

    @property
    def attempts(self) -> int:
        """This one included."""
        return self.kept.letter.attempts + 1

    def ack(self) -> None:
        """Never called: letters are acknowledged together, by their source."""
        raise NotImplementedError

    def nack(self, *, delay: float = 0.0) -> None:
        """Nothing to give back: the letter was never taken out."""


class LetterSource:
    """The letters as a source, and as the dead letters of its consumer: who is refused again is in it already.

    Sets `stop` when all letters are settled. `told` is called with what became of each.
    """

    name = "dead-letters"

    def __init__(
        self,
        letters: Iterator[Kept],
        store: DeadLetterStore,
        stop: threading.Event,
        told: Callable[[Redriven], None],
    ) -> None:
        self._letters = letters
        self._store = store
        self._stop = stop
        self._told = told
        self._open: dict[str, int] = {}  # ids in hand, which may be there twice
        self._again: dict[str, DeadLetter] = {}

    def check(self) -> None:
        """See `Source.check`."""
        self._store.check()

    def receive(self, *, wait: float) -> Sequence[LetterDelivery]:  # noqa: ARG002 (nothing comes later)
        """See `Source.receive`."""
        batch: list[LetterDelivery] = []
        size = 0
        for kept in self._letters:
            batch.append(LetterDelivery(kept))
            self._open[kept.letter.id] = self._open.get(kept.letter.id, 0) + 1
            size += len(kept.letter.body)
            if len(batch) == _BATCH or size >= _BATCH_BYTES:
                break
        if not batch and not self._open:
            self._stop.set()
        return batch

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """See `Source.acknowledge`."""
        ours = [it.kept for it in deliveries if isinstance(it, LetterDelivery)]
        self._store.remove([it for it in ours if it.letter.id not in self._again])
        if still := [_refused(it, self._again[it.letter.id]) for it in ours if it.letter.id in self._again]:
            self._store.update(still)
        for it in ours:
            again = self._again.get(it.letter.id)
            self._told(Redriven(it.letter, again.reason, again.message) if again else Redriven(it.letter))
        for it in ours:
            self._open[it.letter.id] -= 1
            if not self._open[it.letter.id]:
                del self._open[it.letter.id]
                self._again.pop(it.letter.id, None)

    def add(self, letters: Sequence[DeadLetter]) -> None:
        """See `DeadLetters.add`: those in hand stay where they are; others, of the park, are new."""
        self._again |= {letter.id: letter for letter in letters if letter.id in self._open}
        if others := [letter for letter in letters if letter.id not in self._open]:
            self._store.add(others)

    def close(self) -> None:
        """The store is closed by whoever opened it."""


def _refused(kept: Kept, again: DeadLetter) -> Kept:
    return Kept(kept.letter.again(again.reason, again.message, again.statement), kept.place)


def redrive(
    letters: Iterator[Kept],
    store: DeadLetterStore,
    consumer: Callable[[LetterSource], Consumer],
    stop: threading.Event,
) -> Iterator[Redriven]:
    """Apply `letters` of `store` and remove them; what became of each, as it becomes known.

    `consumer` makes the consumer of a source that is its store of dead letters, too. Ends early when `stop` is set by
    somebody else. Raises BridgeError when only a human can help.
    """
    told: queue.SimpleQueue[Redriven | None] = queue.SimpleQueue()
    failures: list[BaseException] = []
    made = consumer(LetterSource(letters, store, stop, told.put))

    def run() -> None:
        try:
            made.run(stop)
        except BaseException as error:  # noqa: BLE001 (raised by the caller)
            failures.append(error)
        finally:
            told.put(None)

    thread = threading.Thread(target=run, name="redrive")
    thread.start()
    try:
        while (result := told.get()) is not None:
            yield result
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]
