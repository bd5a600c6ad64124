"""`figbridge mapping test`: what an event becomes, and what it would change, without changing it."""

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from figbridge import cli
from fixtures.postgres import Database
from fixtures.reverse import COLUMNS, KIND, body, make_shop, orders


@pytest.fixture
def shop(database: Database) -> Database:
    return make_shop(database)


def run(shop: Database, path: Path, message: bytes, *options: str, action: str = "update") -> Result:
    mapping = {"match": KIND, "into": "shop.orders", "action": action, "key": {"id": "detail.id"}, "set": COLUMNS}
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
    assert '- {"id": 1, "note": null, "status": "new"' in done.output
    assert '+ {"id": 1, "note": null, "status": "paid"' in done.output
    assert "shop.audit: 1 inserted" in done.output
    assert "rolled back" in done.output
    assert orders(shop) == [(1, "new")]
    assert shop.execute("SELECT count(*) FROM shop.audit") == [(0,)]


@pytest.mark.parametrize(
    ("detail", "action", "said"),
    [
        ({"id": 404, "status": "paid"}, "update", "no such row: the event would wait"),
        ({"id": 1, "n": "many"}, "upsert", "SQLSTATE 22P02"),
        ({"id": 1, "customer": 5}, "upsert", "SQLSTATE 23503"),
    ],
)
def test_it_says_what_would_be_refused(
    tmp_path: Path, shop: Database, detail: dict[str, object], action: str, said: str
) -> None:
    done = run(shop, tmp_path, body("e-1", "order", **detail), "--execute", action=action)
    assert done.exit_code == 0, done.output
    assert said in done.output
    assert orders(shop) == []


def test_an_event_that_nobody_asked_for_and_one_that_is_none(tmp_path: Path, shop: Database) -> None:
    unmapped = run(shop, tmp_path, body("e-1", "unheard-of", id=1))
    assert unmapped.exit_code == 2
    assert "matches no mapping" in unmapped.output
    assert run(shop, tmp_path, b"[]").exit_code == 1
