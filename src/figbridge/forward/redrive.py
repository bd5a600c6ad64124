"""Dead letters of the forward path, published again: by the same publisher, under the same ids.

    letters, oldest first ─▶ contracts ─▶ Publisher ─▶ the sink, or S3 first (claim-check)
                                 └───────────┴─▶ refused again: the letter stays where it is, and says so

INVARIANT. A letter is removed only when its event is durable at the sink. Whatever ends this in between, the event is
published again by the next redrive, under the same id.

Events of one key leave in the order in which the store has them. They are older than what the bridge published of that
key since: a consumer sees it by the position, as it does everywhere (README: what consumers must know).
"""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

from figbridge.config import ContractsSection
from figbridge.contracts import Contracts
from figbridge.deadletter import DeadLetter, DeadLetterStore, Kept, Redriven, Unreadable, grouped
from figbridge.event import Event
from figbridge.forward.publish import Publisher
from figbridge.forward.standard import Standard
from figbridge.metrics import Metrics
from figbridge.retry import persist
from figbridge.transports import Deposit, Sink


class _Refused:
    """What the publisher takes for the dead letters: only says which events were refused once more."""

    def __init__(self) -> None:
        self.reasons: dict[str | None, DeadLetter] = {}

    def add(self, letters: Sequence[DeadLetter]) -> None:
        self.reasons |= {letter.event_id: letter for letter in letters}

    def close(self) -> None:
        pass


def redrive(
    letters: Iterable[Kept],
    store: DeadLetterStore,
    sink: Sink,
    deposit: Deposit | None,
    stop: threading.Event,
    *,
    kind: type[Event] = Event,
    contracts: ContractsSection | None = None,
) -> Iterator[Redriven]:
    """Publish `letters` of `store`, in the format `kind`, and remove them; what became of each, as it becomes known.

    What breaks its contract stays a letter: the quarantine is not asked, for it is set aside already.

    Raises Stopped when `stop` is set, and BridgeError when the sink or the store will take nothing.
    """
    refused, metrics = _Refused(), Metrics()
    publisher = Publisher(sink, refused, metrics, stop, deposit, kind=kind)
    standard = None
    if contracts:
        found = Contracts.load(contracts.path, "forward.contracts.path")
        standard = Standard(contracts, found, metrics, bury=partial(publisher.bury, attempts=0))
    try:
        for group in grouped(letters):
            refused.reasons.clear()
            read, events = _read(group)
            yield from (Redriven(it.letter, *why) for it, why in read if why)
            publisher.publish(standard.admit(events) if standard else events)
            done = [it for it, why in read if not why and it.letter.event_id not in refused.reasons]
            persist(lambda done=done: store.remove(done), what="remove dead letters", stop=stop)  # type: ignore[misc]
            still = [Kept(it.letter.again(*why), it.place) for it, why in _refused(read, refused.reasons)]
            if still:
                persist(lambda still=still: store.update(still), what="update dead letters", stop=stop)  # type: ignore[misc]
            for it, why in read:
                again = refused.reasons.get(it.letter.event_id)
                if not why:
                    yield Redriven(it.letter, again.reason, again.message) if again else Redriven(it.letter)
    finally:
        publisher.close()


def _refused(
    read: Iterable[tuple[Kept, tuple[str, str] | None]], reasons: Mapping[str | None, DeadLetter]
) -> Iterator[tuple[Kept, tuple[str, str]]]:
    for it, why in read:
        if why:
            yield it, why
        elif again := reasons.get(it.letter.event_id):
            yield it, (again.reason, again.message)


def _read(group: Sequence[Kept]) -> tuple[list[tuple[Kept, tuple[str, str] | None]], list[Event]]:
    """Each letter with the reason why it has no event, and the events of the others."""
    found: list[tuple[Kept, tuple[str, str] | None]] = []
    events = []
    for it in group:
        try:
            events.append(it.letter.event())
        except Unreadable as error:
            found.append((it, ("Unreadable", str(error))))
        else:
            found.append((it, None))
    return found, events
