"""The section `forward`: what leaves, in what form, and where to."""

import difflib
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from figbridge.config.fields import (
    Column,
    Dsn,
    FilePath,
    MessagePrefix,
    MessagePrefixes,
    Section,
    TableName,
    TextOrUnset,
    not_aws,
    split_table,
    template,
    url_of_queue,
)
from figbridge.config.select import ContractsSection, HashSection, SelectSection
from figbridge.config.transports import AwsSection, ClaimCheckSection, SinkSection
from figbridge.errors import Problem


class FileDeadLetters(Section):
    """Dead letters as JSON lines in a file."""

    type: Literal["file"]
    path: FilePath = Field(description="The file to append to. Put it on storage that outlives the container.")


class TableDeadLetters(Section):
    """Dead letters in figbridge.dead_letter, in the legacy database."""

    type: Literal["table"]


class S3DeadLetters(AwsSection):
    """Dead letters as objects in S3, one each, under names in the order of time."""

    type: Literal["s3"]
    bucket: str = Field(min_length=3, description="Name of the bucket.")
    prefix: str = Field(
        "figbridge/dead-letters/",
        description="What the objects' names begin with; the event's time, its position and the letter's id follow.",
    )


class SqsDeadLetters(AwsSection):
    """Dead letters as messages of an SQS queue, which keeps them for 14 days at most."""

    type: Literal["sqs"]
    queue_url: Annotated[str, AfterValidator(url_of_queue)] = Field(
        description="URL of the queue, one of its own. Standard is enough: letters of a queue have no order."
    )
    bucket: TextOrUnset = Field(
        None,
        description="S3 bucket for the bodies of letters that are larger than a message (1 MiB). Without it the bridge "
        "stops at such a letter, because nothing is skipped.",
    )
    prefix: str = Field("figbridge/dead-letters/", description="What the names of those objects begin with.")


DeadLettersSection = Annotated[
    FileDeadLetters | TableDeadLetters | S3DeadLetters | SqsDeadLetters, Field(discriminator="type")
]


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
    format: Literal["native", "cloudevents", "debezium"] = Field(
        "native",
        description="native: EventBridge's envelope around our detail. cloudevents: CloudEvents 1.0, structured JSON. "
        "debezium: the value of a Debezium change event, without schemas. See docs/formats.md.",
    )
    resources: tuple[Annotated[str, AfterValidator(template("database", "schema", "table", "operation"))], ...] = Field(
        (),
        description="Templates of EventBridge's resources, such as the database's ARN; placeholders as in detail-type.",
    )
    pack: Literal["none", "transaction", "key"] = Field(
        "none",
        description="Several changes in one entry, because AWS charges by the 64 KB: of one transaction, or of one "
        "row. Consumers unpack them. See docs/packing.md.",
    )
    pack_bytes: int = Field(
        65_536,
        alias="pack-bytes",
        ge=2048,
        le=1_048_576,
        description="Most bytes of a pack. 65536 is a chunk of EventBridge, SQS and SNS; 25600 a payload unit of "
        "Kinesis.",
    )
    select: tuple[SelectSection, ...] = Field(
        (),
        description="What of a table leaves, and how: columns that stay or are masked, rows that stay. By default all "
        "of it. See docs/sanitize.md.",
    )
    hash: HashSection | None = Field(None, description="The key of the keyed hash, for select.")
    contracts: ContractsSection | None = Field(
        None, description="Contracts that events must keep before they leave. See docs/contracts.md."
    )
    numbers: Literal["safe", "exact"] = Field(
        "safe",
        description="safe: a number that a double cannot hold to its last digit leaves as a string of its exact "
        "digits. exact: always a JSON number with PostgreSQL's digits (EventBridge refuses integers beyond int64).",
    )
    dead_letters: DeadLettersSection | None = Field(
        None,
        alias="dead-letters",
        description="Where an event goes that the sink will never take: a table, a file, S3 or SQS. By default "
        "nowhere: the bridge stops, because nothing is skipped. See docs/dead-letters.md.",
    )
    claim_check: ClaimCheckSection | None = Field(
        None,
        alias="claim-check",
        description="S3 bucket for events that are too large for the sink; an event that says where is sent instead. "
        "By default they go to the dead letters.",
    )
    buffer_bytes: int = Field(
        48 * 1024 * 1024, alias="buffer-bytes", ge=1024, description="Most bytes of events waiting for the sink."
    )
    slot_guard: Literal["auto", "table", "none"] = Field(
        "auto",
        alias="slot-guard",
        description="Where the bridge notes how far it may have confirmed the slot, to notice after a restart that the "
        "slot was made anew or advanced by somebody else, or that a table was out of its publication for a while. "
        "table: figbridge.slot_guard. auto: that table, if the bridge has tables anyway (reverse, a snapshot, "
        "on-slot-loss, or dead letters in a table). none: noticed only while a process runs.",
    )
    on_slot_loss: Literal["halt", "recreate-and-backfill"] = Field(
        "halt",
        alias="on-slot-loss",
        description="What to do when the slot is missing, invalidated or was moved by somebody else, so that changes "
        "are in no event. halt: stop and say the remedy. recreate-and-backfill: make it anew and read every table "
        "again; an event backfill.finished then tells consumers what was deleted meanwhile. Another database always "
        "stops the bridge. See docs/slot-loss.md.",
    )
    messages: tuple[MessagePrefixes, ...] = Field(
        (),
        description="Prefixes of logical messages (pg_logical_emit_message) that leave as events; a trailing * matches "
        "any end. None by default.",
    )
    outbox: OutboxSection | None = Field(
        None, description="Transactional outbox: rows or messages that are events as they stand. See docs/outbox.md."
    )
    echo: Literal["transaction", "touched_rows"] = Field(
        "transaction",
        description="What does not leave of a transaction that the reverse path wrote. transaction: all of it. "
        "touched_rows: only the rows it asked for; what triggers of the legacy system did in it leaves, with the "
        "idempotency key as cause. See docs/loops.md.",
    )
    ping_pong_limit: int = Field(
        20,
        alias="ping-pong-limit",
        ge=0,
        le=100_000,
        description="How often a row may go to and fro between both systems within ping-pong-seconds, each answering "
        "the other; then the legacy system's event is held as a dead letter (ping_pong). 0: as often as it likes.",
    )
    ping_pong_seconds: float = Field(
        60.0, alias="ping-pong-seconds", gt=0, le=86400, description="Seconds for ping-pong-limit, by commit times."
    )
    schema_events: bool = Field(
        True,
        alias="schema-events",
        description="When a column, a type or the key of a table has changed, say so by an event schema.changed before "
        "the first row. What changes while no bridge runs is noticed where slot-guard has its table.",
    )
    snapshot: Literal["never", "initial", "when-needed"] = Field(
        "never",
        description="Send the rows that are there already, as events with op read, while the stream flows. initial: "
        "each table of the file once. when-needed: again after `figbridge init` has made the slot anew. never: only "
        "what `figbridge snapshot` asks for, so that an update of the bridge sends nobody a million rows. "
        "See docs/snapshot.md.",
    )
    snapshot_parallel: int = Field(
        1, alias="snapshot-parallel", ge=1, le=8, description="Tables that are read at the same time."
    )
    snapshot_rows_per_second: float = Field(
        0.0,
        alias="snapshot-rows-per-second",
        ge=0,
        description="Most rows a second that a snapshot reads of a table. 0: as many as stream and sink take.",
    )
    snapshot_standby: Dsn | None = Field(
        None,
        alias="snapshot-standby",
        description="DSN of a physical standby from which the rows of snapshots are read; the primary is then asked "
        "for watermarks alone. By default they are read from legacy.dsn.",
    )
    snapshot_standby_lag: float = Field(
        10.0,
        alias="snapshot-standby-lag",
        ge=0,
        description="Seconds that a standby may be behind; while one is further behind, no chunk is read. 0: never "
        "mind. The role needs pg_monitor to see it.",
    )
    heartbeat_seconds: float = Field(
        10.0,
        alias="heartbeat-seconds",
        ge=0,
        le=3600,
        description="Seconds between two heartbeats: a logical message, 160 bytes of WAL, whose way "
        "through the bridge is measured. 0: none. See docs/heartbeat.md.",
    )

    @model_validator(mode="after")
    def _one_by_one(self) -> Self:
        if self.format == "debezium" and self.pack != "none":
            raise ValueError("a consumer of format: debezium reads one change a message; set pack: none")
        return self

    @model_validator(mode="after")
    def _contracts_are_native(self) -> Self:
        if self.format == "debezium" and self.contracts is not None:
            raise ValueError("contracts are of the native form, and format is debezium; remove one of both")
        return self

    @model_validator(mode="after")
    def _selects(self) -> Self:
        seen: set[tuple[str, str]] = set()
        for section in self.select:
            name, *former = section.names
            if name in seen:
                raise ValueError(f"select has two entries for {section.table}; make them one")
            for text, other in zip(section.former_names, former, strict=True):
                if other in {*seen, name}:
                    raise ValueError(f"select names {text} twice; a table has one entry, and a name one table")
                seen.add(other)
            seen.add(name)
            if section.hash and self.hash is None:
                raise ValueError(
                    f"select hashes columns of {section.table}, and hash has no key; add hash: {{key: ...}}"
                )
            if self.outbox and self.outbox.table and split_table(self.outbox.table) == name:
                self._check_outbox(section, self.outbox)
        return self

    @staticmethod
    def _check_outbox(section: SelectSection, outbox: OutboxSection) -> None:
        needed = (outbox.aggregate_type, outbox.aggregate_id, outbox.event_type, outbox.payload)
        for column in needed:
            if column in section.treatments or section.stays(column):
                raise ValueError(
                    f"select changes the column {column!r} of the outbox, which makes the event; let the application "
                    "write there what may leave"
                )
        if section.where is not None:
            raise ValueError("select keeps back rows of the outbox, each of which is an event; do not insert them")
