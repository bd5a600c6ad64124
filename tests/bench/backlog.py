"""The legacy database of the benchmark: one table of ten columns, and backlogs in it that fill in seconds.

A backlog is made inside the server, by a procedure that commits every so many rows: 50,000 round trips of a client
would take longer than everything that is measured. Each backlog begins with an empty table and slots of its own, made
before its first row, so no reader ever decodes the rows of another backlog.

The server runs with fsync off and without autovacuum and checkpoints in between: what is measured is the reading of
the WAL, not the writing of it. The disk is done with all that was written before anybody is measured.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import psycopg

from bench.report import say
from figbridge.change import Lsn
from figbridge.demo.postgres import EmbeddedPostgres
from fixtures.clock import until

PUBLICATION = "bench"
CALM = 10.0  # seconds that a disk was quick before latencies are measured: what it does beside comes in fits
_SCHEMA = """
CREATE TABLE orders (
    id bigint PRIMARY KEY, customer text, total numeric(12,2), currency char(3), placed_at timestamptz,
    paid boolean, note text, document jsonb, changed_at timestamp, quantity int
);
CREATE SEQUENCE order_ids;
CREATE PROCEDURE fill(rows bigint, per_transaction bigint) LANGUAGE plpgsql AS $$
BEGIN
    FOR head IN 0 .. rows - 1 BY per_transaction LOOP
        INSERT INTO orders SELECT n, 'customer ' || n, n * 1.01, 'EUR', now(), n % 2 = 0,
            'a "quoted" note, with a comma', jsonb_build_object('tags', jsonb_build_array('a', 'b'), 'n', n),
            localtimestamp, n % 100
        FROM generate_series(head, least(head + per_transaction, rows) - 1) AS n;
        COMMIT;
    END LOOP;
END $$;
CREATE PUBLICATION bench FOR TABLE orders;
"""
# the same row, one a transaction, for pgbench
INSERT_ONE = """
INSERT INTO orders SELECT n, 'customer ' || n, n % 1000000 * 1.01, 'EUR', now(), n % 2 = 0,
    'a "quoted" note, with a comma', jsonb_build_object('tags', jsonb_build_array('a', 'b'), 'n', n),
    localtimestamp, n % 100
FROM nextval('order_ids') AS n;
"""


@dataclass(frozen=True, slots=True)
class Backlog:
    """`rows` changes that wait in the WAL, `per_transaction` to a commit; the last commit ends at `end`."""

    rows: int
    per_transaction: int
    end: Lsn

    def __str__(self) -> str:
        one = self.per_transaction >= self.rows
        return f"{self.rows:,} rows, {'one transaction' if one else f'{self.per_transaction} a transaction'}"


class Legacy:
    """The server's database, and what the benchmark does to it. A context manager."""

    def __init__(self) -> None:
        self._server = EmbeddedPostgres(
            settings={"max_replication_slots": "50", "autovacuum": "off", "max_wal_size": "64GB", "jit": "off"}
        )

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._server)
            self._connection = psycopg.connect(self._server.dsn(), autocommit=True)
            stack.callback(self._connection.close)
            self._connection.execute(_SCHEMA)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def version(self) -> str:
        """The server's, such as ``18.4``."""
        return self._connection.info.parameter_status("server_version") or str(self._server.version)

    @property
    def dsn(self) -> str:
        return self._server.dsn()

    def database(self, name: str) -> str:
        """The DSN of an empty database beside it, made by this call."""
        self._connection.execute(f'CREATE DATABASE "{name}"')
        return self._server.dsn(name)

    def program(self, name: str) -> str:
        """The path of one of the server's programs."""
        return str(self._server.program(name))

    def fill(self, slots: Sequence[str], rows: int, per_transaction: int) -> Backlog:
        """Make `slots` anew, then a backlog behind all of them. Slots of earlier backlogs are dropped."""
        say(f"filling {rows:,} rows, {per_transaction:,} a transaction")
        self.begin(slots)
        self._connection.execute("CALL fill(%s, %s)", [rows, per_transaction])
        self.settle()
        return Backlog(rows, per_transaction, self.end())

    def begin(self, slots: Sequence[str]) -> None:
        """An empty table, and `slots` behind which nothing has happened yet."""
        active = (
            "SELECT 1 FROM pg_replication_slots WHERE active"  # its reader has gone, its walsender goes in a moment
        )
        until(lambda: self._connection.execute(active).fetchone() is None, 30, "the last reader's slot is free")
        self._connection.execute("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots")
        self._connection.execute("TRUNCATE orders")
        self._connection.execute("ALTER SEQUENCE order_ids RESTART")
        for slot in slots:
            self._connection.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [slot])
        self._connection.execute("CHECKPOINT")  # the WAL of the last backlog goes now, not while somebody is measured

    def settle(self, calm: float = 0.5) -> None:
        """Let the disk finish with what was written: a reader's fdatasync would wait for it, too.

        The server does not (fsync is off), and the kernel begins half a minute later: then it is somebody's turn. What
        was removed, gigabytes of events, keeps a disk that discards it busy, too, now and then: a file that grows knows
        of that. Returns when it could grow for `calm` seconds without being kept waiting, or after two minutes.
        """
        self._connection.execute("CHECKPOINT")
        os.sync()
        with tempfile.TemporaryFile(prefix="figbridge-bench-") as file:
            began = since = now = time.monotonic()
            while now - since < calm and now - began < 120:
                time.sleep(0.005)  # a virtual disk may have only so many requests a second for us
                asked = time.monotonic()
                file.write(b"x" * 4096)
                file.flush()
                os.fdatasync(file.fileno())
                now = time.monotonic()
                if now - asked > 0.02:
                    since = now

    def slot(self, name: str) -> None:
        """Make one more slot."""
        self._connection.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [name])

    def execute(self, statement: str, parameters: Sequence[object] = ()) -> None:
        """Run it."""
        self._connection.execute(statement, parameters or None)

    def end(self) -> Lsn:
        """Where the last commit ends. The *flush* position: the insert position may be past a page header more."""
        row = self._connection.execute("SELECT pg_current_wal_flush_lsn()").fetchone()
        assert row
        return Lsn.parse(str(row[0]))

    def streaming(self, slot: str) -> bool:
        """Whether somebody reads `slot`."""
        query = "SELECT active FROM pg_replication_slots WHERE slot_name = %s"
        row = self._connection.execute(query, [slot]).fetchone()
        return bool(row and row[0])
