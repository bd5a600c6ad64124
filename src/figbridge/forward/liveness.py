"""Who may be silent for how long: when the server gives up a replication connection, and when we do.

`sender_timeout`  how long the server keeps a walsender whose client says nothing. A client that vanished, is frozen, or
                  died behind a proxy that hides it holds the slot for so long, and a stand-by replica waits. So our
                  session sets its own wal_sender_timeout to 5 s (any role may), instead of the server's usual 60.
                  Status updates leave every quarter of it, also while the sink stands still; and a server that was
                  busy reads what we sent before it judges.
`silence`         how long we listen to a server that says nothing, although it was asked for an answer at half time.
                  The kernel finds hosts and networks that are gone (`figbridge.legacy.SOCKET`); what is left for this
                  limit is a proxy or firewall that keeps the connection and passes nothing on.

Who gives wal_sender_timeout to the role, to the database or in the DSN has chosen both.

INVARIANT. Neither limit can keep the bridge from getting on. A connection that ended because one was too short, without
the stream having moved, doubles both for the next one: a walsender that decodes one large transaction may be silent for
long, and a new connection only makes it begin again.

Pure: it reads no clock and owns no socket. Silence is counted in seconds in which we did listen: while we do not read
on purpose, or are frozen, the server's silence means nothing.
https://www.postgresql.org/docs/current/runtime-config-replication.html#GUC-WAL-SENDER-TIMEOUT
"""

import math
from typing import Final

from figbridge.change import Lsn

SENDER: Final = 5.0  # seconds: our session's wal_sender_timeout
SILENCE: Final = 20.0  # seconds; as long as the kernel takes to notice that a host is gone
_LONGEST: Final = 900.0  # seconds: doubling ends here


class Liveness:
    """Both limits over the successive connections of one slot."""

    def __init__(self) -> None:
        self.sender_timeout = math.inf  # of this session; infinite when the server never ends it
        self.silence = SILENCE
        self._factor = 1
        self._start = self._stuck = Lsn(0)  # where this connection began, and the last that a limit ended
        self._quiet = 0.0
        self._said = self._longest_pause = 0.0

    def opened(self, start: Lsn, configured: float, *, chosen: bool) -> float | None:
        """A connection is open that will stream behind `start`; its wal_sender_timeout is `configured` seconds, 0: off.

        The seconds that it should be set to; None when it stays as it is, because it was `chosen` or is right.
        """
        if start > self._stuck:
            self._factor = 1
        self._start = start
        least = configured if chosen and configured else SILENCE
        self.silence = max(least, min(least * self._factor, _LONGEST))
        wanted = min(SENDER * self._factor, configured or _LONGEST)
        if chosen or wanted == configured:
            self.sender_timeout = configured or math.inf
            return None
        self.sender_timeout = wanted
        return wanted

    def streaming(self, now: float) -> None:
        """The stream begins at the monotonic time `now`."""
        self._quiet = self._longest_pause = 0.0
        self._said = now

    def heard(self) -> None:
        """Bytes came from the server, or we did not listen."""
        self._quiet = 0.0

    def is_dead(self, waited: float) -> bool:
        """We listened for `waited` seconds more and nothing came. Whether that is enough."""
        self._quiet += waited
        return self._quiet >= self.silence

    @property
    def asks(self) -> bool:
        """Whether the next status update should ask for an answer. A server that has nothing to send sends nothing."""
        return self._quiet >= self.silence / 2

    def said(self, now: float) -> None:
        """A status update leaves at `now`."""
        self._longest_pause = max(self._longest_pause, now - self._said)
        self._said = now

    def ended(self, now: float) -> str:
        """The connection has ended; why, in words, if a limit ended it. The next one may have more time."""
        pause = max(self._longest_pause, now - self._said)
        if self._quiet >= self.silence:
            why = f"the server said nothing for {self._quiet:.1f} s and did not answer"
        elif pause >= self.sender_timeout:
            why = (
                f"this process said nothing for {pause:.1f} s, and its wal_sender_timeout is {self.sender_timeout:g} s"
            )
        else:
            return ""
        self._factor = min(self._factor * 2, int(_LONGEST))
        self._stuck = self._start
        return why
