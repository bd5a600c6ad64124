"""Dead letters of the relay, judged again: as if their messages came from the queue once more.

    letters ─▶ Relayer: contracts, hops, the sink
                  └─▶ invalid again: the letter stays where it is, and says so

A letter is removed only when its event is durable at the sink, or needs none (it was forwarded already).
"""

import threading
from collections.abc import Iterable, Iterator, Sequence

from figbridge.config import RelaySection
from figbridge.contracts import Contracts
from figbridge.deadletter import DeadLetter, DeadLetterStore, Kept, Redriven, grouped
from figbridge.metrics import Metrics
from figbridge.relay.judge import Judge
from figbridge.relay.outlet import Outlet
from figbridge.relay.relayer import Relayer
from figbridge.relay.seen import Seen
from figbridge.retry import persist
from figbridge.transports import Sink


class _Again:
    """What the outlet takes for the dead letters: only says which are refused once more."""

    def __init__(self) -> None:
        self.letters: dict[str, DeadLetter] = {}

    def add(self, letters: Sequence[DeadLetter]) -> None:
        self.letters |= {letter.id: letter for letter in letters}

    def close(self) -> None:
        pass


def _refused(kept: Kept, again: DeadLetter) -> Kept:
    return Kept(kept.letter.again(again.reason, again.message), kept.place)


def redrive(
    letters: Iterable[Kept], store: DeadLetterStore, section: RelaySection, sink: Sink, stop: threading.Event
) -> Iterator[Redriven]:
    """Relay `letters` of `store` and remove them; what became of each. The quarantine is not asked.

    Raises Stopped when `stop` is set, and BridgeError when the sink or the store will take nothing.
    """
    again, metrics = _Again(), Metrics()
    judge = Judge(section, Contracts.load(section.contracts, "relay.contracts"))
    relayer = Relayer(judge, Outlet(sink, None, again, metrics, stop), Seen(section.remember), metrics)
    try:
        for group in grouped(letters):
            again.letters.clear()
            messages = [it.letter for it in group]
            relayer.relay(messages, set())
            done = [it for it in group if it.letter.id not in again.letters]
            persist(lambda done=done: store.remove(done), what="remove dead letters", stop=stop)  # type: ignore[misc]
            still = [_refused(it, again.letters[it.letter.id]) for it in group if it.letter.id in again.letters]
            if still:
                persist(lambda still=still: store.update(still), what="update dead letters", stop=stop)  # type: ignore[misc]
            for letter in messages:
                told = again.letters.get(letter.id)
                yield Redriven(letter, told.reason, told.message) if told else Redriven(letter)
    finally:
        relayer.close()
