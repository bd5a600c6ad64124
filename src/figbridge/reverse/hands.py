"""The batches in hand, the oldest first: one is applied in a thread of its own, those behind it are ready.

The server has work at once, then, when it is through with a batch. It and this process take turns in being slow: where
only one batch was ready, each of them waited for the other a quarter of the time.

INVARIANT. A batch is applied only if the one before it ended well and holds nothing up: after one that waits or failed
those behind it do nothing until they are asked anew (`Hands.renew`).
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Final

from figbridge.reverse.item import Item, Part
from figbridge.reverse.park import Parked
from figbridge.transports import Delivery

_READY: Final = 4  # batches behind the one at work, at most
_BYTES: Final = 16 * 1024 * 1024  # of messages in hand, from which on no further batch is made ready


@dataclass(slots=True)
class Hand:
    """A batch, and what each of its transactions is for.

    `done` is their end: whether they hold up those behind, None if nothing was done. `size` is in bytes.
    """

    items: list[Item]
    parts: list[Part]
    done: "Future[bool | None]" = field(default_factory=Future)
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.size = sum([len(item.delivery.body) for item in self.items])


class Hands:
    """See the module. `apply` runs in the one thread of `pool`; whether what it was given holds up what is behind."""

    def __init__(self, pool: Executor, apply: Callable[[Sequence[Part]], bool], stop: threading.Event) -> None:
        self._pool, self._apply, self._stop = pool, apply, stop
        self._hands: deque[Hand] = deque()

    def __len__(self) -> int:
        return len(self._hands)

    @property
    def full(self) -> bool:
        """Whether the oldest is to be waited for before there is another."""
        if not self._hands:
            return False
        enough = len(self._hands) > _READY or sum(hand.size for hand in self._hands) > _BYTES
        return enough or self._hands[0].done.done()

    def take(self, hand: Hand) -> None:
        """Have it applied as soon as those in hand are."""
        if self._hands:
            before = self._hands[-1]
            hand.done = self._pool.submit(self._behind, before.done, hand.parts)
            if before.parts and hand.parts:  # which may be at work: what comes next is sent with its COMMIT
                before.parts[-1].behind = hand.parts[0].parcel
        else:
            hand.done = self._pool.submit(self._apply, hand.parts)
        self._hands.append(hand)

    def oldest(self) -> tuple[Hand, bool | None]:
        """The oldest, when it has ended, and its end. It stays in hand. Raises what `apply` did."""
        return self._hands[0], self._hands[0].done.result()

    def leave(self) -> None:
        """Nothing is left to do of the oldest but to settle it."""
        self._hands.popleft()

    def renew(self) -> None:
        """Have all of them applied that did nothing, because of one that is not in hand any more."""
        behind = [*self._hands]
        self._hands.clear()
        for hand in behind:
            self.take(hand)

    def deliveries(self) -> list[Delivery | Parked]:
        """Of all that are in hand."""
        return [item.delivery for item in itertools.chain.from_iterable(hand.items for hand in self._hands)]

    def _behind(self, before: "Future[bool | None]", parts: Sequence[Part]) -> bool | None:
        """As `apply`; None if `before`, which has ended, failed, did nothing or holds them up."""
        if self._stop.is_set() or before.exception() is not None or before.result() is not False:
            return None
        return self._apply(parts)
