"""What contracts and rules about columns cost: CPU of this process, no server, the median of many short rounds.

The event is an update of an orders table of ten columns, its contract the one that `figbridge schema events` derives.
An alternative library is given the same parsed detail. The cost of a rule is the difference that ten such columns make
to a row through the compiled writer, over ten; less than nothing where a constant is cheaper than the value.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

import orjson

from bench.report import CostLine, Report, say
from figbridge.change import Begin, Change, Column, Lsn, Operation, Relation
from figbridge.config import ForwardSection, HashSection, SelectSection
from figbridge.contracts import Contract
from figbridge.event import Event
from figbridge.forward import contract
from figbridge.forward.keys import PrimaryKeys
from figbridge.forward.sanitize import Rules
from figbridge.forward.shape import Shaper
from figbridge.forward.table import Naming, Table
from figbridge.forward.values import Encoders

_ROUNDS: Final = 15
_SECONDS: Final = 0.05  # of a round, about
_NAMING: Final = Naming("shop", "legacy.{database}", "{table}.{operation}")
# name, type OID, text, may be NULL, may be left out
_COLUMNS: Final = (
    ("id", 20, b"4711", False, False),
    ("customer_id", 23, b"815", False, False),
    ("status", 25, b"paid", False, True),
    ("total", 1700, b"12.50", True, True),
    ("paid", 16, b"t", False, False),
    ("note", 25, b"please ring twice, the dog does not bite", True, True),
    ("placed_at", 1184, b"2026-11-23 10:08:02.69654+00", False, False),
    ("tags", 1009, b"{gift,express}", True, True),
    ("doc", 3802, b'{"channel": "web", "campaign": "autumn"}', True, True),
    ("quantity", 23, b"3", False, False),
)
_MOST_VALIDATION, _MOST_MASKING = 5.0, 2.0  # µs


def contracts(report: Report) -> None:
    """Validation by contract and alternatives; each rule about a column."""
    say("contracts")
    event, schema = _order(), _schema()
    made = Contract("orders.updated.json", schema)
    assert made.breaches(event.detail) == (), made.breaches(event.detail)
    parsed = orjson.loads(event.detail)
    lines = report.costs
    lines.append(
        CostLine("contract", "figbridge: parse, validate", _cost(lambda: made.breaches(event.detail)), _MOST_VALIDATION)
    )
    lines.append(CostLine("contract", "jsonschema-rs alone", _cost(lambda: made.holds(parsed)), None))
    for name, check in _alternatives(schema, report).items():
        lines.append(CostLine("contract", f"{name} alone", _cost(lambda check=check: check(parsed)), None))  # type: ignore[misc]
    say("rules about columns")
    value = b"ada.lovelace@example.com"
    row = [b"1", *[value] * 10]
    plain = _row_cost(row)
    for word, rules in _rules().items():
        limit = None if word == "exclude" else _MOST_MASKING
        lines.append(CostLine("column", word, (_row_cost(row, **rules) - plain) / 10, limit))


def _order() -> Event:
    relation = Relation(1, "shop", "orders", "d", tuple(Column(it[0], it[1], -1, it[0] == "id") for it in _COLUMNS))
    shaper = Shaper(_NAMING, Encoders("safe", lambda _oid: None), lambda _relation: PrimaryKeys(0, {}))
    shaper.begin(Begin(Lsn(0x175FCA0), datetime.now(UTC), 853), "7711325899416979304-figbridge-1")
    values = [it[2] for it in _COLUMNS]
    event = shaper.event(Change(Operation.UPDATE, relation, 0, None, False, values, False))
    assert isinstance(event, Event)
    return event


def _schema() -> dict[str, Any]:
    described = contract.Described(("shop", "orders"), {it[0]: (it[1], it[3], it[4]) for it in _COLUMNS}, ["id"])
    forward = ForwardSection.model_validate({"sink": {"type": "stdout"}})
    return dict(contract.of_table(described, forward, _NAMING, lambda _oid: None))["legacy.shop", "orders.updated"]


def _alternatives(schema: dict[str, Any], report: Report) -> dict[str, Callable[[Any], object]]:
    found: dict[str, Callable[[Any], object]] = {}
    if importlib.util.find_spec("fastjsonschema"):
        import fastjsonschema

        # it knows drafts up to 7, of which this contract uses nothing that is newer
        found["fastjsonschema"] = fastjsonschema.compile(
            schema | {"$schema": "http://json-schema.org/draft-07/schema#"}
        )
    else:
        report.skipped.append("fastjsonschema: it is not installed")
    import jsonschema  # type: ignore[import-untyped]  # it has no type information

    found["jsonschema"] = jsonschema.Draft202012Validator(schema).is_valid
    return found


def _rules() -> dict[str, dict[str, Any]]:
    names = [f"c{index}" for index in range(10)]
    return {
        "exclude": {"exclude": names},
        "mask": {"mask": names},
        "replace": {"replace": dict.fromkeys(names, "somebody")},
        "truncate": {"truncate": dict.fromkeys(names, 4)},
        "hash": {"hash": names},
    }


def _row_cost(row: list[bytes], **rules: Any) -> float:
    columns = [Column("id", 23, -1, True), *[Column(f"c{index}", 25, -1, False) for index in range(10)]]
    section = SelectSection.model_validate({"table": "shop.people"} | rules)
    hashing = HashSection.model_validate({"key": "correct horse battery"})
    relation = Relation(1, "shop", "people", "d", tuple(columns))
    encoders = Encoders("safe", lambda _oid: None)
    table = Table(relation, _NAMING, encoders, frozenset({"id"}), {}, rules=Rules([section], hashing))
    return _cost(lambda: table.write(row))


def _cost(call: Callable[[], object]) -> float:
    """CPU µs of one call, the median of the rounds."""
    began, count = time.process_time(), 0
    while time.process_time() - began < _SECONDS:
        call()
        count += 1
    rounds = []
    for _ in range(_ROUNDS):
        began = time.process_time()
        for _ in range(count):
            call()
        rounds.append(1e6 * (time.process_time() - began) / count)
    return statistics.median(rounds)
