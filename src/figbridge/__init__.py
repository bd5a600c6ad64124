"""figbridge: legacy PostgreSQL changes out as events, new-system events back in, exactly once, without loops.

THE MAP. A byte of WAL goes this way (package `forward`, one arrow a file):

    legacy PostgreSQL ──COPY BOTH──▶ source ▶ decode ▶ shape ▶ [buffer] ▶ publish ──▶ transports/<sink>
          ▲                            └──────── checkpoint (acknowledge) ◀───┘
          │
          └──one transaction── apply ◀ mapping ◀ consume ◀── transports/<source> ◀── the new system

and an event of the new system comes back the other (package `reverse`, read from right to left).

forward/source.py      the replication connection; with reverse/wire.py, what knows the protocol
forward/decode.py      pgoutput bytes → Begin, Change, Commit …; pure
forward/echo.py        our own reverse writes, recognised and dropped; touched.py: what triggers added to them leaves;
                       pingpong.py: two systems that answer each other
forward/shape.py       Change → Event: one encoder compiled per table version
forward/sanitize.py    which columns and rows leave, and as what: part of that encoder
forward/standard.py    events that break their contract do not reach the sink; contract.py derives it
delivery/pack.py       several changes in one entry
formats.py             native, CloudEvents, Debezium: what a sink sends of an event
forward/publish.py     events → sink, in order per key, retried, dead-lettered, never skipped; and the loop that does it
delivery/              several requests in flight to a sink, and no key reordered
forward/checkpoint.py  completed in any order, acknowledged in order
forward/unroll.py      runs of plain rows, from bytes to events in one compiled function
forward/capture.py     the loop that reads; handover.py, buffer.py: its batches on their way to the other; status.py
forward/versions.py    which schema each table had from where on; guard.py, guarded.py: is the slot the one we left?
forward/heartbeat.py   a message that goes the whole way and is timed; messages.py, outbox.py: what else may leave
forward/snapshot/      the rows that were there before the slot, between watermarks in the stream
reverse/consume.py     the loop: receive, map, apply, settle
reverse/mapping.py     event → key, version and statements, by declaration; parts.py: each of the statements
reverse/transaction.py idempotency keys, versions and statements of a batch in one transaction; express.py: all at once,
                       the next batch behind the COMMIT of the one before
reverse/apply.py       the batch, and the search for the event that spoils it
reverse/park.py        events that wait for a row
mark.py                what a reverse transaction says of itself in the WAL, and the forward path reads
contracts/             JSON Schemas of events, and whether an event is as they say
relay/                 events of any service: received, judged, published anew as valid.*, or set aside
functions/             what AWS Lambda can run: the relay, the reverse path
transports/            sinks and sources, one file each; the only importers of boto3
deadletter/            events that could not be delivered or applied: table and file; S3 and SQS are transports
letters.py             `figbridge dead-letters`; each path has a redrive.py for its own
service.py             the composition root: Config → loops, with the setup.py of each path
supervise.py           named loops in threads; the first failure stops all; soft stop, then hard
"""
