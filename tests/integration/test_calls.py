"""`call`: a Python function of somebody's package makes the statements of an event."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from figbridge.config import MappingSection
from figbridge.deadletter import TableDeadLetterStore
from figbridge.metrics import Metrics
from figbridge.reverse.apply import Applier
from figbridge.reverse.consume import Consumer
from figbridge.reverse.mapping import Mappings
from fixtures.postgres import Database
from fixtures.reverse import KIND, body, make_shop, orders, rows_of_inbox
from fixtures.scripted import ScriptedSource

PACKAGE = """
def order(event):
    detail = event["detail"]
    for line in detail["lines"]:
        sql = "INSERT INTO shop.orders (id, status, quantity) VALUES (%(id)s, %(status)s, %(n)s)"
        share = float("inf") if detail["share"] > 2 else 2 // detail["share"]
        yield sql, {"id": line, "status": event["id"], "n": share}
    if "raw" in detail:
        yield detail["raw"], {}

def nothing(event):
    return None
"""


@pytest.fixture
def shop(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Database:
    """With a package installed, as far as importlib.metadata can tell."""
    (tmp_path / "shop_statements.py").write_text(PACKAGE)
    installed = tmp_path / "shop_statements-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: shop-statements\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(
        "[figbridge.statements]\norder = shop_statements:order\nnothing = shop_statements:nothing\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return make_shop(database)


def consume(shop: Database, bodies: list[bytes], call: str = "order") -> list[Any]:
    """All of them in one batch; the reasons of what became a dead letter."""
    section: dict[str, Any] = {
        "match": KIND,
        "statements": [
            {"call": call},
            {"into": "shop.customers", "action": "insert", "set": {"id": "detail.customer"}},
        ],
    }
    stop = threading.Event()
    source = ScriptedSource(bodies, stop)
    applier = Applier(shop.dsn, statement_timeout=10, lock_timeout=2)
    mappings = Mappings([MappingSection.model_validate(section)])
    consumer = Consumer(source, mappings, applier, TableDeadLetterStore(shop.dsn), Metrics(), park_timeout=600)
    consumer.run(stop)
    assert not source.left
    return shop.execute("SELECT event_id, reason, message FROM figbridge.dead_letter ORDER BY event_id")


def test_its_statements_run_with_the_others_in_one_transaction(shop: Database) -> None:
    both = body("a", lines=[1, 2], share=2, customer=7), body("b", lines=[3], share=1, customer=8)
    assert consume(shop, [*both, both[0]]) == []
    assert orders(shop) == [(1, "a"), (2, "a"), (3, "b")]
    assert rows_of_inbox(shop) == [("shop.next", "a"), ("shop.next", "b")]
    assert shop.execute("SELECT id FROM shop.customers ORDER BY 1") == [(7,), (8,)]


def test_what_one_event_sets_for_its_transaction_does_not_reach_its_neighbours(shop: Database) -> None:
    shop.execute("""
        CREATE FUNCTION shop.sign() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN NEW.name := current_setting('app.user', true); RETURN NEW; END $$;
        CREATE TRIGGER sign BEFORE INSERT ON shop.customers FOR EACH ROW EXECUTE FUNCTION shop.sign();
    """)
    says = "SELECT set_config('app.user', 'alice', true)"
    bodies = [body(str(number), customer=number, lines=[], share=1) for number in range(4)]
    bodies[1] = body("1", customer=1, lines=[], share=1, raw=says)
    assert consume(shop, bodies) == []
    named = shop.execute("SELECT id FROM shop.customers WHERE name = 'alice'")
    assert (named, shop.execute("SELECT count(*) FROM shop.customers")) == ([(1,)], [(4,)])


@pytest.mark.parametrize(
    ("detail", "reason", "says"),
    [
        ({"lines": [1], "share": 0}, "malformed", "raised ZeroDivisionError"),
        ({"lines": None, "share": 1}, "malformed", "raised TypeError"),
        ({"share": 1}, "malformed", "raised KeyError"),
        ({"lines": [1], "share": 1, "raw": "SELEKT 1"}, "42601", "syntax error"),
        ({"lines": [1], "share": 1, "raw": "SELECT %(nobody)s"}, "driver", "nobody"),
        ({"lines": [1], "share": 1, "raw": 5}, "malformed", "returned int for SQL"),
        ({"lines": ["many"], "share": 1}, "22P02", "invalid input syntax"),
        ({"lines": [1], "share": 1, "raw": "SELECT 1; ROLLBACK"}, "malformed", "contains ROLLBACK"),
        ({"lines": [1], "share": 1, "raw": "COPY shop.orders FROM STDIN"}, "malformed", "contains a COPY"),
        ({"lines": [1], "share": 3}, "malformed", "returned a number that JSON has not"),
    ],
)
def test_what_it_cannot_do_is_a_dead_letter_and_its_neighbours_are_applied(
    shop: Database, detail: dict[str, Any], reason: str, says: str
) -> None:
    good = body("a", lines=[10], share=1, customer=7), body("z", lines=[11], share=1, customer=8)
    ((event_id, found, message),) = consume(shop, [good[0], body("bad", customer=9, **detail), good[1]])
    assert (event_id, found) == ("bad", reason), message
    assert says in message
    assert orders(shop) == [(10, "a"), (11, "z")]
    assert shop.execute("SELECT id FROM shop.customers ORDER BY 1") == [(7,), (8,)]


def test_one_that_returns_no_statements_at_all_is_its_own_fault(shop: Database) -> None:
    ((_, reason, message),) = consume(shop, [body("a", customer=1)], call="nothing")
    assert (reason, "call nothing" in message) == ("malformed", True)
    assert json.loads(body("a"))["id"] == "a"
