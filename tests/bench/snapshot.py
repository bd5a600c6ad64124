"""A snapshot's figures: rate against COPY read by psycopg, memory; and what it costs the latency of the stream."""

import statistics
from importlib import resources

from bench import peers
from bench.backlog import CALM, Legacy
from bench.forward import Size, pgbench
from bench.ours import Bridge, Load
from bench.report import SNAPSHOT, Line, Report, say

_CALM = 2.0  # seconds


def snapshot(legacy: Legacy, size: Size, rows: int, report: Report) -> None:
    """The table of `rows` rows through figbridge, and by psycopg; in turn.

    Before that the latency: behind it a disk discards the gigabytes of events that were removed, and for a minute or so
    each write waits for that, with a snapshot and without.
    """
    legacy.fill([], rows, 100_000)
    legacy.execute(resources.files("figbridge").joinpath("schema.sql").read_text())
    legacy.execute("VACUUM ANALYZE orders")
    say(f"latency beside a snapshot, for {size.latency_seconds} s")
    legacy.execute("SELECT setval('order_ids', %s)", [rows + 1])
    legacy.slot("beside")
    legacy.settle(CALM)
    with Bridge(legacy.dsn, "beside", Load(timed=True, snapshot=True)) as bridge:
        report.beside = pgbench(legacy, "beside", bridge, size)
    legacy.execute("DELETE FROM orders WHERE id >= %s", [rows])
    legacy.execute("VACUUM ANALYZE orders")
    legacy.settle()
    what = f"a table of {rows:,} rows"
    peer, ours, resident = [], [], list[int]()
    for run in range(size.runs):
        slot = f"snapshot_{run}"
        say(f"{what}: run {run + 1} of {size.runs}")
        peer.append(peers.psycopg_copy(legacy))
        legacy.slot(slot)
        legacy.settle(_CALM)  # the events of the run before were removed: to discard them is no part of this one
        with Bridge(legacy.dsn, slot, Load(row="orders.read", snapshot=True)) as bridge:
            done, resident = bridge.read(rows)
        if done.rows != rows:
            raise RuntimeError(f"{done.rows} rows are in the file, {rows} in the table")
        ours.append(done.finished())
    best = statistics.median(it.seconds for it in peer)
    report.lines.append(Line.of(what, "psycopg, COPY TO STDOUT → nothing", rows, peer, best=best))
    report.lines.append(Line.of(what, SNAPSHOT, rows, ours, best=best, resident=resident))
