"""The section `forward`: what leaves, in what form, and where to."""

import difflib
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from figbridge.config.fields import (
    Column,
    FilePath,
    MessagePrefix,
    MessagePrefixes,
    Section,
    TableName,
    not_aws,
    template,
)
from figbridge.config.transports import SinkSection
from figbridge.errors import Problem


class FileDeadLetters(Section):
    """Dead letters as JSON lines in a file."""

    type: Literal["file"]
    path: FilePath = Field(description="The file to append to. Put it on storage that outlives the container.")


class TableDeadLetters(Section):
    """Dead letters in figbridge.dead_letter, in the legacy database."""

    type: Literal["table"]


DeadLettersSection = Annotated[FileDeadLetters | TableDeadLetters, Field(discriminator="type")]


class OutboxSection(Section):
    """Rows of a table, or messages of a prefix, that are events as they stand. Columns are keys of a message, too."""

    table: TableName | None = Field(
        None, description="The outbox table, as schema.table; one of legacy.tables. Each inserted row is an event."
    )
    message_prefix: MessagePrefix | None = Field(
        None,
        alias="message-prefix",
        description="Prefix of logical messages, such as outbox. Each, a JSON object, is an event.",
    )
    id: Column = Field("id", description="Column of the application's own id of the event; it may be missing.")
    aggregate_type: Column = Field(
        "aggregate_type", alias="aggregate-type", description="Column of what the event is about, such as order."
    )
    aggregate_id: Column = Field(
        "aggregate_id",
        alias="aggregate-id",
        description="Column of which one it is. Events of one aggregate leave in commit order.",
    )
    event_type: Column = Field("type", alias="event-type", description="Column of what happened, such as OrderPaid.")
    payload: Column = Field("payload", description="Column of the event's content. json and jsonb are embedded as is.")
    fields: tuple[Column, ...] = Field((), description="Further columns to put into the detail, under fields.")
    expand_json: bool = Field(
        False,
        alias="expand-json",
        description="Embed the JSON that a text column holds as payload, instead of a string of it.",
    )
    detail: Literal["envelope", "payload"] = Field(
        "envelope",
        description="envelope: the payload with id, key, type and position around it. payload: nothing but the "
        "payload; then EventBridge's consumers do not see the event's id, by which they would drop repetitions.",
    )
    source: Annotated[str, AfterValidator(template("database", "aggregate_type", "type")), AfterValidator(not_aws)] = (
        Field("legacy.{database}", description="Template of the event's source: {database}, {aggregate_type}, {type}.")
    )
    detail_type: Annotated[str, AfterValidator(template("database", "aggregate_type", "type"))] = Field(
        "{type}",
        alias="detail-type",
        description="Template of the detail-type: {database}, {aggregate_type}, {type}.",
    )

    @model_validator(mode="after")
    def _some_way(self) -> Self:
        if self.table is None and self.message_prefix is None:
            raise ValueError("neither table nor message-prefix is there; say where outbox events are written")
        if self.detail == "payload" and self.fields:
            raise ValueError("fields are nowhere with detail: payload; remove them, or set detail: envelope")
        return self

    def problems(self, columns: Mapping[str, str]) -> list[Problem]:
        """What is wrong with the table. `columns` is name → type as format_type() prints it, such as ``jsonb``."""
        found = []
        wanted = [
            ("id", self.id),
            ("aggregate-type", self.aggregate_type),
            ("aggregate-id", self.aggregate_id),
            ("event-type", self.event_type),
            ("payload", self.payload),
            *(("fields", column) for column in self.fields),
        ]
        for setting, column in wanted:
            # a table without an id of its own is no problem, unless somebody named the column
            if column in columns or (setting == "id" and "id" not in self.model_fields_set):
                continue
            near = difflib.get_close_matches(column, columns, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"the table has {', '.join(columns) or 'no columns'}"
            found.append(Problem(f"forward.outbox.{setting}", f"{self.table} has no column {column!r}", remedy))
        kind = columns.get(self.payload)
        if self.expand_json and kind in {"bytea", "json", "jsonb"}:
            what = f"{self.table}.{self.payload} is {kind}, and expand-json is for text"
            remedy = "store text or jsonb" if kind == "bytea" else f"remove it: {kind} is embedded anyway"
            found.append(Problem("forward.outbox.expand-json", what, remedy))
        return found


class ForwardSection(Section):
    """The forward path: legacy changes leave as events."""

    sink: SinkSection = Field(description="Where events go.")
    source: Annotated[str, AfterValidator(template("database", "schema", "table")), AfterValidator(not_aws)] = Field(
        "legacy.{database}", description="Template of the event's source: {database}, {schema}, {table}."
    )
    detail_type: Annotated[str, AfterValidator(template("database", "schema", "table", "operation"))] = Field(
        "{table}.{operation}",
        alias="detail-type",
        description="Template of the detail-type: {database}, {schema}, {table}, {operation} "
        "(inserted, updated, deleted, truncated).",
    )
    numbers: Literal["safe", "exact"] = Field(
        "safe",
        description="safe: a number that a double cannot hold to its last digit leaves as a string of its exact "
        "digits. exact: always a JSON number with PostgreSQL's digits (EventBridge refuses integers beyond int64).",
    )
    dead_letters: DeadLettersSection | None = Field(
        None,
        alias="dead-letters",
        description="Where an event goes that the sink will never take. By default nowhere: the bridge stops, "
        "because nothing is skipped.",
    )
    buffer_bytes: int = Field(
        64 * 1024 * 1024, alias="buffer-bytes", ge=1024, description="Most bytes of events waiting for the sink."
    )
    slot_guard: Literal["auto", "table", "none"] = Field(
        "auto",
        alias="slot-guard",
        description="Where the bridge notes how far it may have confirmed the slot, to notice after a restart that the "
        "slot was made anew or advanced by somebody else. table: figbridge.slot_guard. auto: that table, if the bridge "
        "has tables anyway (reverse, or dead letters in a table). none: noticed only while a process runs.",
    )
    messages: tuple[MessagePrefixes, ...] = Field(
        (),
        description="Prefixes of logical messages (pg_logical_emit_message) that leave as events; a trailing * matches "
        "any end. None by default.",
    )
    outbox: OutboxSection | None = Field(
        None, description="Transactional outbox: rows or messages that are events as they stand. See docs/outbox.md."
    )
    heartbeat_seconds: float = Field(
        10.0,
        alias="heartbeat-seconds",
        ge=0,
        le=3600,
        description="Seconds between two heartbeats: a logical message of about 200 bytes in the WAL, whose way "
        "through the bridge is measured. 0: none. See docs/heartbeat.md.",
    )
