"""The image, built and run as a sidecar beside a PostgreSQL on the host's network.

The base image is FIGBRIDGE_BASE_IMAGE, else a local `figbridge-base` or python:*-slim; nothing is pulled.
"""

import functools
import json
import os
import re
import socket
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from figbridge.demo.postgres import EmbeddedPostgres
from fixtures.clock import until
from fixtures.postgres import Database

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(600)]
# what the build may need to reach a package index, lent to it and not kept
LENT = {"pip.conf": Path("/etc/pip.conf"), "ca-certificates": Path("/etc/ssl/certs/ca-certificates.crt")}
CONFIG = """
legacy: {dsn: "${LEGACY_DSN}", tables: [public.thing]}
forward: {sink: {type: file, path: events.jsonl}}
http: {listen: "${FIGBRIDGE_LISTEN}"}
"""


ENVIRONMENT = {**os.environ, "DOCKER_BUILDKIT": "1"}


@functools.cache
def _client() -> str | None:
    """A docker client that can build with BuildKit: one with buildx, or one from before it was a plug-in."""
    for directory in os.get_exec_path():
        client = str(Path(directory) / "docker")
        if os.access(client, os.X_OK):
            help_text = subprocess.run(
                [client, "build", "--help"], capture_output=True, text=True, check=False, env=ENVIRONMENT
            )
            if "--secret" in help_text.stdout:
                return client
    return None


def docker(*arguments: str, check: bool = True) -> str:
    client = _client()
    assert client
    command = [client, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=560, env=ENVIRONMENT)
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout.strip()


def _base() -> str:
    if not (client := _client()):
        pytest.skip("no docker client here that builds with BuildKit (docker, and its plug-in buildx)")
    probe = subprocess.run(
        [client, "version", "--format", "{{.Server.Version}}"], capture_output=True, text=True, check=False
    )
    if probe.returncode:
        pytest.skip(f"no Docker engine answers: {probe.stderr.strip()[-200:]}")
    if given := os.environ.get("FIGBRIDGE_BASE_IMAGE"):
        return given
    images = docker("images", "--format", "{{.Repository}}:{{.Tag}}").splitlines()
    for image in images:
        if re.fullmatch(r"figbridge-base:\w+|(.*/)?python:3\.1[1-9]\S*-slim\S*", image):
            return image
    pytest.skip("no base image here: set FIGBRIDGE_BASE_IMAGE, or pull python:3.13-slim")


@pytest.fixture(scope="module")
def image() -> str:
    base = _base()
    pip_conf = os.environ.get("PIP_CONFIG_FILE")
    lent = LENT | ({"pip.conf": Path(pip_conf)} if pip_conf and Path(pip_conf).is_file() else {})
    secrets = [it for name, path in lent.items() if path.is_file() for it in ("--secret", f"id={name},src={path}")]
    proxies = [it for name in os.environ if name.lower().endswith("_proxy") for it in ("--build-arg", name)]
    docker(
        "build", "--network", "host", "--build-arg", f"BASE_IMAGE={base}", *secrets, *proxies, "-t", "figbridge:test",
        str(ROOT),
    )  # fmt: skip
    return "figbridge:test"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def database() -> Iterator[Database]:
    with EmbeddedPostgres() as server:
        yield Database(server, "postgres")


def test_the_image_runs_the_forward_path_as_a_sidecar(image: str, database: Database, tmp_path: Path) -> None:
    database.execute("CREATE TABLE thing (id int PRIMARY KEY)")
    config, data = tmp_path / "bridge.yaml", tmp_path / "data"
    config.write_text(CONFIG)
    data.mkdir()
    data.chmod(0o777)  # the image's user is not ours
    tmp_path.chmod(0o755)
    name = f"figbridge-{uuid.uuid4().hex[:8]}"
    common = [
        "--network", "host", "-e", f"LEGACY_DSN={database.dsn}", "-e", f"FIGBRIDGE_LISTEN=127.0.0.1:{_free_port()}",
        "-v", f"{config}:/etc/figbridge/bridge.yaml:ro", "-v", f"{data}:/var/lib/figbridge", "--read-only",
    ]  # fmt: skip
    docker("run", "--rm", *common, image, "init", "-c", "/etc/figbridge/bridge.yaml")
    docker("run", "-d", "--name", name, "--health-interval", "1s", *common, image)
    try:
        database.execute("INSERT INTO thing SELECT n FROM generate_series(1, 100) n")
        events = data / "events.jsonl"

        def log() -> str:
            return docker("logs", name, check=False)

        def ids() -> list[str]:
            return [json.loads(line)["id"] for line in events.read_bytes().splitlines()] if events.exists() else []

        until(lambda: events.exists() and events.read_bytes().count(b"\n") == 100, 60, log)
        health = "{{.State.Health.Status}}"
        until(lambda: docker("inspect", "-f", health, name) == "healthy", 60, log)
        assert docker("exec", name, "id", "-u") != "0"
        docker("stop", "-t", "25", name)
        assert docker("inspect", "-f", "{{.State.ExitCode}}", name) == "0", "SIGTERM did not reach the bridge"
        # it said how far it came before it ended: the next one repeats nothing and misses nothing
        database.execute("INSERT INTO thing VALUES (101)")
        docker("start", name)
        until(lambda: b'"id":101' in events.read_bytes(), 60, log)
        assert len(ids()) == len(set(ids())) == 101
    finally:
        docker("rm", "-f", name, check=False)
