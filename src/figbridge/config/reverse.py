"""The section `reverse`: which events become which rows."""

from typing import Literal, Self

from pydantic import Field, model_validator

from figbridge.config.fields import Column, JmesPath, OneOrMore, Section, TableName
from figbridge.config.transports import SourceSection


class MatchSection(Section):
    """Which events a mapping is for; all that is given must match."""

    source: OneOrMore = Field(description="Event sources, one or a list.")
    detail_type: OneOrMore = Field(alias="detail-type", description="Detail-types, one or a list.")


class MappingSection(Section):
    """One kind of event → one statement on one legacy table."""

    match: MatchSection = Field(description="Which events this mapping is for.")
    into: TableName = Field(description="The legacy table, as schema.table.")
    action: Literal["insert", "update", "upsert", "delete"] = Field(
        description="What is done to the row: insert, update, upsert or delete."
    )
    key: dict[Column, JmesPath] = Field(
        default_factory=dict, description="Column → path of its value, for the row to find. Not for insert."
    )
    set: dict[Column, JmesPath] = Field(
        default_factory=dict, description="Column → path of the value to write. Not for delete."
    )
    idempotency_key: JmesPath | None = Field(
        None, description="Path of the producer's idempotency key. The event's own id by default."
    )

    @model_validator(mode="after")
    def _fits_action(self) -> Self:
        needs_key = self.action in {"update", "upsert", "delete"}
        if needs_key and not self.key:
            raise ValueError(f"action {self.action} needs key; name the columns that find the row")
        if not needs_key and self.key:
            raise ValueError("action insert takes no key; put every column under set")
        if self.action in {"insert", "update"} and not self.set:
            raise ValueError(f"action {self.action} needs set; name the columns to write")
        if self.action == "delete" and self.set:
            raise ValueError("action delete takes no set; key alone says which row goes")
        if both := sorted(self.key.keys() & self.set.keys()):
            raise ValueError(f"columns both in key and in set: {', '.join(both)}")
        return self


class ReverseSection(Section):
    """The reverse path: the new system's events become rows of the legacy tables."""

    source: SourceSection = Field(description="Where events come from.")
    mappings: tuple[MappingSection, ...] = Field(min_length=1, description="What each kind of event does.")
    max_attempts: int = Field(
        5,
        alias="max-attempts",
        ge=1,
        description="Deliveries of an event that waits for another one (its row or its parent is not there yet) "
        "before it becomes a dead letter.",
    )
    statement_timeout: float = Field(
        10.0, alias="statement-timeout", gt=0, le=86400, description="Seconds a legacy statement of ours may take."
    )
    lock_timeout: float = Field(
        2.0, alias="lock-timeout", gt=0, le=86400, description="Seconds we wait for a lock of the legacy application."
    )
