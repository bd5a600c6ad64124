"""Change → Event: the envelope. Each version of a table is compiled once (`table`), and then only bytes are joined.

The detail (https://docs.aws.amazon.com/eventbridge/latest/ref/overiew-event-structure.html calls it so):

    id          see the package docstring
    op          insert, update, delete, truncate; read of a snapshot (`figbridge.forward.snapshot`)
    schema, table
    schema_version  of the table's names, types and key as they were for this row
    key         the row's replica identity key; null for a truncate or a table without one
    before      the old row as far as the server sent it: all of it under REPLICA IDENTITY FULL, the old key when an
                update changed it or for a delete, else null
    after       the new row; null for delete and truncate
    unchanged   columns whose TOASTed value the update did not touch and the server did not send: absent, not null
    position    commit_lsn, ordinal and xid; a consumer of an unordered bus compares (commit_lsn, ordinal)
    committed_at, hops (how many bridges it has passed), cause (what triggered it; null: the legacy system)

The detail of ``schema.changed``: id, op, key (null), then what the version stands for: schema_version, schema, table,
identity and columns (name, type, key); previous (the same of the version before); position and the rest as above. Its
ordinal is that of the change before which it stands.

With ``forward.format: debezium`` the detail is that of `figbridge.forward.debezium` instead.
"""

from datetime import UTC, datetime
from typing import Any, Final

import orjson

from figbridge.change import Begin, Change, Lsn, Operation, Relation, TypeName
from figbridge.event import Event, Rejection
from figbridge.forward import debezium, place
from figbridge.forward.keys import Ask, FullKeys
from figbridge.forward.outbox import Outbox
from figbridge.forward.sanitize import NOT_DECIDED, Rules, Undecided, Where
from figbridge.forward.table import SCHEMA_CHANGED, Naming, Table
from figbridge.forward.unroll import Lane
from figbridge.forward.values import Encoders
from figbridge.forward.versions import History, Version

_DETAIL: Final = b'{"id":"%b%b%b,"before":%b,"after":%b,"unchanged":%b%b%d%b'
_NULL, _NOTHING = b"null", b"[]"
_TRUNCATE: Final = Operation.TRUNCATE
KEY_NOT_SENT: Final = "KeyNotSent"  # the code of such a rejection
_KEY_NOT_SENT: Final = (
    "the old key has NULL in a column of the key, where none can be: the row was in a partition whose REPLICA IDENTITY "
    "has other columns than that of its table. `figbridge check` names it"
)


_NOT_DECIDED: Final = (
    "the row has a large value that this update left alone, so the server did not send it, and forward.select.where "
    "asks for it. Under REPLICA IDENTITY FULL it is sent; or ask for another column"
)


class Shaper:
    """Makes events of one bridge. `begin` for each transaction, then `event` for each of its rows; one thread.

    `primary_keys` is asked for tables with REPLICA IDENTITY FULL (see `keys`). `outbox` makes the events of the outbox
    table.

    With `history` a version of a table that differs from the one before is announced before its first event:
    `announced` then has what goes first, and whoever takes it empties it.

    Most rows need not come here: `lanes` makes their events from the messages, with `stamp` (see `unroll`). A lane is
    open from the first row of a table until the server describes any.
    """

    def __init__(
        self,
        naming: Naming,
        encoders: Encoders,
        primary_keys: Ask,
        *,
        history: History | None = None,
        outbox: Outbox | None = None,
        rules: Rules | None = None,
    ) -> None:
        self._naming = naming
        self._encoders = encoders
        self.history = history
        self._outbox = outbox
        self._rules = rules or Rules()
        self._full_keys = FullKeys(primary_keys, history, self._rules.withholds)
        self._tables: dict[int, Table] = {}
        self._type_names: dict[int, str] = {}
        self._relation: Relation | None = None  # of the last change, and what we know of it
        self.table: Table | None = None  # None: the outbox's
        self._identity = ""
        self._begin = Begin(Lsn(0), datetime.fromtimestamp(0, UTC), 0)
        self._debezium = naming.form == "debezium"
        self._of_rows = debezium.of_rows if self._debezium else place.of_rows
        self.stamp = self._of_rows(self._begin, "")
        self.message = b""  # the XLogData of the change in hand
        self.lanes: dict[bytes, tuple[Operation, int, Lane]] = {}
        self.announced: list[Event] = []

    def begin(self, begin: Begin, identity: str) -> None:
        """Start a transaction; `identity` is the part of the id before the commit LSN, without a dash at its end."""
        self._begin, self._identity = begin, identity
        self.stamp = self._of_rows(begin, identity)

    def rewind(self) -> None:
        """The stream begins anew behind the last commit that was handed over."""
        self.announced = []
        if self.history:
            self.history.forget()
        self.described()

    def described(self) -> None:
        """The server describes a table, perhaps anew: no row passes a lane until it was looked at again."""
        self._relation = None
        self.lanes.clear()

    def type_name(self, told: TypeName) -> None:
        """The server names a type before the first table that uses it."""
        self._type_names[told.oid] = f"{told.schema}.{told.name}"

    def event(self, change: Change) -> Event | Rejection | None:
        """The event of one change of the open transaction; nothing for a row that stays, and for some of the outbox.

        A rejection when it does not say which row changed, or whether it leaves, or is an outbox row that cannot be
        routed.

        Raises LegacyUnavailable when a table is new and the catalogue does not answer.
        """
        if change.relation is not self._relation:
            self._turn_to(change.relation, change.ordinal)
        table = self.table
        if table is None:
            return None if self._outbox is None else self._outbox.event(change, self._begin, self._identity)
        return self._event(table, change) if table.where is None else self._filtered(table, table.where, change)

    def _filtered(self, table: Table, where: Where, change: Change) -> Event | Rejection | None:
        if change.unsent and change.after is not None:  # of the old row, a value is known after all
            change = change._replace(after=table.settle(change.after, change.before)[0])
        try:
            seen = where.change(change)
        except Undecided as why:
            event = self._event(table, why.change)
            event = event if isinstance(event, Event) else event.event
            return Rejection(event, NOT_DECIDED, _NOT_DECIDED, retryable=False)
        return None if seen is None else self._event(table, seen)

    def _event(self, table: Table, change: Change) -> Event | Rejection:
        if self._debezium:
            return self._in_debezium(change, table)
        operation, _, ordinal, before, before_is_key, after, unsent = change
        old, new, unchanged, old_key = _NULL, _NULL, _NOTHING, None
        if before is None and after is not None and not unsent:
            try:
                key, new = table.write(after)
            except UnicodeDecodeError:
                key, new = table.key(after), table.row(after)
        else:
            if after is not None:
                if unsent:
                    after, unchanged = table.settle(after, before)
                key, new = table.key(after), table.row(after)
            else:
                key = _NULL if before is None else table.key(before)
            if before is not None:
                was = table.key(before)
                old = was if before_is_key else table.row(before)
                old_key = table.order(before, was)
        prefix, position, tail, time, _, _, _ = self.stamp
        identity = f"{prefix}{ordinal:08X}"
        source, detail_type, resources, _, head, _, _, _ = table.parts[operation]
        detail = _DETAIL % (identity.encode(), head, key, old, new, unchanged, position, ordinal, tail)
        whole_table = operation is _TRUNCATE
        row = before if after is None else after
        order = f"{table.label}{key.decode()}" if row is None else table.order(row, key)
        if old_key == order:
            old_key = None
        event = Event(identity, source, detail_type, order, time, detail, old_key, whole_table, resources)
        if before_is_key and before is not None and table.lacks_key(before):
            return Rejection(event, KEY_NOT_SENT, _KEY_NOT_SENT, retryable=False)
        return event

    def _in_debezium(self, change: Change, table: Table) -> Event | Rejection:
        *first, event = debezium.events(change, table, self.stamp, self._lsn())
        if change.before_is_key and change.before is not None and table.lacks_key(change.before):
            return Rejection(event, KEY_NOT_SENT, _KEY_NOT_SENT, retryable=False)
        self.announced += first
        return event

    def _lsn(self) -> int:
        """Where the change in hand stands in the WAL; of a snapshot's rows, where they leave."""
        return int.from_bytes(self.message[1:9]) or self._begin.commit_lsn

    def _turn_to(self, relation: Relation, ordinal: int) -> None:
        """Another table than that of the change before, or another version of it, or only another connection's."""
        if self._outbox is not None and self._outbox.routes(relation):
            self.table = None
        else:
            self.table = self._version(relation, ordinal)
            self.lanes |= self.table.lanes
        self._relation = relation

    def _version(self, relation: Relation, ordinal: int) -> Table:
        table = self._tables.get(relation.oid)
        if table is not None and table.relation is relation:
            return table
        keys = self._keys(relation, ordinal)
        if table is None or not table.is_of(relation, keys, self._type_names):
            table = Table(relation, self._naming, self._encoders, keys, self._type_names, rules=self._rules)
            self._tables[relation.oid] = table
        table.relation = relation  # the server may describe the same table again
        self._meet(table, ordinal)
        return table

    def read(self, table: Table) -> list[Event]:
        """A snapshot has read rows of `table`, which leave with the open transaction; what is to go first."""
        self.message = b""
        self._compare(table)
        self._meet(table, 0)
        announced, self.announced = self.announced, []
        return announced

    def _compare(self, read: Table) -> None:
        """The stream tells nothing of a type that was renamed; what has read the catalogue since knows it."""
        oid = read.relation.oid
        table = self._tables.get(oid)
        if table is not None and table.relation == read.relation and table.version != read.version:
            self._type_names |= read.type_names
            del self._tables[oid]  # the next row compiles it anew
            self.described()

    def _meet(self, table: Table, ordinal: int) -> None:
        if self.history:
            version = Version(table.relation.oid, self._begin.commit_lsn, ordinal, table.describe())
            if previous := self.history.meet(version):
                self.announced.append(self._announcement(table, previous, ordinal))

    def _announcement(self, table: Table, previous: dict[str, Any], ordinal: int) -> Event:
        prefix, position, tail, time, *_ = self.stamp
        identity = f"{prefix}{ordinal:08X}-schema"
        named = self._naming.of(table.relation.schema, table.relation.name, SCHEMA_CHANGED)
        if self._debezium:
            database, lsn = self._naming.database, self._lsn()
            detail = debezium.announcement(
                identity, named, database, described=table.describe(), stamp=self.stamp, lsn=lsn
            )
        else:
            # of a column that stays, not even the name leaves, also if it did before
            columns = [it for it in previous.get("columns", ()) if it["name"] not in table.withheld]
            described = orjson.dumps({"previous": {**previous, "columns": columns}, **table.describe()})
            detail = b'{"id":"%b","op":"%b","key":null,%b%b%d%b' % (
                identity.encode(),
                SCHEMA_CHANGED.encode(),
                described[1:-1],
                position,
                ordinal,
                tail,
            )
        label = f"{table.label}null"
        return Event(identity, named.source, named.detail_type, label, time, detail, None, True, named.resources)

    def _keys(self, relation: Relation, ordinal: int) -> frozenset[str]:
        if relation.identity == "f":
            return self._full_keys.of(relation, self._begin.commit_lsn, ordinal)
        return frozenset(column.name for column in relation.columns if column.is_key)
