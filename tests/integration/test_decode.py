"""The decoder on what real servers send, cut at every byte, every bit flipped: an error or a message, nothing else.

The messages are taken from the servers when the test runs: a file of them would be of one version, and grow old.
"""

import pytest

from figbridge.change import Change, LogicalMessage, Origin, TypeName
from figbridge.errors import DecodeError
from figbridge.forward.decode import Decoder
from fixtures.postgres import Database
from fixtures.reference_decoder import Reference, Unreadable, plain

WORKLOAD = [
    "INSERT INTO thing VALUES (1, 'calm', repeat('x', 3000)), (2, NULL, '')",
    "UPDATE thing SET mood = 'wild' WHERE id = 1",
    "UPDATE thing SET id = 9 WHERE id = 2",
    "DELETE FROM thing WHERE id = 9",
    "INSERT INTO whole VALUES (1, 'a')",
    "UPDATE whole SET name = NULL",
    "DELETE FROM whole",
    "TRUNCATE thing, whole",
    "SELECT pg_logical_emit_message(true, 'prefix', 'content')",
    "SELECT pg_logical_emit_message(false, 'prefix', '')",
    "SELECT pg_replication_origin_session_setup('elsewhere'); INSERT INTO whole VALUES (2, 'b')",
]


@pytest.fixture
def messages(each_database: Database) -> list[bytes]:
    each_database.execute("CREATE TYPE mood AS ENUM ('calm', 'wild')")
    each_database.execute(
        "CREATE TABLE thing (id int PRIMARY KEY, mood mood, big text); CREATE TABLE whole (id int, name text)"
    )
    each_database.execute("ALTER TABLE thing ALTER big SET STORAGE EXTERNAL; ALTER TABLE whole REPLICA IDENTITY FULL")
    each_database.execute("CREATE PUBLICATION pub FOR TABLE thing, whole")
    each_database.create_slot()
    each_database.execute("SELECT pg_replication_origin_create('elsewhere')")
    try:
        for statement in WORKLOAD:
            each_database.execute(statement)
        rows = each_database.execute(
            "SELECT data FROM pg_logical_slot_get_binary_changes(%s, NULL, NULL, "
            "'proto_version', '1', 'publication_names', 'pub', 'messages', 'true')",
            [each_database.slot],
        )
    finally:
        each_database.execute("SELECT pg_replication_origin_drop('elsewhere')")
    return [bytes(data) for (data,) in rows]


def test_every_kind_of_message_is_understood(messages: list[bytes]) -> None:
    assert {message[:1] for message in messages} == {b"B", b"C", b"R", b"Y", b"I", b"U", b"D", b"T", b"M", b"O"}
    decoder = Decoder()
    decoded = [decoder.feed(message) for message in messages]
    changes = [it for it in decoded if isinstance(it, Change)]
    assert [(it.operation.value, it.ordinal, it.before_is_key) for it in changes] == [
        ("insert", 0, False), ("insert", 1, False), ("update", 0, False), ("update", 0, True), ("delete", 0, True),
        ("insert", 0, False), ("update", 0, False), ("delete", 0, False), ("insert", 0, False),
    ]  # fmt: skip
    assert [it.name for it in decoded if isinstance(it, Origin)] == ["elsewhere"]
    assert {it.name for it in decoded if isinstance(it, TypeName)} == {"mood"}
    assert [(it.transactional, it.content) for it in decoded if isinstance(it, LogicalMessage)] == [
        (True, b"content"), (False, b""),
    ]  # fmt: skip
    (truncated,) = [it for it in decoded if isinstance(it, list)]
    assert [(it.relation.name, it.ordinal) for it in truncated] == [("thing", 0), ("whole", 1)]
    assert not decoder.in_transaction


def _both_up_to(messages: list[bytes], index: int) -> tuple[Decoder, Reference]:
    decoder, reference = Decoder(), Reference()
    for message in messages[:index]:
        decoder.feed(message)
        reference.read(message)
    return decoder, reference


@pytest.mark.parametrize("start", [0, 25])
def test_two_readings_of_what_a_server_sends_are_one(messages: list[bytes], start: int) -> None:
    decoder, reference = Decoder(), Reference()
    read = [plain(decoder.feed(b"w" * start + message, start)) for message in messages]
    assert read == [reference.read(message) for message in messages]


def test_a_message_cut_at_any_byte_is_an_error_that_says_where(messages: list[bytes]) -> None:
    for index, message in enumerate(messages):
        decoder, _ = _both_up_to(messages, index)  # a message that ends too soon changes nothing in it
        for length in range(len(message)):
            if len(message) > 1000 and 200 < length < len(message) - 50:
                continue  # inside one long value: every cut is the same cut
            with pytest.raises(DecodeError) as caught:
                decoder.feed(message[:length])
            assert caught.value.kind == (message[:1].decode() if length else "empty")
            assert 0 <= caught.value.offset <= length


def test_a_flipped_bit_is_an_error_or_read_as_the_manual_says(messages: list[bytes]) -> None:
    for index, message in enumerate(messages):
        for position in range(min(len(message), 120)):
            for bit in range(8):
                damaged = bytearray(message)
                damaged[position] ^= 1 << bit
                decoder, reference = _both_up_to(messages, index)
                assert _said(decoder, bytes(damaged)) == _meant(reference, bytes(damaged)), bytes(damaged)


def _said(decoder: Decoder, message: bytes) -> object:
    try:
        return plain(decoder.feed(message))
    except DecodeError:
        return None


def _meant(reference: Reference, message: bytes) -> object:
    try:
        return reference.read(message)
    except Unreadable:
        return None
