"""Damaged messages in the real pipeline: a DecodeError that says where, an end, and nothing acknowledged behind it.

The messages are a server's own; one of them is changed between libpq and the capture loop.
"""

import random
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from figbridge.change import Lsn, Relation
from figbridge.errors import DecodeError
from figbridge.event import Event
from figbridge.forward.capture import Capture, _Open
from figbridge.forward.source import ReplicationSource, read_keepalive
from fixtures import wire
from fixtures.clock import until
from fixtures.forward import Forward
from fixtures.postgres import Database, Servers
from fixtures.replay import FENCE, Replica, rows_of, settled

TABLES = """
CREATE TYPE mood AS ENUM ('calm', 'wild');
CREATE TABLE thing (id int PRIMARY KEY, n numeric, at timestamptz, ok bool, doc jsonb, tags text[],
    mood mood, big text);
ALTER TABLE thing ALTER big SET STORAGE EXTERNAL;
CREATE TABLE bag (a int8, b text); ALTER TABLE bag REPLICA IDENTITY FULL;
CREATE PUBLICATION pub FOR TABLE thing, bag;
"""
WORKLOAD = [
    "INSERT INTO thing SELECT n, n / 3.0, now(), true, '{\"a\": [1]}', '{x,NULL}', 'wild' FROM generate_series(1, 4) n",
    "INSERT INTO thing (id, big) VALUES (9, repeat('x', 9000))",
    "UPDATE thing SET ok = NULL; UPDATE thing SET id = -id WHERE id = 9; DELETE FROM thing WHERE id = 3",
    "INSERT INTO bag VALUES (1, 'a'), (1, 'a'), (NULL, ''); UPDATE bag SET b = 'ü' WHERE a = 1; DELETE FROM bag",
    "SELECT pg_logical_emit_message(true, 'fence', 'inside'); TRUNCATE thing, bag",
    "SELECT pg_logical_emit_message(false, 'fence', 'outside')",
    "INSERT INTO bag VALUES (2, 'b')",
]


# bool, bytea, "char", name, int8, int2, int2vector, int4, text, oidvector, json, float8, money, numeric, arrays of
# bool, int4, text, numeric and json, timestamp, timestamptz, jsonb
KINDS = [16, 17, 18, 19, 20, 21, 22, 23, 25, 30, 114, 701, 790, 1700, 1000, 1007, 1009, 1231, 199, 1114, 1184, 3802]


class Tapped(ReplicationSource):
    """Hands each message on as `change` returns it; that is where a test listens, or does damage."""

    change: Callable[[bytes], bytes] = staticmethod(bytes)

    def receive(self) -> list[bytes]:
        return [self.change(message) for message in super().receive()]


class Bench(Forward):
    """A forward path with a tap, whose keys are asked for once."""

    known: dict[str, Any]

    def make_source(self, dsn: str, publications: tuple[str, ...]) -> ReplicationSource:
        self.tapped = Tapped(dsn, self.database.slot, publications)
        return self.tapped

    def primary_keys(self, dsn: str, relation: Relation) -> Any:
        known = self.__dict__.setdefault("known", {})
        if str(relation) not in known:
            known[str(relation)] = super().primary_keys(dsn, relation)
        return known[str(relation)]


@pytest.fixture
def recorded(database: Database) -> list[bytes]:
    """What a server sends for the workload, keepalives too."""
    database.execute(TABLES)
    database.create_slot()
    for statement in WORKLOAD:
        database.execute(statement)
    messages: list[bytes] = []

    def keep(message: bytes) -> bytes:
        messages.append(message)
        return message

    bench = Bench(database, messages=[FENCE])
    bench.tapped.change = keep  # before there is anything to miss
    with bench as forward:
        settled(forward)
        until(lambda: any(message[:1] == b"k" for message in messages), 20, "a keepalive")
    return messages


class Fed:
    """Capture loops that are given messages by hand; nothing is connected, only catalogues are asked."""

    def __init__(self, database: Database) -> None:
        self._forward = Bench(database, messages=["*"])

    def close(self) -> None:
        self._forward.source.close()

    def take(self, messages: list[bytes], *, lanes: bool = True) -> list[Event]:
        """The events. Raises what the capture loop raises."""
        capture = self._forward._loops[0]
        assert isinstance(capture, Capture)
        capture._shaper.rewind()
        capture._echo.begin(datetime.now(UTC))
        capture._handover.forget()  # as each connection begins
        buffer, opened = self._forward.buffer, _Open("1-slot")
        buffer._batches.clear()
        if lanes:
            capture._take(messages, opened)
        else:
            for message in messages:
                capture._one(message, opened)
        # a keepalive hands over what was before it
        return [*(event for batch in buffer._batches for event in batch.events), *capture._handover.events]


@pytest.fixture
def fed(database: Database) -> Any:
    made = Fed(database)
    yield made
    made.close()


@pytest.fixture(scope="session")
def fed_once(servers: Servers) -> Any:
    """For what asks no catalogue."""
    made = Fed(Database(servers.get(max(servers.versions)), "postgres"))
    yield made
    made.close()


def outcome(fed: Fed, messages: list[bytes], *, lanes: bool) -> list[Event] | tuple[str, str, int]:
    """Events, or what the DecodeError says. Anything else fails the test."""
    try:
        return fed.take(messages, lanes=lanes)
    except DecodeError as error:
        says = error.lsn, error.kind, error.offset
    assert says[0] != "?" or says[1] not in "BCORYIUDTM"
    assert says[2] >= 0
    return says


def test_undamaged_the_two_ways_are_one(recorded: list[bytes], fed: Fed) -> None:
    found = outcome(fed, recorded, lanes=True)
    assert found == outcome(fed, recorded, lanes=False)
    assert len(found) > 20


def test_every_message_cut_at_every_byte_of_its_frame_and_payload(recorded: list[bytes], fed: Fed) -> None:
    for index, message in enumerate(recorded):
        for length in range(1, len(message)):
            if 200 < length < len(message) - 20:
                continue  # inside one long value
            # the one before comes too: in a lane, where there is one
            with pytest.raises(DecodeError) as caught:
                fed.take([*recorded[:index], message[:length]])
            if message[:1] == b"w" and length >= 9:
                assert caught.value.lsn == str(Lsn(int.from_bytes(message[1:9])))
            assert 0 <= caught.value.offset <= length


def test_flipped_bits_are_judged_alike_on_both_ways(recorded: list[bytes], fed: Fed) -> None:
    chance = random.Random(7)
    for index, message in enumerate(recorded):
        for bit in chance.sample(range(8 * min(len(message), 160)), 40):
            damaged = bytearray(message)
            damaged[bit // 8] ^= 1 << bit % 8
            if bit < 8:
                continue  # not XLogData any more, or no keepalive
            messages = [*recorded[:index], bytes(damaged), *recorded[index + 1 : index + 3]]
            assert outcome(fed, messages, lanes=True) == outcome(fed, messages, lanes=False)


@settings(max_examples=200, deadline=None)
@given(kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4, unique=True), data=st.data())
def test_texts_that_a_type_cannot_have(fed_once: Fed, kinds: list[int], data: st.DataObject) -> None:
    """An encoder may trust the server; what it makes of nonsense is an event or a DecodeError, never another error."""
    described = wire.relation(7, [(number == 0, f"c{number}", oid, -1) for number, oid in enumerate(kinds)])
    texts = st.binary(max_size=25) | st.text('0123456789-.eE{}",\\ +:', max_size=25).map(str.encode)
    rows = [wire.insert(7, [data.draw(texts) for _ in kinds]) for _ in range(2)]
    plain = wire.insert(7, [None for _ in kinds])
    payloads = [described, wire.begin(), plain, *rows, wire.commit()]
    messages = [wire.xlog_data(payload) for payload in payloads]
    assert outcome(fed_once, messages, lanes=True) == outcome(fed_once, messages, lanes=False)


def test_a_damaged_message_ends_the_bridge_and_nothing_behind_it_is_acknowledged(each_database: Database) -> None:
    each_database.execute(TABLES)
    each_database.create_slot()
    with Bench(each_database, messages=[FENCE]) as forward:
        seen: list[int] = []

        def damage(message: bytes) -> bytes:
            if message[:1] == b"w" and b"marked" in message:
                seen.append(int.from_bytes(message[1:9]))
                return message[:30] + b"X" + message[31:]  # where N stood
            return message

        forward.tapped.change = damage
        each_database.execute("INSERT INTO bag VALUES (1, 'before')")
        settled(forward)
        with each_database.connect() as connection, connection.transaction():
            connection.execute("INSERT INTO bag VALUES (2, 'of its transaction')")
            ((before,),) = connection.execute("SELECT pg_current_wal_insert_lsn() - '0/0'").fetchall()
            connection.execute("INSERT INTO bag VALUES (3, 'marked'), (4, 'behind')")
        each_database.execute("INSERT INTO bag VALUES (5, 'later')")
        failure = forward.ended()
    assert isinstance(failure, DecodeError)
    assert (failure.kind, failure.offset, failure.lsn) == ("I", 5, str(Lsn(seen[0])))
    assert failure.lsn in str(failure)
    assert not failure.retryable
    assert forward.confirmed() <= before
    assert "behind" not in str(forward.sink.details)
    with Forward(each_database, messages=[FENCE]) as again:  # undamaged, it all comes again
        replica = Replica(it for it in settled(again) if it["after"]["a"] > 1)
    assert replica.rows("bag") == [row for row in rows_of(each_database, "bag") if row["a"] > 1]


def test_a_damaged_keepalive_ends_the_bridge(database: Database) -> None:
    database.execute(TABLES)
    database.create_slot()
    with Bench(database, options="-c wal_sender_timeout=1s") as forward:
        forward.tapped.change = lambda message: message[:-1] if message[:1] == b"k" else message
        failure = forward.ended()
    assert isinstance(failure, DecodeError)
    assert (failure.kind, failure.offset) == ("k", 17)
    with pytest.raises(DecodeError):
        read_keepalive(b"k" + bytes(18))
