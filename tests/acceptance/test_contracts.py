"""`figbridge run` whose events must keep contracts: the others are in quarantine, with the path and without a loss."""

import json
from pathlib import Path

from fixtures.clock import until
from fixtures.postgres import Database
from fixtures.running import Running

CONTRACT = {
    "x-figbridge": {"detail-type": "orders.inserted"},
    "properties": {"after": {"properties": {"total": {"minimum": 0}}}},
}


def test_events_that_break_their_contract_are_in_quarantine(database: Database, tmp_path: Path) -> None:
    database.execute("CREATE SCHEMA shop; CREATE TABLE shop.orders (id int PRIMARY KEY, total int)")
    contracts, aside = tmp_path / "contracts", tmp_path / "aside.jsonl"
    contracts.mkdir()
    forward = f"contracts: {{path: {contracts}, quarantine: {{type: file, path: {aside}}}}}"
    running = Running(database.dsn, database.slot, tmp_path, "shop.orders", forward=forward)
    running.command("init")
    assert "no contract" in running.command("check", status=2)
    (contracts / "inserted.json").write_text(json.dumps(CONTRACT))
    assert "1 of them" in running.command("check")
    with running.bridge as bridge:
        bridge.until_ready()
        database.execute("INSERT INTO shop.orders SELECT n, n - 3 FROM generate_series(0, 9) n")
        events = running.until_events(7)
        until(lambda: aside.exists() and len(aside.read_bytes().splitlines()) == 3, 20, lambda: bridge.log)
        broken = 'figbridge_forward_contract_broken_total{contract="inserted.json"}'
        assert bridge.metric(broken) == 3
        running.until_delivered()
        assert bridge.metric('figbridge_forward_published_total{sink="file"}') == 7
        assert bridge.metric('figbridge_forward_quarantined_total{sink="file"}') == 3
        assert bridge.terminate() == 0

    assert [it["detail"]["key"]["id"] for it in events] == [3, 4, 5, 6, 7, 8, 9]
    kept = [json.loads(line) for line in aside.read_text().splitlines()]
    assert [it["detail"]["event"]["detail"]["key"]["id"] for it in kept] == [0, 1, 2]
    assert {it["source"] for it in kept} == {f"invalid.legacy.{database.name}"}
    assert kept[0]["detail"]["breaches"] == [
        {"path": "/detail/after/total", "message": "(a value) is less than the minimum of 0"}
    ]
    assert kept[0]["id"] == kept[0]["detail"]["event"]["id"]
