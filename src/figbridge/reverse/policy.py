"""The rules of one statement, compiled: what an event expects to find, and the query that locks and compares the row.

One query for all events of a statement: it takes the row locks in the order of its documents, and says of each row how
it differs from what the new system had seen (``before``), and from what the event says (``new``). The lock is held
until the end of the transaction, so nothing can change between the comparison and the write.
SELECT … FOR NO KEY UPDATE, as an UPDATE takes it: https://www.postgresql.org/docs/current/explicit-locking.html

Values are compared as jsonb, because every type has that form and not every type has ``=`` (json, xml, point have
none); 1.5 and 1.50 are equal there. What is equal to the byte, as nearly everything is, need not be made jsonb first.
Deltas and expressions are computed by the query, with the columns' own types.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import psycopg
from psycopg import sql

from figbridge.config import ColumnsSection, ConflictsSection, StatementSection, split_table
from figbridge.reverse.message import Malformed, write
from figbridge.reverse.statement import Action, Statement, empty
from figbridge.reverse.values import ABSENT, Document, Path

# it.* is the row, whatever its columns are called; it alone would be a column of that name.
_LOCK: Final = sql.SQL("""
    SELECT d.number, (SELECT row_to_json(it.*) FROM (SELECT {seen}) AS it)::text,
           ARRAY[{moved}]::bool[], ARRAY[{changed}]::bool[], ARRAY[{differing}]::bool[], ARRAY[{computed}]::text[],
           {other_version}, {newer}
    FROM ROWS FROM (json_array_elements($1::json), json_array_elements($2::json), json_array_elements($3::json))
         WITH ORDINALITY AS d (document, seen, versions, number)
    CROSS JOIN LATERAL json_populate_record({empty}, d.document) AS new
    CROSS JOIN LATERAL json_populate_record({empty}, d.seen) AS before
    JOIN {table} AS current ON {row}
    ORDER BY d.number
    FOR {strength} OF current
""")
_UNEQUAL: Final = sql.SQL(
    "(NOT record_image_eq(ROW({a}.{c}), ROW({b}.{c})) AND to_jsonb({a}.{c}) IS DISTINCT FROM to_jsonb({b}.{c}))"
)
_OTHER: Final = "({c} IS DISTINCT FROM {v})"
_NEWER: Final = "coalesce({c} < {v}, {c} IS NULL)"  # a row without a version is older than any
_DELTA: Final = "current.{c} + (new.{c} - before.{c})"


class Expected(NamedTuple):
    """What the new system believed when it made an event: `columns` are those with a known value before.

    `row` names the row, so that two events about one row are told. The others are JSON, for the query of `Policy`.
    """

    policy: "Policy"
    row: tuple[tuple[str, str], str]
    columns: frozenset[str]
    before: str
    versions: str


class Row(NamedTuple):
    """A row as it was found, and locked.

    moved     columns that are not as the new system had seen them, of those whose value before a mapping names
    changed   columns that the event says otherwise than the new system had seen them, of those and the computed ones
    differing columns that the event would change
    computed  column → its value by delta or SQL, as JSON; None for NULL
    other_version, newer   None where no version is compared
    """

    text: str
    moved: frozenset[str]
    changed: frozenset[str]
    differing: frozenset[str]
    computed: Mapping[str, str | None]
    other_version: bool | None
    newer: bool | None


class Group(NamedTuple):
    """Columns that are judged together. `rest`: all that no group names."""

    columns: tuple[str, ...]
    section: ColumnsSection | None

    @property
    def rest(self) -> bool:
        """Whether these are the columns that the file does not group."""
        return self.section is None


class Policy:
    """The rules of one statement."""

    def __init__(self, section: StatementSection, rules: ConflictsSection) -> None:
        assert section.into is not None  # noqa: S101 (`StatementSection` has checked it)
        assert section.action is not None  # noqa: S101
        self.rules = rules
        self.owner = section.owner
        self.action: Action = "soft" if section.soft else section.action
        self.table = split_table(section.into)
        self.key = tuple(section.key)
        self._before = [(column, Path(path, f"before {column}")) for column, path in rules.before.items()]
        self._seen = Path(rules.version.seen, "version seen") if rules.version and rules.version.seen else None
        self._new = Path(rules.version.new, "version new") if rules.version and rules.version.new else None
        written = tuple(section.soft or section.set)
        self._compared = tuple(dict.fromkeys([*written, *rules.before]))
        grouped = {column for group in rules.groups for column in group.columns}
        rest = tuple(column for column in written if column not in grouped)
        self.groups = (Group(rest, None), *(Group(group.columns, group) for group in rules.groups))
        # whether some columns belong to the legacy system
        self.shared = any(group.owner == "legacy" for group in rules.groups)
        self._computed = dict(self._expressions())
        self._seen_columns = tuple(rules.before)
        self._changing = tuple(dict.fromkeys([*rules.before, *self._computed]))
        self._queries: dict[tuple[str, ...], bytes] = {}

    def rule_of(self, group: Group) -> str:
        """The rule of the group; ``sql`` where an expression decides."""
        if group.section is None:
            return self.rules.policy
        return "sql" if group.section.sql is not None else group.section.policy or self.rules.policy

    def expected(self, document: Document, statement: Statement, key: Mapping[str, Any]) -> Expected:
        """What the event says of the row as it was, for `statement` on the row that `key` names. Raises Malformed."""
        before = {}
        for column, path in self._before:
            value = path.get(document)
            if value is not ABSENT:
                before[column] = value
        for column in statement.shape.columns:
            if column in self._computed and self._computed[column] == _DELTA and before.get(column) is None:
                raise Malformed(f"before {column}", "yields null or nothing", expected="the number that was seen")
        versions: dict[str, Any] = {}
        if self._seen:
            seen = _given(self._seen, document, needed=not statement.shape.makes_row)
            versions |= {} if seen is None else {"seen": seen}
        if self._new:
            versions["new"] = _given(self._new, document)
        row = "\0".join([str(key[column]) for column in sorted(key)]) if key else statement.document
        return Expected(
            self,
            (self.table, row),
            frozenset(before),
            write(before, "before") if before else "{}",
            write(versions, "version") if versions else "{}",
        )

    def lock(
        self, connection: psycopg.Connection, rows: Sequence[tuple[Statement, Expected]], key: Sequence[str]
    ) -> dict[int, Row]:
        """Lock the rows, by `key`, in the order given; place in `rows` → what was found there. Raises psycopg.Error."""
        documents = [(statement.document, expected.before, expected.versions) for statement, expected in rows]
        arrays = [f"[{','.join(column)}]" for column in zip(*documents, strict=True)]
        found = psycopg.RawCursor(connection).execute(self.query(key), arrays)
        return {number - 1: self._row(values) for number, *values in found}

    def query(self, key: Sequence[str]) -> bytes:
        """The query that locks and compares; its parameters are JSON arrays: rows, values before, versions."""
        known = self._queries.get(tuple(key))
        if known is None:
            known = self._queries.setdefault(tuple(key), self._compose(key))
        return known

    def _compose(self, key: Sequence[str]) -> bytes:
        table, version = sql.Identifier(*self.table), self.rules.version
        seen = dict.fromkeys([*key, *self._compared, *([version.column] if version else ())])
        other: sql.Composable = sql.SQL("NULL::bool")
        newer: sql.Composable = sql.SQL("NULL::bool")
        if version and version.seen:
            other = _version(version.column, "seen", self.table, _OTHER)
        if version and version.new:
            newer = _version(version.column, "new", self.table, _NEWER)
        computed = [sql.SQL("to_json({})::text").format(_expression(*it)) for it in self._computed.items()]
        return _LOCK.format(
            seen=sql.SQL(", ").join(sql.SQL("current.{}").format(sql.Identifier(column)) for column in seen),
            moved=_each("current", "before", self._seen_columns),
            changed=_each("new", "before", self._changing),
            differing=_each("current", "new", self._compared),
            computed=sql.SQL(", ").join(computed),
            other_version=other,
            newer=newer,
            table=table,
            empty=empty(self.table),
            row=sql.SQL(" AND ").join(
                sql.SQL("current.{c} = new.{c}").format(c=sql.Identifier(column)) for column in key
            ),
            # an UPDATE of columns that no foreign key refers to lets inserts of children pass, and so does this
            strength=sql.SQL("UPDATE" if self.action == "delete" else "NO KEY UPDATE"),
        ).as_bytes(None)

    def _expressions(self) -> Iterator[tuple[str, str]]:
        for group in self.groups:
            if self.rule_of(group) == "delta":
                yield from ((column, _DELTA) for column in group.columns)
            elif group.section is not None and group.section.sql is not None:
                yield group.columns[0], group.section.sql

    def _row(self, found: Sequence[Any]) -> Row:
        text, moved, changed, differing, computed, other_version, newer = found
        return Row(
            text,
            _named(self._seen_columns, moved),
            _named(self._changing, changed),
            _named(self._compared, differing),
            dict(zip(self._computed, computed, strict=True)),
            other_version,
            newer,
        )


def _each(a: str, b: str, columns: Sequence[str]) -> sql.Composed:
    return sql.SQL(", ").join(
        _UNEQUAL.format(a=sql.SQL(a), b=sql.SQL(b), c=sql.Identifier(column)) for column in columns
    )


def _named(columns: Sequence[str], flags: Sequence[bool]) -> frozenset[str]:
    return frozenset([column for column, flag in zip(columns, flags, strict=True) if flag])


def _given(path: Path, document: Document, *, needed: bool = True) -> Any:
    """The version; None where it is not needed and not there."""
    value = path.get(document)
    if value is not ABSENT and value is not None:
        return value
    if needed:
        raise Malformed(path.name, "yields null or nothing", expected="the version")
    return None


def _version(column: str, which: str, table: tuple[str, str], comparison: str) -> sql.Composed:
    """The row's version beside the event's, which PostgreSQL converts with the column's type; NULL for none."""
    event = sql.SQL(
        "CASE WHEN (d.versions -> {which}) IS NULL THEN '{{}}' "
        "ELSE json_build_object({name}::text, d.versions -> {which}) END"
    )
    converted = sql.SQL("(json_populate_record({empty}, {event})).{c}").format(
        empty=empty(table),
        event=event.format(name=sql.Literal(column), which=sql.Literal(which)),
        c=sql.Identifier(column),
    )
    current = sql.SQL("current.{}").format(sql.Identifier(column))
    return sql.SQL(comparison).format(c=current, v=converted)


def _expression(column: str, expression: str) -> sql.Composable:
    if expression == _DELTA:
        # where nobody else changed it, it is what the event says, and no difference that the type cannot hold
        moved, delta = _each("current", "before", [column]), sql.SQL(_DELTA).format(c=sql.Identifier(column))
        return sql.SQL("CASE WHEN {moved} THEN {delta} ELSE new.{c} END").format(
            moved=moved, delta=delta, c=sql.Identifier(column)
        )
    return sql.SQL(expression)  # the file's own SQL, which is the point of it
