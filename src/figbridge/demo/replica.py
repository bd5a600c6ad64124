"""How to fold events into rows when the bus repeats them and shuffles them. Pure; copy it.

An event bus delivers *at least once* and, unless it says otherwise, *in any order*. Each event of figbridge carries its
position: the LSN of the commit and the ordinal of the row within the transaction. So every column of a row remembers
the position at which it was told, and a later position wins:

    merge(row, change):  column ← change's value   where change.position > row.told[column]
                         row exists                 when some column was told after the last delete

"Take the later" is commutative, associative and idempotent. Therefore any shuffle of the events, with any repetitions,
ends in the same rows; the tests try random ones.

Per column and not per row, for two reasons. An update does not send a large value that it did not touch (the event
lists it in ``unchanged``), so an older event may be the one that knows it. And ownership moves column by column: what
the new system owns already, it leaves out of `merge`, whatever the legacy system still says about it.

Where changes were lost with the slot and the tables are read again, ``backfill.finished`` says ``since`` where: a row
that was told only before that place was deleted meanwhile (`sweep`). It may come early, late or twice, as everything.

Positions compare within one slot. The key of a row must not change (here it never does): a changed key would be a
delete of the old row and an insert of the new one.
"""

import dataclasses
import json
from collections.abc import Collection, Mapping
from decimal import Decimal
from typing import Any, Final, NamedTuple, Self

Value = Any  # what JSON can say, its fractions as Decimal


class Position(NamedTuple):
    """Where a change stands in the history of the legacy database. Compares as a pair."""

    commit_lsn: int
    ordinal: int

    @classmethod
    def parse(cls, text: Mapping[str, Any]) -> Self:
        """From ``{"commit_lsn": "16/B374D848", "ordinal": 2}``; an LSN is two hexadecimal halves of 32 bits."""
        high, low = text["commit_lsn"].split("/")
        return cls(int(high, 16) << 32 | int(low, 16), text["ordinal"])


NEVER: Final = Position(0, -1)


def _read(envelope: bytes) -> dict[str, Any]:
    # Decimal: a float would drop the digits of a large total
    detail: dict[str, Any] = json.loads(envelope, parse_float=Decimal)["detail"]
    return detail


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """One row change that an event told: `columns` holds the values it carried, none for a delete."""

    id: str
    table: str
    key: int
    operation: str
    columns: Mapping[str, Value]
    position: Position

    @classmethod
    def parse(cls, envelope: bytes) -> Self:
        """From an event as the bus delivers it. Raises KeyError or ValueError when it is none of figbridge's."""
        return cls.of(_read(envelope))

    @classmethod
    def unpack(cls, envelope: bytes) -> "list[Self]":
        """`parse` of an event, or of each event of a pack (docs/packing.md)."""
        detail = _read(envelope)
        events = [it["detail"] for it in detail["events"]] if detail["op"] == "pack" else [detail]
        return [cls.of(it) for it in events]

    @classmethod
    def of(cls, detail: Mapping[str, Any]) -> Self:
        """From the detail of an event. Raises as `parse`."""
        if detail["op"] not in {"insert", "update", "delete", "read"}:
            raise ValueError(f"this consumer does not know the operation {detail['op']!r}")
        columns = {} if detail["op"] == "delete" else detail["after"]
        unsent = frozenset(detail["unchanged"])
        return cls(
            id=detail["id"],
            table=detail["table"],
            key=detail["key"]["id"],
            operation=detail["op"],
            columns={name: value for name, value in columns.items() if name not in unsent},
            position=Position.parse(detail["position"]),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """What is known of one row: its values, when each was told, and when the row was last deleted."""

    columns: Mapping[str, Value] = dataclasses.field(default_factory=dict)
    told: Mapping[str, Position] = dataclasses.field(default_factory=dict)
    deleted: Position = NEVER


def sweep(row: Row, since: str) -> Row:
    """`row` after ``backfill.finished`` with that ``since``; one that nobody told stays. Of each row of the table."""
    gone = Change("", "", 0, "delete", {}, Position.parse({"commit_lsn": since, "ordinal": -1}))
    return merge(row, gone) if row.told else row


def merge(row: Row, change: Change, *, inserts_only: Collection[str] = ()) -> Row:
    """`row` and what `change` adds to it.

    Of the columns `inserts_only` the legacy system says the first word and no other.
    A deleted row stays behind as a tombstone without columns, so that an older event cannot bring it back to life.
    """
    deleted = max(row.deleted, change.position) if change.operation == "delete" else row.deleted
    first_word = change.operation in {"insert", "read"}
    news = {
        name: value
        for name, value in change.columns.items()
        if change.position > row.told.get(name, NEVER) and (first_word or name not in inserts_only)
    }
    columns = {**row.columns, **news}
    told = {**row.told, **dict.fromkeys(news, change.position)}
    # a column that nobody told (our own order's) has no position and goes with the row
    alive = {name for name in columns if told.get(name, NEVER) >= deleted}
    return Row(
        columns={name: value for name, value in columns.items() if name in alive},
        told={name: position for name, position in told.items() if name in alive},
        deleted=deleted,
    )
