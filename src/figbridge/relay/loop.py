"""The loop over a source: receive, relay, acknowledge what is durable."""

import contextlib
import threading
from typing import Final

from figbridge.errors import QueueUnavailable
from figbridge.metrics import Metrics
from figbridge.relay.relayer import Relayer
from figbridge.retry import Stopped, persist
from figbridge.transports import Delivery, Source

_WAIT: Final = 2.0  # seconds of one empty receive, and so the longest that a soft stop waits for the queue


class Relay:
    """One loop; it closes what it is given. `number` tells several apart."""

    def __init__(self, source: Source, relayer: Relayer, metrics: Metrics, *, number: int = 1) -> None:
        self.name = f"relay-{number}"
        self._source = source
        self._relayer = relayer
        self._metrics = metrics

    def run(self, stop: threading.Event) -> None:
        """Until `stop` is set; then the batch in hand is finished. Raises BridgeError when only a human can help."""
        try:
            persist(self._relayer.check, what="look up the relay's ends", stop=stop)
            self._metrics.ready.labels("relay").set(1)
            self._metrics.answered("relay")
            while not stop.is_set():
                deliveries = persist(lambda: self._source.receive(wait=_WAIT), what="receive", stop=stop)
                self._metrics.answered("relay")
                if deliveries:
                    self._relay(list(deliveries), stop)
        except Stopped:
            pass
        finally:
            self._metrics.ready.labels("relay").set(0)
            self._relayer.close()
            self._source.close()

    def _relay(self, deliveries: list[Delivery], stop: threading.Event) -> None:
        done: set[int] = set()
        try:
            self._relayer.relay(deliveries, done)
        finally:
            # what is durable is acknowledged whatever happened to the rest, or it would be published again
            settled = [deliveries[index] for index in sorted(done)]
            if settled:
                with contextlib.suppress(Stopped):
                    persist(lambda: self._source.acknowledge(settled), what="acknowledge", stop=stop)
            for index, delivery in enumerate(deliveries):
                if index not in done:
                    with contextlib.suppress(QueueUnavailable):
                        delivery.nack()
