"""The relay: the validation function of a central bus.

    receive ▶ judge ─▶ valid     source ``valid.<source>``, to the sink
                     ├▶ invalid   source ``invalid.<source>``, with the reasons, to the quarantine or the dead letters
                     └▶ dropped   counted: valid already, set aside already, forwarded often enough, seen before
            ▶ acknowledge, when all of that is durable

judge.py    one message → what becomes of it; pure
seen.py     ids of the events that the sink took
outlet.py   valid and invalid events to where they go, in order per key, retried, never skipped
loop.py     the loop over a source; `figbridge.functions.relay` does the same for the messages AWS Lambda hands it

INVARIANT. A message is acknowledged only when the sink, the quarantine or the dead letters have it. An event is
forwarded once: its source says that it was, and its detail counts how often (``relayed.hops``).

What an event of the relay is: the detail as its service wrote it, byte for byte, with one member added at its end:

    "relayed": {"id": <the id it is known by>, "source": <as it was>, "account": <who published it>, "hops": 1}

The id is there because PutEvents gives each entry an id of its own. On sinks that drop repetitions (FIFO queues and
topics, Custom Event Buses, the embedded bus) it is the deduplication id, too. Elsewhere the relay drops what it
remembers, and a repetition is left over in one case: the process ends between the sink's answer and the
acknowledgement. No store of ids could close that gap, as it cannot share a transaction with PutEvents: written before,
it loses the event, and written after, it repeats it. So delivery is at least once, and consumers drop ids they know.
"""
