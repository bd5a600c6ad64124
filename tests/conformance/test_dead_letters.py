"""The stores of dead letters: the suite on each, and what only one of them does."""

import contextlib
import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import boto3
import psycopg
import pytest
from psycopg import conninfo

from conformance.dead_letter_suite import DeadLetterSuite, StoreFeatures, StorePlace, ids, letter
from conformance.events import event
from figbridge.config import FileDeadLetters, S3DeadLetters, SqsDeadLetters, TableDeadLetters
from figbridge.deadletter import DeadLetter, DeadLetterStore, Wanted
from figbridge.errors import BridgeError, LegacyUnavailable, SinkRefused, SinkUnavailable
from figbridge.transports import open_dead_letters
from fixtures.anyhttp import FOREIGN, AnyHttp
from fixtures.checked import role
from fixtures.postgres import Database

SCHEMA = (resources.files("figbridge") / "schema.sql").read_text()


@dataclass
class Table:
    database: Database
    features: ClassVar[StoreFeatures] = StoreFeatures(ordered=True, unique=True, updated=True)

    def open(self) -> DeadLetterStore:
        return open_dead_letters(TableDeadLetters(type="table"), self.database.dsn)

    def open_missing(self) -> DeadLetterStore:
        elsewhere = conninfo.make_conninfo(self.database.dsn, dbname="postgres")
        return open_dead_letters(TableDeadLetters(type="table"), elsewhere)


class TestTable(DeadLetterSuite):
    @pytest.fixture
    def place(self, database: Database) -> StorePlace:
        database.execute(SCHEMA)
        return Table(database)


@dataclass
class File:
    directory: Path
    features: ClassVar[StoreFeatures] = StoreFeatures(ordered=True, unique=False, updated=False)

    def open(self) -> DeadLetterStore:
        return open_dead_letters(FileDeadLetters(type="file", path=self.directory / "letters.jsonl"), "")

    def open_missing(self) -> DeadLetterStore:
        path = self.directory / "no such directory" / "letters.jsonl"
        return open_dead_letters(FileDeadLetters(type="file", path=path), "")


class TestFile(DeadLetterSuite):
    @pytest.fixture
    def place(self, tmp_path: Path) -> StorePlace:
        return File(tmp_path)


@dataclass
class S3:
    endpoint: str
    features: ClassVar[StoreFeatures] = StoreFeatures(ordered=True, unique=True, updated=True)

    def open(self, bucket: str = "letters") -> DeadLetterStore:
        return open_dead_letters(S3DeadLetters(type="s3", bucket=bucket, endpoint_url=self.endpoint), "")

    def open_missing(self) -> DeadLetterStore:
        return self.open("nobodys")


@pytest.fixture
def s3(aws_endpoint: str) -> Any:
    s3 = boto3.client("s3", endpoint_url=aws_endpoint)
    s3.create_bucket(Bucket="letters", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    return s3


class TestS3(DeadLetterSuite):
    @pytest.fixture
    def place(self, aws_endpoint: str, s3: Any) -> StorePlace:
        assert s3
        return S3(aws_endpoint)


@dataclass
class Sqs:
    endpoint: str
    url: str
    bucket: str | None = None
    features: ClassVar[StoreFeatures] = StoreFeatures(ordered=False, unique=False, updated=False)

    def open(self, url: str | None = None) -> DeadLetterStore:
        section = SqsDeadLetters(
            type="sqs", queue_url=url or self.url, bucket=self.bucket, endpoint_url=self.endpoint
        )  # fmt: skip
        return open_dead_letters(section, "")

    def open_missing(self) -> DeadLetterStore:
        return self.open(f"{self.url}-of-nobody")


def make_queue(endpoint: str, name: str, **attributes: Any) -> str:
    sqs: Any = boto3.client("sqs", endpoint_url=endpoint)
    return str(sqs.create_queue(QueueName=name, Attributes=attributes)["QueueUrl"])


class TestSqs(DeadLetterSuite):
    @pytest.fixture(params=["letters", "letters.fifo"])
    def place(self, aws_endpoint: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> StorePlace:
        monkeypatch.setattr("figbridge.transports.sqs_letters._WAIT", 0)  # the emulator is one server
        fifo = {"FifoQueue": "true"} if request.param.endswith(".fifo") else {}
        return Sqs(aws_endpoint, make_queue(aws_endpoint, request.param, **fifo))


# --- the table


def test_the_table_hands_letters_out_page_by_page(database: Database) -> None:
    database.execute(SCHEMA)
    store = Table(database).open()
    large = [
        DeadLetter("reverse", str(n), "r", "m", 1, b"%d" % n + b"x" * 1_000_000) for n in range(12)
    ]  # fmt: skip
    small = [DeadLetter("reverse", str(n), "r", "m", 1, b"%d" % n) for n in range(12, 1200)]
    store.add([*large, *small])

    assert ids(store) == [str(n) for n in range(1200)]


def test_a_table_that_may_not_be_written_fails_the_check(database: Database) -> None:
    database.execute(SCHEMA)
    with role(database, "LOGIN") as (name, dsn):
        store = open_dead_letters(TableDeadLetters(type="table"), dsn)
        with pytest.raises(BridgeError, match="may not write") as caught:
            store.check()
        database.execute(f"GRANT SELECT, INSERT ON figbridge.dead_letter TO {name}")
        with pytest.raises(BridgeError, match="may not write"):
            store.check()
        database.execute(caught.value.hint)
        store.check()


def test_a_role_without_the_right_to_update_exchanges_what_nobody_has_removed(database: Database) -> None:
    database.execute(SCHEMA)
    with role(database, "LOGIN") as (name, dsn):
        database.execute(
            f"GRANT USAGE ON SCHEMA figbridge TO {name}; "
            f"GRANT SELECT, INSERT, DELETE ON figbridge.dead_letter TO {name}"
        )
        store = open_dead_letters(TableDeadLetters(type="table"), dsn)
        store.add([letter(n) for n in range(3)])
        kept = [it._replace(letter=it.letter.again("r", "m")) for it in store.scan(Wanted())]
        store.remove(kept[:1])
        store.update(kept)
        assert [it.letter.reason for it in store.scan(Wanted())] == ["r", "r"]


def test_an_older_table_is_brought_up_to_date(database: Database) -> None:
    database.execute("""
        CREATE SCHEMA figbridge;
        CREATE TABLE figbridge.dead_letter (
            id text PRIMARY KEY, direction text NOT NULL CHECK (direction IN ('forward', 'reverse')), event_id text,
            reason text NOT NULL, message text NOT NULL, attempts integer NOT NULL, body bytea NOT NULL,
            statement text, created_at timestamptz NOT NULL DEFAULT now());
        INSERT INTO figbridge.dead_letter VALUES ('i', 'reverse', 'e', 'r', 'm', 1, '{}', NULL);
    """)
    database.execute(SCHEMA)
    store = Table(database).open()
    store.add([letter(1)])

    assert ids(store) == ["e", event(1).id]


@pytest.mark.parametrize(
    ("encoding", "client", "identity", "message"),
    [
        ("LATIN1", "LATIN1", r"größe-\u65e5\u672c", r"no \u20ac, no \U0001f333"),
        ("EUC_JP", "EUC_JP", r"größe-日本", r"no \u20ac, no \U0001f333"),
        ("SQL_ASCII", "SQL_ASCII", "größe-日本", "no €, no 🌳"),
        ("UTF8", "LATIN1", "größe-日本", "no €, no 🌳"),
    ],
)
def test_what_the_encoding_lacks_stands_there_as_an_escape(
    database: Database, encoding: str, client: str, identity: str, message: str
) -> None:
    name = f"{database.name}_{encoding.lower()}"
    database.execute(f"CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0 LOCALE 'C'")
    try:
        database.execute(f"ALTER DATABASE {name} SET client_encoding = '{client}'")
        with psycopg.connect(database.server.dsn(name)) as connection:
            connection.execute(SCHEMA.encode())
        store = Table(Database(database.server, name)).open()
        odd = letter(1, event_id="größe-日本", message="no €, no 🌳", statement="SELECT '日本'", table="t.日本")
        store.add([odd, letter(2, event_id="größe")])

        first, _ = [it.letter for it in store.scan(Wanted())]

        assert (first.event_id, first.message) == (identity, message)
        assert (first.id, first.body, first.key) == (odd.id, odd.body, odd.key)
        assert ids(store, Wanted(ids=("größe-日本",))) == ids(store, Wanted(table="t.日本")) == [identity]
        assert ids(store, Wanted(ids=("größe",))) == ["größe"]
        assert ids(store, Wanted(reason="日本")) == []
    finally:
        database.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.mark.parametrize("call", ["add", "remove"])
def test_a_session_that_ends_at_commit_is_tried_again(database: Database, call: str) -> None:
    database.execute(SCHEMA)
    store = Table(database).open()
    store.add([letter(1)])
    database.execute("""
        CREATE SEQUENCE once;
        CREATE FUNCTION gone() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF nextval('once') = 1 THEN
                PERFORM pg_terminate_backend(pg_backend_pid());
                PERFORM pg_sleep(5);  -- is where it ends
            END IF;
            RETURN NULL;
        END $$;
        CREATE CONSTRAINT TRIGGER gone AFTER INSERT OR DELETE ON figbridge.dead_letter
            DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION gone();
    """)
    (kept,) = store.scan(Wanted())

    def again() -> None:
        if call == "add":
            store.add([letter(2)])
        else:
            store.remove([kept])

    with pytest.raises(LegacyUnavailable):
        again()
    assert ids(store) == [event(1).id]
    again()
    assert ids(store) == ([event(1).id, event(2).id] if call == "add" else [])


# --- the file


@pytest.mark.parametrize("torn", [b'{"id":"', b'{"id":"abc","body":"' + b"x" * 200_000])
def test_what_a_crash_left_of_a_line_is_blanked(tmp_path: Path, torn: bytes) -> None:
    place = File(tmp_path)
    store = place.open()
    store.add([letter(1)])
    store.close()
    with (tmp_path / "letters.jsonl").open("ab") as file:
        file.write(torn)

    again = place.open()
    assert ids(again) == [event(1).id]
    again.add([letter(2)])

    assert ids(again) == [event(1).id, event(2).id]
    for line in (tmp_path / "letters.jsonl").read_text().splitlines():
        assert not line.strip() or json.loads(line)
    again.close()


def test_a_removed_line_is_blank_and_an_open_bridge_goes_on_appending(tmp_path: Path) -> None:
    place = File(tmp_path)
    bridge, command = place.open(), place.open()
    bridge.add([letter(1), letter(2)])
    command.remove([it for it in command.scan(Wanted()) if it.letter.event_id == event(1).id])
    bridge.add([letter(3)])

    assert ids(command) == [event(2).id, event(3).id]
    first, *_ = (tmp_path / "letters.jsonl").read_text().splitlines()
    assert first.strip() == ""
    bridge.close()


def test_several_writers_spoil_no_line_of_one_another(tmp_path: Path) -> None:
    place = File(tmp_path)

    def write(first: int) -> None:
        for number in range(first, first + 40):
            store = place.open()  # each looks at the end of the file before it writes
            store.add([letter(number, message="x" * 50_000)])
            store.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(0, 160, 40)))

    assert sorted(map(str, ids(place.open()))) == [event(n).id for n in range(160)]


def test_a_line_of_somebody_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "letters.jsonl").write_text('{"mine": 1}\n')
    with pytest.raises(BridgeError, match="line 1") as caught:
        ids(File(tmp_path).open())
    assert caught.value.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_file_that_may_not_be_written_fails_the_check(tmp_path: Path) -> None:
    (tmp_path / "letters.jsonl").touch(mode=0o400)
    with pytest.raises(SinkRefused) as caught:
        File(tmp_path).open().check()
    assert caught.value.hint


def test_a_file_system_that_is_read_only_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_fd: int) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))  # as after a fault of the disk below it

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(SinkRefused) as caught:
        File(tmp_path).open().add([letter(1)])
    assert "mounted for writing" in caught.value.hint


# --- S3


def test_an_objects_name_sorts_by_time_and_position(aws_endpoint: str, s3: Any) -> None:
    store = S3(aws_endpoint).open()
    first = letter(1)
    store.add([first])

    (name,) = [it["Key"] for it in s3.list_objects_v2(Bucket="letters")["Contents"]]

    place = "20261123T100803.698540Z-0000000000000001-00000000"
    assert name == f"figbridge/dead-letters/{place}-{first.id}.json"
    assert json.loads(s3.get_object(Bucket="letters", Key=name)["Body"].read())["reason"] == "EntryTooLarge"


def test_the_check_of_a_bucket_writes_nothing(aws_endpoint: str, s3: Any) -> None:
    S3(aws_endpoint).open().check()

    assert s3.list_objects_v2(Bucket="letters")["KeyCount"] == 0


def test_a_bucket_with_more_than_a_page_of_letters(aws_endpoint: str, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("figbridge.transports.s3_letters._PAGE", 10)
    monkeypatch.setattr("figbridge.transports.s3_letters._DELETED_AT_ONCE", 10)
    store = S3(aws_endpoint).open()
    store.add([letter(n) for n in range(33)])

    with contextlib.closing(store.scan(Wanted())) as found:
        kept = list(found)
    assert [it.letter for it in kept] == [letter(n, created_at=it.letter.created_at) for n, it in enumerate(kept)]
    assert len(kept) == 33
    store.remove(kept)

    assert s3.list_objects_v2(Bucket="letters")["KeyCount"] == 0


def test_somebody_elses_object_is_named(aws_endpoint: str, s3: Any) -> None:
    s3.put_object(Bucket="letters", Key="figbridge/dead-letters/mine.json", Body=b"{}")
    with pytest.raises(BridgeError, match=r"mine\.json") as caught:
        ids(S3(aws_endpoint).open())
    assert "prefix" in caught.value.hint


# --- SQS


def large_letter(size: int) -> DeadLetter:
    return letter(1, body=event(1, detail=b'{"id":"%%b","v":"%b"}' % (b"x" * size)).envelope())


@pytest.mark.parametrize("size", [1_048_576, 2_000_000])
def test_a_letter_that_no_message_can_hold_is_refused_with_a_remedy(aws_endpoint: str, size: int) -> None:
    store = Sqs(aws_endpoint, make_queue(aws_endpoint, "letters")).open()
    with pytest.raises(SinkRefused, match="1048576") as caught:
        store.add([large_letter(size)])
    assert "bucket" in caught.value.hint


@pytest.mark.usefixtures("s3")
def test_a_large_body_goes_to_the_bucket(aws_endpoint: str) -> None:
    place = Sqs(aws_endpoint, make_queue(aws_endpoint, "letters"), bucket="letters")
    store, large = place.open(), large_letter(2_000_000)
    store.check()
    store.add([large, letter(2), large])

    kept = list(store.scan(Wanted()))

    assert sorted(it.letter.id for it in kept) == sorted([large.id, letter(2).id, large.id])
    assert [it.letter.body for it in kept].count(large.body) == 2


def test_a_queue_whose_messages_are_smaller_says_so(aws_endpoint: str) -> None:
    store = Sqs(aws_endpoint, make_queue(aws_endpoint, "letters", MaximumMessageSize="2048")).open()
    with pytest.raises(SinkRefused, match="takes 2048"):
        store.add([large_letter(4000)])


def test_a_bucket_that_is_not_there_fails_the_check(aws_endpoint: str) -> None:
    store = Sqs(aws_endpoint, make_queue(aws_endpoint, "letters"), bucket="nobodys").open()
    with pytest.raises(SinkRefused) as caught:
        store.check()
    assert "create the bucket nobodys" in caught.value.hint


def test_a_message_of_somebody_else_is_named_and_left(aws_endpoint: str) -> None:
    url = make_queue(aws_endpoint, "letters")
    sqs = boto3.client("sqs", endpoint_url=aws_endpoint)
    sqs.send_message(QueueUrl=url, MessageBody='{"detail": {}}')
    with pytest.raises(BridgeError, match="no dead letter") as caught:
        ids(Sqs(aws_endpoint, url).open())
    assert "queue of their own" in caught.value.hint
    assert sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]["ApproximateNumberOfMessages"]


def test_a_queue_is_not_searched_without_a_bound(aws_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("figbridge.transports.sqs_letters._HELD", 20)
    store = Sqs(aws_endpoint, make_queue(aws_endpoint, "letters")).open()
    store.add([letter(n) for n in range(40)])
    with pytest.raises(BridgeError, match="cannot be searched"):
        ids(store)

    monkeypatch.undo()
    assert len(ids(store)) == 40  # all were given back


@pytest.mark.parametrize("kind", ["s3", "sqs"])
def test_a_service_that_does_not_answer_is_tried_again(kind: str) -> None:
    nowhere = "http://127.0.0.1:1"
    store = S3(nowhere).open() if kind == "s3" else Sqs(nowhere, f"{nowhere}/1/letters").open()
    for call in (store.check, lambda: store.add([letter(1)])):
        with pytest.raises(SinkUnavailable):
            call()
    store.close()


def test_a_database_that_is_away_is_tried_again() -> None:
    store = open_dead_letters(TableDeadLetters(type="table"), "host=127.0.0.1 port=1")
    with pytest.raises(BridgeError) as caught:
        store.add([letter(1)])
    assert caught.value.retryable
    assert isinstance(caught.value.__cause__, psycopg.Error)


# --- what stands between us and AWS


@pytest.mark.parametrize("type_", ["s3", "sqs"])
@pytest.mark.parametrize("answer", FOREIGN.values(), ids=FOREIGN)
def test_an_answer_that_is_none_of_awss_is_unavailable(type_: str, answer: tuple[int, bytes]) -> None:
    """Also one that says 200: a letter that is stored has an ETag, or the id of a message."""
    status, body = answer
    with AnyHttp(lambda *_: (status, body, {})) as server:
        store = S3(server.url).open() if type_ == "s3" else Sqs(server.url, f"{server.url}/1/letters").open()
        with pytest.raises(SinkUnavailable):
            store.add([letter(1)])
        with contextlib.suppress(SinkUnavailable):
            store.check()
        with contextlib.suppress(SinkUnavailable):
            list(store.scan(Wanted()))
        store.close()
