"""Events that mean harm, or that nobody thought of: each becomes a dead letter with a reason, and the queue goes on.

Every one is between two good events, all of them in one batch; and whatever a string says, it is stored and not run.
"""

import json
import threading
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from figbridge.config import MappingSection
from figbridge.deadletter import TableDeadLetterStore
from figbridge.metrics import Metrics
from figbridge.provision.statements import schema_sql
from figbridge.reverse.apply import Applier
from figbridge.reverse.consume import Consumer
from figbridge.reverse.mapping import Mappings
from fixtures.postgres import Database
from fixtures.scripted import ScriptedSource

# names that a careless composer of SQL would run
EVIL = "t\"; DROP TABLE public.canary; --'%s %% $1 {0}"
SCHEMA = """
    CREATE TABLE public.canary (id int);
    INSERT INTO public.canary VALUES (1);
    CREATE TABLE public.thing (
        id int PRIMARY KEY, note text, amount numeric, seen timestamptz, tags int[], document jsonb, small smallint
    );
    CREATE TABLE public.parent (name text PRIMARY KEY);
    CREATE TABLE public.named (
        name text PRIMARY KEY, parent text REFERENCES public.parent, note text, raw text, fixed text, gone text
    );
    CREATE TABLE public."t""; DROP TABLE public.canary; --'%s %% $1 {0}" (
        name text PRIMARY KEY, "t""; DROP TABLE public.canary; --'%s %% $1 {0}" text
    );
"""
COLUMNS = ("note", "amount", "seen", "tags", "document", "small")
THING = {
    "match": {"source": "new", "detail-type": "thing"},
    "into": "public.thing",
    "action": "upsert",
    "key": {"id": "detail.id"},
    "set": {column: f"detail.{column}" for column in COLUMNS},
    "version": "detail.version",
}


@pytest.fixture
def legacy(database: Database) -> Database:
    database.execute(schema_sql())
    database.execute(SCHEMA)
    return database


def consume(database: Database, mappings: list[dict[str, Any]], bodies: list[bytes], **options: Any) -> Metrics:
    """One batch through the real consumer, until all of it is settled."""
    stop, metrics = threading.Event(), Metrics()
    source = ScriptedSource(bodies, stop)
    consumer = Consumer(
        source,
        Mappings([MappingSection.model_validate(it) for it in mappings]),
        Applier(database.dsn, statement_timeout=10, lock_timeout=2),
        TableDeadLetterStore(database.dsn),
        metrics,
        park_timeout=600,
        **options,
    )
    consumer.run(stop)
    assert not source.left
    return metrics


def thing(number: int, **detail: Any) -> bytes:
    return raw(number, json.dumps({"id": number, "version": 1, **detail})[1:-1])


def raw(number: int, detail: str, event_id: str | None = None, extra: str = "") -> bytes:
    identity = event_id or f"e-{number}"
    text = f'{{"id": "{identity}", "source": "new", "detail-type": "thing"{extra}, "detail": {{{detail}}}}}'
    return text.encode("utf-8", "surrogatepass")


def row(number: int, rest: str) -> bytes:
    return raw(number, f'"id": {number}, "version": 1, {rest}')


def outcome(metrics: Metrics, name: str) -> float:
    return metrics.registry.get_sample_value("figbridge_reverse_events_total", {"outcome": name}) or 0


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


DEAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "malformed"),
    "not JSON": (b"\x00\x01\xff", "malformed"),
    "not UTF-8": (row(2, '"note": "?"').replace(b"?", b"\xff\xfe"), "malformed"),
    "a byte order mark": (b"\xef\xbb\xbf" + thing(2), "malformed"),
    "a list": (b"[1, 2]", "malformed"),
    "null": (b"null", "malformed"),
    "without detail": (b'{"id": "e", "source": "new", "detail-type": "thing"}', "malformed"),
    "an id that is a number": (thing(2).replace(b'"e-2"', b"2"), "malformed"),
    "a NUL in the id": (raw(2, '"id": 2, "version": 1', event_id="e\\u0000"), "malformed"),
    "a lone surrogate in the id": (raw(2, '"id": 2, "version": 1', event_id="e\\ud800"), "malformed"),
    "nested for ever": (row(2, f'"document": {nested(100_000)}'), "malformed"),
    "nested objects for ever": (row(2, '"document": ' + '{"a":' * 100_000 + "1" + "}" * 100_000), "malformed"),
    "the literal NaN": (row(2, '"amount": NaN'), "malformed"),
    "the literal Infinity": (row(2, '"amount": -Infinity'), "malformed"),
    "an exponent beyond everything": (row(2, '"amount": 1e9999999999999999999999'), "malformed"),
    "a key that is missing": (raw(2, '"version": 1'), "malformed"),
    "a key that is null": (raw(2, '"id": null, "version": 1'), "malformed"),
    "a version that is a fraction": (raw(2, '"id": 2, "version": 1.5'), "malformed"),
    "a version that is true": (raw(2, '"id": 2, "version": true'), "malformed"),
    "a version that is SQL": (raw(2, '"id": 2, "version": "1); DROP TABLE canary; --"'), "malformed"),
    "a version beyond numeric": (raw(2, f'"id": 2, "version": "{"9" * 140_000}"'), "22003"),
    "a NUL in a text": (row(2, '"note": "a\\u0000b"'), "22P05"),
    "a NUL in a document": (row(2, '"document": {"a": "\\u0000"}'), "22P05"),
    "a lone surrogate in a text": (row(2, '"note": "\\ud800"'), "22P02"),
    "a lone surrogate, as bytes": (row(2, '"note": "\ud800"'), "malformed"),
    "a word for a number": (row(2, '"small": "many"'), "22P02"),
    "an object for a number": (row(2, '"small": {"a": 1}'), "22P02"),
    "a boolean for a number": (row(2, '"small": true'), "22P02"),
    "a fraction for an integer": (row(2, '"small": 1.5'), "22P02"),
    "an object for an array": (row(2, '"tags": {"a": 1}'), "22P02"),
    "a number beyond its type": (row(2, '"small": 70000'), "22003"),
    "a number beyond numeric": (row(2, '"amount": 1e200000'), "22003"),
    "digits without end for a small one": (row(2, f'"small": {"9" * 10_000}'), "22003"),
    "a key beyond its type": (raw(2, '"id": 99999999999, "version": 1'), "22003"),
    "a key that is SQL": (raw(2, '"id": "2 OR true; DROP TABLE canary; --", "version": 1'), "22P02"),
    "a time that no clock shows": (row(2, '"seen": "999999-01-01T00:00:00Z"'), "22008"),
    "a time that is none": (row(2, '"seen": "yesterday\'; DROP TABLE canary; --"'), "22007"),
    "an id that no index can hold": (raw(2, '"id": 2, "version": 1', event_id=chr(0x4E00) * 900_000), "54000"),
}


@pytest.mark.parametrize("kind", DEAD)
def test_it_is_a_dead_letter_with_a_reason_and_its_neighbours_are_applied(legacy: Database, kind: str) -> None:
    body, reason = DEAD[kind]
    consume(legacy, [THING], [thing(1, note="before"), body, thing(3, note="behind")])
    letters = legacy.execute("SELECT reason, message, body FROM figbridge.dead_letter")
    assert [(found, bytes(kept)) for found, _, kept in letters] == [(reason, body)]
    assert letters[0][1]
    assert legacy.execute("SELECT id, note FROM thing ORDER BY id") == [(1, "before"), (3, "behind")]
    assert legacy.execute("SELECT idempotency_key FROM figbridge.inbox ORDER BY 1") == [("e-1",), ("e-3",)]
    assert legacy.execute("SELECT count(*) FROM figbridge.parked") == [(0,)]


def test_all_of_them_in_one_batch(legacy: Database) -> None:
    bodies = [body for body, _ in DEAD.values()]
    mixed = [it for number, body in enumerate(bodies, 100) for it in (thing(number, note="good"), body)]
    metrics = consume(legacy, [THING], mixed)
    letters = legacy.execute("SELECT body, reason FROM figbridge.dead_letter")
    assert {bytes(body): reason for body, reason in letters} == dict(DEAD.values())
    assert legacy.execute("SELECT count(*) FROM thing WHERE note = 'good'") == [(len(bodies),)]
    assert outcome(metrics, "applied") == len(bodies)


ODD: dict[str, tuple[bytes, str, Any]] = {
    "a megabyte": (row(2, f'"note": "{"x" * 1_000_000}"'), "length(note)", 1_000_000),
    "a document of a megabyte": (row(2, f'"document": [{"1," * 500_000}1]'), "jsonb_array_length(document)", 500_001),
    "nested as deep as most will": (row(2, f'"document": {nested(200)}'), "length(document::text)", 400),
    "a name twice": (row(2, '"note": "first", "note": "last"'), "note", "last"),
    "digits without end": (row(2, f'"amount": {"9" * 10_000}.5'), "length(amount::text)", 10_002),
    "an exponent": (row(2, '"amount": 1e300'), "length(amount::text)", 301),
    "a clock that is wrong by centuries": (
        raw(2, '"id": 2, "version": 1', extra=', "time": "0001-01-01T00:00:00Z"'), "id", 2,
    ),
    "a clock that is no clock": (raw(2, '"id": 2, "version": 1', extra=', "time": {"now": "?"}'), "id", 2),
    "a time of the far future": (row(2, '"seen": "9999-12-31T23:59:59Z"'), "extract(year FROM seen)::int", 9999),
    "a negative version": (raw(2, '"id": 2, "version": -5'), "id", 2),
    "an emoji in two halves": (row(2, '"note": "\\ud83d\\ude00"'), "note", "\N{GRINNING FACE}"),
    "text for a number": (row(2, '"small": " 7 "'), "small::int", 7),
    "spaces around": (b" \n\t" + row(2, '"note": "x"') + b"\r\n", "note", "x"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
def test_what_is_odd_but_means_something_is_applied(legacy: Database, kind: str) -> None:
    body, asked, expected = ODD[kind]
    consume(legacy, [THING], [thing(1, note="before"), body, thing(3, note="behind")])
    assert legacy.execute("SELECT reason FROM figbridge.dead_letter") == []
    assert legacy.execute(f"SELECT {asked} FROM thing WHERE id = 2") == [(expected,)]
    assert legacy.execute("SELECT count(*) FROM thing") == [(3,)]


@pytest.mark.parametrize("unmapped", ["ignore", "dead-letter"])
def test_what_no_mapping_is_for_is_ignored_or_a_dead_letter_as_the_file_says(legacy: Database, unmapped: Any) -> None:
    stranger = thing(2).replace(b'"thing"', b'"nobody\'s"')
    metrics = consume(legacy, [THING], [thing(1), stranger, thing(3)], unmapped=unmapped)
    dead = legacy.execute("SELECT reason, body FROM figbridge.dead_letter")
    assert dead == ([] if unmapped == "ignore" else [("unmapped", stranger)])
    assert (outcome(metrics, "ignored"), outcome(metrics, "dead_letter")) == (
        (1, 0) if unmapped == "ignore" else (0, 1)
    )
    assert legacy.execute("SELECT count(*) FROM thing") == [(2,)]


# --- SQL in every string

NAMED: list[dict[str, Any]] = [
    {
        "match": {"source": "new", "detail-type": "named"},
        "statements": [
            {
                "into": "public.named", "action": "upsert", "key": {"name": "detail.name"},
                "set": {"parent": "detail.parent", "note": "detail.note", "fixed": {"value": EVIL},
                        "gone": {"path": "detail.nothing", "default": EVIL}},
            },
            {"sql": "UPDATE public.named SET raw = %(text)s || '%%' WHERE name = %(name)s",
             "with": {"text": "detail.note", "name": "detail.name"}},
            {"into": f'public."{EVIL.replace(chr(34), chr(34) * 2)}"', "action": "upsert",
             "key": {"name": "detail.name"}, "set": {EVIL: "detail.note"}},
        ],
        "idempotency_key": "detail.change",
        "entity": "detail.entity",
        "version": "detail.version",
    },
    {
        "match": {"source": "new", "detail-type": "forgotten"},
        "into": "public.named", "action": "delete", "key": {"name": "detail.name"}, "soft": {"gone": "detail.note"},
    },
    {
        "match": {"source": "new", "detail-type": "parent"},
        "into": "public.parent", "action": "insert", "set": {"name": "detail.name"},
    },
]  # fmt: skip
WORDS = st.lists(
    st.sampled_from([
        "'", '"', "\\", ";", "--", "/*", "*/", "$1", "$$", "%s", "%(name)s", "%%", "{0}", "{", "}", ",", "(", ")",
        "NULL", "x", " ", "\n", "é", "\N{GRINNING FACE}", "'; DROP TABLE public.canary; --",
        '"; DROP TABLE public.canary; --', "\\'; DROP TABLE public.canary; --",
        "') ON CONFLICT DO NOTHING; DELETE FROM public.canary; --",
    ]),
    min_size=1, max_size=8,
).map("".join)  # fmt: skip


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.tuples(WORDS, WORDS, WORDS, WORDS, WORDS, WORDS))
def test_no_string_of_an_event_is_ever_run(legacy: Database, words: tuple[str, ...]) -> None:
    name, parent, note, key, entity, event_id = words
    legacy.execute("TRUNCATE named, parent, figbridge.inbox, figbridge.entity_version, figbridge.parked")
    legacy.execute(f'TRUNCATE "{EVIL.replace(chr(34), chr(34) * 2)}"')

    def body(kind: str, identity: str, **detail: Any) -> bytes:
        return json.dumps({"id": identity, "source": "new", "detail-type": kind, "detail": detail}).encode()

    child = body("named", event_id, name=name, parent=parent, note=note, change=key, entity=entity, version=1)
    # the child waits for its parent, so its strings pass through the park as well
    consume(legacy, NAMED, [child])
    assert legacy.execute("SELECT scope, identity, event_id FROM figbridge.parked") == [
        ("public.named", entity, event_id)
    ]
    consume(legacy, NAMED, [body("parent", f"parent {event_id}", name=parent), child])
    consume(legacy, NAMED, [child])
    assert legacy.execute("SELECT count(*) FROM figbridge.parked") == [(0,)]
    assert legacy.execute("SELECT * FROM named") == [(name, parent, note, f"{note}%", EVIL, EVIL)]
    assert legacy.execute(f'SELECT * FROM "{EVIL.replace(chr(34), chr(34) * 2)}"') == [(name, note)]
    assert (key,) in legacy.execute("SELECT idempotency_key FROM figbridge.inbox")
    assert legacy.execute("SELECT identity FROM figbridge.entity_version") == [(entity,)]
    consume(legacy, NAMED, [body("forgotten", f"forgotten {event_id}", name=name, note=note)])
    assert legacy.execute("SELECT gone FROM named") == [(note,)]
    assert legacy.execute("SELECT * FROM canary") == [(1,)]
    assert legacy.execute("SELECT count(*) FROM figbridge.dead_letter") == [(0,)]
