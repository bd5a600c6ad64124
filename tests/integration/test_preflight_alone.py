"""Another bridge's reverse path on the same database: what shows it, and that replicas of one file do not."""

import json
from typing import Any

import pytest

from figbridge import canary, preflight, provision
from figbridge.config import Config
from fixtures.checked import inspected, mapping
from fixtures.postgres import Database


@pytest.fixture
def shop(database: Database) -> Database:
    database.execute("CREATE SCHEMA shop; CREATE TABLE shop.orders (id int PRIMARY KEY, status text)")
    return database


def bridge(shop: Database, name: str, guard: str = "inbox", mode: str = "live") -> Config:
    tree: dict[str, Any] = {
        "legacy": {"dsn": shop.dsn, "slot": f"{shop.slot}{name}", "publication": f"p{name}", "tables": ["shop.orders"]},
        "forward": {"sink": {"type": "stdout"}},
        "reverse": {
            "source": {"type": "local", "path": "/tmp/never-opened.sqlite"},
            "mode": mode,
            "mappings": [mapping("shop.orders", "update", ["id"], ["status"])],
        },
    }
    return Config.parse(json.dumps(tree | {"legacy": tree["legacy"] | {"loop-guard": guard}}), {})


def told(shop: Database, name: str, stage: preflight.Stage = "run", **options: str) -> list[str]:
    return [it.what for it in inspected(bridge(shop, name, **options), stage) if it.where == "reverse"]


@pytest.mark.parametrize("guard", ["inbox", "origin"])
def test_what_init_makes_for_another_bridge_is_warned_of(shop: Database, guard: str) -> None:
    assert not [line for line in provision.initialise(bridge(shop, "a", guard)) if "another bridge" in line]
    assert told(shop, "a", guard=guard) == [], "replicas are of one file"

    lines = provision.initialise(bridge(shop, "b", guard))
    assert [line for line in lines if line.startswith("warning: reverse: another bridge")]
    for one, other in ("ab", "ba"):
        (what,) = told(shop, one, guard=guard)
        assert (f"p{other}_inbox" if guard == "inbox" else f"{shop.slot}{other}") in what
    assert told(shop, "a", guard=guard, mode="dry-run") == []

    provision.teardown(bridge(shop, "b", guard), keep_schema=True)
    assert told(shop, "a", guard=guard) == []


def test_a_reverse_path_that_ran_lately_is_warned_of(shop: Database) -> None:
    for name in "ab":
        provision.initialise(bridge(shop, name, "message"))
    canary.write(shop.dsn, f"{shop.slot}a", "message")
    assert told(shop, "a", guard="message") == []
    (what,) = told(shop, "b", "init", guard="message")
    assert f"{shop.slot}a" in what

    shop.execute("UPDATE figbridge.canary SET written_at = now() - interval '2 days'")
    assert told(shop, "b", guard="message") == []
