"""Where a chunk ends whose rows must satisfy a condition: a number of rows further on, whether these do or not.

Of a condition that few rows satisfy, the server would look through the table for as long as a statement may take, and
find none; tried again, it would look through the same rows. So it is asked for one stretch after another, and each is
a chunk, with rows or without. One that takes too long is given up by the server, before the connection's patience ends,
so that what ended it is known, and fewer rows are looked at the next time.
"""

from collections.abc import Sequence
from typing import Final

import psycopg

from figbridge.forward.snapshot import plan as plans
from figbridge.forward.snapshot.plan import Cursor, Plan

_TIMEOUT: Final = "SET LOCAL statement_timeout = '20s'"


class Stretch:
    """The rows behind a cursor, up to `last`, whose successor has the key `beyond`; None: all that there are."""

    def __init__(self, last: Cursor | None, beyond: Sequence[str] | None) -> None:
        self.last, self.beyond = last, beyond

    @classmethod
    def behind(cls, connection: psycopg.Connection, plan: Plan, cursor: Cursor | None, rows: int) -> "Stretch":
        """So many rows; all, if their keys are not UTF-8, which no statement can name. Raises psycopg.Error.

        What follows in the transaction has no more time than this.
        """
        connection.execute(_TIMEOUT)
        try:
            found = connection.execute(plans.key_ends(plan, cursor, rows)).fetchall()
        except UnicodeDecodeError:
            found = []
        if len(found) < 2:
            return cls(None, None)
        return cls(plans.cursor(plan, found[0]), found[1])


ALL: Final = Stretch(None, None)
