"""One chunk: read in a transaction of its own, short, under the settings that the walsender prints values with.

INVARIANT. The transaction's snapshot has no transaction in progress that the capture loop has met, and the table is
locked (ACCESS SHARE) before the snapshot is taken: so the chunk sees all that the stream has told before the low
watermark, and its rows are of the one schema that is compared with the window's.

Politeness: a lock that is not granted within two seconds, and a statement that takes a minute, or a minute without one,
are given up and tried again later, whatever timeouts the role or the database has; the reading is broken off when it
becomes too long or too large, and what came by then is the chunk.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from math import inf
from typing import Final

import psycopg
from psycopg import sql

from figbridge.errors import LegacyUnavailable
from figbridge.forward.snapshot import joined
from figbridge.forward.snapshot import plan as plans
from figbridge.forward.snapshot.block import Block
from figbridge.forward.snapshot.layout import Layout, NoLiteral
from figbridge.forward.snapshot.plan import Cursor, Plan
from figbridge.forward.snapshot.reads import Share
from figbridge.forward.snapshot.stretch import ALL, Stretch
from figbridge.preflight.catalogue import Name, quote

MOST_BYTES: Final = 20 * 1024 * 1024  # of a chunk, about: reading ends at twice as many; one row may be larger
_BLOCK_ROWS: Final = 500  # and
_BLOCK_BYTES: Final = 512 * 1024  # of a block, about, which leaves at once
_SECONDS: Final = 2.0  # after which the reading of a chunk is broken off
_ODD: Final = 16  # chunks that are read by COPY once a row was odd: to find out costs as much as a chunk
_PATIENCE: Final = 200  # looks, 10 ms apart, whether a commit that was met has become visible
_BEGIN: Final = """
BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;
SET LOCAL lock_timeout = '2s'; SET LOCAL statement_timeout = '60s'; SET LOCAL jit = off; SET LOCAL row_security = off;
SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off; SET LOCAL max_parallel_workers_per_gather = 0;
SET LOCAL idle_in_transaction_session_timeout = '60s'; {since_17}
LOCK TABLE ONLY {table} IN ACCESS SHARE MODE;
SELECT pg_is_in_recovery(), ARRAY(SELECT pg_snapshot_xip(pg_current_snapshot())::pg_catalog.text::bigint)
"""
_SINCE_17: Final = "SET LOCAL transaction_timeout = 0;"


Line = bytes | bytearray | memoryview  # as psycopg gives it


class Gone(Exception):
    """There is no such table (any more)."""


class _Enough(Exception):
    """What has come is the chunk: it is in order and without a gap."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What was read, and where the next chunk begins. `end`: there is none. In seconds and bytes.

    `odd`: see `joined`. `looked`: how many rows were looked at, with a condition; else 0.
    """

    blocks: Sequence[Block]
    cursor: Cursor | None
    end: bool
    seconds: float
    size: int
    odd: bool = False
    looked: int = 0

    @property
    def rows(self) -> int:
        """How many."""
        return sum(block.rows for block in self.blocks)


@dataclass(slots=True)
class Size:
    """How many rows a chunk asks for: as many as take about `target` seconds, or are about `MOST_BYTES`.

    `width` is the size of a row, in bytes; infinite for the next `_ODD` chunks where rows were odd. `looks` is how many
    rows are looked at, with a condition.
    """

    target: float = 0.5
    rows: int = 2000
    width: float = joined.NARROW
    odd: int = 0
    looks: int = 20_000
    _most: int = 250_000

    def copy(self) -> None:
        """Read the next chunks by COPY."""
        self.odd, self.width = _ODD, inf

    def tired(self) -> None:
        """The server was at it for too long."""
        self.looks = max(10, self.looks // 10)

    def learn(self, chunk: Chunk) -> None:
        """From what was read."""
        if chunk.looked:
            wanted = int(chunk.looked * self.target / max(chunk.seconds, 0.001))
            self.looks = max(10, min(wanted, 4 * self.looks, self._most))
        if rows := chunk.rows:
            wanted = int(rows * min(self.target / max(chunk.seconds, 0.001), MOST_BYTES / chunk.size))
            self.rows = max(10, min(wanted, 4 * self.rows, self._most))
        self.odd = _ODD if chunk.odd else max(0, self.odd - 1)
        self.width = inf if self.odd or not rows else chunk.size / rows


@contextmanager
def locked(connection: psycopg.Connection, name: Name, met: Callable[[list[int]], bool] | None) -> Iterator[None]:
    """A transaction with the table locked and a snapshot as it must be. Raises LegacyUnavailable, psycopg.Error, Gone.

    `met` says whether any of these transactions was met in the stream. None on a standby (see `standby`).
    """
    # one round trip, for each costs as much as some thousand rows
    since_17 = sql.SQL(_SINCE_17 if connection.info.server_version >= 170000 else "")
    begin = sql.SQL(_BEGIN).format(table=sql.Identifier(*name), since_17=since_17)
    for _ in range(_PATIENCE):
        try:
            try:
                results = connection.execute(begin)
            except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName) as error:
                raise Gone from error
            while results.nextset():
                pass
            recovers, xids = results.fetchone() or (False, [])
            if recovers != (met is None):
                raise LegacyUnavailable("the standby of the snapshot was promoted, or the primary has become one")
            if met is None or not met([xid & 0xFFFFFFFF for xid in xids]):
                yield
                return
        finally:
            if not connection.closed:
                # after a ROLLBACK psycopg forgets what was prepared; it read only, and one that failed is rolled back
                connection.execute("COMMIT")
        time.sleep(0.01)
    raise LegacyUnavailable("a commit that the stream has told is not visible yet: a synchronous standby is away?")


def read(
    connection: psycopg.Connection,
    plan: Plan,
    layout: Layout,
    cursor: Cursor | None,
    condition: str | None,
    *,
    most: int,
    again: Sequence[Sequence[str]] = (),
    bounded: bool = False,
    looks: int = 20_000,
    width: float = inf,
    share: Share | None = None,
    looking: Executor | None = None,
    awaited: Callable[[], bool] = lambda: True,
) -> Chunk:
    """The rows behind `cursor`, or those with the keys `again`. Call within `locked`.

    At most `most`, or half as many again while nobody has `awaited` them: those who read and who publish are now the
    one, now the other a little faster, and with chunks of one size each would wait for the other. By COPY never more.

    Keys of a chunk's rows have room where it had. Of others, `bounded`, the reading may be broken off, too; then `end`
    says that it was not.

    With a condition, or a publication's filter, `looks` is how many rows are looked at, in the order of the key.

    `width` is what was learned of the rows, in bytes: narrow ones are `joined`, if there is somebody for `looking` at
    them. While the stream flows, by `share`, it has most of the time.

    Raises psycopg.Error, `joined.Refused` and NoLiteral.
    """
    if plan.path:
        # the operators of the key's types are looked up there; those of extensions need not be in the role's path
        path = ", ".join(quote(schema) for schema in ("pg_catalog", *plan.path))
        connection.execute(
            "SELECT set_config('search_path', "
            "concat_ws(', ', %s::pg_catalog.text, nullif(current_setting('search_path'), '')), true)",
            [path],
        )
    if again:
        statement = layout.copy(plans.rows_chunk(plan, layout.query, again, condition))
        blocks, seconds, size, whole = _blocks(connection, statement, layout.block, bounded=bounded)
        return Chunk(blocks, cursor, bounded and whole, seconds, size)
    odd = False
    if looking and width <= joined.NARROW and joined.fits(plan, layout, condition):
        began = time.monotonic()
        found = joined.read(
            connection, plan, layout, cursor,
            most=most, most_bytes=MOST_BYTES, seconds=_SECONDS, width=width, share=share,
            looking=looking, awaited=awaited,
        )  # fmt: skip
        if found.blocks or found.end:
            size = sum(block.size for block in found.blocks)
            return Chunk(found.blocks, found.cursor, found.end, time.monotonic() - began, size, found.odd)
        odd = found.odd
    if plan.key:
        began, narrowed = time.monotonic(), bool(condition or plan.filter)
        stretch = Stretch.behind(connection, plan, cursor, looks) if narrowed else ALL
        statement = layout.copy(plans.key_chunk(plan, layout.query, cursor, condition, most, beyond=stretch.beyond))
        blocks, seconds, size, whole = _blocks(connection, statement, layout.block, share=share)
        through = whole and sum(block.rows for block in blocks) < most
        if through and stretch.last:
            return Chunk(blocks, stretch.last, False, time.monotonic() - began, size, looked=looks)
        last = cursor
        with suppress(NoLiteral) if through else nullcontext():
            last = _behind(plan, layout, blocks[-1]) if blocks else cursor
        return Chunk(blocks, last, through, seconds, size, odd)
    place = plans.ctid_leaf(connection, plan, cursor)
    if place is None:
        return Chunk((), cursor, True, 0.0, 0)
    ctid = b"(0,0)"

    def placed(copied: bytes) -> bytes:
        """Without the first field, of which the last line's is kept."""
        nonlocal ctid
        lines = [line.partition(b"\t") for line in copied[:-1].split(b"\n")]
        ctid = lines[-1][0]
        return layout.block(b"".join([line + b"\n" for _, _, line in lines]))

    columns = sql.SQL(", ").join([sql.SQL("ctid"), *([layout.query] if plan.relation.columns else [])])
    statement = layout.copy(plans.ctid_chunk(plan, columns, place, condition))
    blocks, seconds, size, whole = _blocks(connection, statement, placed, share=share)
    end = f"({plans.ctid_end(place)},0)" if whole else ctid.decode()
    return Chunk(blocks, place | {"ctid": end}, False, seconds, size)


def _behind(plan: Plan, layout: Layout, block: Block) -> Cursor:
    """Behind the last row that has a literal: rows behind that are read again, as after a kill. Raises NoLiteral."""
    indexes = plan.indexes(plan.key)
    (row,) = layout.rows(Block(_last_line(block.lines), 1))
    try:
        return plans.cursor(plan, layout.keys(row, indexes))
    except NoLiteral:
        for other in reversed(list(layout.rows(block))):
            with suppress(NoLiteral):
                return plans.cursor(plan, layout.keys(other, indexes))
        raise


def _last_line(text: bytes) -> bytes:
    return text[text.rfind(b"\n", 0, -1) + 1 :]


def _arrived(connection: psycopg.Connection, copy: psycopg.Copy, lines: list[Line]) -> bool:
    """Append the lines that are there, waiting for the first; whether there may be more. Raises psycopg.Error.

    What libpq has in its buffer is taken from there: a call of `copy.read` for each line costs several times as much.
    """
    first = copy.read()
    if not first:
        return False
    get, append = connection.pgconn.get_copy_data, lines.append
    append(first)
    for _ in range(_BLOCK_ROWS):
        size, data = get(1)
        if size == 0:
            break
        if size < 0:
            failed = None
            while (result := connection.pgconn.get_result()) is not None:  # to the end, or the COPY is not over
                if result.error_message:
                    failed = result
            if failed:
                raise psycopg.errors.error_from_result(failed)
            return False
        append(data)
    return True


def _blocks(
    connection: psycopg.Connection,
    statement: sql.Composed,
    made: Callable[[bytes], bytes],
    *,
    bounded: bool = True,
    share: Share | None = None,
) -> tuple[list[Block], float, int, bool]:
    """The rows, seconds, bytes, and whether all of them came; `bounded`: not all of them need to.

    Blocks are made while the server is at the next rows.
    """
    blocks: list[Block] = []
    began = cut_at = time.monotonic()
    size = 0
    lines: list[Line] = []

    def cut() -> None:
        nonlocal size, lines, cut_at
        copied = b"".join(lines)
        size += len(copied)
        blocks.append(Block(made(copied), len(lines)))
        lines = []
        if share:  # the server goes on till the socket is full
            share.rest(time.monotonic() - cut_at)
            cut_at = time.monotonic()

    try:
        with connection.cursor() as cursor, cursor.copy(statement) as copy:
            while _arrived(connection, copy, lines):
                if len(lines) >= _BLOCK_ROWS or sum(map(len, lines)) >= _BLOCK_BYTES:
                    cut()
                if bounded and (size >= 2 * MOST_BYTES or time.monotonic() - began > _SECONDS):
                    raise _Enough  # noqa: TRY301 (psycopg cancels the statement then, and only then)
            if lines:
                cut()
    except _Enough:
        if lines:
            cut()
        return blocks, time.monotonic() - began, size, False
    return blocks, time.monotonic() - began, size, True
