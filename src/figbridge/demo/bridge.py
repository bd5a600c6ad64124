"""The bridge of the demo: the real service, started as a user starts it, and watched through its own probes.

Nothing here reaches into figbridge: ``python -m figbridge init`` and ``run`` with a configuration file, ``/readyz``
and ``/metrics`` over HTTP, SIGKILL and SIGTERM.
"""

import contextlib
import http.client
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import yaml
from prometheus_client.parser import text_string_to_metric_families

from figbridge.demo.bus import SOURCE
from figbridge.demo.guard import Guard
from figbridge.demo.legacy_app import TABLES
from figbridge.demo.processes import Child, ProcessDied

SLOT: Final = "figbridge"


def configuration(dsn: str, *, sink: Mapping[str, Any], source: Mapping[str, Any], port: int) -> str:
    """The demo's bridge.yaml."""
    created = {"source": SOURCE, "detail-type": "order.created"}
    columns = ("id", "customer", "quantity", "total", "express", "note", "tags", "placed_at", "status")
    changed = {"source": SOURCE, "detail-type": "order.status-changed"}
    mappings = [
        {
            "match": created,
            "into": "shop.orders",
            "action": "insert",
            "set": {column: f"detail.order.{column}" for column in columns},
            "idempotency_key": "detail.change_id",
        },
        {
            "match": changed,
            "into": "shop.orders",
            "action": "update",
            "key": {"id": "detail.order_id"},
            "set": {"status": "detail.status"},
            "idempotency_key": "detail.change_id",
        },
    ]
    tables = [f"shop.{table}" for table in TABLES]
    tree = {
        "legacy": {"dsn": dsn, "slot": SLOT, "publication": "figbridge", "tables": tables},
        "forward": {"sink": dict(sink)},
        "reverse": {"source": dict(source), "mappings": mappings},
        "http": {"listen": f"127.0.0.1:{port}"},
    }
    return yaml.safe_dump(tree, sort_keys=False)


@dataclass(frozen=True, slots=True)
class Readings:
    """What /metrics says. Counters are totals over all lives of the bridge, as last seen in each."""

    captured: int = 0
    published: int = 0
    echoes: int = 0
    applied: int = 0
    duplicates: int = 0
    lag_seconds: float = 0.0
    lag_bytes: int = 0

    def after(self, earlier: "Readings") -> "Readings":
        """These readings on top of the counters of `earlier` lives."""
        return replace(
            self,
            captured=self.captured + earlier.captured,
            published=self.published + earlier.published,
            echoes=self.echoes + earlier.echoes,
            applied=self.applied + earlier.applied,
            duplicates=self.duplicates + earlier.duplicates,
        )


def parse_metrics(exposition: str) -> Readings:
    """From the text format. https://prometheus.io/docs/instrumenting/exposition_formats/"""
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            name = sample.name
            if outcome := sample.labels.get("outcome"):
                name = f"{name} {outcome}"
            totals[name] = totals.get(name, 0.0) + sample.value

    def read(name: str) -> float:
        return totals.get(f"figbridge_{name}", 0.0)

    return Readings(
        captured=int(read("forward_changes_total")),
        published=int(read("forward_published_total")),
        echoes=int(read("forward_echoes_total")),
        applied=int(read("reverse_events_total applied")),
        duplicates=int(read("reverse_events_total duplicate")),
        lag_seconds=read("forward_lag_seconds"),
        lag_bytes=int(read("forward_lag_bytes")),
    )


class Bridge:
    """``figbridge run``, which may be killed and started again."""

    def __init__(self, config: Path, *, port: int, guard: Guard, environment: Mapping[str, str]) -> None:
        self._config, self._port, self._guard, self._environment = config, port, guard, environment
        self._log = config.with_name("bridge.log")
        self._earlier = self._latest = Readings()
        self._child: Child | None = None

    def initialise(self) -> None:
        """``figbridge init``. Raises ProcessDied with what it said when it fails."""
        done = subprocess.run(self._command("init"), env=self._environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ProcessDied(f"figbridge init ended with exit status {done.returncode}:\n{done.stdout}{done.stderr}")

    def start(self) -> None:
        """``figbridge run``; returns at once, see `is_ready`."""
        self._child = Child(
            "bridge",
            self._command("run"),
            log=self._log,
            guard=self._guard,
            environment=self._environment,
            talks=False,
        )

    def kill(self) -> None:
        """``kill -9``."""
        self._running().kill()
        self._earlier, self._latest = self._latest.after(self._earlier), Readings()

    def end(self) -> None:
        """SIGTERM: drain, acknowledge, end. Raises ProcessDied when the exit status is not 0."""
        if status := self._running().end():
            raise ProcessDied(f"the bridge ended with exit status {status}:\n{self._running().tail()}")

    def check(self) -> None:
        """Raise ProcessDied if it has ended by itself."""
        self._running().check()

    def is_ready(self) -> bool:
        """Whether both directions work: /readyz answers 200."""
        return self._get("/readyz") is not None

    def readings(self) -> Readings:
        """What /metrics says now; the last known while it does not answer."""
        if (exposition := self._get("/metrics")) is not None:
            self._latest = parse_metrics(exposition)
        return self._latest.after(self._earlier)

    def _get(self, path: str) -> str | None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=2)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", path)
            answer = connection.getresponse()
            text = answer.read().decode()
            return text if answer.status == http.client.OK else None
        return None

    def _running(self) -> Child:
        if self._child is None:
            raise RuntimeError("the bridge was not started")
        return self._child

    def _command(self, command: str) -> list[str]:
        return [sys.executable, "-m", "figbridge", command, "-c", str(self._config)]
