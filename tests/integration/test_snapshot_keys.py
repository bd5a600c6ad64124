"""What orders a table's chunks, and what names its rows: whatever an old schema has as a key, each row is read once.

Chunks are of a few rows, so that each table has some boundaries between them.
"""

from collections import Counter
from collections.abc import Sequence

import pytest

from figbridge.event import Event
from figbridge.forward.snapshot import chunk
from fixtures.forward import Forward
from fixtures.postgres import Database
from fixtures.snapshot import finished, prepare

ROWS = "INSERT INTO thing SELECT {} FROM generate_series(1, 20) AS n"
OPERATOR = """
CREATE FUNCTION public.other(mood, mood) RETURNS bool LANGUAGE sql IMMUTABLE AS 'SELECT $1::text < $2::text';
CREATE OPERATOR public.> (LEFTARG = mood, RIGHTARG = mood, FUNCTION = public.other);
"""
MOODS = "CREATE TYPE mood AS ENUM ('a', 'b', 'c', 'd', 'e', 'f', 'g', 'h');"
ALL_MOODS = "INSERT INTO thing SELECT m, 'x' FROM unnest(enum_range(NULL::mood)) AS m"


@pytest.fixture(params=["joined", "copied"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    class Small(chunk.Size):
        def __init__(self) -> None:
            super().__init__(rows=4)
            if request.param == "copied":
                self.copy()

        def learn(self, chunk: chunk.Chunk) -> None:
            """Nothing: it stays small."""

    monkeypatch.setattr(chunk, "Size", Small)
    return str(request.param)


def compared(database: Database, *publications: str) -> list[Event]:
    """The events of the snapshot, which say of each row what the stream has said; the rows were inserted behind it."""
    with Forward(database, *publications, snapshot=[("public", "thing")]) as forward:
        finished(forward, "thing")
        events = list(forward.sink.events)
    read = [event for event in events if event.detail_type.endswith(".read")]
    assert _parts(read) == _parts([event for event in events if event.detail_type.endswith(".inserted")])
    assert len({event.id for event in read}) == len(read)
    return read


def _parts(events: Sequence[Event]) -> Counter[bytes]:
    """From the schema's name to the list of unchanged columns: all that is about the row, byte by byte."""
    return Counter(it.detail[it.detail.index(b'"schema":') : it.detail.rindex(b',"position":')] for it in events)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("ddl", "rows"),
    [
        pytest.param(
            f"{MOODS} {OPERATOR} CREATE TABLE thing (k mood PRIMARY KEY, v text)",
            ALL_MOODS,
            id="an operator of one's own",
        ),
        pytest.param(
            f"{MOODS} CREATE DOMAIN feeling AS mood; CREATE TABLE thing (k feeling PRIMARY KEY, v text)",
            ALL_MOODS,
            id="a domain of an enum",
        ),
        pytest.param(
            "CREATE DOMAIN code AS text; CREATE TABLE thing (k code PRIMARY KEY, v int); "
            "ALTER DOMAIN code ADD CHECK (value > 'x') NOT VALID",
            "",
            id="a domain whose check old rows break",
        ),
        pytest.param(
            "CREATE SCHEMA a; CREATE SCHEMA b; CREATE TYPE a.mood AS ENUM ('x', 'y'); CREATE TYPE b.mood AS ENUM "
            "('u', 'v', 'w'); CREATE TABLE thing (k b.mood, l a.mood, PRIMARY KEY (k, l))",
            "INSERT INTO thing SELECT k, l FROM unnest(enum_range(NULL::b.mood)) k, unnest(enum_range(NULL::a.mood)) l",
            id="two types of one name",
        ),
        pytest.param(
            "CREATE TABLE thing (id int, v int, PRIMARY KEY (id) DEFERRABLE); ALTER TABLE thing REPLICA IDENTITY FULL",
            ROWS.format("n, n"),
            id="a deferrable key",
        ),
        pytest.param('CREATE TABLE thing (k "char" PRIMARY KEY)', ROWS.format('chr(64 + n)::"char"'), id="char"),
        pytest.param(
            "CREATE TABLE thing (k regtype, id int PRIMARY KEY)", ROWS.format("'thing'::regtype, n"), id="regtype"
        ),
    ],
)
def test_every_row_is_read_once(each_database: Database, ddl: str, rows: str) -> None:
    each_database.execute(f"ALTER DATABASE {each_database.name} SET search_path = public, a, b")
    if "NOT VALID" in ddl:  # the rows come before the check
        ddl, check = ddl.rsplit("; ", 1)
        prepare(each_database, ddl, "thing")
        each_database.execute(f"{ROWS.format('n, n')}; {check}")
    else:
        prepare(each_database, ddl, "thing")
        each_database.execute(rows)
    assert compared(each_database)


@pytest.mark.pg("< 16")  # those that come with contrib
@pytest.mark.usefixtures("way")
def test_a_key_of_types_whose_operators_have_no_one_name(each_database: Database) -> None:
    """Beside an integer a type whose operators are an extension's."""
    if not each_database.execute("SELECT 1 FROM pg_available_extensions WHERE name = 'citext'"):
        pytest.skip("this server has no extension citext")
    prepare(
        each_database,
        "CREATE SCHEMA ext; CREATE EXTENSION citext SCHEMA ext; "
        "CREATE TABLE thing (k ext.citext, n int, PRIMARY KEY (k, n))",
        "thing",
    )
    each_database.execute(ROWS.format("chr(96 + n / 3), n"))
    assert len(compared(each_database)) == 20


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("identity", ["DEFAULT", "FULL"])
def test_a_column_of_the_key_that_is_not_published(each_database: Database, identity: str) -> None:
    """What is left of the key does not tell rows apart: their ids are of all that there is."""
    each_database.execute("SELECT 1")
    if each_database.version < 15:
        ddl = "CREATE TABLE thing (a int, b int, id int GENERATED ALWAYS AS (b * 2) STORED, PRIMARY KEY (a, id))"
        prepare(each_database, ddl, "thing")
    else:
        prepare(each_database, "CREATE TABLE thing (a int, b int, id int, PRIMARY KEY (a, id))", "thing")
        each_database.execute(
            "DROP PUBLICATION pub; CREATE PUBLICATION pub FOR TABLE thing (a, b) WITH (publish = 'insert')"
        )
    each_database.execute(f"ALTER TABLE thing REPLICA IDENTITY {identity}")
    each_database.execute(
        f"INSERT INTO thing (a, b{'' if each_database.version < 15 else ', id'}) "
        f"SELECT 1, n{'' if each_database.version < 15 else ', n'} FROM generate_series(1, 20) AS n"
    )
    assert len(compared(each_database)) == 20


@pytest.mark.pg(">= 18")
@pytest.mark.usefixtures("way")
def test_a_key_that_may_be_null_after_all(database: Database) -> None:
    """Its constraint was never validated."""
    prepare(database, "CREATE TABLE thing (k int, n int, m text)", "thing")
    database.execute("ALTER TABLE thing REPLICA IDENTITY FULL")
    database.execute(ROWS.format("nullif(n, n / 5 * 5), n, 'm' || n"))
    database.execute(
        "ALTER TABLE thing ADD CONSTRAINT there NOT NULL k NOT VALID; CREATE UNIQUE INDEX one ON thing (k); "
        "ALTER TABLE thing REPLICA IDENTITY USING INDEX one"
    )
    with Forward(database, snapshot=[("public", "thing")]) as forward:
        finished(forward, "thing")
        read = [it for it in forward.sink.details if it["op"] == "read"]
    assert sorted(it["after"]["n"] for it in read) == list(range(1, 21))
    assert {it["after"]["n"] for it in read if it["after"]["k"] is None} == {5, 10, 15, 20}
    assert len({it["id"] for it in read}) == 20


@pytest.mark.usefixtures("way")
def test_a_primary_key_of_the_root_that_its_partitions_do_not_have(each_database: Database) -> None:
    """From 18 on the server takes it as the replica identity although it is not valid."""
    prepare(
        each_database,
        "CREATE TABLE thing (id int NOT NULL, p int NOT NULL) PARTITION BY LIST (p); "
        "CREATE TABLE one PARTITION OF thing FOR VALUES IN (1); CREATE TABLE two PARTITION OF thing DEFAULT; "
        "ALTER TABLE one ADD PRIMARY KEY (id, p); ALTER TABLE two ADD PRIMARY KEY (p, id); "
        "ALTER TABLE ONLY thing ADD PRIMARY KEY (id, p)",
        "thing",
    )
    each_database.execute(ROWS.format("n, n % 2"))
    assert len(compared(each_database)) == 20
