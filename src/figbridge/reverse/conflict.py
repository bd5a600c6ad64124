"""Conflicts in the transaction that they arise in: lock the rows, let the rules decide, write, and keep what was found.

    look      which entities were applied before: tells update_deleted from update_missing
    execute   1. lock and compare the rows of all events (`policy`), statement by statement
              2. the rules decide (`verdict`)
              3. what is left is written by the ordinary statements
    finish    the conflicts into figbridge.conflict, in one statement

INVARIANT. A conflict and what was decided on it commit together with the idempotency key, or none of them does. So each
is kept once, and an event that was dropped is never without its record.

RACES. An update or delete is decided on a row that is locked until the end. A row that was not there cannot be locked:
if somebody makes it before our insert does, the insert fails on its key, and the event is tried again a moment later.
A unique value or a parent that is missing is known by the error alone. Then the event is applied anew in a transaction
that writes nothing but its key, its version and its conflict (`refusal`).
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import orjson
import psycopg

from figbridge import legacy
from figbridge.reverse import transaction
from figbridge.reverse.group import Naming
from figbridge.reverse.mapping import Work
from figbridge.reverse.message import write
from figbridge.reverse.outcome import DONE, FOREIGN_KEY, STALE_VERSION, Applied, Outcome
from figbridge.reverse.parents import tables_of
from figbridge.reverse.policy import Expected, Policy, Row
from figbridge.reverse.statement import Free, Statement
from figbridge.reverse.transaction import STALE, Suspects
from figbridge.reverse.verdict import FK_MISSING, UNIQUE_OTHER, Conflict, Verdict, judge

_UNIQUE: Final = "23505"  # unique_violation

_KNOWN: Final = """
    SELECT v.scope, v.identity FROM json_to_recordset($1::json) AS c (scope text, identity text)
    JOIN figbridge.entity_version v ON v.scope = c.scope AND v.identity = c.identity WHERE NOT v.deleted
"""
# Documents are strings in it, because json_to_recordset reads every escape below: \u0000, a lone surrogate, or what the
# database's encoding has not would fail it, and a json column holds them all.
_KEEP: Final = """
    INSERT INTO figbridge.conflict (source, idempotency_key, event_id, scope, identity, version, kind, decision, state,
        table_name, statement, expected, before, proposed, after, columns, message, event)
    SELECT c.source, c.key, c.event_id, c.scope, c.identity, c.version, c.kind, c.decision,
           CASE c.decision WHEN 'rejected' THEN 'open' ELSE 'decided' END,
           c.table_name, c.statement, c.expected::json, c.before::json, c.proposed::json, c.after::json, c.columns,
           c.message, c.event::json
    FROM json_to_recordset($1::json) AS c (source text, key text, event_id text, scope text, identity text,
        version numeric, kind text, decision text, table_name text, statement integer, expected text, before text,
        proposed text, after text, columns json, message text, event text)
"""
# The columns of the index that was violated, and whether they are the ones that `$4` names.
_INDEX: Final = """
    SELECT ARRAY(SELECT a.attname::text FROM pg_attribute a
                 WHERE a.attrelid = i.indrelid AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1]))
    FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
    JOIN pg_class t ON t.oid = i.indrelid JOIN pg_namespace n ON n.oid = t.relnamespace
    WHERE n.nspname = $1 AND t.relname = $2 AND c.relname = $3
"""


class Task:
    """One statement of an event, and what is decided on it."""

    __slots__ = ("expected", "found", "key", "statement", "verdict")

    def __init__(self, statement: Statement, expected: Expected) -> None:
        self.statement, self.expected = statement, expected
        self.key: Sequence[str] = statement.shape.key
        self.found: Row | None = None
        self.verdict: Verdict = Verdict(statement)


class Conflicts:
    """See `transaction.Examiner`; for one transaction. `force`: a person has decided for the events."""

    force = False

    def __init__(self) -> None:
        self._kept: list[bytes] = []
        self._known: set[tuple[str, str]] = set()
        # updates whose row is there for as long as matters here: it is locked, or looked at
        self._there: frozenset[Statement] = frozenset()

    def look(self, connection: psycopg.Connection, works: Sequence[Work]) -> None:
        """See `Examiner.look`."""
        asked = [
            {"scope": work.entity[0], "identity": work.entity[1]}
            for work in works
            if work.expected and work.version is not None
        ]
        if asked:
            self._known = set(psycopg.RawCursor(connection).execute(_KNOWN, [orjson.dumps(asked).decode()]).fetchall())

    def stale(self, works: Iterable[Work]) -> dict[Work, Applied]:
        """See `Examiner.stale`."""
        outcomes = {}
        for work in works:
            first = next((it for it in work.expected if it), None)
            outcomes[work] = STALE
            if first and first.policy.rules.kinds.stale_version == "record":
                statement = next(it for it in work.statements if isinstance(it, Statement))
                stale = Conflict(STALE_VERSION, "legacy", {})
                self.keep(work, 1, Task(statement, first), stale)
                outcomes[work] = dataclasses.replace(STALE, conflicts=((stale.kind, stale.decision),))
        return outcomes

    def execute(
        self, connection: psycopg.Connection, works: Sequence[Work], naming: Naming | None
    ) -> dict[Work, Applied]:
        """See `Examiner.execute`."""
        outcomes: dict[Work, Applied] = {}
        for run in _runs(works):
            if run[0].expected:
                outcomes |= self._judged(connection, run, naming)
            else:
                outcomes |= transaction.execute(connection, run, naming, self._there)
        return outcomes

    def finish(self, connection: psycopg.Connection) -> bool:
        """See `Examiner.finish`."""
        if self._kept:
            documents = f"[{b','.join(self._kept).decode()}]"
            psycopg.RawCursor(connection).execute(_KEEP, [documents])
        return True

    def keep(self, work: Work, number: int, task: Task, conflict: Conflict, message: str = "") -> None:
        """Note a conflict of statement `number` (from 1), to be written at the end."""
        after = task.verdict.statement.document if task.verdict.statement and conflict.decision != "rejected" else None
        record = {
            "source": work.event.source,
            "key": work.key,
            "event_id": work.event.id,
            "scope": work.entity[0],
            "identity": work.entity[1],
            "version": work.version,
            "kind": conflict.kind,
            "decision": conflict.decision,
            "table_name": ".".join(task.statement.shape.table),
            "statement": number,
            "expected": task.expected.before,
            "before": task.found.text if task.found else None,
            "proposed": task.statement.document,
            "after": after,
            "columns": conflict.columns,
            "message": message.replace("\0", "\\0"),
            "event": write(work.document, "the event"),
        }
        self._kept.append(orjson.dumps(record))

    def _judged(
        self, connection: psycopg.Connection, works: Sequence[Work], naming: Naming | None
    ) -> dict[Work, Applied]:
        tasks = {
            work: [
                Task(statement, expected) if expected else None
                for statement, expected in zip(
                    (it for it in work.statements if isinstance(it, Statement)), work.expected, strict=True
                )
            ]
            for work in works
        }
        with legacy.every_digit(connection):
            self._lock(connection, tasks)
        waiting: dict[Work, Statement] = {}
        for work in works:
            for task in filter(None, tasks[work]):
                known = work.entity in self._known
                task.verdict = judge(task.statement, task.expected, task.found, task.key, known=known, force=self.force)
                if task.verdict.waits:
                    waiting.setdefault(work, task.statement)
        if waiting:
            raise Suspects(list(waiting), awaited=waiting)
        return self._write(connection, tasks, naming)

    def _lock(self, connection: psycopg.Connection, tasks: dict[Work, list[Task | None]]) -> None:
        """Lock and compare, policy by policy, each in the order of the entities: as the statements will do."""
        by_policy: dict[Policy, list[tuple[Work, Task]]] = {}
        for work in sorted(tasks, key=lambda work: work.entity):
            for task in filter(None, tasks[work]):
                by_policy.setdefault(task.expected.policy, []).append((work, task))
        for policy, members in by_policy.items():
            key = policy.key or legacy.primary_key_of(connection, *policy.table)
            if not key:
                continue  # an insert into a table without a primary key, which `figbridge check` refuses
            query = policy.query(key)
            try:
                rows = [(task.statement, task.expected) for _, task in members]
                found = policy.lock(connection, rows, key)
            except psycopg.Error as error:
                raise Suspects([work for work, _ in members], error, query.decode()) from error
            for place, (work, task) in enumerate(members):
                task.key, task.found = key, found.get(place)
                self.locked(task, tasks[work].index(task) + 1)

    def locked(self, task: Task, number: int) -> None:
        """Told of each row that was looked for, and of its statement's number."""

    def _write(
        self, connection: psycopg.Connection, tasks: dict[Work, list[Task | None]], naming: Naming | None
    ) -> dict[Work, Applied]:
        outcomes: dict[Work, Applied] = {}
        originals: dict[Work, Work] = {}
        for work, mine in tasks.items():
            judged = [task for task in mine if task]
            self._there |= {task.verdict.statement for task in judged if task.found and task.verdict.statement}
            rejected = any(task.verdict.rejected for task in judged)
            conflicts = []
            for number, task in enumerate(mine, 1):
                for conflict in task.verdict.conflicts if task else ():
                    decided = conflict._replace(decision="rejected") if rejected else conflict
                    assert task is not None  # noqa: S101 (it has a verdict)
                    self.keep(work, number, task, decided)
                    conflicts.append((decided.kind, str(decided.decision)))
            outcome = DONE
            statements = [] if rejected else list(_decided(work.statements, mine))
            if conflicts:
                reason = "" if statements else conflicts[0][0]
                kind = Outcome.APPLIED if statements else Outcome.IGNORED
                outcome = Applied(kind, reason, conflicts=tuple(conflicts))
            outcomes[work] = outcome
            if statements:
                same = all(task is None or task.verdict.statement is task.statement for task in mine)
                originals[work if same else work.having(statements)] = work
        if not originals:
            return outcomes
        try:
            written = transaction.execute(connection, list(originals), naming, self._there)
        except Suspects as suspects:
            raise Suspects(
                [originals[it] for it in suspects.works],
                suspects.error,
                suspects.query,
                awaited={originals[it]: statement for it, statement in suspects.awaited.items()},
            ) from suspects
        for replaced, applied in written.items():
            work = originals[replaced]
            if not outcomes[work].conflicts:
                outcomes[work] = applied
        return outcomes


class Refusal(Conflicts):
    """One event that the database refused: its key, its version and its conflict, and nothing else.

    `applied` is the outcome.
    """

    def __init__(self, task: Task, number: int, conflict: Conflict, message: str) -> None:
        super().__init__()
        self._refused = task, number, conflict, message
        noted = ((conflict.kind, str(conflict.decision)),)
        self.applied = Applied(Outcome.IGNORED, conflict.kind, conflicts=noted)

    def execute(
        self, _connection: psycopg.Connection, works: Sequence[Work], _naming: Naming | None
    ) -> dict[Work, Applied]:
        """Write nothing."""
        task, number, conflict, message = self._refused
        for work in works:
            self.keep(work, number, task, conflict, message)
        return dict.fromkeys(works, self.applied)


def examiner_of(works: Sequence[Work]) -> Conflicts | None:
    """What these events need; None when nobody compares anything."""
    return Conflicts() if any(work.expected for work in works) else None


def refusal(connection: psycopg.Connection, work: Work, error: psycopg.Error, message: str) -> Refusal | Applied | None:
    """What the rules say of an event that fails with `error`; None when they leave it as it is.

    Applied when the row came between our look and our insert: try again. Raises psycopg.Error.
    """
    state, diag = error.sqlstate, error.diag
    if state not in {_UNIQUE, *FOREIGN_KEY}:
        return None
    tables = tables_of(connection, diag)
    made = [it for it in work.statements if isinstance(it, Statement)]
    for number, (statement, expected) in enumerate(zip(made, work.expected, strict=True), 1):
        if expected is None or statement.shape.table not in tables:
            continue
        kinds, policy = expected.policy.rules.kinds, expected.policy.rules.policy
        task = Task(statement, expected)
        task.verdict = Verdict(None)
        if state in FOREIGN_KEY:
            rule, kind = str(kinds.fk_missing), FK_MISSING
        else:
            rule, kind = kinds.unique_other or ("legacy_wins" if policy == "legacy_wins" else "reject"), UNIQUE_OTHER
            key = statement.shape.key or legacy.primary_key_of(connection, *statement.shape.table)
            if set(key) == _columns(connection, diag):
                return Applied(Outcome.RETRY, state, "a row with this key was made while we looked")
        if rule in {"wait", "dead_letter"}:
            return None
        decision = "legacy" if rule == "legacy_wins" else "rejected"
        return Refusal(task, number, Conflict(kind, decision, {}), message)  # type: ignore[arg-type]  # one of the two
    return None


def _columns(connection: psycopg.Connection, diag: psycopg.errors.Diagnostic) -> set[str]:
    names = [diag.schema_name, diag.table_name, diag.constraint_name]
    row = psycopg.RawCursor(connection).execute(_INDEX, names).fetchone()
    return set(row[0]) if row else set()


def _runs(works: Sequence[Work]) -> Iterator[list[Work]]:
    """Cut where compared and plain events meet, and where a row comes a second time: the first is written before."""
    run: list[Work] = []
    rows: set[Any] = set()
    for work in works:
        mine = {it.row for it in work.expected if it}
        if run and (bool(run[0].expected) != bool(work.expected) or rows & mine):
            yield run
            run, rows = [], set()
        run.append(work)
        rows |= mine
    if run:
        yield run


def _decided(statements: Sequence[Statement | Free], tasks: Sequence[Task | None]) -> Iterator[Statement | Free]:
    """The statements of an event as the rules leave them."""
    rest = iter(tasks)
    for statement in statements:
        task = next(rest) if isinstance(statement, Statement) else None
        decided = task.verdict.statement if task else statement
        if decided is not None:
            yield decided
