"""One part of a mapping: what it makes of an event's document. A row's statement, the user's own SQL, or a callable's.

What a path that yields null or nothing means: `figbridge.reverse.mapping`.
"""

from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import entry_points
from typing import Any, Final, TypeAlias

from figbridge.config import StatementSection, Value, own_sql, split_table
from figbridge.errors import ConfigError, Problem
from figbridge.reverse.message import Malformed, storable, write
from figbridge.reverse.policy import Policy
from figbridge.reverse.statement import Action, Free, Shape, Statement
from figbridge.reverse.values import ABSENT, Document, Fields, compiled, finite

ENTRY_POINTS: Final = "figbridge.statements"


class Row:
    """The statement of one row: an action on a table. The path `version` is looked up with those of the values."""

    def __init__(self, section: StatementSection, version: str | None = None) -> None:
        assert section.into is not None  # noqa: S101 (`StatementSection` has checked it)
        assert section.action is not None  # noqa: S101
        self.action: Action = "soft" if section.soft else section.action
        self.table = split_table(section.into)
        written = section.soft or section.set
        self._key = [(column, *compiled(value, f"key {column}")) for column, value in section.key.items()]
        self._set = [(column, compiled(value, f"set {column}")[1]) for column, value in written.items()]
        self._field = f"the columns for {'.'.join(self.table)}"
        # nearly every event has all of them
        self._columns = (*section.key, *written)
        values = [*section.key.values(), *written.values()]
        versioned = Fields([*values, Value(version)]).get if version is not None else None
        self._versioned = versioned is not None
        self._fields = versioned or Fields(values).get
        self._shapes: dict[tuple[str, ...], Shape] = {}
        self._whole = self._shape(tuple(written))
        self.policy = Policy(section, section.rules) if section.rules else None

    def key_of(self, document: Document) -> dict[str, Any]:
        """Raises Malformed when a part of the key has no value."""
        values = {}
        for column, name, get in self._key:
            value = get(document)
            if value is None or value is ABSENT:
                raise Malformed(name, "yields null or nothing", expected="the key of a row")
            values[column] = value
        return values

    def columns(self, document: Document, names: Sequence[str]) -> dict[str, Any]:
        """The values that are written to these columns; empty when one of them has none."""
        found = {column: get(document) for column, get in self._set if column in names}
        if len(found) < len(names) or any(value is None or value is ABSENT for value in found.values()):
            return {}
        return {column: found[column] for column in names}

    def row(self, document: Document) -> tuple[Sequence[Any], Statement, Any]:
        """The values of the key, in its order, the statement, and the version if it was found. Raises Malformed."""
        if self._fields is not None and (found := self._fields(document)) is not None:
            key = found[: len(self._key)]
            if None not in key:
                values = dict(zip(self._columns, found))  # noqa: B905 (a version is behind them, and to look costs)
                statement = tuple.__new__(Statement, (self._whole, write(values, self._field)))
                return key, statement, found[-1] if self._versioned else None
        values = self.key_of(document)
        named = tuple(values.values())
        present = []
        for column, get in self._set:
            value = get(document)
            if value is not ABSENT:
                values[column] = value
                present.append(column)
        return named, Statement(self._shape(tuple(present)), write(values, self._field)), None

    def statements(self, document: Document) -> Iterable[Statement]:
        """One. Raises Malformed."""
        return (self.row(document)[1],)

    def _shape(self, present: tuple[str, ...]) -> Shape:
        shape = self._shapes.get(present)
        if shape is None:
            key = tuple(column for column, *_ in self._key)
            shape = self._shapes.setdefault(present, Shape(self.action, self.table, key, present))
        return shape


class Sql:
    """The user's own SQL."""

    def __init__(self, section: StatementSection) -> None:
        assert section.sql is not None  # noqa: S101 (see Row)
        self._query = section.sql
        self._with = [(name, compiled(value, f"with {name}")[1]) for name, value in section.with_.items()]

    def statements(self, document: Document) -> Iterable[Free]:
        """One; a parameter whose path leads nowhere is NULL."""
        return (Free(self._query, {name: as_text(get(document), f"with {name}") for name, get in self._with}),)


class Call:
    """A Python callable, found by its entry point. Raises ConfigError when there is none."""

    def __init__(self, section: StatementSection) -> None:
        self._name = section.call or ""
        found = list(entry_points(group=ENTRY_POINTS, name=self._name))
        if len(found) != 1:
            what = f"{len(found) or 'no'} entry points of the group {ENTRY_POINTS} have the name {self._name!r}"
            raise ConfigError(
                "a mapping calls what is not there", [Problem("call", what, "install the package that brings it")]
            )
        self._function: Callable[[Document], Iterable[tuple[str, dict[str, Any]]]] = found[0].load()

    def statements(self, document: Document) -> Iterable[Free]:
        """As many as it returns. Whatever it raises makes the event poison."""
        try:
            return tuple(self._statement(*it) for it in self._function(document))
        except Malformed:
            raise
        except Exception as error:
            raise Malformed(f"call {self._name}", f"raised {type(error).__name__}", expected="statements") from error

    def _statement(self, query: object, values: Document) -> Free:
        if not isinstance(query, str):  # the driver would take other things, or fall over them
            raise Malformed(f"call {self._name}", f"returned {type(query).__name__} for SQL", expected="a string")
        if wrong := own_sql.refused(query):
            raise Malformed(f"call {self._name}", f"returned SQL that {wrong[0]}", expected=wrong[1])
        if not finite(values):
            raise Malformed(
                f"call {self._name}", "returned a number that JSON has not", expected="a text such as 'NaN'"
            )
        return Free(query, {name: as_text(value, self._name) for name, value in values.items()})


Part: TypeAlias = Row | Sql | Call


def part_of(section: StatementSection, version: str | None) -> Part:
    """The one that `section` declares; a row looks the path `version` up. Raises ConfigError."""
    if section.into is not None:
        return Row(section, version)
    return Sql(section) if section.sql is not None else Call(section)


def as_text(value: Any, field: str) -> str | None:
    """As PostgreSQL reads it from text: a string as it is, anything else as JSON writes it."""
    if value is None or value is ABSENT:
        return None
    if isinstance(value, str):
        return storable(value, field) if value else value
    return write(value, field)
