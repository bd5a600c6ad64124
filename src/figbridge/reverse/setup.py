"""How a reverse path is put together from its configuration, whoever runs it: the bridge, a redrive, AWS Lambda."""

import threading
from collections.abc import Callable, Sequence

from figbridge.config import Config, ReverseSection
from figbridge.deadletter import DeadLetters
from figbridge.metrics import Metrics
from figbridge.reverse import purge
from figbridge.reverse.apply import Applier
from figbridge.reverse.bare import Bare
from figbridge.reverse.conflict import examiner_of, refusal
from figbridge.reverse.consume import Consumer
from figbridge.reverse.drift import Drift
from figbridge.reverse.dryrun import Difference, DryRun, Shadow, refused
from figbridge.reverse.guard import LoopGuard
from figbridge.reverse.mapping import Mappings, Work
from figbridge.transports import Source


def open_consumer(
    config: Config,
    section: ReverseSection,
    source: Source,
    dead_letters: DeadLetters,
    metrics: Metrics,
    *,
    prepare: Callable[[threading.Event], None] | None = None,
) -> Consumer:
    """A consumer of `source`, whose transactions bear the mark that the forward path of the same file looks for.

    Raises ConfigError when the mappings contradict each other. No connection is made yet.
    """
    mappings = Mappings(section.mappings)
    rehearses = section.mode == "dry-run"
    found: dict[Work, list[Difference]] = {}
    applier = Applier(
        config.legacy.write_dsn,
        statement_timeout=section.statement_timeout,
        lock_timeout=section.lock_timeout,
        guard=None if rehearses else LoopGuard.of(config),
        examine=(lambda _works: Shadow(found)) if rehearses else examiner_of,
        refuse=refused if rehearses else refusal,
    )
    consumer = (DryRun if rehearses else Consumer)(
        source,
        mappings,
        applier,
        dead_letters=dead_letters,
        metrics=metrics,
        park_timeout=section.park_timeout,
        batch_size=section.batch_size,
        max_hops=section.max_hops,
        unmapped=section.unmapped,
        order=section.order,
        bare=Bare(section.bare) if section.bare else None,
        drift=Drift(applier.connection, mappings, metrics),
        prepare=prepare,
    )
    if isinstance(consumer, DryRun):
        consumer.found = found
    return consumer


def purged(section: ReverseSection) -> Sequence[purge.Kept]:
    """What of our tables is to be purged."""
    kept = [purge.inbox(section.inbox_retention)]
    if any(it.rules for mapping in section.mappings for it in mapping.parts):
        kept.append(purge.conflicts(section.conflict_retention))
    if section.mode == "dry-run":
        kept.append(purge.rehearsals(section.dry_run_retention))
    return kept
