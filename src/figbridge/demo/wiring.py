"""What lies between the bridge and the new system, made ready, and how much still waits there.

embedded bus    bridge ──▶ one SQLite file ──▶ new system, and back through the same file
AWS             bridge ──PutEvents──▶ bus shop ──rule legacy.*──▶ SQS new-system ──▶ new system
                new system ──PutEvents──▶ bus shop ──rule shop.next──▶ SQS figbridge-reverse ──▶ bridge
"""

import json
import os
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from figbridge.demo.bus import BUS, INBOUND_QUEUE, LEGACY, SOURCE

_REGION: Final = "eu-west-1"
_REVERSE_QUEUE: Final = "figbridge-reverse"
_SUBSCRIBER: Final = "figbridge"

_DUMMY: Final[Mapping[str, str]] = {
    "AWS_ACCESS_KEY_ID": "demo",
    "AWS_SECRET_ACCESS_KEY": "demo",
    "AWS_DEFAULT_REGION": _REGION,
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
}


def environment() -> dict[str, str]:
    """The environment of the demo's processes: nothing of the user's own AWS set-up gets in, no proxy in between."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "PG"))}
    return {**kept, **_DUMMY}


class Wiring(Protocol):
    """The bus, from the demo's point of view."""

    @property
    def address(self) -> str:
        """What the new system is started with."""

    @property
    def sink(self) -> dict[str, Any]:
        """The bridge's ``forward.sink``."""

    @property
    def source(self) -> dict[str, Any]:
        """The bridge's ``reverse.source``."""

    def waiting_for_bridge(self) -> int:
        """Events that the bridge has not acknowledged yet."""

    def waiting_for_new_system(self) -> int:
        """Events that the new system has not acknowledged yet."""


class LocalWiring:
    """The embedded bus."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.address = f"local:{path}"
        self.sink: dict[str, Any] = {"type": "local", "path": str(path)}
        self.source: dict[str, Any] = {
            "type": "local",
            "path": str(path),
            "subscriber": _SUBSCRIBER,
            "sources": [SOURCE],
        }

    def waiting_for_bridge(self) -> int:
        """See `Wiring.waiting_for_bridge`."""
        return self._waiting(_SUBSCRIBER, SOURCE)

    def waiting_for_new_system(self) -> int:
        """See `Wiring.waiting_for_new_system`."""
        return self._waiting(INBOUND_QUEUE, LEGACY)

    def _waiting(self, subscriber: str, prefix: str) -> int:
        """Events of `prefix` that `subscriber` was not handed yet, or was and has not settled."""
        connection = sqlite3.connect(f"{self._path.as_uri()}?mode=ro", uri=True)
        try:
            (count,) = connection.execute(
                """
                SELECT (SELECT count(*) FROM delivery WHERE subscriber = :name)
                     + (SELECT count(*) FROM event WHERE substr(source, 1, length(:prefix)) = :prefix
                        AND seq > coalesce((SELECT frontier FROM subscriber WHERE name = :name), 0))
                """,
                {"name": subscriber, "prefix": prefix},
            ).fetchone()
            return int(count)
        finally:
            connection.close()


class AwsWiring:
    """A bus, two queues and two rules, made at `endpoint`."""

    def __init__(self, endpoint: str) -> None:
        import boto3  # noqa: PLC0415 (0.2 s that the embedded bus does not need)
        from botocore.config import Config  # noqa: PLC0415 (see above)

        session = boto3.Session(aws_access_key_id="demo", aws_secret_access_key="demo", region_name=_REGION)  # noqa: S106 (an emulator asks for some)
        options: dict[str, Any] = {"endpoint_url": endpoint, "config": Config(proxies={})}
        events = session.client("events", **options)
        self._sqs = session.client("sqs", **options)
        events.create_event_bus(Name=BUS)
        self._queues = {}
        for queue, pattern in (
            (INBOUND_QUEUE, {"source": [{"prefix": LEGACY}]}),
            (_REVERSE_QUEUE, {"source": [SOURCE]}),
        ):
            self._queues[queue] = self._sqs.create_queue(QueueName=queue)["QueueUrl"]
            arn = self._attributes(queue, "QueueArn")["QueueArn"]
            events.put_rule(Name=queue, EventBusName=BUS, EventPattern=json.dumps(pattern))
            events.put_targets(Rule=queue, EventBusName=BUS, Targets=[{"Id": "queue", "Arn": arn}])
        self.address = f"aws:{endpoint}"
        self.sink: dict[str, Any] = {
            "type": "eventbridge",
            "bus": BUS,
            "region": _REGION,
            "endpoint_url": endpoint,
        }
        self.source: dict[str, Any] = {
            "type": "sqs",
            "queue_url": self._queues[_REVERSE_QUEUE],
            "region": _REGION,
            "endpoint_url": endpoint,
            "visibility-timeout": 5,  # a message that a killed bridge held comes back soon
        }

    def waiting_for_bridge(self) -> int:
        """See `Wiring.waiting_for_bridge`."""
        return self._waiting(_REVERSE_QUEUE)

    def waiting_for_new_system(self) -> int:
        """See `Wiring.waiting_for_new_system`."""
        return self._waiting(INBOUND_QUEUE)

    def _waiting(self, queue: str) -> int:
        counts = self._attributes(
            queue,
            "ApproximateNumberOfMessages",
            "ApproximateNumberOfMessagesNotVisible",
            "ApproximateNumberOfMessagesDelayed",
        )
        return sum(int(count) for count in counts.values())

    def _attributes(self, queue: str, *names: Any) -> dict[str, str]:
        answer = self._sqs.get_queue_attributes(QueueUrl=self._queues[queue], AttributeNames=names)
        return {str(name): value for name, value in answer["Attributes"].items()}
