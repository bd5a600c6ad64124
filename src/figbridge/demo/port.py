"""A TCP port that stays free for the server that is to have it, also between two lives of that server."""

import socket
import sys
from typing import Self


class HeldPort:
    """A free port of 127.0.0.1, and held: until `close` the kernel gives it to nobody who asks for any port.

    Without that, what connects anywhere in the meantime may be given it as the port of its own end, and the server
    then fails with "Address already in use". The holder is bound and does not listen, so that a server which sets
    SO_REUSEADDR, as PostgreSQL, PgBouncer and Python's HTTPServer do, may listen there all the same (socket(7)). Only
    Linux lets it; elsewhere the port is known and not held.

    Closed by itself when it is collected.
    """

    def __init__(self) -> None:
        self._holder = socket.socket()
        self._holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._holder.bind(("127.0.0.1", 0))
        self.number = int(self._holder.getsockname()[1])
        if sys.platform != "linux":
            self._holder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Let everybody have it."""
        self._holder.close()
