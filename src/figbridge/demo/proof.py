"""The end of the demo: what must hold, and does it. Pure but for the two functions that read the databases.

Three claims, each with its numbers, each of which can fail:

1. Both sides hold the same rows, column by column.
2. The new system heard of every change that the legacy application made, and of no other. One change less is a loss;
   one more is a loop, because every other change in the legacy tables is the bridge's own.
3. Every event that the new system made was applied, under its key; nothing else was, and nothing is a dead letter.
"""

import contextlib
import json
import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg

from figbridge.demo.bus import SOURCE
from figbridge.demo.legacy_app import TABLES

Rows = Mapping[int, Mapping[str, Any]]  # by id


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two sides of a table. ``differences`` are sentences, one for each row that differs."""

    table: str
    columns: int
    legacy: int
    new: int
    differences: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that the claims are judged by.

    made        row changes the legacy application made, by table and operation
    heard       distinct legacy events the new system received, likewise
    repeated    legacy events it received more than once
    emitted     keys of the new system's events
    sent        how often it sent them
    applied     keys in the bridge's inbox from the new system
    dead        dead letters, reason and message
    """

    comparisons: Sequence[Comparison]
    made: Mapping[str, int]
    heard: Mapping[str, int]
    repeated: int
    emitted: AbstractSet[str]
    sent: int
    applied: AbstractSet[str]
    dead: Sequence[str]


@dataclass(frozen=True, slots=True)
class Claim:
    """One sentence, and whether it holds."""

    holds: bool
    sentence: str


def claims(evidence: Evidence) -> tuple[Claim, ...]:
    """The three claims of this module."""
    return _equal(evidence), _told(evidence), _applied_once(evidence)


def _equal(evidence: Evidence) -> Claim:
    different = sum(len(comparison.differences) for comparison in evidence.comparisons)
    sides = " and ".join(f"{it.legacy} {it.table} of {it.columns} columns" for it in evidence.comparisons)
    if different:
        return Claim(holds=False, sentence=f"The two sides differ in {different} rows.")
    if not all(comparison.legacy for comparison in evidence.comparisons):
        return Claim(holds=False, sentence="A table is empty, so its equality proves nothing. Run for longer.")
    return Claim(holds=True, sentence=f"Both sides are equal, compared value by value: {sides}.")


def _told(evidence: Evidence) -> Claim:
    made, heard = sum(evidence.made.values()), sum(evidence.heard.values())
    lost, looped = Counter(evidence.made), Counter(evidence.heard)
    lost.subtract(evidence.heard)
    looped.subtract(evidence.made)
    parts = [f"{count} {kind} lost" for kind, count in sorted((+lost).items())]
    parts += [f"{count} {kind} that it never made: a loop" for kind, count in sorted((+looped).items())]
    numbers = f"the legacy application changed {made} rows, the new system heard of {heard} changes"
    if parts:
        return Claim(holds=False, sentence=f"Lost or looped: {numbers} ({', '.join(parts)}).")
    return Claim(
        holds=True,
        sentence=f"Nothing was lost and nothing looped: {numbers}, kind by kind the same; {evidence.repeated} of them "
        f"came again and were recognised. None of the {len(evidence.applied)} rows that the bridge wrote left as an "
        "event.",
    )


def _applied_once(evidence: Evidence) -> Claim:
    emitted, applied = len(evidence.emitted), len(evidence.applied)
    missing, unknown = evidence.emitted - evidence.applied, evidence.applied - evidence.emitted
    if missing or unknown or evidence.dead:
        return Claim(
            holds=False,
            sentence=f"Not applied exactly once: the new system emitted {emitted} events, the inbox holds {applied} "
            f"keys; {len(missing)} are missing, {len(unknown)} are unknown, {len(evidence.dead)} are dead letters"
            + (f" (first: {evidence.dead[0]})." if evidence.dead else "."),
        )
    if not emitted:
        return Claim(holds=False, sentence="The new system emitted no event, which proves nothing. Run for longer.")
    return Claim(
        holds=True,
        sentence=f"Applied exactly once: the new system emitted {emitted} events and sent them {evidence.sent} times; "
        f"each of the {applied} keys was applied once, and there is no dead letter.",
    )


def compare(table: str, legacy: Rows, new: Rows) -> Comparison:
    """Every row of both sides, column by column of the legacy side."""
    differences: list[str] = []
    columns = {column for row in legacy.values() for column in row}
    for key in sorted(legacy.keys() | new.keys()):
        if key not in new:
            differences.append(f"{table} {key}: only in the legacy database")
        elif key not in legacy:
            differences.append(f"{table} {key}: only in the new system")
        elif unequal := [_difference(column, legacy[key], new[key]) for column in _unequal(legacy[key], new[key])]:
            differences.append(f"{table} {key}: {'; '.join(unequal)}")
    return Comparison(table, len(columns), len(legacy), len(new), tuple(differences))


def _unequal(legacy: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [
        column
        for column in sorted(legacy.keys() | new.keys())
        if column not in legacy or column not in new or not same(legacy[column], new[column])
    ]


def _difference(column: str, legacy: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    return f"{column} is {legacy.get(column, 'absent')!r} there and {new.get(column, 'absent')!r} here"


def same(legacy: Any, new: Any) -> bool:
    """Whether a value of PostgreSQL and what JSON told of it are one: the type on the legacy side decides how."""
    match legacy:
        case None | bool():
            return legacy is new
        case Decimal():
            return isinstance(new, int | float | str) and Decimal(str(new)) == legacy
        case float():
            return type(new) in {int, float} and float(new) == legacy
        case datetime():
            return isinstance(new, str) and datetime.fromisoformat(new) == legacy
        case _:
            return type(legacy) is type(new) and bool(legacy == new)


def legacy_rows(connection: psycopg.Connection, table: str) -> Rows:
    """The rows of a table of the shop."""
    cursor = connection.cursor(row_factory=psycopg.rows.dict_row)
    return {row["id"]: row for row in cursor.execute(f"SELECT * FROM shop.{table}")}


def new_rows(database: sqlite3.Connection, table: str) -> Rows:
    """The rows that the new system holds; a tombstone is no row."""
    rows = database.execute("SELECT id, columns FROM document WHERE collection = ? AND columns <> '{}'", [table])
    return {key: json.loads(columns) for key, columns in rows}


def gather(dsn: str, new_system: Path, *, made: Mapping[str, int], repeated: int, sent: int) -> Evidence:
    """Read both databases. `made`, `repeated` and `sent` are what the two systems say of themselves."""
    database = _read_only(new_system)
    with psycopg.connect(dsn) as legacy:
        comparisons = [compare(table, legacy_rows(legacy, table), new_rows(database, table)) for table in TABLES]
        applied = legacy.execute("SELECT idempotency_key FROM figbridge.inbox WHERE source = %s", [SOURCE]).fetchall()
        dead = legacy.execute("SELECT direction, reason, message FROM figbridge.dead_letter").fetchall()
    heard = dict(database.execute("SELECT kind, count(*) FROM inbox GROUP BY kind"))
    emitted = database.execute("SELECT change_id FROM outbox").fetchall()
    database.close()
    return Evidence(
        comparisons=comparisons,
        made=made,
        heard=heard,
        repeated=repeated,
        emitted={key for (key,) in emitted},
        sent=sent,
        applied={key for (key,) in applied},
        dead=[": ".join(letter) for letter in dead],
    )


def heard(new_system: Path) -> int:
    """Distinct legacy events that the new system has committed."""
    with contextlib.closing(_read_only(new_system)) as database:
        return int(database.execute("SELECT count(*) FROM inbox").fetchone()[0])


def _read_only(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
