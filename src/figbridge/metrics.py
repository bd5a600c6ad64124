"""Every Prometheus series, declared once; stages receive what they count with.

README's metrics table is tested against this file.
"""

import math
import time
from functools import partial
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from figbridge import log

# pg_replication_slots.wal_status
SLOT_STATUSES: Final = ("reserved", "extended", "unreserved", "lost")
# the log is the process's
_LOG_LOST: Final = Counter(
    "log_lost",
    "Lines of the log that standard error did not take: a full disk, say.",
    namespace="figbridge",
    registry=None,
)
log.LOST.append(_LOG_LOST.inc)


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
        self.ping_pongs = self._counter(
            "ping_pongs",
            "Events held as dead letters because two systems answered each other, by direction.",
            "direction",
        )
        for direction in ("forward", "reverse"):
            self.ping_pongs.labels(direction)  # from the start at 0, so that the first one is an increase
        self.rejected = self._counter(
            "forward_rejected", "Entries that the sink refused, by the service's code.", "sink", "code"
        )
        self.window = self._gauge(
            "forward_requests_window",
            "Requests that may wait for the sink's answer at once; throttling lowers it.",
            "sink",
        )
        self.forward_dead = self._counter(
            "forward_dead_letters", "Events that went to the dead letters instead of the sink."
        )
        self.deposited = self._counter(
            "forward_claim_checks", "Events too large for the sink whose body was kept in S3 instead."
        )
        self.reconnects = self._counter("forward_connections", "Replication connections that were opened.")
        self.lag_bytes = self._gauge(
            "forward_lag_bytes",
            "WAL between the server's end and what is acknowledged; while nothing is read, measured once a minute.",
        )
        self.lag_seconds = self._gauge(
            "forward_lag_seconds", "Age of the newest published transaction when it was published."
        )
        self.buffered_events = self._gauge("forward_buffered_events", "Events that wait for the sink.")
        self.buffered_bytes = self._gauge("forward_buffered_bytes", "Bytes of the events that wait for the sink.")
        self.flushed_lsn = self._gauge("forward_flushed_lsn", "The acknowledged LSN as an integer.")

        self.contract_broken = self._counter(
            "forward_contract_broken", "Events that were set aside because they break their contract.", "contract"
        )
        self.set_aside = self._counter("forward_quarantined", "Events that are durable in quarantine.", "sink")
        self.filtered = self._counter(
            "forward_filtered", "Changes of rows for which forward.select.where does not hold: not published.", "table"
        )
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

        self.snapshot_rows = self._counter(
            "forward_snapshot_rows", "Rows that a snapshot has put into the stream.", "table"
        )
        self.snapshot_voids = self._counter(
            "forward_snapshot_voids", "Chunks of a snapshot that were read again: a truncate, a schema, a connection."
        )
        self.snapshot_failures = self._counter(
            "forward_snapshot_failures", "Snapshots of a table that failed; figbridge.snapshot says why."
        )
        self.snapshot_state = self._gauge(
            "forward_snapshot_state",
            "1 for the state of the table's snapshot: waiting, running, paused, done, failed, cancelled.",
            "table",
            "state",
        )
        self.snapshot_durable = self._gauge(
            "forward_snapshot_durable_rows",
            "Rows of the table's snapshot that are durable, those of processes before this one, too.",
            "table",
        )
        self.snapshot_estimate = self._gauge(
            "forward_snapshot_estimated_rows",
            "Rows that the table had by the planner's statistics when its snapshot was taken up.",
            "table",
        )
        self.snapshot_throttled = self._gauge(
            "forward_snapshot_throttled", "1 while a snapshot waits because a standby is behind."
        )

        self.slot_recreated = self._counter(
            "forward_slot_recreated", "Slots made anew in the place of lost ones; tables are read again each time."
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

        self._reverse()

        self.relayed = self._counter("relay_events", "Valid events that are durable at the relay's sink.", "sink")
        self.quarantined = self._counter("relay_quarantined", "Invalid events that are durable in quarantine.", "sink")
        self.relay_dead = self._counter("relay_dead_letters", "Invalid events that went to the dead letters.")
        self.relay_invalid = self._counter(
            "relay_invalid",
            "Events that were set aside, by reason: contract, no_contract, malformed, reserved, id_reused, refused.",
            "reason",
        )
        for reason in ("contract", "no_contract", "malformed", "reserved", "id_reused", "refused"):
            self.relay_invalid.labels(reason)
        self.relay_dropped = self._counter(
            "relay_dropped",
            "Events that were not forwarded, by reason: valid_already, quarantined_already, hops, duplicate.",
            "reason",
        )
        self.relay_rejected = self._counter(
            "relay_rejected", "Entries that sink or quarantine refused, by the service's code.", "sink", "code"
        )
        self.relay_window = self._gauge(
            "relay_requests_window",
            "Requests of one loop that may wait for the sink's answer at once; throttling lowers it.",
            "sink",
        )

        self.ready = self._gauge("ready", "1 when a part of the bridge is ready, by part.", "part")
        self._receive_age = self._gauge(
            "source_receive_age_seconds",
            "Since the queue of reverse or relay last answered, if only that it has nothing; grows while it is away, "
            "and while a batch is tried again and again.",
            "part",
        )
        self._answered: dict[str, float] = {}

    def answered(self, part: str) -> None:
        """The queue of `part` has answered, or is about to be asked for the first time."""
        first, self._answered[part] = part not in self._answered, time.monotonic()
        if first:
            self._receive_age.labels(part).set_function(partial(self._age, part))

    def _age(self, part: str) -> float:
        return time.monotonic() - self._answered[part]

    def _reverse(self) -> None:
        self.outcomes = self._counter(
            "reverse_events",
            "Events of the new system by outcome: applied, duplicate, ignored, retried, dead_letter.",
            "outcome",
        )
        for outcome in ("applied", "duplicate", "ignored", "retried", "dead_letter"):
            # from the start at 0: to Prometheus a series that appears with 1 has not increased, so no alert would fire
            self.outcomes.labels(outcome)
        self.ignored = self._counter(
            "reverse_ignored",
            "Events without an effect, by reason: unmapped, stale_version, delete_missing, suppressed.",
            "reason",
        )
        self.conflicts = self._counter(
            "reverse_conflicts",
            "Conflicts by kind and decision: new, legacy, merged, delta, sql; rejected waits for a person.",
            "kind",
            "decision",
        )
        for kind in (
            "update_conflict",
            "insert_exists",
            "update_missing",
            "update_deleted",
            "unique_other",
            "fk_missing",
        ):
            self.conflicts.labels(kind, "rejected")  # see above
        self.conflicts.labels("not_owner", "rejected")
        self.would_have = self._counter(
            "reverse_would_have",
            "Events of a dry run by the outcome they would have had; unchanged: applied, and no row would be another.",
            "outcome",
        )
        self.would_have_conflicts = self._counter(
            "reverse_would_have_conflicts", "Conflicts that a dry run would have had.", "kind", "decision"
        )
        self.parked = self._gauge("reverse_parked", "Events that wait for a row, their own or their parent.")
        self.broken_mappings = self._gauge(
            "reverse_broken_mappings", "Mappings that do not fit their table; their events go to the dead letters."
        )
        self.apply_seconds = Histogram(
            "reverse_apply_seconds",
            "Seconds to apply one batch of events.",
            namespace="figbridge",
            registry=self.registry,
        )
        self.log_lost = _LOG_LOST
        self.registry.register(_LOG_LOST)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, namespace="figbridge", registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, namespace="figbridge", registry=self.registry)
