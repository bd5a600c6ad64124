"""Which events share a statement: one round trip writes the rows of many.

    works ─▶ segments: an entity once in each ─▶ groups: neighbours of one shape ─▶ a statement for each part

Why it may: `figbridge.reverse.transaction`, ORDER.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeAlias

from figbridge.reverse.mapping import Work
from figbridge.reverse.statement import Free, Shape, Statement, compose

_SORTED: Final = frozenset({"update", "upsert", "delete", "soft"})

# The statement that stands before those of a work, and before the end (None).
Naming: TypeAlias = Callable[[Work | None], bytes]
# (SQL, parameters, shape, works in the order of their documents); without a shape for the user's own SQL
Todo: TypeAlias = tuple[str | bytes, Any, Shape | None, list[Work]]


def segments(works: Sequence[Work]) -> Iterable[list[Work]]:
    """Cut where an entity comes a second time."""
    if len({work.entity for work in works}) == len(works):
        yield list(works)
        return
    segment: list[Work] = []
    seen: set[tuple[str, str]] = set()
    for work in works:
        if work.entity in seen:
            yield segment
            segment, seen = [], set()
        segment.append(work)
        seen.add(work.entity)
    if segment:
        yield segment


def statements(works: Sequence[Work]) -> list[Todo]:
    """Those of `works`, whose entities all differ, in their order."""
    return [statement for group in _grouped(works) for statement in group.statements()]


def named(works: Sequence[Work], naming: Naming) -> Iterable[Todo]:
    """As `statements`, each work alone, behind its name."""
    for work in works:
        yield naming(work), None, None, [work]
        for group in _grouped([work]):
            yield from group.statements()
    yield naming(None), None, None, list(works)


class _Group:
    """Neighbours of one shape, applied by one statement for each part of their mapping."""

    def __init__(self, shapes: tuple[Shape, ...] | None) -> None:
        self.shapes = shapes
        self.works: list[Work] = []
        self.ordered: set[str] = set()  # the message groups that are in it

    def statements(self) -> Iterable[Todo]:
        """One for each part of the mapping."""
        if self.shapes is None:
            for statement in self.works[0].statements:
                if isinstance(statement, Free):
                    yield statement.query, statement.parameters, None, self.works
                else:
                    yield statement.query, statement.parameters, statement.shape, self.works
            return
        for part, shape in enumerate(self.shapes):
            # rows are locked in the order of the documents, so that two batches meet at the first row they share;
            # an insert keeps the events' order, by which the table numbers its rows
            works = sorted(self.works, key=_identity) if shape.action in _SORTED else self.works
            for members in [[work] for work in works] if shape.single else [works]:
                documents = [work.statements[part].document for work in members]  # type: ignore[union-attr]  # it has shapes
                yield compose(shape), [f"[{','.join(documents)}]"], shape, members


def _identity(work: Work) -> str:
    """Which row of its scope, which is that of all works of one shape, it is about."""
    return work.entity[1]


def _shapes(work: Work) -> tuple[Shape, ...] | None:
    """Those of its statements; None when one of them is the user's own SQL, which has none."""
    if len(work.statements) == 1:
        only = work.statements[0]
        return None if isinstance(only, Free) else (only.shape,)
    shapes = [it.shape for it in work.statements if isinstance(it, Statement)]
    return tuple(shapes) if len(shapes) == len(work.statements) else None


def _grouped(works: Sequence[Work]) -> Iterable[_Group]:
    group: _Group | None = None
    common: Shape | None = None  # of the group, where its works have one statement each
    for work in works:
        statements = work.statements
        if group is not None and len(statements) == 1 and work.group is None:  # nearly always the next of the same
            only = statements[0]
            if type(only) is Statement and only.shape is common:
                group.works.append(work)
                continue
        shapes = _shapes(work)
        if (
            group is None
            or shapes is None
            or shapes != group.shapes
            or (work.group is not None and work.group in group.ordered)
        ):
            if group is not None:
                yield group
            group = _Group(shapes)
            common = shapes[0] if shapes is not None and len(shapes) == 1 else None
        group.works.append(work)
        if work.group is not None:
            group.ordered.add(work.group)
    if group is not None:
        yield group
