"""A mapping of the file: one kind of event → the statements that it becomes, in one transaction."""

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, PlainSerializer, PlainValidator, WithJsonSchema, model_validator

from figbridge.config import own_sql
from figbridge.config.conflict import ConflictsSection, Owner
from figbridge.config.fields import Column, JmesPath, OneOrMore, Section, TableName, check_path

_NAMED: Final = re.compile(r"%\((\w+)\)s")


@dataclass(frozen=True, slots=True)
class Value:
    """What a column or a parameter is given.

    `path` is JMESPath over the event, None for the constant `constant`. `has_default`: an event in which the path leads
    nowhere gets `default`; a null that is there stays null.
    """

    path: str | None
    constant: Any = None
    has_default: bool = False
    default: Any = None


def _value(given: object) -> Value:
    if isinstance(given, Value):
        return given
    if isinstance(given, str):
        return Value(check_path(given))
    if not isinstance(given, dict):
        raise ValueError("is neither a path nor a section; write a JMESPath, {path: …, default: …} or {value: …}")  # noqa: TRY004 (pydantic reads ValueError)
    if unknown := sorted(map(str, given.keys() - {"path", "default", "value"})):
        raise ValueError(f"has the unknown key {', '.join(unknown)}; there are path, default and value")
    if ("path" in given) == ("value" in given) or ("value" in given and "default" in given):
        raise ValueError("wants either path, perhaps with default, or value; leave the other out")
    if not _finite([given.get("value"), given.get("default")]):
        raise ValueError(
            "has a number that JSON has not; give it as a text: 'Infinity', '-Infinity' or 'NaN' in quotes"
        )
    if "value" in given:
        return Value(None, constant=given["value"])
    if not isinstance(given["path"], str):
        raise ValueError("has a path that is not a text; put it in quotes")  # noqa: TRY004 (see above)
    return Value(check_path(given["path"]), has_default="default" in given, default=given.get("default"))


def _finite(value: object) -> bool:
    match value:
        case float():
            return math.isfinite(value)
        case list():
            return all(map(_finite, value))
        case dict():
            return all(map(_finite, value.values()))
    return True


def _written(value: Value) -> Any:
    """As the file would say it."""
    if value.path is None:
        return {"value": value.constant}
    return {"path": value.path, "default": value.default} if value.has_default else value.path


ValueOf = Annotated[
    Value,
    PlainValidator(_value),
    PlainSerializer(_written),
    WithJsonSchema({
        "anyOf": [
            {"type": "string"},
            {"type": "object", "properties": {"path": {"type": "string"}, "default": {}}, "required": ["path"]},
            {"type": "object", "properties": {"value": {}}, "required": ["value"]},
        ]
    }),
]  # fmt: skip


class MatchSection(Section):
    """Which events a mapping is for; all that is given must match."""

    source: OneOrMore = Field(description="Event sources, one or a list.")
    detail_type: OneOrMore = Field(alias="detail-type", description="Detail-types, one or a list.")


class StatementSection(Section):
    """One statement: an action on a table, SQL, or what a Python callable returns."""

    into: TableName | None = Field(None, description="The legacy table, as schema.table.")
    action: Literal["insert", "update", "upsert", "delete"] | None = Field(
        None, description="What is done to the row: insert, update, upsert or delete."
    )
    key: dict[Column, ValueOf] = Field(
        default_factory=dict, description="Column → path of its value, for the row to find. Not for insert."
    )
    set: dict[Column, ValueOf] = Field(
        default_factory=dict,
        description="Column → path of the value to write; {path, default} or {value} where a path is not enough. "
        "A column whose path leads nowhere is left alone. Not for delete.",
    )
    soft: dict[Column, ValueOf] = Field(
        default_factory=dict,
        description="For delete: column → value to write instead of removing the row.",
    )
    sql: str | None = Field(
        None,
        description="SQL in the place of into and action, with parameters %(name)s; a literal percent sign is %%.",
    )
    with_: dict[str, ValueOf] = Field(
        default_factory=dict, alias="with", description="Parameter of sql → path of its value."
    )
    call: str | None = Field(
        None,
        description="In the place of into and action: name of an entry point in the group figbridge.statements, a "
        "function from the event (a dict) to (SQL, parameters) pairs.",
    )
    owner: Owner = Field(
        "new",
        description="Who owns what the statement writes. legacy: it has not moved yet, and a write that would change "
        "it is a conflict (not_owner).",
    )
    conflicts: ConflictsSection | None = Field(
        None,
        description="How a row that is not as the new system believes is found, and who wins. By default nobody looks: "
        "what the event says is written. See docs/conflicts.md.",
    )

    @property
    def rules(self) -> ConflictsSection | None:
        """How its conflicts are decided; None when nobody looks for any."""
        if self.conflicts is None and self.owner == "legacy":
            return ConflictsSection(policy="legacy_wins")
        return self.conflicts

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        self._check()
        return self

    def _check(self) -> None:
        kinds = [name for name in ("into", "sql", "call") if getattr(self, name) is not None]
        if len(kinds) != 1:
            raise ValueError(f"has {' and '.join(kinds) or 'nothing to do'}; give one of into, sql and call")
        if kinds != ["into"] and (self.action or self.key or self.set or self.soft):
            raise ValueError(f"{kinds[0]} takes no action, key, set or soft; remove them")
        if self.with_ and self.sql is None:
            raise ValueError("with belongs to sql; remove it")
        if self.into is None and (self.conflicts or self.owner == "legacy"):
            raise ValueError(f"{kinds[0]} takes no owner or conflicts: only a row that is named can be compared")
        if self.sql is not None:
            named = set(_NAMED.findall(self.sql))
            if named != self.with_.keys():
                odd = ", ".join(sorted(named ^ self.with_.keys()))
                raise ValueError(f"sql and with do not name the same parameters ({odd}); each %(name)s wants its path")
            if wrong := own_sql.refused(self.sql):
                raise ValueError(f"sql {wrong[0]}; write {wrong[1]}")
        if self.into is not None:
            self._fits_action()

    def _fits_action(self) -> None:
        if self.action is None:
            raise ValueError("has no action; say insert, update, upsert or delete")
        needs_key = self.action in {"update", "upsert", "delete"}
        if needs_key and not self.key:
            raise ValueError(f"action {self.action} needs key; name the columns that find the row")
        if not needs_key and self.key:
            raise ValueError("action insert takes no key; put every column under set")
        if self.action in {"insert", "update"} and not self.set:
            raise ValueError(f"action {self.action} needs set; name the columns to write")
        if self.action == "delete" and self.set:
            raise ValueError("action delete takes no set; key alone says which row goes")
        if self.soft and self.action != "delete":
            raise ValueError(f"action {self.action} takes no soft; it is for delete")
        if both := sorted(self.key.keys() & (self.set.keys() | self.soft.keys())):
            raise ValueError(f"columns both in key and in set: {', '.join(both)}")
        if self.conflicts and (misfit := self.conflicts.misfits(self.action, frozenset(self.soft or self.set))):
            raise ValueError(f"conflicts {misfit}")


class MappingSection(StatementSection):
    """One kind of event → one statement, or several in one transaction."""

    match: MatchSection = Field(description="Which events this mapping is for.")
    statements: tuple[StatementSection, ...] = Field(
        (), description="Several statements in the place of one, run in this order in one transaction."
    )
    idempotency_key: JmesPath | None = Field(
        None, description="Path of the producer's idempotency key. The event's own id by default."
    )
    version: JmesPath | None = Field(
        None,
        description="Path of the version of what the event is about: a number that grows, or the position of a "
        "figbridge event (detail.position). An event that is not newer than the last one is ignored.",
    )
    entity: JmesPath | None = Field(
        None,
        description="Path of the identity by which versions are compared and order is kept. By default the key of the "
        "first statement's row.",
    )

    @property
    def parts(self) -> tuple[StatementSection, ...]:
        """The statements, however they were written."""
        return self.statements or (self,)

    def _check(self) -> None:
        if self.statements:
            parts = ("into", "action", "key", "set", "soft", "sql", "with_", "call", "conflicts")
            given = [n for n in parts if getattr(self, n)] + (["owner"] if self.owner == "legacy" else [])
            if given:
                raise ValueError(f"has {given[0].rstrip('_')} beside statements; move it into one of them")
            return
        super()._check()
