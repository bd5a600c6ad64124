"""What stands in deploy/ and in the Dockerfile, held against the code: files, series, ports, probes, permissions."""

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from prometheus_client import Metric
from pydantic import BaseModel

from figbridge.config import Config, EventBridgeSinkSection, HttpSection, SqsSourceSection
from figbridge.metrics import Metrics
from figbridge.service import GRACE

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
TEMPLATE = DEPLOY / "cloudformation" / "bridge.yaml"
ENVIRONMENT = {
    "LEGACY_DSN": "host=db",
    "REVERSE_QUEUE": "https://sqs.test/1/queue",
    "FIGBRIDGE_LISTEN": "0.0.0.0:9464",
}


class _Tags(yaml.SafeLoader):
    """CloudFormation's short functions (!Ref, !GetAtt) as their plain values."""


_Tags.add_multi_constructor("!", lambda _loader, _suffix, node: node.value)


def load(path: Path) -> list[Any]:
    return list(yaml.load_all(path.read_text(), _Tags))


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.yaml")), ids=lambda path: path.name)
def test_every_file_is_yaml(path: Path) -> None:
    assert all(load(path))


# --- the example


def _keys(schema: Mapping[str, Any]) -> set[str]:
    """Every setting that the JSON Schema knows, at any level."""
    return {key for node in [schema, *schema["$defs"].values()] for key in node["properties"]}


def _different(section: BaseModel, where: str = "") -> dict[str, Any]:
    """Field → value of everything in `section` that has a default and is not at it."""
    found: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            found |= _different(value, f"{where}{name}.")
        elif not field.is_required() and value != field.get_default(call_default_factory=True):
            found[where + name] = value
    return found


def test_the_example_is_a_configuration() -> None:
    config = Config.parse((DEPLOY / "examples" / "bridge.yaml").read_text(), ENVIRONMENT | {"FIGBRIDGE_LISTEN": ""})

    assert config.forward
    assert isinstance(config.forward.sink, EventBridgeSinkSection)
    assert config.reverse
    assert isinstance(config.reverse.source, SqsSourceSection)
    assert {mapping.action for mapping in config.reverse.mappings} == {"insert", "update"}
    assert config.http == HttpSection()


def test_the_example_names_every_setting_there_is() -> None:
    text = (DEPLOY / "examples" / "bridge.yaml").read_text()

    missing = {
        key for key in _keys(Config.model_json_schema(by_alias=True)) if not re.search(rf"(?<![\w-]){key}:", text)
    }

    assert missing == set()


def test_the_example_shows_each_setting_at_its_default() -> None:
    config = Config.parse((DEPLOY / "examples" / "bridge.yaml").read_text(), ENVIRONMENT | {"FIGBRIDGE_LISTEN": ""})

    assert _different(config) == {
        "forward.sink.region": "eu-west-1",  # there is no region that fits everyone
        "forward.outbox.message_prefix": "outbox",  # nor an outbox
        "reverse.source.region": "eu-west-1",
    }


# --- Prometheus


def _metrics() -> list[Metric]:
    return list(Metrics().registry.collect())


def _series() -> dict[str, Metric]:
    """Name as Prometheus stores it → its family. A counter's ends in _total, a histogram has three."""
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}
    return {metric.name + suffix: metric for metric in _metrics() for suffix in suffixes.get(metric.type, [""])}


def _rules() -> list[dict[str, Any]]:
    (alerts,) = load(DEPLOY / "prometheus" / "alerts.yaml")
    return [rule for group in alerts["groups"] for rule in group["rules"]]


@pytest.mark.parametrize("rule", _rules(), ids=lambda rule: rule["alert"])
def test_an_alert_uses_series_that_exist_and_says_what_to_do(rule: dict[str, Any]) -> None:
    used = set(re.findall(r"\bfigbridge_\w+", rule["expr"]))

    assert used
    assert used <= _series().keys()
    assert rule["annotations"]["summary"]
    assert rule["annotations"]["description"]
    mentioned = {name for text in rule["annotations"].values() for name in re.findall(r"\bfigbridge_\w+", text)}
    assert mentioned <= _series().keys()


def test_alerts_select_and_group_by_labels_that_exist() -> None:
    families = vars(Metrics()).values()
    labels = {f.describe()[0].name: set(f._labelnames) for f in families if hasattr(f, "_labelnames")}
    for rule in _rules():
        for name, selected in re.findall(r"\b(figbridge_\w+)\{([^}]*)\}", rule["expr"]):
            family = _series()[name].name
            assert set(re.findall(r'(\w+)="', selected)) <= labels[family], rule["alert"]
        grouped = {label for group in re.findall(r"by \(([^)]*)\)", rule["expr"]) for label in group.split(", ")}
        used = {_series()[name].name for name in re.findall(r"\bfigbridge_\w+", rule["expr"])}
        assert grouped <= {"job", "le"}.union(*(labels[name] for name in used)), rule["alert"]


def test_alerts_select_outcomes_that_are_counted() -> None:
    (outcomes,) = [metric for metric in _metrics() if metric.name == "figbridge_reverse_events"]
    known = set(re.findall(r"\w+", outcomes.documentation.partition(":")[2]))

    selected = {value for rule in _rules() for value in re.findall(r'outcome="(\w+)"', rule["expr"])}

    assert selected
    assert selected <= known


def test_prometheus_scrapes_where_the_bridge_listens() -> None:
    (prometheus,) = load(DEPLOY / "prometheus" / "prometheus.yaml")
    (job,) = prometheus["scrape_configs"]

    assert job["static_configs"] == [{"targets": [f"figbridge:{HttpSection().address[1]}"]}]
    assert "metrics_path" not in job  # the default is /metrics
    assert all((DEPLOY / "prometheus" / name).is_file() for name in prometheus["rule_files"])


def test_an_alert_is_for_each_bridge_whatever_its_job_is_called() -> None:
    for rule in _rules():
        assert "job=" not in rule["expr"], rule["alert"]
        aggregated = re.findall(r"\b(?:sum|max|min|count) (by \([^)]*\))?", rule["expr"])
        assert aggregated, rule["alert"]
        assert all("job" in by for by in aggregated), rule["alert"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool")
def test_alerts_fire_when_they_should() -> None:
    done = subprocess.run(
        ["promtool", "test", "rules", DEPLOY / "prometheus" / "alerts_test.yaml"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


# --- containers


def _pods() -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{path.stem}/{document['kind']}", document["spec"]["template"]["spec"])
        for path in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
        for document in load(path)
        if "template" in document.get("spec", {})
    ]


PODS = _pods()
RUNNING = [(name, pod) for name, pod in PODS if not name.endswith("/Job")]


def _container(pod: dict[str, Any]) -> dict[str, Any]:
    (found,) = [container for container in pod["containers"] if container["image"].startswith("figbridge:")]
    return dict(found)


def test_the_bridge_stands_in_every_kind_of_pod() -> None:
    assert [name for name, _ in PODS] == ["deployment/Deployment", "init/Job", "sidecar/StatefulSet"]


@pytest.mark.parametrize("pod", [pod for _, pod in PODS], ids=[name for name, _ in PODS])
def test_a_pod_runs_the_bridge_without_any_privilege(pod: dict[str, Any]) -> None:
    container = _container(pod)
    security = pod.get("securityContext", {}) | container["securityContext"]

    assert security["runAsNonRoot"] is True
    assert f"USER {security['runAsUser']}:" in (ROOT / "Dockerfile").read_text()
    assert security["readOnlyRootFilesystem"] is True
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounted["/etc/figbridge"]]["configMap"] == {"name": "figbridge"}
    assert '"/etc/figbridge/bridge.yaml"' in (ROOT / "Dockerfile").read_text()


@pytest.mark.parametrize("pod", [pod for _, pod in RUNNING], ids=[name for name, _ in RUNNING])
def test_a_pods_probes_ask_where_the_bridge_answers(pod: dict[str, Any]) -> None:
    container = _container(pod)
    probes = {kind: container[kind]["httpGet"] for kind in ("livenessProbe", "readinessProbe") if kind in container}
    environment = {each["name"]: each["value"] for each in container["env"]}
    _, port = HttpSection(listen=environment["FIGBRIDGE_LISTEN"]).address

    assert container["ports"] == [{"name": "http", "containerPort": HttpSection().address[1]}]
    assert port == HttpSection().address[1]
    assert probes["livenessProbe"] == {"path": "/livez", "port": "http"}
    assert probes.get("readinessProbe", {"path": "/readyz", "port": "http"}) == {"path": "/readyz", "port": "http"}
    assert pod["terminationGracePeriodSeconds"] >= GRACE + 5  # a halted loop gets five more


def test_an_unready_bridge_does_not_take_the_database_of_its_pod_out_of_service() -> None:
    pods = dict(PODS)

    assert "readinessProbe" not in _container(pods["sidecar/StatefulSet"])
    # nor by its end: a pod is ready only while each of its containers runs
    assert _container(pods["sidecar/StatefulSet"])["args"][:2] == ["run", "--stay"]
    assert "readinessProbe" in _container(pods["deployment/Deployment"])


def test_the_slot_is_never_made_by_a_restart() -> None:
    for name, pod in PODS:
        makes_it = "init" in str(_container(pod).get("args", ""))
        assert makes_it == name.endswith("/Job"), name
        assert "initContainers" not in pod
    (compose,) = load(DEPLOY / "compose.yaml")
    assert "command" not in compose["services"]["figbridge"]


@pytest.mark.parametrize("pod", [pod for _, pod in PODS], ids=[name for name, _ in PODS])
def test_a_pod_has_what_the_file_in_the_config_map_names(pod: dict[str, Any]) -> None:
    documents = [it for name in ("configuration", "init") for it in load(DEPLOY / "kubernetes" / f"{name}.yaml")]
    (text,) = [it["data"]["bridge.yaml"] for it in documents if it["kind"] == "ConfigMap"]
    secrets = {it["metadata"]["name"]: it["stringData"] for it in documents if it["kind"] == "Secret"}
    container = _container(pod)
    given = {name: value for it in container["envFrom"] for name, value in secrets[it["secretRef"]["name"]].items()}
    given |= {it["name"]: it["value"] for it in container["env"]}

    config = Config.parse(text, given)

    assert config.forward
    assert config.reverse
    # libpq takes the password from the environment, so a DSN can be read by everybody
    assert given.keys() == {*re.findall(r"\$\{(\w+)", text), "PGPASSWORD"}
    assert "password" not in given["LEGACY_DSN"]


def test_init_has_another_role_and_reaches_the_server_from_a_pod_of_its_own() -> None:
    dsn = {name: {it["name"]: it["value"] for it in _container(pod)["env"]}["LEGACY_DSN"].split() for name, pod in PODS}

    assert "user=figbridge" in dsn["deployment/Deployment"]
    assert "user=figbridge" in dsn["sidecar/StatefulSet"]
    assert "user=figbridge" not in dsn["init/Job"]
    assert [name for name, words in dsn.items() if "host=127.0.0.1" in words] == ["sidecar/StatefulSet"]


def test_the_account_of_the_pods_exists() -> None:
    documents = load(DEPLOY / "kubernetes" / "configuration.yaml")
    accounts = {it["metadata"]["name"] for it in documents if it["kind"] == "ServiceAccount"}

    assert {pod["serviceAccountName"] for _, pod in RUNNING} == accounts


def test_compose_runs_a_configuration_and_gives_the_bridge_time_to_end() -> None:
    (compose,) = load(DEPLOY / "compose.yaml")
    bridge, legacy = compose["services"]["figbridge"], compose["services"]["legacy"]
    # a file, which Compose mounts: `content` it copies into the container, and a read-only root refuses that
    assert bridge["read_only"]
    text = (DEPLOY / compose["configs"]["bridge"]["file"]).read_text()

    config = Config.parse(text, bridge["environment"])

    assert config.http.address == ("0.0.0.0", HttpSection().address[1])
    assert bridge["ports"] == ["127.0.0.1:9464:9464"]
    assert bridge["configs"] == [{"source": "bridge", "target": "/etc/figbridge/bridge.yaml"}]
    assert int(bridge["stop_grace_period"].removesuffix("s")) >= GRACE + 5
    assert "wal_level=logical" in legacy["command"]
    created = compose["configs"]["schema"]["content"]
    assert all(f"CREATE TABLE {table} " in created for table in config.legacy.tables)


def test_the_image_lets_signals_through_and_asks_the_default_address() -> None:
    text = (ROOT / "Dockerfile").read_text()
    instructions = dict(line.split(" ", 1) for line in text.splitlines() if re.match("[A-Z]+ ", line))
    asked = re.search(r"environ\.get\('FIGBRIDGE_LISTEN', '([^']+)'\)", text)

    # a shell form would put /bin/sh at process 1, which hands no signal on
    assert json.loads(instructions["ENTRYPOINT"]) == ["figbridge"]
    assert json.loads(instructions["CMD"]) == ["run", "-c", "/etc/figbridge/bridge.yaml"]
    assert instructions["STOPSIGNAL"] == "SIGTERM"
    assert asked
    assert asked[1] == HttpSection().listen
    assert instructions["EXPOSE"] == str(HttpSection().address[1])
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", instructions["USER"])


def test_no_file_names_the_host_of_a_package_index() -> None:
    for path in (ROOT / "Dockerfile", ROOT / "deploy" / "constraints.txt"):
        assert not re.search(r"https?://|index-url", path.read_text()), path.name


# --- AWS


def test_the_policy_is_what_the_bridge_calls_and_on_what() -> None:
    (template,) = load(TEMPLATE)
    policy = template["Resources"]["BridgePolicy"]["Properties"]["PolicyDocument"]
    allowed = {action: each["Resource"] for each in policy["Statement"] for action in each["Action"]}

    # botocore's names of the methods that the transports and the preflight call
    transports = (
        ROOT / "src/figbridge/transports"
    )  # the template is for this sink and this source; README has the others
    ours = [transports / "eventbridge.py", transports / "sqs.py"]
    sources = [*ours, *(ROOT / "src/figbridge/preflight").glob("*.py")]
    called = {name for path in sources for name in re.findall(r"client\.(?:boto\.)?([a-z_]+)\b", path.read_text())}
    single = {"delete_message_batch": "delete_message", "change_message_visibility_batch": "change_message_visibility"}
    actions = {
        "".join(word.capitalize() for word in single.get(name, name).split("_"))
        for name in called - {"close", "exceptions", "expired", "meta"}
    }
    # a sink's own operation is named, not called as a method
    actions |= {
        name for path in ours for name in re.findall(r'^    action = "\w+:(\w+)"', path.read_text(), re.MULTILINE)
    }
    assert {action.partition(":")[2] for action in allowed} == actions
    assert {resource for action, resource in allowed.items() if action.startswith("events:")} == {"Bus.Arn"}
    assert {resource for action, resource in allowed.items() if action.startswith("sqs:")} == {"Queue.Arn"}


def test_eventbridge_may_deliver_to_both_queues_and_only_from_our_rule() -> None:
    (template,) = load(TEMPLATE)
    resources = template["Resources"]
    (statement,) = resources["QueuePolicy"]["Properties"]["PolicyDocument"]["Statement"]

    assert (statement["Effect"], statement["Action"]) == ("Allow", "sqs:SendMessage")
    assert statement["Principal"] == {"Service": "events.amazonaws.com"}
    assert statement["Condition"] == {"ArnEquals": {"aws:SourceArn": "Rule.Arn"}}
    (target,) = resources["Rule"]["Properties"]["Targets"]
    assert [target["Arn"], target["DeadLetterConfig"]["Arn"]] == statement["Resource"]
    assert resources["QueuePolicy"]["Properties"]["Queues"] == ["Queue", "DeadLetterQueue"]


# moto delivers without asking a policy; the test above reads it
@pytest.mark.filterwarnings("ignore:Tried to parse AWS..SQS..QueuePolicy:UserWarning")
def test_the_template_makes_a_queue_that_gets_the_new_systems_events_only(aws_endpoint: str) -> None:
    formation = boto3.client("cloudformation", endpoint_url=aws_endpoint)
    formation.create_stack(StackName="figbridge", TemplateBody=TEMPLATE.read_text(), Capabilities=["CAPABILITY_IAM"])
    (stack,) = formation.describe_stacks(StackName="figbridge")["Stacks"]
    outputs = {output["OutputKey"]: output["OutputValue"] for output in stack["Outputs"]}
    events = boto3.client("events", endpoint_url=aws_endpoint)
    sqs = boto3.client("sqs", endpoint_url=aws_endpoint)

    for source in ("legacy.shop", "shop.next"):
        result = events.put_events(
            Entries=[{"EventBusName": outputs["BusName"], "Source": source, "DetailType": "t", "Detail": "{}"}]
        )
        assert result["FailedEntryCount"] == 0
    messages = sqs.receive_message(QueueUrl=outputs["QueueUrl"], MaxNumberOfMessages=10, WaitTimeSeconds=1)["Messages"]

    assert [json.loads(message["Body"])["source"] for message in messages] == ["shop.next"]
    queue = sqs.get_queue_attributes(QueueUrl=outputs["QueueUrl"], AttributeNames=["All"])["Attributes"]
    dead = sqs.get_queue_attributes(QueueUrl=outputs["DeadLetterQueueUrl"], AttributeNames=["All"])["Attributes"]
    assert json.loads(queue["RedrivePolicy"])["deadLetterTargetArn"] == dead["QueueArn"]
    assert queue["MessageRetentionPeriod"] == dead["MessageRetentionPeriod"] == str(14 * 24 * 3600)
