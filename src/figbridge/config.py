"""The configuration: one YAML file, typed sections, every problem reported before anything starts.

``${NAME}`` and ``${NAME:-default}`` are replaced from the environment *after* the file is parsed, in text values
only, so that a password with a colon or a quote cannot change the file's structure. ``$${`` writes a literal ``${``.

A stage receives its own section, never the whole `Config`, and never reads the environment.
"""

import difflib
import os
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import jmespath
import jmespath.exceptions
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from figbridge.errors import ConfigError, Problem

_IDENTIFIER = r'(?:"(?:[^"]|"")+"|[A-Za-z_][A-Za-z0-9_$]*)'
_TABLE = re.compile(rf"({_IDENTIFIER})\.({_IDENTIFIER})")


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


def _qualified(text: str) -> str:
    split_table(text)
    return text


def _path(text: str) -> str:
    try:
        jmespath.compile(text)
    except jmespath.exceptions.JMESPathError as error:
        raise ValueError(f"not a JMESPath expression: {error}") from error
    return text


def _strings(value: object) -> object:
    return [value] if isinstance(value, str) else value


TableName = Annotated[str, AfterValidator(_qualified)]
JmesPath = Annotated[str, AfterValidator(_path)]
OneOrMore = Annotated[tuple[str, ...], BeforeValidator(_strings), Field(min_length=1)]
SlotName = Annotated[str, Field(pattern=r"^[a-z0-9_]{1,63}$")]


class LegacySection(Section):
    """The legacy PostgreSQL database: the guest house."""

    dsn: SecretStr = Field(
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
    tables: tuple[TableName, ...] = Field(
        min_length=1, description="The tables to publish, as schema.table. Never all tables of a database."
    )

    @property
    def inbox_publication(self) -> str:
        """The publication of our own tables: inserts only, so that purging the inbox makes no events."""
        return f"{self.publication}_inbox"


class AwsSection(Section):
    """What every AWS transport shares. Credentials come from boto3's usual chain, never from this file."""

    region: str | None = Field(None, description="AWS region; by default what boto3's chain finds.")
    endpoint_url: str | None = Field(None, description="Another endpoint: an emulator or a VPC endpoint.")


class EventBridgeSinkSection(AwsSection):
    """Amazon EventBridge, by PutEvents."""

    type: Literal["eventbridge"]
    bus: str = Field(
        description="Name or ARN of the event bus. Looked up before it is used: an unknown bus loses "
        "events with a success status."
    )


class FileSinkSection(Section):
    """JSON lines, one event a line, made durable with fsync."""

    type: Literal["file"]
    path: Path = Field(description="The file to append to.")


class StdoutSinkSection(Section):
    """JSON lines on standard output, for a first look. Durable only as far as the reader of the pipe is."""

    type: Literal["stdout"]


class LocalSinkSection(Section):
    """The embedded bus: one SQLite file."""

    type: Literal["local"]
    path: Path = Field(description="The bus's file; made when missing.")


SinkSection = Annotated[
    EventBridgeSinkSection | FileSinkSection | StdoutSinkSection | LocalSinkSection, Field(discriminator="type")
]


class FileDeadLetters(Section):
    """Dead letters as JSON lines in a file."""

    type: Literal["file"]
    path: Path = Field(description="The file to append to. Put it on storage that outlives the container.")


class TableDeadLetters(Section):
    """Dead letters in figbridge.dead_letter, in the legacy database."""

    type: Literal["table"]


DeadLettersSection = Annotated[FileDeadLetters | TableDeadLetters, Field(discriminator="type")]


class ForwardSection(Section):
    """The forward path: legacy changes leave as events."""

    sink: SinkSection = Field(description="Where events go.")
    source: str = Field(
        "legacy.{database}", description="Template of the event's source: {database}, {schema}, {table}."
    )
    detail_type: str = Field(
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

    @model_validator(mode="after")
    def _templates(self) -> Self:
        for field, template, names in (
            ("source", self.source, {"database", "schema", "table"}),
            ("detail-type", self.detail_type, {"database", "schema", "table", "operation"}),
        ):
            try:
                filled = template.format(**dict.fromkeys(names, "x"))
            except (KeyError, IndexError, ValueError, AttributeError) as error:
                known = ", ".join(f"{{{name}}}" for name in sorted(names))
                raise ValueError(f"{field}: {template!r} is not a template of {known} ({error})") from error
            if field == "source" and filled.startswith("aws."):
                raise ValueError("source: must not begin with 'aws.': EventBridge keeps that for itself")
        return self


class LocalSourceSection(Section):
    """A subscriber of the embedded bus."""

    type: Literal["local"]
    path: Path = Field(description="The bus's file; made when missing.")
    subscriber: str = Field("figbridge", min_length=1, description="Name under which the bus keeps our position.")
    sources: OneOrMore | None = Field(
        None, description="Only events of these sources; a trailing * matches a prefix. All by default."
    )


class SqsSourceSection(AwsSection):
    """An SQS queue, usually the target of an EventBridge rule."""

    type: Literal["sqs"]
    queue_url: str = Field(description="URL of the queue.")
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

    match: MatchSection
    into: TableName = Field(description="The legacy table, as schema.table.")
    action: Literal["insert", "update", "upsert", "delete"]
    key: dict[str, JmesPath] = Field(
        default_factory=dict, description="Column → path of its value, for the row to find. Not for insert."
    )
    set: dict[str, JmesPath] = Field(
        default_factory=dict, description="Column → path of the value to write. Not for delete."
    )
    idempotency_key: JmesPath | None = Field(
        None, description="Path of the producer's idempotency key. The event's own id by default."
    )

    @model_validator(mode="after")
    def _fits_action(self) -> Self:
        needs_key = self.action in {"update", "upsert", "delete"}
        if needs_key and not self.key:
            raise ValueError(f"action {self.action} needs key: which row is meant")
        if not needs_key and self.key:
            raise ValueError("action insert takes no key; put every column under set")
        if self.action in {"insert", "update"} and not self.set:
            raise ValueError(f"action {self.action} needs set: what to write")
        if self.action == "delete" and self.set:
            raise ValueError("action delete takes no set")
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
        10.0, alias="statement-timeout", gt=0, description="Seconds a legacy statement of ours may take."
    )
    lock_timeout: float = Field(
        2.0, alias="lock-timeout", gt=0, description="Seconds we wait for a lock of the legacy application."
    )


class HttpSection(Section):
    """Metrics and probes."""

    listen: str = Field(
        "127.0.0.1:9464", pattern=r"^.+:\d{1,5}$", description="host:port of /metrics, /livez, /readyz."
    )

    @property
    def address(self) -> tuple[str, int]:
        """(host, port)."""
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)


class Config(Section):
    """The whole file. At least one of `forward` and `reverse` is needed."""

    legacy: LegacySection
    forward: ForwardSection | None = None
    reverse: ReverseSection | None = None
    http: HttpSection = Field(default_factory=HttpSection)

    @model_validator(mode="after")
    def _some_direction(self) -> Self:
        if self.forward is None and self.reverse is None:
            raise ValueError("neither forward nor reverse is configured: there is nothing to run")
        return self

    @classmethod
    def load(cls, path: Path, environment: Mapping[str, str] | None = None) -> Self:
        """Read `path`. Raises ConfigError with every problem of the file, each with its field."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                "the configuration cannot be read",
                [Problem(str(path), str(error), "name the file with -c; deploy/examples/bridge.yaml is a start")],
            ) from error
        return cls.parse(text, os.environ if environment is None else environment, name=str(path))

    @classmethod
    def parse(cls, text: str, environment: Mapping[str, str], *, name: str = "configuration") -> Self:
        """From YAML text. Raises ConfigError."""
        title = f"{name} is not a valid configuration"
        try:
            tree = yaml.load(text, _UniqueKeys)  # noqa: S506 (a subclass of SafeLoader)
        except yaml.YAMLError as error:
            raise ConfigError(title, [Problem("YAML", str(error), "mend the syntax at that line")]) from error
        problems: list[Problem] = []
        tree = _expand(tree, environment, "", problems)
        try:
            config = cls.model_validate(tree)
        except ValidationError as error:
            unset = {problem.where for problem in problems}
            problems += [_problem(detail) for detail in error.errors() if _where(detail) not in unset]
            raise ConfigError(title, problems) from None  # its own text would show the values, and so the secrets
        if problems:
            raise ConfigError(title, problems)
        return config


class _UniqueKeys(yaml.SafeLoader):
    """YAML says that a repeated key is an error; PyYAML lets the last one win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is there twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_VARIABLE = re.compile(r"\$(?:\$(?P<escaped>\{)|\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\})")


def _expand(value: Any, environment: Mapping[str, str], where: str, problems: list[Problem]) -> Any:
    match value:
        case str():

            def replace(match: re.Match[str]) -> str:
                if match["escaped"]:
                    return "${"
                found = environment.get(match["name"], match["default"])
                if not found and match["default"] is None:
                    problems.append(
                        Problem(
                            where,
                            f"the environment variable {match['name']} is not set",
                            f"set it, or write ${{{match['name']}:-default}}",
                        )
                    )
                return found or ""

            return _VARIABLE.sub(replace, value)
        case dict():
            return {
                key: _expand(item, environment, f"{where}.{key}".strip("."), problems) for key, item in value.items()
            }
        case list():
            return [_expand(item, environment, f"{where}.{index}", problems) for index, item in enumerate(value)]
    return value


def _where(detail: ErrorDetails) -> str:
    # pydantic puts the chosen member of a tagged union into the path; the file has no such level
    parts = [str(part) for part in detail["loc"]]
    kept = [
        part
        for index, part in enumerate(parts)
        if not (index and parts[index - 1] in {"sink", "source", "dead-letters"} and part in _TAGS)
    ]
    return ".".join(kept) or "configuration"


_TAGS = {"eventbridge", "file", "stdout", "local", "sqs", "table"}


def _problem(detail: ErrorDetails) -> Problem:
    where, kind = _where(detail), detail["type"]
    what = detail["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        parent, _, key = where.rpartition(".")
        near = difflib.get_close_matches(key, _known_keys(parent), n=1)
        return Problem(where, "unknown key", f"did you mean {near[0]!r}?" if near else "remove it")
    if kind == "missing":
        return Problem(where, "is missing", "add it")
    return Problem(where, what, "see `figbridge schema config`")


def _known_keys(where: str) -> Sequence[str]:
    """All keys of the sections that may stand at `where`, by the published JSON Schema."""
    schema = Config.model_json_schema(by_alias=True)
    places: list[dict[str, Any]] = [schema]
    for part in filter(None, where.split(".")):
        steps = [_resolve(schema, place.get("properties", {}).get(part, place.get("items", {}))) for place in places]
        places = [place for options in steps for place in options]
    return [key for place in places for key in place.get("properties", {})]


def _resolve(schema: dict[str, Any], node: dict[str, Any]) -> list[dict[str, Any]]:
    if "$ref" in node:
        return _resolve(schema, schema["$defs"][node["$ref"].rpartition("/")[2]])
    for union in ("anyOf", "oneOf"):
        if union in node:
            return [found for option in node[union] for found in _resolve(schema, option)]
    return [node]
