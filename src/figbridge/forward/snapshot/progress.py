"""figbridge.snapshot: requests and progress, the part of one slot. A table has one row, that of its last snapshot.

    waiting ─▶ running ─▶ done            a process that is killed leaves `running`; the next one goes on from there
       ▲  ▲       │  └──▶ failed          only a new request begins it again
       │  └───────┴─────▶ cancelled
       └── paused ◀┘

A task that is begun anew (its table, or the order of its rows, is another one) waits again, as the next run.

A task with a `gap` tells consumers of its start and its end (`backfill`), in the transaction that changes its state.

INVARIANT. A cursor is written only for rows that are durable, and never over what a person has ordered meanwhile:
states are changed by statements that name the states they change from.
One that has ended leaves nothing in figbridge.snapshot_moved (`moved`).
What another cluster wrote there, before a dump was restored, is left alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import psycopg
from psycopg.rows import class_row
from psycopg.types.json import Json

from figbridge.forward.snapshot import PREFIX, backfill
from figbridge.forward.snapshot.plan import Cursor
from figbridge.metrics import Metrics
from figbridge.preflight.catalogue import Name

State = Literal["waiting", "running", "paused", "done", "cancelled", "failed"]
OPEN: Final = ("waiting", "running", "paused")

HERE: Final = "(SELECT system_identifier::pg_catalog.text FROM pg_control_system())"
MINE: Final = f"slot = %(slot)s AND system_identifier = {HERE}"
ONE: Final = f"{MINE} AND schema_name = %(schema)s AND table_name = %(table)s"


@dataclass(frozen=True, slots=True)
class Task:
    """A snapshot of a table: a row of figbridge.snapshot. `age` and `silence` are seconds since its start and news.

    `gap` says why changes of the table are in no event, if some are not.
    """

    schema: str
    table: str
    run: int
    state: State
    condition: str | None
    cursor: Cursor | None
    rows: int
    estimate: int | None
    message: str | None
    age: float | None
    silence: float
    gap: str | None

    @property
    def name(self) -> Name:
        """The table."""
        return self.schema, self.table


def show(metrics: Metrics, task: Task, *, state: State | None = None, estimate: int | None = None) -> None:
    """Set the gauges of a table: as `task` has it, or as it is by now."""
    label = ".".join(task.name)  # as all series name a table
    for one in get_args(State):
        metrics.snapshot_state.labels(label, one).set(one == (state or task.state))
    metrics.snapshot_durable.labels(label).set(task.rows)
    metrics.snapshot_estimate.labels(label).set(estimate or task.estimate or 0)


def hide(metrics: Metrics) -> None:
    """Another process has the stream, and says how far it is."""
    for gauge in (metrics.snapshot_state, metrics.snapshot_durable, metrics.snapshot_estimate):
        gauge.clear()


class Progress:
    """Statements about the snapshots of one slot, each durable when its method returns, on the caller's connection.

    Raise psycopg.Error.
    """

    def __init__(self, slot: str) -> None:
        self._slot = slot

    def tasks(self, connection: psycopg.Connection) -> list[Task]:
        """All of them, in the order in which they are to be done."""
        with connection.cursor(row_factory=class_row(Task)) as cursor:
            return cursor.execute(_SELECT, {"slot": self._slot}).fetchall()

    def want(self, connection: psycopg.Connection, name: Name, condition: str | None = None) -> bool:
        """Ask for a snapshot of a table; False, and nothing is changed, while there is one that has not ended."""
        return self._change(connection, _WANT, name, condition=condition, open=list(OPEN))

    def want_first(self, connection: psycopg.Connection, name: Name) -> bool:
        """Ask for a snapshot of a table that never had one."""
        return self._change(connection, _WANT_FIRST, name, condition=None)

    def start(self, connection: psycopg.Connection, task: Task, estimate: int | None) -> bool:
        """Take up a task that waits; False if somebody has ordered otherwise."""
        values = {"run": task.run, "estimate": estimate}
        with connection.transaction():
            connection.execute(_DURABLE)
            row = connection.execute(_START, self._about(task.name) | values).fetchone()
            if row and task.age is None:
                connection.execute(_UNTOLD, self._about(task.name))  # an earlier run's
                self._tell(connection, task, "started", row[0])
        return row is not None

    def anew(self, connection: psycopg.Connection, task: Task) -> bool:
        """Begin it again, as the next run, whose rows have other ids; False if somebody has ordered otherwise."""
        return self._change(connection, _ANEW, task.name, ends=True, run=task.run)

    def advance(
        self, connection: psycopg.Connection, task: Task, cursor: Cursor | None, rows: int, marks: Sequence[str]
    ) -> State | None:
        """`rows` more are durable, up to `cursor`: the state that is ordered; None when the task is no more.

        While it is running, `marks` are written into the stream, in the same transaction. One statement, on a
        connection with the settings `SETTINGS`: each round trip costs as much as some thousand rows.
        """
        values = {"cursor": Json(cursor) if cursor else None, "rows": rows, "run": task.run, "marks": list(marks)}
        row = connection.execute(_ADVANCE, self._about(task.name) | values).fetchone()
        return row[0] if row else None

    def end(self, connection: psycopg.Connection, task: Task) -> bool:
        """All of its rows are durable; False if somebody has ordered otherwise."""
        with connection.transaction():
            connection.execute(_DURABLE)
            row = connection.execute(_END, self._about(task.name) | {"run": task.run}).fetchone()
            if row:
                connection.execute(_UNTOLD, self._about(task.name))
                self._tell(connection, task, "finished", row[0])
        return row is not None

    def _tell(self, connection: psycopg.Connection, task: Task, state: backfill.State, since: str) -> None:
        if task.gap is not None and task.condition is None:  # with one, what is not read may still be there
            about = {"slot": self._slot, "schema": task.schema, "table": task.table}
            backfill.tell(connection, state, **about, run=task.run, since=since, reason=task.gap)

    def fail(self, connection: psycopg.Connection, task: Task, why: str) -> bool:
        """It cannot go on."""
        return self._change(connection, _FAIL, task.name, ends=True, run=task.run, why=why)

    def trouble(self, connection: psycopg.Connection, task: Task, why: str) -> bool:
        """It stands still and is tried again: what `--status` says until rows leave."""
        return self._change(connection, _TROUBLE, task.name, run=task.run, why=why)

    def order(self, connection: psycopg.Connection, name: Name, state: State, of: Sequence[State]) -> bool:
        """Set the state of a task that is in one of the states `of`."""
        return self._change(connection, _ORDER, name, ends=state not in OPEN, state=state, of=list(of))

    def _about(self, name: Name) -> dict[str, object]:
        return {"slot": self._slot, "schema": name[0], "table": name[1]}

    def _change(
        self, connection: psycopg.Connection, statement: str, name: Name, *, ends: bool = False, **values: object
    ) -> bool:
        with connection.transaction():
            connection.execute(_DURABLE)
            changed = connection.execute(statement, self._about(name) | values).rowcount == 1
            if changed and ends:
                connection.execute(_UNTOLD, self._about(name))
        return changed


# A standby that is away must not hold us up, and a database may be read-only by default. To be told about a table takes
# the lock of a SELECT, too (pg_get_expr, pg_partition_tree): who has locked it is waited for no longer than by a chunk.
SETTINGS: Final = "-c synchronous_commit=local -c default_transaction_read_only=off -c lock_timeout=2s"
_DURABLE: Final = "SET TRANSACTION READ WRITE; SET LOCAL synchronous_commit = 'local'"
_UNTOLD: Final = f"DELETE FROM figbridge.snapshot_moved WHERE {ONE}"  # noqa: S608 (constants)
_SELECT: Final = f"""
SELECT schema_name AS schema, table_name AS "table", run, state, condition, cursor, rows, estimate, message,
       extract(epoch FROM clock_timestamp() - started_at)::float8 AS age,
       extract(epoch FROM clock_timestamp() - updated_at)::float8 AS silence, gap
FROM figbridge.snapshot WHERE {MINE} ORDER BY requested_at, schema_name, table_name
"""  # noqa: S608 (constants)
_NEW: Final = f"""
INSERT INTO figbridge.snapshot AS s (slot, system_identifier, schema_name, table_name, run, state, condition)
VALUES (%(slot)s, {HERE}, %(schema)s, %(table)s, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint,
        'waiting', %(condition)s)
"""  # noqa: S608 (constants)
_WANT_FIRST: Final = f"{_NEW} ON CONFLICT DO NOTHING"
_WANT: Final = f"""{_NEW}
ON CONFLICT (slot, system_identifier, schema_name, table_name) DO UPDATE
SET run = greatest(excluded.run, s.run + 1), state = excluded.state, condition = excluded.condition, cursor = NULL,
    rows = 0, estimate = NULL, message = NULL, requested_at = now(), started_at = NULL, updated_at = now(),
    gap = CASE WHEN s.state <> 'done' THEN s.gap END, since = NULL  -- one that was not filled still is one
WHERE s.state <> ALL (%(open)s)
"""
_START: Final = f"""
UPDATE figbridge.snapshot SET state = 'running', estimate = %(estimate)s, updated_at = now(),
       started_at = coalesce(started_at, now()), since = coalesce(since, pg_current_wal_insert_lsn())
WHERE {ONE} AND run = %(run)s AND state IN ('waiting', 'running') RETURNING since::pg_catalog.text
"""  # noqa: S608 (constants)
_ANEW: Final = f"""
UPDATE figbridge.snapshot SET run = run + 1, state = 'waiting', cursor = NULL, rows = 0, estimate = NULL,
       message = NULL, started_at = NULL, updated_at = now(), since = NULL
WHERE {ONE} AND run = %(run)s AND state IN ('waiting', 'running')
"""  # noqa: S608 (constants)
_ADVANCE: Final = f"""
WITH advanced AS (
    UPDATE figbridge.snapshot SET cursor = %(cursor)s, rows = rows + %(rows)s, updated_at = now(),
           message = CASE WHEN %(rows)s = 0 THEN message END
    WHERE {ONE} AND run = %(run)s RETURNING state
)
SELECT state, (SELECT count(pg_logical_emit_message(true, '{PREFIX}', mark))
               FROM unnest(%(marks)s::pg_catalog.text[]) AS mark WHERE state = 'running')
FROM advanced
"""  # noqa: S608 (constants)
_END: Final = f"""
UPDATE figbridge.snapshot SET state = 'done', message = NULL, updated_at = now()
WHERE {ONE} AND run = %(run)s AND state IN ('running', 'paused') RETURNING since::pg_catalog.text
"""  # noqa: S608 (constants)
_FAIL: Final = f"""
UPDATE figbridge.snapshot SET state = 'failed', message = %(why)s, updated_at = now()
WHERE {ONE} AND run = %(run)s AND state IN ('waiting', 'running')
"""  # noqa: S608 (constants)
_TROUBLE: Final = f"""
UPDATE figbridge.snapshot SET message = %(why)s WHERE {ONE} AND run = %(run)s AND state IN ('waiting', 'running')
"""  # noqa: S608 (constants)
_ORDER: Final = f"""
UPDATE figbridge.snapshot SET state = %(state)s, updated_at = now() WHERE {ONE} AND state = ANY (%(of)s)
"""  # noqa: S608 (constants)
