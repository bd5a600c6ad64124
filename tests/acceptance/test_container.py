"""The image, built and run: as a sidecar beside a PostgreSQL on the host's network, and as deploy/kubernetes has it."""

import http.client
import json
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from psycopg.conninfo import conninfo_to_dict

from figbridge.demo.port import HeldPort
from figbridge.demo.postgres import EmbeddedPostgres
from fixtures.clock import until
from fixtures.container import ROOT, as_the_kubelet, bridge_in, build, docker, environment_of, manifests, resource
from fixtures.postgres import Database

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(600)]
CONFIG = """
legacy: {dsn: "${LEGACY_DSN}", tables: [public.thing]}
forward: {sink: {type: file, path: events.jsonl}}
http: {listen: "${FIGBRIDGE_LISTEN}"}
"""
FILE = "/etc/figbridge/bridge.yaml"


@pytest.fixture(scope="module")
def image() -> str:
    return build("figbridge:test")


@pytest.fixture
def database() -> Iterator[Database]:
    with EmbeddedPostgres() as server:
        yield Database(server, "postgres")


def log(container: str) -> str:
    return docker("logs", container, check=False)


def test_the_image_runs_the_forward_path_as_a_sidecar(image: str, database: Database, tmp_path: Path) -> None:
    database.execute("CREATE TABLE thing (id int PRIMARY KEY)")
    config, data = tmp_path / "bridge.yaml", tmp_path / "data"
    config.write_text(CONFIG)
    data.mkdir()
    data.chmod(0o777)  # the image's user is not ours
    tmp_path.chmod(0o755)
    name = f"figbridge-{uuid.uuid4().hex[:8]}"
    held = HeldPort()
    environment = {"LEGACY_DSN": database.dsn, "FIGBRIDGE_LISTEN": f"127.0.0.1:{held.number}"}
    common = [
        "--network", "host", *environment_of(environment), "-v", f"{config}:{FILE}:ro",
        "-v", f"{data}:/var/lib/figbridge", "--read-only",
    ]  # fmt: skip
    docker("run", "--rm", *common, image, "init", "-c", FILE)
    docker("run", "-d", "--name", name, "--health-interval", "1s", *common, image)
    try:
        database.execute("INSERT INTO thing SELECT n FROM generate_series(1, 100) n")
        events = data / "events.jsonl"

        def ids() -> list[str]:
            return [json.loads(line)["id"] for line in events.read_bytes().splitlines()] if events.exists() else []

        until(lambda: len(ids()) == 100, 60, lambda: log(name))
        health = "{{.State.Health.Status}}"
        until(lambda: docker("inspect", "-f", health, name) == "healthy", 60, lambda: log(name))
        assert docker("exec", name, "id", "-u") != "0"
        docker("stop", "-t", "25", name)
        assert docker("inspect", "-f", "{{.State.ExitCode}}", name) == "0", "SIGTERM did not reach the bridge"
        # it said how far it came before it ended: the next one repeats nothing and misses nothing
        database.execute("INSERT INTO thing VALUES (101)")
        docker("start", name)
        until(lambda: b'"id":101' in events.read_bytes(), 60, lambda: log(name))
        assert len(ids()) == len(set(ids())) == 101
    finally:
        docker("rm", "-f", name, check=False)


def test_what_a_configuration_needs_beyond_the_bridge_is_built_in(image: str) -> None:
    extended = build(f"{image}-extended", EXTRAS="crt", PACKAGES="idna attrs")

    docker("run", "--rm", "--entrypoint", "python3", extended, "-c", "import awscrt, idna, attrs")

    # under any number, in group 0, as OpenShift runs it
    docker("run", "--rm", "--user", "1000650000:0", "--entrypoint", "touch", image, "/var/lib/figbridge/events.jsonl")


# --- Kubernetes: its manifests, with the network of this machine and the AWS of the emulator

WORKLOADS = [("deployment", "Deployment", "figbridge"), ("sidecar", "StatefulSet", "legacy-postgres")]


class Amazon:
    """The emulator with the stack of deploy/cloudformation/bridge.yaml, and a consumer of what leaves."""

    def __init__(self, endpoint: str) -> None:
        self.environment = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
        }
        self._sqs = boto3.client("sqs", endpoint_url=endpoint)
        self._events = boto3.client("events", endpoint_url=endpoint)
        formation = boto3.client("cloudformation", endpoint_url=endpoint)
        template = (ROOT / "deploy" / "cloudformation" / "bridge.yaml").read_text()
        formation.create_stack(StackName="figbridge", TemplateBody=template, Capabilities=["CAPABILITY_IAM"])
        (stack,) = formation.describe_stacks(StackName="figbridge")["Stacks"]
        outputs = {it["OutputKey"]: it["OutputValue"] for it in stack["Outputs"]}
        self.bus, self.environment["REVERSE_QUEUE"] = outputs["BusName"], outputs["QueueUrl"]
        self._url = self._sqs.create_queue(QueueName="consumer")["QueueUrl"]
        arn = self._sqs.get_queue_attributes(QueueUrl=self._url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
        pattern = json.dumps({"source": [{"prefix": "legacy."}]})
        self._events.put_rule(Name="consumer", EventBusName=self.bus, EventPattern=pattern)
        self._events.put_targets(Rule="consumer", EventBusName=self.bus, Targets=[{"Id": "1", "Arn": arn}])

    def publish(self, detail_type: str, detail: dict[str, object]) -> None:
        text = json.dumps(detail)
        result = self._events.put_events(
            Entries=[{"EventBusName": self.bus, "Source": "shop.next", "DetailType": detail_type, "Detail": text}]
        )
        assert result["FailedEntryCount"] == 0

    def consume(self) -> list[str]:
        """The detail-types of the events that have left since the last call."""
        taken: list[str] = []
        while messages := self._sqs.receive_message(QueueUrl=self._url, MaxNumberOfMessages=10).get("Messages"):
            for it in messages:
                self._sqs.delete_message(QueueUrl=self._url, ReceiptHandle=it["ReceiptHandle"])
                taken.append(json.loads(it["Body"])["detail-type"])
        return taken


def get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    except OSError as error:
        return 0, str(error)
    finally:
        connection.close()


@pytest.mark.filterwarnings("ignore:Tried to parse AWS..SQS..QueuePolicy:UserWarning")
@pytest.mark.parametrize("workload", WORKLOADS, ids=[manifest for manifest, _, _ in WORKLOADS])
def test_the_image_runs_both_directions_as_kubernetes_would(
    image: str, workload: tuple[str, str, str], database: Database, aws_endpoint: str, tmp_path: Path
) -> None:
    manifest, kind, workload_name = workload
    documents = [*manifests("configuration"), *manifests("init")]
    amazon, held = Amazon(aws_endpoint), HeldPort()
    port = held.number
    (tmp_path / "bridge.yaml").write_text(resource(documents, "ConfigMap")["data"]["bridge.yaml"])
    tmp_path.chmod(0o755)
    bridge = bridge_in(resource(manifests(manifest), kind, workload_name))
    job = bridge_in(resource(documents, "Job", "figbridge-init"))
    network = ["--network", "host", "--add-host", "legacy-postgres:127.0.0.1"]
    network += environment_of({"PGPORT": str(conninfo_to_dict(database.dsn)["port"])})
    here = environment_of({"FIGBRIDGE_LISTEN": f"127.0.0.1:{port}", **amazon.environment})
    options = [*as_the_kubelet(bridge, documents, tmp_path), *network, *here]
    database.execute("CREATE DATABASE shop")
    shop = Database(database.server, "shop")
    shop.execute("CREATE SCHEMA shop")
    shop.execute("CREATE TABLE shop.orders (id int PRIMARY KEY, status text)")
    shop.execute("CREATE TABLE shop.widgets (id int PRIMARY KEY)")

    # with the role that owns the tables; then the rights that a role needs which owns nothing
    docker("run", "--rm", *as_the_kubelet(job, documents, tmp_path), *network, image, *job["args"])
    script = docker("run", "--rm", *options, image, "init", "--print-sql", "-c", FILE)
    for line in re.findall(r"^-- ((?:CREATE ROLE|GRANT) .*;)$", script, re.MULTILINE):
        shop.execute(line)
    docker("run", "--rm", *options, image, "check", "-c", FILE)
    name = f"figbridge-{uuid.uuid4().hex[:8]}"
    docker("run", "-d", "--name", name, *options, image, *bridge.get("args", []))
    try:
        until(lambda: get(port, bridge["livenessProbe"]["httpGet"]["path"])[0] == 200, 60, lambda: log(name))
        until(lambda: get(port, "/readyz")[0] == 200, 60, lambda: log(name))
        docker("exec", name, "figbridge", "check", "-c", FILE)  # as `kubectl exec` does, beside the bridge at work
        shop.execute("INSERT INTO shop.orders VALUES (1, 'new')")
        amazon.publish("order.status-changed", {"order_id": 1, "status": "paid", "change_id": "c1"})
        status = "SELECT status FROM shop.orders WHERE id = 1"
        until(lambda: shop.execute(status) == [("paid",)], 60, lambda: log(name))
        shop.execute("DELETE FROM shop.orders")
        left: list[str] = []

        def deleted() -> bool:
            left.extend(amazon.consume())
            return "orders.deleted" in left

        until(deleted, 60, lambda: log(name))
        assert left == ["orders.inserted", "orders.deleted"]  # what came from the new system did not go back to it
        metrics = get(port, "/metrics")[1]
        assert 'figbridge_reverse_events_total{outcome="applied"' in metrics
        assert 'figbridge_ready{part="reverse"} 1.0' in metrics
        docker("stop", "-t", "25", name)
        assert docker("inspect", "-f", "{{.State.ExitCode}}", name) == "0", log(name)
    finally:
        docker("rm", "-f", name, check=False)
