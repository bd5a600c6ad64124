"""A file with one direction beside a file with the other: what is found, provoked for real."""

import psycopg
import pytest

from figbridge import canary, provision
from figbridge.config import Config
from fixtures.checked import config_of, inspected, mapping, role
from fixtures.postgres import Database

UPDATE = mapping("shop.orders", "update", ["id"], ["status"])


@pytest.fixture
def shop(database: Database) -> Database:
    database.execute("CREATE SCHEMA shop; CREATE TABLE shop.orders (id int PRIMARY KEY, status text)")
    return database


def forward(shop: Database) -> Config:
    return config_of(shop.dsn, slot=shop.slot)


def reverse(shop: Database) -> Config:
    return config_of(shop.dsn, slot=shop.slot, forward=None, mappings=[UPDATE])


def both(shop: Database) -> Config:
    return config_of(shop.dsn, slot=shop.slot, mappings=[UPDATE])


def test_one_file_for_both_is_nothing_to_speak_of(shop: Database) -> None:
    provision.initialise(both(shop))
    assert [it for it in inspected(both(shop), "run") if it.where in {"forward", "reverse"}] == []


def test_a_direction_alone_is_nothing_to_speak_of(shop: Database) -> None:
    for config in (forward(shop), reverse(shop)):
        provision.initialise(config)
        found = [it for it in inspected(config, "run") if it.where in {"forward", "reverse"}]
        assert found == []
        provision.teardown(config, keep_schema=False)


def test_a_forward_file_beside_a_reverse_path_that_is_connected_is_refused(shop: Database) -> None:
    provision.initialise(forward(shop))
    provision.initialise(reverse(shop))
    with psycopg.connect(shop.dsn, application_name="figbridge-apply"):
        finding = inspected(forward(shop), "run").only("error", "reverse")
    assert "loop" in finding.what
    assert "one file" in finding.remedy
    assert inspected(forward(shop), "run").errors == []


def test_a_forward_file_where_a_reverse_path_wrote_lately_is_warned(shop: Database) -> None:
    provision.initialise(forward(shop))
    provision.initialise(reverse(shop))
    insert = "INSERT INTO figbridge.inbox VALUES (%s, 'k', '', 'e', now() - %s * interval '1 hour')"
    shop.execute(insert, [canary.SOURCE, 0])
    shop.execute(insert, ["shop.next", 30])
    assert not [it for it in inspected(forward(shop), "run") if it.where == "reverse"]

    shop.execute("INSERT INTO figbridge.inbox VALUES ('shop.next', 'l', '', 'e', now())")
    assert "loop" in inspected(forward(shop), "run").only("warning", "reverse").what


def test_a_forward_file_without_tables_does_not_mind_a_schema_that_its_role_may_not_use(
    each_database: Database,
) -> None:
    each_database.execute("CREATE SCHEMA shop; CREATE TABLE shop.orders (id int PRIMARY KEY, status text)")
    provision.initialise(both(each_database))
    with role(each_database) as (name, dsn):
        each_database.execute(f"GRANT USAGE ON SCHEMA shop TO {name}; GRANT SELECT ON shop.orders TO {name}")
        assert inspected(config_of(dsn, slot=each_database.slot), "run").errors == []

        letters = {"sink": {"type": "stdout"}, "dead-letters": {"type": "table"}}
        asked = config_of(dsn, slot=each_database.slot, forward=letters)
        found = inspected(asked, "run")
        assert set(found.errors) == {"schema figbridge"}
        for finding in found:
            if finding.level == "error":
                each_database.execute(finding.remedy)
        assert inspected(asked, "run").errors == []


def test_a_reverse_file_whose_marks_nobody_reads_is_refused(shop: Database) -> None:
    provision.initialise(forward(shop))
    provision.initialise(reverse(shop))
    finding = inspected(reverse(shop), "run").only("error", "forward")
    assert "would loop" in finding.what
    assert "--only" in finding.remedy

    provision.initialise(both(shop))
    assert "proves" in inspected(reverse(shop), "run").only("warning", "forward").what


def test_another_slot_is_another_bridge(shop: Database) -> None:
    provision.initialise(forward(shop))
    other = config_of(shop.dsn, slot="another", forward=None, mappings=[UPDATE])
    provision.initialise(other)
    assert not [it for it in inspected(other, "run") if it.where == "forward"]
