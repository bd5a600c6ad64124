"""Every Prometheus series, declared once; stages receive what they count with.

README's metrics table is tested against this file.
"""

import math
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

# pg_replication_slots.wal_status
SLOT_STATUSES: Final = ("reserved", "extended", "unreserved", "lost")


class Metrics:
    """All series of one bridge, in a registry of its own (a second bridge in one process must not share them)."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()

        self.captured = self._counter(
            "forward_changes", "Row changes read from the slot, echoes included.", "table", "operation"
        )
        self.published = self._counter("forward_published", "Events that are durable at the sink.", "sink")
        self.echoes = self._counter("forward_echoes", "Row changes of our own reverse transactions, not published.")
        self.late_marks = self._counter(
            "forward_late_marks", "Inbox rows that came after data of their transaction: those rows left and may loop."
        )
        self.rejected = self._counter(
            "forward_rejected", "Entries that the sink refused, by the service's code.", "sink", "code"
        )
        self.forward_dead = self._counter(
            "forward_dead_letters", "Events that went to the dead letters instead of the sink."
        )
        self.reconnects = self._counter("forward_connections", "Replication connections that were opened.")
        self.lag_bytes = self._gauge("forward_lag_bytes", "WAL between the server's end and what is acknowledged.")
        self.lag_seconds = self._gauge(
            "forward_lag_seconds", "Age of the newest published transaction when it was published."
        )
        self.buffered_events = self._gauge("forward_buffered_events", "Events that wait for the sink.")
        self.buffered_bytes = self._gauge("forward_buffered_bytes", "Bytes of the events that wait for the sink.")
        self.flushed_lsn = self._gauge("forward_flushed_lsn", "The acknowledged LSN as an integer.")

        self.outbox_ignored = self._counter(
            "forward_outbox_ignored", "Changes of the outbox table that are no inserts, so no events.", "operation"
        )
        self.heartbeat_age = self._gauge(
            "forward_heartbeat_age_seconds",
            "Age of the newest heartbeat that was seen in the stream, and acknowledged; NaN while another replica has "
            "the slot.",
            "stage",
        )
        self.heartbeat_seconds = Histogram(
            "forward_heartbeat_seconds",
            "Seconds from writing a heartbeat until it was seen, and acknowledged: all before it is durable then.",
            ("stage",),
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
            namespace="figbridge",
            registry=self.registry,
        )

        self.slot_status = self._gauge(
            "forward_slot_wal_status",
            "1 for the wal_status of the slot: reserved, extended, unreserved, lost.",
            "status",
        )
        self.slot_retained = self._gauge("forward_slot_retained_bytes", "WAL that the server keeps for the slot.")
        self.slot_room = self._gauge(
            "forward_slot_safe_bytes",
            "WAL that may still be written before the slot can be lost; +Inf without max_slot_wal_keep_size.",
        )
        self.slot_seconds = self._gauge(
            "forward_slot_seconds_to_loss", "The same in seconds, at the rate of WAL of the last minute."
        )
        for gauge in (self.slot_room, self.slot_seconds):
            gauge.set(math.inf)  # until somebody has looked, no alert

        self.outcomes = self._counter(
            "reverse_events",
            "Events of the new system by outcome: applied, duplicate, ignored, retried, dead_letter.",
            "outcome",
        )
        for outcome in ("applied", "duplicate", "ignored", "retried", "dead_letter"):
            # from the start at 0: to Prometheus a series that appears with 1 has not increased, so no alert would fire
            self.outcomes.labels(outcome)
        self.apply_seconds = Histogram(
            "reverse_apply_seconds",
            "Seconds of one legacy transaction of ours.",
            namespace="figbridge",
            registry=self.registry,
        )

        self.ready = self._gauge("ready", "1 when a part of the bridge is ready, by part.", "part")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, namespace="figbridge", registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, namespace="figbridge", registry=self.registry)
