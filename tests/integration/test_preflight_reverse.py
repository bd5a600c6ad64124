"""Each finding about the figbridge schema, the mappings, the sink and the queue, provoked for real."""

import contextlib
from pathlib import Path
from typing import Any

import psycopg
import pytest

from figbridge import preflight, provision
from figbridge.config import MappingSection
from figbridge.event import Received
from figbridge.preflight import Finding
from figbridge.preflight.reverse import rights
from figbridge.provision.statements import schema_sql
from figbridge.reverse.apply import Applier
from figbridge.reverse.mapping import Mapping
from figbridge.reverse.outcome import Outcome
from figbridge.reverse.statement import Statement
from fixtures.checked import Found, config_of, inspected, mapping, role
from fixtures.postgres import Database

DDL = """
    CREATE SCHEMA shop;
    CREATE TABLE shop.orders (
        id int PRIMARY KEY, status text, ref text, total numeric,
        doubled int GENERATED ALWAYS AS (id * 2) STORED, number int GENERATED ALWAYS AS IDENTITY);
    CREATE UNIQUE INDEX orders_ref ON shop.orders (ref);
    CREATE UNIQUE INDEX orders_partial ON shop.orders (total) WHERE total > 0;
    CREATE UNIQUE INDEX orders_expression ON shop.orders (lower(status));
    CREATE TABLE shop.strict (id serial PRIMARY KEY, name text NOT NULL, at timestamptz NOT NULL DEFAULT now());
    CREATE VIEW shop.overview AS SELECT id, status FROM shop.orders;
    CREATE MATERIALIZED VIEW shop.report AS SELECT 1 AS id;
"""

DELETE = mapping("shop.orders", "delete", ["id"])


@pytest.fixture
def shop(database: Database) -> Database:
    """Set up for both directions."""
    database.execute(DDL)
    provision.initialise(config_of(database.dsn, slot=database.slot, mappings=[DELETE]))
    return database


def mapped(database: Database, tree: dict[str, Any], **options: Any) -> Found:
    """What is found about one mapping."""
    return inspected(config_of(database.dsn, slot=database.slot, mappings=[tree], **options), "run")


# (into, action, key, set) → where, and what is said
WRONG: dict[str, tuple[tuple[Any, ...], str, str]] = {
    "no such table": (("shop.order", "delete", ["id"]), "", "there is no table shop.order "),
    "materialized view": (("shop.report", "delete", ["id"]), ".into", "is a materialized view"),
    "no such column": (("shop.orders", "update", ["id"], ["stauts"]), ".set.stauts", "has no column 'stauts'"),
    "no such key": (("shop.orders", "delete", ["idd"]), ".key.idd", "has no column 'idd'"),
    "generated": (("shop.orders", "insert", [], ["id", "doubled"]), ".set.doubled", "generates 'doubled' always"),
    "identity": (("shop.orders", "update", ["id"], ["number"]), ".set.number", "generates 'number' always"),
    "upsert without index": (("shop.orders", "upsert", ["status"], ["total"]), ".key", "on exactly (status)"),
    "upsert on more": (("shop.orders", "upsert", ["id", "ref"], ["total"]), ".key", "on exactly (id, ref)"),
    "upsert on partial": (("shop.orders", "upsert", ["total"], ["status"]), ".key", "on exactly (total)"),
    "our own source": (("shop.orders", "delete", ["id"]), ".match.source", "what our own events carry"),
    "the canary's source": (("shop.orders", "delete", ["id"]), ".match.source", "kept for figbridge itself"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mapping_that_cannot_work(shop: Database, case: str) -> None:
    columns, place, said = WRONG[case]
    source = {"our own source": f"legacy.{shop.name}", "the canary's source": "figbridge.canary"}
    tree = mapping(*columns, **({"source": source[case]} if case in source else {}))
    found = mapped(shop, tree)
    assert said in found.only("error", f"reverse.mappings.0{place}").what
    assert found.errors == [f"reverse.mappings.0{place}"]


@pytest.mark.pg(">= 18")
def test_a_key_without_overlaps_names_a_row_but_not_for_an_upsert(shop: Database) -> None:
    shop.execute("""
        CREATE TABLE shop.booked (id int4range, during tstzrange, status text,
                                  PRIMARY KEY (id, during WITHOUT OVERLAPS))
    """)
    found = mapped(shop, mapping("shop.booked", "upsert", ["id", "during"], ["status"]))
    assert "on exactly (id, during)" in found.only("error", "reverse.mappings.0.key").what
    assert mapped(shop, mapping("shop.booked", "update", ["id", "during"], ["status"])).only("ok", "reverse.mappings.0")


def test_an_upsert_does_not_see_rows_of_tables_that_inherit(shop: Database) -> None:
    shop.execute("CREATE TABLE shop.archived (PRIMARY KEY (id)) INHERITS (shop.orders)")
    found = mapped(shop, mapping("shop.orders", "upsert", ["id"], ["status"]))
    assert "shop.archived" in found.only("warning", "reverse.mappings.0.into").what
    assert mapped(shop, mapping("shop.orders", "update", ["id"], ["status"])).only("ok", "reverse.mappings.0")


def test_row_level_security_hides_rows_from_the_role(shop: Database) -> None:
    tree = mapping("shop.orders", "update", ["id"], ["status"])
    shop.execute("ALTER TABLE shop.orders ENABLE ROW LEVEL SECURITY")
    assert mapped(shop, tree).only("ok", "reverse.mappings.0"), "a superuser sees everything"
    with role(shop, "LOGIN") as (name, dsn):
        shop.execute(f"GRANT USAGE ON SCHEMA shop TO {name}; GRANT ALL ON shop.orders TO {name}")
        config = config_of(dsn, slot=shop.slot, mappings=[tree])
        found = inspected(config, "run").only("warning", "reverse.mappings.0.into")
        assert "row-level security of shop.orders" in found.what
        assert f'ALTER ROLE "{name}" BYPASSRLS' in found.remedy


def test_a_mapping_that_does_not_fit_stands_in_nobodys_way(shop: Database) -> None:
    wrong = mapping("shop.orders", "update", ["id"], ["stauts"])
    findings = preflight.require(config_of(shop.dsn, slot=shop.slot, mappings=[wrong]), "run")
    assert [it.where for it in findings if it.level == "error"] == ["reverse.mappings.0.set.stauts"]


REWRITTEN = """
    CREATE VIEW shop.sums AS SELECT status, sum(total) AS total FROM shop.orders GROUP BY status;
    CREATE VIEW shop.handled AS SELECT id, upper(status) AS status FROM shop.orders;
    CREATE FUNCTION shop.handle() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
    CREATE TRIGGER handle INSTEAD OF INSERT OR UPDATE ON shop.handled FOR EACH ROW EXECUTE FUNCTION shop.handle();
    CREATE TABLE shop.told (id int PRIMARY KEY, status text); CREATE TABLE shop.shut (LIKE shop.told INCLUDING ALL);
    CREATE RULE told AS ON INSERT TO shop.told DO ALSO NOTIFY told;
    CREATE RULE kept AS ON UPDATE TO shop.shut DO INSTEAD NOTHING;
    CREATE RULE stays AS ON DELETE TO shop.shut DO INSTEAD NOTHING;
"""
RULED = {"policy": "new_wins", "before": {"status": "detail.was"}}


@pytest.mark.parametrize(
    ("columns", "conflicts", "refused"),
    [
        (("shop.sums", "update", ["status"], ["total"]), None, ["update"]),
        (("shop.sums", "insert", [], ["total"]), None, ["insert into"]),
        (("shop.handled", "upsert", ["id"], ["status"]), None, ["upsert"]),
        (("shop.handled", "upsert", ["id"], []), None, ["upsert"]),
        (("shop.handled", "upsert", ["id"], ["status"]), RULED, []),
        (("shop.handled", "insert", [], ["id", "status"]), None, []),
        (("shop.handled", "update", ["id"], ["status"]), None, []),
        (("shop.handled", "delete", ["id"]), None, []),  # of a view that needs no trigger for it
        (("shop.told", "upsert", ["id"], ["status"]), None, ["upsert"]),
        (("shop.told", "insert", [], ["id", "status"]), None, []),
        (("shop.shut", "update", ["id"], ["status"]), None, ["update"]),
        (("shop.shut", "update", ["id"], ["status"]), RULED, ["update"]),
        (("shop.shut", "delete", ["id"]), None, ["delete from"]),
        (("shop.overview", "upsert", ["id"], ["status"]), None, []),
        (("shop.overview", "upsert", ["status"], ["id"]), None, ["upsert"]),
    ],
)
def test_a_view_or_a_rule_that_the_server_cannot_write_through(
    shop: Database, columns: tuple[Any, ...], conflicts: Any, refused: list[str]
) -> None:
    shop.execute(REWRITTEN)
    tree = mapping(*columns) | ({"conflicts": conflicts} if conflicts else {})
    found = mapped(shop, tree)
    errors = [it.what for it in found if it.level == "error"]
    assert [what.partition(f" {columns[0]}: ")[0] for what in errors] == [
        f"the server refuses to {it}" for it in refused
    ]
    row = {"id": 1, "status": "new", "total": 5, "was": "new"}
    received = Received("1", "shop.next", "x", {"id": "1", "source": "shop.next", "detail-type": "x", "detail": row})
    shop.execute("INSERT INTO shop.orders (id, status) VALUES (1, 'new'); INSERT INTO shop.shut VALUES (1, 'old')")
    work = Mapping(MappingSection.model_validate(tree)).prepare(received)
    with contextlib.closing(Applier(shop.dsn, statement_timeout=10, lock_timeout=1)) as applier:
        applied = applier.apply_all([work])[work]
    codes = {"0A000", "42P10", "55000"}
    assert (applied.reason in codes) == bool(refused), applied


def test_a_view_of_a_table_that_somebody_has_locked_is_not_waited_for(shop: Database) -> None:
    with shop.connect() as other, other.transaction():
        other.execute("LOCK TABLE shop.orders")
        assert mapped(shop, mapping("shop.overview", "update", ["id"], ["status"])).only("ok", "reverse.mappings.0")


def test_what_is_misspelt_is_guessed(shop: Database) -> None:
    found = mapped(shop, mapping("shop.orders", "update", ["id"], ["stauts"]))
    assert found.only("error", "reverse.mappings.0.set.stauts").remedy == "did you mean 'status'?"
    found = mapped(shop, mapping("shop.orderz", "delete", ["id"]))
    assert found.only("error", "reverse.mappings.0").remedy == "did you mean shop.orders?"
    found = mapped(shop, mapping("shop.orders", "upsert", ["status"], ["total"]))
    assert "use the columns of one (id; ref)" in found.only("error", "reverse.mappings.0.key").remedy


def test_all_problems_of_all_mappings(shop: Database) -> None:
    mappings = [
        mapping("shop.orders", "update", ["nix"], ["nax"]),
        mapping("shop.none", "delete", ["id"], **{"detail-type": "y"}),
    ]
    found = inspected(config_of(shop.dsn, slot=shop.slot, mappings=mappings), "run")
    assert found.errors == ["reverse.mappings.0.key.nix", "reverse.mappings.0.set.nax", "reverse.mappings.1"]


def test_the_source_that_a_template_makes_of_each_table(shop: Database) -> None:
    tree = mapping("shop.orders", "delete", ["id"], source=["shop.next", "shop.orders.out"])
    forward = {"sink": {"type": "stdout"}, "source": "{schema}.{table}.out"}
    assert mapped(shop, tree, forward=forward).errors == ["reverse.mappings.0.match.source"]
    assert mapped(shop, tree, forward={**forward, "source": "{schema}.{table}"}).errors == []


CATCHES = {
    "not unique": (("shop.orders", "update", ["status"], ["total"]), ".key", "one event may update several rows"),
    "not null": (("shop.strict", "insert", [], ["id"]), "", "wants a value for name "),
}


@pytest.mark.parametrize("case", CATCHES)
def test_a_mapping_with_a_catch(shop: Database, case: str) -> None:
    columns, place, said = CATCHES[case]
    found = mapped(shop, mapping(*columns))
    assert said in found.only("warning", f"reverse.mappings.0{place}").what
    assert found.errors == []


FINE = [
    ("shop.orders", "insert", [], ["id", "status", "number"]),  # OVERRIDING SYSTEM VALUE
    ("shop.orders", "update", ["ref"], ["status"]),
    ("shop.orders", "upsert", ["ref"], ["status", "id"]),
    ("shop.orders", "upsert", ["id"], []),
    ("shop.orders", "delete", ["id"], []),
    ("shop.strict", "insert", [], ["name"]),
    ("shop.overview", "update", ["id"], ["status"]),
]


@pytest.mark.parametrize("columns", FINE, ids=lambda it: "-".join(map(str, it[:2])))
def test_what_is_said_to_fit_does(shop: Database, columns: tuple[Any, ...]) -> None:
    """The rights that are asked for are enough, and each is needed: without any one of them the server refuses."""
    tree = mapping(*columns)
    assert mapped(shop, tree).only("ok", "reverse.mappings.0")
    section = MappingSection.model_validate(tree)
    row = {"id": 1, "status": "a", "ref": "r", "number": 7, "name": "n"}
    (statement,) = Mapping(section).statements(Received("e", "s", "t", {"detail": row}))
    assert isinstance(statement, Statement)
    with role(shop) as (name, dsn):
        config = config_of(dsn, slot=shop.slot, mappings=[tree])

        def lacking() -> list[Finding]:
            return [it for it in inspected(config, "run") if (it.level, it.where) == ("error", "reverse.mappings.0")]

        def execute() -> None:
            with psycopg.connect(dsn) as connection:
                psycopg.RawCursor(connection).execute(statement.query, statement.parameters)
                connection.rollback()

        for finding in lacking():
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                execute()
            shop.execute(finding.remedy)
        execute()
        for right in rights(section):
            shop.execute(f"REVOKE {right} ON {section.into} FROM {name}")
            (finding,) = lacking()
            assert finding.what == f"role {name} lacks {right} for {section.into}"
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                execute()
            shop.execute(finding.remedy)
        execute()


NEW_WINS: dict[str, Any] = {"policy": "new_wins"}
# (columns of the mapping, conflicts) → where below the mapping, and what is said
UNRULED: dict[str, tuple[tuple[Any, ...], dict[str, Any], str, str]] = {
    "no such column": (
        ("shop.orders", "update", ["id"], ["total"]), NEW_WINS | {"before": {"totl": "detail.t"}}, "", "no column totl",
    ),
    "no such version": (
        ("shop.orders", "update", ["id"], ["total"]), NEW_WINS | {"version": {"column": "v", "seen": "a"}}, "",
        "no column v",
    ),
    "several rows": (("shop.orders", "update", ["status"], ["total"]), NEW_WINS, "", "no one row to compare with"),
    "insert without key": (("shop.orders", "insert", [], ["status"]), NEW_WINS, "", "cannot be named"),
    "delta of a text": (
        ("shop.orders", "update", ["id"], ["status"]), {"policy": "delta", "before": {"status": "detail.s"}}, ".status",
        "operator does not exist",
    ),
    "not SQL": (
        ("shop.orders", "update", ["id"], ["total"]),
        NEW_WINS | {"groups": [{"columns": "total", "sql": "greatest(currant.total, new.total)"}]}, ".total",
        "missing FROM-clause entry",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNRULED)
def test_rules_for_conflicts_that_cannot_work(shop: Database, case: str) -> None:
    columns, conflicts, place, said = UNRULED[case]
    shop.execute(schema_sql())
    found = mapped(shop, mapping(*columns) | {"conflicts": conflicts})
    assert said in found.only("error", f"reverse.mappings.0.conflicts{place}").what


@pytest.mark.parametrize(
    ("columns", "conflicts"),
    [
        (("shop.orders", "update", ["id"], ["total"]), {"policy": "legacy_wins", "before": {"status": "detail.s"}}),
        (("shop.orders", "update", ["id"], ["total"]), {"policy": "new_wins"}),
        (("shop.orders", "upsert", ["id"], ["total"]), {"policy": "delta", "before": {"total": "detail.s"}}),
        (("shop.orders", "insert", [], ["id", "total"]), {"policy": "new_wins"}),
        (("shop.orders", "delete", ["id"]), {"policy": "new_wins"}),
    ],
    ids=lambda it: "-".join(map(str, it[:2])) if isinstance(it, tuple) else "",
)
def test_the_rights_that_rules_need_are_enough(shop: Database, columns: Any, conflicts: Any) -> None:
    """Where the row is there, and where it is not."""
    shop.execute(schema_sql())
    tree = mapping(*columns) | {"conflicts": conflicts}
    shop.execute("INSERT INTO shop.orders (id, total) VALUES (1, 1)")
    compiled = Mapping(MappingSection.model_validate(tree))
    with role(shop) as (name, dsn):
        shop.execute(
            f"GRANT USAGE ON SCHEMA figbridge TO {name}; GRANT ALL ON ALL TABLES IN SCHEMA figbridge TO {name}"
        )
        config = config_of(dsn, slot=shop.slot, mappings=[tree])
        for finding in inspected(config, "run"):
            if finding.level == "error" and finding.where == "reverse.mappings.0":
                shop.execute(finding.remedy)
        assert inspected(config, "run").errors == []
        with contextlib.closing(Applier(dsn, statement_timeout=5, lock_timeout=5)) as applier:
            for row in (1, 2):
                detail = {"id": row, "total": 3, "s": 2}
                event = Received(f"e{row}", "s", "t", {"detail": detail})
                applied = applier.apply(event, compiled)
                assert applied.outcome is not Outcome.DEAD_LETTER, applied


def test_an_upsert_reads_what_it_sets(shop: Database) -> None:
    """EXCLUDED.status counts as reading status; a right on the key alone is not enough, and the server agrees."""
    tree = mapping("shop.orders", "upsert", ["id"], ["status"])
    (statement,) = Mapping(MappingSection.model_validate(tree)).statements(
        Received("e", "s", "t", {"detail": {"id": 1, "status": "a"}})
    )
    assert isinstance(statement, Statement)
    with role(shop) as (name, dsn):
        shop.execute(
            f"GRANT USAGE ON SCHEMA shop TO {name}; GRANT SELECT (id), INSERT, UPDATE ON shop.orders TO {name}"
        )
        config = config_of(dsn, slot=shop.slot, mappings=[tree])
        finding = inspected(config, "run").only("error", "reverse.mappings.0")
        assert finding.what == f"role {name} lacks SELECT for shop.orders"
        with psycopg.connect(dsn, autocommit=True) as connection:
            cursor = psycopg.RawCursor(connection)
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                cursor.execute(statement.query, statement.parameters)
            shop.execute(f"GRANT SELECT (status) ON shop.orders TO {name}")
            cursor.execute(statement.query, statement.parameters)
        assert inspected(config, "run").only("ok", "reverse.mappings.0")


def test_a_sequence_that_the_role_may_not_use(shop: Database) -> None:
    with role(shop) as (name, dsn):
        shop.execute(f"GRANT USAGE ON SCHEMA shop TO {name}; GRANT INSERT ON shop.strict TO {name}")
        found = inspected(
            config_of(dsn, slot=shop.slot, mappings=[mapping("shop.strict", "insert", [], ["name"])]), "run"
        )
        finding = found.only("error", "reverse.mappings.0")
        assert finding.what == f"role {name} may not use the sequence of shop.strict.id"
        assert finding.remedy == f'GRANT USAGE ON SEQUENCE shop.strict_id_seq TO "{name}";'


# --- our schema


def test_rights_on_our_own_tables(shop: Database) -> None:
    with role(shop) as (name, dsn):
        shop.execute(
            f"GRANT USAGE ON SCHEMA shop, figbridge TO {name}; GRANT SELECT, DELETE ON shop.orders TO {name}; "
            f"GRANT ALL ON ALL TABLES IN SCHEMA figbridge TO {name}; REVOKE UPDATE ON figbridge.canary FROM {name}"
        )
        config = config_of(dsn, slot=shop.slot, mappings=[DELETE])
        finding = inspected(config, "run").only("error", "schema figbridge")
        assert finding.what == f"role {name} lacks UPDATE on figbridge.canary"
        shop.execute(finding.remedy)
        assert inspected(config, "run").errors == []


def test_a_schema_of_that_name_that_is_not_ours(database: Database) -> None:
    database.execute(DDL + "CREATE SCHEMA figbridge; CREATE TABLE figbridge.inbox (id int, source text)")
    config = config_of(database.dsn, slot=database.slot, mappings=[DELETE])
    found = inspected(config)
    strange = [it.what for it in found if it.where == "schema figbridge" and it.level == "error"]
    assert strange == [
        (
            "figbridge.inbox has no column applied_at, event_id, idempotency_key, payload_hash: "
            "it is not figbridge's, or of another version of it"
        )
    ]


def test_an_inbox_that_would_take_a_key_twice(shop: Database) -> None:
    shop.execute("ALTER TABLE figbridge.inbox DROP CONSTRAINT inbox_pkey")
    config = config_of(shop.dsn, slot=shop.slot, mappings=[DELETE])
    finding = inspected(config, "run").only("error", "schema figbridge")
    assert "repeated events would be applied twice" in finding.what
    shop.execute(finding.remedy)
    assert inspected(config, "run").errors == []


# --- the ends


def test_ends_that_answer_refuse_and_are_silent(shop: Database, tmp_path: Path, aws_endpoint: str) -> None:
    tree = mapping("shop.orders", "delete", ["id"])
    here = {"type": "eventbridge", "bus": "nowhere", "region": "eu-west-1", "endpoint_url": aws_endpoint}
    gone = {"type": "sqs", "queue_url": f"{aws_endpoint}/1/none", "endpoint_url": aws_endpoint, "region": "eu-west-1"}
    refused = mapped(shop, tree, forward={"sink": here}, source=gone)
    assert refused.errors == ["forward.sink", "reverse.source"]
    assert "nowhere" in refused.only("error", "forward.sink").what

    silent = {"endpoint_url": "http://127.0.0.1:9"}
    found = mapped(shop, tree, forward={"sink": {**here, **silent}}, source={**gone, **silent})
    assert found.errors == []  # it may answer in a minute; the bridge tries again
    assert found.only("warning", "forward.sink").what.startswith("did not answer now")
    assert found.only("warning", "reverse.source").what.startswith("did not answer now")

    bus = {"type": "local", "path": str(tmp_path / "bus.sqlite")}
    found = mapped(shop, tree, forward={"sink": bus}, source=bus)
    assert found.only("ok", "forward.sink")
    assert found.only("ok", "reverse.source")


def test_a_file_that_cannot_be_written(shop: Database, tmp_path: Path) -> None:
    found = mapped(
        shop, mapping("shop.orders", "delete", ["id"]), forward={"sink": {"type": "file", "path": str(tmp_path)}}
    )
    assert found.errors == ["forward.sink"]


def test_ends_are_not_asked_before_init(shop: Database) -> None:
    found = inspected(config_of(shop.dsn, slot=shop.slot, mappings=[DELETE]), "init")
    assert not [it for it in found if it.where in {"forward.sink", "reverse.source"}]
