"""`figbridge conflicts`: what was in conflict, and a person's word on it.

`resolve` with the new values applies the event's part once more, under the rule that the new system wins: one
transaction claims a key of its own, locks the row, writes, and notes the resolution. So it is done once, an echo of it
is recognised like any other, and the bridge may run meanwhile.

It refuses to overwrite what it has not seen: a row that is not as it was found in the conflict, and an entity of which
a newer event was applied since. `force` overrules the first, never the second: that would undo a later decision of the
new system itself.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal

import orjson
import psycopg
from psycopg.rows import class_row

from figbridge import legacy
from figbridge.config import Config
from figbridge.errors import BridgeError, ConfigError, Problem
from figbridge.event import Named
from figbridge.preflight import catalogue
from figbridge.reverse.apply import Applier
from figbridge.reverse.conflict import Conflicts, Task
from figbridge.reverse.guard import LoopGuard
from figbridge.reverse.mapping import Mappings, Work
from figbridge.reverse.message import Malformed, parse, read
from figbridge.reverse.outcome import Applied, Outcome
from figbridge.reverse.statement import Statement
from figbridge.reverse.transaction import Suspects

Take = Literal["new", "legacy", "dismiss"]

SOURCE: Final = "figbridge.conflict"  # the inbox source of a resolution
_MOST: Final = 100
_COLUMNS: Final = (
    "id, source, idempotency_key, event_id, scope, identity, version::text, kind, decision, state, resolution, "
    "table_name, statement, expected::text, before::text, proposed::text, after::text, columns::text, message, "
    "event::text, created_at"
)
_NEWER: Final = """
    SELECT FROM figbridge.entity_version WHERE scope = %s AND identity = %s AND version > %s::numeric FOR UPDATE
"""
_CLOSE: Final = """
    UPDATE figbridge.conflict SET state = %s, resolution = %s, resolved_at = now()
    WHERE id = %s AND state IN ('open', 'decided')
"""


@dataclass(frozen=True, slots=True)
class Kept:
    """A row of figbridge.conflict; JSON as its text."""

    id: int
    source: str
    idempotency_key: str
    event_id: str
    scope: str
    identity: str
    version: str | None
    kind: str
    decision: str
    state: str
    resolution: str | None
    table_name: str
    statement: int
    expected: str | None
    before: str | None
    proposed: str | None
    after: str | None
    columns: str
    message: str
    event: str
    created_at: datetime

    def document(self) -> dict[str, Any]:
        """For a script, by way of orjson."""
        fields = dataclasses.asdict(self)
        for name in ("expected", "before", "proposed", "after", "columns", "event"):
            fields[name] = orjson.Fragment(fields[name]) if fields[name] else None  # to the last digit
        return fields | {"created_at": self.created_at.isoformat()}


class Unresolvable(BridgeError):
    """A conflict that cannot be resolved as it was asked; nothing was changed."""


def find(config: Config, *, state: str | None, kind: str | None, most: int = _MOST) -> list[Kept]:
    """The newest conflicts first; of any state and kind where None. Raises LegacyUnavailable, BridgeError."""
    query = (
        f"SELECT {_COLUMNS} FROM figbridge.conflict "  # noqa: S608 (a constant)
        "WHERE (%(state)s::text IS NULL OR state = %(state)s) AND (%(kind)s::text IS NULL OR kind = %(kind)s) "
        "ORDER BY id DESC LIMIT %(most)s"
    )
    with (
        _connected(config) as connection,
        legacy.translated(),
        connection.cursor(row_factory=class_row(Kept)) as cursor,
    ):
        return cursor.execute(query, {"state": state, "kind": kind, "most": most}).fetchall()


def get(config: Config, number: int) -> Kept:
    """One conflict. Raises Unresolvable when there is none, LegacyUnavailable, BridgeError."""
    with _connected(config) as connection, legacy.translated():
        return _get(connection, number)


def told(kept: Kept) -> str:
    """One line, without a value of a row."""
    columns = json.loads(kept.columns)
    who = f" ({', '.join(f'{column}: {by}' for column, by in columns.items())})" if columns else ""
    end = f" -> {kept.resolution}" if kept.resolution else ""
    return (
        f"{kept.id}  {kept.created_at:%Y-%m-%d %H:%M:%S}  {kept.state}{end}  {kept.kind}  {kept.table_name}  "
        f"{kept.decision}{who}  event {kept.event_id}"
    )


def shown(kept: Kept) -> Iterator[str]:
    """All of it, values too."""
    yield told(kept)
    yield f"entity     {kept.scope} / {kept.identity}" + (f", version {kept.version}" if kept.version else "")
    for name in ("expected", "before", "proposed", "after", "message", "event"):
        if value := getattr(kept, name):
            yield f"{name:<10} {value}"


def resolve(config: Config, number: int, take: Take, *, force: bool = False) -> str:
    """Close the conflict; what was done. Raises Unresolvable, ConfigError, LegacyUnavailable, BridgeError."""
    with _connected(config) as connection, legacy.translated():
        kept = _get(connection, number)
        if kept.state not in {"open", "decided"}:
            raise Unresolvable(f"conflict {number} is {kept.state} already", hint="nothing was changed")
        if take == "new":
            return _take_new(config, kept, force=force)
        state, resolution = ("dismissed", None) if take == "dismiss" else ("resolved", "legacy")
        _close(connection, number, state, resolution)
        return f"conflict {number} is {state}; the row stays as it is"


class Resolution(Conflicts):
    """The transaction in which a person's word for the new system is carried out."""

    force = True

    def __init__(self, kept: Kept, *, overwrite: bool) -> None:
        super().__init__()
        self._of = kept
        self._overwrite = overwrite

    def look(self, connection: psycopg.Connection, works: Sequence[Work]) -> None:
        """Refuse what is older than the newest event of its entity."""
        kept = self._of
        super().look(connection, works)
        if (
            kept.version
            and connection.execute(_NEWER, [kept.scope, kept.identity, kept.version]).fetchone() is not None
        ):
            raise Unresolvable(
                "a newer event of this entity was applied since: the new system has other values now",
                hint="keep the legacy values, or dismiss the conflict",
            )

    def locked(self, task: Task, number: int) -> None:
        """Refuse a row that nobody has looked at."""
        # a stale event, and one that the database refused, never saw its row
        looked = self._of.kind not in {"stale_version", "unique_other", "fk_missing"}
        if not looked or number != self._of.statement or self._overwrite:
            return
        if not _alike(task.found.text if task.found else None, self._of.before):
            raise Unresolvable(
                "the row is not as it was found in the conflict: somebody has written since",
                hint="look at the row; --force overwrites it with the new values",
            )

    def finish(self, connection: psycopg.Connection) -> bool:
        """Note it."""
        _close(connection, self._of.id, "resolved", "new")
        return True


def _alike(found: str | None, before: str | None) -> bool:
    """Whether two rows have the same values, to the last digit."""
    if found is None or before is None or found == before:
        return found == before
    try:
        return read(found, "the row") == read(before, "the row")
    except Malformed:  # nested too deeply for us: the texts have to tell
        return False


def _take_new(config: Config, kept: Kept, *, force: bool) -> str:
    work, section = _work(config, kept), config.reverse
    assert section is not None  # noqa: S101 (it has the mapping)
    guard = LoopGuard.of(config)
    applier = Applier(
        config.legacy.write_dsn,
        statement_timeout=section.statement_timeout,
        lock_timeout=section.lock_timeout,
        guard=guard,
    )
    with contextlib.closing(applier):
        try:
            outcome = applier.decide(work, Resolution(kept, overwrite=force))
        except Suspects as suspects:
            what = legacy.translate(suspects.error) if suspects.error else "the row to update is not there"
            raise Unresolvable(f"the new values cannot be written: {what}", hint="nothing was changed") from suspects
    return _said(kept, outcome)


def _said(kept: Kept, outcome: Applied) -> str:
    if outcome.outcome is Outcome.APPLIED:
        return f"conflict {kept.id} is resolved; the new values are written"
    if outcome.outcome is Outcome.IGNORED:
        return f"conflict {kept.id} is resolved; there was nothing to write ({outcome.reason})"
    raise Unresolvable(f"conflict {kept.id} was resolved by somebody else at the same time", hint="list it again")


def _work(config: Config, kept: Kept) -> Work:
    """The part of the event that the conflict was about; all of it where it was rejected."""
    event = parse(kept.event.encode())
    mapping = Mappings(config.reverse.mappings if config.reverse else ()).find(event)
    if mapping is None or not any(mapping.policies):
        what = f"no mapping with rules is for source {event.source!r} with detail-type {event.detail_type!r} any more"
        raise ConfigError("the conflict cannot be resolved", [Problem("reverse.mappings", what, "add it again")])
    work = mapping.prepare(event, again=True)
    if kept.decision != "rejected":
        rows = [it for it in work.statements if isinstance(it, Statement)]
        place = kept.statement - 1
        work = dataclasses.replace(work, statements=rows[place : place + 1], expected=work.expected[place : place + 1])
    return dataclasses.replace(
        work,
        event=Named(f"conflict {kept.id}", SOURCE, event.detail_type),
        identity=(SOURCE, str(kept.id)),
        payload_hash=hashlib.sha256(b"new").digest(),
        version=None,  # it was written with the decision
    )


def _close(connection: psycopg.Connection, number: int, state: str, resolution: str | None) -> None:
    if connection.execute(_CLOSE, [state, resolution, number]).rowcount == 0:
        raise Unresolvable(f"conflict {number} was closed by somebody else meanwhile", hint="nothing was changed")


def _get(connection: psycopg.Connection, number: int) -> Kept:
    with connection.cursor(row_factory=class_row(Kept)) as cursor:
        query = f"SELECT {_COLUMNS} FROM figbridge.conflict WHERE id = %s"  # noqa: S608 (a constant)
        found = cursor.execute(query, [number]).fetchone()
    if found is None:
        raise Unresolvable(f"there is no conflict {number}", hint="`figbridge conflicts list --all` has the numbers")
    return found


def _connected(config: Config) -> psycopg.Connection:
    connection = legacy.connect(config.legacy.write_dsn, purpose="conflicts", autocommit=True)
    try:
        with legacy.translated():
            connection.execute("SET client_encoding TO 'UTF8'")
            _require_rules(connection, config)
    except BaseException:
        connection.close()
        raise
    return connection


def _require_rules(connection: psycopg.Connection, config: Config) -> None:
    """Without rules there need be no table. Old conflicts of rules that were taken out are still there to be read."""
    mappings = config.reverse.mappings if config.reverse else ()
    if any(part.rules for mapping in mappings for part in mapping.parts):
        return
    name = (legacy.SCHEMA, "conflict")
    table = catalogue.tables(connection, [name]).get(name)
    if table is None or not table.readable:
        problem = Problem("reverse.mappings", "no mapping of the file has `conflicts`", "name the file of the bridge")
        raise ConfigError("there are no conflicts", [problem])
