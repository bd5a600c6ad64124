"""The configuration: one YAML file, typed sections, every problem reported before anything starts.

``${NAME}`` and ``${NAME:-default}`` are replaced from the environment *after* the file is parsed, in text values
only, so that a password with a colon or a quote cannot change the file's structure. ``$${`` writes a literal ``${``.
No message repeats a value that was not understood: it may be a password (`figbridge.configfile`).

The sections of the two paths are in `forward` and `reverse`, a mapping's in `mapping`, those of the ends in
`transports`, the fields' types in `fields`; everything is imported from here.
A stage receives its own section, never the whole `Config`, and never reads the environment.
"""

import functools
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from figbridge import configfile
from figbridge.config.conflict import ColumnsSection, ConflictsSection, KindsSection, Rule
from figbridge.config.ends import require_apart
from figbridge.config.fields import Dsn, Section, SlotName, Tables, host_and_port, split_table
from figbridge.config.forward import (
    DeadLettersSection,
    FileDeadLetters,
    ForwardSection,
    OutboxSection,
    S3DeadLetters,
    SqsDeadLetters,
    TableDeadLetters,
)
from figbridge.config.mapping import MappingSection, MatchSection, StatementSection, Value
from figbridge.config.plugin import PluginSection
from figbridge.config.relay import RelaySection
from figbridge.config.reverse import BareSection, ReverseSection
from figbridge.config.select import ContractsSection, HashSection, SelectSection
from figbridge.config.transports import (
    AwsSection,
    AwsSinkSection,
    ClaimCheckSection,
    EventBridgeSinkSection,
    EventBridgeV2SinkSection,
    FileSinkSection,
    FirehoseSinkSection,
    JsonSinkSection,
    KinesisSinkSection,
    KinesisSourceSection,
    LocalSinkSection,
    LocalSourceSection,
    ReverseSourceSection,
    SinkSection,
    SnsSinkSection,
    SourceSection,
    SqsSinkSection,
    SqsSourceSection,
    StdoutSinkSection,
)
from figbridge.errors import ConfigError, Problem

__all__ = [
    "AwsSection",
    "AwsSinkSection",
    "BareSection",
    "ClaimCheckSection",
    "ColumnsSection",
    "Config",
    "ConflictsSection",
    "ContractsSection",
    "DeadLettersSection",
    "Direction",
    "EventBridgeSinkSection",
    "EventBridgeV2SinkSection",
    "FileDeadLetters",
    "FileSinkSection",
    "FirehoseSinkSection",
    "ForwardSection",
    "HashSection",
    "HttpSection",
    "JsonSinkSection",
    "KindsSection",
    "KinesisSinkSection",
    "KinesisSourceSection",
    "LegacySection",
    "LocalSinkSection",
    "LocalSourceSection",
    "MappingSection",
    "MatchSection",
    "OutboxSection",
    "PluginSection",
    "RelaySection",
    "ReverseSection",
    "ReverseSourceSection",
    "Rule",
    "S3DeadLetters",
    "Section",
    "SelectSection",
    "SinkSection",
    "SnsSinkSection",
    "SourceSection",
    "SqsDeadLetters",
    "SqsSinkSection",
    "SqsSourceSection",
    "StatementSection",
    "StdoutSinkSection",
    "TableDeadLetters",
    "Value",
    "split_table",
]

# What can run, as the file's sections and `run --only` name it.
Direction = Literal["forward", "reverse", "relay"]


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

    loop_guard: Literal["inbox", "message", "origin"] = Field(
        "inbox",
        alias="loop-guard",
        description="By what the forward path knows a transaction of the reverse path. inbox: a published row. "
        "message: a logical message; nothing of ours is published. origin: a replication origin; one process at a "
        "time, never behind a pooler. See docs/loops.md.",
    )
    reverse_dsn: Dsn | None = Field(
        None,
        alias="reverse-dsn",
        description="Connection string of the reverse path, if it is another: through PgBouncer, for instance, which "
        "the replication connection cannot pass. By default dsn.",
    )

    @property
    def write_dsn(self) -> str:
        """The connection string of the reverse path."""
        return (self.reverse_dsn or self.dsn).get_secret_value()

    @property
    def inbox_publication(self) -> str:
        """The publication of our own tables: inserts only, so that purging the inbox makes no events."""
        return f"{self.publication}_inbox"


class HttpSection(Section):
    """Metrics and probes."""

    listen: Annotated[str, AfterValidator(host_and_port)] = Field(
        "127.0.0.1:9464", description="host:port of /metrics, /livez, /readyz; an IPv6 address in brackets."
    )

    @property
    def address(self) -> tuple[str, int]:
        """(host, port), an IPv6 host without its brackets."""
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)


class Config(Section):
    """The whole file. At least one of `forward`, `reverse` and `relay` is needed; the relay needs no database."""

    database: LegacySection | None = Field(
        None,
        alias="legacy",
        description="The legacy database: dsn, slot, publication, tables. Only a relay can do without.",
    )
    forward: ForwardSection | None = Field(None, description="Legacy changes leave as events: sink and their form.")
    reverse: ReverseSection | None = Field(None, description="Events become legacy rows: source and mappings.")
    relay: RelaySection | None = Field(
        None, description="Events of any service are validated and published anew: source, sink, contracts, quarantine."
    )
    http: HttpSection = Field(default_factory=HttpSection, description="Metrics and probes: listen.")

    @model_validator(mode="after")
    def _some_direction(self) -> Self:
        if self.forward is None and self.reverse is None and self.relay is None:
            raise ValueError(
                "neither forward nor reverse nor relay is there, so there is nothing to run; add at least one"
            )
        return self

    @model_validator(mode="after")
    def _selected_is_published(self) -> Self:
        published = {split_table(it) for it in self.database.tables} if self.database else set()
        for section in self.forward.select if self.forward and self.database else ():
            if split_table(section.table) not in published:
                raise ValueError(f"forward.select names {section.table}, which is none of legacy.tables; mend the name")
            for text, former in zip(section.former_names, section.names[1:], strict=True):
                if former in published:
                    raise ValueError(
                        f"forward.select names {text} as a former name of {section.table}, and it is one of "
                        "legacy.tables; give it an entry of its own"
                    )
        return self

    @property
    def legacy(self) -> LegacySection:
        """The legacy database. Raises ConfigError for a file without one, which only a relay can be."""
        if self.database is None:
            raise ConfigError("this needs a legacy database", [_NO_LEGACY])
        return self.database

    def dsn_for(self, letters: DeadLettersSection | None) -> str:
        """The DSN that a dead-letter store of the section needs; empty where it needs none. Raises ConfigError."""
        return self.legacy.dsn.get_secret_value() if letters and letters.type == "table" else ""

    @model_validator(mode="after")
    def _outbox_is_published(self) -> Self:
        table = self.forward.outbox.table if self.forward and self.forward.outbox else None
        if table and self.database and split_table(table) not in {split_table(it) for it in self.database.tables}:
            raise ValueError(f"forward.outbox.table, {table}, is none of legacy.tables; add it there, to be published")
        return self

    @model_validator(mode="after")
    def _files_are_apart(self) -> Self:
        forward, reverse, relay = self.forward, self.reverse, self.relay
        contracts = forward.contracts if forward else None
        require_apart(
            {
                "forward.sink": forward and forward.sink,
                "forward.contracts.quarantine": contracts and contracts.quarantine,
                "forward.dead-letters": forward and forward.dead_letters,
                "reverse.source": reverse and reverse.source,
                "relay.source": relay and relay.source,
                "relay.sink": relay and relay.sink,
                "relay.quarantine": relay and relay.quarantine,
                "relay.dead-letters": relay and relay.dead_letters,
            }
        )
        return self

    @model_validator(mode="after")
    def _echoes_are_listed(self) -> Self:
        listed = self.forward is not None and self.forward.echo == "touched_rows"
        if listed and self.database and self.database.loop_guard == "origin":
            raise ValueError(
                "forward.echo is touched_rows, and an origin marks a transaction as a whole; "
                "use legacy.loop-guard: inbox or message"
            )
        return self

    @property
    def publishes_inbox(self) -> bool:
        """Whether figbridge.inbox has a publication: it is the mark of our transactions."""
        return self.reverse is not None and self.legacy.loop_guard == "inbox"

    @property
    def guards_slot(self) -> bool:
        """Whether figbridge.slot_guard is used."""
        if self.forward is None or self.forward.slot_guard == "none":
            return False
        return self._has_tables or self.forward.slot_guard == "table"

    @property
    def takes_snapshots(self) -> bool:
        """Whether figbridge.snapshot is used: where there are tables of ours anyway, a command may ask for one."""
        return self.forward is not None and (self._has_tables or self.guards_slot)

    @property
    def recreates_slot(self) -> bool:
        """Whether a slot that is lost is made anew, and every table read again."""
        return self.forward is not None and self.forward.on_slot_loss == "recreate-and-backfill"

    @property
    def snapshot_tables(self) -> list[tuple[str, str]]:
        """The tables whose rows are a state: all but the outbox, whose rows are events that have left."""
        outbox = self.forward.outbox.table if self.forward and self.forward.outbox else None
        tables = [split_table(table) for table in self.legacy.tables]
        return [name for name in tables if outbox is None or name != split_table(outbox)]

    @property
    def _has_tables(self) -> bool:
        if self.forward and (self.forward.snapshot != "never" or self.recreates_slot):
            return True
        letters = self.forward.dead_letters if self.forward else None
        return self.reverse is not None or (letters is not None and letters.type == "table")

    @property
    def keeps_versions(self) -> bool:
        """Whether figbridge.table_version is used."""
        return self.forward is not None and self.forward.schema_events and self.guards_slot

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
        empty = [key for key in ("legacy", "forward", "reverse", "relay") if key in tree and tree[key] is None]
        problems += [Problem(key, "is empty", "give it its keys, or remove the line") for key in empty]
        if "legacy" not in tree and (reason := _wants_legacy(tree)):
            problems.append(replace(_NO_LEGACY, what=f"is missing, and {reason}"))
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


_NO_LEGACY: Final = Problem("legacy", "is missing", "add it: dsn and tables of the legacy database")


def _wants_legacy(tree: Mapping[Any, Any]) -> str:
    """Why a file cannot do without the section; empty if it can."""
    if not tree.get("relay") or tree.get("forward") or tree.get("reverse"):
        return "forward and reverse are about it"
    letters = tree["relay"].get("dead-letters") if isinstance(tree["relay"], dict) else None
    in_table = isinstance(letters, dict) and letters.get("type") == "table"
    return "relay.dead-letters are in a table of it" if in_table else ""


_UNREADABLE: Final = "the configuration cannot be read"


@functools.cache
def _schema() -> dict[str, Any]:
    return Config.model_json_schema(by_alias=True)
