"""Contracts out of live tables: what the details of a table's events look like, as JSON Schema, one a kind of event.

Kinds are what happens to rows, and what the bridge says of the table: ``schema.changed``, ``backfill.*``.

INVARIANT. Every event that the bridge makes of a table as it is now keeps the contract derived from it; a test lets a
real server's events be held against theirs. So types are as wide as `forward.values` makes them: a number may be a
string of its digits, an array that has bounds is a string, and a large value that the server did not send is not there.

Open for what is added: a further column breaks no consumer, so it breaks no contract. docs/contracts.md.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import psycopg
from psycopg.postgres import types as _built_in

from figbridge import legacy
from figbridge.change import Operation
from figbridge.config import Config, ForwardSection, SelectSection, split_table
from figbridge.contracts import SAYS, Kind
from figbridge.errors import BridgeError, ConfigError, Problem, SetupError
from figbridge.forward.snapshot import backfill
from figbridge.forward.snapshot import plan as plans
from figbridge.forward.table import PAST, SCHEMA_CHANGED, Naming
from figbridge.legacy import TypeDescription
from figbridge.preflight.catalogue import Name, spell

_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, Any]
Describe = Callable[[int], TypeDescription | None]


@dataclass(frozen=True, slots=True)
class Described:
    """A table as it is now. `columns`: name → (type OID, whether it may be NULL, whether it may be left out)."""

    name: Name
    columns: Mapping[str, tuple[int, bool, bool]]
    keys: Sequence[str]


def contracts(config: Config) -> dict[Kind, Schema]:
    """The contracts of all tables of the file but the outbox. Raises ConfigError, SetupError, BridgeError."""
    forward = config.forward
    if forward is None:
        raise ConfigError("there are no events", [Problem("forward", "is missing", "add the section: sink, …")])
    if forward.format == "debezium":
        problem = Problem(
            "forward.format", "is debezium, whose schema is Debezium's", "contracts are of the native form"
        )
        raise ConfigError("no contracts for this form", [problem])
    dsn = config.legacy.dsn.get_secret_value()
    outbox = split_table(forward.outbox.table) if forward.outbox and forward.outbox.table else None
    names = [name for name in map(split_table, config.legacy.tables) if name != outbox]
    found: dict[Kind, list[Schema]] = {}
    with legacy.connect(dsn, purpose="schema", autocommit=True) as connection, legacy.translated():
        naming = Naming(connection.info.dbname, forward.source, forward.detail_type, forward.resources)
        for name in names:
            described = _described(connection, name, config.legacy.publication)
            made = of_table(described, forward, naming, partial(legacy.type_description, dsn))
            for kind, schema in itertools.chain(made, _notices(name, naming)):
                found.setdefault(kind, []).append(schema)
    return {kind: _merged(kind, schemas) for kind, schemas in found.items()}


def _described(connection: psycopg.Connection, name: Name, publication: str) -> Described:
    try:
        plan = plans.describe(connection, name, publication)
    except BridgeError as error:
        raise SetupError(
            "contracts are of what is published", [Problem(spell(*name), str(error), error.hint)]
        ) from error
    if plan is None:
        raise SetupError("a table is missing", [Problem(spell(*name), "there is no such table", "mend legacy.tables")])
    rows = connection.execute(
        "SELECT attname::text, attnotnull, attstorage <> 'p' FROM pg_attribute WHERE attrelid = %s AND attnum > 0",
        [plan.relation.oid],
    ).fetchall()
    told = {column: (not_null, large) for column, not_null, large in rows}
    columns = {it.name: (it.type_oid, not told[it.name][0], told[it.name][1]) for it in plan.relation.columns}
    return Described(name, columns, plan.identity)


def of_table(
    table: Described, forward: ForwardSection, naming: Naming, describe: Describe
) -> Iterator[tuple[Kind, Schema]]:
    """The contracts of one table, one for each operation."""
    select = next((it for it in forward.select if split_table(it.table) == table.name), None)
    leaving = {name: it for name, it in table.columns.items() if select is None or not select.stays(name)}
    values = {
        name: _value(name, oid, forward, select, describe) | {"x-nullable": nullable}
        for name, (oid, nullable, _) in leaving.items()
    }
    properties = {name: _nullable(schema) for name, schema in values.items()}
    keys = [name for name in table.keys if name in leaving]
    key: Schema = {"type": "null"}
    if keys:
        key = {"type": "object", "required": keys, "properties": {it: properties[it] for it in keys}}
        key["additionalProperties"] = False
    always = [name for name, (_, _, large) in leaving.items() if not large or name in keys]
    whole: Schema = {"type": "object", "required": list(leaving), "properties": properties}
    partly: Schema = {"type": "object", "required": always, "properties": properties}
    old: Schema = {
        "type": ["object", "null"],
        "properties": {it: _or_null(schema) for it, schema in properties.items()},
    }
    none: Schema = {"type": "null"}
    images = {
        Operation.INSERT: (key, none, whole),
        Operation.UPDATE: (key, old, partly),
        Operation.DELETE: (key, old | {"type": "object"}, none),
        Operation.TRUNCATE: (none, none, none),
        Operation.READ: (key, none, whole),
    }
    for operation, (of_key, before, after) in images.items():
        named = naming.of(*table.name, PAST[operation])
        envelope = _envelope(table.name, operation, of_key, before, after)
        yield (named.source, named.detail_type), envelope


def _envelope(name: Name, operation: Operation, key: Schema, before: Schema, after: Schema) -> Schema:
    about: Schema = {
        "schema": {"const": name[0]},
        "table": {"const": name[1]},
        "schema_version": _VERSION,
        "key": key,
        "before": before,
        "after": after,
        "unchanged": {"type": "array", "items": {"type": "string"}},
    }
    return _detail(name, operation, about, _ROW)


def _notices(name: Name, naming: Naming) -> Iterator[tuple[Kind, Schema]]:
    """The contracts of what the bridge says of a table: `figbridge.forward.shape`, `.snapshot.backfill`."""
    about: Schema = {"schema": {"const": name[0]}, "table": {"const": name[1]}, "key": {"type": "null"}}
    columns = {
        "type": "array",
        "items": {
            "type": "object",
            "required": ["name", "type", "key"],
            "properties": {"name": {"type": "string"}, "type": {"type": "string"}, "key": {"type": "boolean"}},
        },
    }
    version: Schema = {"schema_version": _VERSION, "identity": {"type": "string"}, "columns": columns}
    previous: Schema = {"type": "object", "required": list(version), "properties": version}
    started = {"run": {"type": "integer"}, "since": _LSN, "reason": {"type": "string"}}
    notices: list[tuple[str, Schema, Schema]] = [(SCHEMA_CHANGED, version | {"previous": previous}, _ROW)]
    notices += [(operation, started, _MESSAGE) for operation in backfill.OPERATIONS]
    for operation, more, position in notices:
        named = naming.of(*name, operation)
        yield (named.source, named.detail_type), _detail(name, operation, about | more, position)


_LSN: Final[Schema] = {"type": "string", "pattern": "^[0-9A-F]+/[0-9A-F]+$"}
_VERSION: Final[Schema] = {"type": "string", "pattern": "^[0-9a-f]{8}$"}
_NUMBER: Final[Schema] = {"type": "integer", "minimum": 0}
# where a row stands, and where a message does
_ROW: Final[Schema] = {"commit_lsn": _LSN, "ordinal": _NUMBER, "xid": _NUMBER}
_MESSAGE: Final[Schema] = {"commit_lsn": _LSN, "ordinal": {"type": "null"}, "lsn": _LSN, "xid": _NUMBER}


def _detail(name: Name, operation: str, about: Schema, position: Schema) -> Schema:
    properties: Schema = {
        "id": {"type": "string", "minLength": 1},
        "op": {"const": str(operation)},
        **about,
        "position": {"type": "object", "required": list(position), "properties": position},
        "committed_at": {"type": "string", "minLength": 1},
        "hops": {"type": "integer", "minimum": 0},
        "cause": {},
    }
    return {"title": f"{spell(*name)}, {operation}", "type": "object", "required": list(properties)} | {
        "properties": properties
    }


def _value(name: str, oid: int, forward: ForwardSection, select: SelectSection | None, describe: Describe) -> Schema:
    match select.treatments.get(name) if select else None:
        case "mask":
            return {"const": "***"}
        case "replace" if select:
            return {"const": select.replace[name]}
        case "truncate" if select:
            return {"type": "string", "maxLength": select.truncate[name]}
        case "hash":
            return {"type": "string", "pattern": "^[A-Za-z0-9._-]+:[0-9a-f]{64}$"}
    kinds = _json_types(oid, forward.numbers == "safe", describe)
    if not kinds:
        return {}
    return {"type": kinds[0] if len(kinds) == 1 else kinds}


_TYPES: Final[Mapping[str, list[str]]] = {
    "bool": ["boolean"],
    "int2": ["integer"],
    "int4": ["integer"],
    "numeric": ["number", "string"],  # NaN and the infinities are strings, and so is what no double can hold
    "float4": ["number", "string"],
    "float8": ["number", "string"],
    "json": [],
    "jsonb": [],
    "int2vector": ["array"],
    "oidvector": ["array"],
}
_ARRAY: Final = ["array", "string"]  # its literal, where it has bounds of its own


def _json_types(oid: int, safe: bool, describe: Describe) -> list[str]:
    """What `forward.values` may make of a value of the type; empty for any JSON."""
    info = _built_in.get(oid)
    if info is not None:
        if info.name == "int8" and info.oid == oid:
            return ["integer", "string"] if safe else ["integer"]
        return _ARRAY if info.array_oid == oid else _TYPES.get(info.name, ["string"])
    described = describe(oid)
    if described is not None and described.base:
        return _json_types(described.base, safe, describe)
    return _ARRAY if described is not None and described.element else ["string"]


def _nullable(schema: Schema) -> Schema:
    nullable = schema.pop("x-nullable")
    return _or_null(schema) if nullable else schema


def _or_null(schema: Schema) -> Schema:
    if "const" in schema:
        return {"enum": [schema["const"], None]}
    if "enum" in schema or "type" not in schema:
        return schema
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return schema | {"type": kinds if "null" in kinds else [*kinds, "null"]}


def _merged(kind: Kind, schemas: Sequence[Schema]) -> Schema:
    """One contract; several tables or operations may share a detail-type, as the template has it."""
    head = {"$schema": _DIALECT, SAYS: {"source": kind[0], "detail-type": kind[1]}}
    return head | (schemas[0] if len(schemas) == 1 else {"anyOf": list(schemas)})
