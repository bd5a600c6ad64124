"""How a table is read: what it is called and made of, its order, and the statement of each chunk.

INVARIANT. A chunk is a stretch of one order, without a gap, whatever ends it: also if its reading is broken off, the
rows that came are all rows between the cursor and the last of them.

    by key     WHERE (a, b) > (…) ORDER BY a, b LIMIT n              the replica identity's index, or the primary key
    by ctid    WHERE ctid > … AND ctid < '(block,0)' ORDER BY ctid   where there is none, one partition at a time

The replica identity goes first: an update that moves a row in the order of its index says so (`moved`).
Only an index in plain order will do (ascending, the column's collation, the type's default operators), without NULL:
then its ``>``, ORDER BY and the index mean the same. Which ``>`` that is says the index; by name alone somebody's own
may be found. Values are compared as their base types: a domain may rule out what is there (NOT VALID), and operators of
enums take none. What a table's rows are called in the stream must be told as pgoutput tells it, or the versions of its
schema would differ: the columns of the publication, key flags as the replica identity has them (`described`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from psycopg import sql

from figbridge.change import Column, Relation
from figbridge.errors import BridgeError
from figbridge.forward.snapshot import described
from figbridge.preflight.catalogue import Name, quote, spell

Cursor = dict[str, Any]  # JSON; None is the beginning, and so is one without a place

_BLOCKS: Final = 64  # of 8 KiB, that a chunk by ctid looks at, at most: the sort in it stays small


@dataclass(frozen=True, slots=True)
class Plan:
    """A table as the catalogue has it now.

    `relation` is what the stream's RELATION message says of it. `key` has the columns that the chunks are ordered by;
    without any, `leaves` are walked by ctid (OID, quoted name). `sought` has those that one row is looked up by: the
    key, or by ctid the identity, if its index finds them; `types` the quoted base type of each, `greater` and `equal`
    their operators, `path` the schemas of these if they have no one name. `identity` has the columns that name
    a row in events, if `keyed`; if not, some are not published, or may be NULL. `filter` is the publication's.
    `order` is another one where a cursor, or the ids of the rows before it, mean nothing any more: of another table,
    order, or key.
    """

    relation: Relation
    quoted: str
    type_names: tuple[tuple[int, str], ...]
    identity: tuple[str, ...]
    keyed: bool
    order: str
    key: tuple[str, ...]
    sought: tuple[str, ...]
    types: tuple[str, ...]
    greater: str
    equal: str
    path: tuple[str, ...]
    filter: str | None
    leaves: tuple[tuple[int, str], ...]

    def indexes(self, names: Sequence[str]) -> list[int]:
        """Where these columns are in a row, in their order."""
        places = {column.name: index for index, column in enumerate(self.relation.columns)}
        return [places[name] for name in names]


def describe(connection: psycopg.Connection, name: Name, publication: str) -> Plan | None:
    """The plan for a table; None when there is no such table. Raises BridgeError if it cannot be read faithfully."""
    statement = described.TABLE if connection.info.server_version >= 150000 else described.TABLE_14
    of = {"schema": name[0], "table": name[1], "publication": publication}
    head = connection.execute(statement, of, prepare=True).fetchone()  # its plan takes three times as long as the rest
    if head is None:
        return None
    oid, kind, identity, published, filter_, columns, indexes = head
    if not published:
        raise BridgeError(
            f"publication {spell(publication)} does not publish {spell(*name)} under this name",
            hint="rows that change while a snapshot runs would be wrong: add it to legacy.tables and `figbridge init`; "
            "a partitioned table needs publish_via_partition_root",
        )
    by_name = {column["name"]: column for column in columns}
    named = next((it for it in indexes if it["identity"]), None)
    identified: list[str] = named["columns"] if named else []
    if identity == "f" and not set(identified) <= by_name.keys():
        named, identified = None, []  # as `figbridge.forward.keys` has it
    flagged = list(by_name) if identity == "f" else identified
    usable = [it for it in indexes if it["plain"] and it["full"] and all(column in by_name for column in it["columns"])]
    usable.sort(key=lambda it: (not it["identity"], not it["primary"]))
    index = usable[0] if usable else None
    order: list[str] = index["columns"] if index else []
    finds = index or (named if named and named["searched"] and named["full"] else None)
    sought: list[str] = finds["columns"] if finds and set(finds["columns"]) <= by_name.keys() else []
    greater, equal, path = _operators(finds["operators"]) if finds and sought else ("", "", ())
    leaves = connection.execute(described.LEAVES, [oid, oid]).fetchall() if not order else []
    keyed = named is not None and named["full"] and all(column in by_name for column in identified)
    return Plan(
        relation=Relation(
            oid,
            *name,
            identity,
            tuple(Column(it["name"], it["type"], it["typmod"], it["name"] in flagged) for it in columns),
        ),
        quoted=f"ONLY {quote(*name)}" if kind == "r" else quote(*name),
        type_names=tuple((it["type"], it["named"]) for it in columns if it["named"]),
        identity=tuple(identified),
        keyed=keyed,
        order=f"{oid} by {index['order'] if index else 'ctid'} as {named['order'] if named and keyed else 'values'}",
        key=tuple(order),
        sought=tuple(sought),
        types=tuple(by_name[it]["written"] for it in sought),
        greater=greater,
        equal=equal,
        path=path,
        filter=filter_,
        leaves=tuple((leaf, quote(*names)) for leaf, *names in leaves),
    )


def _operators(found: Sequence[dict[str, tuple[str, str]]]) -> tuple[str, str, tuple[str, ...]]:
    """The ones of a key, and the schemas where to look for them if they have no one name.

    Rows are compared by one name, so citext beside an integer has them looked up by it in both schemas.
    """
    if all(it == found[0] for it in found):
        greater, equal = (
            f"OPERATOR({quote(schema)}.{sign})" for schema, sign in (found[0]["greater"], found[0]["equal"])
        )
        return greater, equal, ()
    return ">", "=", tuple(dict.fromkeys(schema for it in found for schema, _ in it.values()))


def estimate(connection: psycopg.Connection, plan: Plan) -> int | None:
    """How many rows the statistics think there are; None when nobody has counted."""
    row = connection.execute(
        "SELECT sum(greatest(reltuples, 0))::bigint, bool_or(reltuples >= 0) FROM pg_class WHERE oid IN "
        "(SELECT %(it)s::oid UNION SELECT relid FROM pg_partition_tree(%(it)s) WHERE isleaf) AND relkind = 'r'",
        {"it": plan.relation.oid},
    ).fetchone()
    return row[0] if row and row[1] else None


def key_chunk(
    plan: Plan,
    columns: sql.Composable,
    cursor: Cursor | None,
    condition: str | None,
    most: int,
    *,
    beyond: Sequence[str] | None = None,
) -> sql.Composed:
    """At most `most` rows behind `cursor`, {"order": …, "key": texts}; `columns` is what to say of each.

    Those before the key `beyond`, if there is one: in this form the index knows it as its end.
    """
    where = _conditions(plan, condition) + _behind(plan, cursor)
    if beyond is not None:
        where.append(_greater(plan, _literals(plan, beyond), _compared(plan)))
    return _select(columns, sql.SQL(plan.quoted), where) + sql.SQL(" ORDER BY {} LIMIT {}").format(
        _ordered(plan), sql.Literal(most)
    )


def key_ends(plan: Plan, cursor: Cursor | None, rows: int) -> sql.Composed:
    """The keys of the last of so many rows behind `cursor`, and of the one behind it; as their types print them."""
    keys = sql.SQL(", ").join(sql.SQL("pg_catalog.concat({})").format(sql.Identifier(name)) for name in plan.key)
    select = _select(keys, sql.SQL(plan.quoted), _behind(plan, cursor))
    return select + sql.SQL(" ORDER BY {} OFFSET {} LIMIT 2").format(_ordered(plan), sql.Literal(rows - 1))


def beginning(plan: Plan) -> Cursor:
    """Before the first row. It is noted before any leaves: another order then takes other ids."""
    return {"order": plan.order}


def cursor(plan: Plan, key: Sequence[str]) -> Cursor:
    """Behind the row with this key."""
    return {"order": plan.order, "key": list(key)}


def key_rows(
    plan: Plan, columns: sql.Composable, connection: psycopg.Connection
) -> Callable[[Cursor | Sequence[bytes] | None, int], bytes]:
    """The same without a condition and for a table without a filter, again and again.

    What is always the same is composed once: that takes half a millisecond. In the place of a cursor may be the names
    that the values of the key have.
    """
    select = _select(columns, sql.SQL(plan.quoted), []).as_bytes(connection)
    where = sql.SQL(" WHERE ({}) {} (").format(_compared(plan), sql.SQL(plan.greater)).as_bytes(connection)
    order = sql.SQL(" ORDER BY {} LIMIT ").format(_ordered(plan)).as_bytes(connection)

    types = [sql.SQL(written).as_bytes(connection) for written in plan.types]

    def statement(cursor: Cursor | Sequence[bytes] | None, most: int) -> bytes:
        if not cursor or (isinstance(cursor, dict) and "key" not in cursor):
            return b"%b%b%d" % (select, order, most)
        if isinstance(cursor, dict):
            key = _literals(plan, cursor["key"]).as_bytes(connection)
        else:
            key = b", ".join([b"%b::%b" % it for it in zip(cursor, types, strict=True)])
        return b"%b%b%b)%b%d" % (select, where, key, order, most)

    return statement


def key_count(plan: Plan, cursor: Cursor | None, most: int) -> sql.Composed:
    """How many rows the statement of `key_rows` has."""
    rows = key_chunk(plan, sql.SQL(""), cursor, None, most)
    return sql.SQL("SELECT pg_catalog.count(*) FROM ({}) AS a").format(rows)


def rows_chunk(
    plan: Plan, columns: sql.Composable, keys: Sequence[Sequence[str]], condition: str | None
) -> sql.Composed:
    """The rows with these keys, those that are there.

    Of a list without VALUES, where a key has several columns, the server would look for the rows in all of the table.
    """
    wanted = sql.SQL(", ").join(sql.SQL("({})").format(_literals(plan, key)) for key in keys)
    among = sql.SQL("({}) {} ANY (VALUES {})").format(_compared(plan), sql.SQL(plan.equal), wanted)
    where = [*_conditions(plan, condition), among]
    return _select(columns, sql.SQL(plan.quoted), where) + sql.SQL(" ORDER BY {}").format(_ordered(plan))


def ctid_chunk(plan: Plan, columns: sql.Composable, cursor: Cursor, condition: str | None) -> sql.Composed:
    """The rows behind `cursor`, {"order": …, "leaf": OID, "filenode": …, "ctid": text, "until": block}."""
    name = next(name for oid, name in plan.leaves if oid == cursor["leaf"])
    where = _conditions(plan, condition)
    where.append(sql.SQL("ctid > {}::tid").format(sql.Literal(cursor["ctid"])))
    where.append(sql.SQL("ctid < {}::tid").format(sql.Literal(f"({ctid_end(cursor)},0)")))
    return _select(columns, sql.SQL("ONLY ") + sql.SQL(name), where) + sql.SQL(" ORDER BY ctid")


def ctid_end(cursor: Cursor) -> int:
    """The block before which a chunk behind `cursor` ends."""
    block = int(cursor["ctid"].strip("(").split(",")[0])
    return min(int(cursor["until"]), block + _BLOCKS)


def ctid_leaf(connection: psycopg.Connection, plan: Plan, cursor: Cursor | None) -> Cursor | None:
    """`cursor`, or the beginning of the next table to be walked by ctid; None at the end of the last.

    A table that was rewritten meanwhile (VACUUM FULL) has its rows elsewhere, so it is begun anew. What was appended
    after the beginning came by the stream.
    """
    later = [oid for oid, _ in plan.leaves]
    if cursor and "leaf" in cursor:
        if cursor["leaf"] in later and int(cursor["ctid"].strip("(").split(",")[0]) < cursor["until"]:
            row = connection.execute("SELECT pg_relation_filenode(%s)::bigint", [cursor["leaf"]]).fetchone()
            if row and row[0] == cursor["filenode"]:
                return cursor
            later = [oid for oid in later if oid >= cursor["leaf"]]
        else:
            later = [oid for oid in later if oid > cursor["leaf"]]
    for leaf in later:
        row = connection.execute(
            "SELECT pg_relation_filenode(%(it)s)::bigint, "
            "ceil(pg_relation_size(%(it)s) / current_setting('block_size')::numeric)::bigint",
            {"it": leaf},
        ).fetchone()
        if row and row[1]:
            return beginning(plan) | {"leaf": leaf, "filenode": row[0], "ctid": "(0,0)", "until": row[1]}
    return None


def _select(columns: sql.Composable, table: sql.Composable, where: list[sql.Composable]) -> sql.Composed:
    condition = sql.SQL(" WHERE ") + sql.SQL(" AND ").join(where) if where else sql.SQL("")
    return sql.SQL("SELECT {} FROM {}{}").format(columns, table, condition)


def _conditions(plan: Plan, condition: str | None) -> list[sql.Composable]:
    # the operator's own SQL, in a read-only transaction
    return [sql.SQL("(") + sql.SQL(it) + sql.SQL(")") for it in (plan.filter, condition) if it]


def _behind(plan: Plan, cursor: Cursor | None) -> list[sql.Composable]:
    if not cursor or "key" not in cursor:
        return []
    return [_greater(plan, _compared(plan), _literals(plan, cursor["key"]))]


def _greater(plan: Plan, one: sql.Composable, other: sql.Composable) -> sql.Composed:
    return sql.SQL("({}) {} ({})").format(one, sql.SQL(plan.greater), other)


def _compared(plan: Plan) -> sql.Composed:
    """The key's columns. A cast to the type that they have is none."""
    columns = zip(plan.sought, plan.types, strict=True)
    return sql.SQL(", ").join([sql.SQL("{}::{}").format(sql.Identifier(it), sql.SQL(type_)) for it, type_ in columns])


def _ordered(plan: Plan) -> sql.Composed:
    """By the key. A bare name would be the result's column of that name, if it has one: ``to_json``, say."""
    return sql.SQL(", ").join(sql.Identifier(plan.relation.name, name) for name in plan.sought)


def _literals(plan: Plan, texts: Sequence[str]) -> sql.Composed:
    return sql.SQL(", ").join(
        sql.SQL("{}::{}").format(sql.Literal(text), sql.SQL(written))
        for text, written in zip(texts, plan.types, strict=True)
    )
