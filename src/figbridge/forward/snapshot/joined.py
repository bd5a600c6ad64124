"""A chunk whose rows the server joins (`joint`), by some statements, each for about a block of rows.

INVARIANT. No statement asks for more rows than are about a block by what was learned before it, and none is asked that
may look for its rows for long: not with a condition, which so few rows may fit that the statement never ends, where
COPY has told some of them by then.

Between two statements the server is idle, so nothing is done then that can be done while it is at the next one.
"""

import select
import time
from collections.abc import Sequence
from math import inf
from typing import Final, NamedTuple, Self

import psycopg
from psycopg import pq

from figbridge.forward.snapshot import plan as plans
from figbridge.forward.snapshot.layout import Layout
from figbridge.forward.snapshot.plan import Cursor, Plan
from figbridge.forward.snapshot.reads import Block, Share

NARROW: Final = 2000  # bytes of a row, on average, up to which it gains something
# That a statement asks for, about. The server makes long texts of what has room in its processor's cache, and in memory
# that it has already: of 2 MiB a row takes a tenth more time.
_BLOCK_BYTES: Final = 768 * 1024
_BRIEF_BYTES: Final = 128 * 1024  # the same while the stream flows: a millisecond of the server's core, about
_REST: Final = 0.02  # seconds, at most
_FEWEST: Final = 10  # rows
_GATHER: Final = 0.00015  # seconds


class Joined(NamedTuple):
    """Blocks, the cursor behind them, whether these are the last. `odd`: what is next is to be read by COPY."""

    blocks: Sequence[Block]
    cursor: Cursor | None
    end: bool = False
    odd: bool = False


def fits(plan: Plan, layout: Layout, condition: str | None) -> bool:
    """Whether the rows of a table can be joined."""
    return bool(plan.key) and layout.joint is not None and not plan.filter and not condition


def read(
    connection: psycopg.Connection,
    plan: Plan,
    layout: Layout,
    cursor: Cursor | None,
    *,
    most: int,
    most_bytes: int,
    seconds: float,
    width: float,
    share: Share | None,
) -> Joined:
    """At most `most` rows behind `cursor`. Ends after `most_bytes` or `seconds`, about.

    `width` is what was learned of the rows, in bytes. While the stream flows, by `share`, the steps are short, and it
    has a core for itself between them. Raises psycopg.Error.
    """
    joint = layout.joint
    if joint is None:
        return Joined((), cursor, odd=True)
    blocks: list[Block] = []
    deadline, count, size, indexes = time.monotonic() + seconds, 0, 0, plan.indexes(plan.key)
    before, behind = [it.as_bytes(connection) for it in joint.around(plan.key)]
    select = plans.key_rows(plan, connection)

    def asked() -> int:
        """For how many rows the next statement is sent; 0 for none."""
        if count >= most or size >= most_bytes or time.monotonic() > deadline:
            return 0
        enough = _BRIEF_BYTES if share and share.flows else _BLOCK_BYTES
        rows = min(most - count, max(_FEWEST, int(min(enough, most_bytes) / width)))
        dialog.send(before + select(cursor, rows) + behind)
        return rows

    def counted() -> int:
        dialog.send(plans.key_count(plan, cursor, wanted).as_bytes(connection))
        rows, _ = dialog.answer()
        return rows

    with _Dialog(connection) as dialog:
        sent = time.monotonic()
        wanted = asked()
        while wanted:
            rows, texts = dialog.answer()
            there = rows if rows == wanted else counted()  # it is the end, or one was left out
            last = joint.last(texts) if rows and rows == there else None
            if last is None:
                return Joined(blocks, cursor, end=not there, odd=bool(there))
            behind_it, cursor = cursor, plans.cursor(plan, layout.keys(last, indexes))
            count += rows
            size += sum(map(len, texts))
            width = max(width / 4, size / count)
            _rest(share, 2 * (time.monotonic() - sent))
            sent = time.monotonic()
            more = asked() if rows == wanted else 0
            block = joint.block(rows, texts)  # while the server is at the next
            if block is None:
                if more:
                    dialog.answer()
                return Joined(blocks, behind_it, odd=True)
            blocks.append(Block(block, rows))
            if rows < wanted:
                return Joined(blocks, cursor, end=True)
            wanted = more
    return Joined(blocks, cursor)


def _rest(share: Share | None, seconds: float) -> None:
    """While the stream flows."""
    if share and share.flows:
        time.sleep(min(_REST, seconds))


class _Dialog:
    """One statement at a time, and its one row: see `Joint.around`. Raises psycopg.Error.

    psycopg would take Python's lock for every few kilobytes of an answer, and a loop that computes meanwhile give it up
    each time: both were half as fast. So what has begun to arrive may gather for a moment.
    """

    def __init__(self, connection: psycopg.Connection) -> None:
        self._pgconn, self._encoding = connection.pgconn, connection.info.encoding
        self._patience: float = getattr(connection, "patience", None) or inf
        self._asked = False
        self._poll = select.poll()
        self._poll.register(self._pgconn.socket, select.POLLIN)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._asked:  # the next statement of this connection would have the answer to this one
            self._pgconn.finish()

    def send(self, statement: bytes) -> None:
        """Ask."""
        self._pgconn.send_query(statement)
        self._asked = True

    def answer(self) -> tuple[int, Sequence[bytes]]:
        """How many rows there are, and the texts."""
        deadline = time.monotonic() + self._patience
        while self._pgconn.is_busy():
            if self._poll.poll(1000):
                time.sleep(_GATHER)
                self._pgconn.consume_input()
            elif time.monotonic() > deadline:
                self._pgconn.finish()  # as `figbridge.legacy.Connection` does
                raise psycopg.OperationalError(f"no answer for {self._patience:g} s")
        result = self._pgconn.get_result()
        while self._pgconn.get_result() is not None:
            pass
        self._asked = False
        if result is None:
            raise psycopg.OperationalError("there is no answer")
        if result.status != pq.ExecStatus.TUPLES_OK:
            raise psycopg.errors.error_from_result(result, encoding=self._encoding)
        rows, *texts = [result.get_value(0, place) or b"" for place in range(result.nfields)]
        return int(rows), texts
