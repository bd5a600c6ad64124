"""A chunk whose rows the server joins (`joint`), by some statements, each for about a block of rows.

INVARIANT. No statement asks for more rows than are about a block by what was learned before it, and none is asked that
may look for its rows for long: not with a condition, which so few rows may fit that the statement never ends, where
COPY has told some of them by then.

Between two statements the server is idle, so nothing is done then but to look where the next one begins. What else is
to be done to the texts is done when they leave (`Joint.rows`).
"""

import os
import socket
import threading
import time
from collections.abc import Sequence
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
    with _Dialog(connection) as dialog:
        while count < most and size < most_bytes and time.monotonic() < deadline:
            enough = _BRIEF_BYTES if share and share.flows else _BLOCK_BYTES
            wanted = min(most - count, max(_FEWEST, int(min(enough, most_bytes) / width)))
            sent = time.monotonic()
            rows, texts = dialog.answer(before + select(cursor, wanted) + behind)
            there = rows
            if rows < wanted:  # it is the end, or one was left out
                there, _ = dialog.answer(plans.key_count(plan, cursor, wanted).as_bytes(connection))
            if not rows or rows < there or not joint.simple(rows, texts):
                return Joined(blocks, cursor, end=not there, odd=bool(there))
            cursor = plans.cursor(plan, layout.keys(joint.last(texts), indexes))
            block = Block(tuple(texts), rows)
            blocks.append(block)
            if rows < wanted:
                return Joined(blocks, cursor, end=True)
            count += rows
            size += block.size
            width = max(width / 4, size / count)
            _rest(share, 2 * (time.monotonic() - sent))
    return Joined(blocks, cursor)


def _rest(share: Share | None, seconds: float) -> None:
    """While the stream flows."""
    if share and share.flows:
        time.sleep(min(_REST, seconds))


class _Dialog:
    """One statement at a time, and its one row: see `Joint.around`. Raises psycopg.Error.

    By libpq's blocking function, which is the only one that psycopg calls without Python's lock: the others take it for
    every few kilobytes of an answer, which the server cannot get rid of meanwhile, and a loop that computes beside it
    gives it up each time. A server that does not answer within the connection's patience is left, as
    `figbridge.legacy.Connection` leaves it.
    """

    def __init__(self, connection: psycopg.Connection) -> None:
        self._pgconn, self._encoding = connection.pgconn, connection.info.encoding
        self._patience: float | None = getattr(connection, "patience", None)
        self._asked: float | None = None  # when
        self._left = False
        self._over = threading.Event()

    def __enter__(self) -> Self:
        if self._patience:
            threading.Thread(target=self._watch, args=(self._patience,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def answer(self, statement: bytes) -> tuple[int, Sequence[bytes]]:
        """How many rows there are, and the texts."""
        self._asked = time.monotonic()
        result = self._pgconn.exec_(statement)
        self._asked = None
        if result.status != pq.ExecStatus.TUPLES_OK:
            if self._pgconn.status == pq.ConnStatus.BAD:
                what = f"no answer for {self._patience:g} s" if self._left else result.get_error_message(self._encoding)
                raise psycopg.OperationalError(what)
            raise psycopg.errors.error_from_result(result, encoding=self._encoding)
        rows, *texts = [result.get_value(0, place) or b"" for place in range(result.nfields)]
        return int(rows), texts

    def _watch(self, patience: float) -> None:
        while not self._over.wait(min(1.0, patience)):
            asked = self._asked
            if asked is not None and time.monotonic() - asked > patience:
                self._left = True
                with socket.socket(fileno=os.dup(self._pgconn.socket)) as connection:
                    connection.shutdown(socket.SHUT_RDWR)
                return
