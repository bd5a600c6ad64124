"""Logical messages (`pg_logical_emit_message`) → events: which ones, and in what form.

    prefix figbridge.backfill     ours: that rows of a table are read again (`figbridge.forward.snapshot.backfill`)
    any other figbridge.*         ours: a heartbeat is noted, none is an event
    forward.outbox.message-prefix an outbox event (`figbridge.forward.outbox`)
    one of forward.messages       an event with op ``message``
    any other                     nobody asked for it: dropped

The detail of ``message``: id, op, schema and table (null), key and prefix (the prefix), transactional, encoding,
content, position, committed_at, hops, cause. With ``forward.format: debezium`` it is Debezium's (`debezium`).

INVARIANT. No byte of the content is lost or interpreted: it is a JSON string of its text, or base64 where it is no
text (``encoding`` says which). Content that is to be JSON belongs into the outbox, which checks it.

What it does not do: acknowledge. A message may be acknowledged like a commit's end; `capture` says when.
https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-REPLICATION
"""

import base64
from collections.abc import Sequence
from datetime import datetime
from typing import Final

import orjson
import psycopg

from figbridge.change import Begin, LogicalMessage
from figbridge.event import Event, Rejection
from figbridge.forward import debezium, heartbeat, place
from figbridge.forward.form import Named
from figbridge.forward.heartbeat import Heartbeats
from figbridge.forward.outbox import MALFORMED, Outbox, Unroutable
from figbridge.forward.place import Place
from figbridge.forward.snapshot import backfill
from figbridge.forward.table import Naming

OURS: Final = "figbridge."  # no message of this prefix is anybody else's; the configuration refuses to name one


class Messages:
    """Decides about each logical message of the stream. One thread, that of the capture loop.

    `prefixes` is forward.messages: exact, or with a trailing ``*``. `codec` is the Python name of the database's
    encoding (`server_codec`): the server converts a prefix to UTF-8, but sends the content's bytes as they are.
    `slot` is ours; other bridges may write to the same database.
    """

    def __init__(
        self,
        prefixes: Sequence[str],
        naming: Naming,
        *,
        outbox: Outbox | None = None,
        heartbeats: Heartbeats | None = None,
        codec: str = "utf-8",
        slot: str = "",
    ) -> None:
        self._slot = slot
        self._exact = frozenset(prefix for prefix in prefixes if not prefix.endswith("*"))
        self._beginnings = tuple(prefix[:-1] for prefix in prefixes if prefix.endswith("*"))
        self._naming = naming
        self._outbox = outbox
        self._heartbeats = heartbeats
        self._codec = codec

    def event(
        self, message: LogicalMessage, begin: Begin | None, identity: str, sent_at: datetime
    ) -> Event | Rejection | None:
        """What leaves of `message`: an event, one for the dead letters, or nothing.

        `begin` is the open transaction's, None outside; `identity` is ``<system identifier>-<slot>-<timeline>``;
        `sent_at` is the send time of the XLogData.
        """
        prefix = message.prefix
        if prefix.startswith(OURS):
            if self._heartbeats is not None and prefix == heartbeat.PREFIX:
                self._heartbeats.seen(message)
            if prefix == backfill.PREFIX and begin is not None:
                where = place.of_message(message, begin, identity, sent_at)
                return backfill.event((self._text(message.content) or "").encode(), self._slot, where, self._naming)
            return None
        routed = self._outbox is not None and prefix == self._outbox.message_prefix
        if not routed and not self._selects(prefix):
            return None
        where = place.of_message(message, begin, identity, sent_at)
        content = self._text(message.content)
        if self._outbox is None or not routed:
            return self._event(message, content, where, begin)
        try:
            return self._outbox.message_event(content, where)
        except Unroutable as why:
            return Rejection(self._event(message, content, where, begin), MALFORMED, str(why), retryable=False)

    def _selects(self, prefix: str) -> bool:
        return prefix in self._exact or (bool(self._beginnings) and prefix.startswith(self._beginnings))

    def _text(self, content: bytes) -> str | None:
        try:
            return content.decode(self._codec)
        except UnicodeDecodeError:
            return None

    def _event(self, message: LogicalMessage, content: str | None, where: Place, begin: Begin | None) -> Event:
        named = self._naming.of("message", message.prefix, "emitted")
        prefix = orjson.dumps(message.prefix)
        if content is None:
            encoding, shown = b"base64", b'"%b"' % base64.b64encode(message.content)
        else:
            encoding, shown = b"text", orjson.dumps(content)
        if self._naming.form == "debezium":
            detail = debezium.message(message, where, named, self._naming.database, begin)
            return self._named(message, where, named, detail)
        detail = (
            b'{"id":"%b","op":"message","schema":null,"table":null,"key":{"prefix":%b},"prefix":%b,'
            b'"transactional":%b,"encoding":"%b","content":%b%b'
        ) % (
            where.id.encode(),
            prefix,
            prefix,
            b"true" if message.transactional else b"false",
            encoding,
            shown,
            where.tail,
        )
        return self._named(message, where, named, detail)

    @staticmethod
    def _named(message: LogicalMessage, where: Place, named: Named, detail: bytes) -> Event:
        return Event(
            id=where.id,
            source=named.source,
            detail_type=named.detail_type,
            key=f'message:{{"prefix":{orjson.dumps(message.prefix).decode()}}}',
            time=where.time,
            detail=detail,
            resources=named.resources,
        )


def server_codec(connection: psycopg.Connection) -> str:
    """The Python codec of the encoding in which this connection's database stores text.

    ``utf-8`` for SQL_ASCII, which stores bytes of no known encoding: what is not UTF-8 then leaves as base64.
    Changes the connection's client_encoding.
    """
    connection.execute("SELECT set_config('client_encoding', current_setting('server_encoding'), false)")
    codec = connection.info.encoding
    return "utf-8" if codec == "ascii" else codec
