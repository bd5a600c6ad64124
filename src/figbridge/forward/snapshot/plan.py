"""How a table is read: what it is called and made of, its order, and the statement of each chunk.

INVARIANT. A chunk is a stretch of one order, without a gap, whatever ends it: also if its reading is broken off, the
rows that came are all rows between the cursor and the last of them.

    by key     WHERE (a, b) > (…) ORDER BY a, b LIMIT n              the replica identity's index, or the primary key
    by ctid    WHERE ctid > … AND ctid < '(block,0)' ORDER BY ctid   where there is none, one partition at a time

The replica identity goes first: an update that moves a row in the order of its index says so (`moved`).
Only an index in plain order will do (ascending, the column's collation, the type's default operators): then ``>``,
ORDER BY and the index mean the same. What a table's rows are called in the stream must be told as pgoutput tells it, or
the versions of its schema would differ: the columns of the publication, key flags as the replica identity has them.

What is published is read from the catalogues, not from ``pg_publication_tables``: since 16 that view opens every table
of the publication (pg_get_publication_tables), so somebody's long ALTER TABLE of one would stop the snapshots of all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from psycopg import sql

from figbridge.change import Column, Relation
from figbridge.errors import BridgeError
from figbridge.preflight.catalogue import Name, quote, spell

Cursor = dict[str, Any]  # JSON; None is the beginning

_BLOCKS: Final = 64  # of 8 KiB, that a chunk by ctid looks at, at most: the sort in it stays small


@dataclass(frozen=True, slots=True)
class Plan:
    """A table as the catalogue has it now.

    `relation` is what the stream's RELATION message says of it. `key` has the columns that the chunks are ordered by
    and `types` how to write a literal of each; without any, `leaves` are walked by ctid (OID, quoted name).
    `identity` has the columns that name a row in events. `filter` is the publication's, `path` the schemas in which the
    operators of the key's types are.
    """

    relation: Relation
    quoted: str
    type_names: tuple[tuple[int, str], ...]
    identity: tuple[str, ...]
    key: tuple[str, ...]
    types: tuple[str, ...]
    path: tuple[str, ...]
    filter: str | None
    leaves: tuple[tuple[int, str], ...]

    def indexes(self, names: Sequence[str]) -> list[int]:
        """Where these columns are in a row, in their order."""
        places = {column.name: index for index, column in enumerate(self.relation.columns)}
        return [places[name] for name in names]


def describe(connection: psycopg.Connection, name: Name, publication: str) -> Plan | None:
    """The plan for a table; None when there is no such table. Raises BridgeError if it cannot be read faithfully."""
    statement = _TABLE if connection.info.server_version >= 150000 else _TABLE_14
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
    primary: list[str] = next((it["columns"] for it in indexes if it["primary"]), [])
    named: list[str] = next((it["columns"] for it in indexes if it["identity"]), [])
    flagged = list(by_name) if identity == "f" else named
    usable = [it for it in indexes if it["plain"] and all(column in by_name for column in it["columns"])]
    usable.sort(key=lambda it: (not it["identity"], not it["primary"]))
    order: list[str] = next((it["columns"] for it in usable), [])
    leaves = connection.execute(_LEAVES, [oid, oid]).fetchall() if not order else []
    return Plan(
        relation=Relation(
            oid,
            *name,
            identity,
            tuple(Column(it["name"], it["type"], it["typmod"], it["name"] in flagged) for it in columns),
        ),
        quoted=f"ONLY {quote(*name)}" if kind == "r" else quote(*name),
        type_names=tuple((it["type"], it["named"]) for it in columns if it["named"]),
        identity=tuple(primary if identity == "f" else named),
        key=tuple(order),
        types=tuple(by_name[it]["written"] for it in order),
        path=tuple(dict.fromkeys(by_name[it]["schema"] for it in order)),
        filter=filter_,
        leaves=tuple((leaf, quote(*names)) for leaf, *names in leaves),
    )


def estimate(connection: psycopg.Connection, plan: Plan) -> int | None:
    """How many rows the statistics think there are; None when nobody has counted."""
    row = connection.execute(
        "SELECT sum(greatest(reltuples, 0))::bigint, bool_or(reltuples >= 0) FROM pg_class WHERE oid IN "
        "(SELECT %(it)s::oid UNION SELECT relid FROM pg_partition_tree(%(it)s) WHERE isleaf) AND relkind = 'r'",
        {"it": plan.relation.oid},
    ).fetchone()
    return row[0] if row and row[1] else None


def key_chunk(
    plan: Plan, columns: sql.Composable, cursor: Cursor | None, condition: str | None, most: int
) -> sql.Composed:
    """At most `most` rows behind `cursor`, {"columns": names, "key": texts}; `columns` is what to say of each."""
    where = _conditions(plan, condition)
    if cursor:
        where.append(sql.SQL("({}) > ({})").format(_listed(plan.key), _literals(plan, cursor["key"])))
    return _select(columns, sql.SQL(plan.quoted), where) + sql.SQL(" ORDER BY {} LIMIT {}").format(
        _ordered(plan), sql.Literal(most)
    )


def cursor(plan: Plan, key: Sequence[str]) -> Cursor:
    """Behind the row with this key."""
    return {"columns": list(plan.key), "key": list(key)}


def key_rows(
    plan: Plan, columns: sql.Composable, connection: psycopg.Connection
) -> Callable[[Cursor | bytes | None, int], bytes]:
    """The same without a condition and for a table without a filter, again and again.

    What is always the same is composed once: that takes half a millisecond. In the place of a cursor may be what has
    the key in SQL.
    """
    select = _select(columns, sql.SQL(plan.quoted), []).as_bytes(connection)
    where = sql.SQL(" WHERE ({}) > (").format(_listed(plan.key)).as_bytes(connection)
    order = sql.SQL(" ORDER BY {} LIMIT ").format(_ordered(plan)).as_bytes(connection)

    def statement(cursor: Cursor | bytes | None, most: int) -> bytes:
        if not cursor:
            return b"%b%b%d" % (select, order, most)
        key = cursor if isinstance(cursor, bytes) else _literals(plan, cursor["key"]).as_bytes(connection)
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
    where = [*_conditions(plan, condition), sql.SQL("({}) IN (VALUES {})").format(_listed(plan.key), wanted)]
    return _select(columns, sql.SQL(plan.quoted), where) + sql.SQL(" ORDER BY {}").format(_ordered(plan))


def ctid_chunk(plan: Plan, columns: sql.Composable, cursor: Cursor, condition: str | None) -> sql.Composed:
    """The rows behind `cursor`, {"leaf": OID, "filenode": …, "ctid": text, "until": block}."""
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
    if cursor:
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
            return {"leaf": leaf, "filenode": row[0], "ctid": "(0,0)", "until": row[1]}
    return None


def _select(columns: sql.Composable, table: sql.Composable, where: list[sql.Composable]) -> sql.Composed:
    condition = sql.SQL(" WHERE ") + sql.SQL(" AND ").join(where) if where else sql.SQL("")
    return sql.SQL("SELECT {} FROM {}{}").format(columns, table, condition)


def _conditions(plan: Plan, condition: str | None) -> list[sql.Composable]:
    # the operator's own SQL, in a read-only transaction
    return [sql.SQL("(") + sql.SQL(it) + sql.SQL(")") for it in (plan.filter, condition) if it]


def _listed(names: Sequence[str]) -> sql.Composed:
    return sql.SQL(", ").join(map(sql.Identifier, names))


def _ordered(plan: Plan) -> sql.Composed:
    """By the key. A bare name would be the result's column of that name, if it has one: ``to_json``, say."""
    return sql.SQL(", ").join(sql.Identifier(plan.relation.name, name) for name in plan.key)


def _literals(plan: Plan, texts: Sequence[str]) -> sql.Composed:
    return sql.SQL(", ").join(
        sql.SQL("{}::{}").format(sql.Literal(text), sql.SQL(written))  # by format_type()
        for text, written in zip(texts, plan.types, strict=True)
    )


# Partitions change as themselves, or with publish_via_partition_root as the topmost of their ancestors that is in the
# publication (get_rel_sync_entry, GetPubPartitionOptionRelations). `here`: the table is in it, `above`: an ancestor is;
# by name, or with all tables or all of a schema, as far as these can be published (is_publishable_class).
_PUBLISHED: Final = """
    SELECT p.oid AS publication, to_jsonb(p) ->> 'pubgencols' = 's' AS stored
    FROM pg_publication p CROSS JOIN LATERAL (
        SELECT coalesce(bool_or(t.oid = c.oid), false) AS here, coalesce(bool_or(t.oid <> c.oid), false) AS above
        FROM pg_class t
        WHERE t.oid IN (SELECT c.oid UNION SELECT relid FROM pg_partition_ancestors(c.oid))
          AND (EXISTS (SELECT FROM pg_publication_rel r WHERE r.prpubid = p.oid AND r.prrelid = t.oid)
               OR t.relpersistence = 'p' AND t.oid >= 16384 AND (p.puballtables {or_schema}))
    ) AS m
    WHERE p.pubname = %(publication)s
      AND CASE WHEN p.pubviaroot THEN m.here AND NOT m.above ELSE c.relkind = 'r' AND (m.here OR m.above) END
"""
_OR_SCHEMA: Final = """
    OR EXISTS (SELECT FROM pg_publication_namespace s WHERE s.pnpubid = p.oid AND s.pnnspid = t.relnamespace)
"""
# A table that is in the publication with its schema, too, has its rows unfiltered. pg_get_expr locks this one table.
_NARROWED: Final = """
    SELECT r.prattrs::int2[] AS columns, pg_get_expr(r.prqual, r.prrelid) AS filter
    FROM pg_publication_rel r
    WHERE r.prpubid = p.publication AND r.prrelid = c.oid AND NOT EXISTS (
        SELECT FROM pg_publication_namespace s WHERE s.pnpubid = r.prpubid AND s.pnnspid = c.relnamespace)
"""
_NEVER_NARROWED: Final = "SELECT NULL::int2[] AS columns, NULL::text AS filter"  # before 15

# As pgoutput describes a table: dropped and unpublished columns are not there, a type of one's own has the name of its
# base type (logicalrep_write_typ). Since 18 generated columns can be there, listed or by publish_generated_columns.
_DESCRIBED: Final = """
SELECT c.oid::bigint, c.relkind::text, c.relreplident::text, p.publication IS NOT NULL, narrowed.filter,
       (SELECT coalesce(json_agg(json_build_object(
                   'name', a.attname, 'type', a.atttypid::bigint, 'typmod', a.atttypmod,
                   'written', format_type(a.atttypid, a.atttypmod), 'schema', tn.nspname, 'named', base.name
               ) ORDER BY a.attnum), '[]')
        FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid JOIN pg_namespace tn ON tn.oid = t.typnamespace
        LEFT JOIN LATERAL (
            WITH RECURSIVE domain AS (
                SELECT t.oid, t.typbasetype AS base WHERE a.atttypid >= 10000
                UNION ALL SELECT b.oid, b.typbasetype FROM domain d JOIN pg_type b ON b.oid = d.base
            )
            SELECT bn.nspname || '.' || b.typname AS name
            FROM domain d JOIN pg_type b ON b.oid = d.oid JOIN pg_namespace bn ON bn.oid = b.typnamespace
            WHERE d.base = 0
        ) AS base ON true
        WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
          AND CASE WHEN narrowed.columns IS NOT NULL THEN a.attnum = ANY (narrowed.columns)
                   ELSE a.attgenerated = '' OR a.attgenerated = 's' AND p.stored END),
       (SELECT coalesce(json_agg(json_build_object(
                   'primary', i.indisprimary, 'identity', CASE c.relreplident WHEN 'd' THEN i.indisprimary
                                                          WHEN 'i' THEN i.indisreplident ELSE false END,
                   'columns', k.columns, 'plain', k.plain) ORDER BY i.indexrelid), '[]')
        FROM pg_index i CROSS JOIN LATERAL (
            SELECT array_agg(a.attname ORDER BY x.place) AS columns,
                   bool_and(x.option = 0 AND o.opcdefault AND x.collation_ = a.attcollation) AS plain
            FROM unnest(i.indkey::int2[], i.indoption::int2[], i.indclass::oid[], i.indcollation::oid[])
                 WITH ORDINALITY AS x (number, option, class, collation_, place)
            JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = x.number
            LEFT JOIN pg_opclass o ON o.oid = x.class
            WHERE x.place <= i.indnkeyatts
        ) AS k
        WHERE i.indrelid = c.oid AND i.indisunique AND i.indisvalid AND i.indimmediate
          AND i.indpred IS NULL AND i.indexprs IS NULL AND (i.indisprimary OR i.indisreplident))
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN LATERAL ({published}) AS p ON true
LEFT JOIN LATERAL ({narrowed}) AS narrowed ON p.publication IS NOT NULL
WHERE n.nspname = %(schema)s AND c.relname = %(table)s AND c.relkind IN ('r', 'p')
"""
_TABLE: Final = _DESCRIBED.format(published=_PUBLISHED.format(or_schema=_OR_SCHEMA), narrowed=_NARROWED)
_TABLE_14: Final = _DESCRIBED.format(published=_PUBLISHED.format(or_schema=""), narrowed=_NEVER_NARROWED)
_LEAVES: Final = """
SELECT c.oid::bigint, n.nspname::text, c.relname::text
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'r' AND c.oid IN (SELECT %s::oid UNION SELECT relid FROM pg_partition_tree(%s) WHERE isleaf)
ORDER BY c.oid
"""
