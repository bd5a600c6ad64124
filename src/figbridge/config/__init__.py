"""The configuration: one YAML file, typed sections, every problem reported before anything starts.

``${NAME}`` and ``${NAME:-default}`` are replaced from the environment *after* the file is parsed, in text values
only, so that a password with a colon or a quote cannot change the file's structure. ``$${`` writes a literal ``${``.
No message repeats a value that was not understood: it may be a password (`figbridge.configfile`).

The sections of the two paths are in `forward` and `reverse`, those of the ends in `transports`, the fields' types in
`fields`; everything is imported from here.
A stage receives its own section, never the whole `Config`, and never reads the environment.
"""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from figbridge import configfile
from figbridge.config.fields import Dsn, Section, SlotName, Tables, host_and_port, split_table
from figbridge.config.forward import (
    DeadLettersSection,
    FileDeadLetters,
    ForwardSection,
    OutboxSection,
    TableDeadLetters,
)
from figbridge.config.reverse import MappingSection, MatchSection, ReverseSection
from figbridge.config.transports import (
    AwsSection,
    EventBridgeSinkSection,
    FileSinkSection,
    LocalSinkSection,
    LocalSourceSection,
    SinkSection,
    SourceSection,
    SqsSourceSection,
    StdoutSinkSection,
)
from figbridge.errors import ConfigError, Problem

__all__ = [
    "AwsSection",
    "Config",
    "DeadLettersSection",
    "Direction",
    "EventBridgeSinkSection",
    "FileDeadLetters",
    "FileSinkSection",
    "ForwardSection",
    "HttpSection",
    "LegacySection",
    "LocalSinkSection",
    "LocalSourceSection",
    "MappingSection",
    "MatchSection",
    "OutboxSection",
    "ReverseSection",
    "SinkSection",
    "SourceSection",
    "SqsSourceSection",
    "StdoutSinkSection",
    "TableDeadLetters",
    "split_table",
]

# The two paths, as the file's sections and `run --only` name them.
Direction = Literal["forward", "reverse"]


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

    @model_validator(mode="after")
    def _outbox_is_published(self) -> Self:
        table = self.forward.outbox.table if self.forward and self.forward.outbox else None
        if table and split_table(table) not in {split_table(it) for it in self.legacy.tables}:
            raise ValueError(f"forward.outbox.table, {table}, is none of legacy.tables; add it there, to be published")
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
