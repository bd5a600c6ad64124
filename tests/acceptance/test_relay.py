"""The relay by `figbridge run --only relay` and as a Lambda function: rule → SQS → relay → bus, without a database."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest

from figbridge.errors import ConfigError
from figbridge.functions import relay as function
from fixtures.bridge import Bridge
from fixtures.clock import until

WIDGET = {"type": "object", "required": ["widget_id"], "properties": {"widget_id": {"type": "string"}}}
CONFIG = """
relay:
  source: {type: sqs, queue_url: "%(queue)s", endpoint_url: "%(endpoint)s", visibility-timeout: 5}
  sink: {type: eventbridge, bus: central, endpoint_url: "%(endpoint)s"}
  quarantine: {type: sqs, queue_url: "%(quarantine)s", endpoint_url: "%(endpoint)s"}
  contracts: %(contracts)s
http: {listen: "${HTTP_LISTEN:-127.0.0.1:0}"}
"""


@dataclass
class Central:
    """A central bus: what arrives goes to the relay's queue, what is valid to a consumer's."""

    endpoint: str
    directory: Path
    taken: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.events = boto3.client("events", endpoint_url=self.endpoint)
        self.sqs = boto3.client("sqs", endpoint_url=self.endpoint)
        self.events.create_event_bus(Name="central")
        self.incoming = self.rule("incoming", {"source": [{"prefix": ""}]})
        self.consumer = self.rule("consumer", {"source": [{"prefix": "valid."}]})
        self.quarantine = self.queue("quarantine")
        contracts = self.directory / "contracts"
        (contracts / "cwi.servicea").mkdir(parents=True)
        (contracts / "cwi.servicea" / "NEW_WIDGET.json").write_text(json.dumps(WIDGET))
        self.config = self.directory / "relay.yaml"
        self.config.write_text(
            CONFIG
            % {
                "queue": self.incoming,
                "quarantine": self.quarantine,
                "endpoint": self.endpoint,
                "contracts": contracts,
            }
        )

    def queue(self, name: str) -> str:
        return self.sqs.create_queue(QueueName=name)["QueueUrl"]

    def rule(self, name: str, pattern: dict[str, Any]) -> str:
        url = self.queue(name)
        arn = self.sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
        self.events.put_rule(Name=name, EventBusName="central", EventPattern=json.dumps(pattern))
        self.events.put_targets(Rule=name, EventBusName="central", Targets=[{"Id": "1", "Arn": arn}])
        return url

    def publish(self, *details: dict[str, Any], source: str = "cwi.servicea") -> None:
        for detail in details:
            answer = self.events.put_events(
                Entries=[
                    {
                        "Source": source,
                        "DetailType": "NEW_WIDGET",
                        "Detail": json.dumps(detail),
                        "EventBusName": "central",
                    }
                ]
            )
            assert answer["FailedEntryCount"] == 0

    def receive(self, url: str) -> list[dict[str, Any]]:
        """All that is in the queue now, taken out of it."""
        found = []
        while messages := self.sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10).get("Messages", []):
            for message in messages:
                found.append(json.loads(message["Body"]))
                self.sqs.delete_message(QueueUrl=url, ReceiptHandle=message["ReceiptHandle"])
        return found

    def until_consumed(self, count: int, bridge: Bridge | None = None) -> list[dict[str, Any]]:
        def enough() -> bool:
            self.taken += self.receive(self.consumer)
            return len({it["detail"]["relayed"]["id"] for it in self.taken}) >= count

        until(enough, 30, lambda: f"{len(self.taken)} of {count}\n{bridge.log[-3000:] if bridge else ''}")
        return self.taken

    def waiting(self, url: str) -> int:
        found = self.sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
        return int(found["ApproximateNumberOfMessages"]) + int(found["ApproximateNumberOfMessagesNotVisible"])

    def bridge(self, *arguments: str) -> Bridge:
        return Bridge(self.config, self.directory / "log", *(arguments or ("--only", "relay")))


@pytest.fixture
def central(aws_endpoint: str, tmp_path: Path) -> Central:
    return Central(aws_endpoint, tmp_path)


def test_valid_events_are_published_anew_and_invalid_ones_set_aside(central: Central) -> None:
    with central.bridge() as bridge:
        bridge.until_ready()
        central.publish({"widget_id": "abc123"}, {"widget_id": 7, "name": "Ada Lovelace"})
        central.publish({"widget_id": "x"}, source="cwi.unknown")
        (event,) = central.until_consumed(1, bridge)
        # our own event came back by the first rule: it is dropped, and so does the loop end
        dropped = 'figbridge_relay_dropped_total{reason="valid_already"}'
        until(lambda: bridge.metric(dropped) == 1, 20, lambda: bridge.log)
        until(lambda: bridge.metric('figbridge_relay_quarantined_total{sink="sqs"}') == 2, 20, lambda: bridge.log)
        until(lambda: central.waiting(central.incoming) == 0, 20, "all are acknowledged")
        assert bridge.metric('figbridge_relay_events_total{sink="eventbridge"}') == 1
        assert bridge.metric('figbridge_relay_invalid_total{reason="contract"}') == 1
        assert bridge.metric('figbridge_relay_invalid_total{reason="no_contract"}') == 1
        assert bridge.terminate() == 0

    assert (event["source"], event["detail-type"]) == ("valid.cwi.servicea", "NEW_WIDGET")
    assert event["detail"]["widget_id"] == "abc123"
    assert event["detail"]["relayed"]["source"] == "cwi.servicea"
    aside = {it["detail"]["reason"]: it for it in central.receive(central.quarantine)}
    assert aside["contract"]["source"] == "invalid.cwi.servicea"
    assert aside["contract"]["detail"]["breaches"][0]["path"] == "/detail/widget_id"
    assert aside["contract"]["detail"]["event"]["detail"] == {"widget_id": 7, "name": "Ada Lovelace"}
    assert "event set aside" in bridge.log
    assert "Ada" not in bridge.log


def test_kill_9_loses_nothing_and_the_id_tells_repetitions(central: Central) -> None:
    with central.bridge() as bridge:
        bridge.until_ready()
        for round_ in range(4):
            central.publish(*({"widget_id": f"{round_}-{n}"} for n in range(15)))
            central.until_consumed(round_ * 15 + 3, bridge)
            bridge.kill()
        central.until_consumed(60, bridge)
        bridge.until_ready()
        assert bridge.terminate() == 0

    widgets = {it["detail"]["relayed"]["id"]: it["detail"]["widget_id"] for it in central.taken}
    assert len(widgets) == 60
    assert set(widgets.values()) == {f"{round_}-{n}" for round_ in range(4) for n in range(15)}


def test_a_file_with_a_relay_alone_runs_and_is_checked_without_a_database(central: Central) -> None:
    command = [sys.executable, "-m", "figbridge", "check", "-c", str(central.config), "--json"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [it["where"] for it in json.loads(done.stdout)] == [
        "relay.contracts",
        "relay.source",
        "relay.sink",
        "relay.quarantine",
    ]
    with Bridge(central.config, central.directory / "log") as bridge:
        bridge.until_ready()
        central.publish({"widget_id": "1"})
        central.until_consumed(1, bridge)
        assert bridge.terminate() == 0


def test_several_loops_share_the_work(central: Central) -> None:
    central.config.write_text(central.config.read_text().replace("relay:\n", "relay:\n  parallel: 3\n"))
    central.publish(*({"widget_id": str(n)} for n in range(80)))
    with central.bridge() as bridge:
        taken = central.until_consumed(80, bridge)
        assert bridge.terminate() == 0
    # by id: a message that was held too long on a busy machine is delivered again, and may be with another loop already
    widgets = {it["detail"]["relayed"]["id"]: int(it["detail"]["widget_id"]) for it in taken}
    assert sorted(widgets.values()) == list(range(80))


def test_contracts_that_are_not_there_are_told_before_anything_starts(central: Central) -> None:
    for path in (central.directory / "contracts").rglob("*.json"):
        path.unlink()
    with central.bridge() as bridge:
        assert bridge.wait() == 2
    assert "relay.contracts" in bridge.log


# --- as a function


@pytest.fixture
def configured(central: Central, monkeypatch: pytest.MonkeyPatch) -> Central:
    monkeypatch.setenv("FIGBRIDGE_CONFIG", str(central.config))
    monkeypatch.setattr(function, "_function", None)
    return central


def records(central: Central) -> dict[str, Any]:
    """What Lambda's event source mapping makes of the messages that the rule really delivered."""
    answer = central.sqs.receive_message(
        QueueUrl=central.incoming,
        MaxNumberOfMessages=10,
        MessageSystemAttributeNames=["All"],
        VisibilityTimeout=0,
    )
    return {
        "Records": [
            {
                "messageId": message["MessageId"],
                "receiptHandle": message["ReceiptHandle"],
                "body": message["Body"],
                "attributes": message["Attributes"],
                "eventSource": "aws:sqs",
            }
            for message in answer.get("Messages", [])
        ]
    }


def seconds(left: float) -> Any:
    return SimpleNamespace(get_remaining_time_in_millis=lambda: int(left * 1000))


def test_the_function_does_the_same(configured: Central) -> None:
    configured.publish({"widget_id": "abc123"}, {"widget_id": 7})
    event = records(configured)
    assert len(event["Records"]) == 2

    assert function.handler(event, seconds(30)) == {"batchItemFailures": []}
    assert function.handler(event, seconds(30)) == {"batchItemFailures": []}  # delivered again

    (valid,) = configured.receive(configured.consumer)
    assert valid["source"] == "valid.cwi.servicea"
    assert valid["detail"]["relayed"]["id"] == json.loads(event["Records"][0]["body"])["id"]
    aside = configured.receive(configured.quarantine)
    assert {it["detail"]["reason"] for it in aside} == {"contract"}


def test_the_function_reports_what_is_not_durable(configured: Central) -> None:
    """Quarantine away: the valid one is durable, the other comes again; and then the function recovers."""
    configured.publish({"widget_id": "abc123"}, {"widget_id": 7})
    event = records(configured)
    configured.sqs.delete_queue(QueueUrl=configured.quarantine)

    answer = function.handler(event, seconds(30))

    assert answer == {"batchItemFailures": [{"itemIdentifier": event["Records"][1]["messageId"]}]}
    assert len(configured.receive(configured.consumer)) == 1
    configured.queue("quarantine")
    again = {"Records": event["Records"][1:]}
    assert function.handler(again, seconds(30)) == {"batchItemFailures": []}
    assert len(configured.receive(configured.quarantine)) == 1


def test_the_function_answers_before_its_time_is_over(configured: Central, monkeypatch: pytest.MonkeyPatch) -> None:
    configured.publish({"widget_id": "abc123"})
    event = records(configured)
    nobody = configured.config.read_text().replace(configured.endpoint, "http://127.0.0.1:1")
    monkeypatch.setenv("FIGBRIDGE_CONFIG", nobody)  # the YAML itself, this time

    answer = function.handler(event, seconds(3))

    assert answer == {"batchItemFailures": [{"itemIdentifier": event["Records"][0]["messageId"]}]}


def test_the_function_refuses_ends_that_do_not_last(configured: Central, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"relay: {{sink: {{type: file, path: a}}, contracts: {configured.directory}/contracts,\n"
    text += "  dead-letters: {type: file, path: b}}"
    monkeypatch.setenv("FIGBRIDGE_CONFIG", text)
    with pytest.raises(ConfigError) as caught:
        function.handler({"Records": []}, seconds(3))
    assert {it.where for it in caught.value.problems} == {"relay.sink", "relay.dead-letters"}
    monkeypatch.delenv("FIGBRIDGE_CONFIG")
    with pytest.raises(ConfigError, match="FIGBRIDGE_CONFIG"):
        function.handler({"Records": []}, seconds(3))
