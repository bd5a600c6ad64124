"""`figbridge run` in each format: what leaves is what docs/formats.md shows."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent

from fixtures.postgres import Database
from fixtures.running import Running

PAGE = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
VARIES = {
    "id", "commit_lsn", "xid", "committed_at", "time", "schema_version", "lsn", "sequence", "ts_ms", "ts_us", "ts_ns",
    "txId", "version", "db", "source", "name",
}  # fmt: skip


def shown(format_: str) -> dict[str, Any]:
    found = re.search(rf"## {format_}\n.*?```json\n(.*?)```", PAGE, re.DOTALL)
    assert found
    document: dict[str, Any] = json.loads(found[1])
    return document


def stable(value: Any) -> Any:
    """Without what differs from run to run: a value that does is the name of its type."""
    if not isinstance(value, dict):
        return value
    varies = {name: it for name, it in value.items() if name in VARIES and not isinstance(it, dict) and name != "id"}
    ids = {"id": "…"} if isinstance(value.get("id"), str) else {}
    return {name: stable(it) for name, it in value.items()} | {name: type(it) for name, it in varies.items()} | ids


@pytest.mark.parametrize("format_", ["cloudevents", "debezium"])
def test_a_line_is_what_the_page_shows(database: Database, tmp_path: Path, format_: str) -> None:
    database.execute("CREATE TABLE thing (id int PRIMARY KEY, note text)")
    running = Running(database.dsn, database.slot, tmp_path, "public.thing", forward=f"format: {format_}")
    running.command("init")
    with running.bridge as bridge:
        bridge.until_ready()
        database.execute("INSERT INTO thing VALUES (1, 'a')")
        (event,) = running.until_events(1)
        running.until_delivered()
        bridge.kill()  # what is torn by a kill is cut off in every format
        bridge.until_ready()
        database.execute("INSERT INTO thing VALUES (2, 'b')")
        running.until_events(2)
        assert bridge.terminate() == 0

    assert stable(event) == stable(shown(format_))
    assert list(event) == list(shown(format_))
    if format_ == "cloudevents":
        read = JSONFormat().read(CloudEvent, running.lines[0])
        assert (read.get_source(), read.get_type()) == (f"legacy.{database.name}", "thing.inserted")
