"""Each finding about tables, publications and slots, provoked on a real server. A test here names what must be said.

What init does about a finding is in test_provision.py, what concerns the server in test_preflight_server.py.
"""

import contextlib

import psycopg
import pytest

from figbridge import preflight, provision
from figbridge.errors import SetupError
from figbridge.preflight import Finding, tables
from fixtures.checked import config_of, inspected, mapping, role, walsender
from fixtures.postgres import Database, _fresh

SHOP = "CREATE SCHEMA shop; CREATE TABLE shop.orders (id int PRIMARY KEY, status text);"
ECHO = [mapping("shop.orders", "update", ["id"], ["status"])]


@pytest.fixture
def shop(database: Database) -> Database:
    database.execute(SHOP)
    return database


# --- tables: the DDL, the configured table, what is said about it

ERRORS = {
    "no key": ("CREATE TABLE shop.t (id int)", "has no primary key"),
    "deferrable key": ("CREATE TABLE shop.t (id int PRIMARY KEY DEFERRABLE)", "DEFERRABLE one does not count"),
    "identity nothing": (
        "CREATE TABLE shop.t (id int PRIMARY KEY); ALTER TABLE shop.t REPLICA IDENTITY NOTHING",
        "has REPLICA IDENTITY NOTHING",
    ),
    "index gone": (
        (
            "CREATE TABLE shop.t (id int NOT NULL); CREATE UNIQUE INDEX t_id ON shop.t (id); "
            "ALTER TABLE shop.t REPLICA IDENTITY USING INDEX t_id; DROP INDEX shop.t_id"
        ),
        "an index as its replica identity that is gone",
    ),
    "view": ("CREATE VIEW shop.t AS SELECT 1 AS id", "is a view"),
    "materialized view": ("CREATE MATERIALIZED VIEW shop.t AS SELECT 1 AS id", "is a materialized view"),
    "sequence": ("CREATE SEQUENCE shop.t", "is a sequence"),
    "foreign": (
        (
            "CREATE FOREIGN DATA WRAPPER none; CREATE SERVER far FOREIGN DATA WRAPPER none; "
            "CREATE FOREIGN TABLE shop.t (id int) SERVER far"
        ),
        "is a foreign table",
    ),
    "unlogged": ("CREATE UNLOGGED TABLE shop.t (id int PRIMARY KEY)", "is unlogged"),
    "partition without identity": (
        (
            "CREATE TABLE shop.t (id int) PARTITION BY RANGE (id); "
            "CREATE TABLE shop.t_1 PARTITION OF shop.t FOR VALUES FROM (0) TO (9)"
        ),
        "its partition shop.t_1 has no primary key",
    ),
    "identity of the parent is not that of its partitions": (
        (
            "CREATE TABLE shop.t (id int) PARTITION BY RANGE (id); "
            "CREATE TABLE shop.t_1 PARTITION OF shop.t FOR VALUES FROM (0) TO (9); "
            "ALTER TABLE shop.t REPLICA IDENTITY FULL"
        ),
        "its partition shop.t_1 has no primary key",
    ),
    "no partition yet": ("CREATE TABLE shop.t (id int) PARTITION BY RANGE (id)", "has no primary key"),
    "foreign partition": (
        (
            "CREATE FOREIGN DATA WRAPPER none; CREATE SERVER far FOREIGN DATA WRAPPER none; "
            "CREATE TABLE shop.t (id int) PARTITION BY RANGE (id); "
            "CREATE FOREIGN TABLE shop.t_1 PARTITION OF shop.t FOR VALUES FROM (0) TO (9) SERVER far"
        ),
        "its partition shop.t_1 is a foreign table",
    ),
    "unlogged partition": (
        (
            "CREATE TABLE shop.t (id int PRIMARY KEY) PARTITION BY RANGE (id); "
            "CREATE UNLOGGED TABLE shop.t_1 PARTITION OF shop.t FOR VALUES FROM (0) TO (9)"
        ),
        "its partition shop.t_1 is unlogged",
    ),
}

WARNINGS = {
    "full": (
        "CREATE TABLE shop.t (id int); ALTER TABLE shop.t REPLICA IDENTITY FULL",
        "each UPDATE and DELETE writes the whole old row",
    ),
    "generated": (
        'CREATE TABLE shop.t (id int PRIMARY KEY, "The Sum" int GENERATED ALWAYS AS (1) STORED)',
        'generated columns are not published: "The Sum"',
    ),
    "inherited": (
        "CREATE TABLE shop.t (id int PRIMARY KEY); CREATE TABLE shop.t_old () INHERITS (shop.t)",
        "shop.t_old inherits from it",
    ),
    "a partition itself": (
        (
            "CREATE TABLE shop.all (id int PRIMARY KEY) PARTITION BY RANGE (id); "
            "CREATE TABLE shop.t PARTITION OF shop.all FOR VALUES FROM (0) TO (9)"
        ),
        "is a partition: events carry its own name",
    ),
    "later partitions": (
        (
            "CREATE TABLE shop.t (id int) PARTITION BY RANGE (id); "
            "CREATE TABLE shop.t_1 PARTITION OF shop.t (PRIMARY KEY (id)) FOR VALUES FROM (0) TO (9)"
        ),
        "a partition made later would have no replica identity",
    ),
}

FINE = {
    "key": "CREATE TABLE shop.t (id int PRIMARY KEY)",
    "index": "CREATE TABLE shop.t (id int NOT NULL); CREATE UNIQUE INDEX t_id ON shop.t (id); "
    "ALTER TABLE shop.t REPLICA IDENTITY USING INDEX t_id",
    "partitioned": "CREATE TABLE shop.t (id int PRIMARY KEY) PARTITION BY RANGE (id); "
    "CREATE TABLE shop.t_1 PARTITION OF shop.t FOR VALUES FROM (0) TO (9)",
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_table_that_cannot_be_published(shop: Database, case: str) -> None:
    ddl, said = ERRORS[case]
    shop.execute(ddl)
    found = inspected(config_of(shop.dsn, "shop.t", "shop.orders"))
    assert said in found.only("error", "table shop.t").what
    assert found.errors == ["table shop.t"]
    assert found.only("ok", "table shop.orders")


@pytest.mark.parametrize("case", WARNINGS)
def test_a_table_with_a_catch(shop: Database, case: str) -> None:
    ddl, said = WARNINGS[case]
    shop.execute(ddl)
    config = config_of(shop.dsn, "shop.t", slot=shop.slot)
    found = inspected(config)
    assert said in found.only("warning", "table shop.t").what
    assert found.errors == []
    provision.initialise(config)  # a warning stops nothing, and the server agrees


@pytest.mark.parametrize("case", FINE)
def test_a_table_as_it_should_be(each_database: Database, case: str) -> None:
    each_database.execute(SHOP + FINE[case])
    found = inspected(config_of(each_database.dsn, "shop.t"))
    caught = each_database.version < 15 and case == "partitioned"  # ATTACH PARTITION is not noticed there
    assert [it.level for it in found if it.where == "table shop.t"] == ["warning", "ok"][not caught :]


def test_a_generated_column_in_the_identity_breaks_updates_since_18(each_database: Database) -> None:
    each_database.execute(
        SHOP + "CREATE TABLE shop.t (id int, twice int GENERATED ALWAYS AS (id * 2) STORED); "
        "ALTER TABLE shop.t REPLICA IDENTITY FULL"
    )
    config = config_of(each_database.dsn, "shop.t", slot=each_database.slot)
    found = inspected(config)
    if each_database.version >= 18:
        assert "contains a generated column" in found.only("error", "table shop.t").what
    else:
        provision.initialise(config)
        each_database.execute("INSERT INTO shop.t VALUES (1); UPDATE shop.t SET id = 2; DELETE FROM shop.t")


@pytest.mark.pg(">= 18")
@pytest.mark.parametrize(
    ("columns", "broken"), [("(twice)", True), ("(id, twice)", True), ("(id)", False), ("(id) INCLUDE (twice)", False)]
)
def test_a_generated_column_in_an_identity_index(database: Database, columns: str, *, broken: bool) -> None:
    database.execute(
        f"{SHOP} CREATE TABLE shop.t (id int NOT NULL, twice int NOT NULL GENERATED ALWAYS AS (id * 2) STORED); "
        f"CREATE UNIQUE INDEX t_u ON shop.t {columns}; ALTER TABLE shop.t REPLICA IDENTITY USING INDEX t_u"
    )
    config = config_of(database.dsn, "shop.t", slot=database.slot)
    assert inspected(config).errors == (["table shop.t"] if broken else [])
    database.execute("CREATE PUBLICATION figbridge FOR TABLE shop.t; INSERT INTO shop.t VALUES (1)")
    with pytest.raises(psycopg.errors.InvalidColumnReference) if broken else contextlib.nullcontext():
        database.execute("UPDATE shop.t SET id = 2")  # the server has the last word


def test_a_misspelt_table_and_a_hopeless_one(shop: Database) -> None:
    found = inspected(config_of(shop.dsn, "shop.ordres", "shop.zebra"))
    assert found.only("error", "table shop.ordres").remedy == "did you mean shop.orders?"
    assert "did you mean" not in found.only("error", "table shop.zebra").remedy
    assert found.only("error", "table shop.zebra").what == f"there is no table shop.zebra in database {shop.name}"


def test_our_own_tables_and_the_systems_are_never_published(shop: Database) -> None:
    with shop.connect() as connection:
        connection.execute("CREATE SCHEMA figbridge; CREATE TABLE figbridge.inbox (id int PRIMARY KEY)")
        found = list(tables.probe(connection, [("figbridge", "inbox"), ("pg_catalog", "pg_class")]))
    assert [it.level for it in found] == ["error", "error"]
    assert "would be a loop" in found[0].what
    assert "system table" in found[1].what


def test_a_partition_beside_its_table(shop: Database) -> None:
    shop.execute(
        "CREATE TABLE shop.t (id int PRIMARY KEY) PARTITION BY RANGE (id); "
        "CREATE TABLE shop.t_1 PARTITION OF shop.t FOR VALUES FROM (0) TO (9)"
    )
    found = inspected(config_of(shop.dsn, "shop.t", "shop.t_1"))
    assert "its rows leave under that name" in found.only("warning", "table shop.t_1").what


def test_odd_names_are_found_and_quoted(shop: Database) -> None:
    shop.execute('CREATE SCHEMA "My ""Shop"; CREATE TABLE "My ""Shop"."Order%s" (id int)')
    found = inspected(config_of(shop.dsn, '"My ""Shop"."Order%s"'))
    finding = found.only("error", 'table "My ""Shop"."Order%s"')
    assert 'ALTER TABLE "My ""Shop"."Order%s" REPLICA IDENTITY FULL;' in finding.remedy
    shop.execute(finding.remedy[finding.remedy.rindex("ALTER TABLE") :])  # the remedy is SQL that works
    assert inspected(config_of(shop.dsn, '"My ""Shop"."Order%s"')).errors == []


def test_a_role_that_may_not_read(shop: Database) -> None:
    provision.initialise(config_of(shop.dsn, slot=shop.slot))
    with role(shop) as (name, dsn):
        config = config_of(dsn, slot=shop.slot)
        finding = inspected(config, "run").only("warning", "table shop.orders")
        assert f"role {name} may not SELECT" in finding.what
        shop.execute(finding.remedy)
        assert inspected(config, "run").only("ok", "table shop.orders")


def test_a_role_that_may_not_read_the_partitions(shop: Database) -> None:
    """Without a key they are read one by one."""
    shop.execute(
        "CREATE TABLE shop.t (id int) PARTITION BY RANGE (id); ALTER TABLE shop.t REPLICA IDENTITY FULL; "
        "CREATE SCHEMA parts; CREATE TABLE parts.t_1 PARTITION OF shop.t FOR VALUES FROM (0) TO (9); "
        "ALTER TABLE parts.t_1 REPLICA IDENTITY FULL"
    )
    provision.initialise(config_of(shop.dsn, "shop.t", slot=shop.slot))
    with role(shop) as (name, dsn):
        shop.execute(f"GRANT USAGE ON SCHEMA shop TO {name}; GRANT SELECT ON shop.t TO {name}")

        def said() -> list[Finding]:
            return [
                it
                for it in inspected(config_of(dsn, "shop.t", slot=shop.slot), "run")
                if "partition parts.t_1" in it.what
            ]

        rights = [it for it in said() if "may not SELECT" in it.what]
        assert [(it.level, it.where) for it in rights] == [("warning", "table shop.t")]
        shop.execute(rights[0].remedy)
        assert not [it for it in said() if "may not SELECT" in it.what]
        shop.execute("ALTER TABLE parts.t_1 ENABLE ROW LEVEL SECURITY")
        assert [it.level for it in said() if "row-level security" in it.what] == ["warning"]
        shop.execute(f"REVOKE SELECT ON parts.t_1 FROM {name}")
        shop.execute("TRUNCATE shop.t; ALTER TABLE shop.t ADD PRIMARY KEY (id)")
        assert not [it for it in said() if "may not SELECT" in it.what], (
            "the rows are read by the key of the table above"
        )


def test_a_role_from_which_rows_are_hidden(each_database: Database) -> None:
    each_database.execute(f"{SHOP} ALTER TABLE shop.orders ENABLE ROW LEVEL SECURITY")
    provision.initialise(config_of(each_database.dsn, slot=each_database.slot))
    assert inspected(config_of(each_database.dsn, slot=each_database.slot), "run").only("ok", "table shop.orders")
    with role(each_database) as (name, dsn):
        each_database.execute(f"GRANT USAGE ON SCHEMA shop TO {name}; GRANT SELECT ON shop.orders TO {name}")
        config = config_of(dsn, slot=each_database.slot)
        finding = inspected(config, "run").only("warning", "table shop.orders")
        assert f"row-level security is in force for role {name}" in finding.what
        each_database.execute(finding.remedy)
        assert not [it for it in inspected(config, "run") if it.level == "warning" and it.where == "table shop.orders"]


def test_several_problems_are_all_reported(shop: Database) -> None:
    shop.execute("CREATE TABLE shop.heap (id int)")
    with pytest.raises(SetupError) as refused:
        preflight.require(config_of(shop.dsn, "shop.heap", "shop.none", mappings=ECHO), "run")
    assert [it.where for it in refused.value.problems] == [
        "table shop.heap",
        "table shop.none",
        "publication figbridge",
        "publication figbridge_inbox",
        "slot figbridge",
        "schema figbridge",
    ]
    assert all(problem.remedy for problem in refused.value.problems)


def test_after_init_nothing_is_wrong(each_database: Database) -> None:
    each_database.execute(SHOP)
    config = config_of(each_database.dsn, slot=each_database.slot, mappings=ECHO)
    before = each_database.execute("SELECT count(*) FROM pg_class")
    assert inspected(config, "init").errors == []
    assert each_database.execute("SELECT count(*) FROM pg_class") == before  # it only reads
    provision.initialise(config)
    found = inspected(config, "run")
    assert found.errors == []
    assert [it.where for it in found] == [it.where for it in preflight.require(config, "run")]
    for place in ("publication figbridge", "publication figbridge_inbox", "reverse.mappings.0", "forward.sink"):
        assert found.only("ok", place)
    assert "logical, pgoutput" in found.only("ok", f"slot {each_database.slot}").what


# --- publications


def test_a_table_that_init_has_not_seen_yet(shop: Database) -> None:
    provision.initialise(config_of(shop.dsn, slot=shop.slot))
    shop.execute("CREATE TABLE shop.more (id int PRIMARY KEY)")
    config = config_of(shop.dsn, "shop.orders", "shop.more", slot=shop.slot)
    finding = inspected(config, "run").only("error", "publication figbridge")
    assert finding.what.startswith("does not publish shop.more")
    assert inspected(config, "init").errors == []  # init is the remedy


def test_a_table_too_many_is_only_a_warning(shop: Database) -> None:
    shop.execute("CREATE TABLE shop.more (id int PRIMARY KEY)")
    provision.initialise(config_of(shop.dsn, "shop.orders", "shop.more", slot=shop.slot))
    found = inspected(config_of(shop.dsn, slot=shop.slot), "run")
    assert "also publishes shop.more" in found.only("warning", "publication figbridge").what
    assert found.errors == []


@pytest.mark.parametrize("stage", ["init", "run"])
def test_a_publication_of_all_tables_is_refused(shop: Database, stage: preflight.Stage) -> None:
    shop.execute("CREATE PUBLICATION figbridge FOR ALL TABLES")
    shop.create_slot()
    found = inspected(config_of(shop.dsn, slot=shop.slot), stage)
    assert "is FOR ALL TABLES" in found.only("error", "publication figbridge").what


def test_a_publication_of_a_schema_is_refused(shop: Database) -> None:
    shop.execute("CREATE PUBLICATION figbridge FOR TABLES IN SCHEMA shop")
    found = inspected(config_of(shop.dsn))
    assert "is FOR TABLES IN SCHEMA" in found.only("error", "publication figbridge").what


def test_a_publication_that_leaves_operations_out(each_database: Database) -> None:
    each_database.execute(SHOP)
    config = config_of(each_database.dsn, slot=each_database.slot, mappings=ECHO)
    provision.initialise(config)
    each_database.execute("ALTER PUBLICATION figbridge SET (publish = 'insert, truncate')")
    each_database.execute("ALTER PUBLICATION figbridge_inbox SET (publish = 'insert, delete')")
    found = inspected(config, "run")
    finding = found.only("error", "publication figbridge")
    assert finding.what == "publishes insert, truncate, not insert, update, delete, truncate"
    inbox = found.only("error", "publication figbridge_inbox")
    assert inbox.what == "publishes insert, delete, not insert"
    each_database.execute(finding.remedy)
    each_database.execute(inbox.remedy)
    assert inspected(config, "run").errors == []


def test_a_publication_that_leaves_rows_or_columns_out(shop: Database) -> None:
    shop.execute("CREATE TABLE shop.t (id int PRIMARY KEY, secret text)")
    shop.execute("CREATE PUBLICATION figbridge FOR TABLE shop.orders WHERE (id > 5), shop.t (id)")
    found = inspected(config_of(shop.dsn, "shop.orders", "shop.t"))
    narrowed = [it.what for it in found if it.where == "publication figbridge" and it.level == "warning"]
    assert len(narrowed) == 2
    assert all("row filter or a column list" in what for what in narrowed)


def test_a_publication_that_names_partitions(each_database: Database) -> None:
    each_database.execute(SHOP + "CREATE TABLE shop.t (id int PRIMARY KEY) PARTITION BY RANGE (id)")
    config = config_of(each_database.dsn, "shop.t", slot=each_database.slot)
    provision.initialise(config)
    each_database.execute("ALTER PUBLICATION figbridge SET (publish_via_partition_root = false)")
    finding = inspected(config, "run").only("error", "publication figbridge")
    assert "would name the partitions of shop.t" in finding.what
    each_database.execute(finding.remedy)
    assert inspected(config, "run").errors == []


def test_an_inbox_publication_without_the_canary(shop: Database) -> None:
    config = config_of(shop.dsn, slot=shop.slot, mappings=ECHO)
    provision.initialise(config)
    shop.execute("ALTER PUBLICATION figbridge_inbox DROP TABLE figbridge.canary")
    found = inspected(config, "run")
    assert "does not publish figbridge.canary" in found.only("error", "publication figbridge_inbox").what
    provision.initialise(config)
    assert inspected(config, "run").errors == []


# --- the slot


def test_a_physical_slot_of_that_name(shop: Database) -> None:
    shop.execute("SELECT pg_create_physical_replication_slot(%s)", [shop.slot])
    try:
        found = inspected(config_of(shop.dsn, slot=shop.slot))
        assert found.only("error", f"slot {shop.slot}").what == "is somebody else's: a physical slot"
    finally:
        shop.execute("SELECT pg_drop_replication_slot(%s)", [shop.slot])


def test_a_slot_of_another_plugin(each_database: Database) -> None:
    try:
        each_database.execute("SELECT pg_create_logical_replication_slot(%s, 'test_decoding')", [each_database.slot])
    except psycopg.errors.UndefinedFile:
        pytest.skip("this server came without test_decoding")
    each_database.execute(SHOP)
    found = inspected(config_of(each_database.dsn, slot=each_database.slot), "run")
    assert "of plugin test_decoding" in found.only("error", f"slot {each_database.slot}").what


def test_a_slot_of_another_database(shop: Database) -> None:
    with _fresh(shop.server) as other:
        other.create_slot(shop.slot)
        found = inspected(config_of(shop.dsn, slot=shop.slot), "run")
        assert f"in database {other.name}" in found.only("error", f"slot {shop.slot}").what
        other.execute("SELECT pg_drop_replication_slot(%s)", [shop.slot])


def test_a_slot_that_another_process_reads(each_database: Database) -> None:
    each_database.execute(SHOP)
    config = config_of(each_database.dsn, slot=each_database.slot)
    provision.initialise(config)
    with walsender(each_database.dsn, each_database.slot) as pid:
        found = inspected(config, "run")
        assert f"pid {pid}, other-bridge, postgres" in found.only("warning", f"slot {each_database.slot}").what
        assert found.errors == []  # a stand-by is to wait, not to fail


def test_a_slot_that_is_gone(shop: Database) -> None:
    config = config_of(shop.dsn, slot=shop.slot)
    provision.initialise(config)
    shop.execute("SELECT pg_drop_replication_slot(%s)", [shop.slot])
    finding = inspected(config, "run").only("error", f"slot {shop.slot}")
    assert finding.what == "does not exist"
    assert "copy the tables anew" in finding.remedy


def test_a_publication_that_is_gone_takes_a_new_slot_and_the_tables(shop: Database) -> None:
    """The first remedy is the one that helps: `init` would refuse the slot, and nothing else tells of the gap."""
    config = config_of(shop.dsn, slot=shop.slot)
    provision.initialise(config)
    shop.execute("DROP PUBLICATION figbridge")
    there = inspected(config, "run").only("error", "publication figbridge")
    refused = inspected(config, "init").only("error", f"slot {shop.slot}")
    for finding in (there, refused):
        assert f"pg_drop_replication_slot('{shop.slot}'); then run `figbridge init`" in finding.remedy
        assert "copy the tables anew (`figbridge snapshot`)" in finding.remedy
    shop.execute("SELECT pg_drop_replication_slot(%s)", [shop.slot])
    assert inspected(config, "run").only("error", "publication figbridge").remedy == "run `figbridge init`"
    provision.initialise(config)
    shop.execute("DROP PUBLICATION figbridge")
    shop.execute(provision.script(config))
    made_anew = inspected(config, "run").only("error", f"slot {shop.slot}")
    assert "copy the tables anew (`figbridge snapshot`)" in made_anew.remedy
