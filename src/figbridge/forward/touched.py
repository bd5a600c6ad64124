"""`echo: touched_rows`: which rows of a reverse transaction are ours, and which the legacy system's triggers made.

INVARIANT. A row that says exactly what the reverse path asked for, once, is an echo. Everything else in the transaction
leaves as an event with its cause: what a trigger wrote elsewhere, what it added to our row afterwards, and our own row
if a trigger altered a value that we wrote. In doubt a row leaves: an echo too many is bounded by ``hops``, a change too
few would be lost.

WHY THE LIST COMES FIRST, AND WHAT IS IN IT. The reader decides row by row, while the transaction arrives, so what is
known only after the statements (their RETURNING) would come too late. What was asked for is known before: a digest of
the values of each statement, printed by PostgreSQL as it prints them into the WAL (`figbridge.mark`). The reader prints
nothing and casts nothing; it takes the bytes of the row and compares digests.

Compared are the columns that the mapping writes. Others of our row (a default, an ``updated_at`` of a trigger) are not:
nearly every legacy table has one, and each write would come back.

A row counts once: an UPDATE of the same row by a trigger, after ours and without touching our columns, is a change of
the trigger's. Where an UPDATE of ours means several rows, each of them counts once. A row that moves to another
partition is a DELETE and an INSERT in the WAL; the DELETE is ours as long as the INSERT has not come. So a trigger's
DELETE in the place of our UPDATE is taken for a move in a partitioned table; in another table it leaves.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Final

import orjson

from figbridge import mark
from figbridge.change import NO_CAUSE, UNCHANGED, Change, Operation, Relation, Row
from figbridge.mark import Entry, Shape

_MOST: Final = 200_000  # statements of one transaction that are compared: some 60 MB


class Touched:
    """The list of one transaction. `add` for each part of it, `turn` for each event, `takes` for each row in order.

    Only what the event in hand asked for is looked for. Its rows come before the next event's name, and the list also
    has events that were not executed after all, such as duplicates.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], tuple[Entry, Sequence[_Expected]]] = {}
        self._rows = 0
        self._current: Entry | None = None
        self._expected: dict[_Expected, None] = {}
        self.cause = NO_CAUSE  # of the rows that follow, as an event's detail says it

    @property
    def overflown(self) -> bool:
        """There are more than can be compared."""
        return self._rows > _MOST

    def add(self, content: bytes) -> None:
        """A part of the list. Raises ValueError or LookupError."""
        shapes, entries = mark.read(content)
        expected = [_Expected(shape) for shape in shapes]
        for entry in entries:
            self._rows += len(entry.rows or ())
            if not self.overflown:
                self._entries[entry.source, entry.key] = entry, expected
        # a transaction of one event does not name it
        self._turn_to(next(iter(self._entries.values())) if len(self._entries) == 1 else None)

    def turn(self, content: bytes) -> None:
        """What follows has this cause, by the content of a `mark.CAUSE`. Raises ValueError or LookupError."""
        named = mark.read_cause(content)
        self._turn_to(self._entries.get(named) if named else None)

    def _turn_to(self, found: "tuple[Entry, Sequence[_Expected]] | None") -> None:
        for it in self._expected:
            it.clear()
        self._expected = {}
        self._current, expected = found or (None, ())
        for number, key, row in (self._current.rows or ()) if self._current else ():
            expected[number].add(key, row)
            self._expected[expected[number]] = None
        entry = self._current
        hops = entry.hops if entry else max((it.hops for it, _ in self._entries.values()), default=0)
        self.cause = b'"hops":%d,"cause":%b' % (hops + 1, orjson.dumps(entry.key if entry else None))

    @property
    def unknown(self) -> bool:
        """Nobody knows what else might be touched: by the event for which it is done, or there are too many."""
        return self.overflown or (self._current is not None and self._current.rows is None)

    def takes(self, change: Change) -> bool:
        """Whether `change` is what was asked for."""
        if self.unknown:
            return True
        table = str(change.relation)
        return any(table in it.tables and it.takes(change) for it in self._expected)


class _Expected:
    """What statements of one shape asked for."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.tables = frozenset(".".join(table) for table in shape.tables)
        self._asked: Counter[str] = Counter()  # digest of key and columns → how often
        self._key_of: dict[str, str] = {}
        self._left: Counter[str] = Counter()  # digest of the key → how many of its statements have shown no row yet
        self._met: defaultdict[str, Counter[Row | None]] = defaultdict(Counter)  # row's digest → which rows were seen
        self._relation: Relation | None = None
        self._key: list[int] | None = None
        self._all: list[int] | None = None

    def add(self, key: str, row: str) -> None:
        """A statement, by its digests."""
        self._asked[row] += 1
        self._key_of[row] = key
        self._left[key] += 1

    def clear(self) -> None:
        """None of them any more."""
        for it in (self._asked, self._key_of, self._left, self._met):
            it.clear()

    def takes(self, change: Change) -> bool:
        """Whether one of them asked for `change`, of its table; it is counted then."""
        if change.relation is not self._relation:
            self._look_at(change.relation)
        match change.operation:
            case Operation.INSERT | Operation.UPDATE if self.shape.action != "delete":
                return self._written(change)
            case Operation.DELETE if self.shape.action != "insert":
                return self._deleted(change)
        return False

    def _look_at(self, relation: Relation) -> None:
        self._relation = relation
        places = {column.name: index for index, column in enumerate(relation.columns)}
        self._key = _indexes(places, self.shape.key)
        self._all = _indexes(places, [*self.shape.key, *self.shape.columns])

    def _written(self, change: Change) -> bool:
        if self._all is None:  # a publication that leaves columns out: the key has to do
            return self._key is None or self._take_left(_digest(change.after, self._key, change.before))
        row = _digest(change.after, self._all, change.before)
        asked = self._asked.get(row or "", 0)
        identity = self._identity(change)
        if row is None or self._met[row][identity] >= asked:
            return False
        self._met[row][identity] += 1
        self._take_left(self._key_of[row])
        return True

    def _deleted(self, change: Change) -> bool:
        """By its key; what the old key does not show, only its number tells."""
        old_key = [it for it, column in enumerate(change.relation.columns) if column.is_key]
        if self._key is None or (change.before_is_key and not set(self._key) <= set(old_key)):
            return self.shape.action == "delete" and self._take_left(next(iter(+self._left), None))
        key = _digest(change.before, self._key, None)
        if self.shape.action == "delete":
            return key in self._left
        # on its way to another partition; the INSERT is counted
        return self.shape.moves and self._left.get(key or "", 0) > 0

    def _take_left(self, key: str | None) -> bool:
        if key is None or self._left.get(key, 0) <= 0:
            return False
        self._left[key] -= 1
        return True

    def _identity(self, change: Change) -> Row | None:
        """Which row it is, where a statement may mean several and the server says which; else they are counted."""
        relation, after = change.relation, change.after
        if after is None or self.shape.action in {"insert", "upsert"} or relation.identity in "fn":
            return None
        return tuple(value for column, value in zip(relation.columns, after, strict=True) if column.is_key)


def _indexes(places: dict[str, int], names: Sequence[str]) -> list[int] | None:
    found = [places.get(name) for name in names]
    return None if None in found else [it for it in found if it is not None]


def _digest(row: Row | None, wanted: Sequence[int], before: Row | None) -> str | None:
    """None when a value is not there."""
    values: list[bytes | None] = []
    for index in wanted:
        value = row[index] if row is not None else UNCHANGED
        if value is UNCHANGED and before is not None:
            value = before[index] or UNCHANGED
        if not isinstance(value, bytes | None):
            return None
        values.append(value)
    return mark.digest(values)
