"""``legacy.loop-guard: origin``: one session has the mark, so a command cannot write beside a running bridge."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from figbridge import cli
from figbridge.event import Event
from figbridge.transports.local import LocalSink
from fixtures.bridge import Bridge
from fixtures.clock import until
from fixtures.postgres import Database
from fixtures.reverse import KIND, orders

REMEDY = "stop the bridge"


@pytest.fixture
def config(database: Database, tmp_path: Path) -> Path:
    database.execute("CREATE SCHEMA shop; CREATE TABLE shop.orders (id int PRIMARY KEY, status text)")
    database.execute("INSERT INTO shop.orders VALUES (1, 'cancelled'), (2, 'cancelled'), (3, 'cancelled')")
    mapping = {
        "match": KIND, "into": "shop.orders", "action": "upsert", "key": {"id": "detail.id"},
        "set": {"status": "detail.status"}, "conflicts": {"policy": "reject", "before": {"status": "detail.seen"}},
    }  # fmt: skip
    legacy = {"dsn": database.dsn, "slot": database.slot, "tables": ["shop.orders"], "loop-guard": "origin"}
    tree = {
        "legacy": legacy,
        "forward": {"sink": {"type": "file", "path": str(tmp_path / "events.jsonl")}},
        "reverse": {"source": {"type": "local", "path": str(tmp_path / "bus.sqlite")}, "mappings": [mapping]},
        "http": {"listen": "${HTTP_LISTEN:-127.0.0.1:0}"},
    }
    path = tmp_path / "bridge.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_command_that_writes_ends_while_the_bridge_has_the_origin(
    database: Database, config: Path, tmp_path: Path
) -> None:
    def command(*arguments: str) -> Result:
        *names, last = arguments
        return CliRunner().invoke(cli.main, [*names, "-c", str(config), *last.split()])

    assert command("init", "").exit_code == 0
    with Bridge(config, tmp_path / "log") as bridge:
        bridge.until_ready()
        _announce(tmp_path, 1, 2, "poison")
        found = "SELECT (SELECT count(*) FROM figbridge.conflict), (SELECT count(*) FROM figbridge.dead_letter)"
        until(lambda: database.execute(found) == [(2, 1)], 20, lambda: bridge.log)

        refused = command("conflicts", "resolve", "1 --take new")
        assert (refused.exit_code, REMEDY in refused.output) == (1, True), refused.output
        assert f"figbridge_{database.slot}" in refused.output
        assert database.execute("SELECT state FROM figbridge.conflict WHERE id = 1") == [("open",)]
        assert command("conflicts", "resolve", "2 --take legacy").exit_code == 0
        redriven = command("dead-letters", "redrive", "--all")
        assert (redriven.exit_code, REMEDY in redriven.output) == (1, True), redriven.output

        assert bridge.terminate() == 0
        resolved = command("conflicts", "resolve", "1 --take new")
        assert resolved.exit_code == 0, resolved.output
        assert orders(database)[0] == (1, "paid")
        assert "still a dead letter" in command("dead-letters", "redrive", "--all").output

        bridge.start()
        bridge.until_ready()
        database.execute("UPDATE shop.orders SET status = 'refunded' WHERE id = 3")
        until(lambda: _left(tmp_path), 20, lambda: bridge.log)
        assert [it["after"]["status"] for it in _left(tmp_path)] == ["refunded"], "what the command wrote is an echo"


def _announce(directory: Path, *identities: object) -> None:
    sink = LocalSink(directory / "bus.sqlite")
    for it in identities:
        detail = json.dumps({"id": it, "status": "paid", "seen": "new"}).encode()
        sink.publish([Event(f"e-{it}", "shop.next", "order", str(it), datetime.now(UTC), detail)])
    sink.close()


def _left(directory: Path) -> list[dict[str, Any]]:
    path = directory / "events.jsonl"
    return [json.loads(line)["detail"] for line in path.read_bytes().splitlines()] if path.exists() else []
