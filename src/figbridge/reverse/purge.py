"""Old keys leave the inbox, and old records the tables of conflicts and rehearsals, in small batches, without an event.

The inbox is one plain table, so that its key is unique over the whole time it is kept: a unique index of a partitioned
table holds within each partition only, and a key could slip between two. Purging makes no events because the inbox's
publication carries inserts alone. What comes again after its key is gone is stopped by its version.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, LiteralString

import structlog
from psycopg import sql

from figbridge import legacy
from figbridge.retry import persist

_log = structlog.get_logger()

_BATCH: Final = 5_000  # rows of one DELETE: some milliseconds of locks nobody else wants
_BETWEEN: Final = 0.2  # seconds between two batches: the legacy application comes first
_PAUSE: Final = 600.0  # seconds after the last one
# One replica at a time, and the others do not wait for it. An advisory lock and not FOR UPDATE SKIP LOCKED, which takes
# the right to UPDATE; the inbox's keys are inserted and deleted, and nobody needs to alter them.
_DELETE: Final = sql.SQL("""
    DELETE FROM figbridge.{table}
    WHERE (SELECT pg_try_advisory_xact_lock(hashtext('figbridge purge'), hashtext({name}))) AND ctid = ANY (ARRAY(
        SELECT ctid FROM figbridge.{table} WHERE {since} < now() - %s * interval '1 day' AND {condition} LIMIT %s))
""")


@dataclass(frozen=True, slots=True)
class Kept:
    """A table of ours whose rows leave `days` after the time in `since`, if they meet `condition`."""

    table: str
    since: str
    days: float
    condition: LiteralString = "true"


def inbox(days: float) -> Kept:
    """The applied keys."""
    return Kept("inbox", "applied_at", days)


def conflicts(days: float) -> Kept:
    """What is decided; an open conflict waits for a person, however long."""
    return Kept("conflict", "created_at", days, "state <> 'open'")


def rehearsals(days: float) -> Kept:
    """What a dry run would have changed."""
    return Kept("dry_run", "created_at", days)


class Purge:
    """One loop over the tables in `kept`."""

    name = "purge"

    def __init__(self, dsn: str, kept: Sequence[Kept], *, pause: float = _PAUSE) -> None:
        self._dsn = dsn
        self._kept = kept
        self._pause = pause

    def run(self, stop: threading.Event) -> None:
        """Until `stop`. Raises BridgeError when a table may not be deleted from."""
        while not stop.is_set():
            most = 0
            for kept in self._kept:
                what = f"purge the {kept.table}"
                most = max(most, persist(lambda kept=kept: purge(self._dsn, kept), what=what, stop=stop))  # type: ignore[misc]
            stop.wait(_BETWEEN if most == _BATCH else self._pause)


def purge(dsn: str, kept: Kept) -> int:
    """Delete one batch of rows that are old enough; how many, none while another replica does the same.

    Raises as `legacy.connect`.
    """
    query = _DELETE.format(
        table=sql.Identifier(kept.table),
        name=sql.Literal(kept.table),
        since=sql.Identifier(kept.since),
        condition=sql.SQL(kept.condition),
    )
    with legacy.connect(dsn, purpose="purge", autocommit=True) as connection, legacy.translated():
        purged = connection.execute(query, [kept.days, _BATCH]).rowcount
    if purged:
        _log.info("old rows purged", table=kept.table, rows=purged, days=kept.days)
    return purged
