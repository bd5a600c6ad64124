"""A slot in the place of one that is lost, and the order to read every table again: forward.on-slot-loss.

    lock ─▶ look again ─▶ forget the note, order the backfill ─▶ drop what is left of the slot ─▶ make it
                          └────── one transaction ──────┘

INVARIANT. The order is committed before there is a slot that could be read, so whatever is killed when, no slot begins
behind a gap without a backfill that is ordered. A slot that can be read stays where it stands, for what it still holds
need not be lost as well.

Who decides that this is the database it was is the slot's guard (`figbridge.forward.guard`), before.
"""

from typing import Final

import structlog

from figbridge import legacy
from figbridge.change import Lsn
from figbridge.config import Config
from figbridge.errors import SlotGap, SlotInUse
from figbridge.preflight import catalogue, stream
from figbridge.preflight.catalogue import spell
from figbridge.provision import backfill, make, statements

_log = structlog.get_logger()

# a database may be read-only by default, and a synchronous standby that is away must not hold us up
_DURABLE: Final = "SET TRANSACTION READ WRITE; SET LOCAL synchronous_commit = 'local'"


def recreate(config: Config, gap: SlotGap) -> Lsn:
    """Do it; where the slot begins. Waits for transactions that are open, as the server makes no slot before.

    Raises SlotInUse while another replica does the same or reads the slot, LegacyUnavailable or BridgeError.
    """
    section, tables = config.legacy, config.snapshot_tables
    # patience: the server waits for the transactions that are open now, however long they take
    opened = legacy.connect(section.dsn.get_secret_value(), purpose="recreate", autocommit=True, patience=None)
    with legacy.translated(), opened as connection:
        held = connection.execute("SELECT pg_try_advisory_lock(hashtext('figbridge ' || %s))", [section.slot])
        if held.fetchone() != (True,):
            raise SlotInUse(
                f"replication slot {section.slot!r} is made anew by another replica",
                hint="this one waits and takes over when the other is gone",
            )
        slot = catalogue.slot(connection, section.slot)
        if slot and slot.holder:
            raise SlotInUse(f"replication slot {section.slot!r} is in use again, by {slot.holder}")
        _log.error(
            "the slot is lost: changes are in no event; every table is read again",
            slot=section.slot,
            reason=str(gap),
            tables=[spell(*name) for name in tables],
            hint="rows that were deleted meanwhile are told by backfill.finished: docs/slot-loss.md",
        )
        with connection.transaction():
            connection.execute(_DURABLE)
            if config.guards_slot:
                connection.execute(statements.forget_sql(section.slot))
            backfill.order(connection, section.slot, tables, str(gap))
        if slot and not stream.is_lost(slot) and slot.confirmed is not None:
            return slot.confirmed
        if slot:
            connection.execute("SELECT pg_drop_replication_slot(%s)", [section.slot])
        made = make.make_slot(connection, section)
    if made is None:
        raise SlotInUse(f"replication slot {section.slot!r} was made by somebody else meanwhile")
    _log.warning("the slot is made anew", slot=section.slot, begins=str(made))
    return made
