"""`figbridge mapping test`: what an event becomes, and what it would change, without changing it."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from figbridge import cli
from fixtures.postgres import Database
from fixtures.reverse import COLUMNS, KIND, body, make_shop, orders


@pytest.fixture
def shop(database: Database) -> Database:
    return make_shop(database)


def run(
    shop: Database, path: Path, message: bytes, *options: str, action: str = "update", **mapping_has: Any
) -> Result:
    mapping = {"match": KIND, "into": "shop.orders", "action": action, "key": {"id": "detail.id"}, "set": COLUMNS}
    mapping |= mapping_has
    config = {
        "legacy": {"dsn": shop.dsn, "tables": ["shop.orders"]},
        "reverse": {"source": {"type": "local", "path": str(path / "bus.sqlite")}, "mappings": [mapping]},
    }
    (path / "bridge.yaml").write_text(yaml.safe_dump(config))
    (path / "event.json").write_bytes(message)
    arguments = ["mapping", "test", str(path / "bridge.yaml"), "--event", str(path / "event.json"), *options]
    return CliRunner().invoke(cli.main, arguments)


def test_it_shows_the_statements_and_touches_nothing(tmp_path: Path, shop: Database) -> None:
    done = run(shop, tmp_path, body("e-1", id=1, status="paid"))
    assert done.exit_code == 0, done.output
    for part in ("shop.next / e-1", "shop.orders / 1", 'UPDATE "shop"."orders"', '{"id":1,"status":"paid"}'):
        assert part in done.output
    assert "rolled back" not in done.output


def test_it_shows_the_difference_and_rolls_back(tmp_path: Path, shop: Database) -> None:
    shop.execute("""
        INSERT INTO shop.orders (id, status) VALUES (1, 'new');
        CREATE TABLE shop.audit (id bigint);
        CREATE FUNCTION shop.audit() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN INSERT INTO shop.audit VALUES (NEW.id); RETURN NEW; END';
        CREATE TRIGGER audit AFTER UPDATE ON shop.orders FOR EACH ROW EXECUTE FUNCTION shop.audit()
    """)
    done = run(shop, tmp_path, body("e-1", id=1, status="paid"), "--execute")
    assert done.exit_code == 0, done.output
    assert '- {"id":1,"customer_id":null,"status":"new"' in done.output
    assert '+ {"id":1,"customer_id":null,"status":"paid"' in done.output
    assert "shop.audit: 1 inserted" in done.output
    assert "rolled back" in done.output
    assert orders(shop) == [(1, "new")]
    assert shop.execute("SELECT count(*) FROM shop.audit") == [(0,)]


@pytest.mark.parametrize(
    ("detail", "action", "said", "status"),
    [
        ({"id": 404, "status": "paid"}, "update", "no such row: the event would wait", 0),
        ({"id": 1, "n": "many"}, "upsert", "SQLSTATE 22P02", 1),
        ({"id": 1, "customer": 5}, "upsert", "SQLSTATE 23503", 1),
    ],
)
def test_it_says_what_would_be_refused(
    tmp_path: Path, shop: Database, detail: dict[str, object], action: str, said: str, *, status: int
) -> None:
    done = run(shop, tmp_path, body("e-1", "order", **detail), "--execute", action=action)
    assert done.exit_code == status, done.output
    assert ("the event would be refused" in done.stderr) == (status == 1)
    assert "rolled back" in done.stdout
    assert said in done.output
    assert orders(shop) == []


def test_what_would_be_refused_where_there_are_rules(tmp_path: Path, shop: Database) -> None:
    message = body("e-1", "order", id=1, n="many")
    done = run(shop, tmp_path, message, "--execute", action="upsert", conflicts={"policy": "legacy_wins"})
    assert done.exit_code == 1, done.output
    assert "outcome          dead_letter: 22P02" in done.stdout
    assert "the event would be refused: 22P02" in done.stderr


def test_an_event_that_nobody_asked_for_and_one_that_is_none(tmp_path: Path, shop: Database) -> None:
    unmapped = run(shop, tmp_path, body("e-1", "unheard-of", id=1))
    assert unmapped.exit_code == 2
    assert "matches no mapping" in unmapped.output
    assert run(shop, tmp_path, b"[]").exit_code == 1


RULES = {
    "policy": "legacy_wins",
    "before": {"status": "detail.seen.status", "quantity": "detail.seen.n"},
    "groups": [{"columns": "quantity", "policy": "delta"}],
    "kinds": {"fk_missing": "reject"},
}
NOTHING = "SELECT (SELECT count(*) FROM figbridge.inbox), (SELECT count(*) FROM figbridge.conflict)"


def decided(shop: Database, path: Path, action: str = "upsert", policy: str = "legacy_wins", **detail: Any) -> str:
    """What is said of an event on order 1, which is cancelled, and of which there are 5. Nothing may stay of it."""
    shop.execute("INSERT INTO shop.orders (id, status, quantity) VALUES (1, 'cancelled', 5) ON CONFLICT DO NOTHING")
    before = shop.execute(NOTHING), shop.execute("TABLE shop.orders")
    message = body("e-1", "order", id=1, **detail)
    rules = RULES | {"policy": policy}
    done = run(shop, path, message, "--execute", action=action, version="detail.v", conflicts=rules)
    assert done.exit_code == int("outcome          dead_letter" in done.stdout), done.output
    assert "rolled back" in done.output
    assert (shop.execute(NOTHING), shop.execute("TABLE shop.orders")) == before
    return done.output


def test_the_rules_are_asked_and_their_decision_is_shown(tmp_path: Path, shop: Database) -> None:
    said = decided(shop, tmp_path, v=1, status="paid", n=7, seen={"status": "new", "n": 6})
    assert 'update_conflict in statement 1: merged, each column has a winner of its own {"status": "legacy", ' in said
    assert 'expected {"quantity":6,"status":"new"}' in said
    assert 'found    {"id":1,"customer_id":null,"note":null,"quantity":5,"status":"cancelled"}' in said
    assert '- {"id":1,"customer_id":null,"status":"cancelled","note":null,"quantity":5' in said
    assert '+ {"id":1,"customer_id":null,"status":"cancelled","note":null,"quantity":6' in said
    assert "shop.orders: 0 inserted, 1 updated, 0 deleted" in said
    assert "outcome          applied" in said


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"status": "paid", "seen": {"status": "cancelled"}}, ["outcome          applied", '"status":"paid"']),
        ({"status": "paid", "seen": {"status": "new"}}, ["legacy, the row stays", "ignored: update_conflict"]),
        (
            {"status": "paid", "seen": {"status": "new"}, "policy": "reject"},
            ["rejected, nothing of the event is written, and a person decides", "ignored: update_conflict"],
        ),
        (
            {"customer": 7, "seen": {}},
            ["conflict         fk_missing: rejected", "outcome          ignored: fk_missing"],
        ),
        ({"status": {}, "note": "\u0000", "seen": {}}, ["outcome          dead_letter: 22"]),
    ],
)
def test_whatever_they_decide(tmp_path: Path, shop: Database, changes: dict[str, Any], parts: list[str]) -> None:
    said = decided(shop, tmp_path, v=1, **changes)
    for part in parts:
        assert part in said, said


def test_an_update_of_a_row_that_is_not_there_waits(tmp_path: Path, shop: Database) -> None:
    done = run(shop, tmp_path, body("e-1", id=404, v=1), "--execute", version="detail.v", conflicts=RULES)
    assert "outcome          waits: update_missing" in done.output


def test_an_event_that_was_applied_before_is_asked_all_the_same(tmp_path: Path, shop: Database) -> None:
    shop.execute(
        "INSERT INTO figbridge.entity_version (scope, identity, version, deleted) VALUES ('shop.orders', '1', 3, false)"
    )
    late = decided(shop, tmp_path, v=2, status="paid", seen={"status": "new"})
    assert "legacy, the row stays" in late
    assert "version 3 was applied before: the bridge would ignore the event (stale_version)" in late
    assert "would" not in decided(shop, tmp_path, v=4, status="paid", seen={"status": "new"})
    shop.execute("INSERT INTO figbridge.inbox VALUES ('shop.next', 'e-1', '', 'e-1')")
    again = decided(shop, tmp_path, v=4, status="paid", seen={"status": "new"})
    assert "legacy, the row stays" in again
    assert "its idempotency key was applied before" in again


def test_rules_need_the_schema(tmp_path: Path, shop: Database) -> None:
    shop.execute("DROP SCHEMA figbridge CASCADE")
    done = run(shop, tmp_path, body("e-1", id=1, v=1), "--execute", conflicts=RULES)
    assert done.exit_code == 1
    assert "`figbridge init`" in done.output
