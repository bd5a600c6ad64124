"""The story of many accounts, by the templates of deploy/cloudformation, in two accounts of an emulator.

Service A publishes NEW_WIDGET on its own account's bus ─rule─▶ the central bus ─rule─▶ queue ─▶ relay ─▶ the central
bus, as valid.cwi.servicea ─rules─▶ a DynamoDB table (service B), S3 (service C), the archive. An invalid widget gets
nowhere but to the quarantine.

The emulator delivers from rules to buses of other accounts and to queues; it runs no function, and its rules know no
Firehose. There the consumer is called with the message that was really delivered: the widgets' handler with its
queue's, and the Firehose stream, made from the template's properties, with what the lake's rule put into a queue in its
stead.
"""

import importlib.util
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from figbridge.functions import relay as function
from fixtures.accounts import DEPLOY, Account, template
from fixtures.bridge import Bridge
from fixtures.clock import until

SERVICE, CENTRAL = "111122223333", "444455556666"


@dataclass
class World:
    service: Account
    central: Account
    bus: str
    outputs: dict[str, str]
    widgets: dict[str, str]
    lake: dict[str, str]
    lake_queue: str


def archive(*files: Path) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as zipped:
        for file in files:
            zipped.write(file, file.name)
    return packed.getvalue()


@pytest.fixture
def world(aws_endpoint: str) -> World:
    service, central = Account(aws_endpoint, SERVICE), Account(aws_endpoint, CENTRAL)
    s3 = central.client("s3")
    s3.create_bucket(Bucket="code", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    s3.put_object(Bucket="code", Key="widgets.zip", Body=archive(DEPLOY / "functions" / "widgets.py"))
    s3.put_object(Bucket="code", Key="relay.zip", Body=archive(DEPLOY / "contracts/cwi.servicea/NEW_WIDGET.json"))
    outputs = central.deploy("central-account", ServiceAccounts=SERVICE, CodeBucket="code")
    bus = service.deploy("service-account", CentralBusArn=outputs["BusArn"])["BusName"]
    widgets = central.deploy("widgets", CodeBucket="code")
    lake_queue, lake = make_lake(central)
    return World(service, central, bus, outputs, widgets, lake, lake_queue)


def make_lake(central: Account) -> tuple[str, dict[str, str]]:
    """lake.yaml, its rule's target a queue; the stream by boto3, from the template's properties."""
    sqs = central.client("sqs")
    url = sqs.create_queue(QueueName="instead-of-firehose")["QueueUrl"]
    arn = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    content = template("lake")
    stream = content["Resources"]["Stream"]["Properties"]
    rule = content["Resources"]["Rule"]["Properties"]
    assert rule["Targets"][0]["Arn"] == {"Fn::GetAtt": ["Stream", "Arn"]}
    rule["Targets"] = [{"Id": "lake", "Arn": arn}]
    del content["Resources"]["RuleRole"]  # it names the stream
    outputs = central.deploy("lake", content)
    settings = stream["ExtendedS3DestinationConfiguration"]
    central.client("firehose").create_delivery_stream(
        DeliveryStreamName="lake",
        DeliveryStreamType=stream["DeliveryStreamType"],
        ExtendedS3DestinationConfiguration=settings
        | {
            "BucketARN": f"arn:aws:s3:::{outputs['BucketName']}",
            "RoleARN": f"arn:aws:iam::{CENTRAL}:role/stream",
            "CompressionFormat": "UNCOMPRESSED",  # the emulator compresses nothing, whatever it is told
        },
    )
    return url, outputs


def run_container(world: World, tmp_path: Path, _monkeypatch: pytest.MonkeyPatch) -> None:
    """The relay as `figbridge run`, with deploy/relay.yaml, until its queue is empty."""
    environment = world.central.environment | {
        "RELAY_QUEUE": world.outputs["RelayQueueUrl"],
        "QUARANTINE_QUEUE": world.outputs["QuarantineQueueUrl"],
        "CENTRAL_BUS": world.outputs["BusName"],
        "CONTRACTS": str(DEPLOY / "contracts"),
    }
    bridge = Bridge(DEPLOY / "relay.yaml", tmp_path / "log", "--only", "relay", environment=environment)
    bridge.use(FIGBRIDGE_LISTEN=f"127.0.0.1:{bridge.port}")
    with bridge:
        until(lambda: waiting(world) == 0, 60, lambda: bridge.log)
        assert bridge.terminate() == 0


def run_function(world: World, _tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The relay's handler, with the configuration that the template gives the function, and its queue's messages."""
    (found,) = (
        it for it in world.central.client("lambda").list_functions()["Functions"] if "relay" in it["Handler"]
    )  # fmt: skip
    assert found["Handler"] == f"{function.__name__}.handler"
    for name, value in {**world.central.environment, **found["Environment"]["Variables"]}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(DEPLOY)  # the contracts lie beside the code, in Lambda's working directory
    monkeypatch.setattr(function, "_function", None)
    context = SimpleNamespace(get_remaining_time_in_millis=lambda: 30_000)
    records = world.central.take(world.outputs["RelayQueueUrl"])
    assert function.handler({"Records": records}, context) == {"batchItemFailures": []}
    made = function._function
    assert made
    made.relayer.close()
    monkeypatch.setattr(function, "_function", None)


def waiting(world: World) -> int:
    url = world.outputs["RelayQueueUrl"]
    found = world.central.client("sqs").get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
    return int(found["ApproximateNumberOfMessages"]) + int(found["ApproximateNumberOfMessagesNotVisible"])


@pytest.fixture
def widgets_function(world: World, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """deploy/functions/widgets.py, with the variables of the deployed function."""
    spec = importlib.util.spec_from_file_location("widgets", DEPLOY / "functions" / "widgets.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (found,) = (
        it for it in world.central.client("lambda").list_functions()["Functions"] if it["Handler"] == "widgets.handler"
    )  # fmt: skip
    for name, value in found["Environment"]["Variables"].items():
        monkeypatch.setenv(name, value)
    return module


def table(world: World) -> dict[str, dict[str, str]]:
    items = world.central.client("dynamodb").scan(TableName=world.widgets["TableName"])["Items"]
    return {
        it["pk"]["S"]: {name: next(iter(value.values())) for name, value in it.items() if name != "pk"} for it in items
    }


def lake(world: World) -> list[dict[str, Any]]:
    s3 = world.central.client("s3")
    keys = [it["Key"] for it in s3.list_objects_v2(Bucket=world.lake["BucketName"]).get("Contents", [])]
    assert all(key.startswith("events/day=") for key in keys)
    text = b"".join(s3.get_object(Bucket=world.lake["BucketName"], Key=key)["Body"].read() for key in keys)
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("relay", [run_container, run_function], ids=["container", "function"])
def test_a_valid_widget_reaches_table_and_lake_and_an_invalid_one_does_not(
    world: World,
    widgets_function: ModuleType,
    relay: Callable[[World, Path, pytest.MonkeyPatch], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    service, central = world.service, world.central
    service.publish(world.bus, "cwi.servicea", {"widget_id": "abc123"})
    service.publish(world.bus, "cwi.servicea", {"widget_id": 7})
    service.publish(world.bus, "cwi.somebody", {"widget_id": "not this service's"})
    service.publish(world.bus, "valid.cwi.servicea", {"widget_id": "forged"})
    assert waiting(world) == 2, "what the rule matches is forwarded to the central bus, and nothing else"

    relay(world, tmp_path, monkeypatch)

    (aside,) = (json.loads(it["body"]) for it in central.take(world.outputs["QuarantineQueueUrl"]))
    assert aside["source"] == "invalid.cwi.servicea"
    assert aside["detail"]["breaches"][0]["path"] == "/detail/widget_id"

    # service B: what its queue has, to its handler
    delivered = central.take(world.widgets["QueueUrl"])
    assert [json.loads(it["body"])["source"] for it in delivered] == ["valid.cwi.servicea"]
    dynamodb = central.client("dynamodb")
    for _ in range(2):  # the queue may deliver twice
        assert widgets_function.handler({"Records": delivered}, None, dynamodb) == {"batchItemFailures": []}
    rows = table(world)
    assert rows.keys() == {"widget#abc123", "total#widgets"}
    assert rows["total#widgets"] == {"count": "1"}
    assert rows["widget#abc123"]["source"] == "valid.cwi.servicea"

    # service C: what its rule delivered, to Firehose
    for it in central.take(world.lake_queue):
        line = it["body"] + "\n"  # the template's AppendDelimiterToRecord, which the emulator does not know
        central.client("firehose").put_record(DeliveryStreamName="lake", Record={"Data": line.encode()})
    (event,) = lake(world)
    assert (event["source"], event["detail-type"]) == ("valid.cwi.servicea", "NEW_WIDGET")
    assert event["detail"]["widget_id"] == "abc123"
    assert event["detail"]["relayed"]["id"] == rows["widget#abc123"]["event_id"]

    # nothing of this is for the legacy database, and nothing came back to the relay
    assert central.take(world.outputs["ReverseQueueUrl"]) == []
    assert waiting(world) == 0

    # the archive has it: replayed, it is a repetition to the table
    events = central.client("events")
    (kept,) = events.list_archives()["Archives"]
    assert kept["EventCount"] == 1
    bus = world.outputs["BusArn"]
    events.start_replay(
        ReplayName="again",
        EventSourceArn=world.outputs["ArchiveArn"],
        EventStartTime=kept["CreationTime"],
        EventEndTime=kept["CreationTime"].replace(year=kept["CreationTime"].year + 1),
        Destination={"Arn": bus},
    )
    replayed = central.take(world.widgets["QueueUrl"])
    assert len(replayed) == 1
    assert widgets_function.handler({"Records": replayed}, None, dynamodb) == {"batchItemFailures": []}
    assert table(world) == rows


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_widget_that_cannot_be_written_comes_again_and_the_others_are_written(
    world: World, widgets_function: ModuleType
) -> None:
    def record(name: str, detail: dict[str, Any]) -> dict[str, str]:
        body = {"source": "valid.cwi.servicea", "time": "2026-11-23T10:00:00Z", "detail": detail}
        return {"messageId": name, "body": json.dumps(body)}

    mark = {"relayed": {"id": "e"}}
    records = [
        record("1", {"widget_id": "a"} | mark),
        record("2", {"no": "id"}),
        record("3", {"widget_id": "b"} | mark),
    ]
    answer = widgets_function.handler({"Records": records}, None, world.central.client("dynamodb"))

    assert answer == {"batchItemFailures": [{"itemIdentifier": "2"}]}
    assert table(world).keys() == {"widget#a", "widget#b", "total#widgets"}
    assert table(world)["total#widgets"] == {"count": "2"}
