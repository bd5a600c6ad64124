"""An update without a row whose row is there: a trigger suppressed it, or did something else in its place.

    BEFORE UPDATE … RETURN NULL          the row stays as it is
    INSTEAD OF UPDATE … RETURN NULL      the trigger of a view has done the work, or not

That is what the table's owner wants of it. So it is done: nothing to wait for, and what the trigger did is committed.

RACES. A row that came right behind the update is there as well, and its update is still to be done. So where the row is
found, all of it is done again in a transaction that sees one state of the tables from its beginning to its end: a row
that is there, is not updated and was not touched by anybody else (a serialization failure, 40001) is suppressed.
"""

from collections.abc import Iterable
from typing import Final

import psycopg

from figbridge.reverse.outcome import Applied, Outcome
from figbridge.reverse.statement import Shape, Statement, finding

REASON: Final = "suppressed"

# in the place of the BEGIN of `transaction`, whose snapshots are the statements'
BEGIN: Final = b"BEGIN ISOLATION LEVEL REPEATABLE READ"


def of(shape: Shape) -> Applied:
    """The outcome of such an update."""
    return Applied(Outcome.IGNORED, REASON, f"a trigger of {'.'.join(shape.table)} took the place of the update")


def there(connection: psycopg.Connection, statements: Iterable[object]) -> frozenset[Statement]:
    """The updates among `statements` whose row is there now. Raises psycopg.Error."""
    return frozenset(
        it
        for it in statements
        if isinstance(it, Statement)
        and it.shape.action == "update"
        and psycopg.RawCursor(connection).execute(finding(it.shape), it.parameters).rowcount
    )
