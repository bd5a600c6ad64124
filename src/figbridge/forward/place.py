"""Where in the WAL an event stands that is not simply a row of a table: its id, its time, its position.

INVARIANT. Nothing here is generated, so what is delivered again carries the same id and the same position:

    a row                         <identity>-<commit LSN>-<ordinal>          as every row of the transaction
    a transactional message       <identity>-<commit LSN>-m<message LSN>     rows keep their ordinals, none begins so
    a non-transactional message   <identity>-<message LSN>-m                 it belongs to no commit

A message's LSN is the end of its own WAL record, so no two messages share it (rows of one COPY do share theirs).
https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html
"""

from datetime import UTC, datetime
from typing import NamedTuple

import orjson

from figbridge.change import NO_CAUSE, Begin, LogicalMessage


class Stamp(NamedTuple):
    """What the events of the rows of one transaction have in common.

    ``identity`` begins their ids, ``position`` and ``tail`` stand before and after the ordinal in their details, and
    ``read`` takes the place of the position for rows that a snapshot has read. Debezium's form counts ordinals from
    ``first``, and has ``sequence`` between two mentions of a row's LSN.
    """

    identity: str
    position: bytes
    tail: bytes
    time: datetime
    sequence: bytes
    read: bytes
    first: int


class Place(NamedTuple):
    """``id``, ``time`` and the end of the detail: ``,"position":{…},"committed_at":…,"hops":…,"cause":…}``."""

    id: str
    time: datetime
    tail: bytes


def of_rows(begin: Begin, identity: str) -> Stamp:
    """As `of_row`, of all of them: their ids and details are put together row by row."""
    lsn, committed_at, xid, cause = begin
    position = b',"position":{"commit_lsn":"%X/%X","ordinal":' % (lsn >> 32, lsn & 0xFFFFFFFF)
    tail = b',"xid":%d},"committed_at":"%b",%b}' % (xid, _utc(committed_at), cause)
    return Stamp(f"{identity}-{lsn:016X}-", position, tail, committed_at, b"", position, 0)


def of_row(begin: Begin, identity: str, ordinal: int) -> Place:
    """The place of a row. `identity` is the id's beginning, with the timeline, without a dash at its end."""
    position = b'{"commit_lsn":"%b","ordinal":%d,"xid":%d}' % (str(begin.commit_lsn).encode(), ordinal, begin.xid)
    name = f"{identity}-{begin.commit_lsn:016X}-{ordinal:08X}"
    return Place(name, begin.committed_at, _tail(position, begin.committed_at, begin.cause))


def of_message(message: LogicalMessage, begin: Begin | None, identity: str, sent_at: datetime) -> Place:
    """The place of a message. `begin` is its transaction's; not asked of a message that is not transactional.

    The server does not say when it wrote a non-transactional message: ``committed_at`` is null then, so that the
    detail is the same each time, and the event's time is `sent_at`, when the walsender sent it.
    """
    lsn = str(message.lsn).encode()
    if begin is None or not message.transactional:
        position = b'{"commit_lsn":null,"ordinal":null,"lsn":"%b","xid":null}' % lsn
        return Place(f"{identity}-{message.lsn:016X}-m", sent_at, _tail(position, None, NO_CAUSE))
    commit = str(begin.commit_lsn).encode()
    position = b'{"commit_lsn":"%b","ordinal":null,"lsn":"%b","xid":%d}' % (commit, lsn, begin.xid)
    name = f"{identity}-{begin.commit_lsn:016X}-m{message.lsn:016X}"
    return Place(name, begin.committed_at, _tail(position, begin.committed_at, begin.cause))


def _tail(position: bytes, committed_at: datetime | None, cause: bytes) -> bytes:
    committed = b"null" if committed_at is None else b'"%b"' % _utc(committed_at)
    return b',"position":%b,"committed_at":%b,%b}' % (position, committed, cause)


def _utc(time: datetime) -> bytes:
    """With microseconds, always: equal lengths sort by time. Faster than `datetime.isoformat`, once a transaction."""
    if time.tzinfo is not UTC:
        time = time.astimezone(UTC)
    said = orjson.dumps(time, option=orjson.OPT_UTC_Z)[1:-1]
    return said if time.microsecond else said.replace(b"Z", b".000000Z")
