"""`figbridge snapshot` against a running bridge: orders by rows of figbridge.snapshot."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from figbridge import cli
from fixtures.clock import until
from fixtures.forward import Forward
from fixtures.postgres import Database
from fixtures.snapshot import finished, prepare, states

CONFIG = """
legacy: {dsn: "%s", slot: %s, publication: pub, tables: [public.thing, public.other]}
forward: {sink: {type: stdout}, snapshot: initial}
"""


@pytest.fixture
def prepared(database: Database, tmp_path: Path) -> Database:
    prepare(
        database, "CREATE TABLE thing (id int PRIMARY KEY); CREATE TABLE other (id int PRIMARY KEY)", "thing", "other"
    )
    database.execute("INSERT INTO thing SELECT generate_series(1, 9000); INSERT INTO other VALUES (1); ANALYZE")
    database.execute("SELECT pg_replication_slot_advance(%s, pg_current_wal_lsn())", [database.slot])
    (tmp_path / "bridge.yaml").write_text(CONFIG % (database.dsn, database.slot))
    return database


def snapshot(tmp_path: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli.main, ["snapshot", "-c", str(tmp_path / "bridge.yaml"), *arguments])


def read(forward: Forward) -> list[tuple[str, int]]:
    return [(it["table"], it["after"]["id"]) for it in forward.sink.details if it["op"] == "read"]


def test_all_tables_then_one_with_a_condition(prepared: Database, tmp_path: Path) -> None:
    assert snapshot(tmp_path, "--status").output == "there is none\n"
    asked = snapshot(tmp_path)
    assert asked.output == "public.thing: asked for\npublic.other: asked for\n"
    assert "that has not ended" in snapshot(tmp_path, "thing").output
    with Forward(prepared, snapshot=()) as forward:
        followed = snapshot(tmp_path, "thing", "--follow")
        assert followed.exit_code == 0
        assert "public.thing: done, 9,000 rows of about 9,000" in followed.output
        finished(forward, "thing", "other")
        assert len(read(forward)) == 9001
        first = {it["id"] for it in forward.sink.details}
        assert snapshot(tmp_path, "public.thing", "--where", "id > 8998").exit_code == 0
        finished(forward, "thing")
        until(lambda: len(forward.sink.events) == 9003, 10, "the two rows")
        assert read(forward)[9001:] == [("thing", 8999), ("thing", 9000)]
        assert first.isdisjoint(it["id"] for it in forward.sink.details[9001:]), "another run has other ids"


def test_pause_resume_cancel(prepared: Database, tmp_path: Path) -> None:
    with Forward(prepared, snapshot=[("public", "thing")], rate=1000) as forward:
        until(lambda: read(forward), 20, "the first chunk")
        assert "public.thing: paused" in snapshot(tmp_path, "thing", "--pause").output
        until(
            lambda: not forward.windows.open and not forward.snapshot._bridge.claims._taken, 20, "the loop has left it"
        )
        before = len(read(forward))
        assert before < 9000
        assert snapshot(tmp_path, "--status").output.startswith(f"public.thing: paused, {before:,} rows of about 9,000")
        assert "waiting" in snapshot(tmp_path, "--resume").output
        until(lambda: len(read(forward)) > before, 20, "it goes on")
        assert "cancelled" in snapshot(tmp_path, "--cancel").output
        assert "left as it is" in snapshot(tmp_path, "--resume").output
    assert states(prepared) == {"thing": "cancelled"}
    ids = [it["id"] for it in forward.sink.details]
    assert len(ids) == len(set(ids)), "what was durable is not read again"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nobody"], "is not one table of legacy.tables"),
        (["--where", "id > 1"], "exactly one table"),
        (["thing", "--where", "price > 1"], 'column "price" does not exist'),
        (["thing", "--where", "true) ; DROP TABLE thing; --"], "cannot insert multiple commands"),
    ],
)
def test_what_is_not_understood_is_refused(prepared: Database, tmp_path: Path, arguments: list[str], said: str) -> None:
    result = snapshot(tmp_path, *arguments)
    assert result.exit_code == 2
    assert said in result.output
    assert states(prepared) == {}


def test_without_its_table_the_remedy_is_named(prepared: Database, tmp_path: Path) -> None:
    prepared.execute("DROP TABLE figbridge.snapshot")
    result = snapshot(tmp_path)
    assert result.exit_code == 2
    assert "figbridge init" in result.output
