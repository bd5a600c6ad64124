"""figbridge: legacy PostgreSQL changes out as events, new-system events back in, exactly once, without loops.

THE MAP. A byte of WAL goes this way (package `forward`, one arrow a file):

    legacy PostgreSQL ──COPY BOTH──▶ source ▶ decode ▶ shape ▶ [buffer] ▶ publish ──▶ transports/<sink>
          ▲                            └──────── checkpoint (acknowledge) ◀───┘
          │
          └──one transaction── apply ◀ mapping ◀ consume ◀── transports/<source> ◀── the new system

and an event of the new system comes back the other (package `reverse`, read from right to left).

forward/source.py      the replication connection; the only file that knows psycopg.pq
forward/decode.py      pgoutput bytes → Begin, Change, Commit …; pure
forward/echo.py        our own reverse writes, recognised and dropped
forward/shape.py       Change → Event: one encoder compiled per table version
forward/publish.py     events → sink, in order per key, retried, dead-lettered, never skipped
forward/checkpoint.py  completed in any order, acknowledged in order
forward/pipeline.py    the two loops, capture and publish, and the bounded buffer between them
reverse/consume.py     the loop: receive, map, apply, settle
reverse/mapping.py     event → statement, by declaration
reverse/apply.py       idempotency key and statement in one transaction
transports/            sinks and sources, one file each; the only importers of boto3
service.py             the composition root: Config → loops; the only file that knows everyone
supervise.py           named loops in threads; the first failure stops all; soft stop, then hard
"""
