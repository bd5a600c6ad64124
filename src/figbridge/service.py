"""The composition root: Config → the loops to run. The only file that knows everyone, and nothing else happens here.

forward:  capture ─▶ publish   (+ heartbeat; + slot-watch: the slot's guard;
                                + snapshot: reads what was there before;
                                + canary: answers the echoes that capture recognised)
reverse:  consume              (first the canary, then the queue; + purge: old keys leave the inbox)
relay:    relay-1 …            (one or several; alone they need no legacy database)
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import structlog

from figbridge import canary, legacy, preflight, provision
from figbridge.change import Lsn, Relation
from figbridge.config import (
    Config,
    ContractsSection,
    Direction,
    ForwardSection,
    RelaySection,
    ReverseSection,
    SinkSection,
    split_table,
)
from figbridge.contracts import Contracts
from figbridge.deadletter import DeadLetters, TableDeadLetterStore
from figbridge.delivery.pack import Packing
from figbridge.errors import ConfigError, Problem, SlotGap
from figbridge.formats import KINDS
from figbridge.forward.buffer import Buffer
from figbridge.forward.capture import Capture
from figbridge.forward.checkpoint import Checkpoint
from figbridge.forward.echo import EchoFilter
from figbridge.forward.form import Form
from figbridge.forward.guard import GuardedSource, SlotGuard
from figbridge.forward.heartbeat import Heartbeat, Heartbeats
from figbridge.forward.messages import Messages, server_codec
from figbridge.forward.outbox import Outbox
from figbridge.forward.pingpong import PingPong
from figbridge.forward.publish import Publish, Publisher
from figbridge.forward.sanitize import Rules
from figbridge.forward.shape import Shaper
from figbridge.forward.snapshot.claims import Claims
from figbridge.forward.snapshot.loop import Bridge, Snapshot
from figbridge.forward.snapshot.moved import Moves
from figbridge.forward.snapshot.politeness import Pace
from figbridge.forward.snapshot.reads import Share
from figbridge.forward.snapshot.window import Windows
from figbridge.forward.standard import Standard
from figbridge.forward.table import Naming
from figbridge.forward.values import Encoders
from figbridge.forward.versions import History, VersionStore
from figbridge.forward.watch import SlotWatch
from figbridge.http import HttpServer
from figbridge.metrics import Metrics
from figbridge.relay.judge import Judge
from figbridge.relay.loop import Relay
from figbridge.relay.outlet import Outlet
from figbridge.relay.relayer import Relayer
from figbridge.relay.seen import Seen
from figbridge.retry import Stopped, persist
from figbridge.reverse.purge import Purge
from figbridge.reverse.setup import open_consumer, purged
from figbridge.supervise import Loop, Supervisor, tune
from figbridge.transports import Exclusive, Sink, open_dead_letters, open_deposit, open_sink, open_source

_log = structlog.get_logger()

# Below Kubernetes' and Docker's own patience (30 s and 10 s by default; deploy/ raises Docker's), so that the last
# acknowledgement is sent before SIGKILL comes.
GRACE: Final = 20.0


def run(config: Config, only: Direction | None = None, supervisor: Supervisor | None = None) -> None:
    """Run the bridge until SIGTERM or SIGINT, or until `supervisor` is told to stop.

    Raises ConfigError and SetupError before anything starts, later whatever a loop failed of.
    The legacy database may start after its sidecar: it is waited for.
    """
    directions = parts(config, only)
    metrics = Metrics()
    for direction in directions:
        metrics.ready.labels(direction).set(0)
    supervisor = supervisor or Supervisor(grace=GRACE)
    with contextlib.ExitStack() as stack:
        stack.enter_context(supervisor.signals())
        http = HttpServer(config.http.address, metrics, parts=directions, alive=lambda: supervisor.alive)
        stack.callback(http.close)
        _log.info(
            "starting",
            legacy=legacy.describe(config.database.dsn.get_secret_value()) if config.database else None,
            directions=directions,
            http=config.http.listen,
        )
        try:
            findings = persist(lambda: preflight.require(config, "run", only), what="preflight", stop=supervisor.stop)
            if "forward" in directions:
                server = persist(lambda: _server(config), what="look up the database", stop=supervisor.stop)
        except Stopped:
            return
        if "forward" in directions:
            for finding in findings:
                if finding.where.startswith(preflight.LEAVING):
                    _log.info("what leaves", table=finding.where.removeprefix(preflight.LEAVING), columns=finding.what)
        loops: list[Loop] = []
        if config.forward and "forward" in directions:
            loops += _forward(
                config, config.forward, server=server, metrics=metrics, supervisor=supervisor, stack=stack
            )
        if config.reverse and "reverse" in directions:
            loops += _reverse(config, config.reverse, metrics, stack)
        if config.relay and "relay" in directions:
            loops += _relays(config, config.relay, metrics, supervisor)
        tune(answers="reverse" in directions)
        supervisor.run(loops)
    _log.info("stopped")


def parts(config: Config, only: Direction | None) -> tuple[Direction, ...]:
    """What there is to run: the parts that are configured, or `only` one. Raises ConfigError when it is not."""
    sections: dict[Direction, object] = {
        "forward": config.forward,
        "reverse": config.reverse,
        "relay": config.relay,
    }
    configured = [name for name, section in sections.items() if section]
    if only is None:
        return tuple(configured)
    if only not in configured:
        raise ConfigError(
            "nothing to run", [Problem(only, f"--only {only}, but the file has no such section", "add it")]
        )
    return (only,)


@dataclass(frozen=True, slots=True)
class Server:
    """What the forward path wants to know of the legacy database: its name, version and Python codec."""

    database: str
    version: int
    codec: str


def _server(config: Config) -> Server:
    with legacy.connect(config.legacy.dsn.get_secret_value(), purpose="start") as connection, legacy.translated():
        return Server(connection.info.dbname, connection.info.server_version, server_codec(connection))


def _forward(
    config: Config,
    section: ForwardSection,
    *,
    server: Server,
    metrics: Metrics,
    supervisor: Supervisor,
    stack: contextlib.ExitStack,
) -> list[Loop]:
    dsn, slot = config.legacy.dsn.get_secret_value(), config.legacy.slot
    published = provision.publications(config)
    guard = SlotGuard(dsn, slot, table=config.guards_slot)
    recreate = partial(_recreate, config, metrics) if config.recreates_slot else None
    source = GuardedSource(dsn, slot, tuple(published), guard, recreate=recreate)
    stack.callback(source.close)
    sink = _opened(section.sink, stack)
    dead_letters = open_dead_letters(section.dead_letters, dsn) if section.dead_letters else None
    if dead_letters:
        stack.callback(dead_letters.close)

    def primary_key(relation: Relation) -> tuple[str, ...]:
        return legacy.primary_key(dsn, relation.schema, relation.name)

    echo = EchoFilter(
        guard=config.legacy.loop_guard,
        origin=canary.origin(slot),
        touched_rows=section.echo == "touched_rows",
        # without a reverse path there is nothing of ours that a row could answer
        ping_pong=PingPong(section.ping_pong_limit if config.reverse else 0, section.ping_pong_seconds),
    )
    checkpoint, buffer = Checkpoint(), Buffer(section.buffer_bytes, metrics)
    form: Form = "debezium" if section.format == "debezium" else "native"
    naming = Naming(server.database, section.source, section.detail_type, section.resources, form)
    encoders = Encoders(section.numbers, partial(legacy.type_description, dsn))
    rules = Rules(section.select, section.hash, lambda table: metrics.filtered.labels(table).inc())
    outbox = None
    if section.outbox:
        outbox = Outbox(
            section.outbox,
            database=server.database,
            encoders=encoders,
            ignored=lambda operation: metrics.outbox_ignored.labels(operation).inc(),
            rules=rules,
        )
    # logical messages pass pgoutput since 14
    beating = section.heartbeat_seconds > 0 and server.version >= 140000
    heartbeats = Heartbeats(slot, metrics) if beating else None
    versions = VersionStore(dsn, slot) if config.keeps_versions else None
    history = History() if section.schema_events else None
    windows, moves = Windows(), Moves(dsn, slot) if config.takes_snapshots else None
    messages = Messages(section.messages, naming, outbox=outbox, heartbeats=heartbeats, codec=server.codec, slot=slot)
    aside = section.contracts.quarantine if section.contracts else None
    quarantine = _opened(aside, stack) if aside else None
    capture = Capture(
        source,
        slot=slot,
        echo=echo,
        shaper=Shaper(naming, encoders, primary_key, history=history, outbox=outbox, rules=rules),
        messages=messages,
        heartbeats=heartbeats,
        versions=versions,
        windows=windows,
        moves=moves,
        buffer=buffer,
        checkpoint=checkpoint,
        metrics=metrics,
        halt=supervisor.halt,
        let_go=partial(_let_go, [sink, quarantine]),
    )
    deposit = open_deposit(section.claim_check) if section.claim_check else None
    if deposit:
        stack.callback(deposit.close)
    packing = Packing(section.pack, sink, section.pack_bytes) if section.pack != "none" else None
    kind = KINDS[section.format]
    publisher = Publisher(sink, dead_letters, metrics, supervisor.halt, deposit, kind=kind, packing=packing)
    stack.callback(publisher.close)
    standard = None
    if section.contracts:
        standard = _standard(section.contracts, publisher, quarantine, dead_letters, metrics, supervisor, stack)
    share = Share()
    loops: list[Loop] = [
        capture,
        Publish(
            buffer,
            publisher,
            checkpoint,
            source,
            versions=versions,
            moves=moves,
            standard=standard,
            share=share,
            metrics=metrics,
            halt=supervisor.halt,
        ),
        SlotWatch(guard, source, published, metrics),
    ]
    if heartbeats:
        loops.append(Heartbeat(dsn, heartbeats, section.heartbeat_seconds))
    if moves:
        excluded = split_table(section.outbox.table) if section.outbox and section.outbox.table else None
        bridge = Bridge(
            dsn=dsn,
            slot=slot,
            publication=config.legacy.publication,
            windows=windows,
            checkpoint=checkpoint,
            naming=naming,
            encoders=encoders,
            system_identifier=lambda: source.identity.system_identifier,
            claims=Claims(config.snapshot_tables if section.snapshot != "never" else ()),
            moves=moves,
            metrics=metrics,
            rules=rules,
            excluded=excluded,
            share=share,
            standby=section.snapshot_standby.get_secret_value() if section.snapshot_standby else None,
        )
        pace = partial(Pace, metrics, rate=section.snapshot_rows_per_second, lag=section.snapshot_standby_lag)
        loops += [Snapshot(bridge, pace(), number=number + 1) for number in range(section.snapshot_parallel)]
    if config.reverse:
        loops.append(CanaryAnswers(echo.canaries, lambda nonce: canary.answer(dsn, nonce)))
    return loops


def _standard(  # noqa: PLR0917 (what it is made of)
    section: ContractsSection,
    publisher: Publisher,
    quarantine: Sink | None,
    dead_letters: DeadLetters | None,
    metrics: Metrics,
    supervisor: Supervisor,
    stack: contextlib.ExitStack,
) -> Standard:
    contracts = Contracts.load(section.path, "forward.contracts.path")
    aside = None
    if quarantine:
        aside = Publisher(quarantine, dead_letters, metrics, supervisor.halt)
        stack.callback(aside.close)
    bury = partial(publisher.bury, attempts=0)
    return Standard(section, contracts, metrics, bury=bury, quarantine=aside.publish if aside else None)


def _opened(section: SinkSection, stack: contextlib.ExitStack) -> Sink:
    sink = open_sink(section)
    stack.callback(sink.close)
    return sink


def _let_go(sinks: Sequence[Sink | None]) -> None:
    for sink in sinks:
        if isinstance(sink, Exclusive):
            sink.let_go()


def _recreate(config: Config, metrics: Metrics, gap: SlotGap) -> Lsn:
    confirmed = provision.recreate(config, gap)
    metrics.slot_recreated.inc()
    return confirmed


def _reverse(config: Config, section: ReverseSection, metrics: Metrics, stack: contextlib.ExitStack) -> list[Loop]:
    dsn, kind = config.legacy.write_dsn, config.legacy.loop_guard
    source = open_source(section.source, dsn)
    stack.callback(source.close)

    def prepare(stop: threading.Event) -> None:
        if config.forward and section.mode == "live":  # without a forward path, or a commit, nothing can loop
            canary.prove(dsn, config.legacy.slot, stop, kind)
        metrics.ready.labels("reverse").set(1)

    letters = TableDeadLetterStore(dsn)
    consumer = open_consumer(config, section, source, letters, metrics, prepare=prepare)
    return [consumer, Purge(dsn, purged(section))]


def _relays(config: Config, section: RelaySection, metrics: Metrics, supervisor: Supervisor) -> list[Loop]:
    contracts = Contracts.load(section.contracts, "relay.contracts")
    source = section.source
    if source is None:
        problem = Problem("relay.source", "is missing", "name the queue; only the Lambda function can do without")
        raise ConfigError("nothing to relay", [problem])

    seen = Seen(section.remember)

    def relay(number: int) -> Loop:
        outlet = Outlet.open(section, config.dsn_for(section.dead_letters), metrics, supervisor.halt)
        relayer = Relayer(Judge(section, contracts), outlet, seen, metrics)
        return Relay(open_source(source), relayer, metrics, number=number)

    return [relay(number) for number in range(1, section.parallel + 1)]


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
