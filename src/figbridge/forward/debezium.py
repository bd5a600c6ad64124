"""Details in the envelope of Debezium's PostgreSQL connector, for consumers that were written for it.

    figbridge    id, schema_version and key: what Debezium has in Kafka's headers and key, or not at all
    op           c, u, d, t (truncate), r (a snapshot's row), m (a logical message)
    before, after
    source       version, connector, name, db, schema, table, snapshot, lsn, sequence, ts_ms, ts_us, ts_ns, txId, xmin
    ts_ms, ts_us, ts_ns
    transaction  id (``txId:lsn`` of the commit), total_order (of the row in its transaction, from 1)
    hops, cause  as in the native detail: what made the change, if it was not the legacy system

It is what Debezium writes with ``schemas.enable=false``: https://debezium.io/documentation/reference/stable/connectors/postgresql.html
docs/formats.md says where a value looks different.

INVARIANT. ``source.lsn`` is the row's own position in the WAL, as Debezium's: of one row it grows from change to
change, so a consumer that drops what is not newer drops repetitions only.

As Debezium does: a change of a row's key leaves as a delete of the old key and a create of the new one; a TOASTed value
that the server did not send is `UNAVAILABLE`.
"""

import base64
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from typing import Any, Final

import orjson

from figbridge.change import Begin, Change, LogicalMessage, Operation
from figbridge.event import Event
from figbridge.forward.form import Named, Parts
from figbridge.forward.place import Place, Stamp

UNAVAILABLE: Final = b'"__debezium_unavailable_value"'
DELETED: Final = "-d"  # ends the id of the delete that a change of the key begins with

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_OPS: Final = {
    Operation.INSERT: b"c",
    Operation.UPDATE: b"u",
    Operation.DELETE: b"d",
    Operation.TRUNCATE: b"t",
    Operation.READ: b"r",
}
_START: Final = b'{"figbridge":{"id":"'
_AFTER: Final = b',"after":'
_NULL: Final = b"null"
_SOURCE: Final = (
    b'"source":{"version":%b,"connector":"postgresql","name":%b,"db":%b,"schema":%b,"table":%b,"snapshot":%b,"lsn":'
)
_VERSION: Final = orjson.dumps(version("figbridge"))


def parts(named: Named, operation: Operation, database: str, relation: tuple[str, str], version: str) -> Parts:
    """Of a table; `relation` is (schema, table), `version` its schema version."""
    between = b'","schema_version":"%b","key":' % version.encode()
    before = b'},"op":"%b","before":' % _OPS[operation]
    snapshot = b'"incremental"' if operation is Operation.READ else b'"false"'
    return Parts(*named, _START, between, before, _AFTER, b"," + _source(named, database, relation, snapshot))


def _source(named: Named, database: str, relation: tuple[str, str], snapshot: bytes = b'"false"') -> bytes:
    schema, table = relation
    words = (named.source, database, schema, table)
    return _SOURCE % (_VERSION, *map(orjson.dumps, words), snapshot)


def of_rows(begin: Begin, identity: str) -> Stamp:
    """As `figbridge.forward.place.of_rows`."""
    lsn, committed_at, xid, cause = begin
    times = _times(committed_at)
    sequence = b',"sequence":"[\\"%d\\",\\"' % lsn
    position = b'\\"]",%b,"txId":%d,"xmin":null},%b,"transaction":{"id":"%d:%d","total_order":' % (
        times, xid, times, xid, lsn,
    )  # fmt: skip
    read = b"%d%b%d%b" % (lsn, sequence, lsn, position)
    tail = b',"data_collection_order":null},%b}' % cause
    return Stamp(f"{identity}-{lsn:016X}-", position, tail, committed_at, sequence, read, 1)


def _times(time: datetime) -> bytes:
    micros = (time - _EPOCH) // _MICROSECOND
    return b'"ts_ms":%d,"ts_us":%d,"ts_ns":%d' % (micros // 1000, micros, micros * 1000)


def events(change: Change, table: Any, stamp: Stamp, lsn: int) -> list[Event]:
    """Of one row of `table` (`figbridge.forward.table.Table`): one event, or two for a change of its key."""
    operation, _, ordinal, before, _, after, _ = change
    old = None if before is None else (table.key(before), table.row(before, unsent=UNAVAILABLE))
    new = None if after is None else (table.key(after), table.row(_filled(after, before), unsent=UNAVAILABLE))
    key = (new or old or (_NULL, _NULL))[0]
    row = before if after is None else after
    order = f"{table.label}null" if row is None else table.order(row, key)
    if old and new and (was_order := table.order(before, old[0])) != order:
        return [
            _event(Operation.DELETE, table, stamp, ordinal, lsn, old[0], was_order, old[1], _NULL, DELETED),
            _event(Operation.INSERT, table, stamp, ordinal, lsn, new[0], order, _NULL, new[1]),
        ]
    # an old key alone is no old row: Debezium, too, has nothing before an update unless the identity is FULL
    was = _NULL if old is None or (new is not None and change.before_is_key) else old[1]
    return [_event(operation, table, stamp, ordinal, lsn, key, order, was, new[1] if new else _NULL)]


def _filled(after: Any, before: Any) -> Any:
    """What was not sent, from the old row, where it has it."""
    if before is None:
        return after
    return [was if isinstance(was, bytes) and not (now is None or isinstance(now, bytes)) else now
            for now, was in zip(after, before, strict=True)]  # fmt: skip


def _event(  # noqa: PLR0917 (what stands in a detail, in its order)
    operation: Operation, table: Any, stamp: Stamp, ordinal: int, lsn: int, key: bytes, order: str, old: bytes,
    new: bytes, mark: str = "",
) -> Event:  # fmt: skip
    source, detail_type, resources, start, between, before, after, end = table.parts[operation]
    identity = f"{stamp.identity}{ordinal:08X}{mark}"
    detail = b"%b%b%b%b%b%b%b%b%b%d%b%d%b%d%b" % (
        start, identity.encode(), between, key, before, old, after, new, end,
        lsn, stamp.sequence, lsn, stamp.position, ordinal + stamp.first, stamp.tail,
    )  # fmt: skip
    whole_table = operation is Operation.TRUNCATE
    return Event(identity, source, detail_type, order, stamp.time, detail, None, whole_table, resources)


def message(logical: LogicalMessage, where: Place, named: Named, database: str, begin: Begin | None) -> bytes:
    """The detail of a logical message (op ``m``), whose content Debezium writes in base64."""
    transactional = begin is not None and logical.transactional
    xid = b"%d" % begin.xid if begin is not None and transactional else _NULL
    times = _times(where.time)
    return (
        b'{"figbridge":{"id":"%b"},"op":"m",%b%d,%b,"txId":%b,"xmin":null},%b,"message":{"prefix":%b,"content":"%b"}}'
        % (
            where.id.encode(),
            _source(named, database, ("", "")),
            logical.lsn,
            times,
            xid,
            times,
            orjson.dumps(logical.prefix),
            base64.b64encode(logical.content),
        )
    )


def announcement(
    identity: str, named: Named, database: str, *, described: dict[str, Any], stamp: Stamp, lsn: int
) -> bytes:
    """The detail of ``schema.changed``: as Debezium's connectors for other databases say it, without an ``op``."""
    schema, table = described["schema"], described["table"]
    columns = [
        {"name": it["name"], "typeName": it["type"], "position": position}
        for position, it in enumerate(described["columns"], 1)
    ]
    keys = [it["name"] for it in described["columns"] if it["key"]]
    changes = [
        {
            "type": "ALTER",
            "id": f'"{schema}"."{table}"',
            "table": {"primaryKeyColumnNames": keys, "columns": columns},
        }
    ]
    times = _times(stamp.time)
    return (
        b'{"figbridge":{"id":"%b","schema_version":"%b"},%b%d,%b},%b,"databaseName":%b,"schemaName":%b,"ddl":null,"tableChanges":%b}'
        % (
            identity.encode(),
            described["schema_version"].encode(),
            _source(named, database, (schema, table)),
            lsn,
            times,
            times,
            orjson.dumps(database),
            orjson.dumps(schema),
            orjson.dumps(changes),
        )
    )
