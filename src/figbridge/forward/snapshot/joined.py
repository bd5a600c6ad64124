"""A chunk whose rows the server joins (`joint`), by some statements, each for about a block of rows.

INVARIANT. No statement asks for more rows than are about a block by what was learned before it, and none is asked that
may look for its rows for long: not with a condition, which so few rows may fit that the statement never ends, where
COPY has told some of them by then.

Between two statements the server is idle, so nothing is done then but to look where the next one begins. Whether the
texts are simple is looked at beside the next statement (`_Found`), and what else is to be done to them when they leave
(`Joint.parts`).
"""

import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Final, NamedTuple, Self

import psycopg
from psycopg import pq

from figbridge.forward.snapshot import plan as plans
from figbridge.forward.snapshot.block import Block
from figbridge.forward.snapshot.joint import Joint
from figbridge.forward.snapshot.layout import Layout
from figbridge.forward.snapshot.plan import Cursor, Plan
from figbridge.forward.snapshot.reads import Share
from figbridge.turns import SHORT_TURNS

NARROW: Final = 2000  # bytes of a row, on average, up to which it gains something
# That a statement asks for, about. What has no room in the server's cache costs it more, of 384 KiB a row costs a fifth
# more, too: there is a round trip for each statement, in which the server is idle.
_BLOCK_BYTES: Final = 1536 * 1024
_BRIEF_BYTES: Final = 128 * 1024  # the same while the stream flows: a millisecond of the server's core, about
_FEWEST: Final = 10  # rows


# What a long text was made in goes back to the kernel with it, and comes again page by page, which was a fifth of the
# server's time. glibc keeps it once a larger piece was freed: https://man7.org/linux/man-pages/man3/mallopt.3.html
# (M_MMAP_THRESHOLD). The server's process keeps 10 MB until the connection ends, and ours as much.
_LARGER: Final = 16 * 1024 * 1024  # bytes, of 32 MiB at most
# of long pieces, whose bytes are counted: of single characters it would take a tenth of a second
_KEEP: Final = f"SELECT pg_catalog.octet_length(pg_catalog.repeat(pg_catalog.repeat('x', 4096), {_LARGER // 4096}))"


class Joined(NamedTuple):
    """Blocks, the cursor behind them, whether these are the last. `odd`: what is next is to be read by COPY."""

    blocks: Sequence[Block]
    cursor: Cursor | None
    end: bool = False
    odd: bool = False


def fits(plan: Plan, layout: Layout, condition: str | None) -> bool:
    """Whether the rows of a table can be joined."""
    return bool(plan.key) and layout.joint is not None and not plan.filter and not condition


def prepare(connection: psycopg.Connection) -> None:
    """Before the first chunk; outside of a transaction. Raises psycopg.Error."""
    connection.execute(_KEEP)
    bytes(_LARGER)


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
    deadline, count, size, indexes = time.monotonic() + seconds, 0, 0, plan.indexes(plan.key)
    columns, *around = joint.around(plan.key)
    before, behind = [it.as_bytes(connection) for it in around]
    select = plans.key_rows(plan, columns, connection)
    with _Dialog(connection) as dialog, _Found(joint, cursor) as found:
        while count < most and size < most_bytes and time.monotonic() < deadline:
            enough = _BRIEF_BYTES if share and share.flows else _BLOCK_BYTES
            wanted = min(most - count, max(_FEWEST, int(min(enough, most_bytes) / width)))
            sent = time.monotonic()
            statement = b"%b%b%b%b" % (before, select(cursor, wanted), behind, joint.limit(wanted))
            with dialog.answered(statement, alone=not (share and share.flows)) as (rows, texts):
                there = rows
                if rows < wanted:  # it is the end, or one was left out
                    there = dialog.number(plans.key_count(plan, cursor, wanted).as_bytes(connection))
                if not found.settled() or rows < there:
                    return found.odd()
                if rows:
                    block = Block(texts, rows)
                    found.add(block)
                    key = _last_key(layout, joint, block, indexes)
                    if not (key and joint.valid(key, indexes)):  # the next statement must not fail
                        if not found.settled():
                            return found.odd()
                        key = layout.keys(joint.last(block), indexes)
                    cursor = plans.cursor(plan, key)
                    found.behind(cursor)
                if rows < wanted:
                    return found.all(end=True)
                count += rows
                size += sum(map(len, texts))
                width = max(width / 4, size / count)
            if share:
                share.rest(time.monotonic() - sent)
        return found.all()


def _last_key(layout: Layout, joint: Joint, block: Block, indexes: Sequence[int]) -> list[str] | None:
    """Of the last row; of a block that is not simple it may be another's, or none."""
    try:
        return layout.keys(joint.last(block), indexes)
    except ValueError:
        return None


class _Found:
    """Blocks in their order. A thread looks whether the last of them is simple; those before it are."""

    def __init__(self, joint: Joint, cursor: Cursor | None) -> None:
        self._joint = joint
        self._blocks: list[Block] = []
        self._cursor = self._next = cursor
        self._last: tuple[Block, Future[bool]] | None = None
        self._looking = ThreadPoolExecutor(1, "snapshot-look")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._looking.shutdown()

    def add(self, block: Block) -> None:
        """To be looked at, once what was added before is `settled`."""
        self._last = block, self._looking.submit(self._joint.simple, block)

    def behind(self, cursor: Cursor) -> None:
        """The cursor behind what was added last."""
        self._next = cursor
        if not self._last:
            self._cursor = cursor

    def settled(self) -> bool:
        """Whether all are simple; waits until that is known."""
        if self._last:
            block, simple = self._last
            if not simple.result():
                return False
            self._blocks.append(block)
            self._cursor, self._last = self._next, None
        return True

    def all(self, *, end: bool = False) -> Joined:
        """What was found, as far as it is simple."""
        return Joined(self._blocks, self._next, end=end) if self.settled() else self.odd()

    def odd(self) -> Joined:
        """What was found before what is odd."""
        return Joined(self._blocks, self._cursor, odd=True)


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

    @contextmanager
    def answered(self, statement: bytes, *, alone: bool) -> Iterator[tuple[int, tuple[bytes, ...]]]:
        """How many rows there are, and their texts. The server is idle within: if it is `alone`, others wait."""
        result = self._answer(statement)
        with SHORT_TURNS.held() if alone else nullcontext():
            rows, *texts = [result.get_value(0, place) or b"" for place in range(result.nfields)]
            yield int(rows), tuple(texts)

    def number(self, statement: bytes) -> int:
        """The only value."""
        return int(self._answer(statement).get_value(0, 0) or 0)

    def _answer(self, statement: bytes) -> pq.abc.PGresult:
        self._asked = time.monotonic()
        result = self._pgconn.exec_(statement)
        self._asked = None
        if result.status != pq.ExecStatus.TUPLES_OK:
            if self._pgconn.status == pq.ConnStatus.BAD:
                what = f"no answer for {self._patience:g} s" if self._left else result.get_error_message(self._encoding)
                raise psycopg.OperationalError(what)
            raise psycopg.errors.error_from_result(result, encoding=self._encoding)
        return result

    def _watch(self, patience: float) -> None:
        while not self._over.wait(min(1.0, patience)):
            asked = self._asked
            if asked is not None and time.monotonic() - asked > patience:
                self._left = True
                with socket.socket(fileno=os.dup(self._pgconn.socket)) as connection:
                    connection.shutdown(socket.SHUT_RDWR)
                return
