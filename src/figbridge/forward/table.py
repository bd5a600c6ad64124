"""One version of a table, compiled: how its events are named, what its key is, how its rows are written.

A version is a RELATION message: names, types and key as they were when the rows were written. Its `version`, 8 hex
digits, is in every event (``schema_version``), and an event ``schema.changed`` says what it stands for before the first
event that bears it. The same table on another server, or after a restart, has the same version.

INVARIANT. A row is written by the version that was in force for it, never by what the catalogue says now.
"""

import functools
import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson
from psycopg.postgres import types as _built_in

from figbridge.change import UNCHANGED, Column, Operation, Relation, Row
from figbridge.forward import debezium, form, values
from figbridge.forward.form import Form, Named, Parts
from figbridge.forward.sanitize import Rules
from figbridge.forward.unroll import Lane, lane, writer

SCHEMA_CHANGED: Final = "schema.changed"

PAST: Final = {
    Operation.INSERT: "inserted",
    Operation.UPDATE: "updated",
    Operation.DELETE: "deleted",
    Operation.TRUNCATE: "truncated",
    Operation.READ: "read",
}
_Encoded = tuple[bytes, values.Encoder]  # a column's name as JSON, and what encodes its values
_LANES: Final = {b"I": Operation.INSERT, b"U": Operation.UPDATE}
_IDENTITIES: Final = {"d": "default", "i": "index", "f": "full", "n": "nothing"}


@dataclass(frozen=True, slots=True)
class Naming:
    """How events are named: the templates of `ForwardSection`, the database's name that fills them, and their form."""

    database: str
    source: str
    detail_type: str
    resources: tuple[str, ...] = ()
    form: Form = "native"

    def of(self, schema: str, table: str, operation: str) -> Named:
        """Of an event; `operation` is a past participle, or ``schema.changed``."""
        words = {"database": self.database, "schema": schema, "table": table}
        resources = tuple(it.format(**words, operation=operation) for it in self.resources)
        return Named(self.source.format(**words), self.detail_type.format(**words, operation=operation), resources)

    def parts(self, relation: Relation, operation: Operation, where: bytes, version: str) -> Parts:
        """Of the rows of a table, in the form of the details."""
        named = self.of(relation.schema, relation.name, PAST[operation])
        if self.form == "debezium":
            return debezium.parts(named, operation, self.database, (relation.schema, relation.name), version)
        return form.native(named, operation, where, version)


class Table:
    """See the module. ``relation`` may be replaced by an equal one, of a new connection.

    ``label`` begins the ordering key of each of its events, ``parts`` has what the details of each operation have in
    common, ``write`` writes a whole row of ``before`` or ``after``. ``labels`` has the columns' names as JSON,
    ``encoders`` how their values are written, ``keys`` which of them are the key. `keys` are the names of the key's
    columns, `type_names` those of types that are not built in; ``type_names`` has those of its columns.

    By `rules` columns stay (their label is None) or leave as something else (`figbridge.forward.sanitize`): that is
    done here and nowhere later, so nothing that is made of an event ever had their values. ``where`` says which rows
    leave; None: all. ``ruled``: there are any rules.
    """

    def __init__(
        self,
        relation: Relation,
        naming: Naming,
        encoders: values.Encoders,
        keys: frozenset[str],
        type_names: Mapping[int, str],
        *,
        rules: Rules | None = None,
    ) -> None:
        self.relation = relation
        self.label = f"{relation}:"
        treatment = (rules or Rules()).of(relation, encoders, keys)
        stay, self.where, self._veil = treatment.withheld, treatment.where, treatment.veil
        self.ruled = bool(stay or treatment.said or treatment.where)
        self.columns = [
            {"name": column.name, "type": type_name(column, type_names), "key": column.name in keys}
            | ({"sanitized": treatment.said[column.name]} if column.name in treatment.said else {})
            for index, column in enumerate(relation.columns)
            if index not in stay
        ]
        self.withheld = frozenset(relation.columns[index].name for index in stay)
        self.version = self._version()
        self.type_names = {it.type_oid: type_names[it.type_oid] for it in relation.columns if it.type_oid in type_names}
        self._made_of = keys, _types(relation, type_names)
        own = [encoders.of(column.type_oid) for column in relation.columns]
        self._identity = [index for index, column in enumerate(relation.columns) if column.name in keys]
        self._columns = [
            (orjson.dumps(column.name), treatment.encoders.get(index, own[index]))
            for index, column in enumerate(relation.columns)
        ]
        self._real = [(label, encode) for (label, _), encode in zip(self._columns, own, strict=True)]
        self._wanted = [index for index in range(len(own)) if index not in stay]
        self.keys = [index for index in self._identity if index not in stay]
        self.labels = [None if index in stay else label for index, (label, _) in enumerate(self._columns)]
        self.encoders = [encode for _, encode in self._columns]
        self.write = writer(self.labels, self.encoders, self.keys)
        self.place = b'"schema":%b,"table":%b' % (orjson.dumps(relation.schema), orjson.dumps(relation.name))
        self.parts = {it: naming.parts(relation, it, self.place, self.version) for it in Operation}
        self._by_lsn = naming.form == "debezium"

    @functools.cached_property
    def lanes(self) -> dict[bytes, tuple[Operation, int, Lane]]:
        """By the `HEAD` of their messages: what the rows did, the table's OID, the lane."""
        oid, width = self.relation.oid, len(self._columns)
        lanes: dict[bytes, tuple[Operation, int, Lane]] = {}
        if self._veil is not None:
            return lanes  # a lane's order is by the key that is in the event
        where = (self.where.positions, self.where.keeps) if self.where else None
        for kind, operation in _LANES.items():
            head = struct.pack(">cIcH", kind, oid, b"N", width)
            parts = self.parts[operation]
            run = lane(
                head,
                self.labels,
                self.encoders,
                self.keys,
                order=self.label,
                parts=parts,
                by_lsn=self._by_lsn,
                where=where,
            )
            lanes[head] = operation, oid, run
        return lanes

    def is_of(self, relation: Relation, keys: frozenset[str], type_names: Mapping[int, str]) -> bool:
        """Whether of these there would be the same version."""
        return relation == self.relation and self._made_of == (keys, _types(relation, type_names))

    def row(self, row: Row, *, unsent: bytes | None = None) -> bytes:
        """The columns of `row` that were sent, as a JSON object; `write` is four times as fast and asks for all.

        `unsent` is what to say of the others, if anything.
        """
        return self._object(row, self._wanted, unsent)

    def key(self, row: Row) -> bytes:
        """The key columns of `row` that leave, as a JSON object; null when there are none."""
        return self._object(row, self.keys) if self.keys else b"null"

    def order(self, row: Row, key: bytes) -> str:
        """What order is kept by, of a row whose `key` is this: the key, or a hash of it where it does not leave."""
        if self._veil is None or not self._identity:
            return f"{self.label}{key.decode()}"
        return f"{self.label}{self._veil(self._object(row, self._identity, columns=self._real)).decode()}"

    def name(self, row: Row, key: bytes, image: bytes, *, keyed: bool) -> bytes:
        """What tells `row` from the others, given its key and image; no two rows have one in common that differ."""
        if self._veil is None:
            return key if keyed else image
        wanted = self._identity if keyed else range(len(self._real))
        return self._veil(self._object(row, wanted, columns=self._real))

    def lacks_key(self, before: Row) -> bool:
        """Whether an old key has no value for a column of the key; PostgreSQL lets none of them be NULL."""
        return any(before[index] is None for index in self._identity)

    def _object(
        self,
        row: Row,
        wanted: Sequence[int],
        unsent: bytes | None = None,
        columns: Sequence[_Encoded] | None = None,
    ) -> bytes:
        parts, columns = [], columns or self._columns
        for index in wanted:
            value, (label, encode) = row[index], columns[index]
            if value is None:
                parts.append(label + b":null")
            elif isinstance(value, bytes):
                parts.append(label + b":" + encode(value))
            elif unsent is not None:
                parts.append(label + b":" + unsent)
        return b"{%b}" % b",".join(parts)

    def settle(self, after: Row, before: Row | None) -> tuple[Row, bytes]:
        """Fill what the server did not send from the old row or key; and the names, as JSON, of what is still missing.

        A value of the old row that is NULL fills nothing: only values too large for NULL are ever left out, so there
        it stands for a column that the old key does not have.
        """
        if before is not None:
            pairs = zip(after, before, strict=True)
            after = [old if new is UNCHANGED and isinstance(old, bytes) else new for new, old in pairs]
        missing = [self.relation.columns[index].name for index in self._wanted if after[index] is UNCHANGED]
        return after, orjson.dumps(missing)

    def describe(self) -> dict[str, Any]:
        """What the version stands for, for JSON."""
        relation = self.relation
        return {
            "schema_version": self.version,
            "schema": relation.schema,
            "table": relation.name,
            "identity": _IDENTITIES[relation.identity],
            "columns": self.columns,
        }

    def _version(self) -> str:
        relation = self.relation
        said = [relation.schema, relation.name, relation.identity, self.columns]
        return hashlib.sha256(orjson.dumps(said, option=orjson.OPT_SORT_KEYS)).hexdigest()[:8]


def type_name(column: Column, names: Mapping[int, str]) -> str:
    """``numeric(12,2)``, ``int4[]``, ``public.mood``: PostgreSQL's internal name of the type, with its modifier.

    By OID alone, never by the catalogue, which may have moved on. ``oid 16999`` where nobody told the name.
    """
    modifier = _modifier(column)
    if info := _built_in.get(column.type_oid):
        return f"{info.name}{modifier}[]" if info.array_oid == column.type_oid else f"{info.name}{modifier}"
    return names.get(column.type_oid, f"oid {column.type_oid}") + modifier


def _types(relation: Relation, names: Mapping[int, str]) -> list[str]:
    return [type_name(column, names) for column in relation.columns]


def _modifier(column: Column) -> str:
    typmod = column.typmod
    if typmod < 0:
        return ""
    info = _built_in.get(column.type_oid)
    match info.name if info else "":
        case "varchar" | "bpchar":
            return f"({typmod - 4})"  # VARHDRSZ is part of it
        case "numeric":
            # 11 bits, signed, since PostgreSQL 15: https://www.postgresql.org/docs/current/datatype-numeric.html
            scale = ((typmod - 4) & 0x7FF ^ 1024) - 1024
            return f"({(typmod - 4) >> 16},{scale})"
        case _:
            return f"({typmod})"
