"""The section `forward`: what leaves, in what form, and where to."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from figbridge.config.fields import FilePath, Section, not_aws, template
from figbridge.config.transports import SinkSection


class FileDeadLetters(Section):
    """Dead letters as JSON lines in a file."""

    type: Literal["file"]
    path: FilePath = Field(description="The file to append to. Put it on storage that outlives the container.")


class TableDeadLetters(Section):
    """Dead letters in figbridge.dead_letter, in the legacy database."""

    type: Literal["table"]


DeadLettersSection = Annotated[FileDeadLetters | TableDeadLetters, Field(discriminator="type")]


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
