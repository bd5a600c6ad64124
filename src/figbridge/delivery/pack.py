"""Several changes in one entry: what AWS charges by the 64 KB need not be paid for each row of 500 bytes.

    transaction  neighbours of one transaction; order holds by the keys of all of them
    key          what one key's changes of a call are, in their order; other keys' changes may lie between them

A pack is an event whose detail is ``{"id", "op": "pack", "count", "detail-types", "events"}``: ``events`` are the
messages that each would have been alone, with their own ids. Its detail-type is `DETAIL_TYPE`; ``detail-types`` has
those of its events, once each, because EventBridge's patterns match on the elements of an array of texts.

INVARIANT. The id of a pack says what is in it: the first change's id, and how many follow that one. The same changes
cut otherwise after a crash have other ids, so no service that drops repeated ids drops a change that it has not seen.

What is too large for a pack, about a whole table, or a change of a key where keys are packed, leaves alone. A change
alone is no pack.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Literal, NamedTuple

import orjson

from figbridge.delivery.order import keys_of
from figbridge.event import Event
from figbridge.transports import Sink

DETAIL_TYPE: Final = "figbridge.pack"
# The one group of all packs of transactions in a sink that is ordered by group: two transactions that share a row would
# be out of order in two of them.
GROUP: Final = "transactions"
_FRAME: Final = 1024  # bytes of a pack beside its events and their detail-types, in any format, or less


class Pack(NamedTuple):
    """What is in an entry, and the keys of all of it."""

    members: Sequence[Event]
    keys: Sequence[str]


Packs = Mapping[str, Pack]  # by the id of the entry


class _Open:
    """A pack that is being filled."""

    __slots__ = ("bodies", "members", "room", "types")

    def __init__(self, room: int) -> None:
        self.room = room
        self.members: list[Event] = []
        self.bodies: list[bytes] = []
        self.types: dict[str, None] = {}

    def takes(self, event: Event, body: bytes) -> bool:
        size = len(body) + 1
        if event.detail_type not in self.types:
            size += len(event.detail_type.encode()) + 3
        if size > self.room:
            return False
        self.room -= size
        self.types[event.detail_type] = None
        self.members.append(event)
        self.bodies.append(body)
        return True


class Packing:
    """For one thread. `most`: bytes of a pack, by the sink's own formula."""

    def __init__(self, by: Literal["transaction", "key"], sink: Sink, most: int) -> None:
        self._by = by
        self._sink = sink
        self._most = most

    def pack(self, events: Sequence[Event]) -> tuple[list[Event], Packs]:
        """`events` in fewer entries, in an order that keeps that of each key; and what is in those that need saying."""
        packs: dict[str, Pack] = {}
        if not events:
            return [], packs
        limits = self._sink.limits
        room = min(self._most, limits.entry_bytes, limits.batch_bytes) - _FRAME
        groups = self._transactions(events, room) if self._by == "transaction" else self._keys(events, room)
        group = GROUP if self._by == "transaction" and limits.ordered else None
        entries: list[Event] = []
        for open_ in groups:
            entries += self._entries(open_, group, packs)
        return entries, packs

    def _transactions(self, events: Sequence[Event], room: int) -> Iterator[_Open]:
        open_, last = _Open(room), None
        for event, body in zip(events, events[0].bodies(events), strict=True):
            # what is before the last dash is the commit, of every change of it: `figbridge.forward.place`
            name = None if event.whole_table else (event.id.rpartition("-")[0], event.source)
            if name is None or name != last or not open_.takes(event, body):
                yield open_
                open_ = _Open(room)
                if not open_.takes(event, body):  # too large, for itself and for any other with it
                    open_.members.append(event)
                    open_.room = -1
            last = name
        yield open_

    @staticmethod
    def _keys(events: Sequence[Event], room: int) -> Iterator[_Open]:
        filling: dict[str, _Open] = {}
        for event, body in zip(events, events[0].bodies(events), strict=True):
            if event.whole_table:
                yield from filling.values()
                filling.clear()
            if event.whole_table or event.old_key is not None:
                for key in keys_of(event):
                    if key in filling:
                        yield filling.pop(key)
                alone = _Open(0)
                alone.members.append(event)
                yield alone
                continue
            open_ = filling.get(event.key)
            if open_ is None or open_.members[0].source != event.source or not open_.takes(event, body):
                if open_:
                    yield open_
                open_ = filling[event.key] = _Open(room)
                if not open_.takes(event, body):
                    open_.members.append(event)
                    yield filling.pop(event.key)
        yield from filling.values()

    def _entries(self, open_: _Open, group: str | None, packs: dict[str, Pack]) -> Iterator[Event]:
        members = open_.members
        if len(members) > 1:
            entry = _packed(open_, group)
            if self._sink.size(entry) <= self._sink.limits.entry_bytes:  # escapes may make it larger than it was
                packs[entry.id] = Pack(members, tuple(dict.fromkeys(key for it in members for key in keys_of(it))))
                yield entry
                return
        for member in members:
            if group is None:
                yield member
            else:
                packs[member.id] = Pack((member,), keys_of(member))
                yield member._replace(key=group)


def _packed(open_: _Open, group: str | None) -> Event:
    first, last, count = open_.members[0], open_.members[-1], len(open_.members)
    identity = f"{first.id}+{count - 1}"
    detail = b'{"id":%b,"op":"pack","count":%d,"detail-types":%b,"events":[%b]}' % (
        orjson.dumps(identity),
        count,
        orjson.dumps(list(open_.types)),
        b",".join(open_.bodies),
    )
    resources = tuple(dict.fromkeys(name for it in open_.members for name in it.resources))
    return first._replace(
        id=identity,
        detail_type=DETAIL_TYPE,
        key=group or first.key,
        time=last.time,
        detail=detail,
        old_key=None,
        resources=resources,
    )
