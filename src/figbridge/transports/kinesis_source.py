"""A Kinesis data stream as a source: https://docs.aws.amazon.com/streams/latest/dev/developing-consumers-with-sdk.html

A record is what figbridge's own sink writes, or anything else that `figbridge.reverse.message` takes. Those that the
Kinesis Producer Library has aggregated are taken apart (`kpl`); each record in them is a delivery of its own.

INVARIANT. The checkpoint of a shard stands behind a record only when that one, to the last one in it, and all before it
are acknowledged, which is after their transaction has committed. What was read beyond comes again after a crash, and is
a duplicate then, as is the beginning of an aggregated record that was half done; the inbox must know keys for longer
than the stream keeps records, if somebody sets a checkpoint back.

`shards` shares the shards among replicas and keeps the order through a resharding. An iterator that has expired is made
anew behind what was read last; a shard that is read too fast waits a little, and the others go on.
"""

import contextlib
import math
import os
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import structlog

from figbridge.config import KinesisSourceSection
from figbridge.errors import BridgeError, QueueError, QueueUnavailable
from figbridge.transports import Delivery, aws, kpl
from figbridge.transports.awsclient import Client
from figbridge.transports.shards import Lease, Leases

_log = structlog.get_logger()

_LIMIT: Final = 1000  # records of one GetRecords, which takes up to 10,000 or 10 MiB
_ENOUGH: Final = 1000  # records of one `receive`
_MOST: Final = 4000  # records of a shard that wait for their acknowledgement
_PACE: Final = 0.2  # seconds between two reads of a shard: it allows five a second, to all of its readers together
_IDLE: Final = 0.5  # the same when there was nothing more
_THROTTLED: Final = 1.0  # the same when it was too fast
_TOO_FAST: Final = frozenset(
    {"ProvisionedThroughputExceededException", "LimitExceededException", "KMSThrottlingException"}
)
_RIGHTS: Final = "kinesis:DescribeStreamSummary, kinesis:ListShards, kinesis:GetShardIterator and kinesis:GetRecords"


class _Shard:
    """A shard that is ours, and what of it is in our hands."""

    def __init__(self, lease: Lease) -> None:
        self.id = lease.shard
        self.since = lease.since
        self.read = lease.checkpoint  # the sequence number of the last record that was fetched
        self.done = self.written = lease.checkpoint  # … that is done with all before it; and that the table says so of
        self.iterator: str | None = None
        self.fetched: deque[tuple[str, bytes]] = deque()  # sequence numbers and records, not handed out yet
        self.pending: deque[KinesisDelivery] = deque()
        self.exhausted = False
        self.due = 0.0


class KinesisSource:
    """One stream. See `figbridge.transports.Source`; also raises LegacyUnavailable, for its place is kept there.

    `kept` are the seconds for which the stream keeps records, inf until it was asked.
    """

    name = "kinesis"

    def __init__(self, section: KinesisSourceSection, dsn: str) -> None:
        self._section = section
        self._stream = {"StreamARN" if section.stream.startswith("arn:") else "StreamName": section.stream}
        self._client = Client("kinesis", section)
        self._dsn = dsn
        self._leases: Leases | None = None
        self.kept = math.inf
        self._shards: dict[str, _Shard] = {}
        self._again: list[tuple[float, KinesisDelivery]] = []
        self._look_at = 0.0
        self._closed = threading.Event()

    def check(self) -> None:
        """See `Source.check`."""
        self._describe()

    def receive(self, *, wait: float) -> Sequence["KinesisDelivery"]:
        """See `Source.receive`; in order for each shard."""
        end = time.monotonic() + wait
        while True:
            self._look_around()
            found = self._released()
            for shard in list(self._shards.values()):
                if len(found) < _ENOUGH and self._may_read(shard):
                    self._read(shard)
                found += self._unpacked(shard, _ENOUGH - len(found))
            left = end - time.monotonic()
            if found or left <= 0 or self._closed.wait(min(left, self._until_due())):
                return found

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """See `Source.acknowledge`: one statement for all shards."""
        for delivery in deliveries:
            if isinstance(delivery, KinesisDelivery):
                delivery.done = True
        for shard in self._shards.values():
            while shard.pending and shard.pending[0].done:
                delivery = shard.pending.popleft()
                if delivery.ends:
                    shard.done = delivery.sequence
        moved = {it.id: it.done for it in self._shards.values() if it.done is not None and it.done != it.written}
        if moved and self._leases:
            ours = self._leases.checkpoint(moved)
            for shard_id, done in moved.items():
                if shard_id in ours:
                    self._shards[shard_id].written = done
                else:
                    self._lose(shard_id)
        self._end_exhausted()

    def give_back(self, delivery: "KinesisDelivery", delay: float) -> None:
        """Hand it out again, not before `delay` seconds have passed."""
        delivery.attempts += 1
        self._again.append((time.monotonic() + delay, delivery))

    def close(self) -> None:
        """See `Source.close`; another one may read our shards at once."""
        self._closed.set()
        if self._leases is not None:
            with contextlib.suppress(BridgeError):
                self._leases.release(self._shards)
            self._leases.close()
        self._shards = {}
        self._client.close()

    def _look_around(self) -> None:
        """Every third of a lease: renew, see which shards there are, take a fair share of them."""
        now = time.monotonic()
        if now < self._look_at:
            return
        if self._leases is None:
            self._leases = self._open()
        leases = self._leases
        for lost in self._shards.keys() - leases.renew(self._shards):
            self._lose(lost)
        since = datetime.now(UTC) if self._section.start == "latest" else None
        gone = leases.register(self._list(), since)
        if gone:
            # in the order of events: the stream has forgotten them, and with them what was not read
            _log.error(
                "shards are gone before they were read to their end: their records are lost",
                shards=gone,
                hint="keep records for longer (IncreaseStreamRetentionPeriod), and compare the tables with the new "
                "system",
            )
            leases.end(gone, anybodys=True)
            for shard_id in gone:
                self._shards.pop(shard_id, None)
        for lease in leases.take(len(self._shards)):
            self._shards[lease.shard] = _Shard(lease)
            if lease.age is not None and lease.age > self.kept:
                _log.error(
                    "a checkpoint is older than what the stream keeps: records may be lost",
                    shard=lease.shard,
                    hint="compare the tables with the new system",
                )
        self._look_at = now + self._section.lease_seconds / 3

    def _open(self) -> Leases:
        found = self._describe()
        holder = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        made = found["StreamCreationTimestamp"].astimezone(UTC).isoformat(timespec="milliseconds")
        stream, seconds = f"{found['StreamARN']} {made}", self._section.lease_seconds
        return Leases(self._dsn, stream=stream, subscriber=self._section.subscriber, holder=holder, seconds=seconds)

    def _lose(self, shard_id: str) -> None:
        shard = self._shards.pop(shard_id)
        self._again = [(at, it) for at, it in self._again if it.shard != shard_id]
        _log.info("a shard is another one's now", shard=shard_id, unacknowledged=len(shard.pending))

    def _end_exhausted(self) -> None:
        ended = [it.id for it in self._shards.values() if it.exhausted and not (it.fetched or it.pending)]
        if ended and self._leases:
            self._leases.end(ended)
            for shard_id in ended:
                del self._shards[shard_id]
            self._look_at = 0.0  # its children may be read now

    def _released(self) -> list["KinesisDelivery"]:
        now = time.monotonic()
        ready = [it for at, it in self._again if at <= now]
        self._again = [(at, it) for at, it in self._again if at > now]
        return ready

    def _may_read(self, shard: _Shard) -> bool:
        room = not shard.fetched and len(shard.pending) < _MOST
        return not shard.exhausted and room and shard.due <= time.monotonic()

    def _until_due(self) -> float:
        times = [self._look_at, *(at for at, _ in self._again)]
        times += [it.due for it in self._shards.values() if not it.exhausted and len(it.pending) < _MOST]
        return max(0.01, min(times) - time.monotonic())

    def _read(self, shard: _Shard) -> None:
        try:
            if shard.iterator is None:
                shard.iterator = self._iterator(shard)
            with self._asking("GetRecords"):
                answer = self._client.boto.get_records(ShardIterator=shard.iterator, Limit=_LIMIT)
                fetched = [(it["SequenceNumber"], it["Data"]) for it in answer["Records"]]
        except _Answered as error:
            if error.code == "ExpiredIteratorException":
                shard.iterator, shard.due = None, 0.0
            elif error.code in _TOO_FAST:
                shard.due = time.monotonic() + _THROTTLED
            else:  # ResourceNotFoundException: it went since it was listed, which the next list says
                self._look_at, shard.due = 0.0, time.monotonic() + _THROTTLED
            return
        shard.fetched.extend(fetched)
        if shard.fetched:
            shard.read = shard.fetched[-1][0]
        shard.iterator = answer.get("NextShardIterator")
        shard.exhausted = shard.iterator is None  # closed by a resharding, and read to its end
        more = answer.get("MillisBehindLatest", 0) > 0
        shard.due = time.monotonic() + (_PACE if more else _IDLE)
        if shard.exhausted:
            self._end_exhausted()

    def _unpacked(self, shard: _Shard, most: int) -> list["KinesisDelivery"]:
        """The next records of what was fetched; `most` and the rest of an aggregated one, which is handed out whole."""
        found: list[KinesisDelivery] = []
        while shard.fetched and len(found) < most and len(shard.pending) < _MOST:
            sequence, data = shard.fetched.popleft()
            bodies = kpl.user_records(data)
            deliveries = [KinesisDelivery(self, shard.id, sequence, it) for it in bodies]
            deliveries[-1].ends = True
            shard.pending.extend(deliveries)
            found += deliveries
        return found

    def _iterator(self, shard: _Shard) -> str:
        start: dict[str, Any] = {"ShardIteratorType": "TRIM_HORIZON"}
        if shard.read is not None:
            start = {"ShardIteratorType": "AFTER_SEQUENCE_NUMBER", "StartingSequenceNumber": shard.read}
        elif shard.since is not None:
            start = {"ShardIteratorType": "AT_TIMESTAMP", "Timestamp": shard.since}
        with self._asking("GetShardIterator"):
            answer = self._client.boto.get_shard_iterator(ShardId=shard.id, **start, **self._stream)
            found: str = answer["ShardIterator"]
            return found

    def _describe(self) -> dict[str, Any]:
        try:
            with self._asking("DescribeStreamSummary"):
                answer = self._client.boto.describe_stream_summary(**self._stream)
                summary: dict[str, Any] = answer["StreamDescriptionSummary"]
                kept, status = summary.get("RetentionPeriodHours", 24) * 3600.0, summary["StreamStatus"]
        except _Answered as error:
            raise self._refused("DescribeStreamSummary", error) from error
        self.kept = kept
        if status == "CREATING":
            raise QueueUnavailable(f"the stream {self._section.stream} is being made", hint="the bridge waits for it")
        return summary

    def _list(self) -> dict[str, list[str]]:
        """Shard → its parents."""
        shards: dict[str, list[str]] = {}
        parameters: dict[str, Any] = dict(self._stream)
        while parameters:
            try:
                with self._asking("ListShards"):
                    answer = self._client.boto.list_shards(**parameters)
                    for it in answer["Shards"]:
                        parents = [it.get("ParentShardId"), it.get("AdjacentParentShardId")]
                        shards[it["ShardId"]] = [parent for parent in parents if parent]
            except _Answered as error:
                raise self._refused("ListShards", error) from error
            token = answer.get("NextToken")
            parameters = {"NextToken": token} if token else {}
        return shards

    @contextlib.contextmanager
    def _asking(self, action: str) -> Iterator[None]:
        """Around a call and the reading of its answer.

        Raises _Answered for what the caller may have an answer to, QueueUnavailable or QueueError.
        """
        try:
            with aws.reading():
                yield
        except aws.ERRORS as error:
            code, retryable = aws.classify(error)
            if code in _TOO_FAST or code in {"ExpiredIteratorException", "ResourceNotFoundException"}:
                raise _Answered(code, str(error)) from error
            if aws.expired(code):
                what = f"the stream {self._section.stream} refused {action}: {error}"
                raise self._client.expired(QueueUnavailable(what)) from error
            if retryable:
                raise QueueUnavailable(
                    f"the stream {self._section.stream} did not answer to {action}: {error}",
                    hint="its records are kept; if it lasts, check the network, the region and endpoint_url",
                ) from error
            raise self._refused(action, _Answered(code, str(error))) from error

    def _refused(self, action: str, error: "_Answered") -> QueueError:
        stream = f"the stream {self._section.stream}"
        if error.code in _TOO_FAST:
            return QueueUnavailable(f"{stream} is asked too often ({action})", hint="the bridge tries again")
        remedy = aws.remedy(error.code, action=f"kinesis:{action}", resource=stream)
        return QueueError(f"{stream} refused {action}: {error}", hint=f"{remedy} (the bridge needs {_RIGHTS})")


class _Answered(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class KinesisDelivery:
    """A record, or one of those in an aggregated record. See `figbridge.transports.Delivery`."""

    __slots__ = ("_source", "attempts", "body", "done", "ends", "sequence", "shard")
    lost = False  # see `figbridge.transports.shards`
    group = None  # a shard does not stop for a partition key

    def __init__(self, source: KinesisSource, shard: str, sequence: str, body: bytes) -> None:
        self._source = source
        self.shard = shard
        self.sequence = sequence
        self.body = body
        self.attempts = 1  # in this process: the stream does not count
        self.done = False
        self.ends = False  # it is the last one of the stream's record

    def ack(self) -> None:
        """See `Delivery.ack`."""
        self._source.acknowledge([self])

    def nack(self, *, delay: float = 0.0) -> None:
        """See `Delivery.nack`."""
        self._source.give_back(self, delay)
