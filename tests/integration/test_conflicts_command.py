"""`figbridge conflicts`: what waits for a person, and a person's word, carried out once."""

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from figbridge import cli
from figbridge.config import Config
from figbridge.reverse.apply import Applier
from figbridge.reverse.mapping import Mapping, Mappings
from fixtures.checked import role
from fixtures.postgres import Database
from fixtures.reverse import COLUMNS, KIND, make_shop, rows_of_inbox, work

Run = Callable[..., Result]


@pytest.fixture
def shop(database: Database) -> Database:
    make_shop(database)
    database.execute("INSERT INTO shop.orders (id, status, note, quantity) VALUES (1, 'cancelled', 'n', 5)")
    return database


@pytest.fixture
def config(shop: Database, tmp_path: Path) -> Path:
    mapping = {
        "match": KIND, "into": "shop.orders", "action": "upsert", "key": {"id": "detail.id"}, "set": COLUMNS,
        "version": "detail.v",
        "conflicts": {
            "policy": "reject",
            "before": {"status": "detail.before.status"},
            "groups": [{"columns": "note", "policy": "legacy_wins"}],
        },
    }  # fmt: skip
    tree = {
        "legacy": {"dsn": shop.dsn, "tables": ["shop.orders"]},
        "reverse": {"source": {"type": "local", "path": str(tmp_path / "bus.sqlite")}, "mappings": [mapping]},
    }
    path = tmp_path / "bridge.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def run(config: Path) -> Run:
    def invoke(*arguments: Any) -> Result:
        command, *rest = map(str, arguments)
        return CliRunner().invoke(cli.main, ["conflicts", command, "-c", str(config), *rest])

    return invoke


@pytest.fixture
def applier(shop: Database) -> Iterator[Applier]:
    with closing(Applier(shop.dsn, statement_timeout=10, lock_timeout=1)) as found:
        yield found


@pytest.fixture
def upsert(config: Path) -> Mapping:
    section = Config.load(config).reverse
    assert section is not None
    return Mappings(section.mappings).all[0]


def conflict(applier: Applier, upsert: Mapping, version: int = 1, **detail: Any) -> None:
    seen = {"status": "new"}
    event = work(upsert, f"e{version}", id=1, v=version, before=seen, **({"status": "paid"} | detail))
    assert applier.apply_all([event])[event].reason == "update_conflict"


def status(shop: Database) -> str:
    return str(shop.execute("SELECT status FROM shop.orders")[0][0])


def state(shop: Database) -> Any:
    return shop.execute("SELECT state, resolution FROM figbridge.conflict ORDER BY id")


def test_list_and_show(run: Run, applier: Applier, upsert: Mapping) -> None:
    assert run("list").output == "there is none\n"
    conflict(applier, upsert, status="secret")
    listed = run("list")
    assert listed.exit_code == 0, listed.output
    assert "update_conflict  shop.orders  rejected (status: rejected)  event e1" in listed.output
    assert "secret" not in listed.output
    assert run("list", "--kind", "not_owner").output == "there is none\n"
    shown = run("show", 1).output
    assert '"status":"secret"' in shown
    assert '"status":"cancelled"' in shown
    (document,) = json.loads(run("list", "--json").output)
    assert document["before"]["status"] == "cancelled"
    assert document["proposed"]["status"] == "secret"
    assert document["event"]["detail"]["before"] == {"status": "new"}
    missing = run("show", 99)
    assert missing.exit_code == 1
    assert "there is no conflict 99" in missing.output


def test_the_new_values_are_written_once(run: Run, shop: Database, applier: Applier, upsert: Mapping) -> None:
    conflict(applier, upsert, note="ours", n=7)
    done = run("resolve", 1, "--take", "new")
    assert done.exit_code == 0, done.output
    assert shop.execute("SELECT status, note, quantity FROM shop.orders") == [("paid", "ours", 7)]
    assert state(shop) == [("resolved", "new")]
    assert rows_of_inbox(shop) == [("figbridge.conflict", "1"), ("shop.next", "e1")], "its echo will be recognised"
    shop.execute("UPDATE shop.orders SET status = 'later'")
    again = run("resolve", 1, "--take", "new", "--force")
    assert again.exit_code == 1
    assert "is resolved already" in again.output
    assert status(shop) == "later"
    assert run("list").output == "there is none\n"
    assert "resolved -> new" in run("list", "--all").output


@pytest.mark.parametrize(("take", "after"), [("legacy", ("resolved", "legacy")), ("dismiss", ("dismissed", None))])
def test_the_row_stays(
    run: Run, shop: Database, applier: Applier, upsert: Mapping, *, take: str, after: tuple[str, str | None]
) -> None:
    conflict(applier, upsert)
    assert run("resolve", 1, "--take", take).exit_code == 0
    assert state(shop) == [after]
    assert status(shop) == "cancelled"
    assert run("resolve", 1, "--take", "new").exit_code == 1


def test_a_row_that_changed_since_is_not_overwritten(
    run: Run, shop: Database, applier: Applier, upsert: Mapping
) -> None:
    conflict(applier, upsert)
    shop.execute("UPDATE shop.orders SET status = 'refunded'")
    refused = run("resolve", 1, "--take", "new")
    assert refused.exit_code == 1
    assert "somebody has written since" in refused.output
    assert (status(shop), state(shop)) == ("refunded", [("open", None)])
    assert run("resolve", 1, "--take", "new", "--force").exit_code == 0
    assert (status(shop), state(shop)) == ("paid", [("resolved", "new")])


def test_a_row_that_changed_in_its_last_digits_is_not_overwritten(
    run: Run, shop: Database, applier: Applier, upsert: Mapping
) -> None:
    shop.execute("ALTER TABLE shop.orders ALTER quantity TYPE numeric; UPDATE shop.orders SET quantity = 1e5000 + 0.25")
    conflict(applier, upsert, n=1)
    assert f'"quantity":1{"0" * 5000}.25' in run("list", "--json").output, "a script has the digits, too"
    shop.execute("UPDATE shop.orders SET quantity = quantity + 0.25")
    refused = run("resolve", 1, "--take", "new")
    assert refused.exit_code == 1
    assert "somebody has written since" in refused.output
    shop.execute("UPDATE shop.orders SET quantity = quantity - 0.25 + 0.000")
    assert run("resolve", 1, "--take", "new").exit_code == 0, "250 thousandths are as much as 25 hundredths"
    assert status(shop) == "paid"


def test_a_row_that_is_nested_deeply_is_compared(run: Run, shop: Database, applier: Applier, upsert: Mapping) -> None:
    shop.execute(f"""
        ALTER TABLE shop.orders ALTER note TYPE json USING '{"[" * 3000}{"]" * 3000}';
        ALTER TABLE shop.orders ALTER note TYPE jsonb;
    """)
    conflict(applier, upsert, note=[])
    shop.execute("UPDATE shop.orders SET quantity = 6")
    assert "written since" in run("resolve", 1, "--take", "new").output
    shop.execute("UPDATE shop.orders SET quantity = 5")
    assert run("resolve", 1, "--take", "new").exit_code == 0
    assert status(shop) == "paid"


def test_a_newer_event_is_not_undone(run: Run, shop: Database, applier: Applier, upsert: Mapping) -> None:
    conflict(applier, upsert, 1)
    conflict(applier, upsert, 2, status="shipped")
    refused = run("resolve", 1, "--take", "new", "--force")
    assert refused.exit_code == 1
    assert "a newer event of this entity was applied since" in refused.output
    assert run("resolve", 2, "--take", "new").exit_code == 0
    assert status(shop) == "shipped"
    assert run("resolve", 1, "--take", "dismiss").exit_code == 0


def test_a_row_that_is_gone_is_made_again(run: Run, shop: Database, applier: Applier, upsert: Mapping) -> None:
    conflict(applier, upsert)
    shop.execute("DELETE FROM shop.orders")
    assert "written since" in run("resolve", 1, "--take", "new").output
    assert run("resolve", 1, "--take", "new", "--force").exit_code == 0
    assert status(shop) == "paid"


def test_what_the_database_refuses_stays_open(run: Run, shop: Database, applier: Applier, upsert: Mapping) -> None:
    conflict(applier, upsert, customer=404)
    refused = run("resolve", 1, "--take", "new")
    assert refused.exit_code == 1
    assert "23503" in refused.output
    assert state(shop) == [("open", None)]
    assert rows_of_inbox(shop) == [("shop.next", "e1")]


def test_a_mapping_that_is_gone(run: Run, config: Path, applier: Applier, upsert: Mapping) -> None:
    conflict(applier, upsert)
    config.write_text(config.read_text().replace("detail-type: order", "detail-type: other"))
    refused = run("resolve", 1, "--take", "new")
    assert refused.exit_code == 2
    assert "no mapping with rules" in refused.output


def test_a_file_without_rules_has_no_conflicts(shop: Database, config: Path, run: Run) -> None:
    tree = yaml.safe_load(config.read_text())
    del tree["reverse"]["mappings"][0]["conflicts"]
    config.write_text(yaml.safe_dump(tree))
    assert run("list").exit_code == 0, "what rules left that are gone is still to be read"

    with role(shop) as (_, dsn):
        config.write_text(yaml.safe_dump(tree).replace(shop.dsn, dsn))
        refused = run("list")
    assert (refused.exit_code, "no mapping of the file has `conflicts`" in refused.output) == (2, True), refused.output
    shop.execute("DROP TABLE figbridge.conflict")
    config.write_text(yaml.safe_dump(tree))
    for refused in (run("list"), run("show", 1), run("resolve", 1, "--take", "legacy")):
        assert (refused.exit_code, "no mapping" in refused.output) == (2, True), refused.output
