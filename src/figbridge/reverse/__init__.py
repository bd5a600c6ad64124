"""The reverse path: what the new system announces becomes rows of the legacy tables, each event once.

    queue ──▶ consume.receive ▶ mapping.parse ▶ mapping.find ▶ apply ──one transaction──▶ legacy PostgreSQL
      ▲                              │                           │  1. the key into figbridge.inbox
      │                              ▼                           │  2. the mapping's statement
      │                         dead letters ◀── poison ─────────┤  3. COMMIT
      └─────────── acknowledge, or release with a delay ◀────────┘

One loop in one thread, `consume.Consumer`; it owns the source, and the applier owns the connection. To go faster,
run more replicas on the queue.

INVARIANT. A message is acknowledged only after its legacy transaction has committed, or its dead letter is durable.
The idempotency key is claimed *in* that transaction, by its first statement. So there are two states and no third:
key and rows are both there, or neither is. Nothing is ever "in progress", hence no lock that expires.

WHY A DUPLICATE IS HARMLESS. Queues deliver at least once, and so do we: a crash after the commit and before the
acknowledgement brings the message back. Its key is in the inbox by then, so the transaction is rolled back and the
message acknowledged. Two replicas with the same message at the same moment: the second one's claim waits in the index
for the first one's commit, and then finds the key. A COMMIT whose answer was lost needs no investigation either: try
again, and the key says which it was. The same key with *another* payload is no duplicate but a producer's mistake, and
becomes a dead letter (``key_reuse``) instead of a silent loss.

WHY THE CLAIM COMES FIRST. It is also the mark by which the forward path knows an echo (`figbridge.forward.echo`): the
forward reader must meet the mark before the data. It is a statement of its own, never a CTE of the data statement:
measured on PostgreSQL 15, 16 and 18, an unreferenced CTE runs last and the mark arrives after the data.

What it does not do: decide who owns a row, order events of different receives (a FIFO queue does that), or touch a
column that its mapping does not name.
"""
