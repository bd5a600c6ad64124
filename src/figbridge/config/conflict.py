"""The section `conflicts` of a mapping's statement: what the new system expected to find, and who wins otherwise."""

from typing import Final, Literal, Self

from pydantic import Field, model_validator

from figbridge.config.fields import Column, JmesPath, OneOrMore, Section

Owner = Literal["new", "legacy"]
Rule = Literal["new_wins", "legacy_wins", "version_wins", "merge_columns", "delta", "reject"]

# What these do to a column stands on the value that the new system had seen.
NEEDS_BEFORE: Final = frozenset({"merge_columns", "delta"})


class ColumnsSection(Section):
    """Columns that are judged together, and by another rule than the rest of the row."""

    columns: OneOrMore = Field(description="The columns of the group; all of them are written by set.")
    policy: Rule | None = Field(None, description="The group's rule; by default the statement's.")
    sql: str | None = Field(
        None,
        description="In the place of a policy, for one column: an SQL expression of the value to write when both sides "
        "changed it. current is the row that is there, new what the event says, before what the new system had seen; "
        "such as greatest(current.total, new.total).",
    )
    owner: Owner = Field(
        "new", description="legacy: these columns have not moved yet; a write that would change them is a conflict."
    )

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.sql is not None and self.policy is not None:
            raise ValueError("has policy and sql; leave one out")
        if self.sql is not None and len(self.columns) != 1:
            raise ValueError("has sql for several columns; give each column a group of its own")
        if self.owner == "legacy" and (self.policy or self.sql):
            raise ValueError("belongs to the legacy system, so no policy decides; remove policy and sql, or owner")
        return self


class VersionColumnSection(Section):
    """A column of the legacy row that changes with every write of it."""

    column: Column = Field(description="The legacy column that holds the row's version.")
    seen: JmesPath | None = Field(
        None, description="Path of the version that the new system had seen. The row has another one: a conflict."
    )
    new: JmesPath | None = Field(
        None, description="Path of the version that the event gives the row. By version_wins the higher one wins."
    )

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.seen is None and self.new is None:
            raise ValueError("compares nothing; give seen, new or both")
        return self


class KindsSection(Section):
    """Rules for single kinds of conflict, in the place of what the policy means for them."""

    insert_exists: Rule | None = Field(None, description="insert, and the row is there.")
    update_missing: Literal["wait", "new_wins", "legacy_wins", "reject"] = Field(
        "wait", description="update, and the row was never there. wait: the event is parked until it is."
    )
    update_deleted: Literal["wait", "new_wins", "legacy_wins", "reject"] | None = Field(
        None,
        description="update or upsert, and the row is gone again. Told from update_missing by the mapping's version.",
    )
    delete_missing: Literal["record", "ignore"] = Field("record", description="delete, and the row is gone already.")
    stale_version: Literal["record", "ignore"] = Field(
        "record", description="A newer event was applied before. The event is ignored in any case."
    )
    unique_other: Literal["legacy_wins", "reject", "dead_letter"] | None = Field(
        None, description="Another row has a value that must be unique."
    )
    fk_missing: Literal["wait", "legacy_wins", "reject"] = Field(
        "wait", description="The row that is referred to is not there. wait: the event is parked until it is."
    )
    not_owner: Literal["legacy_wins", "reject"] = Field(
        "legacy_wins", description="The event writes what belongs to the legacy system."
    )


class ConflictsSection(Section):
    """How conflicts of one statement are found, and how they are decided."""

    policy: Rule = Field(
        description="new_wins: the event is written. legacy_wins: the row stays. version_wins: the higher version. "
        "merge_columns: each column from who changed it. delta: the row's value + (new - before). reject: nothing is "
        "written, and a person decides (`figbridge conflicts`)."
    )
    before: dict[Column, JmesPath] = Field(
        default_factory=dict,
        description="Column → path of the value that the new system had seen. The row has another one, and the event "
        "would overwrite it: a conflict. A path that leads nowhere is not compared.",
    )
    version: VersionColumnSection | None = Field(
        None, description="A version column of the legacy row; it tells a change that was changed back, too."
    )
    tie: Literal["new_wins", "legacy_wins", "reject"] = Field(
        "reject", description="merge_columns: a column that both sides changed, each to another value."
    )
    groups: tuple[ColumnsSection, ...] = Field((), description="Columns that are judged by another rule than the rest.")
    kinds: KindsSection = Field(
        default_factory=KindsSection, description="Rules for single kinds of conflict; the policy decides the others."
    )

    @property
    def rules(self) -> frozenset[str]:
        """All rules that columns are judged by."""
        return frozenset({self.policy, *(group.policy for group in self.groups if group.policy)})

    def misfits(self, action: str | None, written: frozenset[str]) -> str | None:
        """What of it does not fit a statement that does `action` and writes these columns; None when all does."""
        grouped = [column for group in self.groups for column in group.columns]
        if strange := sorted(set(grouped) - written):
            return f"groups {', '.join(strange)}, which the statement does not write; name columns of set"
        if len(set(grouped)) < len(grouped):
            return "has a column in two groups; each column has one rule"
        if "version_wins" in self.rules | {self.kinds.insert_exists} and not (self.version and self.version.new):
            return "has version_wins and no version to compare; give conflicts.version with column and new"
        if action == "insert" and (self.before or self.rules & NEEDS_BEFORE):
            return "compares with the value before, which an insert has not; use another policy"
        if action == "delete" and not written and self.rules & NEEDS_BEFORE:
            return "merges columns, and a delete has none; use another policy"
        return self._lacks_before(written)

    def _lacks_before(self, written: frozenset[str]) -> str | None:
        deltas = {column for group in self.groups if group.policy == "delta" for column in group.columns}
        if self.policy == "delta":
            deltas |= written - {column for group in self.groups for column in group.columns}
        if lacking := sorted(deltas - self.before.keys()):
            return f"adds what the new system added to {', '.join(lacking)}; name its value under conflicts.before"
        if "merge_columns" in self.rules and not self.before:
            return "merges columns by who changed them; name their values under conflicts.before"
        return None
