"""Snapshots on real servers: what a chunk says, how tables are walked, what happens within a window."""

import time
from collections import Counter
from collections.abc import Sequence
from math import inf
from typing import Any

import orjson
import psycopg
import pytest

from figbridge import legacy
from figbridge.errors import LegacyUnavailable
from figbridge.event import Event
from figbridge.forward.snapshot import chunk, joined, joint, layout
from figbridge.forward.values import Encoders
from figbridge.preflight.catalogue import Name
from fixtures.clock import until
from fixtures.forward import Forward
from fixtures.postgres import Database
from fixtures.snapshot import finished, prepare, states
from fixtures.type_matrix import SECTIONS, Case, array_of, by_kind


def walk(database: Database, *names: Name) -> list[dict[str, Any]]:
    """The events of a snapshot of tables to which nobody writes."""
    with Forward(database, snapshot=names) as forward:
        finished(forward, *(name for _, name in names))
        return [it for it in forward.sink.details if it["op"] == "read"]


def after(events: Sequence[dict[str, Any]], column: str = "id") -> list[Any]:
    return [it["after"][column] for it in events]


def test_the_rows_of_a_table_of_every_type_are_what_the_stream_says_of_them(each_database: Database) -> None:
    """Same rows, two paths: the same values, the same keys, the same version of the schema."""
    sections = [it for it in SECTIONS if not it.needs]
    ddl = "".join(section.ddl for section in sections)
    columns = [cases for it in sections for cases in by_kind(it.cases, each_database.version)]
    columns += [[array_of(column)] for column in columns if not column[0].kind.endswith("[]")]
    definitions = ", ".join(f"c{number} {column[0].kind}" for number, column in enumerate(columns))
    prepare(each_database, f"{ddl} CREATE TABLE matrix (id int PRIMARY KEY, {definitions})", "matrix")
    height = max(map(len, columns))
    with each_database.connect() as connection, connection.cursor() as cursor:
        for number in range(height):
            literals = [column[number].literal if number < len(column) else None for column in columns]
            cursor.execute(
                f"INSERT INTO matrix VALUES ({', '.join(['%s'] * (len(columns) + 1))})", [str(number), *literals],
                prepare=False,
            )  # fmt: skip
    with Forward(each_database, snapshot=[("public", "matrix")]) as forward:
        finished(forward, "matrix")
        streamed = [event for event in forward.sink.events if b'"op":"insert"' in event.detail]
        read = [event for event in forward.sink.events if b'"op":"read"' in event.detail]
    assert len(streamed) == len(read) == height
    for one, other in zip(streamed, read, strict=True):
        assert _part(one.detail) == _part(other.detail)
        assert one.key == other.key
        assert (other.detail_type, one.source) == ("matrix.read", other.source)


def _part(detail: bytes) -> bytes:
    """From the schema's name to the list of unchanged columns: all that is about the row, byte by byte."""
    return detail[detail.index(b'"schema":') : detail.rindex(b',"position":')]


def test_what_the_server_writes_as_json_is_what_the_stream_says(each_database: Database) -> None:
    """The types that are left to it, in a table of them alone, where COPY escapes in another way than beside others."""
    cases = [it for section in SECTIONS if not section.needs for it in by_kind(section.cases, each_database.version)]
    encoders, served = Encoders("safe", lambda _: None), list[list[Case]]()
    for column in cases:
        (found,) = each_database.execute("SELECT to_regtype(%s)::oid::int", [column[0].kind.split("(")[0]])
        if found[0] and layout._way(found[0], encoders.of(found[0])):
            served.append(column)
    assert len(served) > 30
    definitions = ", ".join(f"c{number} {column[0].kind}" for number, column in enumerate(served))
    prepare(each_database, f"CREATE TABLE matrix (id int PRIMARY KEY, {definitions})", "matrix")
    with each_database.connect() as connection, connection.cursor() as cursor:
        for number in range(max(map(len, served))):
            literals = [column[number].literal if number < len(column) else None for column in served]
            cursor.execute(
                f"INSERT INTO matrix VALUES ({', '.join(['%s'] * (len(served) + 1))})", [str(number), *literals],
                prepare=False,
            )  # fmt: skip
    _compared(each_database, "matrix")


def test_any_text_is_what_the_stream_says(database: Database) -> None:
    """As value and as key, by which rows are told apart: each escape of COPY and of JSON, and none at all."""
    prepare(database, "CREATE TABLE letters (id text PRIMARY KEY, note text, mood varchar)", "letters")
    database.execute(
        "INSERT INTO letters SELECT chr(n), repeat(chr(n), 3), chr(n) || 'n' FROM generate_series(1, 1000) AS n"
    )
    odd = [
        "null",
        "NULL",
        "\\N",
        "\\.",
        "\\n",
        "\\\\n",
        'a "b"',
        '\\"',
        "\u2028\U0001f600",
        "{%b%s}",
        "{id}",
        "a\tb\r\nc",
        "\\t",
    ]
    for number, text in enumerate(odd):
        database.execute("INSERT INTO letters VALUES (%s, %s, NULL)", [f"{number}{text}", text])
    database.execute("INSERT INTO letters VALUES ('', '', ''), ('  ', NULL, NULL)")
    assert len(_compared(database, "letters")) == 1000 + len(odd) + 2


def test_a_byte_that_is_not_utf_8_is_what_the_stream_says(database: Database) -> None:
    """A database of encoding UTF8 can hold one by a fault of old; here by a cast that does not look."""
    prepare(database, "CREATE TABLE old (id int PRIMARY KEY, note text, document jsonb)", "old")
    database.execute("CREATE CAST (bytea AS text) WITHOUT FUNCTION")
    database.execute(
        "INSERT INTO old VALUES (1, '\\x616263ff22c3a45c'::bytea::text, NULL), (2, 'ä \"quoted\"', '{\"a\": \"ä\"}')"
    )
    events = _compared(database, "old")
    assert b"udcff" in events[0].detail


def test_a_type_of_the_name_text_before_the_one_of_the_server(database: Database) -> None:
    """It would cut off what the bridge's own statements have as text, without an error."""
    database.execute("CREATE SCHEMA odd; CREATE DOMAIN odd.text AS varchar(1)")
    tables = "CREATE TABLE thing (id int PRIMARY KEY, half float4, n numeric); CREATE TABLE bare (n int)"
    prepare(database, tables, "thing, bare")
    database.execute(f"ALTER DATABASE {database.name} SET search_path = odd, public, pg_catalog")
    database.execute("INSERT INTO thing VALUES (11, 1.25, 12.5), (12, NULL, NULL); INSERT INTO bare VALUES (11)")
    database.execute("SELECT pg_replication_slot_advance(%s, pg_current_wal_lsn())", [database.slot])
    assert [it["after"] for it in walk(database, ("public", "thing"), ("public", "bare"))] == [
        {"id": 11, "half": 1.25, "n": 12.5}, {"id": 12, "half": None, "n": None}, {"n": 11},
    ]  # fmt: skip


@pytest.mark.parametrize("type_", ["pair", "checked"])
def test_a_composite_value_of_nulls_is_no_null(each_database: Database, type_: str) -> None:
    types = "CREATE TYPE pair AS (a int, b text); CREATE DOMAIN checked AS pair"
    prepare(each_database, f"{types}; CREATE TABLE thing (id int PRIMARY KEY, it {type_})", "thing")
    each_database.execute("INSERT INTO thing VALUES (1, ROW(NULL, NULL)), (2, ROW(1, NULL)), (3, NULL)")
    assert [orjson.loads(it.detail)["after"]["it"] for it in _compared(each_database, "thing")] == ["(,)", "(1,)", None]


@pytest.mark.parametrize("where", ["LATIN1", "EUC_JP", "WIN1251", "UTF8"])
def test_text_is_utf_8_whatever_the_encoding(database: Database, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Of the database, or what the database's settings ask clients to speak."""
    text = {"EUC_JP": "日本語", "WIN1251": "Привет"}.get(where, "Müller Ã¤")
    name = f"{database.name}_{where.lower()}"
    database.execute(f"CREATE DATABASE {name} ENCODING '{where}' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'")
    other = Database(database.server, name)
    monkeypatch.setattr(chunk.Size, "learn", lambda *_: None)
    try:
        if where == "UTF8":
            database.execute(f"ALTER DATABASE {name} SET client_encoding = 'LATIN1'")
        prepare(other, "CREATE TABLE people (id text PRIMARY KEY, name text, document jsonb, names text[])", "people")
        with other.connect(client_encoding="UTF8") as connection:
            connection.execute(
                "INSERT INTO people SELECT n || %(it)s, %(it)s, to_jsonb(%(it)s::text), ARRAY[%(it)s] "
                "FROM generate_series(1, 4001) AS n",  # more than a chunk has
                {"it": text},
            )
        assert len(_compared(other, "people")) == 4001
    finally:
        other.execute("SELECT pg_drop_replication_slot(%s)", [other.slot])
        database.execute(f"DROP DATABASE {name} WITH (FORCE)")


def _compared(database: Database, table: str) -> list[Event]:
    """The events of the inserts of a table, each like the one that the snapshot makes of the same row."""
    with Forward(database, snapshot=[("public", table)]) as forward:
        finished(forward, table)
        streamed = {event.key: event for event in forward.sink.events if b'"op":"insert"' in event.detail}
        read = {event.key: event for event in forward.sink.events if b'"op":"read"' in event.detail}
    assert streamed.keys() == read.keys()
    for key, event in streamed.items():
        assert _part(event.detail) == _part(read[key].detail)
    return list(streamed.values())


@pytest.mark.parametrize(
    ("key", "rows"),
    [
        ("id bigint PRIMARY KEY", "n * 7"),
        ("id bigint PRIMARY KEY", "9007199254740000 + n"),
        ("id text PRIMARY KEY", "md5(n::text)"),
        ('id text COLLATE "C" PRIMARY KEY', "CASE n % 3 WHEN 0 THEN 'Ä' WHEN 1 THEN 'a' ELSE 'B' END || n"),
        ("id uuid PRIMARY KEY", "md5(n::text)::uuid"),
        ("id numeric PRIMARY KEY", "n / 7.0"),
        ("id timestamptz PRIMARY KEY", "timestamptz '2026-01-01' + n * interval '1 minute'"),
        ("id timestamptz PRIMARY KEY", "timestamptz '0044-03-15 12:00+00 BC' + n * interval '1 minute'"),
        ("id timestamp PRIMARY KEY", "timestamp '0044-03-15 12:00 BC' + n * interval '1 minute'"),
        ("id date PRIMARY KEY", "date '0044-03-15 BC' + n"),
        ("id float8 PRIMARY KEY", "n / 7.0::float8"),
        ("id bytea PRIMARY KEY", "decode(md5(n::text), 'hex')"),
        ("id inet PRIMARY KEY", "inet '10.0.0.0' + n"),
        ("id interval PRIMARY KEY", "n * interval '7 minutes'"),
        ("id char(8) PRIMARY KEY", "lpad(n::text, 7, ' ')"),
        ("id int", "n"),
    ],
)  # fmt: skip
def test_every_row_is_read_once_whatever_the_key(database: Database, key: str, rows: str) -> None:
    prepare(database, f"CREATE TABLE thing ({key}, note text)", "thing")
    database.execute("ALTER TABLE thing REPLICA IDENTITY FULL" if "PRIMARY" not in key else "SELECT")
    database.execute(f"INSERT INTO thing SELECT {rows}, repeat('x', n % 50) FROM generate_series(1, 5000) AS n")
    database.execute("SELECT pg_replication_slot_advance(%s, pg_current_wal_lsn())", [database.slot])
    events = walk(database, ("public", "thing"))
    assert len(events) == len({it["id"] for it in events}) == 5000
    expected = database.execute("SELECT to_json(t)->>'id' FROM thing t")
    assert sorted(str(it) for it in after(events)) == sorted(str(it).strip('"') for (it,) in expected)


@pytest.fixture(params=[True, False], ids=["joined", "copied"])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of some rows."""

    class Small(chunk.Size):
        def learn(self, _chunk: chunk.Chunk) -> None:
            """The next chunk is as large, and read in the same way."""

    monkeypatch.setattr(chunk, "Size", lambda: Small(rows=4, width=joined.NARROW if request.param else inf))


@pytest.mark.parametrize(
    ("type_", "value"),
    [
        ("int[]", "ARRAY[n, NULL]"),
        ("int[]", "('[0:1]={' || n || ',7}')::int[]"),
        ("text[]", "ARRAY['a,\"b', 'NULL', n::text]"),
        ("bool[]", "ARRAY[true, NULL] || array_fill(false, ARRAY[n])"),
        ("numeric[]", "ARRAY[[n / 7.0, 1.50], [9007199254740993, n]]"),
        ("jsonb[]", "ARRAY[to_jsonb(n), '[1, \"x\"]']"),
        ("timestamptz[]", "ARRAY['2026-01-01 00:00+00'::timestamptz + n * interval '1 h']"),
        ("numbers", "ARRAY[n]"),
        ("numbers[]", "ARRAY[ARRAY[n]::numbers]"),
        ("oidvector", "(n || ' 7')::oidvector"),
        ("jsonb", "to_jsonb('k' || n)"),
        ("jsonb", "CASE n % 3 WHEN 0 THEN to_jsonb(n) WHEN 1 THEN to_jsonb(n::text) ELSE jsonb_build_array(n) END"),
        ("document", "to_jsonb('k' || n)"),
        ('"char"', 'chr(64 + n)::"char"'),
        ("pair", "ROW(n, NULL)::pair"),
        ("int4range", "int4range(n, n + 1)"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("small")
def test_a_key_of_any_type_at_the_end_of_a_chunk(database: Database, type_: str, value: str) -> None:
    database.execute(
        "CREATE DOMAIN numbers AS int[]; CREATE DOMAIN document AS jsonb; CREATE TYPE pair AS (a int, b text)"
    )
    prepare(database, f"CREATE TABLE thing (id {type_} PRIMARY KEY, n int)", "thing")
    database.execute(f"INSERT INTO thing SELECT {value}, n FROM generate_series(1, 20) AS n")
    assert len(_compared(database, "thing")) == 20


@pytest.mark.usefixtures("small")
def test_a_key_that_is_not_utf_8_at_the_end_of_a_chunk(database: Database) -> None:
    """No literal can be made of it: the next chunk begins behind the row before."""
    prepare(database, 'CREATE TABLE old (id text COLLATE "C" PRIMARY KEY, n int)', "old")
    database.execute("CREATE CAST (bytea AS text) WITHOUT FUNCTION")
    database.execute("INSERT INTO old SELECT chr(96 + n), n FROM generate_series(1, 8) AS n")
    for key in ("63ff", "64ff", "68ff"):  # behind the third, the fourth and the last
        database.execute(f"INSERT INTO old VALUES ('\\x{key}'::bytea::text, 0)")
    assert len(_compared(database, "old")) == 11


@pytest.mark.usefixtures("small")
def test_a_chunk_of_keys_that_are_not_utf_8_fails_the_table_alone(database: Database) -> None:
    prepare(
        database, "CREATE TABLE old (id text PRIMARY KEY, n int); CREATE TABLE thing (id int PRIMARY KEY)", "old, thing"
    )
    database.execute("CREATE CAST (bytea AS text) WITHOUT FUNCTION; INSERT INTO thing VALUES (1)")
    for number in range(5):
        database.execute(f"INSERT INTO old VALUES ('\\xff{number:02}'::bytea::text, {number})")
    with Forward(database, snapshot=[("public", "old"), ("public", "thing")]) as forward:
        until(lambda: forward.failure or states(database) == {"old": "failed", "thing": "done"}, 20)
        assert forward.failure is None
    assert "not UTF-8" in database.execute("SELECT message FROM figbridge.snapshot WHERE state = 'failed'")[0][0]


def test_a_table_without_columns_has_rows_too(database: Database) -> None:
    """Which are all one."""
    prepare(database, "CREATE TABLE bare (); ALTER TABLE bare REPLICA IDENTITY FULL", "bare")
    database.execute("INSERT INTO bare DEFAULT VALUES")
    assert [it["after"] for it in walk(database, ("public", "bare"))] == [{}]


def test_what_the_server_refuses_to_join_is_read_by_copy(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes no more than 100 arguments, say: that is a reason to read the rows in the other way, not to fail."""
    monkeypatch.setattr(joint, "_ARGUMENTS", 1000)
    columns = ", ".join([f"c{number} int" for number in range(150)])
    prepare(database, f"CREATE TABLE wide (id int PRIMARY KEY, {columns})", "wide")
    database.execute("INSERT INTO wide SELECT generate_series(1, 100)")
    with Forward(database, snapshot=[("public", "wide")]) as forward:
        finished(forward, "wide")
        rows = [it for it in forward.sink.details if it["op"] == "read"]
        voids = forward.metrics.registry.get_sample_value("figbridge_forward_snapshot_voids_total")
    assert (after(rows), voids) == (list(range(1, 101)), 1)


def test_a_chunk_takes_the_time_that_it_takes(each_database: Database) -> None:
    """Whatever the database's own timeouts say: a transaction that is ended before its chunk is read never gets on."""
    each_database.execute("CREATE TABLE thing (id int PRIMARY KEY)")
    since_17 = ["transaction_timeout"] if each_database.version >= 17 else []
    for name in ("statement_timeout", "idle_in_transaction_session_timeout", *since_17):
        each_database.execute(f"ALTER DATABASE {each_database.name} SET {name} = '50ms'")
    with (
        legacy.connect(each_database.dsn, purpose="test", autocommit=True) as connection,
        chunk.locked(connection, ("public", "thing"), lambda _: False),
    ):
        connection.execute("SELECT pg_sleep(0.1)")
        (idle,) = connection.execute("SELECT current_setting('idle_in_transaction_session_timeout')").fetchone() or (
            "",
        )
    assert idle == "1min"


@pytest.mark.pg(">= 17")
@pytest.mark.parametrize(
    ("setting", "statement", "state"),
    [
        ("transaction_timeout", "SELECT pg_sleep(60)", "25P04"),
        ("idle_in_transaction_session_timeout", "BEGIN", "25P03"),
    ],
)
def test_a_transaction_that_the_server_ends_is_tried_again(
    database: Database, setting: str, statement: str, state: str
) -> None:
    there = "SELECT 1 FROM pg_stat_activity WHERE pid = %s"
    with legacy.connect(database.dsn, purpose="test", autocommit=True) as connection:
        connection.execute(f"SET {setting} = '20ms'".encode())

        def ended() -> None:
            with legacy.translated():
                connection.execute(statement.encode())
                until(lambda: not database.execute(there, [connection.info.backend_pid]))
                connection.execute("SELECT 1")

        with pytest.raises(LegacyUnavailable, match="timeout") as caught:
            ended()
    assert isinstance(caught.value.__cause__, psycopg.Error)
    assert caught.value.__cause__.sqlstate == state


def test_a_rate_bounds_each_chunk_and_the_time_of_all(database: Database) -> None:
    """From below alone, which a busy machine cannot break; tests/unit/test_politeness.py has the rest."""
    prepare(database, "CREATE TABLE thing (id int PRIMARY KEY)", "thing")
    database.execute("INSERT INTO thing SELECT generate_series(1, 8000)")
    database.execute("SELECT pg_replication_slot_advance(%s, pg_current_wal_lsn())", [database.slot])
    began = time.monotonic()
    with Forward(database, snapshot=[("public", "thing")], rate=2000) as forward:
        finished(forward, "thing")
    # the fourth chunk begins when 6000 rows were read, for which a second of credit is given
    assert time.monotonic() - began >= 6000 / 2000 - 1
    chunks = Counter(it["position"]["commit_lsn"] for it in forward.sink.details)
    assert sum(chunks.values()) == 8000
    assert max(chunks.values()) <= 2000
