"""The loop guard before anything runs: rights, the origin that `init` makes, and what the set-up leaves out."""

import json
from typing import Any

import pytest
from psycopg import conninfo

from figbridge import canary, preflight, provision
from figbridge.config import Config
from figbridge.errors import ConfigError, LegacyUnavailable, SetupError
from figbridge.provision import statements
from fixtures.checked import Found, inspected, role
from fixtures.postgres import Database
from fixtures.reverse import make_shop

MAPPING = {
    "match": {"source": "shop.next", "detail-type": "order"},
    "into": "shop.orders",
    "action": "upsert",
    "key": {"id": "detail.id"},
    "set": {"status": "detail.status"},
}


def config(dsn: str, slot: str, guard: str, echo: str = "transaction") -> Config:
    tree: dict[str, Any] = {
        "legacy": {"dsn": dsn, "slot": slot, "publication": slot, "tables": ["shop.orders"], "loop-guard": guard},
        "forward": {"sink": {"type": "stdout"}, "echo": echo},
        "reverse": {"source": {"type": "local", "path": "/tmp/never-opened.sqlite"}, "mappings": [MAPPING]},
    }
    return Config.parse(json.dumps(tree), {})


def origin_of(database: Database) -> str:
    return canary.origin(database.slot)


def of_guard(found: Found) -> list[tuple[str, str]]:
    return [(it.level, it.what) for it in found if it.where == "legacy.loop-guard"]


@pytest.mark.parametrize(("guard", "function"), [
    ("message", "pg_logical_emit_message"), ("origin", "pg_replication_origin_session_setup"),
])  # fmt: skip
def test_a_right_that_is_missing_is_found_with_its_grant(each_database: Database, guard: str, function: str) -> None:
    make_shop(each_database)
    provision.initialise(config(each_database.dsn, each_database.slot, guard))
    signatures = f"SELECT oid::regprocedure::text FROM pg_proc WHERE proname = '{function}'"
    signatures += " AND pronamespace = 'pg_catalog'::regnamespace"
    for (signature,) in each_database.execute(signatures):
        each_database.execute(f"REVOKE EXECUTE ON FUNCTION {signature} FROM PUBLIC")
    with role(each_database) as (name, dsn):
        each_database.execute(f"GRANT USAGE ON SCHEMA figbridge, shop TO {name}")
        asked = config(dsn, each_database.slot, guard)
        found = inspected(asked, "run")
        remedies = [it.remedy for it in found if it.where == "legacy.loop-guard" and it.level == "error"]
        assert remedies
        for remedy in remedies:
            each_database.execute(remedy)
        assert [level for level, _ in of_guard(inspected(asked, "run"))].count("error") == 0


@pytest.mark.parametrize("guard", ["inbox", "message", "origin"])
def test_init_makes_what_the_guard_needs_and_teardown_removes_it(each_database: Database, guard: str) -> None:
    make_shop(each_database)
    asked = config(each_database.dsn, each_database.slot, guard)
    origin = canary.origin(each_database.slot)
    for _ in range(2):
        lines = provision.initialise(asked)
        assert any(origin in line for line in lines) == (guard == "origin")
    names = {name for (name,) in each_database.execute("SELECT pubname FROM pg_publication")}
    assert names == {each_database.slot} | ({f"{each_database.slot}_inbox"} if guard == "inbox" else set())
    assert [it for it in inspected(asked, "run") if it.level == "error" and "reverse.source" not in it.where] == []
    script = statements.script(asked)
    assert ("pg_replication_origin_create" in script) == (guard == "origin")
    assert ("_inbox" in script) == (guard == "inbox")
    lines = provision.teardown(asked, keep_schema=False)
    assert any(f"replication origin {origin}: dropped" in line for line in lines) == (guard == "origin")
    assert each_database.execute("SELECT roname FROM pg_replication_origin WHERE roname = %s", [origin]) == []


def test_an_origin_that_is_missing_is_found(database: Database) -> None:
    make_shop(database)
    provision.initialise(config(database.dsn, database.slot, "inbox"))
    found = of_guard(inspected(config(database.dsn, database.slot, "origin"), "run"))
    assert ("error", f"there is no replication origin {canary.origin(database.slot)}") in found


def test_the_script_makes_the_origin_and_may_be_run_twice(database: Database) -> None:
    make_shop(database)
    sql = statements.origin_sql(database.slot)
    for _ in range(2):
        database.execute(sql)
    assert len(database.execute("SELECT 1 FROM pg_replication_origin WHERE roname = %s", [origin_of(database)])) == 1
    database.execute("SELECT pg_replication_origin_drop(%s)", [origin_of(database)])


def test_init_by_a_role_that_may_not_make_an_origin_says_so_before_it_begins(each_database: Database) -> None:
    database, create = each_database, "pg_replication_origin_create(text)"
    make_shop(database)
    with role(database) as (name, dsn):
        database.execute(f"GRANT CREATE ON DATABASE {database.name} TO {name}; ALTER SCHEMA shop OWNER TO {name}")
        ours = (
            "SELECT oid::regclass::text FROM pg_tables JOIN pg_class ON relname = tablename WHERE schemaname = ANY (%s)"
        )
        for (table,) in database.execute(ours, [["shop", "figbridge"]]):
            database.execute(f"ALTER TABLE {table} OWNER TO {name}")
        database.execute(f"ALTER SCHEMA figbridge OWNER TO {name}")
        asked = config(dsn, database.slot, "origin")
        finding = inspected(asked, "init").only("error", "legacy.loop-guard")
        assert create in finding.what
        with pytest.raises(SetupError, match="pg_replication_origin_create"):
            provision.initialise(asked)
        database.execute("SELECT pg_replication_origin_create(%s)", [origin_of(database)])
        assert f"replication origin {origin_of(database)}: there already" in provision.initialise(asked)

        database.execute("SELECT pg_replication_origin_drop(%s)", [origin_of(database)])
        database.execute(finding.remedy)
        assert f"replication origin {origin_of(database)}: made" in provision.initialise(asked)
        (grant,) = [it for it in statements.script(asked).splitlines() if it.startswith("-- GRANT EXECUTE")]
        before = [it for it in inspected(asked, "run") if (it.level, it.where) == ("error", "legacy.loop-guard")]
        assert before
        database.execute(grant.removeprefix("-- "))
        assert ("error", "legacy.loop-guard") not in [(it.level, it.where) for it in inspected(asked, "run")]
        database.execute(f"REVOKE EXECUTE ON FUNCTION {create} FROM {name}")
        provision.teardown(config(database.dsn, database.slot, "origin"), keep_schema=False)


def test_a_bridge_that_only_reads_or_only_writes_needs_no_guard(database: Database) -> None:
    make_shop(database)
    tree = json.loads(config(database.dsn, database.slot, "origin").model_dump_json(by_alias=True, exclude_none=True))
    tree["legacy"]["dsn"] = database.dsn
    tree.pop("forward")
    alone = Config.parse(json.dumps(tree), {})
    provision.initialise(alone)
    assert [it for it in preflight.inspect(alone, "run") if it.where == "legacy.loop-guard"] == []
    assert (
        database.execute("SELECT 1 FROM pg_replication_origin WHERE roname = %s", [canary.origin(database.slot)]) == []
    )


def test_rows_of_an_origin_cannot_be_told_apart(database: Database) -> None:
    with pytest.raises(ConfigError, match="touched_rows"):
        config(database.dsn, database.slot, "origin", echo="touched_rows")


def test_a_reverse_dsn_that_is_away_is_a_finding_and_keeps_nothing_else(database: Database) -> None:
    make_shop(database)
    tree = json.loads(config(database.dsn, database.slot, "inbox").model_dump_json(by_alias=True, exclude_none=True))
    away = conninfo.make_conninfo(database.dsn, port="1")
    tree["legacy"] |= {"dsn": database.dsn, "reverse-dsn": away}
    asked = Config.parse(json.dumps(tree), {})
    provision.initialise(asked)
    finding = inspected(asked, "run").only("warning", "legacy.reverse-dsn")
    assert "does not answer" in finding.what
    assert preflight.require(asked, "run")
    found = Found(preflight.inspect(asked, "run", "forward"))
    assert found.errors == []
    assert [it for it in found if it.where == "legacy.reverse-dsn"] == []
    with pytest.raises(LegacyUnavailable):
        preflight.require_writing(asked)

    database.execute("DROP TABLE figbridge.slot_guard, figbridge.entity_version")
    for only in (None, "forward"):
        assert "slot_guard" in Found(preflight.inspect(asked, "run", only)).only("error", "schema figbridge").what
    tree["legacy"]["reverse-dsn"] = database.dsn
    with pytest.raises(SetupError, match="entity_version"):
        preflight.require_writing(Config.parse(json.dumps(tree), {}))
