"""One event through its mapping, for a human to look at: the statements, and what they would change.

`show` needs no database. `rehearse` runs them in a transaction that is always rolled back: the row before and after,
and what triggers did elsewhere, counted by the server's own statistics of the transaction.
https://www.postgresql.org/docs/current/monitoring-stats.html#MONITORING-PG-STAT-ALL-TABLES-VIEW

Where the mapping has rules for conflicts, they decide first (`decide`): the event goes through the applier itself, as
in a dry run. Under a key of its own and without its version, because the event at hand is mostly one that was applied
already, and the question is what the rules make of it; what the key and the version would have said is told beside it.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Final

import psycopg

from figbridge import legacy
from figbridge.config import Config
from figbridge.errors import BridgeError, ConfigError, Problem
from figbridge.reverse import difference
from figbridge.reverse.apply import Applier
from figbridge.reverse.conflict import Task
from figbridge.reverse.dryrun import Difference, Shadow, refused
from figbridge.reverse.mapping import Mappings, Work
from figbridge.reverse.message import Enveloping, parse
from figbridge.reverse.outcome import Applied, Outcome, words
from figbridge.reverse.statement import Free, Statement
from figbridge.reverse.verdict import Conflict

_TOUCHED: Final = """
    SELECT schemaname || '.' || relname, n_tup_ins, n_tup_upd, n_tup_del FROM pg_stat_xact_user_tables
    WHERE n_tup_ins + n_tup_upd + n_tup_del > 0 AND schemaname <> 'figbridge' ORDER BY 1
"""
_BEFORE: Final = """
    SELECT (SELECT 'applied' FROM figbridge.inbox WHERE (source, idempotency_key) = ($1, $2)),
           (SELECT version::text FROM figbridge.entity_version
            WHERE (scope, identity) = ($3, $4) AND version >= $5::numeric)
"""
_BY: Final = {
    "new": "the event is written",
    "legacy": "the row stays",
    "rejected": "nothing of the event is written, and a person decides",
    "merged": "each column has a winner of its own",
    "delta": "what the new system added is added",
    "sql": "the rule's expression is written",
}
_SOURCE: Final = "figbridge.mapping-test"  # the inbox source of a key that is rolled back


def prepare(mappings: Mappings, body: bytes, bare: Enveloping | None = None) -> Work:
    """What `body` becomes. Raises Malformed when it cannot become anything, ConfigError when nobody asked for it."""
    event = parse(body, bare)
    mapping = mappings.find(event)
    if mapping is None:
        what = f"source {event.source!r} with detail-type {event.detail_type!r} matches no mapping: it would be ignored"
        raise ConfigError("the event is not mapped", [Problem("reverse.mappings", what, "add a mapping for it")])
    return mapping.prepare(event)


def show(work: Work) -> Iterator[str]:
    """The keys and the statements with their values."""
    yield f"idempotency key  {work.event.source} / {work.key}"
    yield f"entity           {work.entity[0]} / {work.entity[1]}"
    yield f"version          {work.version or 'none: a late event overwrites a newer one'}"
    for number, statement in enumerate(work.statements, 1):
        query = statement.query if isinstance(statement, Free) else statement.query.decode()
        values = statement.parameters if isinstance(statement, Free) else statement.document
        yield f"statement {number}      {query}"
        yield f"                 {values}"


def rehearse(dsn: str, work: Work) -> Iterator[str]:
    """Run the statements and roll back; the rows before and after, or the error.

    Raises BridgeError when all is told and PostgreSQL has refused the event, LegacyUnavailable.
    """
    refusal = ""
    with legacy.connect(dsn, purpose="mapping-test") as connection, legacy.translated():
        connection.execute("SET client_encoding TO 'UTF8'")
        try:
            for number, statement in enumerate(work.statements, 1):
                yield from _run(connection, number, statement)
            yield from _touched(connection)
            connection.execute(difference.CHECKED)
        except psycopg.Error as failure:
            if failure.sqlstate is None:
                raise
            refusal = f"{words(failure)} (SQLSTATE {failure.sqlstate})"
            yield f"refused          {refusal}"
        finally:
            connection.rollback()
    yield "rolled back      nothing was changed"
    _require(refusal)


def decide(config: Config, work: Work) -> Iterator[str]:
    """As `rehearse`, for a work whose mapping has rules: what they find, what they decide, what is written then.

    Raises as `rehearse`.
    """
    section = config.reverse
    assert section is not None  # noqa: S101 (it has the mapping)
    told = _Told(work)
    applier = Applier(
        config.legacy.write_dsn,
        statement_timeout=section.statement_timeout,
        lock_timeout=section.lock_timeout,
        examine=lambda _works: told,
        refuse=refused,
    )
    tried = dataclasses.replace(work, identity=(_SOURCE, work.key), version=None, again=True)
    with contextlib.closing(applier):
        applied = applier.apply_all([tried], hopeful=False)[tried]
        yield from told.lines()
        yield from _outcome(applied, told)
        with legacy.translated():
            parameters = [work.event.source, work.key, *work.entity, work.version]
            known, newest = psycopg.RawCursor(applier.connection()).execute(_BEFORE, parameters).fetchone() or ("", "")
    if known:
        yield "but              its idempotency key was applied before: the bridge would do nothing"
    elif newest:
        yield f"but              version {newest} was applied before: the bridge would ignore the event (stale_version)"
    yield "rolled back      nothing was changed"
    _require(applied.reason if applied.outcome is Outcome.DEAD_LETTER else "")


def _require(refusal: str) -> None:
    if refusal:
        raise BridgeError(f"the event would be refused: {refusal}", hint="mend the mapping, or the event")


class _Told(Shadow):
    """What the rules say of one work, kept for a human instead of the table."""

    def __init__(self, work: Work) -> None:
        self._differences: dict[Work, list[Difference]] = {}
        super().__init__(self._differences)
        self._work = work
        self.conflicts: list[tuple[int, Task, Conflict]] = []
        self._counts: list[str] = []

    def look(self, connection: psycopg.Connection, works: Sequence[Work]) -> None:  # noqa: ARG002
        """Whether the entity was applied before, by the version that the work bears in earnest."""
        super().look(connection, [self._work])

    def keep(self, work: Work, number: int, task: Task, conflict: Conflict, message: str = "") -> None:  # noqa: ARG002
        """See `Conflicts.keep`."""
        self.conflicts.append((number, task, conflict))

    def finish(self, connection: psycopg.Connection) -> bool:
        """See `Shadow.finish`."""
        self._counts = list(_touched(connection))
        return super().finish(connection)

    def lines(self) -> Iterator[str]:
        """Conflict by conflict, and then what is written."""
        for number, task, conflict in self.conflicts:
            yield f"conflict         {conflict.kind} in statement {number}: {_decision(conflict)}"
            if task.expected.columns:
                yield f"                 expected {task.expected.before}"
            yield f"                 found    {task.found.text if task.found else 'no such row'}"
        for number, table, before, after in next(iter(self._differences.values()), []):
            yield f"statement {number}      {table}"
            yield from (f"               {sign} {row}" for sign, row in (("-", before), ("+", after)) if row)
        yield from self._counts


def _decision(conflict: Conflict) -> str:
    by = json.dumps(conflict.columns) if conflict.columns else ""
    return f"{conflict.decision}, {_BY[conflict.decision]} {by}".rstrip()


def _outcome(applied: Applied, told: _Told) -> Iterator[str]:
    if not told.conflicts:  # known by the error of the statement alone
        yield from (f"conflict         {kind}: {by}, {_BY[by]}" for kind, by in applied.conflicts)
    reason = f": {applied.reason}" if applied.reason else ""
    waits = "waits" if applied.outcome is Outcome.RETRY else applied.outcome.value
    yield f"outcome          {waits}{reason}" + (f" ({applied.message})" if applied.message else "")


def _touched(connection: psycopg.Connection) -> Iterator[str]:
    for table, inserted, updated, deleted in connection.execute(_TOUCHED).fetchall():
        yield f"in all           {table}: {inserted} inserted, {updated} updated, {deleted} deleted"


def _run(connection: psycopg.Connection, number: int, statement: Statement | Free) -> Iterator[str]:
    if isinstance(statement, Free):
        rows = connection.execute(statement.query, statement.parameters).rowcount
        yield f"statement {number}      {rows} rows"
        return
    (before,) = difference.rows(connection, statement.shape, [statement.document])
    cursor = psycopg.RawCursor(connection).execute(statement.query, statement.parameters)
    yield f"statement {number}      {cursor.rowcount} rows"
    (after,) = difference.rows(connection, statement.shape, [statement.document])
    if statement.shape.action == "update" and not before:
        yield "                 no such row: the event would wait for it"
    for row in [it for it in before if it not in after]:
        yield f"               - {row}"
    for row in [it for it in after if it not in before]:
        yield f"               + {row}"
