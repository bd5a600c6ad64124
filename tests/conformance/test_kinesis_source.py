"""Kinesis as a source: the suite of all sources, and shards that are split, merged, shared, throttled and forgotten."""

import json
import threading
import uuid
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, ClassVar

import boto3
import pytest
from structlog.testing import capture_logs

from conformance.source_suite import SourceFeatures, SourceHarness, SourceSuite, drain, take
from figbridge import preflight
from figbridge.config import Config, KinesisSinkSection, KinesisSourceSection
from figbridge.deadletter import TableDeadLetterStore
from figbridge.errors import QueueError, QueueUnavailable
from figbridge.event import Event
from figbridge.metrics import Metrics
from figbridge.reverse.setup import open_consumer
from figbridge.transports import open_sink, open_source
from figbridge.transports.kinesis_source import KinesisSource
from fixtures.anyhttp import FOREIGN
from fixtures.clock import until
from fixtures.fake_aws import raw, refuse
from fixtures.fake_kinesis import NAME, FakeKinesis
from fixtures.kpl import aggregated
from fixtures.postgres import Database
from fixtures.reverse import count, make_shop

FEATURES = SourceFeatures(any_bytes=True, patience=8.0, singly=False, counts=False)


def section(endpoint: str, stream: str = NAME, **options: Any) -> KinesisSourceSection:
    given = {"type": "kinesis", "stream": stream, "endpoint_url": endpoint, "lease-seconds": 1}
    return KinesisSourceSection.model_validate({**given, **options})


class MotoHarness:
    features: ClassVar[SourceFeatures] = FEATURES

    def __init__(self, endpoint: str, database: Database) -> None:
        self.endpoint, self.dsn, self.stream = endpoint, database.dsn, f"s-{uuid.uuid4()}"
        self.client: Any = boto3.client("kinesis", endpoint_url=endpoint)
        self.client.create_stream(StreamName=self.stream, ShardCount=1)

    def open(self) -> KinesisSource:
        return KinesisSource(section(self.endpoint, self.stream), self.dsn)

    def open_missing(self) -> KinesisSource:
        return KinesisSource(section(self.endpoint, "nobodys"), self.dsn)

    def put(self, bodies: Sequence[bytes]) -> None:
        for body in bodies:
            self.client.put_record(StreamName=self.stream, Data=body, PartitionKey="k")


class FakeHarness:
    features: ClassVar[SourceFeatures] = FEATURES

    def __init__(self, fake: FakeKinesis, database: Database) -> None:
        self.fake, self.dsn = fake, database.dsn

    def open(self) -> KinesisSource:
        return KinesisSource(section(self.fake.url), self.dsn)

    def open_missing(self) -> KinesisSource:
        return KinesisSource(section(self.fake.url, "nobodys"), self.dsn)

    def put(self, bodies: Sequence[bytes]) -> None:
        for body in bodies:
            self.fake.put("k", body)


class TestMoto(SourceSuite):
    @pytest.fixture
    def harness(self, aws_endpoint: str, database: Database) -> SourceHarness:
        make_shop(database)
        return MotoHarness(aws_endpoint, database)


class TestKinesis(SourceSuite):
    @pytest.fixture
    def harness(self, fake: FakeKinesis, database: Database) -> SourceHarness:
        return FakeHarness(fake, database)


@pytest.fixture
def fake(database: Database) -> Iterator[FakeKinesis]:
    make_shop(database)
    with FakeKinesis(shards=3) as found:
        yield found


def opened(fake: FakeKinesis, database: Database, **options: Any) -> KinesisSource:
    return KinesisSource(section(fake.url, **options), database.dsn)


def test_the_configuration_opens_it(fake: FakeKinesis, database: Database) -> None:
    source = open_source(section(fake.url), database.dsn)
    source.check()
    assert source.name == "kinesis"
    source.close()


def test_order_holds_per_key_through_a_split_and_a_merge(fake: FakeKinesis, database: Database) -> None:
    sent: dict[str, list[bytes]] = defaultdict(list)

    def put(number: int) -> None:
        for key in "abcdefghij":
            body = f"{key}{number}".encode()
            fake.put(key, body)
            sent[key].append(body)

    for number in range(5):
        put(number)
    first, second = fake.split("shardId-000000000001")
    for number in range(5, 10):
        put(number)
    fake.merge(second, "shardId-000000000002")
    for number in range(10, 15):
        put(number)
    fake.split(first)
    for number in range(15, 20):
        put(number)
    source = opened(fake, database)
    bodies = drain(source, 200)
    by_key: dict[str, list[bytes]] = defaultdict(list)
    for body in bodies:
        by_key[body[:1].decode()].append(body)
    assert by_key == sent
    until(lambda: not source.receive(wait=0.1) and not _unended_parents(database), 20)
    source.close()


def _unended_parents(database: Database) -> list[Any]:
    """Shards that were closed, and are not marked as read to their end."""
    return database.execute(
        "SELECT p.shard FROM figbridge.stream_shard p WHERE NOT ended AND EXISTS "
        "(SELECT FROM figbridge.stream_shard c WHERE p.shard = ANY (c.parents))"
    )


def test_children_wait_until_their_parents_are_acknowledged(fake: FakeKinesis, database: Database) -> None:
    parent = fake.put("k", b"old")
    fake.split(parent)
    child = fake.put("k", b"new")
    source = opened(fake, database)
    (old,) = take(source, 1)
    for _ in range(8):
        assert not source.receive(wait=0.2)
    assert child not in fake.reads
    old.ack()
    assert [it.body for it in take(source, 1)] == [b"new"]
    source.close()


def test_replicas_share_the_shards_and_take_over(fake: FakeKinesis, database: Database) -> None:
    one, other = opened(fake, database), opened(fake, database)
    keys = [str(n) for n in range(60)]
    for key in keys:
        fake.put(key, key.encode())
    assert len(drain(one, 60)) == 60

    # the second one gets a share although the first had them all
    def shared() -> bool:
        one.receive(wait=0.1)
        other.receive(wait=0.1)
        return sorted([*one._shards, *other._shards]) == sorted(fake.shards) and len(other._shards) > 0

    until(shared, 20)
    held = set(other._shards)
    other._leases.close()  # type: ignore[union-attr]  # a process that dies says nothing
    other._shards = {}
    until(lambda: not one.receive(wait=0.1) and one._shards.keys() >= held, 20)
    for key in keys:
        fake.put(key, key.encode())
    assert sorted(drain(one, 60)) == sorted(key.encode() for key in keys)
    one.close()


def test_a_checkpoint_is_the_holders_alone(fake: FakeKinesis, database: Database) -> None:
    """A replica that was frozen wakes up with records in hand whose shard is another one's by now."""
    for number in range(4):
        fake.put("k", b"%d" % number)
    frozen = opened(fake, database)
    held = take(frozen, 4)
    database.execute("UPDATE figbridge.stream_shard SET held_until = now() - interval '1 s'")
    awake = opened(fake, database)
    assert drain(awake, 4) == [b"0", b"1", b"2", b"3"]
    before = database.execute("SELECT shard, checkpoint FROM figbridge.stream_shard ORDER BY 1")
    frozen.acknowledge(held[:1])
    assert held[0].shard not in frozen._shards  # type: ignore[attr-defined]
    assert database.execute("SELECT shard, checkpoint FROM figbridge.stream_shard ORDER BY 1") == before
    frozen.close()
    awake.close()


def test_an_iterator_that_expired_is_made_anew(fake: FakeKinesis, database: Database) -> None:
    source = opened(fake, database)
    fake.put("k", b"a")
    assert drain(source, 1) == [b"a"]
    fake.expire_iterators()
    fake.put("k", b"b")
    assert drain(source, 1) == [b"b"]
    source.close()


@pytest.mark.parametrize("code", ["ProvisionedThroughputExceededException", "LimitExceededException"])
def test_a_shard_that_is_read_too_fast_waits(fake: FakeKinesis, database: Database, code: str) -> None:
    fake.put("k", b"a")
    fake.script["GetRecords"] = deque([refuse(400, code)] * 9)  # botocore itself tries some times
    source = opened(fake, database)
    assert drain(source, 1) == [b"a"]
    source.close()


def test_a_service_that_fails_is_unavailable_and_goes_on(fake: FakeKinesis, database: Database) -> None:
    fake.put("k", b"a")
    source = opened(fake, database)
    source.receive(wait=0)
    fake.put("k", b"b")
    fake.script["GetRecords"] = deque([refuse(500, "InternalFailure")] * 12)
    with pytest.raises(QueueUnavailable):
        until(lambda: source.receive(wait=0.2) and False, 20)
    fake.script["GetRecords"].clear()
    assert drain(source, 1) == [b"b"]
    source.close()


def test_a_refused_permission_names_the_rights(fake: FakeKinesis, database: Database) -> None:
    fake.script["DescribeStreamSummary"] = deque([refuse(400, "AccessDeniedException")])
    with pytest.raises(QueueError, match="AccessDenied") as caught:
        opened(fake, database).check()
    assert "kinesis:GetRecords" in caught.value.hint
    assert not caught.value.retryable


def test_the_latest_is_what_comes_after_the_first_look(fake: FakeKinesis, database: Database) -> None:
    fake.put("k", b"before")
    source = opened(fake, database, start="latest")
    assert not source.receive(wait=0.3)
    source.close()  # nothing was acknowledged, and yet nothing of what comes now is lost
    fake.put("k", b"after")
    again = opened(fake, database, start="latest")
    assert drain(again, 1) == [b"after"]
    # a shard that a resharding makes is read from its beginning
    fake.split(next(iter(fake.shards)))
    for number in range(20):
        fake.put(str(number), b"%d" % number)
    assert len(drain(again, 20)) == 20
    again.close()


def test_another_stream_of_the_same_name_is_read_from_its_beginning(fake: FakeKinesis, database: Database) -> None:
    fake.put("k", b"a")
    source = opened(fake, database)
    assert drain(source, 1) == [b"a"]
    source.close()
    with FakeKinesis(shards=3) as anew:
        anew.made = datetime(2020, 1, 1, tzinfo=UTC)
        anew.put("k", b"b")
        source = KinesisSource(section(anew.url), database.dsn)
        assert drain(source, 1) == [b"b"]
        source.close()


def test_a_shard_that_is_gone_unread_is_loud_and_holds_up_nobody(fake: FakeKinesis, database: Database) -> None:
    parent = fake.put("k", b"never read")
    waiting = opened(fake, database)
    waiting._look_around()  # it is known
    waiting.close()
    fake.split(parent)
    fake.put("k", b"child")
    fake.forget(parent)
    with capture_logs() as logs:
        source = opened(fake, database)
        assert drain(source, 1) == [b"child"]
        source.close()
    (told,) = [line for line in logs if "gone" in line["event"]]
    assert (told["log_level"], told["shards"]) == ("error", [parent])


def test_an_old_checkpoint_is_loud(fake: FakeKinesis, database: Database) -> None:
    fake.put("k", b"a")
    source = opened(fake, database)
    assert drain(source, 1) == [b"a"]
    source.close()
    database.execute(
        "UPDATE figbridge.stream_shard SET checkpoint_at = now() - interval '25 hours' WHERE checkpoint <> ''"
    )
    with capture_logs() as logs:
        source = opened(fake, database)
        source.receive(wait=0)
        source.close()
    assert [line["log_level"] for line in logs if "older than" in line["event"]] == ["error"]


def test_an_aggregated_record_is_done_with_its_last_part(fake: FakeKinesis, database: Database) -> None:
    """What a checkpoint inside of it would say, only the whole of it says: nothing in it is skipped."""
    for data in (b"0", aggregated(b"1", b"2", b"3"), b"4", aggregated(b"5")):
        fake.put("k", data)
    bodies = [b"0", b"1", b"2", b"3", b"4", b"5"]
    for settled, again in ((3, 1), (2, 1), (3, 4), (0, 4), (1, 5)):
        source = opened(fake, database)
        held = take(source, len(bodies))
        assert [it.body for it in held] == bodies
        source.acknowledge(held[:settled])
        source.close()  # whether it ends like this or by a kill: the checkpoint is what was acknowledged
        bodies = [b"0", b"1", b"2", b"3", b"4", b"5"][again:]
    source = opened(fake, database)
    source.acknowledge(take(source, 1))
    assert not source.receive(wait=0.6)
    source.close()


def test_parts_that_are_settled_in_another_order(fake: FakeKinesis, database: Database) -> None:
    fake.put("k", aggregated(b"1", b"2", b"3"))
    source = opened(fake, database)
    first, second, third = take(source, 3)
    third.ack()
    first.ack()
    second.nack()
    (second,) = take(source, 1)
    assert (second.body, second.attempts) == (b"2", 2)
    done = "SELECT count(*) FROM figbridge.stream_shard WHERE checkpoint <> ''"
    assert database.execute(done) == [(0,)]
    second.ack()
    assert database.execute(done) == [(1,)]
    source.close()


def test_aggregated_records_are_handed_out_in_portions(fake: FakeKinesis, database: Database) -> None:
    """A shard that is closed by now is not at its end while some of what was fetched waits to be handed out."""
    bodies = [b"%d" % number for number in range(6000)]
    for begin in range(0, 6000, 600):
        shard = fake.put("k", aggregated(*bodies[begin : begin + 600]))
    fake.split(shard)
    fake.put("k", b"child")
    source = opened(fake, database)
    portions: list[int] = []
    found: list[bytes] = []
    while len(found) < 6001:
        held = source.receive(wait=2)
        assert held, f"{len(found)} came, and then none"
        portions.append(len(held))
        found += [it.body for it in held]
        source.acknowledge(held)
    assert found == [*bodies, b"child"]
    assert max(portions) <= 1200
    unsettled = opened(fake, database)
    source.close()
    assert not unsettled.receive(wait=0.6)
    unsettled.close()


def test_what_the_sink_writes_becomes_rows(fake: FakeKinesis, database: Database, aws_endpoint: str) -> None:
    """The whole path over three replicas, with a resharding in between; each event once."""
    client: Any = boto3.client("kinesis", endpoint_url=aws_endpoint)
    client.create_stream(StreamName=NAME, ShardCount=1)
    sink = open_sink(
        KinesisSinkSection.model_validate({"type": "kinesis", "stream": NAME, "endpoint_url": aws_endpoint})
    )
    sink.check()
    detail = json.dumps({"id": 1000, "status": "by the sink"}).encode()
    sink.publish([Event("sink-1", "shop.next", "order", "k", datetime.now(UTC), detail)])
    shard = client.list_shards(StreamName=NAME)["Shards"][0]["ShardId"]
    first = client.get_shard_iterator(StreamName=NAME, ShardId=shard, ShardIteratorType="TRIM_HORIZON")
    (record,) = client.get_records(ShardIterator=first["ShardIterator"])["Records"]
    fake.put("sink", record["Data"])
    tree = {
        "legacy": {"dsn": database.dsn, "tables": ["shop.orders"]},
        "reverse": {
            "source": section(fake.url).model_dump(by_alias=True, exclude_none=True),
            "mappings": [
                {
                    "match": {"source": "shop.next", "detail-type": "order"},
                    "into": "shop.orders",
                    "action": "upsert",
                    "key": {"id": "detail.id"},
                    "set": {"status": "detail.status"},
                }
            ],
        },
    }
    config, stop = Config.parse(json.dumps(tree), {}), threading.Event()
    assert config.reverse
    threads = []
    for _ in range(3):
        source, letters = open_source(config.reverse.source, database.dsn), TableDeadLetterStore(database.dsn)
        consumer = open_consumer(config, config.reverse, source, letters, Metrics())
        threads.append(threading.Thread(target=consumer.run, args=(stop,), daemon=True))
        threads[-1].start()
    for number in range(300):
        if number == 100:
            children = fake.split("shardId-000000000000")
        if number == 200:
            fake.merge(*children)
        body = {"id": f"e{number}", "source": "shop.next", "detail-type": "order"}
        body |= {"detail": {"id": number % 30, "status": str(number)}}  # type: ignore[dict-item]
        fake.put(f"order-{number % 30}", json.dumps(body).encode())
    # from a producer of Amazon's library, and one of those records a second time, where it was damaged on the way
    bodies = [
        json.dumps(
            {"id": f"kpl-{n}", "source": "shop.next", "detail-type": "order", "detail": {"id": 2000 + n}}
        ).encode()
        for n in range(3)
    ]
    fake.put("kpl", aggregated(*bodies))
    fake.put("kpl", damaged := aggregated(*bodies)[:-1])
    until(lambda: count(database, "figbridge.inbox") == 304, 60)
    until(lambda: count(database, "figbridge.dead_letter") == 1, 20)
    stop.set()
    for thread in threads:
        thread.join(60)
    found = database.execute("SELECT id, status FROM shop.orders ORDER BY id")
    made = [(n, str(270 + n)) for n in range(30)]
    assert found == [*made, (1000, "by the sink"), (2000, None), (2001, None), (2002, None)]
    ((body, message),) = database.execute("SELECT body, message FROM figbridge.dead_letter")
    assert bytes(body) == damaged
    assert "JSON" in message, message
    assert database.execute("SELECT count(*) FROM figbridge.stream_shard WHERE holder IS NOT NULL") == [(0,)]


def test_the_table_is_asked_for_by_the_preflight(database: Database, fake: FakeKinesis) -> None:
    tree = {
        "legacy": {"dsn": database.dsn, "tables": ["shop.orders"]},
        "reverse": {
            "source": section(fake.url).model_dump(by_alias=True, exclude_none=True),
            "mappings": [{"match": {"source": "a", "detail-type": "b"}, "into": "shop.orders", "action": "delete",
                          "key": {"id": "detail.id"}}],
        },
    }  # fmt: skip
    config = Config.parse(json.dumps(tree), {})
    assert [it for it in preflight.inspect(config, "run") if it.level == "error"] == []
    database.execute("DROP TABLE figbridge.stream_shard")
    (missing,) = [it for it in preflight.inspect(config, "run") if it.level == "error"]
    assert "stream_shard" in missing.what


def test_the_preflight_compares_for_how_long_a_key_and_a_record_are_kept(database: Database, fake: FakeKinesis) -> None:
    tree: dict[str, Any] = {
        "legacy": {"dsn": database.dsn, "tables": ["shop.orders"]},
        "reverse": {
            "source": section(fake.url).model_dump(by_alias=True, exclude_none=True),
            "mappings": [{"match": {"source": "a", "detail-type": "b"}, "into": "shop.orders", "action": "delete",
                          "key": {"id": "detail.id"}}],
        },
    }  # fmt: skip

    def warned() -> list[str]:
        found = preflight.inspect(Config.parse(json.dumps(tree), {}), "run")
        return [it.what for it in found if it.level == "warning" and it.where == "reverse.inbox-retention"]

    assert warned() == []
    fake.hours = 30 * 24
    (said,) = warned()
    assert "known for 30 days, and the stream keeps a record for 30" in said
    tree["reverse"]["inbox-retention"] = 31
    assert warned() == []


@pytest.mark.parametrize("answer", FOREIGN.values(), ids=FOREIGN)
def test_an_answer_that_is_none_of_awss_is_unavailable(
    fake: FakeKinesis, database: Database, answer: tuple[int, bytes]
) -> None:
    fake.put("k", b"x")
    source = opened(fake, database)
    for operation in ("DescribeStreamSummary", "ListShards", "GetShardIterator", "GetRecords"):
        fake.script[operation] = deque([raw(*answer)])

    for _ in fake.script.copy():
        with pytest.raises(QueueUnavailable):
            source.receive(wait=0)

    assert [it.body for it in take(source, 1)] == [b"x"]
    source.close()
