"""A batch of messages through the relay: judged, published or set aside, and each one's fate told.

The loop over a source and the AWS Lambda function share it.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import structlog

from figbridge.contracts import Breach
from figbridge.metrics import Metrics
from figbridge.relay.judge import Drop, Invalid, Judge, Valid
from figbridge.relay.outlet import Outlet
from figbridge.relay.seen import Seen

_log = structlog.get_logger()


class Message(Protocol):
    """What of a delivery counts here."""

    @property
    def body(self) -> bytes:
        """The message as it came."""

    @property
    def attempts(self) -> int:
        """How often it has been delivered, this time included."""


class Relayer:
    """For one thread; `Outlet` is closed by `close`."""

    def __init__(self, judge: Judge, outlet: Outlet, seen: Seen, metrics: Metrics) -> None:
        self._judge = judge
        self._outlet = outlet
        self._seen = seen
        self._metrics = metrics

    def check(self) -> None:
        """See `Outlet.check`."""
        self._outlet.check()

    def relay(self, messages: Sequence[Message], done: set[int]) -> None:
        """Bring each of `messages` to where it belongs; `done` receives the indexes of those that are durable there.

        Raises Stopped when the bridge is halted, SinkRefused when there is no place for one. `done` holds either way.
        """
        valid: dict[int, Valid] = {}
        invalid: dict[int, Invalid] = {}
        twins: dict[int, int] = {}  # a message → the one of this batch that it repeats
        first: dict[tuple[str, str], int] = {}
        dropped: Counter[Drop] = Counter()
        for index, message in enumerate(messages):
            verdict = self._judge.judge(message.body)
            if isinstance(verdict, Valid):
                name, detail = verdict.name, verdict.event.detail
                known = self._seen.known(name, detail)
                if known == "no" and name in first:
                    known = "same" if valid[first[name]].event.detail == detail else "other"
                if known == "other":
                    breach = Breach("", "another event had the same id, so this one would be lost as its repetition")
                    invalid[index] = self._judge.invalid(message.body, "id_reused", [breach])
                elif known == "same":
                    dropped["duplicate"] += 1
                    if name in first:
                        twins[index] = first[name]
                    else:
                        done.add(index)
                else:
                    first[name] = index
                    valid[index] = verdict
            elif isinstance(verdict, Invalid):
                invalid[index] = verdict
            else:
                dropped[verdict.why] += 1
                done.add(index)
                if verdict.why == "hops":  # its source does not say that it was forwarded, so somebody may miss it
                    _log.info("event dropped", event_id=verdict.id, source=verdict.source, reason=verdict.why)
        for why, count in dropped.items():
            self._metrics.relay_dropped.labels(why).inc(count)
        self._publish(valid, invalid, done)
        self._set_aside(invalid, [messages[index].attempts for index in invalid], done)
        done.update(index for index, other in twins.items() if other in done)

    def close(self) -> None:
        """Close the outlet."""
        self._outlet.close()

    def _publish(self, valid: dict[int, Valid], invalid: dict[int, Invalid], done: set[int]) -> None:
        refused = {it.event.id: it for it in self._outlet.publish(list(valid.values()))}
        for index, verdict in valid.items():
            if (rejection := refused.get(verdict.event.id)) is None:
                self._seen.add(verdict.name, verdict.event.detail)
                done.add(index)
            else:
                invalid[index] = self._judge.refused(verdict, rejection.code, rejection.message)

    def _set_aside(self, invalid: dict[int, Invalid], attempts: Sequence[int], done: set[int]) -> None:
        self._outlet.set_aside(list(invalid.values()), attempts)
        for verdict in invalid.values():
            self._metrics.relay_invalid.labels(verdict.reason).inc()
            _log.warning(
                "event set aside",
                event_id=verdict.event.id,
                source=verdict.event.source,
                detail_type=verdict.event.detail_type,
                reason=verdict.reason,
                contract=verdict.contract,
                breaches=[f"{it.path or '/'}: {it.message}" for it in verdict.breaches],
            )
        done.update(invalid)
