"""The configuration: one YAML file, typed sections, every problem reported before anything starts.

``${NAME}`` and ``${NAME:-default}`` are replaced from the environment *after* the file is parsed, in text values
only, so that a password with a colon or a quote cannot change the file's structure. ``$${`` writes a literal ``${``.
No message repeats a value that was not understood: it may be a password (`figbridge.configfile`).

A stage receives its own section, never the whole `Config`, and never reads the environment.
"""

import functools
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, ClassVar, Final, Literal, Self

import jmespath
import jmespath.exceptions
import psycopg
from psycopg import conninfo
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from figbridge import configfile
from figbridge.errors import ConfigError, Problem

# figbridge.legacy.SCHEMA, which configuration may not import: both stand in one layer
_OUR_SCHEMA: Final = "figbridge"

_IDENTIFIER = r'(?:"(?:[^"]|"")+"|[A-Za-z_][A-Za-z0-9_$]*)'
_TABLE = re.compile(rf"({_IDENTIFIER})\.({_IDENTIFIER})")

# The two paths, as the file's sections and `run --only` name them.
Direction = Literal["forward", "reverse"]


class Section(BaseModel):
    """A part of the file. Unknown keys are errors: a misspelt option must not be a silent default."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


def split_table(text: str) -> tuple[str, str]:
    """The (schema, table) of ``schema.table``, as the catalogue spells them. Raises ValueError.

    SQL's rule holds: what is not in double quotes is folded to lower case.
    """
    match = _TABLE.fullmatch(text)
    if match is None:
        raise ValueError(f'{text!r} is not of the form schema.table (quote odd names: "My Schema"."T")')
    schema, table = (part[1:-1].replace('""', '"') if part.startswith('"') else part.lower() for part in match.groups())
    return schema, table


def _legacy_table(text: str) -> str:
    try:
        schema, _ = split_table(text)
    except ValueError:
        raise ValueError('is not of the form schema.table; quote odd names: "My Schema"."T"') from None
    if schema == _OUR_SCHEMA:
        # published, our own bookkeeping would be events; and the loop guard relies on its being elsewhere
        raise ValueError(f"the schema {_OUR_SCHEMA} is the bridge's own; name tables of the legacy application")
    return text


def _different(tables: tuple[str, ...]) -> tuple[str, ...]:
    first: dict[tuple[str, str], str] = {}
    for table in tables:
        if (earlier := first.setdefault(split_table(table), table)) is not table:
            same = "is there twice" if earlier == table else f"is the same table as {earlier!r}"
            raise ValueError(f"{table!r} {same}; list each table once")
    return tables


def _path(text: str) -> str:
    try:
        jmespath.compile(text)
    except jmespath.exceptions.JMESPathError as error:
        # its second and third line draw an arrow, which a log line tears apart
        reason = str(error).partition("\n")[0].removesuffix(":").removesuffix(", for expression")
        raise ValueError(
            f"not a JMESPath expression ({reason}); a path such as detail.order_id, a constant such as 'paid' "
            "with its single quotes (in YAML: \"'paid'\")"
        ) from error
    return text


def _conninfo(dsn: SecretStr) -> SecretStr:
    # libpq's own words quote the part they could not read, and that is where an unescaped password is
    try:
        known = conninfo.conninfo_to_dict(dsn.get_secret_value())
    except psycopg.ProgrammingError:
        raise ValueError(
            "libpq cannot read it as a connection string; in a URL write special characters of a password as "
            "%XX (@ is %40, / is %2F, % is %25), in the key=value form put the value in single quotes"
        ) from None
    if not known:
        raise ValueError("is empty; such as postgresql://user:password@host:5432/database")
    if "replication" in known:
        raise ValueError("has the parameter replication; remove it, the bridge adds it where it belongs")
    return dsn


def _template(*names: str) -> Callable[[str], str]:
    """A check that a text is a template of exactly these names: no conversions, formats, attributes or indexes."""
    known = ", ".join(f"{{{name}}}" for name in names)

    def check(text: str) -> str:
        try:
            parts = list(Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"is not a template ({error}); write a literal brace twice") from error
        for _, name, form, conversion in parts:
            if name is not None and (name not in names or form or conversion):
                raise ValueError(f"has the placeholder {{{name}}}; there are {known}, without formats or conversions")
        if not text.strip():
            raise ValueError("is empty; EventBridge refuses an event without it")
        return text

    return check


def _source_template(text: str) -> str:
    if text.startswith("aws."):
        raise ValueError("must not begin with 'aws.'; EventBridge keeps that for itself")
    return text


def _slot(text: str) -> str:
    if re.fullmatch(r"[a-z0-9_]{1,63}", text) is None:  # ReplicationSlotValidateName in the server's slot.c
        raise ValueError("is not a slot's name; lower-case letters, digits and _ only, at most 63")
    return text


def _queue_url(text: str) -> str:
    if not text.startswith(("https://", "http://")):
        raise ValueError("is not a URL; give the queue's URL (aws sqs get-queue-url), not its name or ARN")
    return text


def _address(text: str) -> str:
    host, colon, port = text.rpartition(":")
    # without brackets nobody can tell where an IPv6 address ends: ::1:9464 is one, too
    bare = host.removeprefix("[").removesuffix("]")
    if not (colon and bare and port.isascii() and port.isdecimal()) or (":" in bare and host != f"[{bare}]"):
        raise ValueError("is not host:port; such as 127.0.0.1:9464, 0.0.0.0:9464 or [::1]:9464")
    if int(port) > 65535:
        raise ValueError("has no such port; 65535 is the last")
    return text


def _some_path(value: object) -> object:
    if value == "":
        raise ValueError("is empty; write the file's path")  # Path("") is the current directory
    return value


def _unset_if_empty(value: object) -> object:
    return None if value == "" else value  # region: "${AWS_REGION:-}" is how a file says: if there is one


def _strings(value: object) -> object:
    return [value] if isinstance(value, str) else value


TableName = Annotated[str, AfterValidator(_legacy_table)]
Tables = Annotated[tuple[TableName, ...], Field(min_length=1), AfterValidator(_different)]
JmesPath = Annotated[str, AfterValidator(_path)]
OneOrMore = Annotated[
    tuple[str, ...],
    BeforeValidator(_strings),
    Field(min_length=1),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
]
Dsn = Annotated[SecretStr, AfterValidator(_conninfo)]
TextOrUnset = Annotated[str | None, BeforeValidator(_unset_if_empty)]
FilePath = Annotated[Path, BeforeValidator(_some_path)]
Column = Annotated[str, Field(min_length=1)]
SlotName = Annotated[str, AfterValidator(_slot), WithJsonSchema({"type": "string", "pattern": "^[a-z0-9_]{1,63}$"})]


class LegacySection(Section):
    """The legacy PostgreSQL database: the guest house."""

    dsn: Dsn = Field(
        description="Connection string of a role with REPLICATION, SELECT on the tables and, for the reverse path, "
        "the rights its mappings need. Several hosts may be named (libpq's multi-host form)."
    )
    slot: SlotName = Field("figbridge", description="Name of the logical replication slot.")
    publication: str = Field(
        "figbridge",
        min_length=1,
        max_length=50,
        description="Name of the publication. The inbox has one of its own, named <publication>_inbox.",
    )
    tables: Tables = Field(description="The tables to publish, as schema.table. Never all tables of a database.")
    failover: bool = Field(
        True,
        description="Make the slot so that a standby can keep it (PostgreSQL 17+; older servers cannot). It costs "
        "nothing without a standby. See docs/failover.md.",
    )

    @property
    def inbox_publication(self) -> str:
        """The publication of our own tables: inserts only, so that purging the inbox makes no events."""
        return f"{self.publication}_inbox"


class AwsSection(Section):
    """What every AWS transport shares. Credentials come from boto3's usual chain, never from this file."""

    region: TextOrUnset = Field(None, description="AWS region; by default what boto3's chain finds.")
    endpoint_url: TextOrUnset = Field(None, description="Another endpoint: an emulator or a VPC endpoint.")


class EventBridgeSinkSection(AwsSection):
    """Amazon EventBridge, by PutEvents."""

    type: Literal["eventbridge"]
    bus: str = Field(
        min_length=1,
        description="Name or ARN of the event bus. Looked up before it is used: an unknown bus loses "
        "events with a success status.",
    )


class FileSinkSection(Section):
    """JSON lines, one event a line, made durable with fsync."""

    type: Literal["file"]
    path: FilePath = Field(description="The file to append to.")


class StdoutSinkSection(Section):
    """JSON lines on standard output, for a first look. Durable only as far as the reader of the pipe is."""

    type: Literal["stdout"]


class LocalSinkSection(Section):
    """The embedded bus: one SQLite file."""

    type: Literal["local"]
    path: FilePath = Field(description="The bus's file; made when missing.")


SinkSection = Annotated[
    EventBridgeSinkSection | FileSinkSection | StdoutSinkSection | LocalSinkSection, Field(discriminator="type")
]


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
    source: Annotated[
        str, AfterValidator(_template("database", "schema", "table")), AfterValidator(_source_template)
    ] = Field("legacy.{database}", description="Template of the event's source: {database}, {schema}, {table}.")
    detail_type: Annotated[str, AfterValidator(_template("database", "schema", "table", "operation"))] = Field(
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


class LocalSourceSection(Section):
    """A subscriber of the embedded bus."""

    type: Literal["local"]
    path: FilePath = Field(description="The bus's file; made when missing.")
    subscriber: str = Field("figbridge", min_length=1, description="Name under which the bus keeps our position.")
    sources: OneOrMore | None = Field(
        None, description="Only events of these sources; a trailing * matches a prefix. All by default."
    )


class SqsSourceSection(AwsSection):
    """An SQS queue, usually the target of an EventBridge rule."""

    type: Literal["sqs"]
    queue_url: Annotated[str, AfterValidator(_queue_url)] = Field(description="URL of the queue.")
    visibility_timeout: int = Field(
        60, alias="visibility-timeout", ge=5, le=43200, description="Seconds a received message stays hidden."
    )


SourceSection = Annotated[LocalSourceSection | SqsSourceSection, Field(discriminator="type")]


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


class HttpSection(Section):
    """Metrics and probes."""

    listen: Annotated[str, AfterValidator(_address)] = Field(
        "127.0.0.1:9464", description="host:port of /metrics, /livez, /readyz; an IPv6 address in brackets."
    )

    @property
    def address(self) -> tuple[str, int]:
        """(host, port), an IPv6 host without its brackets."""
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)


class Config(Section):
    """The whole file. At least one of `forward` and `reverse` is needed."""

    legacy: LegacySection = Field(description="The legacy database: dsn, slot, publication, tables.")
    forward: ForwardSection | None = Field(None, description="Legacy changes leave as events: sink and their form.")
    reverse: ReverseSection | None = Field(None, description="Events become legacy rows: source and mappings.")
    http: HttpSection = Field(default_factory=HttpSection, description="Metrics and probes: listen.")

    @model_validator(mode="after")
    def _some_direction(self) -> Self:
        if self.forward is None and self.reverse is None:
            raise ValueError("neither forward nor reverse is there, so there is nothing to run; add one or both")
        return self

    @property
    def guards_slot(self) -> bool:
        """Whether figbridge.slot_guard is used."""
        if self.forward is None or self.forward.slot_guard == "none":
            return False
        letters = self.forward.dead_letters
        own_tables = self.reverse is not None or (letters is not None and letters.type == "table")
        return own_tables or self.forward.slot_guard == "table"

    @classmethod
    def load(cls, path: Path, environment: Mapping[str, str] | None = None) -> Self:
        """Read `path`. Raises ConfigError with every problem of the file, each with its field."""
        try:
            text = path.read_text(encoding="utf-8")
        except PermissionError as error:
            remedy = f"let the user that runs the bridge (uid {os.geteuid()}) read it"
            raise ConfigError(_UNREADABLE, [Problem(str(path), "permission denied", remedy)]) from error
        except (OSError, UnicodeDecodeError) as error:
            what = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror or str(error)
            remedy = "name the file with -c; deploy/examples/bridge.yaml is a start"
            raise ConfigError(_UNREADABLE, [Problem(str(path), what, remedy)]) from None
        return cls.parse(text, os.environ if environment is None else environment, name=str(path))

    @classmethod
    def parse(cls, text: str, environment: Mapping[str, str], *, name: str = "configuration") -> Self:
        """From YAML text. Raises ConfigError, and nothing else, whatever the text is."""
        title = f"{name} is not a valid configuration"
        problems: list[Problem] = []
        try:
            tree = configfile.expand(configfile.read(text), environment, problems)
        except configfile.Unreadable as error:
            raise ConfigError(title, [error.problem]) from None
        # a section whose lines are all commented out is null, and null would quietly run the other direction alone
        empty = [key for key in ("forward", "reverse") if key in tree and tree[key] is None]
        problems += [Problem(key, "is empty", "give it its keys, or remove the line") for key in empty]
        try:
            config = cls.model_validate(tree, by_alias=True, by_name=False)
        except ValidationError as error:
            known = {
                problem.where for problem in problems
            }  # a variable that is not set is the cause, not the empty text
            # pydantic counts what is left after it dropped the wrong entries of a list; that is no second problem
            found = [
                configfile.describe(detail, _schema())
                for detail in error.errors()
                if not (detail["type"] == "too_short" and detail["input"])
            ]
            problems += [problem for problem in found if problem.where not in known]
            raise ConfigError(title, problems) from None  # its own text would show the values, and so the secrets
        if problems:
            raise ConfigError(title, problems)
        return config


_UNREADABLE: Final = "the configuration cannot be read"


@functools.cache
def _schema() -> dict[str, Any]:
    return Config.model_json_schema(by_alias=True)
