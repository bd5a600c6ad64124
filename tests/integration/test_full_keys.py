"""What names a row under REPLICA IDENTITY FULL, where the stream flags every column and says nothing of a key."""

from importlib import resources
from typing import Any

from figbridge.change import Relation
from figbridge.config import HashSection, SelectSection
from figbridge.forward.keys import PrimaryKeys
from figbridge.forward.snapshot.progress import Progress
from figbridge.forward.versions import History, VersionStore
from fixtures.clock import until
from fixtures.forward import Forward
from fixtures.postgres import Database
from fixtures.replay import FENCE, Detail, prepared, settled, told
from fixtures.snapshot import finished, prepare

THING = "CREATE TABLE thing (id int PRIMARY KEY, code int NOT NULL); ALTER TABLE thing REPLICA IDENTITY FULL"
MOVE = "ALTER TABLE thing DROP CONSTRAINT thing_pkey, ADD PRIMARY KEY (code)"
CUT = "SELECT pg_terminate_backend(active_pid, 5000) FROM pg_replication_slots WHERE active"


class Counted(Forward):
    """Counts the questions to the catalogue."""

    asked = 0

    def primary_keys(self, dsn: str, relation: Relation) -> PrimaryKeys:
        self.asked += 1
        return super().primary_keys(dsn, relation)


def said(details: list[Detail]) -> list[tuple[str, Any]]:
    return [(it["op"], it["key"]) for it in details]


def kept(database: Database) -> Forward:
    versions = VersionStore(database.dsn, database.slot)
    return Forward(database, messages=[FENCE], history=History(), versions=versions)


def test_a_primary_key_that_moves_while_the_bridge_runs(each_database: Database) -> None:
    prepared(each_database, THING)
    with Forward(each_database, messages=[FENCE], history=History()) as forward:
        each_database.execute("INSERT INTO thing VALUES (1, 10)")
        settled(forward)
        each_database.execute(MOVE)
        each_database.execute("INSERT INTO thing VALUES (2, 20)")
        each_database.execute("INSERT INTO thing VALUES (2, 30)")
        assert said(settled(forward)) == [
            ("insert", {"id": 1}), ("schema.changed", None), ("insert", {"code": 20}), ("insert", {"code": 30}),
        ]  # fmt: skip
        each_database.execute("ALTER TABLE thing DROP CONSTRAINT thing_pkey")
        each_database.execute("INSERT INTO thing VALUES (2, 30)")
        assert said(settled(forward))[4:] == [("schema.changed", None), ("insert", None)]


def test_what_comes_again_has_the_key_that_it_had(each_database: Database) -> None:
    """After a lost connection, and in another process."""
    prepared(each_database, (resources.files("figbridge") / "schema.sql").read_text(), THING)
    with kept(each_database) as forward:
        each_database.execute("INSERT INTO thing VALUES (1, 10)")
        settled(forward)
        until(lambda: forward.checkpoint.pending == 0)
        each_database.execute("INSERT INTO thing VALUES (2, 20)")
        settled(forward)
        each_database.execute(MOVE)
        each_database.execute("INSERT INTO thing VALUES (2, 30)")
        once = settled(forward)
        forward.sink.open.clear()
        each_database.execute("INSERT INTO thing VALUES (2, 40)")
        until(lambda: forward.sink.refused)
        each_database.execute(CUT)
        until(lambda: forward.metric("forward_connections_total") == 2, missing="a second connection")
        forward.halt()
    assert said(once)[1:] == [("insert", {"id": 2}), ("schema.changed", None), ("insert", {"code": 30})]
    with kept(each_database) as forward:
        again = {it["id"]: it for it in settled(forward)}
    assert [it for it in once if it["id"] in again] == [again[it["id"]] for it in once if it["id"] in again]
    assert said(list(again.values()))[-1] == ("insert", {"code": 40})


def test_a_table_that_is_renamed_while_the_bridge_is_down(each_database: Database) -> None:
    prepared(each_database, THING)
    each_database.execute("INSERT INTO thing VALUES (1, 10); DELETE FROM thing")
    each_database.execute("ALTER TABLE thing RENAME TO item")
    each_database.execute("CREATE TABLE thing (id int, code int PRIMARY KEY); INSERT INTO item VALUES (2, 20)")
    assert said(told(each_database)) == [("insert", {"id": 1}), ("delete", {"id": 1}), ("insert", {"id": 2})]


def test_a_key_that_the_catalogue_does_not_know_any_more(each_database: Database) -> None:
    """Its column has another name by now, then there is no table: the last version that fits knows it."""
    prepared(each_database, (resources.files("figbridge") / "schema.sql").read_text(), THING)
    with kept(each_database) as forward:
        each_database.execute("INSERT INTO thing VALUES (1, 10)")
        settled(forward)
    each_database.execute("INSERT INTO thing VALUES (2, 20)")
    each_database.execute("ALTER TABLE thing ADD more int; INSERT INTO thing VALUES (3, 30)")
    each_database.execute("ALTER TABLE thing RENAME id TO nr; INSERT INTO thing VALUES (4, 40)")
    with kept(each_database) as forward:
        assert said(settled(forward)) == [
            ("insert", {"id": 2}), ("schema.changed", None), ("insert", {"id": 3}),
            ("schema.changed", None), ("insert", {"nr": 4}),
        ]  # fmt: skip
    each_database.execute("INSERT INTO thing VALUES (5, 50)")
    each_database.execute("DROP TABLE thing")
    with kept(each_database) as forward:
        assert said(settled(forward)) == [("insert", {"nr": 5})]


def test_part_of_a_key_is_none(each_database: Database) -> None:
    """One of its columns has another name by now, and no version was kept: rows are not named by the other alone."""
    prepared(
        each_database,
        "CREATE TABLE thing (a int, b int, PRIMARY KEY (a, b)); ALTER TABLE thing REPLICA IDENTITY FULL",
    )
    each_database.execute("INSERT INTO thing VALUES (1, 1), (1, 2)")
    each_database.execute("ALTER TABLE thing RENAME b TO c")
    assert said(told(each_database)) == [("insert", None)] * 2


def test_of_a_table_that_keeps_columns_back_no_version_says_the_key(database: Database) -> None:
    prepared(database, THING)
    select = [SelectSection.model_validate({"table": "public.thing", "exclude": ["code"]})]
    hashing = HashSection.model_validate({"key": "correct horse battery"})
    history = History()  # as if it was kept
    with Forward(database, messages=[FENCE], history=history, select=select, hashing=hashing) as forward:
        database.execute("INSERT INTO thing VALUES (1, 10)")
        assert said(settled(forward)) == [("insert", {"id": 1})]
    database.execute("INSERT INTO thing VALUES (2, 20)")
    database.execute("ALTER TABLE thing RENAME id TO nr")
    with Forward(database, messages=[FENCE], history=history, select=select, hashing=hashing) as forward:
        assert said(settled(forward)) == [("schema.changed", None), ("insert", None)]


def test_one_question_for_all_that_was_committed_before_it(each_database: Database) -> None:
    """Or a lost connection would cost as many as there are tables, and the stream wait for each."""
    tables = [f"thing_{number}" for number in range(6)]
    prepared(
        each_database,
        *(f"CREATE TABLE {it} (id int PRIMARY KEY); ALTER TABLE {it} REPLICA IDENTITY FULL" for it in tables),
    )
    each_database.execute("; ".join(f"INSERT INTO {it} VALUES (1)" for it in tables))
    with Counted(each_database, messages=[FENCE]) as forward:
        assert said(settled(forward)) == [("insert", {"id": 1})] * 6
        assert forward.asked == 1
        each_database.execute(CUT)
        each_database.execute("; ".join(f"INSERT INTO {it} VALUES (2)" for it in tables))
        assert said(settled(forward))[6:] == [("insert", {"id": 2})] * 6
        assert forward.asked == 2
        each_database.execute("; ".join(f"INSERT INTO {it} VALUES (3)" for it in tables))
        settled(forward)
        assert forward.asked == 2, "nothing was described anew"


def test_a_snapshot_and_the_stream_name_rows_alike(each_database: Database) -> None:
    prepare(each_database, f"{THING}; INSERT INTO thing VALUES (1, 10)", "thing")
    with Forward(each_database, messages=[FENCE], snapshot=(), history=History()) as forward:
        each_database.execute("INSERT INTO thing VALUES (2, 20)")
        settled(forward)
        each_database.execute(MOVE)
        with each_database.connect() as connection:
            Progress(each_database.slot).want(connection, ("public", "thing"))
        finished(forward, "thing")
        each_database.execute("INSERT INTO thing VALUES (2, 40)")
        details = settled(forward)
    changed = next(index for index, it in enumerate(details) if it["op"] == "schema.changed")
    assert said(details[:changed]) == [("insert", {"id": 2})]
    assert said(details)[-1] == ("insert", {"code": 40})
    assert {it["schema_version"] for it in details[changed:]} == {details[changed]["schema_version"]}
    assert {next(iter(it["key"])) for it in details[changed + 1 :]} == {"code"}
