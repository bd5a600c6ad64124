"""`figbridge snapshot` against a running bridge: orders by rows of figbridge.snapshot."""

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Self, get_args

import pytest
from click.testing import CliRunner, Result

from figbridge import cli
from figbridge.forward.snapshot.progress import State
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


@pytest.mark.parametrize(
    "options",
    ["--pause --resume", "--cancel --pause", "--pause --status", "thing --status --where true", "--pause --where true"],
)
@pytest.mark.usefixtures("prepared")
def test_options_that_contradict_each_other(tmp_path: Path, options: str) -> None:
    refused = snapshot(tmp_path, *options.split())
    assert refused.exit_code == 2
    assert "Usage" in refused.output
    assert snapshot(tmp_path, "--status").output == "there is none\n"


def test_all_tables_then_one_with_a_condition(prepared: Database, tmp_path: Path) -> None:
    assert snapshot(tmp_path, "--status").output == "there is none\n"
    asked = snapshot(tmp_path)
    assert asked.output == "public.thing: asked for\npublic.other: asked for\n"
    refused = snapshot(tmp_path, "thing")
    assert (refused.exit_code, refused.output.count("that has not ended")) == (1, 1)
    with Forward(prepared, snapshot=()) as forward:
        followed = snapshot(tmp_path, "thing", "--status", "--follow")
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


def test_a_condition_is_tried_under_the_settings_that_it_is_read_with(prepared: Database, tmp_path: Path) -> None:
    prepared.execute(f"ALTER DATABASE {prepared.name} SET datestyle = 'SQL, DMY'")
    result = snapshot(tmp_path, "thing", "--where", "'31/12/2025'::date < now()")
    assert (result.exit_code, states(prepared)) == (2, {})
    assert "date/time field value out of range" in result.output
    prepared.execute(f"ALTER DATABASE {prepared.name} SET timezone = 'Asia/Tokyo'")
    utc = "'2026-01-01'::timestamptz = '2026-01-01 00:00+00'"
    with Forward(prepared, snapshot=()) as forward:
        assert snapshot(tmp_path, "thing", "--where", f"id = 7 AND {utc}").exit_code == 0
        finished(forward, "thing")
        until(lambda: read(forward) == [("thing", 7)], 10, "a time without a zone is UTC")


def test_without_its_table_the_remedy_is_named(prepared: Database, tmp_path: Path) -> None:
    prepared.execute("DROP TABLE figbridge.snapshot")
    result = snapshot(tmp_path)
    assert result.exit_code == 2
    assert "figbridge init" in result.output


def test_a_slot_guard_that_is_in_the_file_already_is_no_remedy(prepared: Database, tmp_path: Path) -> None:
    path = tmp_path / "bridge.yaml"
    path.write_text(path.read_text().replace("snapshot: initial", "slot-guard: table"))
    prepared.execute("DROP TABLE figbridge.snapshot")
    result = snapshot(tmp_path)
    assert "remedy: run `figbridge init`" in result.output
    assert "slot-guard" not in result.output
    path.write_text(path.read_text().replace("slot-guard: table", "slot-guard: none"))
    assert "set forward.snapshot" in snapshot(tmp_path).output


def test_a_table_that_is_refused_keeps_no_other_from_being_ordered(prepared: Database, tmp_path: Path) -> None:
    assert snapshot(tmp_path, "thing").exit_code == 0
    both = snapshot(tmp_path, "thing", "other")
    assert both.exit_code == 1
    assert "public.other: asked for" in both.output
    assert states(prepared) == {"thing": "waiting", "other": "waiting"}


def test_status_and_follow_are_about_the_tables_that_are_named(prepared: Database, tmp_path: Path) -> None:
    assert snapshot(tmp_path).exit_code == 0
    with Forward(prepared, snapshot=()) as forward:
        finished(forward, "thing", "other")
    assert snapshot(tmp_path, "thing", "--status").output.count("\n") == 1
    assert snapshot(tmp_path, "--status").output.count("\n") == 2
    unknown = snapshot(tmp_path, "nobody", "--status")
    assert unknown.exit_code == 2
    assert "is not one table of legacy.tables" in unknown.output
    for state in ("failed", "waiting"):
        prepared.execute("UPDATE figbridge.snapshot SET state = %s WHERE table_name = 'other'", [state])
        followed = snapshot(tmp_path, "thing", "--status", "--follow")
        assert followed.exit_code == 0
        assert "other" not in followed.output
    prepared.execute("UPDATE figbridge.snapshot SET state = 'failed' WHERE table_name = 'other'")
    assert snapshot(tmp_path, "--status", "--follow").exit_code == 1


@pytest.mark.parametrize(
    ("thing", "other", "asked"),
    [("paused", "done", []), ("waiting", "paused", ["thing"]), ("running", "waiting", ["thing"])],
)
def test_only_of_a_table_that_should_be_at_work_it_is_asked_whether_a_bridge_runs(
    prepared: Database, tmp_path: Path, thing: str, other: str, asked: list[str]
) -> None:
    assert snapshot(tmp_path).exit_code == 0
    for table, state in (("thing", thing), ("other", other)):
        prepared.execute(
            "UPDATE figbridge.snapshot SET state = %s, updated_at = now() - interval '2 hours' WHERE table_name = %s",
            [state, table],
        )
    lines = snapshot(tmp_path, "--status").output.splitlines()
    assert [
        table for table in ("thing", "other") for it in lines if f".{table}:" in it and "bridge run?" in it
    ] == asked


def test_in_a_terminal_there_is_a_bar_with_rows_rate_and_estimated_end(prepared: Database, tmp_path: Path) -> None:
    with Forward(prepared, snapshot=(), rate=3000) as forward, Terminal(tmp_path, "thing") as terminal:
        until(lambda: "rows/s" in terminal.shown, 30, lambda: terminal.shown)
        assert terminal.wait() == 0
        finished(forward, "thing")
    assert "thing: asked for" in terminal.shown
    assert "━" in terminal.shown, "the bar"
    assert re.search(r"[1-8],\d{3} rows of about 9,000 [\d,]+ rows/s \d:\d\d:\d\d", terminal.shown), terminal.shown
    assert "9,000 rows of about 9,000 done 0:00:00" in terminal.shown


def test_whoever_leaves_the_terminal_stops_nothing(prepared: Database, tmp_path: Path) -> None:
    """And where no bridge runs, no more than that it waits can be said."""
    with Terminal(tmp_path) as terminal:
        until(lambda: "waiting" in terminal.shown, 30, lambda: terminal.shown)
        terminal.interrupt()
        assert terminal.wait() == 130
    assert "the snapshot goes on" in terminal.shown
    assert states(prepared) == {"thing": "waiting", "other": "waiting"}


class Terminal:
    """`figbridge snapshot` as a process under a pseudo terminal."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self._command = [
            sys.executable,
            "-m",
            "figbridge",
            "snapshot",
            "-c",
            str(directory / "bridge.yaml"),
            *arguments,
        ]
        self._written = b""

    def __enter__(self) -> Self:
        self._ours, theirs = pty.openpty()
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "160", "LINES": "40"}
        self._process = subprocess.Popen(
            self._command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
        )
        os.close(theirs)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join(10)
        os.close(self._ours)

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # EIO: nobody has the other end any more
            while part := os.read(self._ours, 65536):
                self._written += part

    @property
    def shown(self) -> str:
        """All that was ever on the screen, without colours and cursor movements."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self._written.decode(errors="replace"))

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def wait(self) -> int:
        status = self._process.wait(30)
        self._reader.join(10)
        return status


def test_metrics_say_how_far_each_table_is(prepared: Database, tmp_path: Path) -> None:
    prepared.execute("DROP TABLE other")
    with Forward(prepared, snapshot=[("public", "thing"), ("public", "other")], rate=2000) as forward:

        def state(table: str) -> list[str]:
            all_ = [*get_args(State)]
            return [it for it in all_ if forward.metric("forward_snapshot_state", table=table, state=it) == 1]

        thing = "public.thing"
        until(lambda: state(thing) == ["running"], 20, lambda: f"{state(thing)}")
        assert forward.metric("forward_snapshot_estimated_rows", table=thing) == 9000
        until(lambda: forward.metric("forward_snapshot_durable_rows", table=thing) > 0, 20)
        snapshot(tmp_path, "thing", "--pause")
        until(lambda: state(thing) == ["paused"], 20, lambda: f"{state(thing)}")
        until(lambda: state("public.other") == ["failed"], 20, lambda: f"{state('public.other')}")
        assert forward.metric("forward_snapshot_failures_total") == 1
        snapshot(tmp_path, "thing", "--resume")
        until(lambda: state(thing) == ["done"], 20, lambda: f"{state(thing)}")
        assert forward.metric("forward_snapshot_durable_rows", table=thing) == 9000
        assert forward.metric("forward_snapshot_rows_total", table=thing) == 9000
        forward.windows.streaming = False  # as while another replica has the slot, and says how far it is
        until(lambda: not state(thing), 20, lambda: f"{state(thing)}")


def test_metrics_of_a_table_say_what_is_ordered_while_another_is_read(prepared: Database, tmp_path: Path) -> None:
    with Forward(prepared, snapshot=[("public", "thing")], rate=100) as forward:  # for 90 s
        until(lambda: read(forward), 20, "the first chunk")
        for order, state in [((), "waiting"), (("--pause",), "paused"), (("--cancel",), "cancelled")]:
            snapshot(tmp_path, "other", *order)
            about = {"table": "public.other", "state": state}
            until(partial(forward.metric, "forward_snapshot_state", **about), 10, state)
        assert states(prepared) == {"thing": "running", "other": "cancelled"}


def test_a_table_that_failed_is_read_when_that_is_ordered(prepared: Database, tmp_path: Path) -> None:
    """Not by a restart; its message says so."""
    role = f"{prepared.name}_role"
    prepared.execute(
        f"CREATE ROLE {role} LOGIN REPLICATION; GRANT USAGE ON SCHEMA figbridge TO {role}; "
        f"GRANT ALL ON ALL TABLES IN SCHEMA figbridge TO {role}"
    )
    dsn = f"{prepared.dsn} user={role}"
    try:
        with Forward(prepared, snapshot=[("public", "other")], dsn=dsn):
            until(lambda: states(prepared) == {"other": "failed"}, 20, lambda: f"{states(prepared)}")
        prepared.execute(f"GRANT SELECT ON other TO {role}")
        status = snapshot(tmp_path, "--status").output
        assert "permission denied" in status
        (remedy,) = re.findall(r"`figbridge snapshot (\S+)`", status)
        with Forward(prepared, snapshot=[("public", "other")], dsn=dsn) as forward:
            snapshot(tmp_path, remedy)
            finished(forward, "other")
            until(lambda: read(forward) == [("other", 1)], 10)
    finally:
        prepared.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
