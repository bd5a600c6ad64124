"""Streams that broke off: what the server's words mean, and how long to wait before the next one.

The first time there is no reason to wait: the server was restarted, somebody ended a backend. A stream that breaks off
again without having moved will do so again, and each time the server decodes everything up to there. So the bridge
backs off, is not ready, and says it no oftener than every 30 s.

Pure: it reads no clock.
"""

from typing import Final

from figbridge.change import Lsn
from figbridge.errors import BridgeError, SlotInUse, SlotLost, SourceDisconnected, SourceError
from figbridge.retry import Backoff

_FIRST: Final = 0.2  # seconds: a server that accepts and cuts at once must not be hammered
_SHORT: Final = 2.0  # seconds at most, while the next try may do: an application comes back from a failover as soon
_LASTING: Final = 30.0  # seconds at most, when only a human can end it
# Classes of SQLSTATE with which a stream ends that the next one need not end with: connection, transaction state,
# conflict with recovery on a standby, resources, object in use, operator, input and output.
# https://www.postgresql.org/docs/current/errcodes-appendix.html
_PASSING: Final = ("08", "25", "40", "53", "55", "57", "58")
_WHOLE: Final = 30.0  # seconds for which a stream was open; one that lived so long was in order, however quiet


class Interruptions:
    """Those of one slot's stream that followed one another at one place."""

    def __init__(self) -> None:
        self._count = 0
        self._place = Lsn(0)
        self._since = 0.0
        self._passing, self._lasting = (Backoff("stream", longest=longest) for longest in (_SHORT, _LASTING))

    def opened(self, place: Lsn, now: float) -> None:
        """A stream begins behind `place` at the monotonic time `now`."""
        self._place, self._since = place, now

    @property
    def stuck(self) -> bool:
        """Whether the last stream ended where it had begun, and so had the one before it."""
        return self._count > 1

    def moved(self, place: Lsn) -> bool:
        """The stream has come to `place`. Whether it was stuck until now."""
        if place <= self._place:
            return False
        was, self._count = self.stuck, 0
        return was

    def seconds(self, error: BridgeError, place: Lsn, now: float) -> float:
        """Until the next stream, after this one ended with `error` at `place`; logged if that is news."""
        if place > self._place or (now - self._since > _WHOLE and not error.urgent):
            self._count = 0
        self._count += 1
        backoff = self._lasting if error.urgent else self._passing
        return max(_FIRST, backoff.seconds(error, self._count))


def meaning(state: str | None, text: str, *, slot: str, streaming: bool, why: str) -> SourceError:
    """What the caller must do about the SQLSTATE with which a replication connection of `slot` ended.

    `why` is what is known beside the server's `text`. https://www.postgresql.org/docs/current/errcodes-appendix.html
    """
    match state:
        case "55006":
            return SlotInUse(
                f"replication slot {slot!r} is in use: {text}",
                hint="one bridge at a time reads a slot; this one waits and takes over when the other is gone",
            )
        case "42704" if streaming:  # the slot was there to start with: pgoutput misses its publication
            return SourceError(
                text,
                hint="the publication was dropped, or made after the slot, and changes are in no event; also if "
                "there is one again. Only a new slot helps: "
                f"SELECT pg_drop_replication_slot('{slot}'); then `figbridge init`, and copy the tables anew",
            )
        case "42704" | "55000" | "58P01":
            return SlotLost(
                f"replication slot {slot!r} cannot be read: {text}",
                hint="if it never existed: `figbridge init`. If it was dropped or invalidated, changes since its "
                "last confirmed position are gone from the WAL: create it again and reload the tables",
            )
        case "0A000" | "42501" | "42601" | "22023":
            return SourceError(text, hint="`figbridge check` says what is missing")
        case str() if streaming and not state.startswith(_PASSING):
            failed = SourceDisconnected(
                f"the server cannot send the stream: {text} (SQLSTATE {state})",
                hint="if it fails at one change each time (a row too large for a message, a filter of the "
                "publication that fails), nothing behind it leaves, and only a new slot helps: "
                f"SELECT pg_drop_replication_slot('{slot}'); then `figbridge init`, and copy the tables anew",
            )
            failed.urgent = True
            return failed
        case _:
            text = f"{text} ({why})" if why else text
            return SourceDisconnected(f"no replication connection: {text}", hint="the slot keeps our place")
