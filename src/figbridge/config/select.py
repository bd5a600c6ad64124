"""What of a table leaves, and how: columns that stay, columns that are made unreadable, rows that stay."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Final, Literal, Self

from pydantic import AfterValidator, Field, SecretStr, model_validator

from figbridge import predicate
from figbridge.config.fields import Column, FilePath, Section, TableName, split_table
from figbridge.config.transports import SinkSection

_SHORTEST: Final = 16  # characters; a shorter key would be found by trying


def _predicate(text: str) -> str:
    predicate.compiled(text)
    return text


def _long_enough(key: SecretStr) -> SecretStr:
    if len(key.get_secret_value()) < _SHORTEST:
        raise ValueError(f"is shorter than {_SHORTEST} characters, so it could be found by trying; make it longer")
    return key


Predicate = Annotated[str, AfterValidator(_predicate)]
Length = Annotated[int, Field(ge=0)]
Constant = str | int | float | bool


class HashSection(Section):
    """The key of the keyed hash (HMAC-SHA256). The same value gives the same hash in every table."""

    key: Annotated[SecretStr, AfterValidator(_long_enough)] = Field(
        description="The secret key, from the environment; at least 16 characters."
    )
    id: Annotated[str, Field(min_length=1, max_length=32, pattern=r"^[A-Za-z0-9._-]+$")] = Field(
        "1", description="Which key it is; stands before each hash, so that consumers see when the key was changed."
    )


class ContractsSection(Section):
    """Contracts that the events of the forward path must keep."""

    path: FilePath = Field(description="Directory of the contracts, as `figbridge schema events` writes it.")
    unknown: Literal["publish", "quarantine"] = Field(
        "publish",
        description="What happens to an event for which there is no contract. schema.changed, backfill.started and "
        "backfill.finished leave without one.",
    )
    quarantine: SinkSection | None = Field(
        None, description="Where events go that break theirs, with the reasons; by default to forward.dead-letters."
    )
    quarantine_prefix: Annotated[str, Field(min_length=1)] = Field(
        "invalid.", alias="quarantine-prefix", description="What the source of such an event begins with."
    )


class SelectSection(Section):
    """Of one table: which columns leave, in what form, and which rows."""

    table: TableName = Field(description="The table, as schema.table; one of legacy.tables.")
    former_names: tuple[TableName, ...] = Field(
        (),
        alias="former-names",
        description="Other names under which its rows may still come, as schema.table: from before it was renamed, or "
        "of its partitions. The same rules hold for them. None of them is in legacy.tables.",
    )
    include: tuple[Column, ...] | None = Field(
        None, description="Only these columns leave; a column that is added later stays, too."
    )
    exclude: tuple[Column, ...] = Field((), description="These columns stay.")
    mask: tuple[Column, ...] = Field((), description='These leave as "***".')
    hash: tuple[Column, ...] = Field((), description="These leave as a keyed hash; see forward.hash.")
    truncate: dict[Column, Length] = Field(
        default_factory=dict, description="These leave as their first characters: column: how many."
    )
    replace: dict[Column, Constant] = Field(
        default_factory=dict, description="These leave as a constant: column: which. NULL stays NULL, as everywhere."
    )
    where: Predicate | None = Field(
        None,
        description="Only rows for which this holds leave: JMESPath's comparisons over the columns, as they are before "
        "they are masked. An update that moves a row out leaves as a delete. See docs/sanitize.md.",
    )
    missing_columns: Literal["stop", "ignore"] = Field(
        "stop",
        alias="missing-columns",
        description="What happens when a column that is named here is not in the table (any more): it may have been "
        "renamed, and would leave under its new name. ignore: only once both names are listed.",
    )

    @model_validator(mode="after")
    def _one_fate(self) -> Self:
        if self.include is not None and self.exclude:
            raise ValueError("include and exclude are both there; with include, everything else stays anyway")
        seen: set[str] = set()
        for column, _ in self._named():
            if column in seen:
                raise ValueError(f"the column {column!r} is named twice; say one thing about it")
            seen.add(column)
        if self.include is not None and (lost := [it for it, _ in self._treated() if it not in self.include]):
            raise ValueError(f"the column {lost[0]!r} stays, as it is not in include; add it there, or remove it here")
        return self

    @property
    def names(self) -> list[tuple[str, str]]:
        """(schema, table) of the table, then of its former names."""
        return [split_table(it) for it in (self.table, *self.former_names)]

    @property
    def treatments(self) -> dict[str, str]:
        """Column → mask, hash, truncate or replace."""
        return dict(self._treated())

    def stays(self, column: str) -> bool:
        """Whether the column does not leave at all."""
        return column not in self.include if self.include is not None else column in self.exclude

    def missing(self, columns: Sequence[str]) -> list[str]:
        """The columns that are named here and not among `columns`."""
        named = [column for column, _ in self._named()] + list(self.include or ())
        if self.where is not None:
            named += predicate.compiled(self.where).columns
        return [column for column in dict.fromkeys(named) if column not in columns]

    def _treated(self) -> Iterator[tuple[str, str]]:
        yield from ((column, "mask") for column in self.mask)
        yield from ((column, "hash") for column in self.hash)
        yield from ((column, "truncate") for column in self.truncate)
        yield from ((column, "replace") for column in self.replace)

    def _named(self) -> Iterator[tuple[str, str]]:
        yield from ((column, "exclude") for column in self.exclude)
        yield from self._treated()
