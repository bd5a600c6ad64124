"""Mappings held against the live catalogue, at the start and when it changes: a bad one fails, not the process.

A column that is gone fails the mappings that name it: their events become dead letters (``mapping_broken``) without a
try, the others go on, and when the column is back, so is the mapping. The same probes as `figbridge check` are asked.
SQL of the user's own is not looked into; the server does that when an event comes.
"""

import time
from collections.abc import Callable
from typing import Final

import psycopg
import structlog

from figbridge import legacy
from figbridge.metrics import Metrics
from figbridge.preflight import reverse
from figbridge.reverse import spelling
from figbridge.reverse.mapping import Mapping, Mappings
from figbridge.reverse.outcome import unavailable

_log = structlog.get_logger()

_PAUSE: Final = 10.0  # seconds between two looks
# What a mapping can stumble over: columns, their types and defaults, keys, rights, and the table itself.
_FINGERPRINT: Final = """
    SELECT md5(string_agg(t.found::text, '|' ORDER BY t.found::text))
    FROM (
        SELECT (c.oid, c.relkind, c.relacl, a.attname, a.atttypid, a.atttypmod, a.attnotnull, a.atthasdef,
                a.attidentity, a.attgenerated, a.attacl) AS found
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        WHERE (n.nspname, c.relname) IN (SELECT * FROM unnest($1::text[], $2::text[]))
        UNION ALL
        SELECT (i.indexrelid, i.indisunique, i.indisvalid, i.indkey::text, '', '', '', '', '', '', '')
        FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE (n.nspname, c.relname) IN (SELECT * FROM unnest($1::text[], $2::text[]))
    ) AS t
"""


class Drift:
    """Looks at the catalogue over `connection`'s connection, which must be idle. For its thread."""

    def __init__(self, connection: Callable[[], psycopg.Connection], mappings: Mappings, metrics: Metrics) -> None:
        self._connection = connection
        self._mappings = mappings
        self._metrics = metrics
        self._seen: str | None = None
        self._look_at = 0.0
        names = sorted({table for mapping in mappings.all for table in mapping.tables})
        self._names = [[schema for schema, _ in names], [table for _, table in names]]

    def look(self) -> None:
        """See whether the tables are as they were; if not, which mappings fit. Raises LegacyUnavailable, BridgeError.

        Those that did not fit are looked at in any case.

        At most every ten seconds, and after `hurry`.
        """
        if not self.due:
            return
        try:
            connection = self._connection()
            row = psycopg.RawCursor(connection).execute(_FINGERPRINT, self._names).fetchone()
            seen = str(row[0]) if row else ""
            for index, mapping in enumerate(self._mappings.all):
                if seen != self._seen or mapping.broken:  # what mends one need not show in the fingerprint
                    self._judge(connection, index, mapping)
            self._seen = seen
        except psycopg.Error as error:
            raise unavailable(error) from error
        self._look_at = time.monotonic() + _PAUSE

    @property
    def due(self) -> bool:
        """Whether it is time for a look."""
        return time.monotonic() >= self._look_at

    def hurry(self) -> None:
        """Look the next time, because a statement met something that is not there."""
        self._look_at = 0.0

    def _judge(self, connection: psycopg.Connection, index: int, mapping: Mapping) -> None:
        errors = [it for it in reverse.inspect(connection, index, mapping.section) if it.level == "error"]
        broken = "; ".join(f"{it.where}: {it.what}" for it in errors) or None
        if broken and broken != mapping.broken:
            remedy = "; ".join(it.remedy for it in errors)
            _log.error("a mapping does not fit its table: its events go to the dead letters", why=broken, hint=remedy)
        elif mapping.broken and not broken:
            _log.warning("a mapping fits its table again", mapping=index)
        mapping.broken = broken
        if mapping.tables:
            mapping.primary_key = legacy.primary_key_of(connection, *mapping.tables[0])
            mapping.spelling = spelling.of_table(connection, *mapping.tables[0])
        self._metrics.broken_mappings.set(sum(it.broken is not None for it in self._mappings.all))
