"""What is wrong is said at once, all of it, with a remedy and exit status 2; what passes by itself is waited for."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import boto3
import psycopg
import pytest

from figbridge.demo.postgres import EmbeddedPostgres
from fixtures.bridge import Bridge
from fixtures.clock import until
from fixtures.postgres import Database

FORWARD = """
legacy: {dsn: "${LEGACY_DSN}", slot: %(slot)s, publication: fig, tables: [%(tables)s]}
forward:
  sink: %(sink)s
http: {listen: "${HTTP_LISTEN:-127.0.0.1:0}"}
"""


def figbridge(command: str, config: Path, dsn: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LEGACY_DSN": dsn}
    arguments = [sys.executable, "-m", "figbridge", command, "-c", str(config)]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120, check=False)


def written(path: Path, *, slot: str = "fig", tables: str = "public.thing", sink: str | None = None) -> Path:
    sink = sink or f'{{type: file, path: "{path / "events.jsonl"}"}}'
    config = path / "bridge.yaml"
    config.write_text(FORWARD % {"slot": slot, "tables": tables, "sink": sink})
    return config


def test_every_mistake_of_a_file_is_named_at_once(tmp_path: Path) -> None:
    config = tmp_path / "bridge.yaml"
    config.write_text(
        "legacy: {dsn: '${NOBODY_SET_THIS}', slots: x, tables: [thing]}\n"
        "forward: {sink: {type: eventbridge, bsu: orders}}\n"
    )
    done = figbridge("run", config, "")
    assert done.returncode == 2
    for field in ("legacy.dsn", "legacy.slots", "legacy.tables", "forward.sink.bsu", "forward.sink.bus"):
        assert field in done.stderr
    assert "NOBODY_SET_THIS" in done.stderr
    assert "did you mean" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["init", "run", "check"])
def test_a_file_that_is_not_there(tmp_path: Path, command: str) -> None:
    done = figbridge(command, tmp_path / "none.yaml", "")
    assert done.returncode == 2
    assert "none.yaml" in done.stderr
    assert "remedy" in done.stderr


def test_a_server_without_logical_wal(tmp_path: Path) -> None:
    with EmbeddedPostgres(settings={"wal_level": "replica"}) as server:
        done = figbridge("init", written(tmp_path), server.dsn())
    assert done.returncode == 2
    assert "wal_level" in done.stderr
    assert "ALTER SYSTEM" in done.stderr


def test_a_table_that_does_not_exist_and_one_without_identity_are_both_named(
    each_database: Database, tmp_path: Path
) -> None:
    each_database.execute("CREATE TABLE keyless (id int)")
    done = figbridge("init", written(tmp_path, tables="public.keyless, public.absent"), each_database.dsn)
    assert done.returncode == 2
    assert "public.absent" in done.stderr
    assert "public.keyless" in done.stderr
    assert "REPLICA IDENTITY" in done.stderr
    # and nothing was done by halves
    assert each_database.execute("SELECT count(*) FROM pg_publication") == [(0,)]


def test_running_before_init_says_what_to_do(database: Database, tmp_path: Path) -> None:
    database.execute("CREATE TABLE thing (id int PRIMARY KEY)")
    done = figbridge("run", written(tmp_path), database.dsn)
    assert done.returncode == 2
    assert "figbridge init" in done.stderr


def test_a_bus_that_does_not_exist(database: Database, tmp_path: Path, aws_endpoint: str) -> None:
    database.execute("CREATE TABLE thing (id int PRIMARY KEY)")
    config = written(
        tmp_path,
        slot=database.slot,
        sink=f"{{type: eventbridge, bus: nobodys, region: eu-west-1, endpoint_url: '{aws_endpoint}'}}",
    )
    assert figbridge("init", config, database.dsn).returncode == 0
    done = figbridge("run", config, database.dsn)
    assert done.returncode == 2
    assert "nobodys" in done.stderr
    assert "remedy" in done.stderr

    boto3.client("events", endpoint_url=aws_endpoint).create_event_bus(Name="nobodys")
    assert figbridge("check", config, database.dsn).returncode == 0


def test_a_queue_that_does_not_exist(database: Database, tmp_path: Path, aws_endpoint: str) -> None:
    database.execute("CREATE TABLE thing (id int PRIMARY KEY, status text)")
    config = written(tmp_path, slot=database.slot)
    with config.open("a") as file:
        file.write(f"""
reverse:
  source: {{type: sqs, queue_url: "{aws_endpoint}/1234/nobodys", region: eu-west-1, endpoint_url: "{aws_endpoint}"}}
  mappings:
    - {{match: {{source: new, detail-type: x}}, into: public.thing, action: insert, set: {{id: detail.id}}}}
""")
    assert figbridge("init", config, database.dsn).returncode == 0
    done = figbridge("run", config, database.dsn)
    assert done.returncode == 2
    assert "nobodys" in done.stderr
    assert "remedy" in done.stderr


def test_a_second_bridge_waits_for_the_slot_and_takes_over(each_database: Database, tmp_path: Path) -> None:
    each_database.execute("CREATE TABLE thing (id int PRIMARY KEY)")
    config = written(tmp_path, slot=each_database.slot)
    assert figbridge("init", config, each_database.dsn).returncode == 0
    environment = {"LEGACY_DSN": each_database.dsn}
    events = tmp_path / "events.jsonl"
    with (
        Bridge(config, tmp_path / "first.log", environment=environment) as first,
        Bridge(config, tmp_path / "second.log", environment=environment) as second,
    ):
        until(lambda: first.get("/readyz")[0] == 200 or second.get("/readyz")[0] == 200, 20, lambda: first.log)
        works, waits = (first, second) if first.get("/readyz")[0] == 200 else (second, first)
        each_database.execute("INSERT INTO thing VALUES (1)")
        until(lambda: events.exists() and events.read_bytes().count(b"\n") == 1, 10, lambda: works.log)
        until(lambda: "is in use" in waits.log, 20, lambda: waits.log)
        assert waits.running
        assert waits.get("/livez")[0] == 200
        assert waits.get("/readyz")[0] == 503

        works.end()
        waits.until_ready(20)
        each_database.execute("INSERT INTO thing VALUES (2)")
        until(lambda: events.read_bytes().count(b"\n") >= 2, 30, lambda: waits.log)
        assert waits.terminate() == 0


def test_a_database_that_is_not_up_yet_is_waited_for(tmp_path: Path) -> None:
    with EmbeddedPostgres() as server:
        config = written(tmp_path, tables="public.thing")
        init = "CREATE TABLE thing (id int PRIMARY KEY)"
        Database(server, "postgres").execute(init)
        assert figbridge("init", config, server.dsn()).returncode == 0
        server.stop()
        with Bridge(config, tmp_path / "log", environment={"LEGACY_DSN": server.dsn()}) as bridge:
            until(lambda: "retrying" in bridge.log, 20, lambda: bridge.log)
            assert bridge.running
            server.start()
            bridge.until_ready()
            assert bridge.terminate() == 0


@pytest.mark.parametrize(
    "arguments", [["--help"], ["schema", "config"], ["init", "--print-sql"], ["init"], ["check"], ["check", "--json"]]
)
def test_standard_output_that_takes_nothing_more(database: Database, tmp_path: Path, arguments: list[str]) -> None:
    database.execute("CREATE TABLE thing (id int PRIMARY KEY)")
    written(tmp_path, slot=database.slot)
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "figbridge", *arguments],
            cwd=tmp_path,
            env={**os.environ, "LEGACY_DSN": database.dsn},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-2:] == [
        "figbridge: standard output cannot be written: No space left on device",
        "  remedy: make room where it leads; what the command did until then is done",
    ]
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_an_init_that_is_ended_while_it_waits_leaves_no_slot(database: Database, tmp_path: Path) -> None:
    database.execute("CREATE TABLE thing (id int PRIMARY KEY)")
    config = written(tmp_path, slot=database.slot)
    waits = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'figbridge-init' AND datname = %s"
    with psycopg.connect(database.dsn) as open_one:
        open_one.execute("INSERT INTO thing VALUES (1)")
        init = subprocess.Popen(
            [sys.executable, "-m", "figbridge", "init", "-c", str(config)],
            env={**os.environ, "LEGACY_DSN": database.dsn},
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            until(lambda: database.execute(f"{waits} AND wait_event = 'transactionid'", [database.name]) == [(1,)], 60)
            init.send_signal(signal.SIGTERM)
            _, said = init.communicate(timeout=60)
        finally:
            init.kill()
            init.communicate()
    assert init.returncode == 1
    assert "Traceback" not in said
    until(lambda: database.execute(waits, [database.name]) == [(0,)], 60)
    slots = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = %s"
    assert database.execute(slots, [database.slot]) == [(0,)]
