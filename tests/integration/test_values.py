"""What the stream says of a value against what PostgreSQL itself says of it: to_json of the row."""

import json
from decimal import Decimal
from typing import Any

import pytest

from fixtures.clock import until
from fixtures.forward import Forward
from fixtures.postgres import Database

# type → literals
VALUES: dict[str, list[str]] = {
    "bool": ["true", "false"],
    "int2": ["-32768"],
    "int4": ["2147483647"],
    "int8": ["42", "9007199254740991"],
    "float4": ["1.5", "1e-30", "NaN", "-Infinity"],
    "float8": ["0.1", "1e300", "-0", "1e20", "NaN", "Infinity"],
    "numeric": ["12.50", "-0.001", "NaN"],
    "numeric(12,2)": ["1000000.10"],
    "text": ["", "plain", 'q"u\\o\tt\ne\x01\x7f', "üñí🐘", "NULL"],
    "varchar(20)": ["v"],
    "char(4)": ["ab"],
    '"char"': ["x"],
    "name": ["n"],
    "date": ["2026-11-23", "infinity", "-infinity", "0044-03-15 BC", "12345-06-07"],
    "time": ["24:00", "01:02:03.456789"],
    "timetz": ["24:00:00+00", "01:02:03+05:30"],
    "timestamp": ["2026-11-23 10:08:02.69654", "infinity", "0044-03-15 12:00 BC", "294276-12-31 23:59:59.999999"],
    "timestamptz": ["2026-11-23 10:08:02.69654+05:30", "-infinity", "0044-03-15 12:00+00 BC", "12345-01-01 00:00+00"],
    "interval": ["1 year 2 mons -3 days 04:05:06.789", "0"],
    "bytea": ["\\x00ff10", ""],
    "uuid": ["a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"],
    "inet": ["192.168.0.1/24", "::1"],
    "cidr": ["10.0.0.0/8"],
    "macaddr": ["08:00:2b:01:02:03"],
    "bit(3)": ["101"],
    "varbit": ["1010"],
    "money": ["12.34"],
    "json": ['{"a": 1,\n "a": 2}', '"\\ud800"', "[1e400, 0.10]", "null"],
    "jsonb": ['{"b": [1, null, "x"], "n": 12345678901234567890}', '"text"'],
    "int4range": ["[1,5)", "empty"],
    "tstzrange": ["[2026-01-01 00:00+00,)"],
    "int4multirange": ["{[1,3),[5,7)}"],
    "point": ["(1,2)"],
    "tsvector": ["a fat cat"],
    "int4[]": ["{}", "{1,NULL,3}", "{{1,2},{3,4}}"],
    "text[]": ['{plain,"with,comma","q\\"uote","back\\\\slash",NULL,"NULL","{brace}",""}', '{{a,b},{"c d",e}}'],
    "bool[]": ["{t,f,NULL}"],
    "numeric[]": ["{1.50,NaN}"],
    "jsonb[]": ['{"{\\"a\\": [1, 2]}",NULL}'],
    "timestamptz[]": ['{"2026-11-23 10:00+00",infinity}'],
    "bytea[]": ['{"\\\\x00ff"}'],
    "date[]": ["{2026-11-23}"],
}
# where the documented rule of values.py differs from to_jsonb: (type, literal, what the event says)
EXCEPTIONS: list[tuple[str, str, Any]] = [
    ("int8", "9007199254740992", "9007199254740992"),
    ("int8", "9007199254740993", "9007199254740993"),
    ("int8", "-9223372036854775808", "-9223372036854775808"),
    ("numeric", "1234567890123456789012345678901234567890.12", "1234567890123456789012345678901234567890.12"),
    ("int4[]", "[2:3]={1,2}", "[2:3]={1,2}"),
    ("box[]", "{(1,1),(0,0);(2,2),(1,1)}", ["(1,1),(0,0)", "(2,2),(1,1)"]),
    ("mood", "wild", "wild"),
    ("mood[]", "{calm,wild}", "{calm,wild}"),
    ("percent", "42", "42"),
    ("pair", "(1,a)", "(1,a)"),
]


def parsed(text: str) -> Any:
    return json.loads(text, parse_float=Decimal, parse_int=Decimal)


def test_what_the_event_says_is_what_postgresql_says(each_database: Database) -> None:
    each_database.execute("CREATE TYPE mood AS ENUM ('calm', 'wild'); CREATE DOMAIN percent AS int CHECK (VALUE < 101)")
    each_database.execute("CREATE TYPE pair AS (n int, t text)")
    cases = [(kind, literal) for kind, literals in VALUES.items() for literal in literals]
    cases += [(kind, literal) for kind, literal, _ in EXCEPTIONS]
    columns = ", ".join(f"c{number} {kind}" for number, (kind, _) in enumerate(cases))
    each_database.execute(
        f"CREATE TABLE matrix (id int PRIMARY KEY, {columns}); CREATE PUBLICATION pub FOR TABLE matrix"
    )
    each_database.create_slot()
    marks = ", ".join(["%s"] * len(cases))
    each_database.execute(f"INSERT INTO matrix VALUES (1, {marks})", [literal for _, literal in cases])
    with each_database.connect() as connection:
        connection.execute("SET timezone TO 'UTC'")
        # to_json, not to_jsonb: jsonb itself cannot hold what a json column can, such as a lone surrogate
        row = connection.execute("SELECT to_json(m)::text FROM matrix m").fetchone()
    assert row
    oracle = parsed(row[0])
    with Forward(each_database) as forward:
        until(lambda: forward.sink.events, 20, lambda: f"the event; failed: {forward.failure}")
        said = parsed(forward.sink.events[0].detail.decode())["after"]
    wrong = []
    expected = {f"{kind} {literal}": value for kind, literal, value in EXCEPTIONS}
    for number, (kind, literal) in enumerate(cases):
        found, wanted = said[f"c{number}"], expected.get(f"{kind} {literal}", oracle[f"c{number}"])
        if found != wanted:
            wrong.append(f"{kind} {literal!r}: the event says {found!r}, PostgreSQL {wanted!r}")
    assert not wrong, "\n".join(wrong)


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
