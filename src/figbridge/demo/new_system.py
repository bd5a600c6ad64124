"""The new system: it has its own database, hears of the legacy system through events alone, and answers with its own.

It is the demo's example of a well-behaved neighbour of figbridge, small enough to copy:

- It consumes at least once and in any order. An event's id goes into ``inbox`` in the transaction that uses it, so a
  repetition is recognised; `figbridge.demo.replica` folds what is new into rows, whatever the order.
- It acknowledges after its commit, never before.
- It emits through an ``outbox``: the row and the event that tells of it are written in one transaction, and sent
  afterwards until the bus has taken them. So they may be sent twice; ``change_id`` makes that harmless, because
  figbridge applies each key once.
- It owns the column ``status`` of the orders, and so it ignores what legacy events say about it, except when an order
  is new. (Such an event may have left before our decision arrived there.)
- It decides on an order once. Two decisions on one order could overtake each other on an unordered bus.

Run by the demo as a process: ``python -m figbridge.demo.new_system --bus local:bus.sqlite --database new.sqlite``.
"""

import argparse
import dataclasses
import json
import random
import sqlite3
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

from figbridge.demo.bus import BATCH, Bus, BusUnavailable, Entry, open_bus
from figbridge.demo.processes import Orders, say
from figbridge.demo.replica import Change, Position, Row, merge

OWNED: Final = {"orders": ("status",)}  # what has moved over already
FIRST_ID: Final = 1_000_000_000  # our orders' ids begin here, far above the legacy sequence
_CUSTOMERS: Final = ("Grace Hopper", "Édouard d'Arc", '"Q" & Sons', "王 小明")
_FORGETS: Final = 0.05  # share of sent events that are sent again
_REPORT_EVERY: Final = 0.2  # seconds

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS inbox (event_id TEXT PRIMARY KEY, kind TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS outbox (
    change_id   TEXT PRIMARY KEY,
    detail_type TEXT NOT NULL,
    detail      TEXT NOT NULL,
    sent        INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS unsent ON outbox (sent) WHERE NOT sent;
CREATE TABLE IF NOT EXISTS document (
    collection TEXT NOT NULL,
    id         INTEGER NOT NULL,
    columns    TEXT NOT NULL,  -- {column: value}; empty when the row is deleted
    told       TEXT NOT NULL,  -- {column: [commit LSN, ordinal]}, see figbridge.demo.replica
    deleted    TEXT NOT NULL,  -- [commit LSN, ordinal]
    PRIMARY KEY (collection, id)
);
CREATE INDEX IF NOT EXISTS undecided ON document (id)
    WHERE collection = 'orders' AND json_extract(columns, '$.status') = 'new';
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """What it did so far: distinct legacy events, repetitions of them, own distinct events, and how often it sent."""

    received: int
    duplicates: int
    emitted: int
    sent: int
    stopped: bool


class Database:
    """The new system's own data."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = NORMAL")
        self._connection.executescript(SCHEMA)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of it or nothing."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    def is_new(self, change: Change) -> bool:
        """Whether the event comes for the first time; from now on it does not."""
        kind = f"{change.table}.{change.operation}"
        return self._run("INSERT INTO inbox VALUES (?, ?) ON CONFLICT DO NOTHING", change.id, kind).rowcount == 1

    def row(self, collection: str, key: int) -> Row:
        """What is known of a row; an empty `Row` when nothing is."""
        found = self._run(
            "SELECT columns, told, deleted FROM document WHERE collection = ? AND id = ?", collection, key
        ).fetchone()
        if found is None:
            return Row()
        columns, told, deleted = (json.loads(text) for text in found)
        return Row(columns, {name: Position(*at) for name, at in told.items()}, Position(*deleted))

    def write(self, collection: str, key: int, row: Row) -> None:
        """Replace what is known of a row."""
        values = (json.dumps(part, default=_number) for part in (row.columns, row.told, row.deleted))
        self._run("INSERT OR REPLACE INTO document VALUES (?, ?, ?, ?, ?)", collection, key, *values)

    def undecided(self) -> int | None:
        """The oldest order that is still ``new``, if there is one."""
        found = self._run(
            "SELECT id FROM document WHERE collection = 'orders' AND json_extract(columns, '$.status') = 'new' LIMIT 1"
        ).fetchone()
        return found[0] if found else None

    def emit(self, entry: Entry) -> None:
        """Note an event for sending, in the transaction that writes what it tells of."""
        self._run(
            "INSERT INTO outbox (change_id, detail_type, detail) VALUES (?, ?, ?)",
            entry.detail["change_id"],
            entry.detail_type,
            json.dumps(entry.detail),
        )

    def unsent(self) -> list[Entry]:
        """Events to send, up to a request of them."""
        rows = self._run("SELECT detail_type, detail FROM outbox WHERE NOT sent ORDER BY rowid LIMIT ?", BATCH)
        return [Entry(detail_type, json.loads(detail)) for detail_type, detail in rows]

    def mark_sent(self, entries: Sequence[Entry]) -> None:
        """The bus has taken them."""
        self._connection.executemany(
            "UPDATE outbox SET sent = 1 WHERE change_id = ?", [(entry.detail["change_id"],) for entry in entries]
        )

    def next_order_id(self) -> int:
        """The id of the next order of our own."""
        (highest,) = self._run("SELECT max(id) FROM document WHERE collection = 'orders'").fetchone()
        return max(FIRST_ID, (highest or 0) + 1)

    def _run(self, statement: str, *values: Any) -> sqlite3.Cursor:
        return self._connection.execute(statement, values)


def _number(value: object) -> float | str:
    """A Decimal in JSON: a number if a double holds it exactly, else its digits as text. figbridge does the same."""
    if not isinstance(value, Decimal):
        raise TypeError(f"not a JSON value: {value!r}")
    return number if Decimal(repr(number := float(value))) == value else str(value)


class NewSystem:
    """Consumes, decides, emits; one thread."""

    def __init__(self, database: Database, bus: Bus, dice: random.Random) -> None:
        self._database, self._bus, self._dice = database, bus, dice
        self._next_id = database.next_order_id()
        self._received = self._duplicates = self._emitted = self._sent = 0

    def consume(self, *, wait: float) -> None:
        """Receive, use, commit, acknowledge: in this order, so that a crash repeats events and loses none."""
        bodies = self._bus.receive(wait=wait)
        if bodies:
            with self._database.transaction():
                for body in bodies:
                    for change in Change.unpack(body):
                        self.hear(change)
            self._bus.acknowledge()

    def hear(self, change: Change) -> None:
        """One legacy event. Twice is as good as once."""
        if not self._database.is_new(change):
            self._duplicates += 1
            return
        self._received += 1
        row = self._database.row(change.table, change.key)
        merged = merge(row, change, inserts_only=OWNED.get(change.table, ()))
        self._database.write(change.table, change.key, merged)

    def act(self) -> None:
        """Do some business of our own: mostly decide on an order, sometimes make one."""
        with self._database.transaction():
            order = self._database.undecided() if self._dice.random() < 0.7 else None
            entry = self._create_order() if order is None else self._decide(order)
            self._database.emit(entry)
            self._emitted += 1

    def send(self) -> None:
        """Send what the outbox holds.

        A crash between the bus's answer and our note of it makes us send again. To show that this is harmless we act,
        once in a while, as if it had happened.
        """
        while entries := self._database.unsent():
            self._bus.publish(entries)
            self._sent += len(entries)
            remembered = [entry for entry in entries if self._dice.random() >= _FORGETS]
            with self._database.transaction():
                self._database.mark_sent(remembered)

    def report(self, *, stopped: bool) -> Report:
        """What it did so far."""
        return Report(self._received, self._duplicates, self._emitted, self._sent, stopped)

    def _create_order(self) -> Entry:
        quantity = self._dice.randint(1, 9)
        order = {
            "id": self._next_id,
            "customer": self._dice.choice(_CUSTOMERS),
            "quantity": quantity,
            "total": str(Decimal(quantity * self._dice.randint(99, 99_999)) / 100),  # money travels as text
            "express": self._dice.random() < 0.5,
            "note": self._dice.choice([None, "from the new shop", 'say "hi"\nthen ring']),
            "tags": self._dice.choice([[], ["web"], ["web", 'it\'s "new"', None]]),
            "placed_at": datetime.now(UTC).isoformat(),
            "status": "new",
        }
        self._next_id += 1
        self._database.write("orders", int(str(order["id"])), Row(order))
        return Entry("order.created", {"change_id": str(uuid.uuid4()), "order": order})

    def _decide(self, order: int) -> Entry:
        status = self._dice.choice(["accepted", "accepted", "rejected"])
        row = self._database.row("orders", order)
        self._database.write("orders", order, dataclasses.replace(row, columns={**row.columns, "status": status}))
        detail = {"change_id": str(uuid.uuid4()), "order_id": order, "status": status}
        return Entry("order.status-changed", detail)


def main() -> None:
    """Consume for as long as the demo lives; act at a steady rate until told to stop."""
    parser = argparse.ArgumentParser(prog="python -m figbridge.demo.new_system")
    parser.add_argument("--bus", required=True, help="local:<file> or aws:<endpoint URL>")
    parser.add_argument("--database", type=Path, required=True)
    parser.add_argument("--rate", type=float, required=True, help="own events a second")
    arguments = parser.parse_args()
    orders = Orders()
    system = NewSystem(Database(arguments.database), open_bus(arguments.bus), random.Random())
    pause = 1 / arguments.rate
    next_act = time.monotonic()
    reported = 0.0
    while not orders.gone.is_set():
        stopping = orders.stopping.is_set()
        while not stopping and time.monotonic() >= next_act:
            system.act()
            next_act += pause
        try:
            system.send()
            system.consume(wait=pause)
        except BusUnavailable as error:
            print(f"trying again: {error}", file=sys.stderr, flush=True)
            orders.gone.wait(pause)
            continue
        if time.monotonic() - reported >= _REPORT_EVERY:
            reported = time.monotonic()
            say(system.report(stopped=stopping))


if __name__ == "__main__":
    main()
