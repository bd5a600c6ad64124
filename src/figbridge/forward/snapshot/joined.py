"""A chunk whose rows the server joins (`joint`), by some statements, each for a few blocks of rows.

INVARIANT. No statement asks for more rows than are some blocks by what was learned before it, and none is asked that
may look for its rows for long: not with a condition, which so few rows may fit that the statement never ends, where
COPY has told some of them by then.

Between two statements the server is idle, so nothing is done then but to say where the next one begins, which it has
told. To take the texts of an answer, and to look whether they are simple, is done beside the next statement (`_Found`),
and what else is to be done to them when they leave (`Joint.parts`).
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager, nullcontext
from math import ceil
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
# of a block, about. What has no room in the server's cache costs it more; what is much less, costs more statements
_BLOCK_BYTES: Final = 1536 * 1024
_BRIEF_BYTES: Final = 128 * 1024  # the same while the stream flows: a millisecond of the server's core, about
_BLOCKS: Final = 2  # of a statement; each takes 9 MB more of the server, and of four it gives some back each time
_FEWEST: Final = 10  # rows
_LONGER: Final = 1.5  # times as long as it was to be, at most, is a chunk that nobody has awaited
# SQLSTATEs of what a statement asks for: its values, its names and rights, what it takes, what there is no room for
_OF_STATEMENTS: Final = ("0A", "22", "39", "42", "53", "54", "XX")

# What a long text was made in goes back to the kernel with it, and comes again page by page, which was a fifth of the
# server's time. glibc keeps it once a larger piece was freed: https://man7.org/linux/man-pages/man3/mallopt.3.html
# (M_MMAP_THRESHOLD). The server's process keeps 20 MB until the connection ends, and ours as much.
_LARGE: Final = 16 * 1024 * 1024  # bytes, of 32 MiB at most
# of long pieces, whose bytes are counted: of single characters it would take a tenth of a second
_KEEP: Final = f"SELECT pg_catalog.octet_length(pg_catalog.repeat(pg_catalog.repeat('x', 4096), {_LARGE // 4096}))"


class Refused(Exception):
    """The server does not join these rows, for a reason that COPY need not have; it is the cause."""


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
    bytes(_LARGE)


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
    looking: Executor,
    awaited: Callable[[], bool],
) -> Joined:
    """At most `most` rows behind `cursor`, or half as many again until they are `awaited`.

    Ends after `most_bytes`, or half as many again, or `seconds`, about.

    `width` is what was learned of the rows, in bytes. While the stream flows, by `share`, the steps are short, and it
    has a core for itself between them. A thread of `looking` looks at the rows. Raises psycopg.Error, Refused.
    """
    joint = layout.joint
    if joint is None:
        return Joined((), cursor, odd=True)
    deadline, count, longest = time.monotonic() + seconds, 0, ceil(most * _LONGER)
    statement, found = _statement(plan, joint, connection), _Found(joint, cursor, looking)
    with _Dialog(connection, plan, joint) as dialog:
        while time.monotonic() < deadline:
            part = max(count / most, found.size / most_bytes)
            if part >= _LONGER or (part >= 1 and awaited()):
                break
            flows = bool(share and share.flows)
            left = (most if count < most else longest) - count
            rows = min(left, max(_FEWEST, int(min(_BRIEF_BYTES if flows else _BLOCK_BYTES, most_bytes) / width)))
            # who has awaited what is longer waits until a statement has ended
            blocks = 1 if flows or part >= 1 else min(_BLOCKS, left // rows)
            sent = time.monotonic()
            with dialog.answered(statement(cursor, rows, blocks), alone=not flows) as answer:
                if not found.settled():
                    return found.odd()
                heard = dialog.heard(answer, cursor, rows, blocks)
                found.add(answer, heard.cursors)
                if heard.odd or heard.end:
                    return found.odd() if heard.odd else found.all(end=True)
                cursor, count = heard.cursors[-1], count + rows * blocks
                width = max(width / 4, found.width or width)
            if share:
                share.rest(time.monotonic() - sent)
        return found.all()


def _statement(plan: Plan, joint: Joint, connection: psycopg.Connection) -> Callable[[Cursor | None, int, int], bytes]:
    """What asks for so many rows behind a cursor, and for as many behind those: block by block, in one row.

    A block begins behind the last key of the one before. The server knows it: until we know, had a core, and the
    interpreter, it had nothing to do for a tenth of its time.
    """
    columns, *around = joint.around(plan.key)
    before, behind = [it.as_bytes(connection) for it in around]
    select = plans.key_rows(plan, columns, connection)
    name = b"c" if plan.relation.name.startswith("b") else b"b"  # of a block: not the table's

    def statement(cursor: Cursor | None, rows: int, blocks: int) -> bytes:
        limit, asked = joint.limit(rows * blocks), list[bytes]()
        for number in range(blocks):
            last = [b"%b%d.k%d" % (name, number - 1, place) for place in range(len(plan.key))]
            select_ = select(last if number else cursor, rows)
            asked.append(b"(%b%b%b%b) AS %b%d" % (before, select_, behind, limit, name, number))
        return b"SELECT * FROM %b" % b", LATERAL ".join(asked)

    return statement


class _Answer:
    """What a statement says, block by block; see `Joint.around`."""

    def __init__(self, result: pq.abc.PGresult, keys: int, texts: int) -> None:
        self._result, self._keys, self._texts = result, keys, texts

    def rows(self, number: int) -> int:
        """How many."""
        return int(self._value(number, 0))

    def key(self, number: int) -> list[str] | None:
        """Of the last row; None if it is no UTF-8. Without rows there is none."""
        if not self.rows(number):
            return []
        try:
            return [self._value(number, 1 + place).decode() for place in range(self._keys)]
        except UnicodeDecodeError:
            return None

    def block(self, number: int) -> Block:
        """The rows. They are copied, which takes half a millisecond."""
        first = 1 + self._keys
        return Block(tuple(self._value(number, first + place) for place in range(self._texts)), self.rows(number))

    def _value(self, number: int, place: int) -> bytes:
        return self._result.get_value(0, number * (1 + self._keys + self._texts) + place) or b""


class _Heard(NamedTuple):
    """A cursor behind each block; whether these are the last; whether what follows is to be read by COPY."""

    cursors: Sequence[Cursor]
    end: bool = False
    odd: bool = False


class _Found:
    """Blocks in their order. Another thread takes them from the answers, and looks whether they are simple."""

    def __init__(self, joint: Joint, cursor: Cursor | None, looking: Executor) -> None:
        self._joint, self._cursor, self._looking = joint, cursor, looking
        self._blocks: list[Block] = []
        self._last: Future[bool] | None = None
        self._rows = self.size = 0  # of those that were looked at; in bytes

    @property
    def width(self) -> float:
        """Bytes of a row, on average; 0 where none was looked at."""
        return self.size / self._rows if self._rows else 0.0

    def add(self, answer: _Answer, cursors: Sequence[Cursor]) -> None:
        """The first blocks of an answer, a cursor behind each. Once what was added before is `settled`."""
        self._last = self._looking.submit(self._look, answer, cursors)

    def _look(self, answer: _Answer, cursors: Sequence[Cursor]) -> bool:
        for number, cursor in enumerate(cursors):
            block = answer.block(number)
            if not self._joint.simple(block):
                return False
            self._blocks.append(block)
            self._cursor = cursor
            self._rows, self.size = self._rows + block.rows, self.size + block.size
        return True

    def settled(self) -> bool:
        """Whether all are simple; waits until that is known."""
        return self._last is None or self._last.result()

    def all(self, *, end: bool = False) -> Joined:
        """What was found, as far as it is simple."""
        return Joined(self._blocks, self._cursor, end=end) if self.settled() else self.odd()

    def odd(self) -> Joined:
        """What was found before what is odd."""
        self.settled()
        return Joined(self._blocks, self._cursor, odd=True)


class _Dialog:
    """One statement at a time, and its one row: see `Joint.around`. Raises psycopg.Error, Refused.

    By libpq's blocking function, which is the only one that psycopg calls without Python's lock: the others take it for
    every few kilobytes of an answer, which the server cannot get rid of meanwhile, and a loop that computes beside it
    gives it up each time. A server that does not answer within the connection's patience is left, as
    `figbridge.legacy.Connection` leaves it.
    """

    def __init__(self, connection: psycopg.Connection, plan: Plan, joint: Joint) -> None:
        self._connection, self._plan, self._texts = connection, plan, joint.texts
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
    def answered(self, statement: bytes, *, alone: bool) -> Iterator[_Answer]:
        """What it says. The server is idle within: if it is `alone`, others wait."""
        result = self._answer(statement)
        with SHORT_TURNS.held() if alone else nullcontext():
            yield _Answer(result, len(self._plan.key), self._texts)

    def heard(self, answer: _Answer, cursor: Cursor | None, rows: int, blocks: int) -> _Heard:
        """What there is of so many blocks of so many rows behind `cursor`."""
        cursors = list[Cursor]()
        for number in range(blocks):
            there, key = answer.rows(number), answer.key(number)
            end = there < rows and there == self._count(cursor, rows)
            if key is None or (there < rows and not end):  # one was left out
                return _Heard(cursors, odd=True)
            if there:
                cursor = plans.cursor(self._plan, key)
                cursors.append(cursor)
            if end:
                return _Heard(cursors, end=True)
        return _Heard(cursors)

    def _count(self, cursor: Cursor | None, most: int) -> int:
        statement = plans.key_count(self._plan, cursor, most).as_bytes(self._connection)
        return int(self._answer(statement).get_value(0, 0) or 0)

    def _answer(self, statement: bytes) -> pq.abc.PGresult:
        self._asked = time.monotonic()
        result = self._pgconn.exec_(statement)
        self._asked = None
        if result.status != pq.ExecStatus.TUPLES_OK:
            if self._pgconn.status == pq.ConnStatus.BAD:
                what = f"no answer for {self._patience:g} s" if self._left else result.get_error_message(self._encoding)
                raise psycopg.OperationalError(what)
            error = psycopg.errors.error_from_result(result, encoding=self._encoding)
            if (error.sqlstate or "").startswith(_OF_STATEMENTS):
                raise Refused from error
            raise error
        return result

    def _watch(self, patience: float) -> None:
        while not self._over.wait(min(1.0, patience)):
            asked = self._asked
            if asked is not None and time.monotonic() - asked > patience:
                self._left = True
                with socket.socket(fileno=os.dup(self._pgconn.socket)) as connection:
                    connection.shutdown(socket.SHUT_RDWR)
                return
