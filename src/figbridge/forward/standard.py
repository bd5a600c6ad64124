"""The forward path's own standard: events that break their contract do not reach the sink.

INVARIANT. None is skipped: what breaks its contract goes to the quarantine or to the dead letters, and without either
the bridge stops, before the events are acknowledged. The others go on; order between an event that is set aside and
the others of its row is not kept, as with every dead letter.

What the bridge itself says of a table (``schema.changed``, ``backfill.*``) passes where there is no contract for it:
without ``backfill.finished`` consumers keep rows that are gone.
"""

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import orjson
import structlog

from figbridge.config import ContractsSection
from figbridge.contracts import Breach, Contracts
from figbridge.event import Event, Rejection
from figbridge.forward.snapshot import backfill
from figbridge.forward.table import SCHEMA_CHANGED
from figbridge.metrics import Metrics

_log = structlog.get_logger()

BROKEN: Final = "ContractBroken"  # the code of such a rejection
_NO_CONTRACT: Final = (Breach("", "there is no contract for events of this source and detail-type"),)
_NOTICES: Final = frozenset({SCHEMA_CHANGED, *backfill.OPERATIONS})


class Broken(NamedTuple):
    """An event and how it breaks its contract, which is None where there is none."""

    event: Event
    contract: str | None
    breaches: Sequence[Breach]


class Standard:
    """For the publish loop. `quarantine` makes what is set aside durable; without it, `bury` does."""

    def __init__(
        self,
        section: ContractsSection,
        contracts: Contracts,
        metrics: Metrics,
        *,
        bury: Callable[[Sequence[Rejection]], None],
        quarantine: Callable[[Sequence[Event]], None] | None = None,
    ) -> None:
        self._contracts = contracts
        self._strict = section.unknown == "quarantine"
        self._prefix = section.quarantine_prefix
        self._metrics = metrics
        self._bury = bury
        self._quarantine = quarantine

    def admit(self, events: Sequence[Event]) -> Sequence[Event]:
        """Those that keep their contracts, in their order; the others are durable elsewhere when this returns.

        Raises Stopped, and SinkRefused when there is no other place.
        """
        broken = [found for event in events if (found := self._judged(event)) is not None]
        if not broken:
            return events
        if self._quarantine:
            self._quarantine([self._aside(it) for it in broken])
        else:
            self._bury([Rejection(it.event, BROKEN, _told(it), retryable=False) for it in broken])
        for it in broken:
            self._metrics.contract_broken.labels(it.contract or "none").inc()
            _log.error(
                "event breaks its contract",
                event_id=it.event.id,
                detail_type=it.event.detail_type,
                contract=it.contract,
                breaches=[f"{path or '/'}: {message}" for path, message in it.breaches],
            )
        refused = {id(it.event) for it in broken}
        return [event for event in events if id(event) not in refused]

    def _judged(self, event: Event) -> Broken | None:
        contract = self._contracts.find(event.source, event.detail_type)
        if contract is None:
            return Broken(event, None, _NO_CONTRACT) if self._strict and not _is_notice(event) else None
        breaches = contract.breaches(event.detail)
        return Broken(event, contract.name, breaches) if breaches else None

    def _aside(self, broken: Broken) -> Event:
        """As the relay's: `figbridge.relay.judge`."""
        event, contract, breaches = broken
        said = {
            "id": event.id,
            "reason": "contract" if contract else "no_contract",
            "contract": contract,
            "breaches": [it._asdict() for it in breaches],
        }
        detail = b'%b,"event":%b}' % (orjson.dumps(said)[:-1], event.envelope())
        return event._replace(source=f"{self._prefix}{event.source}", detail=detail, whole_table=False)


def _is_notice(event: Event) -> bool:
    return event.whole_table and orjson.loads(event.detail)["op"] in _NOTICES


def _told(broken: Broken) -> str:
    return "; ".join(f"{path or '/'}: {message}" for path, message in broken.breaches)
