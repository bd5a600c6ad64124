"""Which idempotency keys are ours, and which events are newer than what was applied: two statements, a row an event.

Their parameters are arrays, a column each: PostgreSQL reads them in two thirds of the time that JSON takes. What all
events have in common is sent once, and the array that would repeat it is empty: `unnest` fills up with nulls.

INVARIANT. The claim is the first to write WAL, which makes it the mark of the loop guard (`figbridge.forward.echo`).

Claims and versions are taken in the order of their keys, so two replicas with overlapping batches wait for each other
and never in a circle.
"""

from collections.abc import Iterable, Sequence
from typing import Final

import psycopg

from figbridge.reverse.mapping import Work
from figbridge.reverse.order import behind
from figbridge.reverse.outcome import KEY_REUSE, Applied, Outcome

_NONE: Final = "{}"  # the array of a column that is the same for all, or is not needed
_DIGEST: Final = 32  # bytes of a payload's hash
# What is about an entity that waits in the park is not claimed: it would overtake. Unless it brings the very row that
# all of the parked ones wait for. Nor is what is of a message group that waits there (`park` says why both are asked).
# Without entities nothing is claimed while anything waits.
_INSERT: Final = f"""
    INSERT INTO figbridge.inbox (source, idempotency_key, payload_hash, event_id)
    SELECT coalesce(c.source, $1::text), c.key, substr($2::bytea, {_DIGEST} * (c.number::int - 1) + 1, {_DIGEST}),
           coalesce(c.event_id, c.key)
    FROM unnest($3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::bool[], $9::bool[], $10::text[])
         WITH ORDINALITY AS c (key, source, event_id, scope, identity, again, makes_row, message_group, number)
    WHERE (SELECT NOT EXISTS (SELECT FROM figbridge.parked)) OR c.scope IS NOT NULL AND (c.again OR NOT EXISTS (
        SELECT FROM figbridge.parked p WHERE p.scope = c.scope AND p.identity = c.identity
                                 AND NOT (c.makes_row AND p.row_missing)) AND NOT EXISTS (
        SELECT FROM figbridge.parked p WHERE p.message_group = c.message_group AND NOT (
            c.makes_row AND p.row_missing AND p.scope = c.scope AND p.identity = c.identity)))
    ORDER BY c.source COLLATE "C", c.key COLLATE "C"
"""  # noqa: S608 (constants)
CLAIM: Final = f"{_INSERT} ON CONFLICT (source, idempotency_key) DO NOTHING RETURNING source, idempotency_key"
# For keys that nobody had, as is hoped: 23505 where somebody did. A third of the server's time for a claim is spent on
# being ready for a conflict.
HOPED_CLAIM: Final = _INSERT
_KNOWN: Final = """
    SELECT b.source, b.idempotency_key, b.payload_hash
    FROM unnest($1::text[], $2::text[]) AS c (source, key)
    JOIN figbridge.inbox b ON b.source = c.source AND b.idempotency_key = c.key
"""
# Entities of which all that waits waits for the row itself: so will what comes behind it.
_ROWLESS: Final = """
    SELECT p.scope, p.identity
    FROM figbridge.parked p JOIN unnest($1::text[], $2::text[]) AS c (scope, identity)
        ON p.scope = c.scope AND p.identity = c.identity
    GROUP BY p.scope, p.identity HAVING bool_and(p.row_missing)
"""
# For entities that nobody had, as is expected: 23505 where somebody did (`novelty`).
NEW_VERSIONS: Final = """
    INSERT INTO figbridge.entity_version AS v (scope, identity, version, deleted)
    SELECT c.scope, c.identity, c.version, c.deleted
    FROM unnest($1::text[], $2::text[], $3::numeric[], $4::bool[]) AS c (scope, identity, version, deleted)
    ORDER BY c.scope COLLATE "C", c.identity COLLATE "C"
"""
# tells how many; that is all that is asked for in hope
HOPED_VERSIONS: Final = f"""{NEW_VERSIONS}
    ON CONFLICT (scope, identity) DO UPDATE
    SET version = EXCLUDED.version, deleted = EXCLUDED.deleted, updated_at = now() WHERE v.version < EXCLUDED.version
"""  # noqa: S608 (constants)
VERSIONS: Final = f"{HOPED_VERSIONS} RETURNING v.scope, v.identity"
ENTITIES_THERE: Final = """
    SELECT FROM figbridge.entity_version v
    JOIN unnest($1::text[], $2::text[]) AS c (scope, identity) ON v.scope = c.scope AND v.identity = c.identity
"""
REUSED: Final = Applied(
    Outcome.DEAD_LETTER,
    KEY_REUSE,
    "the idempotency key was used before with another payload; the producer must give each change its own key",
)


def claims(works: Sequence[Work], *, alone: bool = False) -> list[str | bytes]:
    """The parameters of `CLAIM`. `alone`: nothing waits in the park, as far as is known; or nothing will be claimed."""
    sources, keys = zip(*[work.identity for work in works], strict=True)
    ids = tuple([work.event.id for work in works])
    entities = [_NONE] * 5
    if not alone:
        entities = [
            *_pairs([work.entity for work in works]),
            _flags([work.again for work in works]),
            _flags([work.mapping.makes_row for work in works]),
            _groups(works),
        ]
    return [
        sources[0],
        b"".join([work.payload_hash for work in works]),
        _texts(keys),
        _NONE if len(set(sources)) == 1 else _texts(sources),
        _NONE if ids == keys else _texts(ids),
        *entities,
    ]


def known(connection: psycopg.Connection, works: Sequence[Work]) -> dict[Work, Applied]:
    """Of works whose keys are not ours: another's, or nobody's because their entity or their group waits."""
    asked = _pairs([work.identity for work in works])
    rows = psycopg.RawCursor(connection).execute(_KNOWN, asked).fetchall()
    hashes = {(source, key): bytes(payload_hash) for source, key, payload_hash in rows}
    outcomes = {work: _compared(work, hashes[work.identity]) for work in works if work.identity in hashes}
    if waiting := [work for work in works if work not in outcomes]:
        entities = _pairs([work.entity for work in waiting])
        rowless = set(psycopg.RawCursor(connection).execute(_ROWLESS, entities).fetchall())
        for work in waiting:
            outcomes[work] = behind(work, row_missing=work.entity in rowless)
    return outcomes


def _compared(work: Work, known: bytes) -> Applied:
    return Applied(Outcome.DUPLICATE) if known == work.payload_hash else REUSED


def versions(works: Sequence[Work]) -> list[str]:
    """The parameters of `VERSIONS`, for works that have one; the first two are those of `ENTITIES_THERE`."""
    return [
        *_pairs([work.entity for work in works]),
        f"{{{','.join([work.version or '' for work in works])}}}",
        _flags([work.mapping.deletes for work in works]),
    ]


def _pairs(pairs: Iterable[tuple[str, str]]) -> tuple[str, str]:
    first, second = zip(*pairs, strict=True)
    return _texts(first), _texts(second)


def _groups(works: Sequence[Work]) -> str:
    groups = [work.group for work in works]
    return _texts([it or "" for it in groups]) if any(groups) else _NONE  # no group is called ""


def _texts(texts: Sequence[str]) -> str:
    """The literal of an array of texts. https://www.postgresql.org/docs/current/arrays.html#ARRAYS-IO"""
    joined = '","'.join(texts)
    if joined.count('"') != 2 * (len(texts) - 1) or "\\" in joined:
        joined = '","'.join([text.replace("\\", "\\\\").replace('"', '\\"') for text in texts])
    return f'{{"{joined}"}}'


def _flags(flags: Sequence[bool]) -> str:
    return f"{{{','.join(['t' if flag else 'f' for flag in flags])}}}"
