"""The heartbeat of an SQS source: what we hold stays invisible for as long as we hold it, and what we lost is known.

A message is ours for its visibility timeout. A thread extends it when a third of it is over, for those in work and for
those received in advance. It is lost when SQS says that its receipt is void, or when its time is over because nobody
could extend it: then somebody else may have it, and `Held.lost` tells whoever is about to commit.

FIFO. When a message of a group is lost, so are those behind it that we hold: they are made visible at once. Were they
applied, the lost one would come after them; and while they are held, SQS gives nobody the lost one.
https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/FIFO-queues-understanding-logic.html

SQS lets nobody hold a message for more than 12 hours from its receipt.
https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_ChangeMessageVisibility.html
"""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import structlog

from figbridge.errors import BridgeError

_log = structlog.get_logger()

LONGEST: Final = 43200  # seconds: 12 hours, counted from the receipt
_BATCH: Final = 10  # most entries of one ChangeMessageVisibilityBatch


class Held:
    """A received message, while it is ours."""

    __slots__ = ("_lost", "group", "receipt", "received", "until")

    def __init__(self, receipt: str, group: str | None, received: float, seconds: float) -> None:
        self.receipt = receipt
        self.group = group
        self.received = received
        self.until = received + seconds
        self._lost = False

    @property
    def lost(self) -> bool:
        """Whether somebody else may have it."""
        return self._lost or time.monotonic() >= self.until

    def lose(self) -> None:
        """It is not ours any more."""
        self._lost = True


class Heartbeat:
    """Extends what it is given. Any thread may call its methods.

    `change` asks SQS to hide receipts, ten at most, for so many seconds, and returns those that are void; it raises
    BridgeError when SQS did not answer.
    """

    def __init__(self, timeout: float, change: Callable[[Sequence[str], int], Iterable[str]]) -> None:
        self._timeout = timeout
        self._change = change
        self._held: dict[str, Held] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def hold(self, held: Iterable[Held]) -> None:
        """From now on."""
        with self._lock:
            self._held |= {it.receipt: it for it in held}
            if self._thread is None and self._held:
                self._thread = threading.Thread(target=self._run, name="sqs-heartbeat", daemon=True)
                self._thread.start()

    def let_go(self, receipts: Iterable[str]) -> None:
        """They are settled."""
        with self._lock:
            for receipt in receipts:
                self._held.pop(receipt, None)

    def close(self) -> None:
        """Stop; what is held becomes visible when its time is over."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while not self._stop.wait(self._timeout / 6):
            with self._lock:
                held = list(self._held.values())
            now = time.monotonic()
            self._lose([it for it in held if it.lost], "its time was over before it could be extended")
            due = [it for it in held if not it.lost and it.until - now < self._timeout * 2 / 3]
            for first in range(0, len(due), _BATCH):
                self._extend(due[first : first + _BATCH])

    def _extend(self, held: Sequence[Held]) -> None:
        asked = time.monotonic()
        try:
            void = set(self._change([it.receipt for it in held], max(1, round(self._timeout))))
        except BridgeError as error:
            _log.warning("messages could not be kept invisible", messages=len(held), error=str(error))
            return
        for it in held:
            if it.receipt not in void:
                it.until = min(asked + self._timeout, it.received + LONGEST)
        self._lose([it for it in held if it.receipt in void], "its receipt is void")

    def _lose(self, lost: Sequence[Held], why: str) -> None:
        if not lost:
            return
        groups = {it.group for it in lost} - {None}
        with self._lock:
            behind = [it for it in self._held.values() if it.group in groups and it not in lost]
            for it in [*lost, *behind]:
                it.lose()
                self._held.pop(it.receipt, None)
        _log.warning(
            "messages are lost to somebody else and will not be applied here; they come again",
            messages=len(lost),
            behind=len(behind),
            why=why,
            hint="if this is frequent, raise visibility-timeout; is another consumer on the queue?",
        )
        for first in range(0, len(behind), _BATCH):
            try:
                self._change([it.receipt for it in behind[first : first + _BATCH]], 0)
            except BridgeError:
                return  # they become visible by themselves
