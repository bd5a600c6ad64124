"""The forward path: what the legacy database commits leaves as events.

    slot ──COPY BOTH──▶ source.receive ▶ decode.feed ▶ echo.drops? ▶ shape.event ▶ Buffer ▶ publish ▶ sink
      ▲                       └── unroll.lane, for runs of plain rows ──▲                      │
      └── status update ◀── capture loop ◀──── wake ◀──── checkpoint.resolve ◀─────────────────┘

Two loops in two threads, `capture.Capture` and `publish.Publish`; they share the buffer and the checkpoint.

INVARIANT. An LSN is acknowledged only when it is the end of a commit and every event at or below it is durable at the
sink or in the dead letters. The slot is therefore the only forward state: there is no offset store that could
disagree with it, and ``kill -9`` at any instruction costs nothing but repetition.

IDENTITY. An event's id is ``<system identifier>-<slot>-<timeline>-<commit LSN>-<ordinal>``, each part read from the
server, none generated or stored, so a repeated change carries the same id. Why these five:

* commit LSN and ordinal (rows of the transaction, counted before any filter) name the row. An LSN of the row itself
  would not do: the rows of one COPY share it.
* the timeline is the slot's incarnation. After a failover WAL positions may be used again, by other transactions; the
  part of history a commit belongs to is found in the server's own timeline history, so a change that is delivered once
  before and once after the failover still has one id.
* the slot: two bridges with two publications count ordinals differently.

A logical message and a change of schema have ids of the same parts, and a letter that no row has (`place`, `shape`).

TWO AT ONCE. A bridge that was frozen and wakes up may publish what it had read, although another one has taken over: no
check could be made in one step with the sink's write. Both publish every change behind some confirmed place, in order
and under the same ids, so what appears first is in order per key, whoever sent it, and the rest is repetition. It
confirms nothing any more: its walsender is gone.

What it does not do: reorder, batch by time, or keep an event in memory after the sink has it. In protocol version 1
the server sends whole committed transactions in commit order, so a change may be published before its commit message
arrives: memory does not grow with the size of a transaction. Only the acknowledgement waits for the commit.
"""
