"""The loop `snapshot`: takes up the tasks of figbridge.snapshot, one at a time, chunk by chunk.

    low ─▶ wait until it was met ─▶ read ─▶ wait until the chunk before is durable ─▶ note its cursor, offer, high ─┐
              ▲                                                                                 and the next low   │
              └─────────────────────────────────────────────────────────────────────────────────────────────────────┘

Watermarks and cursor are one statement, and a high watermark brings the low one of the next window with it: beside its
rows a chunk costs five round trips and one of the stream.

INVARIANT. At most one chunk of a table is not noted as durable: the next one is read meanwhile and not yet offered. A
cursor that is noted has no row before it that must still be read again.

Several loops share a process (`claims`); only the process that has the stream works. What goes wrong with one table
fails its task, with the reason, and stops neither the other tables nor the stream.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

import psycopg
import structlog

from figbridge import legacy
from figbridge.errors import BridgeError
from figbridge.forward.checkpoint import Checkpoint
from figbridge.forward.sanitize import Rules
from figbridge.forward.snapshot import chunk, joined, plan, sanitized
from figbridge.forward.snapshot.claims import Claims
from figbridge.forward.snapshot.layout import Layout
from figbridge.forward.snapshot.moved import Moves
from figbridge.forward.snapshot.plan import Plan
from figbridge.forward.snapshot.politeness import Pace
from figbridge.forward.snapshot.progress import SETTINGS as PROGRESS
from figbridge.forward.snapshot.progress import Progress, State, Task, hide, show
from figbridge.forward.snapshot.reads import Share
from figbridge.forward.snapshot.standby import Standby
from figbridge.forward.snapshot.walk import Place
from figbridge.forward.snapshot.window import Window, Windows
from figbridge.forward.source import SETTINGS
from figbridge.forward.table import Naming, Table
from figbridge.forward.values import Encoders
from figbridge.metrics import Metrics
from figbridge.preflight.catalogue import Name, spell
from figbridge.retry import Stopped, persist
from figbridge.turns import SHORT_TURNS

_log = structlog.get_logger()

_LOOK: Final = 1.0  # seconds between two looks for a task
_SOON: Final = 0.05  # seconds between two looks whether there is a stream
_TICK: Final = 0.001  # seconds between two looks whether a chunk is durable


class Failed(BridgeError):
    """This table's snapshot cannot go on; the message says why."""


@dataclass(frozen=True, slots=True)
class Bridge:
    """What the loops of one bridge have in common. `system_identifier` is asked while the stream is open."""

    dsn: str
    slot: str
    publication: str
    windows: Windows
    checkpoint: Checkpoint
    naming: Naming
    encoders: Encoders
    system_identifier: Callable[[], str]
    claims: Claims
    moves: Moves
    metrics: Metrics
    rules: Rules = field(default_factory=Rules)
    excluded: Name | None = None  # the outbox: its rows are no state but events
    share: Share = field(default_factory=Share)  # the publish loop's
    standby: str | None = None  # the DSN of a standby that chunks are read from


class Snapshot:
    """One loop; `number` tells it from the others."""

    def __init__(self, bridge: Bridge, pace: Pace, *, number: int = 1) -> None:
        self.name = f"snapshot-{number}"
        self._bridge = bridge
        self._dsn = legacy.with_settings(bridge.dsn, f"{SETTINGS} {PROGRESS}")  # values as the walsender prints them
        self._standby: Standby | None = None
        self._pace = pace
        self._progress = Progress(bridge.slot)
        self._size = chunk.Size()
        self._looking: Executor | None = None
        self._stop = threading.Event()

    def run(self, stop: threading.Event) -> None:
        """Until `stop`."""
        self._stop = stop
        # one thread for all chunks: a new one does not get the memory that those before it had
        with ThreadPoolExecutor(1, f"{self.name}-look") as self._looking:
            while not stop.is_set():
                streaming = self._bridge.windows.streaming
                if not streaming:
                    hide(self._bridge.metrics)
                if not (streaming and persist(self._some, what="read a snapshot", stop=stop)):
                    stop.wait(_LOOK if streaming else _SOON)

    def _some(self) -> bool:
        """Work at the next task, as far as it goes; False when there is none. Raises LegacyUnavailable."""
        with (
            legacy.connect(self._dsn, purpose="snapshot", autocommit=True, prepares=True) as connection,
            legacy.translated(),
        ):
            task = self._bridge.claims.claim(connection, self._progress, self._bridge.moves, self._bridge.metrics)
            if task is None:
                return False
            stands = False
            try:
                with self._reader(), SHORT_TURNS:
                    self._task(connection, task)
            except BridgeError as trouble:  # it is tried again
                stands = not connection.closed  # a lock, say; a lost connection is no fault of this table
                with suppress(psycopg.Error):
                    self._progress.trouble(connection, task, str(trouble))
                raise
            finally:
                self._bridge.claims.release(task, behind=stands)
        return True

    @contextmanager
    def _reader(self) -> Iterator[None]:
        if self._bridge.standby is None:
            yield
            return
        dsn = legacy.with_settings(self._bridge.standby, SETTINGS)
        with Standby.opened(dsn, self._bridge.system_identifier()) as self._standby:
            yield

    def _task(self, connection: psycopg.Connection, task: Task) -> None:
        try:
            self._walk(connection, task)
        except psycopg.Error as error:
            failure = legacy.translate(error)
            if failure.retryable:
                raise failure from error
            self._fail(connection, task, failure)
        except BridgeError as failure:
            if failure.retryable:
                raise
            self._fail(connection, task, failure)

    def _fail(self, connection: psycopg.Connection, task: Task, failure: BridgeError) -> None:
        table = spell(*task.name)
        _log.error("snapshot failed", table=table, error=str(failure), hint=failure.hint or None)
        self._progress.fail(connection, task, f"{failure}; mend it, then `figbridge snapshot {table}`")
        self._bridge.metrics.snapshot_failures.inc()

    def _walk(self, connection: psycopg.Connection, task: Task) -> None:
        found = self._described(connection, task.name)
        if task.cursor and task.cursor.get("order") != found.order:
            self._anew(connection, task)
            return
        begin = task.cursor or plan.beginning(found)
        place = Place(found, self._compiled(found), begin, begin)
        estimate = plan.estimate(connection, found)
        if not self._progress.start(connection, task, estimate):
            return
        show(self._bridge.metrics, task, state="running", estimate=estimate)
        _log.info("snapshot", table=spell(*task.name), run=task.run, rows=task.rows, estimate=estimate)
        if place.layout.joint:
            joined.prepare(self._standby.connection if self._standby else connection)
        try:
            while self._more(connection, task, place):
                self._bridge.claims.show(connection, self._progress, self._bridge.metrics)
                if self._pace.wait(connection, self._stop):
                    self._forget(place)  # it would note all that comes meanwhile
                rows = self._step(connection, task, place)
                if rows is None:
                    return
                self._pace.took(rows)
        finally:
            self._forget(place)
            self._bridge.moves.walks(task)
        if self._progress.end(connection, task):
            _log.info("snapshot is done", table=spell(*task.name), run=task.run)

    def _more(self, connection: psycopg.Connection, task: Task, place: Place) -> bool:
        """Whether there are rows to read: at last those that `moved`, when all others are durable."""
        if not place.walked:
            return True
        self._forget(place)  # its reads would have the ids of others
        if self._mark(connection, task, place) is None:
            return False
        moves = self._bridge.moves
        moves.walked(task)
        place.take(moves.turn(connection, task, place.plan.key, place.turn, place.told))
        return place.turn is not None

    def _step(self, connection: psycopg.Connection, task: Task, place: Place) -> int | None:
        """One window; how many rows were read. None when the task is to be left."""
        windows, identity = self._bridge.windows, self._identity(task, place)
        if place.again and not place.turn:
            self._forget(place)  # open until the sink has the chunk before, it would see a hot row change each time
        if place.window is None:
            place.window = windows.begin(place.layout, identity)
            if self._mark(connection, task, place, low=place.window) != "running":
                return None
        window, place.window = place.window, None
        try:
            self._until(window.low_met, window)
            read = self._read(connection, task, place) if not window.closed.is_set() else ""
            if isinstance(read, str):
                return 0 if self._void(connection, task, place, read, window) else None
            window.offered = [place.layout.leaving(block) for block in read.blocks]
            if not (read.end or place.turn):
                place.window = windows.begin(place.layout, identity)
            if self._mark(connection, task, place, high=window, low=place.window) != "running":
                return None
            self._until(window.closed, window)
        finally:
            windows.forget(window)
        if window.outcome.void:
            return read.rows if self._void(connection, task, place, window.outcome.void, window) else None
        place.leave(read, window.outcome)
        return read.rows

    def _read(self, connection: psycopg.Connection, task: Task, place: Place) -> chunk.Chunk | str:
        """The next chunk, or why the window is void."""
        met: Callable[[list[int]], bool] | None = self._bridge.windows.met
        reader = connection
        if self._standby:
            self._standby.wait(connection, self._stop)
            reader, met = self._standby.connection, None
        try:
            with chunk.locked(reader, task.name, met):
                if plan.describe(reader, task.name, self._bridge.publication) != place.plan:
                    return "the table's schema changed"
                most = min(self._size.rows, self._pace.most)
                read = chunk.read(
                    reader, place.plan, place.layout, place.reached, task.condition,
                    most=most, again=place.again, bounded=place.turn is not None,
                    looks=self._size.looks, width=self._size.width, share=self._bridge.share, looking=self._looking,
                    awaited=lambda: self._pace.limited or self._durable(place),
                )  # fmt: skip
        except psycopg.errors.QueryCanceled:
            self._size.tired()
            raise
        except chunk.Gone:
            raise Failed(f"there is no table {spell(*task.name)} any more") from None
        except joined.Refused as error:
            self._size.copy()
            return f"the server does not join its rows, which are read by COPY: {error.__cause__}"
        if not place.again:
            self._size.learn(read)
        return read

    def _identity(self, task: Task, place: Place) -> str:
        of = f"{self._bridge.system_identifier()}-{self._bridge.slot}-{task.run}-{place.plan.relation.oid}-"
        return of + (place.turn.identity if place.turn else "")

    def _void(self, connection: psycopg.Connection, task: Task, place: Place, why: str, window: Window) -> bool:
        """Look at the table anew; the same rows are read again. False when the task is to be left."""
        _log.info("a chunk is read again", table=spell(*task.name), reason=window.outcome.void or why)
        self._bridge.metrics.snapshot_voids.inc()
        self._size.rows = max(10, self._size.rows // 2)
        if self._stop.wait(0.05):
            raise Stopped
        found = self._described(connection, task.name)
        if found.order != place.plan.order:
            self._anew(connection, task)
            return False
        if found != place.plan:
            place.plan, place.layout = found, self._compiled(found)
            self._forget(place)
        return True

    def _anew(self, connection: psycopg.Connection, task: Task) -> None:
        """What was read is of another table, or in another order. It is taken up as a task that waits."""
        if self._progress.anew(connection, task):
            _log.warning(
                "the table or the order of its rows changed: begun anew", table=spell(*task.name), run=task.run
            )

    def _mark(
        self,
        connection: psycopg.Connection,
        task: Task,
        place: Place,
        *,
        high: Window | None = None,
        low: Window | None = None,
    ) -> State | None:
        """Wait until what has left is durable, write its cursor and these watermarks; the state that is ordered."""
        rows = 0
        if place.left:
            while not self._durable(place):
                if self._stop.wait(_TICK):
                    raise Stopped
            rows = place.left.reads.left if place.left.reads else 0
            for series in (self._bridge.metrics.snapshot_rows, self._bridge.metrics.snapshot_durable):
                series.labels(str(place.plan.relation)).inc(rows)
            place.left = None
        marks = [*([high.content("high")] if high else []), *([low.content("low")] if low else [])]
        return self._progress.advance(connection, task, place.noted, rows, marks)

    def _durable(self, place: Place) -> bool:
        """Whether all that has left is."""
        return place.left is None or self._bridge.checkpoint.flushed >= place.left.end

    def _forget(self, place: Place) -> None:
        if place.window is not None:
            self._bridge.windows.forget(place.window)
            place.window = None

    def _described(self, connection: psycopg.Connection, name: Name) -> Plan:
        if name == self._bridge.excluded:
            raise Failed(f"{spell(*name)} is the outbox", hint="its rows are events that have left, not a state")
        found = plan.describe(connection, name, self._bridge.publication)
        if found is None:
            raise Failed(f"there is no table {spell(*name)}")
        return found

    def _compiled(self, found: Plan) -> Layout:
        names, encoders = self._bridge.naming, self._bridge.encoders
        keys, rules = frozenset(found.identity), self._bridge.rules
        table = Table(found.relation, names, encoders, keys, dict(found.type_names), rules=rules)
        return sanitized.layout(table, keyed=found.keyed, order=found.sought)

    def _until(self, event: threading.Event, window: Window) -> None:
        """Wait for the capture loop; a stream that is interrupted voids the window."""
        while not (event.wait(0.1) or window.closed.is_set()):
            if self._stop.is_set():
                raise Stopped
