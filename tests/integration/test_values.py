"""What the stream says of a value, against docs/types.md and against PostgreSQL itself: to_json of the row."""

import json
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from figbridge import legacy
from figbridge.change import Change
from figbridge.forward import values
from figbridge.forward.decode import Decoder
from figbridge.forward.source import SETTINGS
from fixtures.clock import until
from fixtures.forward import Forward
from fixtures.postgres import Database
from fixtures.type_matrix import SECTIONS, Case, Section, array_of, by_kind

BUILT_IN = [section for section in SECTIONS if not section.ddl and not section.needs]
OWN = [section for section in SECTIONS if section.ddl]
OPTIONAL = [section for section in SECTIONS if section.needs]
# the server's own: it takes no input for them
NO_INPUT = {"gtsvector", "pg_node_tree", "pg_ndistinct", "pg_dependencies", "pg_mcv_list", "pg_brin_bloom_summary",
            "pg_brin_minmax_multi_summary"}  # fmt: skip


def parsed(text: str) -> Any:
    """Digit by digit and key by key: 1.50 is not 1.5, nor "1" 1, and a key may come twice."""
    return json.loads(
        text,
        parse_int=lambda digits: ("number", digits),
        parse_float=lambda digits: ("number", digits),
        object_pairs_hook=lambda pairs: ("object", pairs),
    )


def columns_of(sections: Sequence[Section], version: int) -> list[list[Case]]:
    """A column for each type, its cases one to a row, and one for an array of each that is none itself."""
    columns = [cases for section in sections for cases in by_kind(section.cases, version)]
    return columns + [[array_of(column)] for column in columns if not column[0].kind.endswith("[]")]


def fill(database: Database, columns: Sequence[Sequence[Case]]) -> list[bytes]:
    """A table ``matrix`` of all of them; what PostgreSQL says of each of its rows."""
    definitions = ", ".join(f"c{number} {column[0].kind}" for number, column in enumerate(columns))
    database.execute(
        f"CREATE TABLE matrix (id int PRIMARY KEY, {definitions}); CREATE PUBLICATION pub FOR TABLE matrix"
    )
    database.create_slot()
    rows = list(zip_longest(*columns))
    statement = f"INSERT INTO matrix VALUES ({', '.join(['%s'] * (len(columns) + 1))})"
    with database.connect(options=SETTINGS) as connection, connection.cursor() as cursor:
        for number, row in enumerate(rows):
            # not prepared: each value is a literal of its column's type
            literals = [None if case is None else case.literal for case in row]
            cursor.execute(statement, [str(number), *literals], prepare=False)
        cursor.execute("SELECT to_json(m) FROM matrix m ORDER BY id")
        assert cursor.pgresult
        # PostgreSQL 14 prints a "char" beyond ASCII as half a character
        return [cursor.pgresult.get_value(number, 0) or b"" for number in range(len(rows))]


def differences(
    columns: Sequence[Sequence[Case]], said: Sequence[Any], from_server: Sequence[bytes], version: int
) -> list[str]:
    """What is not as the page has it, and what the page has otherwise than the server without (or for no) reason."""
    oracle = [dict(parsed(row.decode(errors="replace"))[1]) for row in from_server]
    wrong = []
    for number, column in enumerate(columns):
        for case, row, by_server in zip_longest(column, said, oracle):
            found, theirs = row[f"c{number}"], by_server[f"c{number}"]
            wanted = None if case is None else parsed(case.says)
            what = f"{column[0].kind} {'NULL' if case is None else case.literal!r}"
            if found != wanted:
                wrong.append(f"{what}: the event says {found!r}, the page {wanted!r}")
            if (wanted != theirs) != (case is not None and case.differs(version)):
                wrong.append(f"{what}: the page says {wanted!r}, PostgreSQL {theirs!r}")
    return wrong


def said_by_events(database: Database, rows: int) -> list[Any]:
    with Forward(database) as forward:
        until(lambda: len(forward.sink.events) >= rows, 20, lambda: f"the events; failed: {forward.failure}")
        assert not [event for event in forward.sink.events if b"\n" in event.detail]
        events = [dict(parsed(event.detail.decode())[1]) for event in forward.sink.events]
        return [dict(event["after"][1]) for event in events]


def said_by_encoders(database: Database) -> list[Any]:
    """What pgoutput sends, by the encoders of the OIDs that its RELATION message names."""
    encoders = values.Encoders("safe", lambda oid: legacy.type_description(database.dsn, oid))
    decoder = Decoder()
    with database.connect(options=SETTINGS) as connection:
        payloads = connection.execute(
            "SELECT data FROM pg_logical_slot_get_binary_changes(%s, NULL, NULL, "
            "'proto_version', '1', 'publication_names', 'pub')", [database.slot],
        ).fetchall()  # fmt: skip
    changes = [it for it in map(decoder.feed, (data for (data,) in payloads)) if isinstance(it, Change)]
    return [
        {
            column.name: parsed(encoders.of(column.type_oid)(value).decode()) if isinstance(value, bytes) else value
            for column, value in zip(change.relation.columns, change.after or (), strict=True)
        }
        for change in changes
    ]


def test_every_built_in_type_is_as_the_page_has_it(each_database: Database) -> None:
    columns = columns_of(BUILT_IN, each_database.version)
    oracle = fill(each_database, columns)
    said = said_by_events(each_database, len(oracle))
    wrong = differences(columns, said, oracle, each_database.version)
    assert not wrong, "\n".join(wrong)


def test_no_built_in_type_is_missing_from_the_page(each_database: Database) -> None:
    known = """
        SELECT t.typname FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace
        WHERE n.nspname = 'pg_catalog' AND t.typtype IN ('b', 'r', 'm')
        AND NOT EXISTS (SELECT FROM pg_type e WHERE e.typarray = t.oid) AND t.typname <> '_cstring'
    """
    kinds = [case.kind for section in SECTIONS if section.needs in ("", "libxml") and not section.ddl
             for case in section.cases]  # fmt: skip
    shown = each_database.execute("SELECT typname FROM pg_type WHERE oid = ANY (%s::regtype[])", [kinds])
    assert {name for (name,) in each_database.execute(known)} - {name for (name,) in shown} - NO_INPUT == set()


def test_types_of_ones_own_are_as_the_page_has_them(each_database: Database) -> None:
    for section in OWN:
        each_database.execute(section.ddl)
    columns = columns_of(OWN, each_database.version)
    oracle = fill(each_database, columns)
    wrong = differences(columns, said_by_encoders(each_database), oracle, each_database.version)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("section", OPTIONAL, ids=lambda section: section.needs)
def test_types_that_a_server_may_lack_are_as_the_page_has_them(each_database: Database, section: Section) -> None:
    if section.needs == "libxml":
        available = each_database.execute(
            "SELECT 1 FROM pg_config WHERE name = 'CONFIGURE' AND setting LIKE '%libxml%'"
        )
    else:
        available = each_database.execute("SELECT 1 FROM pg_available_extensions WHERE name = %s", [section.needs])
    if not available:
        pytest.skip(f"this PostgreSQL {each_database.version} was built without {section.needs}")
    if section.needs != "libxml":
        each_database.execute(f"CREATE EXTENSION {section.needs}")
    columns = columns_of([section], each_database.version)
    oracle = fill(each_database, columns)
    wrong = differences(columns, said_by_encoders(each_database), oracle, each_database.version)
    assert not wrong, "\n".join(wrong)


def test_a_value_that_an_enumeration_gains_while_the_stream_runs(each_database: Database) -> None:
    each_database.execute("CREATE TYPE mood AS ENUM ('calm'); CREATE TABLE t (id int PRIMARY KEY, m mood)")
    each_database.execute("CREATE PUBLICATION pub FOR TABLE t")
    each_database.create_slot()
    with Forward(each_database) as forward:
        each_database.execute("INSERT INTO t VALUES (1, 'calm')")
        forward.until_events(1)
        each_database.execute("ALTER TYPE mood ADD VALUE 'wild'; ")
        each_database.execute("INSERT INTO t VALUES (2, 'wild')")
        forward.until_events(2)
        each_database.execute("ALTER TYPE mood RENAME VALUE 'calm' TO 'quiet'")
        each_database.execute("INSERT INTO t VALUES (3, 'quiet')")
        assert [it["after"]["m"] for it in forward.until_events(3)] == ["calm", "wild", "quiet"]


def test_a_type_that_is_gone_is_no_type(database: Database) -> None:
    database.execute("CREATE DOMAIN percent AS int")
    ((oid,),) = database.execute("SELECT 'percent'::regtype::oid::int8")
    described = legacy.type_description(database.dsn, oid)
    assert described
    assert (described.base, described.element) == (23, None)
    database.execute("DROP DOMAIN percent")
    assert legacy.type_description(database.dsn, oid) is None


def test_attributes_of_a_composite_change_without_a_word_in_the_stream(database: Database) -> None:
    """Why it stays a literal: PostgreSQL allows it, and describes neither the type nor the table again."""
    database.execute("CREATE TYPE pair AS (a text, b text); CREATE TABLE t (id int PRIMARY KEY, p pair)")
    database.execute("CREATE PUBLICATION pub FOR TABLE t")
    database.create_slot()
    database.execute("INSERT INTO t VALUES (1, '(a1,b1)')")
    database.execute("ALTER TYPE pair DROP ATTRIBUTE a")
    database.execute("ALTER TYPE pair ADD ATTRIBUTE c text")
    database.execute("INSERT INTO t VALUES (2, '(b2,c2)')")
    messages = database.execute(
        "SELECT get_byte(data, 0) FROM pg_logical_slot_peek_binary_changes(%s, NULL, NULL, "
        "'proto_version', '1', 'publication_names', 'pub')", [database.slot],
    )  # fmt: skip
    assert [chr(kind) for (kind,) in messages].count("R") == 1
    with Forward(database) as forward:
        assert [it["after"]["p"] for it in forward.until_events(2)] == ["(a1,b1)", "(b2,c2)"]


@pytest.mark.pg(">= 14")
def test_the_session_settings_of_the_database_do_not_reach_the_events(database: Database) -> None:
    database.execute(
        f"ALTER DATABASE {database.name} SET datestyle TO 'SQL, DMY'; "
        f"ALTER DATABASE {database.name} SET intervalstyle TO 'iso_8601'; "
        f"ALTER DATABASE {database.name} SET timezone TO 'Asia/Kolkata'; "
        f"ALTER DATABASE {database.name} SET bytea_output TO 'escape'; "
        f"ALTER DATABASE {database.name} SET extra_float_digits TO -5"
    )
    database.execute("CREATE TABLE t (id int PRIMARY KEY, a timestamptz, b interval, c bytea, d float8)")
    database.execute("CREATE PUBLICATION pub FOR TABLE t")
    database.create_slot()
    database.execute("INSERT INTO t VALUES (1, '2026-11-23T10:00:00Z', '1 day', '\\x00ff', 0.1::float8 + 0.2)")
    with Forward(database) as forward:
        after = forward.until_events(1)[0]["after"]
    assert after == {
        "id": 1, "a": "2026-11-23T10:00:00+00:00", "b": "1 day", "c": "\\x00ff", "d": 0.30000000000000004,
    }  # fmt: skip


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)
ELEMENT = st.none() | TEXT


@st.composite
def text_arrays(draw: st.DrawFn) -> list[Any]:
    """One to three dimensions, each part as long as its neighbours, as PostgreSQL asks."""
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))

    def part(depth: int) -> list[Any]:
        return [draw(ELEMENT) if depth == len(shape) else part(depth + 1) for _ in range(shape[depth - 1])]

    return part(1)


@st.composite
def numerics(draw: st.DrawFn) -> str:
    digits = draw(st.text("0123456789", min_size=1, max_size=60))
    point = draw(st.integers(0, len(digits)))
    return draw(st.sampled_from(["", "-"])) + (digits[:point] or "0") + (f".{digits[point:]}" if digits[point:] else "")


def documents(characters: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | characters
    tree = st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(characters, inner, max_size=3),
        max_leaves=8,
    )
    shapes = st.sampled_from([{}, {"ensure_ascii": False}, {"indent": 1}, {"separators": (" ,\r\n", "\t:")}])
    return st.builds(lambda value, shape: json.dumps(value, **shape), tree, shapes)


ANY_ROW = st.tuples(
    TEXT, text_arrays(), numerics(), st.floats(), documents(TEXT), documents(TEXT), st.binary(max_size=20)
)


def test_any_row_survives_the_stream(each_database: Database) -> None:
    each_database.execute(
        "CREATE TABLE anything (id bigserial PRIMARY KEY, "
        "t text, a text[], n numeric, f float8, j json, jb jsonb, b bytea)"
    )
    each_database.execute("CREATE PUBLICATION pub FOR TABLE anything")
    each_database.create_slot()
    insert = "INSERT INTO anything (t, a, n, f, j, jb, b) VALUES (%s, %s, %s::text::numeric, %s, %s, %s, %s)"
    with Forward(each_database) as forward, each_database.connect(options=SETTINGS) as connection:
        forward.until_streaming()

        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(ANY_ROW, min_size=1, max_size=30))
        def check(batch: list[Any]) -> None:
            seen = len(forward.sink.events)
            with connection.transaction(), connection.cursor() as cursor:
                cursor.executemany(insert, batch)
            until(lambda: len(forward.sink.events) >= seen + len(batch), 20, lambda: f"{forward.failure}")
            lines = [event.detail for event in forward.sink.events[seen:]]
            said = [dict(dict(parsed(line.decode())[1])["after"][1]) for line in lines]
            first, last = said[0]["id"][1], said[-1]["id"][1]
            oracle = connection.execute(
                "SELECT to_json(it)::text, n::text FROM anything it WHERE id BETWEEN %s AND %s ORDER BY id",
                [first, last],
            ).fetchall()
            for found, line, (whole, numeric) in zip(said, lines, oracle, strict=True):
                wanted = dict(parsed(whole)[1])
                if isinstance(found["n"], str):
                    wanted["n"] = numeric
                assert found == wanted
                assert b"\n" not in line

        check()
