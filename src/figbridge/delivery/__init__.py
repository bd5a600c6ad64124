"""From events to a sink, in order per key: what the forward path and the relay have in common.

flight.py  several requests in flight, each answer judged entry by entry
pack.py    several changes in one entry
order.py   which events may be out at the same time
pace.py    how many requests may be out, by what the sink answers
crew.py    the threads that wait for its answers
"""
