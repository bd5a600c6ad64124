"""``reverse.mode: dry-run``: everything that a reverse transaction does, and then ROLLBACK; what it would have changed.

    receive ▶ prepare ▶ claim · versions · rows before · statements · rows after · deferred constraints ▶ ROLLBACK
                                                             └▶ figbridge.dry_run, the metrics ▶ acknowledge

INVARIANT. Nothing is committed but rows of figbridge.dry_run: no legacy row, no key, no version, no conflict, no place
in the park, no dead letter. What is rolled back is not decoded, so nothing can loop and no mark is needed. What a
sequence gave, and what a trigger told the world outside, does not come back.

Deliveries are acknowledged when their differences are durable: a shadow must not stop at what it only rehearses. So it
wants a queue of its own; from the live path's queue it would take the events away.

It remembers nothing: an event that builds on another one is told rightly only within one batch, or after the legacy
system did the same (which in a shadow it should: that is what is compared). A repetition is rehearsed again.

Differences are in a table and not in the log, because they are row values. Events that would change nothing are counted
and not recorded: when both systems agree, the table stays empty.
"""

import contextlib
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Mapping as MappingOf
from typing import Any, Final

import msgspec
import orjson
import psycopg
import structlog

from figbridge import legacy
from figbridge.deadletter import writable
from figbridge.errors import LegacyUnavailable
from figbridge.retry import persist
from figbridge.reverse import conflict, difference
from figbridge.reverse.conflict import Conflicts, Refusal
from figbridge.reverse.consume import Consumer
from figbridge.reverse.group import Naming
from figbridge.reverse.item import UNMAPPED, Item
from figbridge.reverse.mapping import Work
from figbridge.reverse.outcome import Applied, Outcome, unavailable
from figbridge.reverse.park import Parked
from figbridge.reverse.statement import Shape, Statement
from figbridge.reverse.transaction import Suspects

_log = structlog.get_logger()

_UNCHANGED: Final = "unchanged"  # as an outcome: it would be applied and change nothing
# Differences are strings in it, as documents are in `conflict`'s.
_RECORD: Final = """
    INSERT INTO figbridge.dry_run (source, idempotency_key, event_id, scope, identity, outcome, reason, message,
        differences, conflicts)
    SELECT r.source, r.key, r.event_id, r.scope, r.identity, r.outcome, r.reason, r.message, r.differences::json,
           r.conflicts
    FROM json_to_recordset($1::json) AS r (source text, key text, event_id text, scope text, identity text,
        outcome text, reason text, message text, differences text, conflicts json)
"""

_COLUMNS: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])  # values as they are written, to the last digit

# One row of one statement: (number of the statement, table, row before, row after), rows as JSON
Difference = tuple[int, str, str | None, str | None]


class Shadow(Conflicts):
    """See `transaction.Examiner`; for one transaction. What its works would have changed goes into `found`."""

    def __init__(self, found: dict[Work, list[Difference]]) -> None:
        super().__init__()
        self._found = found
        self._mine: defaultdict[Work, list[Difference]] = defaultdict(list)
        self._works: list[Work] = []

    def execute(
        self, connection: psycopg.Connection, works: Sequence[Work], naming: Naming | None
    ) -> dict[Work, Applied]:
        """See `Examiner.execute`."""
        self._works += works
        before = self._rows(connection, works)
        self._there = frozenset(
            it
            for work in works
            for number, it in enumerate(work.statements, 1)
            if isinstance(it, Statement) and before.get((work, number, ".".join(it.shape.table)))
        )
        outcomes = super().execute(connection, works, naming)
        after = self._rows(connection, works)
        for (work, number, table), rows in before.items():
            then = after[work, number, table]
            gone, came = [it for it in rows if it not in then], [it for it in then if it not in rows]
            for place in range(max(len(gone), len(came))):
                pair = (*gone[place : place + 1], None)[0], (*came[place : place + 1], None)[0]
                self._mine[work].append((number, table, *pair))
        return outcomes

    def finish(self, connection: psycopg.Connection) -> bool:
        """Never to be committed; but what COMMIT would have said is asked."""
        try:
            connection.execute(difference.CHECKED)
        except psycopg.Error as error:
            raise Suspects(self._works, error) from error
        self._found.update(self._mine)
        return False

    @staticmethod
    def _rows(connection: psycopg.Connection, works: Sequence[Work]) -> dict[tuple[Work, int, str], list[str]]:
        asked: defaultdict[Shape, list[tuple[Work, int, str]]] = defaultdict(list)
        for work in works:
            for number, statement in enumerate(work.statements, 1):
                if isinstance(statement, Statement):
                    asked[statement.shape].append((work, number, statement.document))
        found: dict[tuple[Work, int, str], list[str]] = {}
        for shape, members in asked.items():
            try:
                rows = difference.rows(connection, shape, [document for *_, document in members])
            except psycopg.Error as error:
                raise Suspects([work for work, *_ in members], error) from error
            table = ".".join(shape.table)
            found |= {(work, number, table): it for (work, number, _), it in zip(members, rows, strict=True)}
        return found


def refused(connection: psycopg.Connection, work: Work, error: psycopg.Error, message: str) -> Applied | None:
    """As `conflict.refusal`, but nothing is to be written: the outcome."""
    refusal = conflict.refusal(connection, work, error, message)
    return refusal.applied if isinstance(refusal, Refusal) else refusal


class DryRun(Consumer):
    """A consumer whose applier examines by `Shadow`s that fill `found`."""

    name = "dry-run"
    found: dict[Work, list[Difference]]

    def _keep_waiting(self, items: Sequence[Item], stop: threading.Event) -> None:
        """Record and count what would have happened, while the connection is idle. Nothing waits: it would have."""
        told = [(it, it.applied, self.found.pop(it.work, []) if it.work else []) for it in items if it.applied]
        if records := list(_records(told)):
            persist(lambda: self._record(records), what="record a dry run", stop=stop)
        for item, applied, rows in told:
            same = applied.outcome is Outcome.APPLIED and not rows and not _free(item)
            self._metrics.would_have.labels(_UNCHANGED if same else applied.outcome.value).inc()
            for kind, decision in applied.conflicts:
                self._metrics.would_have_conflicts.labels(kind, decision).inc()
            if applied.outcome is Outcome.DEAD_LETTER:
                event_id = item.event.id if item.event else None
                _log.warning("event would go to the dead letters", event_id=event_id, reason=applied.reason)
                if self._drift and applied.reason.startswith("42"):
                    self._drift.hurry()

    def _holds_up(self, _outcomes: Iterable[Applied]) -> bool:
        """They are recorded over the connection that the next batch needs."""
        return True

    def _look_around(self, stop: threading.Event) -> None:
        if self._drift:
            persist(self._drift.look, what="look at the catalogue", stop=stop)

    def _settle(self, items: Sequence[Item], stop: threading.Event) -> None:
        """All that is recorded is acknowledged."""
        delivered = [it.delivery for it in items if not (isinstance(it.delivery, Parked) or it.delivery.lost)]
        if delivered:
            persist(lambda: self._source.acknowledge(delivered), what="acknowledge", stop=stop)

    def _record(self, records: Sequence[MappingOf[str, Any]]) -> None:
        try:
            connection = self._applier.connection()
            with connection.transaction():
                codec = legacy.speak_its_encoding(connection)
                documents = orjson.dumps(
                    [{name: _kept(it, codec) for name, it in record.items()} for record in records]
                )
                psycopg.RawCursor(connection).execute(_RECORD, [documents.decode()])
        except psycopg.Error as error:
            failure = unavailable(error)
            if not isinstance(failure, LegacyUnavailable):
                failure.hint = "run `figbridge init`: a dry run needs the table figbridge.dry_run"
            raise failure from error


def _free(item: Item) -> bool:
    """Whether the event has SQL of the user's own, of which nobody knows what it changes."""
    return item.work is not None and not all(isinstance(it, Statement) for it in item.work.statements)


def _kept(value: Any, codec: str) -> Any:
    """As a column can hold it; what the database's encoding lacks is an escape, as in a dead letter."""
    return writable(value.replace("\0", "\\0"), codec) if isinstance(value, str) else value


def _records(told: Iterable[tuple[Item, Applied, list[Difference]]]) -> Iterator[dict[str, Any]]:
    for item, applied, rows in told:
        plain = applied.outcome in {Outcome.APPLIED, Outcome.DUPLICATE} or applied == UNMAPPED
        if plain and not rows and not applied.conflicts:
            continue
        work, event = item.work, item.event
        yield {
            "source": event.source if event else None,
            "key": work.key if work else None,
            "event_id": event.id if event else None,
            "scope": work.entity[0] if work else None,
            "identity": work.entity[1] if work else None,
            "outcome": applied.outcome.value,
            "reason": applied.reason,
            "message": applied.message,
            "differences": orjson.dumps([_document(*it) for it in rows]).decode(),
            "conflicts": [{"kind": kind, "decision": decision} for kind, decision in applied.conflicts],
        }


def _document(number: int, table: str, before: str | None, after: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {"statement": number, "table": table}
    if before and after:
        # a value is nested too deeply for us, or has half of a surrogate pair: nobody says which columns differ
        with contextlib.suppress(RecursionError, msgspec.DecodeError):
            then = _COLUMNS.decode(before)
            found["columns"] = [name for name, value in _COLUMNS.decode(after).items() if value != then[name]]
    return found | {
        "before": orjson.Fragment(before) if before else None,
        "after": orjson.Fragment(after) if after else None,
    }
