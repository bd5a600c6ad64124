"""How a reverse transaction marks itself, so that the forward path knows it (`figbridge.forward.echo`).

    inbox     nothing to do: the claim is the mark
    message   one more function call in the statement that begins the transaction: first, and outside any savepoint,
              because a savepoint that rolls back would take the mark and leave the data
    origin    once for each session, which must be a session of our own: an origin outlives ROLLBACK and DISCARD ALL, so
              behind a pool it would mark, and hide, what others write

With ``echo: touched_rows`` the list of what is touched goes first, whatever the mark is (`touched`); and if a
transaction has several events, each one's statements stand behind its name, so that what its triggers do has a cause.
What a deferred trigger does at the commit of such a transaction has none.
"""

from collections.abc import Callable, Sequence
from typing import Final, Literal, Self

import psycopg
from psycopg import sql

from figbridge import canary, legacy, mark
from figbridge.config import Config
from figbridge.reverse.mapping import Work
from figbridge.reverse.touched import Touching

_EMIT: Final = sql.SQL("SELECT pg_logical_emit_message(true, {prefix}, {content})")


class LoopGuard:
    """`kind` is ``legacy.loop-guard``, `slot` the bridge's; `touched_rows`: say what is touched. For one thread."""

    def __init__(self, kind: Literal["inbox", "message", "origin"], *, slot: str, touched_rows: bool) -> None:
        self._kind = kind
        self._slot = slot
        self._touching = Touching() if touched_rows else None

    @classmethod
    def of(cls, config: Config) -> Self | None:
        """What `config` asks for; None where the claim alone is the mark."""
        kind = config.legacy.loop_guard
        touched_rows = config.forward is not None and config.forward.echo == "touched_rows"
        if kind == "inbox" and not touched_rows:
            return None
        return cls(kind, slot=config.legacy.slot, touched_rows=touched_rows)

    def opened(self, connection: psycopg.Connection) -> None:
        """A new connection, in autocommit mode. Raises psycopg.Error, OriginInUse."""
        if self._kind == "origin":
            canary.bear_origin(connection, self._slot)

    @property
    def lists(self) -> bool:
        """Whether a transaction says what it touches."""
        return self._touching is not None

    def beginning(self, connection: psycopg.Connection, works: Sequence[Work]) -> Sequence[bytes]:
        """The statements that come behind BEGIN. Raises psycopg.Error."""
        if self._touching:
            return [_emit(mark.MARK, content) for content in self._touching.marks(connection, works)]
        return [_emit(mark.MARK, mark.UNLISTED)] if self._kind == "message" else []

    def naming(self, works: Sequence[Work]) -> Callable[[Work | None], bytes] | None:
        """The statement that stands before those of a work, and before the end (None); None where none is needed."""
        return _name if self._touching and len(works) > 1 else None


def require_free(config: Config) -> None:
    """For a command that writes as the bridge does: it should end, and not wait as a replica would.

    Raises OriginInUse while another session has the origin, LegacyUnavailable, BridgeError.
    """
    if config.legacy.loop_guard == "origin":
        with (
            legacy.connect(config.legacy.write_dsn, purpose="guard", autocommit=True) as connection,
            legacy.translated(),
        ):
            canary.bear_origin(connection, config.legacy.slot)


def _name(work: Work | None) -> bytes:
    return _emit(mark.CAUSE, mark.write_cause(work.event.source, work.key) if work else "null")


def _emit(prefix: str, content: str) -> bytes:
    return _EMIT.format(prefix=sql.Literal(prefix), content=sql.Literal(content)).as_bytes(None)
