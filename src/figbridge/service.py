"""The composition root: Config → the loops to run. The only file that knows everyone, and nothing else happens here.

forward:  capture ─▶ publish   (+ canary: answers the echoes that capture recognised; + slot-watch: the slot's guard)
reverse:  consume              (first the canary, then the queue)
"""

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Final

import structlog

from figbridge import canary, legacy, preflight, provision
from figbridge.change import Relation
from figbridge.config import Config, Direction, ForwardSection, ReverseSection
from figbridge.deadletter import TableDeadLetterStore, open_dead_letters
from figbridge.errors import ConfigError, Problem
from figbridge.forward.checkpoint import Checkpoint
from figbridge.forward.echo import EchoFilter
from figbridge.forward.guard import GuardedSource, SlotGuard
from figbridge.forward.pipeline import Buffer, Capture, Publish
from figbridge.forward.publish import Publisher
from figbridge.forward.shape import Naming, Shaper
from figbridge.forward.watch import SlotWatch
from figbridge.http import HttpServer
from figbridge.metrics import Metrics
from figbridge.retry import Stopped, persist
from figbridge.reverse.apply import Applier
from figbridge.reverse.consume import Consumer
from figbridge.reverse.mapping import Mappings
from figbridge.supervise import Loop, Supervisor
from figbridge.transports import open_sink, open_source

_log = structlog.get_logger()

# Below Kubernetes' and Docker's own patience (30 s and 10 s by default; deploy/ raises Docker's), so that the last
# acknowledgement is sent before SIGKILL comes.
GRACE: Final = 20.0


def run(config: Config, only: Direction | None = None) -> None:
    """Run the bridge until SIGTERM or SIGINT.

    Raises ConfigError and SetupError before anything starts, later whatever a loop failed of.
    The legacy database may start after its sidecar: it is waited for.
    """
    directions = _directions(config, only)
    metrics = Metrics()
    for direction in directions:
        metrics.ready.labels(direction).set(0)
    supervisor = Supervisor(grace=GRACE)
    with contextlib.ExitStack() as stack:
        stack.enter_context(supervisor.signals())
        http = HttpServer(config.http.address, metrics, parts=directions, alive=lambda: supervisor.alive)
        stack.callback(http.close)
        _log.info(
            "starting",
            legacy=legacy.describe(config.legacy.dsn.get_secret_value()),
            directions=directions,
            http=config.http.listen,
        )
        try:
            persist(lambda: preflight.require(config, "run", only), what="preflight", stop=supervisor.stop)
            database = persist(lambda: _database(config), what="look up the database", stop=supervisor.stop)
        except Stopped:
            return
        loops: list[Loop] = []
        if config.forward and "forward" in directions:
            loops += _forward(
                config, config.forward, database=database, metrics=metrics, supervisor=supervisor, stack=stack
            )
        if config.reverse and "reverse" in directions:
            loops.append(_reverse(config, config.reverse, metrics, stack))
        supervisor.run(loops)
    _log.info("stopped")


def _directions(config: Config, only: Direction | None) -> tuple[Direction, ...]:
    configured: list[Direction] = []
    if config.forward:
        configured.append("forward")
    if config.reverse:
        configured.append("reverse")
    if only is None:
        return tuple(configured)
    if only not in configured:
        raise ConfigError(
            "nothing to run", [Problem(only, f"--only {only}, but the file has no such section", "add it")]
        )
    return (only,)


def _database(config: Config) -> str:
    with legacy.connect(config.legacy.dsn.get_secret_value(), purpose="start") as connection:
        return connection.info.dbname


def _forward(
    config: Config,
    section: ForwardSection,
    *,
    database: str,
    metrics: Metrics,
    supervisor: Supervisor,
    stack: contextlib.ExitStack,
) -> list[Loop]:
    dsn, slot = config.legacy.dsn.get_secret_value(), config.legacy.slot
    published = {name: tables for name, (tables, _) in provision.publications(config).items()}
    guard = SlotGuard(dsn, slot, table=config.guards_slot)
    source = GuardedSource(dsn, slot, tuple(published), guard)
    stack.callback(source.close)
    sink = open_sink(section.sink)
    stack.callback(sink.close)
    dead_letters = open_dead_letters(section.dead_letters, dsn) if section.dead_letters else None
    if dead_letters:
        stack.callback(dead_letters.close)

    def primary_key(relation: Relation) -> tuple[str, ...]:
        return legacy.primary_key(dsn, relation.schema, relation.name)

    checkpoint, echo, buffer = Checkpoint(), EchoFilter(), Buffer(section.buffer_bytes, metrics)
    naming = Naming(database, section.source, section.detail_type)
    capture = Capture(
        source,
        slot=slot,
        echo=echo,
        shaper=Shaper(naming, section.numbers, primary_key),
        buffer=buffer,
        checkpoint=checkpoint,
        metrics=metrics,
        halt=supervisor.halt,
    )
    publisher = Publisher(sink, dead_letters, metrics, supervisor.halt)
    loops: list[Loop] = [
        capture,
        Publish(buffer, publisher, checkpoint, source, metrics),
        SlotWatch(guard, source, published, metrics),
    ]
    if config.reverse:
        loops.append(CanaryAnswers(echo.canaries, lambda nonce: canary.answer(dsn, nonce)))
    return loops


def _reverse(config: Config, section: ReverseSection, metrics: Metrics, stack: contextlib.ExitStack) -> Loop:
    dsn = config.legacy.dsn.get_secret_value()
    source = open_source(section.source)
    stack.callback(source.close)
    applier = Applier(dsn, statement_timeout=section.statement_timeout, lock_timeout=section.lock_timeout)
    stack.callback(applier.close)

    def prepare(stop: threading.Event) -> None:
        if config.forward:  # without a forward path nothing can loop
            canary.prove(dsn, config.legacy.slot, stop)
        metrics.ready.labels("reverse").set(1)

    return Consumer(
        source,
        Mappings(section.mappings),
        applier,
        dead_letters=TableDeadLetterStore(dsn),
        metrics=metrics,
        max_attempts=section.max_attempts,
        prepare=prepare,
    )


class CanaryAnswers:
    """Answers the canaries that the capture loop recognised, which itself must never wait for a database."""

    name = "canary"

    def __init__(self, nonces: "queue.SimpleQueue[str]", answer: Callable[[str], None]) -> None:
        self._nonces = nonces
        self._answer = answer

    def run(self, stop: threading.Event) -> None:
        """Until `stop`."""
        while not stop.is_set():
            try:
                nonce = self._nonces.get(timeout=0.2)
            except queue.Empty:
                continue
            persist(lambda nonce=nonce: self._answer(nonce), what="answer canary", stop=stop)  # type: ignore[misc]
