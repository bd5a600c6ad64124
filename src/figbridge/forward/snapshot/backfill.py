"""What consumers are told when the rows of a table are read again because changes are in no event.

    figbridge.snapshot (gap) ── started ─▶ message ─▶ orders.backfill.started
                             ── finished ─▶ message ─▶ orders.backfill.finished   {"since": "0/16B3748", …}

A read row says what is there. What was deleted in the gap it cannot say, so ``since`` does: each row that exists was
told behind it, by a read, an insert or an update. INVARIANT. So whoever drops, at ``backfill.finished``, the rows of
the table that were told only before ``since``, holds the table. Why: the place is taken before the first chunk is
read, and a row that the stream touches while its chunk is read, which then is left out, was touched behind it, too.

A notice is a transactional logical message, written in the transaction that changes the task's state: so there is one
of each for a run, its place in the order is its place in the WAL, and its event has the id of that place.
"""

from typing import Any, Final, Literal

import orjson
import psycopg

from figbridge.event import Event
from figbridge.forward.place import Place
from figbridge.forward.table import Naming

PREFIX: Final = "figbridge.backfill"
OPERATIONS: Final = ("backfill.started", "backfill.finished")
State = Literal["started", "finished"]


def tell(connection: psycopg.Connection, state: State, *, slot: str, schema: str, table: str, **more: object) -> None:
    """Write the notice into the open transaction; `more` is run, since and reason. Raises psycopg.Error."""
    content = {"slot": slot, "state": state, "schema": schema, "table": table, **more}
    connection.execute(
        "SELECT pg_logical_emit_message(true, %s::pg_catalog.text, %s::pg_catalog.text)",
        [PREFIX, orjson.dumps(content).decode()],
    )


def event(content: bytes, slot: str, where: Place, naming: Naming) -> Event | None:
    """The event of a notice; None when it is another bridge's, or nobody's: anyone may write a message."""
    try:
        told: dict[str, Any] = orjson.loads(content)
        state, schema, table = told["state"], str(told["schema"]), str(told["table"])
        if told["slot"] != slot or state not in ("started", "finished"):
            return None
        said = orjson.dumps({name: told[name] for name in ("run", "since", "reason")})
    except (ValueError, TypeError, LookupError):
        return None
    operation = f"backfill.{state}"
    source, detail_type, resources = naming.of(schema, table, operation)
    detail = b'{"id":"%b","op":"%b","schema":%b,"table":%b,"key":null,%b%b' % (
        where.id.encode(),
        operation.encode(),
        orjson.dumps(schema),
        orjson.dumps(table),
        said[1:-1],
        where.tail,
    )
    if naming.form == "debezium":  # which has no such operation: consumers pass by what has no op
        detail = b'{"figbridge":%b}' % detail
    key = f"{schema}.{table}:null"
    return Event(where.id, source, detail_type, key, where.time, detail, whole_table=True, resources=resources)
