"""Who reads which shard of a stream, and how far: figbridge.stream_shard in the legacy database.

A lease has an end, by the database's clock. Its holder renews it; when it does not, another one takes the shard over
from the checkpoint. Everybody aims at an equal share: who has too few takes free shards, and one at a time from who has
most.

INVARIANT. A shard is read only when all of its parents are read to their end, so the records of a key keep their order
through a split or a merge. https://docs.aws.amazon.com/streams/latest/dev/kinesis-using-sdk-java-after-resharding.html

WHY A LEASE THAT IS TAKEN WHILE ITS HOLDER STILL APPLIES DOES NO HARM. Both then apply the same records in the same
order; whoever claims an event first keeps the other one waiting at its key, who then finds a duplicate. Only the
checkpoint must not go back, so it is written by the holder alone.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Final, NamedTuple

import psycopg

from figbridge import legacy

_MINE: Final = "stream = %(stream)s AND subscriber = %(subscriber)s"
_READABLE: Final = f"""
    {_MINE} AND NOT ended AND NOT EXISTS (
        SELECT FROM figbridge.stream_shard p WHERE p.stream = s.stream AND p.subscriber = s.subscriber
                                               AND p.shard = ANY (s.parents) AND NOT p.ended)
"""
_REGISTER: Final = """
    INSERT INTO figbridge.stream_shard (stream, subscriber, shard, parents, since)
    SELECT %(stream)s, %(subscriber)s, n.shard, n.parents, %(since)s::timestamptz
    FROM json_to_recordset(%(shards)s::json) AS n (shard text, parents text[])
    ON CONFLICT DO NOTHING
"""
_KNOWN: Final = f"SELECT shard, ended FROM figbridge.stream_shard WHERE {_MINE}"  # noqa: S608
_RENEW: Final = f"""
    UPDATE figbridge.stream_shard SET held_until = now() + %(seconds)s * interval '1 second'
    WHERE {_MINE} AND holder = %(holder)s AND shard = ANY (%(shards)s) RETURNING shard
"""  # noqa: S608
_SHARE: Final = f"""
    SELECT count(*), count(DISTINCT holder) FILTER (WHERE held_until >= now() AND holder <> %(holder)s)
    FROM figbridge.stream_shard s WHERE {_READABLE}
"""  # noqa: S608
_TAKE: Final = f"""
    UPDATE figbridge.stream_shard t SET holder = %(holder)s, held_until = now() + %(seconds)s * interval '1 second'
    FROM (SELECT s.shard FROM figbridge.stream_shard s WHERE {_READABLE} AND (holder IS NULL OR held_until < now())
          ORDER BY s.shard LIMIT %(number)s FOR UPDATE SKIP LOCKED) AS free
    WHERE t.stream = %(stream)s AND t.subscriber = %(subscriber)s AND t.shard = free.shard
    RETURNING t.shard, t.checkpoint, t.since, extract(epoch FROM now() - t.checkpoint_at)::float8
"""  # noqa: S608
_STEAL: Final = f"""
    UPDATE figbridge.stream_shard t SET holder = %(holder)s, held_until = now() + %(seconds)s * interval '1 second'
    FROM (SELECT min(shard) AS shard FROM figbridge.stream_shard WHERE {_MINE} AND NOT ended AND holder <> %(holder)s
          AND held_until >= now() GROUP BY holder HAVING count(*) > %(number)s + 1
          ORDER BY count(*) DESC, holder LIMIT 1) AS most
    WHERE t.stream = %(stream)s AND t.subscriber = %(subscriber)s AND t.shard = most.shard
    RETURNING t.shard, t.checkpoint, t.since, extract(epoch FROM now() - t.checkpoint_at)::float8
"""  # noqa: S608
_CHECKPOINT: Final = f"""
    UPDATE figbridge.stream_shard s SET checkpoint = n.sequence, checkpoint_at = now()
    FROM unnest(%(shards)s::text[], %(sequences)s::text[]) AS n (shard, sequence)
    WHERE {_MINE} AND s.shard = n.shard AND holder = %(holder)s RETURNING s.shard
"""  # noqa: S608
_END: Final = f"""
    UPDATE figbridge.stream_shard SET ended = true, holder = NULL, held_until = NULL
    WHERE {_MINE} AND shard = ANY (%(shards)s) AND (holder = %(holder)s OR %(anybodys)s)
"""  # noqa: S608
_RELEASE: Final = f"""
    UPDATE figbridge.stream_shard SET holder = NULL, held_until = NULL
    WHERE {_MINE} AND holder = %(holder)s AND shard = ANY (%(shards)s)
"""  # noqa: S608


class Lease(NamedTuple):
    """A shard that is ours now. It begins behind `checkpoint`, else at `since`, else with the oldest record.

    `age` is how long ago the checkpoint was written, in seconds.
    """

    shard: str
    checkpoint: str | None
    since: datetime | None
    age: float | None


class Leases:
    """Those of one holder, over a connection of its own. All methods raise LegacyUnavailable or BridgeError.

    `stream` names the stream and when it was made, because a new one of the same name has other shards by the same ids.
    """

    def __init__(self, dsn: str, *, stream: str, subscriber: str, holder: str, seconds: float) -> None:
        self._dsn = dsn
        self._names = {"stream": stream, "subscriber": subscriber, "holder": holder, "seconds": seconds}
        self._connection: psycopg.Connection | None = None

    def register(self, shards: Mapping[str, Sequence[str]], since: datetime | None) -> list[str]:
        """Make shards known, by id, with their parents; the ids that are known, not ended, and not among them.

        `since` is where to begin if none was known before.
        """
        known = dict(self._all(_KNOWN))
        new = [{"shard": shard, "parents": list(shards[shard])} for shard in shards if shard not in known]
        if new:
            self._all(_REGISTER, shards=json.dumps(new), since=None if known else since)
        return [shard for shard, ended in known.items() if not ended and shard not in shards]

    def renew(self, shards: Iterable[str]) -> set[str]:
        """Those of `shards` that are still ours."""
        return {shard for (shard,) in self._all(_RENEW, shards=list(shards))}

    def take(self, held: int) -> list[Lease]:
        """More shards, up to a fair share, for a holder that has `held`."""
        ((readable, others),) = self._all(_SHARE)
        wanted = math.ceil(readable / (others + 1)) - held
        if wanted <= 0:
            return []
        taken = [Lease(*row) for row in self._all(_TAKE, number=wanted)]
        return taken or [Lease(*row) for row in self._all(_STEAL, number=held)]

    def checkpoint(self, sequences: Mapping[str, str]) -> set[str]:
        """Records up to these sequence numbers are done; the shards for which it was ours to say so."""
        shards, numbers = list(sequences), list(sequences.values())
        return {shard for (shard,) in self._all(_CHECKPOINT, shards=shards, sequences=numbers)}

    def end(self, shards: Sequence[str], *, anybodys: bool = False) -> None:
        """They are read to their end; with `anybodys` whoever holds them, because they are gone."""
        self._all(_END, shards=list(shards), anybodys=anybodys)

    def release(self, shards: Iterable[str]) -> None:
        """Anybody may have them."""
        self._all(_RELEASE, shards=list(shards))

    def close(self) -> None:
        """Close the connection; leases end by themselves."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _all(self, query: str, **parameters: object) -> list[tuple]:  # type: ignore[type-arg]  # as the query says
        if self._connection is None or self._connection.closed:
            self._connection = legacy.connect(self._dsn, purpose="kinesis", autocommit=True)
        with legacy.translated():
            cursor = self._connection.execute(query, {**self._names, **parameters})
            return cursor.fetchall() if cursor.description else []
