"""The transactional outbox: a row that is inserted, or a message that is emitted, *is* an event.

    INSERT INTO shop.outbox (id, aggregate_type, aggregate_id, type, payload) VALUES (…)
    pg_logical_emit_message(true, 'outbox', '{"aggregate_type": …, "aggregate_id": …, "type": …, "payload": …}')

become the same event, as Debezium's outbox event router would route them: detail-type from the type, ordering key from
aggregate type and id, the payload as it was written. docs/outbox.md has the form and how it differs from Debezium's.

INVARIANT. The id is derived from the WAL like every other event's. The application's own id of the row is in the event
too (``outbox_id``), but it may be missing, or be the same twice, and then a sink that drops repeated ids would drop an
event.

What is no event by these rules (no aggregate id, a payload that is not JSON) is a `Rejection` for the dead letters with
all that the row or message holds: it must neither vanish nor stop the changes behind it.

What it does not do: change a payload. Numbers keep their digits, objects the order of their keys.
https://debezium.io/documentation/reference/stable/transformations/outbox-event-router.html
"""

from collections.abc import Callable
from typing import Final, NamedTuple

import orjson
import structlog

from figbridge import members
from figbridge.change import Begin, Change, Operation, Relation, Row
from figbridge.config import OutboxSection, split_table
from figbridge.event import Event, Rejection
from figbridge.forward import place
from figbridge.forward.place import Place
from figbridge.forward.sanitize import Rules
from figbridge.forward.values import Encoder, Encoders, document
from figbridge.members import Member, NotJson, Number

_log = structlog.get_logger()

MALFORMED: Final = "OutboxMalformed"  # the code of such a rejection


class Unroutable(Exception):
    """A message that is no outbox event; its text says why. For a row, `Outbox.event` makes the rejection itself."""


class _Routed(NamedTuple):
    """What row and message have in common. ``outbox_id``, ``payload`` and ``fields`` are JSON."""

    aggregate_type: str
    aggregate_id: str
    type: str
    outbox_id: bytes
    payload: bytes
    fields: bytes


class Outbox:
    """Makes events of one configuration section. One thread, that of the capture loop.

    `encoders` are those of the tables' values: the payload and the further columns look like those of any other event.
    `ignored` is told of each change of the outbox table that is no insert.
    """

    def __init__(
        self,
        section: OutboxSection,
        *,
        database: str,
        encoders: Encoders,
        ignored: Callable[[Operation], None],
        rules: Rules | None = None,
    ) -> None:
        self._section = section
        self._database = database
        self._encoders = encoders
        self._rules = rules or Rules()
        self._ignored = ignored
        self._name = split_table(section.table) if section.table else None
        self._tables: dict[int, _Table] = {}
        self._warned = False
        self.message_prefix = section.message_prefix

    def routes(self, relation: Relation) -> bool:
        """Whether the rows of this table go through `event`. To be asked once for each description of a table."""
        return self._rules.present(relation) == self._name

    def event(self, change: Change, begin: Begin, identity: str) -> Event | Rejection | None:
        """The event of a row of the outbox table; None for anything but an insert.

        `identity` is the id's part before the commit LSN, without a dash at its end.
        """
        if change.operation is not Operation.INSERT or change.after is None:
            self._ignore(change)
            return None
        table = self._tables.get(change.relation.oid)
        if table is None or table.relation is not change.relation:
            table = self._tables[change.relation.oid] = _Table(
                change.relation, self._section, self._encoders, self._rules
            )
        where = place.of_row(begin, identity, change.ordinal)
        origin = b'"schema":%b,"table":%b' % (table.schema, table.name)
        try:
            return self._event(table.read(change.after), where, origin)
        except Unroutable as why:
            whole = b'{"id":"%b","op":"outbox",%b,"row":%b%b' % (
                where.id.encode(),
                origin,
                table.whole(change.after),
                where.tail,
            )
            label = f"{change.relation}"
            event = Event(
                id=where.id, source=label, detail_type="outbox", key=f"outbox:{label}", time=where.time, detail=whole
            )
            return Rejection(event, MALFORMED, str(why), retryable=False)

    def message_event(self, content: str | None, where: Place) -> Event:
        """The event of a message with the outbox's prefix; `content` is None if it is no text. Raises Unroutable."""
        if content is None:
            raise Unroutable("the content is not text in the database's encoding")
        section = self._section
        try:
            found = members.of_object(content)
        except NotJson as error:
            raise Unroutable(f"the content is not JSON as it must be ({error})") from None
        route = (section.aggregate_type, section.aggregate_id, section.event_type)
        aggregate_type, aggregate_id, kind = (_route_text(key, found.get(key)) for key in route)
        if section.payload not in found:
            raise Unroutable(f"it has no {section.payload!r}")
        kept = [(name, found[name]) for name in section.fields if name in found]
        own = found.get(section.id)
        routed = _Routed(
            aggregate_type,
            aggregate_id,
            kind,
            _verbatim(own) if own else b"null",
            _verbatim(found[section.payload]),
            b"{%b}" % b",".join(orjson.dumps(name) + b":" + _verbatim(member) for name, member in kept),
        )
        return self._event(routed, where, b'"schema":null,"table":null')

    def _event(self, routed: _Routed, where: Place, origin: bytes) -> Event:
        words = {"database": self._database, "aggregate_type": routed.aggregate_type, "type": routed.type}
        key = b'{"aggregate_type":%b,"aggregate_id":%b}' % (
            orjson.dumps(routed.aggregate_type),
            orjson.dumps(routed.aggregate_id),
        )
        if self._section.detail == "payload":
            if not routed.payload.startswith(b"{"):
                raise Unroutable("the payload is no JSON object, which a detail must be; set detail: envelope")
            detail = routed.payload
        else:
            detail = b'{"id":"%b","op":"outbox",%b,"key":%b,"outbox_id":%b,"type":%b,"payload":%b,"fields":%b%b' % (
                where.id.encode(),
                origin,
                key,
                routed.outbox_id,
                orjson.dumps(routed.type),
                routed.payload,
                routed.fields,
                where.tail,
            )
        return Event(
            id=where.id,
            source=self._section.source.format(**words),
            detail_type=self._section.detail_type.format(**words),
            key=f"outbox:{key.decode()}",
            time=where.time,
            detail=detail,
        )

    def _ignore(self, change: Change) -> None:
        self._ignored(change.operation)
        if change.operation is Operation.UPDATE and not self._warned:
            self._warned = True
            _log.warning(
                "an outbox row was updated, which is no event",
                table=str(change.relation),
                hint="insert a new row for a new event; said once, figbridge_forward_outbox_ignored_total counts them",
            )


class _Table:
    """One version of the outbox table: where its columns are."""

    def __init__(self, relation: Relation, section: OutboxSection, encoders: Encoders, rules: Rules) -> None:
        self.relation = relation
        self.schema, self.name = orjson.dumps(relation.schema), orjson.dumps(relation.name)
        # order is by the aggregate, never by a key of the table, so no column of it tells rows apart
        treatment = rules.of(relation, encoders, frozenset(), unveiled=True)
        self._columns = [
            (orjson.dumps(column.name) + b":", treatment.encoders.get(index) or encoders.of(column.type_oid))
            for index, column in enumerate(relation.columns)
        ]
        self._withheld = treatment.withheld
        index = {column.name: position for position, column in enumerate(relation.columns)}
        self._route = [
            (column, index.get(column)) for column in (section.aggregate_type, section.aggregate_id, section.event_type)
        ]
        self._payload_name, self._payload = section.payload, index.get(section.payload)
        self._id = index.get(section.id)
        self._fields = [index[name] for name in section.fields if name in index and index[name] not in self._withheld]
        self._expand = section.expand_json

    def read(self, row: Row) -> _Routed:
        """Raises Unroutable."""
        aggregate_type, aggregate_id, kind = (self._text(row, column, position) for column, position in self._route)
        payload = self._sent(row, self._payload_name, self._payload)
        return _Routed(
            aggregate_type,
            aggregate_id,
            kind,
            b"null" if self._id is None or self._id in self._withheld else self._json(row, self._id),
            b"null" if payload is None else self._encoded(payload),
            b"{%b}" % b",".join(self._columns[it][0] + self._json(row, it) for it in self._fields),
        )

    def whole(self, row: Row) -> bytes:
        """All columns of `row` that leave, as a JSON object."""
        wanted = [(it, label) for it, (label, _) in enumerate(self._columns) if it not in self._withheld]
        return b"{%b}" % b",".join(label + self._json(row, it) for it, label in wanted)

    def _text(self, row: Row, column: str, position: int | None) -> str:
        value = self._sent(row, column, position)
        if not value:
            raise Unroutable(f"its {column!r} is {'empty' if value == b'' else 'null'}")
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise Unroutable(f"its {column!r} is not UTF-8") from None

    def _sent(self, row: Row, column: str, position: int | None) -> bytes | None:
        if position is None:
            raise Unroutable(f"the table had no column {column!r} when the row was written; forward.outbox names it")
        value = row[position]
        return value if isinstance(value, bytes) else None

    def _encoded(self, payload: bytes) -> bytes:
        encode: Encoder = self._columns[self._payload or 0][1]
        if encode is document or not self._expand:
            return encode(payload).lstrip()
        try:
            members.check(payload.decode())
        except ValueError as error:  # NotJson, or no UTF-8
            raise Unroutable(f"its {self._payload_name!r} is not JSON ({error})") from None
        return document(payload).strip()

    def _json(self, row: Row, position: int) -> bytes:
        value = row[position]
        return self._columns[position][1](value) if isinstance(value, bytes) else b"null"


def _route_text(key: str, member: Member | None) -> str:
    value = member.value if member else None
    # a number may only be an integer: 1 and 1.0 would be two keys of one aggregate
    if not isinstance(value, str) or not value or (isinstance(value, Number) and not value.lstrip("-").isdecimal()):
        raise Unroutable(f"its {key!r} is missing, or neither a text nor an integer")
    if not value.isprintable() and any("\ud800" <= it <= "\udfff" for it in value):
        raise Unroutable(f"its {key!r} holds half a character, a lone surrogate")
    return str(value)


def _verbatim(member: Member) -> bytes:
    return document(member.text.encode())
