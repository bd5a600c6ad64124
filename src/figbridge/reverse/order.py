"""Which events of a batch may be applied now, when others of it wait: none overtakes one of its entity or its group.

The park says the same of events of other batches (`claim`, `park`), by the same rules.
"""

from collections.abc import Iterable, Sequence

from figbridge.reverse.mapping import Work
from figbridge.reverse.outcome import ROW_WAITS, UPDATE_MISSING, Applied, Outcome


def behind(work: Work, *, row_missing: bool) -> Applied:
    """What becomes of an event that waits for its turn.

    `row_missing`: events of its entity wait, all of them for the row itself. So will it, unless it brings the row: then
    it is another entity of its group that it waits for.
    """
    reason = UPDATE_MISSING if row_missing and not work.mapping.makes_row else ROW_WAITS
    what = "entity" if work.group is None else "entity or message group"
    return Applied(Outcome.RETRY, reason, f"an earlier event of the same {what} waits")


def without_repeated_keys(works: Sequence[Work]) -> Iterable[list[Work]]:
    """Cut where an idempotency key comes a second time: the second one is compared with what the first one left."""
    if len({work.identity for work in works}) == len(works):
        yield list(works)
        return
    batch: list[Work] = []
    seen: set[tuple[str, str]] = set()
    for work in works:
        if work.identity in seen:
            yield batch
            batch, seen = [], set()
        batch.append(work)
        seen.add(work.identity)
    if batch:
        yield batch


class _Waiting:
    """What waits, and so what may not be applied now."""

    def __init__(self) -> None:
        self._entities: dict[tuple[str, str], bool] = {}  # whether all of its events wait for the row itself
        self._groups: dict[str, tuple[str, str] | None] = {}  # the one entity whose row all of its events wait for

    def add(self, work: Work, *, row_missing: bool) -> None:
        """It waits; `row_missing`: for the row that it is about."""
        self._entities[work.entity] = self._entities.get(work.entity, True) and row_missing
        if work.group is not None:
            only = work.entity if row_missing else None
            self._groups[work.group] = only if self._groups.get(work.group, only) == only else None

    def holds(self, work: Work) -> Applied | None:
        """What becomes of it if something that waits comes before it. Then it waits, too."""
        makes_row, row_missing = work.mapping.makes_row, self._entities.get(work.entity)
        by_entity = row_missing is not None and not (row_missing and makes_row)
        by_group = work.group in self._groups and not (makes_row and self._groups[work.group] == work.entity)
        if not (by_entity or by_group):
            return None
        held = behind(work, row_missing=bool(row_missing))
        self.add(work, row_missing=held.reason == UPDATE_MISSING)
        return held


def not_behind(works: Sequence[Work], outcomes: dict[Work, Applied]) -> list[Work]:
    """Those that follow no event of their entity or their group that waits; the others wait behind it.

    Unless it brings the row that all before it wait for.
    """
    earlier = [(work, applied) for work, applied in outcomes.items() if applied.outcome is Outcome.RETRY]
    if not earlier:
        return list(works)
    waiting, given, free = _Waiting(), set(works), list[Work]()
    for work, applied in earlier:
        if work not in given:  # else it was asked about before, and comes again
            waiting.add(work, row_missing=applied.reason == UPDATE_MISSING)
    for work in works:
        if held := waiting.holds(work):
            outcomes[work] = held
        else:
            free.append(work)
    return free
