"""Which loop of this process is at which table, and whose turn is next."""

import threading
import time
from collections.abc import Sequence
from typing import Final

import psycopg

from figbridge.forward.snapshot.moved import Moves
from figbridge.forward.snapshot.progress import Progress, Task, show
from figbridge.metrics import Metrics
from figbridge.preflight.catalogue import Name

_LOOK: Final = 1.0  # seconds between two looks at the tables that nobody is at


class Claims:
    """Which tables a loop of this process is at; and what to ask for when the stream is open first."""

    def __init__(self, tables: Sequence[Name] = ()) -> None:
        self._lock = threading.Lock()
        self._taken: set[Name] = set()
        self._behind: list[Name] = []
        self._wanted = list(tables)
        self._shown = 0.0

    def claim(self, connection: psycopg.Connection, progress: Progress, moves: Moves, metrics: Metrics) -> Task | None:
        """The next task that nobody is at, those that stand still last; None without any. Raises psycopg.Error."""
        with self._lock:
            for name in self._wanted:
                progress.want_first(connection, name)
            self._wanted = []
            tasks = moves.look(lambda: progress.tasks(connection))
            self._show(tasks, metrics)
            for task in sorted(tasks, key=self._turn):
                if task.state in ("waiting", "running") and task.name not in self._taken:
                    self._taken.add(task.name)
                    return task
        return None

    def show(self, connection: psycopg.Connection, progress: Progress, metrics: Metrics) -> None:
        """Set the gauges of the tables that nobody is at, once a second at most. Raises psycopg.Error."""
        with self._lock:
            if time.monotonic() - self._shown >= _LOOK:
                self._show(progress.tasks(connection), metrics)

    def _show(self, tasks: Sequence[Task], metrics: Metrics) -> None:
        self._shown = time.monotonic()
        for task in tasks:
            if task.name not in self._taken:
                show(metrics, task)

    def _turn(self, task: Task) -> int:
        return self._behind.index(task.name) if task.name in self._behind else -1

    def release(self, task: Task, *, behind: bool = False) -> None:
        """Its loop has left it; `behind`: it stands still, and the others are not to wait for it."""
        with self._lock:
            self._taken.discard(task.name)
            if task.name in self._behind:
                self._behind.remove(task.name)
            if behind:
                self._behind.append(task.name)
