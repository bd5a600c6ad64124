"""`init`, its SQL, and `teardown`, on real servers."""

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import structlog

from figbridge import canary, preflight, provision
from figbridge.config import Config
from figbridge.deadletter import DeadLetter, TableDeadLetterStore
from figbridge.demo.postgres import installations
from figbridge.errors import LegacyUnavailable, SetupError
from figbridge.event import Received
from figbridge.provision import make
from figbridge.reverse import purge
from figbridge.reverse.mapping import Mapping
from figbridge.reverse.statement import Statement
from fixtures.clock import until
from fixtures.postgres import Database, _fresh

# a name with everything that SQL, psql, plpgsql and a comment could trip over
ODD_SCHEMA = '"Odd ""%s\' \\ :x"'
ODD = ODD_SCHEMA + '."$figbridge$\rDROP TABLE shop.orders;--\r\nx"'
TABLES = ["shop.orders", "shop.audit", "shop.indexed", "shop.days", ODD]
DDL = f"""
    CREATE SCHEMA shop;
    CREATE SCHEMA {ODD_SCHEMA};
    CREATE TABLE shop.orders (id int PRIMARY KEY, status text);
    CREATE TABLE shop.audit (id int, status text);
    ALTER TABLE shop.audit REPLICA IDENTITY FULL;
    CREATE TABLE shop.indexed (id int NOT NULL, status text);
    CREATE UNIQUE INDEX indexed_id ON shop.indexed (id);
    ALTER TABLE shop.indexed REPLICA IDENTITY USING INDEX indexed_id;
    CREATE TABLE shop.days (id int PRIMARY KEY, status text) PARTITION BY RANGE (id);
    CREATE TABLE shop.days_1 PARTITION OF shop.days FOR VALUES FROM (0) TO (10);
    CREATE TABLE shop.days_2 PARTITION OF shop.days FOR VALUES FROM (10) TO (20);
    CREATE TABLE {ODD} (id int PRIMARY KEY, status text);
"""
FORWARD = {"sink": {"type": "stdout"}}
REVERSE = {
    "source": {"type": "sqs", "queue_url": "http://127.0.0.1:9/queue"},
    "mappings": [
        {
            "match": {"source": "shop.next", "detail-type": "order.changed"},
            "into": "shop.orders",
            "action": "upsert",
            "key": {"id": "detail.id"},
            "set": {"status": "detail.status"},
        },
        {
            "match": {"source": "shop.next", "detail-type": "audit.purged"},
            "into": "shop.audit",
            "action": "delete",
            "key": {"id": "detail.id"},
        },
    ],
}


def configured(
    database: Database,
    tables: list[str] | None = None,
    *,
    forward: dict[str, Any] | None = FORWARD,
    reverse: dict[str, Any] | None = REVERSE,
    dsn: str | None = None,
) -> Config:
    section = {"dsn": dsn or database.dsn, "slot": database.slot, "tables": tables or TABLES}
    tree = {"legacy": section, "forward": forward, "reverse": reverse}
    return Config.parse(json.dumps({key: value for key, value in tree.items() if value}), {})


def state(database: Database) -> dict[str, list[Any]]:
    """Everything that `init` may have made, as the catalogue has it."""
    return {
        "publications": database.execute(
            "SELECT p.pubname, puballtables, pubinsert, pubupdate, pubdelete, pubtruncate, pubviaroot, "
            "obj_description(p.oid, 'pg_publication') ~ '^figbridge: made at [0-9A-F]+/[0-9A-F]+$', "
            "ARRAY(SELECT r.prrelid::regclass::text FROM pg_publication_rel r WHERE r.prpubid = p.oid ORDER BY 1) "
            "FROM pg_publication p ORDER BY 1"
        ),
        "slots": database.execute(
            "SELECT slot_type, plugin, temporary FROM pg_replication_slots WHERE slot_name = %s", [database.slot]
        ),
        "columns": database.execute(
            "SELECT table_name, column_name, data_type, is_nullable, column_default FROM information_schema.columns "
            "WHERE table_schema = 'figbridge' ORDER BY table_name, ordinal_position"
        ),
        "indexes": database.execute("SELECT indexdef FROM pg_indexes WHERE schemaname = 'figbridge' ORDER BY 1"),
        "schemas": database.execute("SELECT nspname FROM pg_namespace WHERE nspname = 'figbridge'"),
    }


NOTHING: dict[str, list[Any]] = {"publications": [], "slots": [], "columns": [], "indexes": [], "schemas": []}


def streamed(database: Database, *publications: str) -> list[tuple[Any, ...]]:
    return database.execute(
        "SELECT lsn, data FROM pg_logical_slot_get_binary_changes(%s, NULL, NULL, "
        "'proto_version', '1', 'publication_names', %s)",
        [database.slot, ",".join(publications)],
    )


def psql() -> str | Path | None:
    return shutil.which("psql") or next((place / "psql" for place in installations().values()), None)


@pytest.fixture
def shop(database: Database) -> Database:
    database.execute(DDL)
    return database


def test_init_makes_everything_and_finds_it_the_second_time(each_database: Database) -> None:
    each_database.execute(DDL)
    config = configured(each_database)
    lines = provision.initialise(config)
    made = state(each_database)
    others = "inbox, canary, entity_version, parked, dead_letter, slot_guard, table_version, snapshot, snapshot_moved"
    assert lines[0] == f"schema figbridge: made {others}"
    assert lines[1].startswith("publication figbridge: made for shop.orders, shop.audit, shop.indexed, shop.days, ")
    assert lines[2] == "publication figbridge_inbox: made for figbridge.inbox, figbridge.canary"
    assert re.fullmatch(rf"slot {each_database.slot}: made, changes leave from [0-9A-F]+/[0-9A-F]+ on", lines[3])
    tables, inbox = made["publications"]
    assert tables[1:8] == (False, True, True, True, True, True, True)
    assert len(tables[8]) == len(TABLES)
    assert inbox[1:8] == (False, True, False, False, False, True, True)
    assert inbox[8] == ["figbridge.canary", "figbridge.inbox"]
    assert made["slots"] == [("logical", "pgoutput", False)]
    assert provision.initialise(config) == [
        "schema figbridge: there already",
        "publication figbridge: there already",
        "publication figbridge_inbox: there already",
        f"slot {each_database.slot}: there already",
    ]
    assert state(each_database) == made


def test_the_application_can_still_write_every_table_and_its_changes_arrive(each_database: Database) -> None:
    each_database.execute(DDL)
    provision.initialise(configured(each_database))
    for table in TABLES:
        each_database.execute(f"INSERT INTO {table} VALUES (1, 'a'), (11, 'b')")
        each_database.execute(f"UPDATE {table} SET status = 'c'")
        each_database.execute(f"DELETE FROM {table}")
    each_database.execute("INSERT INTO figbridge.inbox VALUES ('s', 'k', '', 'e')")
    each_database.execute("DELETE FROM figbridge.inbox")
    kinds = [bytes(data)[:1] for _, data in streamed(each_database, "figbridge", "figbridge_inbox")]
    assert kinds.count(b"I") == 2 * len(TABLES) + 1
    assert kinds.count(b"U") == 2 * len(TABLES)
    assert kinds.count(b"D") == 2 * len(TABLES)  # and none of the inbox
    # the leaf is described to the reader, too; but no row is said to be of it
    assert relations_of_rows(each_database) == {"days"}


def relations_of_rows(database: Database) -> set[str]:
    """The names of the tables that the rows of two new days are said to be of."""
    database.execute("INSERT INTO shop.days VALUES (2, 'a'), (12, 'b')")
    messages = [bytes(data) for _, data in streamed(database, "figbridge", "figbridge_inbox")]
    names = {data[1:5]: data[5:].split(b"\0")[1].decode() for data in messages if data[:1] == b"R"}
    assert len(names) > 1
    return {names[data[1:5]] for data in messages if data[:1] == b"I" and data[1:5] in names}


def test_a_table_that_is_added_later_is_published_and_one_that_is_removed_is_reported(shop: Database) -> None:
    provision.initialise(configured(shop, ["shop.orders", "shop.audit"]))
    lines = provision.initialise(configured(shop, ["shop.orders", "shop.days"]))
    assert [line for line in lines if line.startswith("publication figbridge:")] == [
        "publication figbridge: added shop.days; its changes leave from now on, the rows that are there already do not"
    ]
    (told,) = [line for line in lines if line.startswith("warning")]
    assert "also publishes shop.audit" in told
    assert 'ALTER PUBLICATION "figbridge" DROP TABLE "shop"."audit";' in told
    assert state(shop)["publications"][0][8] == ["shop.audit", "shop.days", "shop.orders"]


def test_only_a_forward_path_needs_no_table_of_ours(shop: Database) -> None:
    provision.initialise(configured(shop, ["shop.orders"], reverse=None))
    made = state(shop)
    assert made["schemas"] == []
    assert [row[0] for row in made["publications"]] == ["figbridge"]


def test_the_relays_dead_letters_in_a_table_need_it(shop: Database, tmp_path: Path) -> None:
    tree = {
        "legacy": {"dsn": shop.dsn, "slot": shop.slot, "tables": ["shop.orders"]},
        "relay": {
            "sink": {"type": "stdout"},
            "contracts": str(tmp_path),
            "dead-letters": {"type": "table"},
        },
    }
    config = Config.parse(json.dumps(tree), {})
    where = "relay.dead-letters"
    assert [it.level for it in preflight.inspect(config, "run", "relay") if it.where == where] == ["error"]

    assert provision.initialise(config) == ["schema figbridge: made dead_letter"]

    assert [it.level for it in preflight.inspect(config, "run", "relay") if it.where == where] == ["ok"]


def test_table_dead_letters_need_the_schema(shop: Database) -> None:
    letters = {**FORWARD, "dead-letters": {"type": "table"}}
    provision.initialise(configured(shop, ["shop.orders"], forward=letters, reverse=None))
    assert state(shop)["schemas"]
    assert [row[0] for row in state(shop)["publications"]] == ["figbridge"]


def test_only_a_reverse_path_needs_no_slot(shop: Database) -> None:
    lines = provision.initialise(configured(shop, forward=None))
    assert lines == ["schema figbridge: made inbox, canary, entity_version, parked, dead_letter"]
    made = state(shop)
    assert (made["publications"], made["slots"]) == ([], [])


def test_a_table_that_had_a_snapshot_before_is_not_said_to_be_read_again(shop: Database) -> None:
    config = configured(shop, ["shop.orders"], forward=FORWARD | {"snapshot": "initial"}, reverse=None)
    provision.initialise(config)

    def added() -> str:
        shop.execute("ALTER PUBLICATION figbridge DROP TABLE shop.orders")
        return next(line for line in provision.initialise(config) if "added shop.orders" in line)

    assert "the bridge reads the rows that are there already" in added()
    shop.execute(
        "INSERT INTO figbridge.snapshot (slot, system_identifier, schema_name, table_name, run, state) "
        "SELECT %s, system_identifier::text, 'shop', 'orders', 1, 'done' FROM pg_control_system()",
        [shop.slot],
    )
    line = added()
    assert "the rows that are there already do not" in line
    assert "`figbridge snapshot shop.orders` reads them" in line
    shop.execute("UPDATE figbridge.snapshot SET state = 'waiting'")
    assert "the bridge reads the rows that are there already" in added()


def test_init_brings_an_older_schema_up_to_date_and_keeps_its_rows(each_database: Database) -> None:
    config = configured(each_database, ["shop.orders"], forward=None)
    each_database.execute(DDL)
    provision.initialise(config)
    each_database.execute("""
        DROP TABLE figbridge.parked, figbridge.entity_version;
        ALTER TABLE figbridge.dead_letter DROP COLUMN statement;
        DROP INDEX figbridge.inbox_age;
        CREATE INDEX inbox_applied_at ON figbridge.inbox (applied_at);
        INSERT INTO figbridge.inbox VALUES ('s', 'k', '', 'e');
        INSERT INTO figbridge.dead_letter VALUES ('i', 'reverse', 'e', 'r', 'm', 1, '')
    """)
    errors = [it for it in preflight.inspect(config, "run") if it.level == "error"]
    assert {it.remedy for it in errors if it.where.startswith("schema")} == {"run `figbridge init`"}
    assert provision.initialise(config) == ["schema figbridge: made entity_version, parked"]
    for table, column in ("dead_letter", "statement"), ("parked", "message_group"):
        each_database.execute(f"ALTER TABLE figbridge.{table} DROP COLUMN {column}")
        errors = [it for it in preflight.inspect(config, "run") if it.level == "error"]
        assert [it.remedy for it in errors if it.where.startswith("schema")] == ["run `figbridge init`"]
        assert provision.initialise(config) == ["schema figbridge: brought up to date"]
    assert provision.initialise(config) == ["schema figbridge: there already"]
    for table in ("inbox", "dead_letter"):
        assert each_database.execute(f"SELECT event_id FROM figbridge.{table}") == [("e",)]
    assert [
        it for it in preflight.inspect(config, "run") if it.where.startswith("schema") and it.level == "error"
    ] == []


def test_init_refuses_everything_that_is_wrong_at_once_and_has_done_nothing(each_database: Database) -> None:
    each_database.execute(DDL + "CREATE TABLE shop.heap (id int); CREATE UNLOGGED TABLE shop.fast (id int PRIMARY KEY)")
    with pytest.raises(SetupError) as refused:
        provision.initialise(configured(each_database, ["shop.order", "shop.heap", "shop.fast", "shop.orders"]))
    assert [problem.where for problem in refused.value.problems] == [
        "table shop.order",
        "table shop.heap",
        "table shop.fast",
    ]
    assert refused.value.exit_status == 2
    assert state(each_database) == NOTHING


def test_the_server_itself_is_asked_before_commit(each_database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the preflight's knowledge of the server's rules ever wrong, the application would still not be broken."""
    each_database.execute(DDL + "CREATE TABLE shop.heap (id int)")
    monkeypatch.setattr(preflight, "require", lambda *_: [])
    with pytest.raises(SetupError, match=r"could not UPDATE or DELETE any more.*replica identity"):
        provision.initialise(configured(each_database, ["shop.orders", "shop.heap"]))
    assert state(each_database) == NOTHING
    each_database.execute("DELETE FROM shop.heap")


@pytest.mark.pg(">= 18")
def test_a_generated_column_in_the_identity_is_found_before_commit(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.execute(
        "CREATE SCHEMA shop; CREATE TABLE shop.sums (id int, twice int GENERATED ALWAYS AS (id * 2) STORED); "
        "ALTER TABLE shop.sums REPLICA IDENTITY FULL"
    )
    monkeypatch.setattr(preflight, "require", lambda *_: [])
    with pytest.raises(SetupError, match="generated columns"):
        provision.initialise(configured(database, ["shop.sums"], reverse=None))
    assert state(database) == NOTHING


def test_two_at_once_make_one(shop: Database) -> None:
    config, results = configured(shop), list[list[str]]()
    threads = [threading.Thread(target=lambda: results.append(provision.initialise(config))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert sum("made" in line for lines in results for line in lines) == 4  # schema, two publications, slot


def test_init_says_for_whom_the_slot_waits(shop: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "_PATIENCE", 0.05)
    shop.execute(f"ALTER DATABASE {shop.name} SET statement_timeout = '300ms'")  # the slot may not fail of it
    lines: list[str] = []
    with (
        psycopg.connect(shop.dsn, application_name="nightly batch") as open_one,
        structlog.testing.capture_logs() as logs,
    ):
        open_one.execute("INSERT INTO shop.orders VALUES (1, 'a')")
        blocker = open_one.info.backend_pid
        thread = threading.Thread(target=lambda: lines.extend(provision.initialise(configured(shop))))
        thread.start()
        # more than once, and so for longer than the timeout
        until(lambda: len([log for log in logs if log["event"].startswith("the slot waits")]) > 10)
        said = [log for log in logs if log["event"].startswith("the slot waits")][-1]
        assert said["blocked_by"] == [f"pid {blocker}, nightly batch, postgres"]
        assert not lines
        open_one.commit()
        thread.join(60)
    assert lines[-1].startswith(f"slot {shop.slot}: made")


def test_a_slot_that_is_older_than_its_publication_is_refused(shop: Database) -> None:
    shop.create_slot()
    with pytest.raises(SetupError, match="older than publication figbridge") as refused:
        provision.initialise(configured(shop))
    assert f"pg_drop_replication_slot('{shop.slot}')" in str(refused.value)
    assert state(shop)["publications"] == []


def test_a_reverse_path_that_is_added_later_waits_until_the_slot_has_passed(each_database: Database) -> None:
    each_database.execute(DDL)
    provision.initialise(configured(each_database, reverse=None))
    each_database.execute("INSERT INTO shop.orders VALUES (1, 'before the inbox was')")
    config = configured(each_database)
    lines = provision.initialise(config)
    (told,) = [line for line in lines if line.startswith("warning")]
    assert f"slot {each_database.slot} is older than publication figbridge_inbox" in told

    def older() -> list[str]:
        return [it.what for it in preflight.inspect(config, "run") if "still needs WAL" in it.what]

    assert len(older()) == 1
    if each_database.version < 18:  # what the finding is for; 18 leaves the changes out with a warning in its log
        with pytest.raises(psycopg.errors.UndefinedObject, match="figbridge_inbox"):
            streamed(each_database, "figbridge", "figbridge_inbox")

    def passed() -> bool:
        each_database.execute("CHECKPOINT")  # writes the record by which a slot moves on
        streamed(each_database, "figbridge")
        return not older()

    until(passed, 30)
    each_database.execute("INSERT INTO shop.orders VALUES (2, 'after')")
    assert streamed(each_database, "figbridge", "figbridge_inbox")


def test_an_owner_without_more_rights_is_told_all_that_is_missing(shop: Database) -> None:
    shop.execute(
        f"CREATE ROLE {shop.name}_limited LOGIN REPLICATION; GRANT USAGE ON SCHEMA shop TO {shop.name}_limited"
    )
    try:
        with pytest.raises(SetupError) as refused:
            provision.initialise(
                configured(shop, ["shop.orders"], dsn=shop.dsn.replace("user=postgres", f"user={shop.name}_limited"))
            )
        text = str(refused.value)
        assert "may not make a publication" in text
        assert "is not the owner of shop.orders" in text
        assert "schema figbridge: role" in text
        assert "--print-sql" in text
    finally:
        shop.execute(f"DROP OWNED BY {shop.name}_limited; DROP ROLE {shop.name}_limited")


# --- the SQL for a DBA


def test_the_script_makes_what_init_makes(each_database: Database) -> None:
    each_database.execute(DDL)
    provision.initialise(configured(each_database))
    with _fresh(each_database.server) as other:
        other.execute(DDL)
        text = provision.script(configured(other))
        other.execute(text)
        assert state(other) == state(each_database)
        other.execute(text)  # twice is as good as once
        assert state(other) == state(each_database)
        lines = provision.initialise(configured(other))
        assert all(line.endswith("there already") for line in lines)


def test_the_script_adds_a_table_later(shop: Database) -> None:
    shop.execute(provision.script(configured(shop, ["shop.orders"])))
    shop.execute(provision.script(configured(shop, ["shop.orders", ODD])))
    assert len(state(shop)["publications"][0][8]) == 2


@pytest.mark.parametrize("stops", [True, False])
def test_psql_runs_the_script(each_database: Database, tmp_path: Path, *, stops: bool) -> None:
    program = psql()
    if program is None:
        pytest.skip("no psql here")
    each_database.execute(DDL + "CREATE TABLE shop.heap (id int)")

    def run(config: Config) -> subprocess.CompletedProcess[str]:
        file = tmp_path / "init.sql"
        file.write_bytes(provision.script(config).encode())
        command = [program, "-X", "-v", f"ON_ERROR_STOP={int(stops)}", "-f", file, each_database.dsn]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    failed = run(configured(each_database, ["shop.orders", "shop.heap"]))
    assert "does not have a replica identity" in failed.stderr
    # all or nothing, and no slot without a publication, even where psql went on after the failure
    assert state(each_database) == NOTHING
    done = run(configured(each_database))
    assert (done.returncode, "ERROR" in done.stderr) == (0, False)
    provision.initialise(configured(each_database))
    assert state(each_database)["slots"] == [("logical", "pgoutput", False)]


@pytest.fixture
def role(shop: Database) -> Iterator[str]:
    """A name for the bridge's own role; whatever was made under it is gone afterwards."""
    name = f"{shop.name} bridge"
    yield name
    shop.execute(f'DROP OWNED BY "{name}"; DROP ROLE "{name}"')


def test_the_scripts_grants_are_all_that_the_bridge_needs(shop: Database, role: str) -> None:
    config = configured(shop, dsn=shop.dsn.replace("user=postgres", f"user='{role}'"))
    text = provision.script(config)
    shop.execute(text)
    commented = [
        line.removeprefix("-- ") for line in text.splitlines() if re.match(r"-- (CREATE ROLE|GRANT) .*;$", line)
    ]
    assert commented[0] == f'CREATE ROLE "{role}" WITH LOGIN REPLICATION;'
    odd = 0
    for statement in commented:
        if statement.count('"') % 2 == 0:
            shop.execute(statement)
        else:
            odd += 1
    assert odd == 0  # the odd name breaks over lines, so its grant is not one of these
    shop.execute(f'GRANT SELECT ON {ODD} TO "{role}"; GRANT USAGE ON SCHEMA {ODD_SCHEMA} TO "{role}"')
    findings = [it for it in preflight.inspect(config, "run") if it.level == "error"]
    assert findings == []
    # and the proof of the pudding: each thing the bridge does, as that role
    dsn = config.legacy.dsn.get_secret_value()
    canary.answer(dsn, canary.write(dsn, shop.slot))
    TableDeadLetterStore(dsn).add([DeadLetter("reverse", "e", "23505", "m", 1, b"{}")])
    assert config.reverse
    received = Received("e", "shop.next", "x", {"detail": {"id": 1, "status": "paid"}})
    with psycopg.connect(dsn, autocommit=True) as connection:
        for section in config.reverse.mappings:
            (it,) = Mapping(section).statements(received)
            assert isinstance(it, Statement)
            psycopg.RawCursor(connection).execute(it.query, it.parameters)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("DELETE FROM shop.orders")
    assert purge.purge(dsn, purge.inbox(days=0)) == 1  # the canary's


def test_the_script_never_shows_the_password_and_is_a_comment_where_it_is_not_sql(shop: Database) -> None:
    text = provision.script(configured(shop, dsn=f"{shop.dsn} password=s3cret-of-ours"))
    assert "s3cret" not in text
    assert "DROP TABLE shop.orders" in text  # the odd name; it stands in quotes or in a comment
    shop.execute(text)
    assert shop.execute("SELECT count(*) FROM shop.orders") == [(0,)]
    assert not re.search(r"(?m)^(CREATE ROLE|GRANT)", text)


# --- teardown


def test_teardown_leaves_nothing_and_may_be_repeated(each_database: Database) -> None:
    each_database.execute(DDL)
    config = configured(each_database)
    provision.initialise(config)
    TableDeadLetterStore(each_database.dsn).add([DeadLetter("forward", "e", "r", "m", 1, b"{}")])
    assert provision.teardown(config, keep_schema=False) == [
        f"slot {each_database.slot}: dropped",
        "publication figbridge: dropped",
        "publication figbridge_inbox: dropped",
        "schema figbridge: dropped, with 1 dead letters",
    ]
    assert state(each_database) == NOTHING
    assert all("was not there" in line for line in provision.teardown(config, keep_schema=False))
    provision.initialise(config)


def test_teardown_can_keep_the_memory_of_what_was_applied(shop: Database) -> None:
    config = configured(shop)
    provision.initialise(config)
    shop.execute("INSERT INTO figbridge.inbox VALUES ('s', 'k', '', 'e')")
    assert provision.teardown(config, keep_schema=True)[-1] == "schema figbridge: kept"
    assert shop.execute("SELECT count(*) FROM figbridge.inbox") == [(1,)]
    assert state(shop)["publications"] == []
    provision.initialise(config)
    assert shop.execute("SELECT count(*) FROM figbridge.inbox") == [(1,)]


@pytest.fixture
def owner(each_database: Database) -> Iterator[str]:
    """The DSN of a role that may do what a forward path needs, and no more."""
    each_database.execute(DDL)
    role = f"{each_database.name}_owner"
    each_database.execute(
        f"CREATE ROLE {role} LOGIN REPLICATION; GRANT CREATE ON DATABASE {each_database.name} TO {role}; "
        f"GRANT USAGE ON SCHEMA shop TO {role}; ALTER TABLE shop.orders OWNER TO {role}; "
        f"GRANT EXECUTE ON FUNCTION pg_control_system() TO {role}"
    )
    yield each_database.dsn.replace("user=postgres", f"user={role}")
    each_database.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_teardown_by_a_role_that_is_no_superuser(each_database: Database, owner: str) -> None:
    """It may not drop a replication origin; there is none, or it stays and all else goes."""
    config = configured(each_database, ["shop.orders"], reverse=None, dsn=owner)
    name = canary.origin(each_database.slot)
    provision.initialise(config)
    assert not [line for line in provision.teardown(config, keep_schema=False) if "origin" in line]
    assert state(each_database) == NOTHING
    provision.initialise(config)
    each_database.execute("SELECT pg_replication_origin_create(%s)", [name])
    try:
        (told,) = [line for line in provision.teardown(config, keep_schema=False) if "origin" in line]
        assert state(each_database) == NOTHING
        remedy = told.partition("As a superuser: ")[2]
        each_database.execute(remedy)
        assert each_database.execute("SELECT count(*) FROM pg_replication_origin WHERE roname = %s", [name]) == [(0,)]
    finally:
        each_database.execute(
            "SELECT pg_replication_origin_drop(roname) FROM pg_replication_origin WHERE roname = %s", [name]
        )


def test_teardown_refuses_while_the_slot_is_read(each_database: Database) -> None:
    each_database.execute(DDL)
    config = configured(each_database)
    provision.initialise(config)
    made = state(each_database)
    with reading(each_database) as pid:
        with pytest.raises(SetupError, match=rf"pid {pid}, other-bridge, postgres"):
            provision.teardown(config, keep_schema=False)
        assert state(each_database) == made
        (finding,) = [it for it in preflight.inspect(config, "run") if "another process" in it.what]
        assert finding.level == "warning"
        assert f"pid {pid}, other-bridge" in finding.what


class reading:  # noqa: N801 (a context manager that reads as a word)
    """Somebody else reads the slot of `database`."""

    def __init__(self, database: Database) -> None:
        self._connection = psycopg.connect(
            database.dsn, replication="database", autocommit=True, application_name="other-bridge"
        )
        self._slot = database.slot

    def __enter__(self) -> int:
        options = "proto_version '1', publication_names 'figbridge'"
        started = self._connection.pgconn.exec_(f"START_REPLICATION SLOT {self._slot} LOGICAL 0/0 ({options})".encode())
        assert started.status == psycopg.pq.ExecStatus.COPY_BOTH
        return self._connection.info.backend_pid

    def __exit__(self, *_: object) -> None:
        self._connection.close()


def test_a_slot_of_the_same_name_in_another_database_is_left_alone(shop: Database) -> None:
    with _fresh(shop.server) as other:
        other.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [shop.slot])
        with pytest.raises(SetupError, match=f"somebody else's: logical, plugin pgoutput, database {other.name}"):
            provision.teardown(configured(shop), keep_schema=False)
        with pytest.raises(SetupError, match="somebody else's"):
            provision.initialise(configured(shop))
        assert state(shop)["slots"]


def test_the_schema_stays_while_another_bridge_uses_it(shop: Database) -> None:
    config = configured(shop)
    provision.initialise(config)
    shop.execute("CREATE PUBLICATION second_inbox FOR TABLE figbridge.inbox WITH (publish = 'insert')")
    with pytest.raises(SetupError, match="another bridge's publication second_inbox"):
        provision.teardown(config, keep_schema=False)
    assert state(shop)["slots"]
    provision.teardown(config, keep_schema=True)
    assert state(shop)["slots"] == []


def test_what_somebody_put_into_our_schema_is_not_dropped(shop: Database) -> None:
    config = configured(shop)
    provision.initialise(config)
    shop.execute("CREATE TABLE figbridge.precious (id int)")
    with pytest.raises(SetupError, match="precious"):
        provision.teardown(config, keep_schema=False)
    assert shop.execute("SELECT count(*) FROM figbridge.precious") == [(0,)]
    assert shop.execute("SELECT count(*) FROM figbridge.inbox") == [(0,)]
    assert len(state(shop)["publications"]) == 2


def test_a_database_that_does_not_answer_is_unavailable_not_wrong(database: Database) -> None:
    config = configured(database, dsn="host=127.0.0.1 port=1 dbname=none")
    for act in (provision.initialise, lambda it: provision.teardown(it, keep_schema=True)):
        with pytest.raises(LegacyUnavailable) as away:
            act(config)
        assert "host and port in the DSN are right; then run the command again" in away.value.hint
