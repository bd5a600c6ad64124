"""The composition root: Config → the loops to run. Each path's `setup` puts its own together.

forward:  capture ─▶ publish   (+ heartbeat; + slot-watch: the slot's guard;
                                + snapshot: reads what was there before;
                                + canary: answers the echoes that capture recognised)
reverse:  consume              (first the canary, then the queue; + purge: old keys leave the inbox)
relay:    relay-1 …            (one or several; alone they need no legacy database)
"""

import contextlib
import threading
from collections.abc import Sequence
from typing import Final

import structlog

from figbridge import canary, legacy, preflight
from figbridge.config import (
    Config,
    Direction,
    RelaySection,
    ReverseSection,
)
from figbridge.contracts import Contracts
from figbridge.deadletter import TableDeadLetterStore
from figbridge.errors import ConfigError, Problem
from figbridge.forward.setup import open_loops, server_of
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
from figbridge.transports import open_source

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
                server = persist(lambda: server_of(config), what="look up the database", stop=supervisor.stop)
        except Stopped:
            return
        if "forward" in directions:
            for finding in findings:
                if finding.where.startswith(preflight.LEAVING):
                    _log.info("what leaves", table=finding.where.removeprefix(preflight.LEAVING), columns=finding.what)
        loops: list[Loop] = []
        if config.forward and "forward" in directions:
            loops += open_loops(
                config, config.forward, server=server, metrics=metrics, halt=supervisor.halt, stack=stack
            )
        if config.reverse and "reverse" in directions:
            loops += _reverse(config, config.reverse, metrics, stack, findings)
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


def _reverse(
    config: Config,
    section: ReverseSection,
    metrics: Metrics,
    stack: contextlib.ExitStack,
    findings: Sequence[preflight.Finding],
) -> list[Loop]:
    dsn, kind = config.legacy.write_dsn, config.legacy.loop_guard
    source = open_source(section.source, dsn)
    stack.callback(source.close)

    away = any((it.level, it.where) == ("warning", preflight.WRITING) for it in findings)

    def prepare(stop: threading.Event) -> None:
        if away:
            what = f"preflight of {preflight.WRITING}"
            persist(lambda: preflight.require_writing(config), what=what, stop=stop)
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
