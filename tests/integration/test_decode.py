"""The decoder on what real servers send, cut at every byte, every bit flipped: an error or a message, nothing else."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from figbridge.change import Change, LogicalMessage, Origin, TypeName
from figbridge.errors import DecodeError
from figbridge.forward.decode import Decoder
from fixtures.postgres import Database

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


def _up_to(messages: list[bytes], index: int) -> Decoder:
    decoder = Decoder()
    for message in messages[:index]:
        decoder.feed(message)
    return decoder


def test_a_message_cut_at_any_byte_is_an_error_that_says_where(messages: list[bytes]) -> None:
    for index, message in enumerate(messages):
        for length in range(len(message)):
            if len(message) > 1000 and 200 < length < len(message) - 50:
                continue  # inside one long value: every cut is the same cut
            with pytest.raises(DecodeError) as caught:
                _up_to(messages, index).feed(message[:length])
            assert caught.value.kind == (message[:1].decode() if length else "empty")


def test_a_flipped_bit_is_an_error_or_a_message_and_nothing_else(messages: list[bytes]) -> None:
    for index, message in enumerate(messages):
        for position in range(min(len(message), 120)):
            for bit in range(8):
                damaged = bytearray(message)
                damaged[position] ^= 1 << bit
                with contextlib.suppress(DecodeError):  # anything else fails the test
                    _up_to(messages, index).feed(bytes(damaged))


@given(st.binary(max_size=60))
def test_random_bytes_never_raise_anything_else(payload: bytes) -> None:
    with contextlib.suppress(DecodeError):
        Decoder().feed(payload)
