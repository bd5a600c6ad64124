"""Rows that the server joins are those that COPY sends, value by value; what is not so simple is left to COPY."""

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql

from figbridge import legacy
from figbridge.forward.snapshot import chunk, joined, joint, plan
from figbridge.forward.snapshot.block import Block, Part, Values
from figbridge.forward.snapshot.layout import Layout
from figbridge.forward.source import SETTINGS
from figbridge.forward.table import Naming, Table
from figbridge.forward.values import Encoders
from fixtures.postgres import Database

NARROW, WIDE = 100.0, 1e9  # bytes of a row: joined, and by COPY
NAMING = Naming("db", "legacy.{database}", "{table}.{operation}")
TEXTS = st.none() | st.text(st.characters(exclude_characters="\0", codec="utf-8"))
SIMPLE = """
CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE DOMAIN cents AS bigint;
CREATE TABLE thing (
    id int PRIMARY KEY, small int2, big int8, total numeric(12,2), share numeric, half float4, whole float8, paid bool,
    note text, word varchar(20), code char(5), document jsonb, at timestamptz, local timestamp, day date, hour time,
    feeling mood, price cents, address inet, tag uuid, bits bit(3), span interval, raw bytea
);
INSERT INTO thing (id) VALUES (0);
INSERT INTO thing VALUES (1, -3, 9007199254740993, 1.50, 'NaN', 'NaN', '-Infinity', false, '', '', '', 'null',
    'infinity', '-infinity', 'infinity', '24:00', 'sad', 7, '10.0.0.1', gen_random_uuid(), '101',
    '1 day -2 hours', '\\x00ff');
INSERT INTO thing SELECT n, n % 7, n::int8 * n * n * n, n, n / 7.0, n / 3.0, n / 3.0, n % 2 = 0,
    E'a "b" \\\\ \\t\\r\\n\\b\\f\\x01\\x1f null ' || chr(n + 200), 'null', 'a ',
    jsonb_build_object('n', n, 't', E'\\n"'),
    '2026-01-01 00:00+02'::timestamptz + n * interval '1.5 hours', '2026-01-01 12:30:00.5', '2026-01-01', '12:30:01.25',
    'ok', n, '10.0.0.0/8', md5(n::text)::uuid, '000', '1 mon', ''
FROM generate_series(2, 400) AS n;
"""


class Reader:
    """Reads the chunks of a table as the snapshot loop does, one way or the other."""

    def __init__(self, database: Database, table: str, numbers: Any = "safe") -> None:
        self.dsn, self.name = legacy.with_settings(database.dsn, SETTINGS), ("public", table)
        database.execute("DROP PUBLICATION IF EXISTS pub")
        database.execute(f"CREATE PUBLICATION pub FOR TABLE {table}")
        with self.connected() as connection:
            found = plan.describe(connection, self.name, "pub")
        assert found
        encoders = Encoders(numbers, lambda oid: legacy.type_description(database.dsn, oid))
        table_ = Table(found.relation, NAMING, encoders, frozenset(found.identity), dict(found.type_names))
        self.plan, self.layout = found, Layout(table_, keyed=True)

    def connected(self) -> psycopg.Connection:
        return legacy.connect(self.dsn, purpose="snapshot", autocommit=True)

    def read(
        self,
        connection: psycopg.Connection,
        cursor: plan.Cursor | None = None,
        condition: str | None = None,
        *,
        most: int,
        width: float = NARROW,
        awaited: Callable[[], bool] = lambda: True,
    ) -> chunk.Chunk:
        with ThreadPoolExecutor(1) as looking:
            return chunk.read(
                connection, self.plan, self.layout, cursor, condition,
                most=most, width=width, looking=looking, awaited=awaited,
            )  # fmt: skip

    def chunks(self, width: float, most: int = 100_000, condition: str | None = None) -> Iterator[chunk.Chunk]:
        cursor, end = None, False
        with self.connected() as connection, chunk.locked(connection, self.name, lambda _: False):
            while not end:
                found = self.read(connection, cursor, condition, most=most, width=width)
                cursor, end = found.cursor, found.end
                width = WIDE if found.odd else width  # as `chunk.Size` has it
                yield found

    def rows(self, chunks: Sequence[chunk.Chunk]) -> list[Values]:
        return [row for it in chunks for block in it.blocks for row in self.layout.rows(block)]

    def places(self, chunks: Sequence[chunk.Chunk]) -> list[tuple[str, ...]]:
        """Their cursors' keys, as the server prints them: there are two ways to write ``true``."""
        literals = [plan._literals(self.plan, it.cursor["key"]) if it.cursor else sql.SQL("NULL") for it in chunks]
        rows = sql.SQL(", ").join([sql.SQL("ROW({})::text").format(it) for it in literals])
        with self.connected() as connection:
            return connection.execute(sql.SQL("SELECT {}").format(rows)).fetchall()

    def lines(self, chunks: Sequence[chunk.Chunk]) -> list[str]:
        return self.layout.names(Part.of(list(self.rows(chunks))))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The statements whose rows are joined."""
    statements, ask = list[bytes](), joined._Dialog._answer

    def noted(dialog: Any, statement: bytes) -> Any:
        statements.append(statement)
        return ask(dialog, statement)

    monkeypatch.setattr(joined._Dialog, "_answer", noted)
    return statements


def ways(chunks: Sequence[chunk.Chunk]) -> list[str]:
    return ["joined" if block.joined else "copied" for it in chunks for block in it.blocks]


def compared(reader: Reader, most: int = 100_000) -> list[chunk.Chunk]:
    """The chunks that may be joined, when they have the rows and the cursors of those by COPY."""
    found, others = list(reader.chunks(NARROW, most)), list(reader.chunks(WIDE, most))
    assert set(ways(others)) <= {"copied"}
    assert reader.rows(found) == reader.rows(others)
    assert [it.rows for it in found] == [it.rows for it in others]
    assert reader.places(found) == reader.places(others)
    assert reader.lines(found) == reader.lines(others)
    return found


@pytest.mark.parametrize(("numbers", "alone"), [("safe", 100), ("exact", 3), ("safe", 1)])
def test_the_values_are_those_of_copy(
    each_database: Database, monkeypatch: pytest.MonkeyPatch, numbers: str, alone: int
) -> None:
    monkeypatch.setattr(joint, "_ALONE", alone)
    each_database.execute(SIMPLE)
    if numbers == "exact":
        each_database.execute("ALTER TABLE thing DROP price")  # a type of one's own, whose JSON is nobody's to know
    found = compared(Reader(each_database, "thing", numbers), most=150)
    assert ways(found) == ["joined"] * 3
    assert [it.end for it in found] == [False, False, True]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ('text COLLATE "C"', "chr(n + 200)"),
        ("text", r"E'it''s \\\n' || n"),
        ("varchar(9)", "n::text"),
        ("char(4)", "n::text"),
        ("uuid", "md5(n::text)::uuid"),
        ("timestamptz", "now() + n * interval '1 s'"),
        ("timestamp", "now() - n * interval '100 years'"),
        ("date", "'-infinity'::date + n * 0"),
        ("smallint", "-n"),
        ("bigint", "n * 9007199254740993"),
        ("numeric", "n / 7.0"),
        ("float8", "-n / 7.0"),
        ("interval", "n * interval '1 day'"),
        ("inet", "'10.0.0.0'::inet + n"),
        ("bytea", "n::text::bytea"),
        ("mood", "'sad'::mood"),
        ("cents", "n"),
    ],
)
@pytest.mark.parametrize("single", [True, False])
def test_keys(
    database: Database, asked: list[bytes], monkeypatch: pytest.MonkeyPatch, key: str, value: str, *, single: bool
) -> None:
    """Of one column, and of two. A block is found by the index, also where it begins behind another's last key."""
    monkeypatch.setattr(joined, "_BLOCK_BYTES", int(10 * NARROW))
    database.execute("CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE DOMAIN cents AS bigint")
    columns = "k" if single else "k, b"
    database.execute(f"CREATE TABLE thing (v int, b bool, k {key}, PRIMARY KEY ({columns}))")
    database.execute(
        f"INSERT INTO thing SELECT n, n % 2 = 0, {value} FROM generate_series(1, 50) AS n ON CONFLICT DO NOTHING"
    )
    ((rows,),) = database.execute("SELECT count(*) FROM thing")
    reader = Reader(database, "thing")
    assert set(ways(compared(reader, most=30))) == {"joined"}
    statements = [it for it in asked if b"LATERAL" in it]
    assert statements or rows <= 10
    with reader.connected() as connection, chunk.locked(connection, reader.name, lambda _: False):
        for statement in statements:
            explained = "\n".join(line for (line,) in connection.execute(b"EXPLAIN " + statement).fetchall())
            assert "Sort" not in explained
            assert explained.count("Index Cond") >= statement.count(b"LATERAL")


@pytest.mark.parametrize(
    ("type_", "value"),
    [
        ("text", r"E'the separator \x7f'"),
        ("text", "(SELECT string_agg(md5(n::text), '') FROM generate_series(1, 200) AS n)"),
        ("jsonb", "(SELECT jsonb_agg(md5(n::text)) FROM generate_series(1, 200) AS n)"),
        ("text", "repeat('small on disk', 5000)"),
        ("jsonb", "to_jsonb(repeat('small on disk', 5000))"),
        ("numeric", "1e50000"),
        ("numeric", "'-1e50000'"),
        ("numeric", "('0.' || repeat('0', 5000))::numeric"),
    ],
)
def test_what_is_odd_is_left_to_copy_with_what_follows(
    database: Database, monkeypatch: pytest.MonkeyPatch, type_: str, value: str
) -> None:
    monkeypatch.setattr(joined, "_BLOCK_BYTES", 64 * 1024)
    database.execute(f"CREATE TABLE thing (id int PRIMARY KEY, v {type_})")
    database.execute("INSERT INTO thing SELECT n FROM generate_series(1, 6000) AS n")
    database.execute(f"UPDATE thing SET v = {value} WHERE id = 3000")
    reader = Reader(database, "thing")
    first, second = list(reader.chunks(NARROW, most=10_000))
    assert set(ways([first])) == {"joined"}
    assert (first.odd, first.end) == (True, False)
    assert first.rows < 3000
    assert (set(ways([second])), second.odd, second.end) == ({"copied"}, False, True)
    assert reader.rows([first, second]) == reader.rows(list(reader.chunks(WIDE)))


@pytest.mark.parametrize("separator", [r"\x7f", r"\x1f"])
@pytest.mark.parametrize("type_", ["text", "jsonb"])
def test_a_separator_in_a_value(
    database: Database, monkeypatch: pytest.MonkeyPatch, type_: str, separator: str
) -> None:
    """One of a text would be taken for the end of a value; JSON has none of those that its values are cut at."""
    monkeypatch.setattr(joined, "_FEWEST", 1)
    monkeypatch.setattr(joined, "_BLOCK_BYTES", int(5 * NARROW))
    value = f"E'here {separator}' || n" if type_ == "text" else f"to_jsonb(E'here {separator}' || n)"
    database.execute(f'CREATE TABLE thing (id text COLLATE "C" PRIMARY KEY, v {type_})')
    database.execute(f"INSERT INTO thing SELECT n, {value} FROM generate_series(11, 40) AS n")
    database.execute("UPDATE thing SET v = NULL WHERE id::int < 25")
    reader = Reader(database, "thing")
    found = list(reader.chunks(NARROW))
    odd = (type_, separator) == ("text", r"\x7f")
    assert set(ways(found)) == ({"joined", "copied"} if odd else {"joined"})
    assert reader.rows(found) == reader.rows(list(reader.chunks(WIDE)))


def test_a_chunk_grows_until_it_is_awaited(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined, "_FEWEST", 1)
    monkeypatch.setattr(joined, "_BLOCK_BYTES", int(10 * NARROW))
    database.execute("CREATE TABLE thing (id int PRIMARY KEY)")
    database.execute("INSERT INTO thing SELECT generate_series(1, 5000)")
    reader = Reader(database, "thing")

    def rows(awaited: Iterable[bool]) -> int:
        answers = iter(awaited)
        with reader.connected() as connection, chunk.locked(connection, reader.name, lambda _: False):
            found = reader.read(connection, most=1000, awaited=lambda: next(answers))
        assert found.cursor is not None
        assert found.cursor["key"] == [str(found.rows)]
        return found.rows

    assert rows([True]) == 1000
    assert 1000 < rows([False, True]) < 1500
    assert rows(repeat(False)) == 1500


def test_the_server_makes_no_text_that_is_many_times_larger(database: Database, asked: list[bytes]) -> None:
    """Where rows of some bytes were expected, thousands come that are small on disk alone."""
    database.execute("CREATE TABLE thing (id int PRIMARY KEY, v text)")
    database.execute("INSERT INTO thing SELECT n FROM generate_series(1, 30000) AS n")
    database.execute("UPDATE thing SET v = repeat('small on disk', 200) WHERE id > 20000")
    reader = Reader(database, "thing")
    (found,) = list(reader.chunks(20, most=50_000))
    assert (set(ways([found])), found.odd, found.rows) == ({"copied"}, True, 30_000)
    statement, _ = asked
    limits, rows = re.findall(rb" <= (\d+)\)", statement), re.findall(rb" LIMIT (\d+)\)", statement)
    assert len(set(limits)) == 1
    limit = int(limits[0])
    assert limit < 13 * 200
    assert 32 * 2**20 < limit * sum(map(int, rows)) <= 64 * 2**20


@pytest.mark.parametrize("type_", ["varchar DEFAULT ''", "int", "timestamp"])
def test_a_table_of_many_columns(database: Database, type_: str) -> None:
    """A result has room for 1664, and one statement asks for some blocks; a function takes 100 arguments."""
    columns = ", ".join([f"c{number} {type_}" for number in range(1500)])
    database.execute(f"CREATE TABLE thing (id int PRIMARY KEY, {columns})")
    value = {"int": "n", "timestamp": "now()::timestamp"}.get(type_, "n::text")
    database.execute(f"INSERT INTO thing (id, c7, c150) SELECT n, {value}, {value} FROM generate_series(1, 40) AS n")
    (found,) = compared(Reader(database, "thing"))
    assert set(ways([found])) == {"joined"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page faults are read from /proc")
def test_the_server_keeps_the_memory_of_its_texts(database: Database) -> None:
    database.execute("CREATE TABLE thing (id int PRIMARY KEY, v text)")
    database.execute("INSERT INTO thing SELECT n, repeat('x', 150) FROM generate_series(1, 20000) AS n")
    reader = Reader(database, "thing")
    assert reader.layout.joint

    def faults(*, prepared: bool) -> int:
        """Of the server's process, for a chunk behind the first."""
        with reader.connected() as connection:
            stat = Path(f"/proc/{connection.info.backend_pid}/stat")
            if not stat.exists():
                pytest.skip("the server is not on this machine")
            if prepared:
                joined.prepare(connection)
            for _ in range(2):
                before = int(stat.read_text().rpartition(")")[2].split()[7])
                found = reader.read(connection, most=20_000)
                assert ways([found])[0] == "joined"
            return int(stat.read_text().rpartition(")")[2].split()[7]) - before

    assert faults(prepared=True) < faults(prepared=False) / 2


def test_what_is_asked_for_each_chunk_is_planned_once(each_database: Database) -> None:
    each_database.execute("CREATE TABLE thing (id int PRIMARY KEY)")
    reader = Reader(each_database, "thing")

    def prepared(*, prepares: bool) -> int:
        with legacy.connect(reader.dsn, purpose="snapshot", autocommit=True, prepares=prepares) as connection:
            for _ in range(3):
                with chunk.locked(connection, reader.name, lambda _: False):
                    assert plan.describe(connection, reader.name, "pub") == reader.plan
            rows = connection.execute("SELECT statement FROM pg_prepared_statements WHERE from_sql IS FALSE").fetchall()
        assert all("pg_publication" in statement for (statement,) in rows)
        return len(rows)

    assert prepared(prepares=True) == 1
    assert prepared(prepares=False) == 0, "behind a pooler another server process would be asked for it"


def test_years_before_christ(database: Database) -> None:
    database.execute("CREATE TABLE thing (id int PRIMARY KEY, at timestamptz, local timestamp, word text)")
    database.execute(
        "INSERT INTO thing VALUES (1, '0044-03-15 12:00:00.5 BC', now(), 'BC'), (2, NULL, '0044-03-15 BC', NULL), "
        "(3, now(), NULL, ' +00 BC'), (4, 'infinity', '-infinity', '')"
    )
    assert ways(compared(Reader(database, "thing"))) == ["joined"]


@pytest.mark.parametrize("name", ["to_json", "concat_ws", "it"])
def test_a_column_of_the_name_that_the_server_gives_a_result(database: Database, name: str) -> None:
    database.execute(f"CREATE TABLE thing (v text, {name} int PRIMARY KEY)")
    database.execute("INSERT INTO thing SELECT (9 - n)::text, n FROM generate_series(1, 9) AS n")
    reader = Reader(database, "thing")
    found = compared(reader, most=2)
    assert [row[1] for row in reader.rows(found)] == [str(n) for n in range(1, 10)]


@pytest.mark.parametrize("name", ["a", "b0", "c0"])
def test_a_table_of_the_name_that_a_block_has(database: Database, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(joined, "_BLOCK_BYTES", int(10 * NARROW))
    database.execute(f"CREATE TABLE {name} (k0 int PRIMARY KEY, t0 text, a text, b0 text, c0 text)")
    database.execute(f"INSERT INTO {name} SELECT n, n, -n, n, -n FROM generate_series(1, 100) AS n")
    reader = Reader(database, name)
    found = compared(reader)
    assert [row[0] for row in reader.rows(found)] == [str(n) for n in range(1, 101)]


def test_once_it_was_odd_copy_is_asked_for_a_while() -> None:
    size = chunk.Size()
    assert size.width < WIDE
    size.learn(chunk.Chunk([], None, end=False, seconds=0.1, size=100, odd=True))
    tries = 0
    while size.width > WIDE:
        size.learn(chunk.Chunk([Block(b"1\n" * 10, 10)], None, end=False, seconds=0.1, size=100))
        tries += 1
    assert (tries, size.width) == (16, 10)


def test_other_tables_are_left_to_copy(database: Database) -> None:
    database.execute("CREATE TABLE thing (id int PRIMARY KEY, a int[]); INSERT INTO thing VALUES (1, '{1,2}')")
    assert ways(compared(Reader(database, "thing"))) == ["copied"]
    database.execute("CREATE TABLE keyless (id int); INSERT INTO keyless VALUES (1)")
    assert ways([next(Reader(database, "keyless").chunks(NARROW))]) == ["copied"]


def test_a_condition_is_left_to_copy(database: Database) -> None:
    database.execute("CREATE TABLE thing (id int PRIMARY KEY); INSERT INTO thing SELECT generate_series(1, 9)")
    reader = Reader(database, "thing")
    found = list(reader.chunks(NARROW, condition="id > 7"))
    assert (ways(found), reader.rows(found)) == (["copied"], [("8",), ("9",)])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(*[st.none() | st.text(st.characters(exclude_characters="\0", codec="utf-8"))] * 2), max_size=9)
)
def test_any_text(database: Database, rows: list[tuple[str | None, str | None]]) -> None:
    database.execute("CREATE TABLE IF NOT EXISTS thing (id int PRIMARY KEY, a text, b varchar, at timestamp)")
    database.execute("TRUNCATE thing")
    with database.connect() as connection, connection.cursor() as cursor:
        cursor.executemany("INSERT INTO thing VALUES (%s, %s, %s)", [(n, *row) for n, row in enumerate(rows)])
    found = compared(Reader(database, "thing"))
    odd = any("\x7f" in text for row in rows for text in row if text)
    assert set(ways(found)) == (({"copied"} if odd else {"joined"}) if rows else set())


def test_a_server_that_does_not_answer(database: Database) -> None:
    database.execute("CREATE TABLE thing (id int PRIMARY KEY); INSERT INTO thing VALUES (1)")
    reader = Reader(database, "thing")
    with reader.connected() as connection:
        connection.patience = 0.1  # type: ignore[attr-defined]
        connection.execute("BEGIN")
        with database.connect() as other, other.transaction():
            other.execute("LOCK TABLE thing IN ACCESS EXCLUSIVE MODE")
            with pytest.raises(psycopg.OperationalError, match=r"no answer for 0\.1 s"):
                reader.read(connection, most=10)
        assert connection.closed


def test_an_error_leaves_the_connection_as_it_was(database: Database) -> None:
    database.execute("CREATE TABLE thing (id int PRIMARY KEY); INSERT INTO thing VALUES (1)")
    reader = Reader(database, "thing")
    database.execute("DROP TABLE thing")
    with reader.connected() as connection:
        with pytest.raises(joined.Refused) as refused:
            reader.read(connection, most=10)
        assert isinstance(refused.value.__cause__, psycopg.errors.UndefinedTable)
        assert connection.execute(sql.SQL("SELECT 1")).fetchone() == (1,)
