"""The demo's consumer: any shuffle of the events, with any repetitions, ends in the same rows."""

import json
import random
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from figbridge.demo.replica import NEVER, Change, Position, Row, merge

OWNED = ("status",)


def change(operation: str, columns: dict[str, Any], lsn: int, ordinal: int = 0) -> Change:
    return Change(f"{lsn}-{ordinal}", "orders", 1, operation, columns, Position(lsn, ordinal))


def fold(changes: Sequence[Change]) -> Row:
    row = Row()
    for each in changes:
        row = merge(row, each, inserts_only=OWNED)
    return row


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Change], dict[str, Any]]:
    """What really happened to one row, in order, and what it is in the end ({}: deleted)."""
    truth: dict[str, Any] = {}
    changes: list[Change] = []
    lsn = 0
    for _ in range(draw(st.integers(1, 12))):
        lsn += draw(st.integers(0, 2)) if changes else 1  # several changes of a row may be in one transaction
        ordinal = len(changes)
        value = st.integers(0, 3)
        if not truth:
            truth = {"note": draw(value), "scan": draw(value), "status": "new"}
            changes.append(change("insert", dict(truth), lsn, ordinal))
        elif draw(st.integers(0, 3)) == 0:
            truth = {}
            changes.append(change("delete", {}, lsn, ordinal))
        else:
            truth = {**truth, "note": draw(value)}
            told: dict[str, Any] = {**truth, "status": draw(st.sampled_from(["new", "stale"]))}
            if draw(st.booleans()):
                truth["scan"] = told["scan"] = draw(value)
            else:
                del told["scan"]  # a large value that the update did not touch is not sent
            changes.append(change("update", told, lsn, ordinal))
    return changes, truth


@given(histories(), st.randoms(use_true_random=False))
def test_any_shuffle_with_repetitions_ends_in_the_truth(
    history: tuple[list[Change], dict[str, Any]], dice: random.Random
) -> None:
    changes, truth = history
    shuffled = changes + dice.choices(changes, k=len(changes))
    dice.shuffle(shuffled)
    assert dict(fold(shuffled).columns) == truth
    assert fold(shuffled) == fold(changes)


def test_a_late_event_does_not_bring_a_deleted_row_back() -> None:
    row = fold([change("insert", {"note": "a"}, 1), change("delete", {}, 3), change("update", {"note": "b"}, 2)])
    assert not row.columns
    assert row.deleted == Position(3, 0)


def test_our_own_column_keeps_our_word() -> None:
    ours = Row({"note": "a", "status": "accepted"}, dict.fromkeys(("note", "status"), Position(1, 0)))
    row = merge(ours, change("update", {"note": "b", "status": "new"}, 2), inserts_only=OWNED)
    assert row.columns == {"note": "b", "status": "accepted"}
    again = merge(row, change("insert", {"note": "a", "status": "new"}, 1), inserts_only=OWNED)
    assert again == row


def test_a_row_that_no_legacy_event_told_of_takes_what_one_says_later() -> None:
    row = merge(Row({"note": "ours", "status": "new"}), change("update", {"note": "theirs"}, 5), inserts_only=OWNED)
    assert row == Row({"note": "theirs", "status": "new"}, {"note": Position(5, 0)}, NEVER)


def test_positions_compare_as_numbers_and_not_as_text() -> None:
    early = Position.parse({"commit_lsn": "9/FF", "ordinal": 9})
    late = Position.parse({"commit_lsn": "10/0", "ordinal": 0})
    assert early < late < Position.parse({"commit_lsn": "10/0", "ordinal": 1})


def envelope(**changes: Any) -> bytes:
    detail = {
        "id": "x-1",
        "op": "update",
        "table": "orders",
        "key": {"id": 7},
        "after": {"id": 7, "total": 12345678901234567.89, "scan": None},
        "unchanged": ["scan"],
        "position": {"commit_lsn": "0/10", "ordinal": 2, "xid": 9},
    }
    text = json.dumps({"source": "legacy.shop", "detail": {**detail, **changes}})
    return text.replace("1.2345678901234568e+16", "12345678901234567.89").encode()


def test_an_event_is_read_with_every_digit_and_without_what_was_not_sent() -> None:
    parsed = Change.parse(envelope())
    assert parsed.columns == {"id": 7, "total": Decimal("12345678901234567.89")}
    assert (parsed.id, parsed.key, parsed.position) == ("x-1", 7, Position(16, 2))


def test_an_operation_that_it_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="truncate"):
        Change.parse(envelope(op="truncate", key=None, after=None))
