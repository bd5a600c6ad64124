"""The rows that were there before the slot: read in chunks while the stream flows, and put into it in their place.

    snapshot loop                                         capture loop (owns the stream)
    1 low watermark ──────────WAL─────────────▶ begins to note the keys that the stream touches in this table
    2 waits until low was met ◀────────────────
    3 reads a chunk (one short transaction)
    4 hands the chunk over, then high watermark ─WAL─▶ puts it beside the stream (`figbridge.forward.buffer`)
    5 waits until it is durable, notes the cursor in figbridge.snapshot, with the next high watermark

                                                          publish loop
                                                6 takes the stream first and a slice of the chunk in turn: the rows that
                                                  nobody touched leave, as events with op ``read`` (`layout`, `reads`)

A watermark is a transactional logical message (prefix ``figbridge.snapshot``), so a window always closes, also on an
idle database, and nothing is written to anybody's table. The method is that of DBLog, https://arxiv.org/abs/2010.12597.

INVARIANT. Whoever applies all events in order, dropping repeated ids, holds the table at the end. Between low and high
the stream wins: what a transaction did that committed before low, the chunk has seen, and its events came earlier; what
one does that commits after high comes later, or before a row has left, which then does not (`reads`). Four cases need
more than that:

* A transaction's commit is in the WAL before other sessions see it: for microseconds, or for as long as a synchronous
  standby takes. A chunk could miss one whose events left before low, and undo it. So the chunk is read only with a
  snapshot in which no transaction is in progress that the capture loop has met (`window.Windows.met`).
* A row whose event lacks a TOASTed value that the update left alone, or whose event was dropped as an echo of our own:
  the stream wins, but does not tell all. Those rows alone are read again, in a window of their own.
* A row whose key changes without such a value may go from before the cursor to behind it, where no chunk comes by: the
  rows with the new keys are read when all others were (`moved`). So are rows that move into the publication's filter.
* A TRUNCATE, a changed schema or a lost connection within a window: the chunk is void and is read again.

ACKNOWLEDGEMENT is as for any event: a chunk stands in the buffer at its high watermark's commit, under its ticket. The
cursor is written when the checkpoint has passed that commit, so ``kill -9`` repeats one chunk a table. What is repeated
carries the same id: ``<system identifier>-<slot>-<run>-<table's OID>-<the row's key, or a hash of it>``.

Chunks can be read from a standby, for which `standby` has the argument.

A table is walked by the index of its replica identity, or by its primary key, where that is plain, else by ctid. A row
without a key is what its columns are: two equal rows of a table without one are one.

A row that was deleted while there was no slot is in no chunk: `backfill` says how consumers learn of it.

WHAT IT CANNOT KNOW. The first chunks of a process look back as far as the process does: a commit that a synchronous
standby holds up since before the start is not recognised. A table is not walked by its replica identity where that is
an index which is not plain: then an update that leaves a TOASTed value alone may take the row from before the reading
point to behind it, without saying so, and tells that value to nobody (``unchanged`` names it).
"""

PREFIX = "figbridge.snapshot"  # of the watermarks
