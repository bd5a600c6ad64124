"""Who wins: from a row as it was found to what is written of an event. Pure.

    row not there   insert it · wait · leave it · let a person decide       update_missing, update_deleted, …
    row there       group by group of columns:                              update_conflict, insert_exists, not_owner
                    as the new system had seen it, or as it says → its columns are written, no conflict
                    otherwise the group's rule, column by column

A conflict is what would overwrite a value that the new system had not seen. A row that changed elsewhere is none, nor
is one that changed to just what the event says, unless both changes are to be added. One group that is rejected rejects
the event: nothing of it is written.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal, NamedTuple

from figbridge.reverse.message import read, write
from figbridge.reverse.outcome import DELETE_MISSING, UPDATE_MISSING
from figbridge.reverse.policy import Expected, Group, Policy, Row
from figbridge.reverse.statement import Action, Shape, Statement

Decision = Literal["new", "legacy", "merged", "delta", "sql", "rejected"]

INSERT_EXISTS: Final = "insert_exists"
UPDATE_CONFLICT: Final = "update_conflict"
UPDATE_DELETED: Final = "update_deleted"
UNIQUE_OTHER: Final = "unique_other"
FK_MISSING: Final = "fk_missing"
NOT_OWNER: Final = "not_owner"

_PLAIN: Final[dict[str, Decision]] = {"new_wins": "new", "legacy_wins": "legacy"}


class Conflict(NamedTuple):
    """One conflict: its kind, who won, and of each column concerned who won it."""

    kind: str
    decision: Decision
    columns: dict[str, Decision]


class Verdict(NamedTuple):
    """`statement` is what is to be run, None for nothing; `waits` that the row is to be waited for."""

    statement: Statement | None
    conflicts: tuple[Conflict, ...] = ()
    waits: bool = False

    @property
    def rejected(self) -> bool:
        """Whether a person has to decide."""
        return any(conflict.decision == "rejected" for conflict in self.conflicts)


def judge(
    statement: Statement, expected: Expected, found: Row | None, key: Sequence[str], *, known: bool, force: bool = False
) -> Verdict:
    """What becomes of `statement`, whose row is `found`, or None when it is not there.

    `key` names the row. `known`: an event of this entity was applied before, and none that deleted it. `force`: a
    person has decided for the event.
    """
    policy = expected.policy
    if force:
        return Verdict(_forced(statement, found, key))
    if policy.owner == "legacy":
        agreed = found is not None and policy.action != "delete" and not found.differing & {*statement.shape.columns}
        return Verdict(None) if agreed else _of(NOT_OWNER, policy.rules.kinds.not_owner)
    if found is None:
        return _absent(statement, policy, known=known)
    if policy.action == "delete":
        return _delete(statement, policy, found, expected)
    return _row(statement, expected, found, key)


def _forced(statement: Statement, found: Row | None, key: Sequence[str]) -> Statement | None:
    shape = statement.shape
    if found is None:
        return None if shape.action in {"delete", "soft"} else _inserted(statement)
    if shape.action == "insert":
        return _updated(statement, key, [column for column in shape.columns if column not in key])
    return statement if shape.action != "upsert" else _updated(statement, key, shape.columns)


def _of(kind: str, rule: str) -> Verdict:
    """Nothing is written."""
    return Verdict(None, (Conflict(kind, "rejected" if rule == "reject" else "legacy", {}),))


def _absent(statement: Statement, policy: Policy, *, known: bool) -> Verdict:
    kinds, action = policy.rules.kinds, policy.action
    if action in {"delete", "soft"}:
        recorded = kinds.delete_missing == "record"
        return _of(DELETE_MISSING, "legacy_wins") if recorded else Verdict(statement)
    if action == "insert" or (action == "upsert" and not known):
        return Verdict(_inserted(statement))
    kind, rule = UPDATE_MISSING, str(kinds.update_missing)
    if known:
        kind, rule = UPDATE_DELETED, kinds.update_deleted or policy.rules.policy
        if rule == "wait" and action == "upsert":
            rule = "new_wins"  # it needs no row to wait for
    if rule == "wait":
        return Verdict(None, waits=True)
    if rule == "new_wins":
        return Verdict(_inserted(statement), (Conflict(kind, "new", {}),))
    return _of(kind, "legacy_wins" if rule == "legacy_wins" else "reject")


def _delete(statement: Statement, policy: Policy, found: Row, expected: Expected) -> Verdict:
    if not _moved(found, expected, expected.columns):
        return Verdict(statement)
    rule = policy.rules.policy
    if rule == "version_wins":
        rule = "new_wins" if found.newer else "legacy_wins"
    if rule == "new_wins":
        return Verdict(statement, (Conflict(UPDATE_CONFLICT, "new", {}),))
    return _of(UPDATE_CONFLICT, "legacy_wins" if rule == "legacy_wins" else "reject")


def _moved(found: Row, expected: Expected, columns: frozenset[str]) -> bool:
    """Whether the legacy side wrote since the new system looked, as far as the event tells."""
    if found.other_version or found.moved & columns & expected.columns:
        return True
    return found.other_version is None and not expected.columns and found.newer is False


def _row(statement: Statement, expected: Expected, found: Row, key: Sequence[str]) -> Verdict:
    policy, shape, inserts = expected.policy, statement.shape, expected.policy.action == "insert"
    if not (inserts or found.moved or policy.shared or _moved(found, expected, expected.columns)):
        return Verdict(statement if shape.action != "upsert" else _updated(statement, key, shape.columns))
    written: dict[str, str | None] = {}  # column → its value by SQL, None for the event's
    conflicts: dict[str, dict[str, Decision]] = {}
    for group in _groups(policy, [column for column in shape.columns if column not in key]):
        differing = [column for column in group.columns if column in found.differing]
        if group.section is not None and group.section.owner == "legacy":
            if differing:
                of_legacy: Decision = "rejected" if policy.rules.kinds.not_owner == "reject" else "legacy"
                conflicts.setdefault(NOT_OWNER, {}).update(dict.fromkeys(differing, of_legacy))
            continue
        about = frozenset(group.columns)
        if group.rest:  # a column that is only compared, and the version, speak for the whole row
            about |= expected.columns.difference(column for it in policy.groups for column in it.columns)
        rule = _rule(policy, group)
        # both added 3: that is 6, although the row is what the event says
        adds = rule in {"delta", "sql"} and not found.changed.isdisjoint(group.columns)
        if not ((differing or adds) and (inserts or _moved(found, expected, about))):
            written |= {} if inserts else dict.fromkeys(group.columns)
            continue
        decided = dict(_decided(group, rule, expected, found))
        written |= {
            column: (found.computed[column] or "null") if by in {"delta", "sql"} else None
            for column, by in decided.items()
            if by in {"new", "delta", "sql"}
        }
        if rule == "merge_columns" and not _contested(differing, expected, found):
            continue
        kind = INSERT_EXISTS if inserts else UPDATE_CONFLICT
        conflicts.setdefault(kind, {}).update(decided)
    found_conflicts = tuple(Conflict(kind, _summary(columns), columns) for kind, columns in conflicts.items())
    if any(conflict.decision == "rejected" for conflict in found_conflicts):
        return Verdict(None, found_conflicts)
    return Verdict(_rewritten(statement, key, written), found_conflicts)


def _groups(policy: Policy, columns: Sequence[str]) -> Iterator[Group]:
    for group in policy.groups:
        present = tuple(column for column in group.columns if column in columns)
        if present or (group.rest and not columns):
            yield group._replace(columns=present)


def _rule(policy: Policy, group: Group) -> str:
    if policy.action == "insert" and policy.rules.kinds.insert_exists:
        return policy.rules.kinds.insert_exists
    return policy.rule_of(group)


def _decided(group: Group, rule: str, expected: Expected, found: Row) -> Iterator[tuple[str, Decision]]:
    """Who wins each column of a group that is in conflict."""
    for column in group.columns:
        match rule:
            case "new_wins" | "legacy_wins":
                yield column, _PLAIN[rule]
            case "version_wins":
                yield column, "new" if found.newer else "legacy"
            case "merge_columns":
                yield column, _merged(column, expected, found)
            case "delta" | "sql":
                lost = rule == "delta" and found.computed[column] is None  # the row has NULL, to which nothing adds
                yield column, "rejected" if lost else "delta" if rule == "delta" else "sql"
            case _:
                yield column, "rejected"


def _contested(differing: Sequence[str], expected: Expected, found: Row) -> bool:
    """Whether the event would overwrite, in one of these columns, what it has not seen."""
    return any(column in found.moved or column not in expected.columns for column in differing)


def _merged(column: str, expected: Expected, found: Row) -> Decision:
    """Whoever changed it, by what the new system had seen; both did: the tie."""
    if column not in found.differing:
        return "new"
    if column in expected.columns:
        if column not in found.moved:
            return "new"
        if column not in found.changed:
            return "legacy"
    return _PLAIN.get(expected.policy.rules.tie, "rejected")


def _summary(columns: dict[str, Decision]) -> Decision:
    decisions = set(columns.values())
    if "rejected" in decisions:
        return "rejected"
    return decisions.pop() if len(decisions) == 1 else "merged"


def _inserted(statement: Statement) -> Statement:
    shape = statement.shape
    return Statement(_shape("insert", shape.table, shape.key, shape.columns), statement.document)


def _updated(statement: Statement, key: Sequence[str], columns: Sequence[str]) -> Statement:
    shape = statement.shape
    action: Action = "soft" if shape.action == "soft" else "update"
    return Statement(_shape(action, shape.table, tuple(key), tuple(columns)), statement.document)


@functools.lru_cache(maxsize=4096)
def _shape(action: Action, table: tuple[str, str], key: tuple[str, ...], columns: tuple[str, ...]) -> Shape:
    return Shape(action, table, key, columns)  # the same one for all events: they are compared by identity first


def _rewritten(statement: Statement, key: Sequence[str], written: dict[str, str | None]) -> Statement | None:
    """An update of the columns that are `written`; None when there is nothing left to write."""
    columns = [column for column in statement.shape.columns if column in written]
    if not columns:
        return None
    computed = {column: text for column, text in written.items() if text is not None}
    updated = _updated(statement, key, columns)
    if not computed:
        return updated
    values: dict[str, Any] = read(statement.document, "the columns")
    for column, text in computed.items():
        values[column] = read(f'{{"value":{text}}}', column)["value"]
    return Statement(updated.shape, write(values, "the columns"))
