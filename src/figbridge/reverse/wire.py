"""Statements ahead of their answers, over libpq's pipeline mode.

psycopg's own pipeline would do, but for two things. It gives Python's lock away some four times a statement, and gets
it back from the thread that parses the next batch, while the server waits; and it cannot wait for one answer and leave
those behind it to come. https://www.postgresql.org/docs/current/libpq-pipeline-mode.html

INVARIANT. Between `enter` and `leave` the connection is not psycopg's to use. And psycopg prepares nothing on it: after
a ROLLBACK, DROP or ALTER it forgets its statements by DEALLOCATE ALL, which would take those of the wire with them.
"""

import contextlib
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

import psycopg
from psycopg import generators
from psycopg.abc import PQGen
from psycopg.errors import error_from_result
from psycopg.pq import ExecStatus, PipelineStatus

_MOST: Final = 100  # prepared statements: of updates of single columns there may be any number; psycopg's own limit
_TEXT: Final = 0
_BINARY: Final = 1
_FINE: Final = (ExecStatus.COMMAND_OK, ExecStatus.TUPLES_OK)


class Answer:
    """What a statement did, once it is there: as much of a cursor as is asked for."""

    __slots__ = ("_result", "prepares", "query")

    def __init__(self, query: str | bytes, *, prepares: bool = False) -> None:
        self.query, self.prepares = query, prepares
        self._result: Any = None

    def settle(self, result: Any) -> None:
        """The server's answer, which is not an error."""
        self._result = result

    @property
    def rowcount(self) -> int:
        """How many rows the statement wrote or found; -1 without an answer."""
        return -1 if self._result is None or self._result.command_tuples is None else self._result.command_tuples

    @property
    def statusmessage(self) -> str | None:
        """The command's tag, such as ``COMMIT``; None without an answer."""
        return None if self._result is None else self._result.command_status.decode()

    def fetchall(self) -> list[tuple[int, ...]]:
        """The rows, all of integers."""
        found = self._result
        return [tuple([int(found.get_value(row, it)) for it in range(found.nfields)]) for row in range(found.ntuples)]


class Wire:
    """The pipeline of `connection`, which is in autocommit mode and speaks UTF-8. For one thread."""

    def __init__(self, connection: psycopg.Connection) -> None:
        self._connection = connection
        self._pgconn = connection.pgconn
        self._names: dict[str | bytes, bytes] = {}
        self._made = 0
        self._due: deque[Answer | None] = deque()  # None: the end of what `receive` waits for

    @property
    def prepares(self) -> bool:
        """Whether the server may keep statements for us: `psycopg.Connection.prepare_threshold`."""
        return self._connection.prepare_threshold is not None

    def enter(self) -> None:
        """Begin, if that was not done."""
        if self._pgconn.pipeline_status == PipelineStatus.OFF:
            self._pgconn.enter_pipeline_mode()

    def leave(self) -> None:
        """Give the connection back to psycopg, unless it is broken. Answers that are due are read first."""
        if self._due and self._due[-1] is not None and not self._connection.closed:
            self.sync()
        while self._due and not self._connection.closed:
            with contextlib.suppress(psycopg.Error):
                self.receive()
        if not self._connection.closed and self._pgconn.pipeline_status != PipelineStatus.OFF:
            self._pgconn.exit_pipeline_mode()

    def send(self, query: str | bytes, parameters: Sequence[str | bytes] = (), *, prepare: bool = False) -> Answer:
        """Put a statement on its way, ``$1`` in it; bytes are of type bytea. Nothing is waited for.

        It is prepared where `prepare` asks for it and the connection `prepares`. Raises psycopg.Error.
        """
        answer = Answer(query)
        values = [_text(it) if isinstance(it, str) else it for it in parameters]
        formats = [_TEXT if isinstance(it, str) else _BINARY for it in parameters]
        if prepare and self.prepares:
            name = self._prepared(query)
            self._pgconn.send_query_prepared(name, values, param_formats=formats)
        else:
            self._pgconn.send_query_params(_bytes(query), values, param_formats=formats)
        self._due.append(answer)
        return answer

    def sync(self) -> None:
        """The end of what is received together; what failed before it does not touch what comes behind."""
        self._pgconn.pipeline_sync()
        self._due.append(None)

    def flush(self) -> None:
        """Let the server begin. What the socket does not take goes with `receive`."""
        self._pgconn.flush()

    def receive(self) -> None:
        """Wait for the answers up to the next `sync`. Raises psycopg.Error: the first statement's that failed."""
        error = self._connection.wait(self._answers())
        if error is not None:
            raise error

    def _prepared(self, query: str | bytes) -> bytes:
        name = self._names.pop(query, None)
        if name is None:
            if len(self._names) >= _MOST:
                oldest = self._names.pop(next(iter(self._names)))
                self._pgconn.send_query_params(b"DEALLOCATE " + oldest, None)
                self._due.append(Answer(b""))
            self._made += 1
            name = b"figbridge_%d" % self._made
            self._pgconn.send_prepare(name, _bytes(query))
            self._due.append(Answer(query, prepares=True))
        self._names[query] = name  # the last one used is the last one to go
        return name

    def _answers(self) -> PQGen[psycopg.Error | None]:
        yield from generators.send(self._pgconn)
        error: psycopg.Error | None = None
        while self._due:
            results = yield from generators.fetch_many(self._pgconn)
            answer = self._due.popleft()
            if answer is None:
                break
            (result,) = results
            if result.status in _FINE:
                answer.settle(result)
                continue
            if answer.prepares:
                self._names.pop(answer.query, None)
            if error is None:
                error = error_from_result(result, encoding="utf-8")
        return error


def _text(parameter: str) -> bytes:
    written = parameter.encode()
    if b"\0" in written:  # libpq would send what is in front of it
        raise psycopg.DataError("a text cannot hold NUL")
    return written


def _bytes(query: str | bytes) -> bytes:
    return query.encode() if isinstance(query, str) else query
