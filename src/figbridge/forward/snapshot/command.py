"""`figbridge snapshot`: orders to a running bridge, by rows of figbridge.snapshot, and what has become of them.

Nothing is sent to the bridge: its loop looks once a second, and after each chunk. So an order may be given while no
bridge runs, and holds when the next one starts.
"""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Literal

import psycopg
from psycopg import sql
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from figbridge import legacy
from figbridge.config import Config, split_table
from figbridge.errors import ConfigError, Problem, SetupError
from figbridge.forward.snapshot.progress import OPEN, Progress, State, Task
from figbridge.forward.source import SETTINGS
from figbridge.preflight import catalogue
from figbridge.preflight.catalogue import Name, quote, spell

Order = Literal["pause", "resume", "cancel"]

_ORDERS: Final[dict[Order, tuple[State, Sequence[State]]]] = {
    "pause": ("paused", ("waiting", "running")),
    "resume": ("waiting", ("paused",)),
    "cancel": ("cancelled", OPEN),
}
_TABLES: Final = ("snapshot", "snapshot_moved")
_LOOK: Final = 0.5  # seconds between two looks at the progress
_SILENT: Final = 60.0  # seconds without a chunk that are worth a word


def request(config: Config, tables: Sequence[str], condition: str | None) -> tuple[list[str], bool]:
    """Ask for a snapshot of `tables`, of all tables of the file without any; a line for each, and whether all will be.

    `condition` is SQL over the columns of the one table that is named. Raises ConfigError, SetupError, BridgeError.
    """
    names = _names(config, tables)
    if condition is not None and len(tables) != 1:
        raise ConfigError("which table is --where about?", [Problem("--where", "needs exactly one table", "name it")])
    settings = "" if condition is None else SETTINGS  # it means what it will to the bridge: a date, say
    with _connected(config, settings) as connection, legacy.translated():
        if condition is not None:
            _try(connection, names[0], condition)
        progress = Progress(config.legacy.slot)
        asked = {name: progress.want(connection, name, condition) for name in names}
    refused = "there is one already that has not ended; --cancel it first"
    return [f"{spell(*name)}: {'asked for' if it else refused}" for name, it in asked.items()], all(asked.values())


def order(config: Config, tables: Sequence[str], what: Order) -> list[str]:
    """Pause, resume or cancel the snapshots of `tables`, of all without any; a line for each that it is about."""
    state, of = _ORDERS[what]
    with _connected(config) as connection, legacy.translated():
        progress = Progress(config.legacy.slot)
        names = _names(config, tables) if tables else [task.name for task in progress.tasks(connection)]
        changed = [name for name in names if progress.order(connection, name, state, of)]
    return [f"{spell(*name)}: {state if name in changed else 'left as it is'}" for name in names]


def status(config: Config) -> list[Task]:
    """All that is known of this slot's snapshots. Raises SetupError, BridgeError."""
    with _connected(config) as connection, legacy.translated():
        return Progress(config.legacy.slot).tasks(connection)


def report(config: Config, tables: Sequence[str]) -> list[str]:
    """A line for each snapshot of `tables`, of all without any. Raises ConfigError, SetupError, BridgeError."""
    wanted, tasks = _wanted(config, tables), status(config)
    return [told(task, busy=_busy(tasks)) for task in tasks if wanted(task)]


def _wanted(config: Config, tables: Sequence[str]) -> Callable[[Task], bool]:
    names = _names(config, tables) if tables else None
    return lambda task: names is None or task.name in names


def _busy(tasks: Sequence[Task]) -> bool:
    """Whether a table is being read, for which others wait."""
    return any(task.state == "running" for task in tasks)


def _stands(task: Task, *, busy: bool) -> str:
    """What to ask about a task that should be at work and is not; empty for every other."""
    if task.silence > _SILENT and (task.state == "running" or (task.state == "waiting" and not busy)):
        return f"no progress for {task.silence:,.0f} s; does a bridge run?"
    return ""


def told(task: Task, *, busy: bool) -> str:
    """One line about a task. `busy`: a table is being read, this one or another."""
    parts = [f"{spell(*task.name)}: {task.state}", _rows(task)]
    if task.state == "running" and task.age:
        parts.append(f"{task.rows / task.age:,.0f} rows/s")
    parts += [it for it in (_stands(task, busy=busy), task.message) if it]
    return ", ".join(parts)


def follow(
    config: Config, tables: Sequence[str], console: Console, *, wait: Callable[[float], object] = time.sleep
) -> bool:
    """Show the progress of `tables`, of all without any, until nothing is left to do; whether all went well.

    Plain lines where no terminal is. Whoever leaves it by KeyboardInterrupt stops looking, not the snapshot. Raises
    ConfigError, SetupError, BridgeError.
    """
    wanted = _wanted(config, tables)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[rows]}"),
        TextColumn("{task.fields[how]}", markup=False),
    )
    shown: dict[Name, tuple[TaskID, str]] = {}
    bar = Bar(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
    with _interrupts() as interrupted, bar:
        while True:
            if interrupted:
                raise KeyboardInterrupt
            found = status(config)
            tasks, busy = [task for task in found if wanted(task)], _busy(found)
            for task in tasks:
                line = told(task, busy=busy)
                if task.name not in shown:
                    shown[task.name] = (bar.add_task(spell(*task.name), rows="", how=""), "")
                bar_id, before = shown[task.name]
                total = task.rows if task.state == "done" else max(task.estimate or 0, task.rows) or None
                bar.update(bar_id, completed=task.rows, total=total, rows=_rows(task), how=_how(task, busy=busy))
                if not console.is_terminal and line != before:
                    console.print(line, highlight=False, soft_wrap=True)
                shown[task.name] = (bar_id, line)
            if not any(task.state in ("waiting", "running") for task in tasks):
                return all(task.state != "failed" for task in tasks)
            wait(_LOOK)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that the first SIGINT gets into; the second raises KeyboardInterrupt, wherever that is.

    Raised wherever that is, the first could leave a lock of the bar's held, for which the thread that draws it waits.
    """
    came: list[int] = []

    def note(number: int, _: object) -> None:
        came.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before)


def _rows(task: Task) -> str:
    return f"{task.rows:,} rows" + (f" of about {task.estimate:,}" if task.estimate else "")


def _how(task: Task, *, busy: bool) -> str:
    """Its rate, or what is to be said instead."""
    if said := task.message or _stands(task, busy=busy):
        return f"{task.state}: {said}"
    return f"{task.rows / task.age:,.0f} rows/s" if task.age and task.state == "running" else task.state


def _names(config: Config, tables: Sequence[str]) -> list[Name]:
    known = [split_table(table) for table in config.legacy.tables]
    if not tables:
        outbox = config.forward.outbox.table if config.forward and config.forward.outbox else None
        return [name for name in known if outbox is None or name != split_table(outbox)]
    found, problems = [], []
    for table in tables:
        try:
            names = [name for name in known if table == name[1]] or [split_table(table)]
        except ValueError:
            names = []
        if len(names) == 1 and names[0] in known:
            found.append(names[0])
        else:
            listed = ", ".join(spell(*name) for name in known)
            problems.append(Problem(table, "is not one table of legacy.tables", f"there are {listed}"))
    if problems:
        raise ConfigError("nothing was done", problems)
    return found


def _connected(config: Config, settings: str = "") -> psycopg.Connection:
    if config.forward is None:
        raise ConfigError("no snapshot without a forward path", [Problem("forward", "is missing", "add it")])
    dsn = legacy.with_settings(config.legacy.dsn.get_secret_value(), settings)
    connection = legacy.connect(dsn, purpose="snapshot-command", autocommit=True)
    try:
        there = len(catalogue.tables(connection, [(legacy.SCHEMA, it) for it in _TABLES])) == len(_TABLES)
    except BaseException:
        connection.close()
        raise
    if not there or not config.takes_snapshots:
        connection.close()
        remedy = "run `figbridge init`"
        if not config.takes_snapshots:
            remedy = "set forward.snapshot: initial (or forward.slot-guard: table), then `figbridge init`"
        what = "is not there" if not there else "is not used by a bridge with this file"
        raise SetupError("a snapshot needs its table", [Problem("figbridge.snapshot", what, remedy)])
    return connection


def _try(connection: psycopg.Connection, name: Name, condition: str) -> None:
    """Let the server read the condition. Raises ConfigError with its words."""
    query = sql.SQL("EXPLAIN SELECT FROM {} WHERE ({})").format(sql.SQL(quote(*name)), sql.SQL(condition))
    try:
        with connection.transaction():
            connection.execute("SET TRANSACTION READ ONLY")
            connection.execute(query, binary=True)  # the extended protocol takes one statement and no more
    except psycopg.Error as error:
        failure = legacy.translate(error)
        if failure.retryable:
            raise failure from error
        problem = Problem("--where", str(error).partition("\n")[0], "SQL over the table's columns, such as id > 1000")
        raise ConfigError("the condition is not understood", [problem]) from error
