"""Events into AWS: figbridge's publisher beside a plain boto3 loop, each in a process of its own.

The publisher is that of `figbridge run`, with its defaults but for the number of requests in flight, and is given what
the publish loop gives it: groups of events, each of which it makes durable before it returns. The loop is what
one writes first: cut into the service's requests, call, look at the answer, call again.
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Final

from bench.endpoint import Endpoint
from bench.proc import Finished, cpu_seconds, memory
from bench.report import Report, SinkLine, say
from figbridge.delivery.pack import Packing
from figbridge.event import Event
from figbridge.forward.publish import Publisher
from figbridge.metrics import Metrics

_KEYS: Final = 20_000
# sink → its section beside endpoint and region, and the entries of its requests
_SINKS: Final[dict[str, tuple[dict[str, Any], int]]] = {
    "eventbridge": ({"type": "eventbridge", "bus": "orders", "in-flight": 32}, 10),
    "kinesis": ({"type": "kinesis", "stream": "orders", "in-flight": 16}, 500),
}
_CRT: Final = "figbridge[crt]"
_PACKED: Final = "figbridge, packed"  # changes by transaction, of which each has ten
# changes/s at least, CPU µs a change at most
PROMISES: Final[dict[tuple[str, str], tuple[float | None, float | None]]] = {
    ("eventbridge", "figbridge"): (5_000, 170),
    ("eventbridge", _PACKED): (40_000, None),
    ("kinesis", "figbridge"): (50_000, None),
}


def made(count: int) -> list[Event]:
    """Events as the shaper makes them of the benchmark's table: 550 bytes of detail."""
    when = datetime.now(UTC)
    events = []
    for n in range(count):
        identity = f"7711325899416979304-figbridge-1-{n // 10:016X}-{n % 10:08X}"
        detail = (
            f'{{"id":"{identity}","op":"update","schema":"public","table":"orders","key":{{"id":{n % _KEYS}}},'
            f'"before":null,"after":{{"id":{n % _KEYS},"customer":"customer {n}","total":{n}.50,"status":"paid",'
            f'"paid":true,"note":"{"x" * 180}"}},"unchanged":[],'
            f'"position":{{"commit_lsn":"0/{n:X}","ordinal":{n % 10},"xid":{n}}},'
            '"committed_at":"2026-11-23T11:22:53.304533Z","hops":0,"cause":null}'
        )
        key = f'public.orders{{"id":{n % _KEYS}}}'
        events.append(Event(identity, "legacy.bench", "orders.updated", key, when, detail.encode()))
    return events


def _publisher(
    sink: str, url: str, *, packed: bool = False, client: str = "boto3"
) -> Callable[[Sequence[Event]], None]:
    from pydantic import TypeAdapter

    from figbridge.config import SinkSection
    from figbridge.transports import open_sink

    adapter: TypeAdapter[SinkSection] = TypeAdapter(SinkSection)
    section = adapter.validate_python({**_SINKS[sink][0], "client": client, "region": "eu-west-1", "endpoint_url": url})
    opened = open_sink(section)
    packing = Packing("transaction", opened, 65_536) if packed else None
    publisher = Publisher(opened, None, Metrics(), threading.Event(), packing=packing)
    publisher.publish([])

    def publish(events: Sequence[Event]) -> None:
        for start in range(0, len(events), publisher.group):
            publisher.publish(events[start : start + publisher.group])

    return publish


def _loop(sink: str, url: str) -> Callable[[Sequence[Event]], None]:
    import boto3

    service: Any = {"eventbridge": "events", "kinesis": "kinesis"}[sink]
    client = boto3.client(service, region_name="eu-west-1", endpoint_url=url)
    size = _SINKS[sink][1]

    def put_events(events: Sequence[Event]) -> int:
        entries = [
            {
                "Source": it.source,
                "DetailType": it.detail_type,
                "Detail": it.detail.decode(),
                "Time": it.time,
                "EventBusName": "orders",
            }
            for it in events
        ]
        return int(client.put_events(Entries=entries)["FailedEntryCount"])

    def put_records(events: Sequence[Event]) -> int:
        records = [{"Data": it.envelope(), "PartitionKey": it.key} for it in events]
        return int(client.put_records(StreamName="orders", Records=records)["FailedRecordCount"])

    put = put_events if sink == "eventbridge" else put_records

    def publish(events: Sequence[Event]) -> None:
        for start in range(0, len(events), size):
            if put(events[start : start + size]):
                raise RuntimeError("refused")

    return publish


_WAYS: Final[dict[str, Callable[[str, str], Callable[[Sequence[Event]], None]]]] = {
    "figbridge": _publisher,
    _PACKED: partial(_publisher, packed=True),
    _CRT: partial(_publisher, client="crt"),
    "boto3 in a loop": _loop,
}


def _measure(way: str, sink: str, url: str, count: int, channel: Connection) -> None:
    os.environ |= {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_EC2_METADATA_DISABLED": "true"}
    publish = _WAYS[way](sink, url)
    events = made(count)
    publish(events[: count // 10])  # connections are open, and what is made once has been made
    began, cpu = time.monotonic(), cpu_seconds()
    publish(events)
    channel.send(Finished(time.monotonic() - began, cpu_seconds() - cpu, memory(os.getpid()).peak, ""))


def _run(way: str, sink: str, url: str, count: int) -> Finished:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_measure, args=(way, sink, url, count, theirs), name=f"bench-{sink}")
    process.start()
    theirs.close()
    try:
        finished: Finished = ours.recv()
    except EOFError:
        raise RuntimeError(f"{way} → {sink} failed") from None
    finally:
        process.join()
    return finished


def sinks(runs: int, report: Report) -> None:
    """Each sink by both ways, in turn."""
    counts = {
        ("figbridge", "eventbridge"): 30_000,
        (_PACKED, "eventbridge"): 200_000,
        (_CRT, "eventbridge"): 60_000,
        ("figbridge", "kinesis"): 200_000,
        (_CRT, "kinesis"): 200_000,
    }
    with Endpoint() as endpoint:
        for sink in _SINKS:
            # the packs of a stream are one shard's, so nobody packs transactions for it
            found: dict[str, list[Finished]] = {way: [] for way in _WAYS if way != _PACKED or sink == "eventbridge"}
            for run in range(runs):
                say(f"{sink}: run {run + 1} of {runs}")
                for way, done in found.items():
                    # the loop is slow, and its rate does not depend on how long it is watched
                    done.append(_run(way, sink, endpoint.url, _count(way, sink, counts)))
            for way, done in found.items():
                count = _count(way, sink, counts)
                report.sinks.append(SinkLine.of(sink, way, count, done, PROMISES.get((sink, way), (None, None))))


def _count(way: str, sink: str, counts: dict[tuple[str, str], int]) -> int:
    return counts.get((way, sink), 200 * _SINKS[sink][1])
