"""The reverse path: what the new system announces becomes rows of the legacy tables, each event once.

    queue ──▶ consume.receive ▶ message ▶ mapping ▶ apply ──one transaction, many events──▶ legacy PostgreSQL
      ▲            ▲                │                 │   1. the keys into figbridge.inbox
      │          park ◀── waits ────┼─────────────────┤   2. the versions into figbridge.entity_version
      │                             ▼                 │   3. the statements
      │                        dead letters ◀─ poison ┤   4. COMMIT
      └──────────────── acknowledge ◀─────────────────┘

consume.py      the loop: while a batch is applied, others are received and parsed; item.py: one delivery in it
hands.py        the batches in hand, for consume.py
message.py      bytes → event, exact to the last digit
values.py       what a path yields: absent is not null; exact.py: JMESPath without floats
mapping.py      event → its key, its entity, its version, its statements; spelling.py: one spelling of a key
statement.py    SQL, composed from the mapping alone; values are converted by PostgreSQL
claim.py        the two statements on keys and versions
transaction.py  one transaction of a batch, step by step; express.py: the same, sent at once, in hope
novelty.py      whether rows are expected to be new, for express.py
wire.py         statements ahead of their answers, for express.py
guard.py        how a transaction marks itself, where the claim is not enough; touched.py: and what it touches
session.py      the connection
apply.py        the batch; search.py: the search for the event that spoils it
order.py        what may not go because of others
policy.py       a statement's rules for conflicts: lock the rows, and compare them with what was expected
verdict.py      who wins
conflict.py     both of them in the transaction, and the record of it; resolve.py: a person's word on it
outcome.py      SQLSTATE → retry, park, poison
park.py         what waits for a row; parents.py says for which; slow.py: what timeouts ended
drift.py        mappings against the live catalogue
purge.py        old keys leave the inbox
rehearse.py     `figbridge mapping test`; dryrun.py: all events as in earnest, and then ROLLBACK
difference.py   the rows before and after, for both

To go faster, run more replicas on the queue.

INVARIANT. A message is acknowledged only after its legacy transaction has committed, or its dead letter or its place in
the park is durable. The idempotency key is claimed *in* that transaction, by its first statement that writes. So there
are two states and no third: key and rows are both there, or neither is. Nothing is ever "in progress", hence no lock
that expires.

WHY A DUPLICATE IS HARMLESS. Queues deliver at least once, and so do we: a crash after the commit and before the
acknowledgement brings the message back. Its key is in the inbox by then, so it is not claimed, not applied, and
acknowledged. Two replicas with the same message at the same moment: the second one's claim waits in the index for the
first one's commit, and then finds the key. A COMMIT whose answer was lost needs no investigation either: try again, and
the key says which it was. The same key with *another* payload is no duplicate but a producer's mistake, and becomes a
dead letter (``key_reuse``) instead of a silent loss. Keys are forgotten after a month; from then on, and for whatever
comes in the wrong order, the version decides, whose row outlives the key and the row.

WHY THE CLAIM COMES FIRST. It is also the mark by which the forward path knows an echo (`figbridge.forward.echo`): the
forward reader must meet the mark before the data. It is a statement of its own, never a CTE of the data statement:
measured on PostgreSQL 15, 16 and 18, an unreferenced CTE runs last and the mark arrives after the data.

WHY BATCHES. One transaction an event is bound by round trips and fsync. A batch claims all keys by one statement and
writes neighbours of one shape by one more; and it is the same SQL for one event, so a batch can be cut in two until the
event to blame is alone. Triggers fire for each row, as for any client.

ORDER. Per entity (the row an event is about, or what the mapping names): within a batch by the order of the statements,
between batches because what waits is parked before the next one begins, between replicas by the park and the version.
Other events are not held up by anybody; but with ``reverse.order: group`` a message group of a FIFO queue is such an
order, too, and neither is overtaken (`park`).

What it does not do: touch a column that its mapping does not name, or look what it overwrites where no rules say so.
"""
