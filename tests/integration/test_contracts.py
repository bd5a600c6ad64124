"""Contracts out of live tables, events of real servers held against them, and the forward path's own standard."""

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema_rs
import orjson
import pytest
from click.testing import CliRunner

from figbridge import cli
from figbridge.config import Config, ContractsSection, HashSection, SelectSection
from figbridge.contracts import Contracts, write
from figbridge.deadletter import DeadLetter
from figbridge.event import Event
from figbridge.forward import contract
from figbridge.forward.snapshot import backfill
from figbridge.forward.standard import BROKEN
from figbridge.forward.versions import History
from fixtures.clock import until
from fixtures.forward import Forward
from fixtures.postgres import Database
from fixtures.replay import FENCE, settled
from fixtures.snapshot import prepare
from fixtures.type_matrix import SECTIONS, by_kind

EVENT = jsonschema_rs.validator_for(
    json.loads(resources.files("figbridge.contracts").joinpath("event.schema.json").read_text())
)
ORDERS = """
CREATE SCHEMA shop;
CREATE TABLE shop.orders (
    id bigint PRIMARY KEY, customer text NOT NULL, status text, total numeric(12,2), paid boolean NOT NULL,
    placed_at timestamptz, tags text[], doc jsonb, ratio float8, attachment text
);
ALTER TABLE shop.orders ALTER attachment SET STORAGE EXTERNAL
"""


ORDINARY = """
INSERT INTO shop.orders VALUES (1, 'Ada', 'new', 12.50, true, now(), '{a,b}', '{"x":1}', 0.5, repeat('x', 9000))
"""
ODD = """
INSERT INTO shop.orders (id, customer, paid, total, ratio, placed_at, tags)
VALUES (9223372036854775807, 'B', false, 'NaN', '-Infinity', 'infinity', '[0:1]={a,b}')
"""


class Letters:
    def __init__(self) -> None:
        self.letters: list[DeadLetter] = []

    def add(self, letters: Sequence[DeadLetter]) -> None:
        self.letters += letters

    def close(self) -> None:
        pass


def config(database: Database, *tables: str, **forward: Any) -> Config:
    legacy = {"dsn": database.dsn, "publication": "pub", "tables": tables}
    # the fixture's names, whatever the database is called
    names = {"source": "legacy.db"}
    return Config.parse(json.dumps({"legacy": legacy, "forward": {"sink": {"type": "stdout"}} | names | forward}), {})


def derived(configured: Config, directory: Path) -> Contracts:
    write(directory, contract.contracts(configured))
    return Contracts.load(directory)


def readable(says: str) -> bool:
    """Not so: half a character or 1e400 in a json column, which JSON has and most parsers refuse."""
    try:
        orjson.loads(says)
    except orjson.JSONDecodeError:
        return False
    return True


def judged(contracts: Contracts, events: Sequence[Event]) -> list[str]:
    """How events break their contracts, and that they have one and are events at all."""
    told = []
    for event in events:
        if FENCE.encode() in event.detail:
            continue
        assert not [it.message for it in EVENT.iter_errors(json.loads(event.detail))], event.detail
        found = contracts.find(event.source, event.detail_type)
        assert found, event.detail_type
        told += [f"{event.detail_type} {it.path}: {it.message}" for it in found.breaches(event.detail)]
    return told


@pytest.mark.parametrize("full", [False, True])
def test_all_that_a_table_does_keeps_its_contract(each_database: Database, tmp_path: Path, full: bool) -> None:
    database = each_database
    prepare(database, ORDERS + (";ALTER TABLE shop.orders REPLICA IDENTITY FULL" if full else ""), "shop.orders")
    contracts = derived(config(database, "shop.orders"), tmp_path)
    database.execute("INSERT INTO shop.orders (id, customer, paid) VALUES (0, 'before the stream', false)")
    with Forward(database, messages=[FENCE], snapshot=[("shop", "orders")]) as forward:
        for statement in (
            ORDINARY,
            ODD,
            "UPDATE shop.orders SET status = 'paid' WHERE id = 1",
            "UPDATE shop.orders SET id = 2 WHERE id = 1",
            "DELETE FROM shop.orders WHERE id = 2",
            "TRUNCATE shop.orders",
        ):
            database.execute(statement)
        details = settled(forward)
        events = list(forward.sink.events)
    assert {"insert", "update", "delete", "truncate"} <= {it["op"] for it in details}
    assert judged(contracts, events) == []


def test_every_type_keeps_the_contract_derived_from_it(database: Database, tmp_path: Path) -> None:
    columns = [
        column for section in SECTIONS if not section.needs for column in by_kind(section.cases, database.version)
    ]
    for section in SECTIONS:
        if section.ddl and not section.needs:
            database.execute(section.ddl)
    definitions = ", ".join(f"c{number} {column[0].kind}" for number, column in enumerate(columns))
    database.execute(f"CREATE TABLE matrix (id int PRIMARY KEY, {definitions})")
    database.execute("CREATE PUBLICATION pub FOR TABLE matrix")
    database.create_slot()
    contracts = derived(config(database, "public.matrix"), tmp_path)
    with Forward(database, messages=[FENCE]) as forward:
        number = 0
        for index, column in enumerate(columns):
            for case in column:
                if not readable(case.says):
                    continue
                number += 1
                insert = f"INSERT INTO matrix (id, c{index}) VALUES ({number}, %s::{case.kind})"
                database.execute(insert, [case.literal])
        settled(forward)
        events = list(forward.sink.events)
    assert number > 100
    assert judged(contracts, events) == []


def test_sanitized_columns_are_in_the_contract_as_they_leave(database: Database, tmp_path: Path) -> None:
    database.execute("CREATE TABLE people (id int PRIMARY KEY, a text, b text, c text, d text, e text NOT NULL)")
    database.execute("CREATE PUBLICATION pub FOR TABLE people")
    database.create_slot()
    rules = {
        "table": "public.people", "exclude": ["a"], "mask": ["b"], "hash": ["c"], "truncate": {"d": 2},
        "replace": {"e": 7},
    }  # fmt: skip
    secret = {"key": "correct horse battery", "id": "k1"}
    contracts = derived(config(database, "public.people", select=[rules], hash=secret), tmp_path)
    hashing, select = HashSection.model_validate(secret), SelectSection.model_validate(rules)
    with Forward(database, messages=[FENCE], select=[select], hashing=hashing) as forward:
        database.execute("INSERT INTO people VALUES (1, 'x', 'x', 'x', 'xyz', 'x'), (2, NULL, NULL, NULL, NULL, '')")
        settled(forward)
        events = list(forward.sink.events)
    assert judged(contracts, events) == []
    with Forward(database, messages=[FENCE]) as forward:
        database.execute("INSERT INTO people VALUES (3, 'x', 'x', 'x', 'xyz', 'x')")
        settled(forward)
        told = judged(contracts, forward.sink.events)
    assert {it.partition(":")[0].rpartition("/")[2] for it in told} == {"b", "c", "d", "e"}


@pytest.mark.parametrize("known", [True, False])
def test_what_the_bridge_says_of_a_table_leaves_with_its_contract_or_without(
    database: Database, tmp_path: Path, known: bool
) -> None:
    """A consumer that never hears of backfill.finished keeps rows that are gone."""
    database.execute(ORDERS)
    database.execute("CREATE PUBLICATION pub FOR TABLE shop.orders")
    database.create_slot()
    made = contract.contracts(config(database, "shop.orders"))
    ours = ["schema.changed", *backfill.OPERATIONS]
    write(tmp_path, {kind: it for kind, it in made.items() if known or not kind[1].endswith(tuple(ours))})
    contracts, letters = Contracts.load(tmp_path), Letters()
    section = ContractsSection.model_validate({"path": tmp_path, "unknown": "quarantine"})
    with Forward(
        database, history=History(), dead_letters=letters, contracts=(section, contracts), messages=["others"]
    ) as forward:
        database.execute("INSERT INTO shop.orders (id, customer, paid) VALUES (1, 'Ada', true)")
        database.execute("ALTER TABLE shop.orders ADD added int; TRUNCATE shop.orders")
        with database.connect() as connection:
            about: Any = {"slot": database.slot, "schema": "shop", "table": "orders"}
            for state in ("started", "finished"):
                backfill.tell(connection, state, **about, run=1, since="0/16B3748", reason="the slot is gone")
        database.execute("SELECT pg_logical_emit_message(true, 'others', 'for which there is no contract')")
        until(lambda: letters.letters, missing="what has no contract")
        events = list(forward.sink.events)
    assert [it.detail_type for it in events] == [f"orders.{it}" for it in ("inserted", ours[0], "truncated", *ours[1:])]
    assert not known or judged(contracts, events) == []
    assert [json.loads(it.body)["detail"]["op"] for it in letters.letters] == ["message"]


def test_what_breaks_its_contract_does_not_reach_the_sink(each_database: Database, tmp_path: Path) -> None:
    database = each_database
    database.execute(ORDERS)
    database.execute("CREATE PUBLICATION pub FOR TABLE shop.orders")
    database.create_slot()
    schemas = contract.contracts(config(database, "shop.orders"))
    strict = schemas["legacy.db", "orders.inserted"]["properties"]["after"]["properties"]
    strict["status"] = {"enum": ["new", "paid", None]}
    write(tmp_path, schemas)
    section = ContractsSection.model_validate({"path": tmp_path})
    letters = Letters()
    with Forward(
        database, messages=[FENCE], dead_letters=letters, contracts=(section, Contracts.load(tmp_path))
    ) as forward:
        database.execute("INSERT INTO shop.orders (id, customer, paid, status) VALUES (1, 'Ada', true, 'new')")
        database.execute("INSERT INTO shop.orders (id, customer, paid, status) VALUES (2, 'Ada', true, 'lost')")
        database.execute("INSERT INTO shop.orders (id, customer, paid, status) VALUES (3, 'Ada', true, 'paid')")
        details = settled(forward)
        name = "legacy.db/orders.inserted.json"
        assert forward.metric("forward_contract_broken_total", contract=name) == 1
    assert [it["key"]["id"] for it in details] == [1, 3]
    (letter,) = letters.letters
    assert letter.reason == BROKEN
    assert "/detail/after/status" in letter.message
    assert "lost" not in letter.message
    assert json.loads(letter.body)["detail"]["key"] == {"id": 2}


# --- the commands


def command(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli.main, ["schema", *arguments])
    return done.exit_code, done.output


def test_schema_events_and_diff(database: Database, tmp_path: Path) -> None:
    database.execute(ORDERS)
    database.execute("CREATE PUBLICATION pub FOR TABLE shop.orders")
    path = tmp_path / "bridge.yaml"
    path.write_text(
        f"legacy: {{dsn: '{database.dsn}', publication: pub, tables: [shop.orders]}}\n"
        "forward: {sink: {type: stdout}}\n"
    )
    old = tmp_path / "contracts"

    status, output = command("events", "-c", str(path), "--into", str(old))
    assert status == 0, output
    names = sorted(it.name for it in old.rglob("*.json"))
    rows = ("deleted", "inserted", "read", "truncated", "updated")
    kinds = sorted([*rows, "schema.changed", "backfill.started", "backfill.finished"])
    assert names == [f"orders.{it}.json" for it in kinds]
    status, output = command("events", "-c", str(path))
    assert status == 0
    assert len(json.loads(output)) == 8
    assert command("diff", str(old), "-c", str(path)) == (0, "nobody is broken\n")

    database.execute("ALTER TABLE shop.orders ADD added int")
    assert command("diff", str(old), "-c", str(path))[0] == 1  # it is promised to be there: no producer had it
    assert "breaks producers" in command("diff", str(old), "-c", str(path))[1]
    database.execute("ALTER TABLE shop.orders DROP added; ALTER TABLE shop.orders DROP status")
    status, output = command("diff", str(old), "-c", str(path))
    assert status == 1
    assert "breaks consumers" in output
    assert "/detail/after/status: is gone" in output
    assert command("diff", str(old), str(old)) == (0, "nobody is broken\n")
    assert command("diff", str(old))[0] == 2
    status, output = command("diff", str(tmp_path / "nowhere"), str(tmp_path / "nor-there"))
    assert status == 2
    for which in ("OLD: ", "nowhere is no directory", "NEW: ", "nor-there is no directory"):
        assert which in output


def test_the_schema_of_an_event_is_published() -> None:
    status, output = command("event")
    assert status == 0
    jsonschema_rs.validator_for(json.loads(output))
