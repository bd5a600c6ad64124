"""One delivery on its way through the reverse path, and the words on it: in the log, and in a dead letter."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import structlog

from figbridge.config import own_sql
from figbridge.deadletter import DeadLetter, position_of
from figbridge.event import Named
from figbridge.reverse.express import Parcel
from figbridge.reverse.mapping import Mapping, Work
from figbridge.reverse.message import Enveloping, parse
from figbridge.reverse.outcome import MAPPING_BROKEN, Applied, Outcome, contention
from figbridge.reverse.park import Parked
from figbridge.reverse.statement import Free, Statement
from figbridge.transports import Delivery

_log = structlog.get_logger()

UNMAPPED: Final = Applied(Outcome.IGNORED, "unmapped")
_MOST: Final = 64 * 1024 * 1024  # characters of a transaction's values, unless one event has more
NOBODYS: Final = Applied(Outcome.DEAD_LETTER, "unmapped", "no mapping is for its source and detail-type")


@dataclass(slots=True)
class Item:
    """One delivery on its way: what it is, and what became of it."""

    delivery: Delivery | Parked
    event: Named | None = None
    work: Work | None = None
    applied: Applied | None = None


@dataclass(slots=True)
class Part:
    """What one transaction is for: items and, in the same order, their works.

    first   whether none of them has come before, as far as anybody knows
    parcel  what will be sent, where that could be made beforehand
    behind  the parcel of the next part, once it is known that it will be the next
    """

    items: list[Item]
    works: list[Work]
    first: bool
    parcel: Parcel | None
    behind: Parcel | None = None


def cut(items: Iterable[Item], most: int) -> Iterator[list[Item]]:
    """Those of `items` that have a work, for a transaction each: at most `most`, and no more than one statement takes.

    The events of one statement are one JSON array, and the server drops the connection at a message of 1 GB. An event
    whose own SQL sets something for the transaction, such as a variable that a trigger reads, has it for itself.
    """
    part: list[Item] = []
    size = 0
    for item in items:
        if item.work is None:
            continue
        own = sum([_size(it) for it in item.work.statements])
        alone = not item.work.mapping.plain and _sets(item.work)
        if part and (alone or len(part) == most or size + own > _MOST):
            yield part
            part, size = [], 0
        part.append(item)
        size += own
        if alone:
            yield part
            part, size = [], 0
    if part:
        yield part


def _size(statement: Statement | Free) -> int:
    if isinstance(statement, Statement):
        return len(statement.document)
    return sum([len(it) for it in statement.parameters.values() if it is not None])


def _sets(work: Work) -> bool:
    return any(isinstance(it, Free) and own_sql.sets(it.query) for it in work.statements)


def broken(mapping: Mapping) -> Applied:
    """What becomes of the events of a mapping that does not fit its table."""
    return Applied(Outcome.DEAD_LETTER, MAPPING_BROKEN, mapping.broken or "")


def given_up(applied: Applied) -> Applied:
    """What becomes of an event that would have to wait again when its time is over."""
    why = "tried in vain for too long" if contention(applied.reason) else "waited in vain for an earlier event"
    return Applied(
        Outcome.DEAD_LETTER, applied.reason, f"{applied.message}; {why} (park-timeout)", statement=applied.statement
    )


def letter(item: Item, bare: Enveloping | None) -> DeadLetter:
    """The dead letter of an item; `bare` as for `parse`."""
    applied = item.applied or UNMAPPED
    tables = item.work.mapping.tables if item.work else ()
    return DeadLetter(
        direction="reverse",
        event_id=item.event.id if item.event else None,
        reason=applied.reason,
        message=applied.message,
        attempts=item.delivery.attempts,
        body=item.delivery.body,
        statement=applied.statement,
        table=".".join(tables[0]) if tables else None,
        position=position_of(parse(item.delivery.body, bare).document["detail"]) if item.event else None,
    )


def tell(item: Item, bare: Enveloping | None) -> None:
    """Log what became of an item that was not applied."""
    event_id, applied = item.event.id if item.event else None, item.applied or UNMAPPED
    if applied.outcome is Outcome.DEAD_LETTER:
        _log.error(
            "event went to the dead letters",
            event_id=event_id,
            reason=applied.reason,
            dead_letter_id=letter(item, bare).id,
        )
    elif applied.outcome is not Outcome.RETRY:
        _log.info(
            "event not applied",
            event_id=event_id,
            detail_type=item.event.detail_type if item.event else None,
            outcome=applied.outcome.value,
            reason=applied.reason or None,
            conflicts=[f"{kind}: {decision}" for kind, decision in applied.conflicts] or None,
        )
