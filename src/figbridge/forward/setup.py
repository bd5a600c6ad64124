"""How a forward path is put together from its configuration.

capture ─▶ buffer ─▶ publish ─▶ sink
▲
snapshot, several; beside them slot-watch, heartbeat, and the answers to canaries
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from figbridge import canary, legacy, provision
from figbridge.change import Lsn
from figbridge.config import Config, ContractsSection, ForwardSection, SinkSection, split_table
from figbridge.config.forward import OutboxSection
from figbridge.contracts import Contracts
from figbridge.deadletter import DeadLetters
from figbridge.delivery.pack import Packing
from figbridge.errors import SlotGap
from figbridge.formats import KINDS
from figbridge.forward.buffer import Buffer
from figbridge.forward.capture import Capture
from figbridge.forward.checkpoint import Checkpoint
from figbridge.forward.echo import EchoFilter
from figbridge.forward.form import Form
from figbridge.forward.guard import SlotGuard
from figbridge.forward.guarded import GuardedSource
from figbridge.forward.heartbeat import Heartbeat, Heartbeats
from figbridge.forward.keys import primary_keys
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
from figbridge.metrics import Metrics
from figbridge.retry import persist
from figbridge.transports import Exclusive, Sink, open_dead_letters, open_deposit, open_sink


@dataclass(frozen=True, slots=True)
class Server:
    """What the forward path wants to know of the legacy database: its name, version and Python codec."""

    database: str
    version: int
    codec: str


def server_of(config: Config) -> Server:
    """Ask the legacy database. Raises LegacyUnavailable, BridgeError."""
    with legacy.connect(config.legacy.dsn.get_secret_value(), purpose="start") as connection, legacy.translated():
        return Server(connection.info.dbname, connection.info.server_version, server_codec(connection))


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


ForwardLoop: TypeAlias = Capture | Publish | SlotWatch | Heartbeat | Snapshot | CanaryAnswers


def open_loops(
    config: Config,
    section: ForwardSection,
    *,
    server: Server,
    metrics: Metrics,
    halt: threading.Event,
    stack: contextlib.ExitStack,
) -> Sequence[ForwardLoop]:
    """The loops of a forward path; `stack` closes what they share, and `halt` ends what they retry.

    Raises ConfigError. No connection is made yet.
    """
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
    rules = _rules(config, section, metrics)
    outbox = _outbox(section.outbox, server, encoders, rules, metrics) if section.outbox else None
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
        shaper=Shaper(naming, encoders, partial(primary_keys, dsn), history=history, outbox=outbox, rules=rules),
        messages=messages,
        heartbeats=heartbeats,
        versions=versions,
        windows=windows,
        moves=moves,
        buffer=buffer,
        checkpoint=checkpoint,
        metrics=metrics,
        halt=halt,
        let_go=partial(_let_go, [sink, quarantine]),
    )
    deposit = open_deposit(section.claim_check) if section.claim_check else None
    if deposit:
        stack.callback(deposit.close)
    packing = Packing(section.pack, sink, section.pack_bytes) if section.pack != "none" else None
    kind = KINDS[section.format]
    publisher = Publisher(sink, dead_letters, metrics, halt, deposit, kind=kind, packing=packing)
    stack.callback(publisher.close)
    standard = None
    if section.contracts:
        standard = _standard(section.contracts, publisher, quarantine, dead_letters, metrics, halt, stack)
    share = Share()
    loops: list[ForwardLoop] = [
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
            halt=halt,
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


def _rules(config: Config, section: ForwardSection, metrics: Metrics) -> Rules:
    by_name = bool(section.select or (section.outbox and section.outbox.table))
    tables = {split_table(it) for it in config.legacy.tables} if by_name else None
    return Rules(section.select, section.hash, lambda table: metrics.filtered.labels(table).inc(), tables=tables)


def _outbox(section: OutboxSection, server: Server, encoders: Encoders, rules: Rules, metrics: Metrics) -> Outbox:
    return Outbox(
        section,
        database=server.database,
        encoders=encoders,
        ignored=lambda operation: metrics.outbox_ignored.labels(operation).inc(),
        rules=rules,
    )


def _standard(  # noqa: PLR0917 (what it is made of)
    section: ContractsSection,
    publisher: Publisher,
    quarantine: Sink | None,
    dead_letters: DeadLetters | None,
    metrics: Metrics,
    halt: threading.Event,
    stack: contextlib.ExitStack,
) -> Standard:
    contracts = Contracts.load(section.path, "forward.contracts.path")
    aside = None
    if quarantine:
        aside = Publisher(quarantine, dead_letters, metrics, halt, counter=metrics.set_aside)
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
