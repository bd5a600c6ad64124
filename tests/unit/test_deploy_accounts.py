"""The templates of a central event account: their syntax, what they allow, and that both languages say the same."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import hcl2
import jsonschema_rs
import pytest

from figbridge.config import Config
from fixtures.accounts import DEPLOY, Template, template

TERRAFORM = DEPLOY / "terraform"
PARTS = ("bridge", "service-account", "central-account", "widgets", "lake")
MODULES = sorted(path.name for path in TERRAFORM.iterdir())
# a directory that holds registry.terraform.io/hashicorp/aws, as `terraform providers mirror` makes one
PLUGINS = os.environ.get("FIGBRIDGE_TERRAFORM_PLUGINS")
SERVICES = ("sqs", "events", "firehose", "s3", "dynamodb", "sts")


def resources(content: Template, type_: str) -> dict[str, Any]:
    return {key: it["Properties"] for key, it in content["Resources"].items() if it["Type"] == type_}


def statements(value: Any) -> list[dict[str, Any]]:
    """Every statement of every policy in a template."""
    if isinstance(value, dict):
        own = [value] if "Effect" in value else []
        return own + [it for member in value.values() for it in statements(member)]
    return [it for member in value for it in statements(member)] if isinstance(value, list) else []


def source_of(module: str) -> str:
    used = [TERRAFORM / module, *([TERRAFORM / "rule-to-queue"] if module != "lake" else [])]
    return "\n".join(path.read_text() for directory in used for path in sorted(directory.glob("*.tf")))


def actions(statement: dict[str, Any]) -> list[str]:
    found = statement["Action"]
    return [found] if isinstance(found, str) else found


# --- syntax


@pytest.mark.parametrize("path", sorted(TERRAFORM.rglob("*.tf")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_file_of_terraform_is_hcl(path: Path) -> None:
    with path.open() as file:
        assert hcl2.load(file)


@pytest.mark.skipif(shutil.which("terraform") is None, reason="there is no terraform")
def test_terraform_is_formatted() -> None:
    done = subprocess.run(
        ["terraform", "fmt", "-check", "-recursive", str(TERRAFORM)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("terraform") is None, reason="there is no terraform")
@pytest.mark.skipif(PLUGINS is None, reason="FIGBRIDGE_TERRAFORM_PLUGINS names no directory with the provider aws")
@pytest.mark.parametrize("module", MODULES)
def test_terraform_validates(module: str, tmp_path: Path) -> None:
    shutil.copytree(TERRAFORM, tmp_path / "terraform")
    for command in (["init", "-backend=false", "-input=false", f"-plugin-dir={PLUGINS}"], ["validate", "-json"]):
        done = subprocess.run(
            ["terraform", *command], cwd=tmp_path / "terraform" / module, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["diagnostics"] == []


# --- both say the same


@pytest.mark.parametrize("part", PARTS)
def test_terraform_allows_what_cloudformation_allows(part: str) -> None:
    content, text = template(part), source_of(part)
    allowed = {action for it in statements(content["Resources"]) for action in actions(it)}

    pattern = rf'"((?:{"|".join(SERVICES)}):[A-Z]\w+)"'
    assert set(re.findall(pattern, text)) - {"sts:ExternalId"} == allowed


@pytest.mark.parametrize("part", PARTS)
def test_terraform_matches_what_cloudformation_matches(part: str) -> None:
    content = template(part)
    parameters = {name: it.get("Default") for name, it in content["Parameters"].items()}
    text = source_of(part)
    defaults = dict(re.findall(r'variable "(\w+)" {[^}]*?default\s*= "([^"]*)"', text))

    wanted = {
        json.dumps(_filled(it["EventPattern"], parameters), sort_keys=True)
        for kind in ("Rule", "Archive")
        for it in resources(content, f"AWS::Events::{kind}").values()
    }
    found = set()
    for match in re.finditer(r"(?:event_pattern\s*= jsonencode\(|pattern\s*= )(\{.*\})", text):
        given = re.sub(r"var\.(\w+)", lambda it: f'"{defaults[it[1]]}"', match[1])
        found.add(json.dumps(json.loads(re.sub(r'("?[\w-]+"?) = ', _quoted, given)), sort_keys=True))
    assert found == wanted


def _filled(value: Any, parameters: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        return parameters[value["Ref"]] if "Ref" in value else {k: _filled(v, parameters) for k, v in value.items()}
    return [_filled(it, parameters) for it in value] if isinstance(value, list) else value


def _quoted(match: re.Match[str]) -> str:
    return f'"{match[1].strip(chr(34))}": '


# --- what they allow


@pytest.mark.parametrize("part", PARTS)
def test_nothing_is_allowed_on_everything_or_to_everybody(part: str) -> None:
    for it in statements(template(part)["Resources"]):
        if it["Effect"] == "Allow":
            assert it.get("Resource", "arn") != "*"
            assert it.get("Principal") != "*"
            assert not any("*" in action for action in actions(it))


@pytest.mark.parametrize("part", PARTS)
def test_every_target_of_a_rule_is_retried_for_a_day_and_then_kept(part: str) -> None:
    content = template(part)
    policies = resources(content, "AWS::SQS::QueuePolicy").values()
    open_to_rules = [it for policy in policies for it in statements(policy)]
    for name, rule in resources(content, "AWS::Events::Rule").items():
        for target in rule["Targets"]:
            assert target["RetryPolicy"] == {"MaximumEventAgeInSeconds": 86400, "MaximumRetryAttempts": 185}
            dead = target["DeadLetterConfig"]["Arn"]
            assert any(dead in _list(it["Resource"]) and _from(it, name) for it in open_to_rules), name


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _from(statement: dict[str, Any], rule: str) -> bool:
    return {"Fn::GetAtt": [rule, "Arn"]} in _list(statement["Condition"]["ArnEquals"]["aws:SourceArn"])


def test_only_the_relay_may_say_that_something_is_valid() -> None:
    policies = resources(template("central-account"), "AWS::Events::EventBusPolicy")
    allow, deny = policies["ServicesForward"]["Statement"], policies["OnlyTheRelayMarks"]["Statement"]

    assert allow["Principal"] == {"AWS": {"Ref": "ServiceAccounts"}}
    assert (deny["Effect"], deny["Principal"]) == ("Deny", "*")
    assert deny["Condition"]["StringLike"] == {"events:source": ["valid.*", "invalid.*"]}
    assert deny["Condition"]["ArnNotEquals"]["aws:PrincipalArn"]["Fn::If"][1] == {"Fn::GetAtt": ["RelayRole", "Arn"]}


def test_the_relays_policy_is_what_the_relay_calls_and_on_what() -> None:
    content = template("central-account")
    (policy,) = resources(content, "AWS::IAM::ManagedPolicy").values()
    allowed = {it["Resource"]["Fn::GetAtt"][0]: set(it["Action"]) for it in statements(policy)}

    transports = Path(__file__).parents[2] / "src/figbridge/transports"
    calls = {
        name: set(re.findall(r"client\.boto\.([a-z_]+)\b", (transports / f"{name}.py").read_text()))
        for name in ("sqs", "sqs_sink", "eventbridge")
    }
    assert allowed == {
        "RelayQueue": _rights("sqs", calls["sqs"]),
        "Bus": _rights("events", calls["eventbridge"] | {"put_events"}),
        "QuarantineQueue": _rights("sqs", calls["sqs_sink"] | {"send_message"}),
    }


def _rights(service: str, calls: set[str]) -> set[str]:
    single = {name.removesuffix("_batch") for name in calls - {"exceptions", "meta"}}
    return {f"{service}:{''.join(word.capitalize() for word in name.split('_'))}" for name in single}


def test_the_functions_configuration_is_one() -> None:
    content = template("central-account")
    text = content["Resources"]["RelayFunction"]["Properties"]["Environment"]["Variables"]["FIGBRIDGE_CONFIG"][
        "Fn::Sub"
    ]
    filled = text.replace("${Bus.Name}", "central").replace("${QuarantineQueue}", "https://sqs.test/1/quarantine")

    relay = Config.parse(filled, {}).relay

    assert relay
    assert relay.source is None
    assert relay.sink.type == "eventbridge"
    names = ("RELAY_QUEUE", "QUARANTINE_QUEUE", "CENTRAL_BUS")
    environment = dict.fromkeys(names, "https://sqs.test/1/queue")
    container = Config.parse((DEPLOY / "relay.yaml").read_text(), environment).relay
    assert container
    assert (container.sink.type, container.contracts.name) == (relay.sink.type, relay.contracts.name)


def test_the_queue_hides_a_message_for_six_times_the_functions_time() -> None:
    for part, queue, function in (("central-account", "RelayQueue", "RelayFunction"), ("widgets", "Queue", "Function")):
        found = template(part)["Resources"]
        assert found[queue]["Properties"]["VisibilityTimeout"] == 6 * found[function]["Properties"]["Timeout"]
        (mapping,) = resources(template(part), "AWS::Lambda::EventSourceMapping").values()
        assert mapping["FunctionResponseTypes"] == ["ReportBatchItemFailures"]


def test_the_contract_takes_the_widget_of_the_story() -> None:
    contract = json.loads((DEPLOY / "contracts" / "cwi.servicea" / "NEW_WIDGET.json").read_text())
    validator = jsonschema_rs.validator_for(contract)

    assert validator.is_valid({"widget_id": "abc123"})
    for wrong in ({}, {"widget_id": 7}, {"widget_id": ""}):
        assert not validator.is_valid(wrong)
