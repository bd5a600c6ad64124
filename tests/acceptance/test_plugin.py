"""A sink of another package, installed by pip and named in the file: docs/plugins.md."""

import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fixtures.bridge import Bridge
from fixtures.clock import until
from fixtures.postgres import Database

PACKAGE = Path(__file__).parents[1] / "plugin"
CONFIG = """
legacy: {dsn: "${LEGACY_DSN}", slot: %(slot)s, tables: [public.thing]}
forward:
  sink: %(sink)s
http: {listen: "${HTTP_LISTEN:-127.0.0.1:0}"}
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where the package is, as pip has put it there; nothing is downloaded."""
    target = tmp_path_factory.mktemp("plugin")
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(PACKAGE)], check=True
    )
    return str(target)


class Receiver:
    """Takes what is posted; `script` has the statuses of the next answers."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.script: deque[int] = deque()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status = receiver.script.popleft() if body and receiver.script else 204
                if status < 300:
                    receiver.lines += map(json.loads, body.splitlines())
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Not into the tests' output."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/events"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


def written(directory: Path, slot: str, sink: str) -> Path:
    config = directory / "bridge.yaml"
    config.write_text(CONFIG % {"slot": slot, "sink": sink})
    return config


def figbridge(command: str, config: Path, dsn: str, path: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LEGACY_DSN": dsn, "PYTHONPATH": path}
    arguments = [sys.executable, "-m", "figbridge", command, "-c", str(config)]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_bridge_publishes_through_it(database: Database, tmp_path: Path, installed: str, receiver: Receiver) -> None:
    database.execute("CREATE TABLE thing (id int PRIMARY KEY)")
    config = written(tmp_path, database.slot, f'{{type: webhook, url: "{receiver.url}", lines: 7}}')
    for command in ("init", "check"):
        done = figbridge(command, config, database.dsn, installed)
        assert done.returncode == 0, done.stdout + done.stderr
    bridge = Bridge(config, tmp_path / "log", environment={"LEGACY_DSN": database.dsn, "PYTHONPATH": installed})
    with bridge:
        bridge.until_ready()
        receiver.script += [503, 429]  # which its sink calls unavailable: the bridge tries again
        database.execute("INSERT INTO thing SELECT generate_series(1, 50)")
        until(lambda: len(receiver.lines) >= 50, 20, lambda: bridge.log)
        assert bridge.metric('figbridge_forward_published_total{sink="webhook"}') == 50
        assert bridge.terminate() == 0
    assert [it["detail"]["key"]["id"] for it in receiver.lines] == list(range(1, 51))
    assert {it["detail-type"] for it in receiver.lines} == {"thing.inserted"}
    assert not receiver.script


def test_its_options_are_validated_by_itself_with_all_other_problems(tmp_path: Path, installed: str) -> None:
    config = written(tmp_path, "UPPER", "{type: webhook, url: nonsense, timeout: -1, lnes: 3}")
    done = figbridge("check", config, "host=nowhere", installed)
    assert done.returncode == 2
    for said in (
        "legacy.slot",
        "forward.sink.url", "is not a URL",
        "forward.sink.timeout", "greater than 0",
        "forward.sink.lnes", "known here: lines, timeout, type, url",
    ):  # fmt: skip
        assert said in done.stderr
    assert "nonsense" not in done.stderr, "a value may be a password"


def test_where_it_is_not_installed_its_type_is_unknown(tmp_path: Path) -> None:
    done = figbridge("check", written(tmp_path, "slot", "{type: webhook, url: x}"), "host=nowhere", "")
    assert done.returncode == 2
    assert "unknown type" in done.stderr
    assert "eventbridge" in done.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("raise RuntimeError('broken')", "cannot be imported"),
        ("Thing = 3", "no section"),
        (None, "cannot be imported"),
    ],
)
def test_a_package_that_is_broken_is_a_problem_of_the_file(tmp_path: Path, content: str | None, said: str) -> None:
    about = tmp_path / "broken-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[figbridge.sinks]\nbroken = broken_sink:Thing\n")
    if content is not None:
        (tmp_path / "broken_sink.py").write_text(content)
    done = figbridge("check", written(tmp_path, "slot", "{type: broken}"), "host=nowhere", str(tmp_path))
    assert done.returncode == 2
    assert "forward.sink" in done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_no_package_takes_the_place_of_a_type_of_ours(tmp_path: Path) -> None:
    about = tmp_path / "greedy-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: greedy\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[figbridge.sinks]\nfile = greedy_sink:Thing\n")
    (tmp_path / "greedy_sink.py").write_text("raise RuntimeError('imported')")
    done = figbridge("check", written(tmp_path, "slot", "{type: file}"), "host=nowhere", str(tmp_path))
    assert done.returncode == 2
    assert "forward.sink.path" in done.stderr
    assert "imported" not in done.stderr
