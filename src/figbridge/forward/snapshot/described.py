"""The queries that describe a table as pgoutput will: what is published of it, under which name, with which key.

What is published is read from the catalogues, not from ``pg_publication_tables``: since 16 that view opens every table
of the publication (pg_get_publication_tables), so somebody's long ALTER TABLE of one would stop the snapshots of all.
https://www.postgresql.org/docs/current/catalog-pg-index.html, catalog-pg-amop.html
"""

from typing import Final

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
_NEVER_NARROWED: Final = "SELECT NULL::int2[] AS columns, NULL::pg_catalog.text AS filter"  # before 15

# A key's columns may have NULL if their constraint was never validated (18). 403 is btree: of others, such as the gist
# index of a temporal key, strategies have other meanings. From 18 on an invalid primary key is a partitioned table's
# replica identity, too. "char", type 18, is no key: until 15 what it prints beyond ASCII is no literal.
# `order` is what the order of an index depends on. Of a collation's versions it has the one of the catalogue, which a
# standby has, too: the one of the libraries may differ there, and somebody refreshes it when the indexes are made anew.
# As pgoutput describes a table: dropped and unpublished columns are not there, a type of one's own has the name of its
# base type (logicalrep_write_typ). Since 18 generated columns can be there, listed or by publish_generated_columns.
_DESCRIBED: Final = """
SELECT c.oid::bigint, c.relkind::pg_catalog.text, c.relreplident::pg_catalog.text, p.publication IS NOT NULL,
       narrowed.filter,
       (SELECT coalesce(json_agg(json_build_object(
                   'name', a.attname, 'type', a.atttypid::bigint, 'typmod', a.atttypmod,
                   'written', coalesce(base.written, format('%%I.%%I', tn.nspname, t.typname)), 'named', base.name
               ) ORDER BY a.attnum), '[]')
        FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid JOIN pg_namespace tn ON tn.oid = t.typnamespace
        LEFT JOIN LATERAL (
            WITH RECURSIVE domain AS (
                SELECT t.oid, t.typbasetype AS base WHERE a.atttypid >= 10000
                UNION ALL SELECT b.oid, b.typbasetype FROM domain d JOIN pg_type b ON b.oid = d.base
            )
            SELECT bn.nspname || '.' || b.typname AS name, format('%%I.%%I', bn.nspname, b.typname) AS written
            FROM domain d JOIN pg_type b ON b.oid = d.oid JOIN pg_namespace bn ON bn.oid = b.typnamespace
            WHERE d.base = 0
        ) AS base ON true
        WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
          AND CASE WHEN narrowed.columns IS NOT NULL THEN a.attnum = ANY (narrowed.columns)
                   ELSE a.attgenerated = '' OR a.attgenerated = 's' AND p.stored END),
       (SELECT coalesce(json_agg(json_build_object(
                   'primary', i.indisprimary, 'columns', k.columns, 'operators', k.operators, 'order', k.order,
                   'full', k.full AND i.indisvalid, 'searched', k.searched AND i.indisvalid AND ic.relam = 403,
                   'plain', k.plain AND i.indisvalid AND i.indimmediate AND ic.relam = 403,
                   'identity', CASE c.relreplident
                       WHEN 'f' THEN i.indisprimary
                       WHEN 'd' THEN i.indisprimary AND i.indimmediate AND (i.indisvalid OR c.relkind = 'p' AND
                                     current_setting('server_version_num')::int >= 180000)
                       WHEN 'i' THEN i.indisreplident AND i.indimmediate AND i.indisvalid ELSE false END
               ) ORDER BY i.indexrelid), '[]')
        FROM pg_index i JOIN pg_class ic ON ic.oid = i.indexrelid CROSS JOIN LATERAL (
            SELECT array_agg(a.attname ORDER BY x.place) AS columns,
                   bool_and(x.option = 0 AND o.opcdefault AND x.collation_ = a.attcollation
                            AND a.atttypid <> 18) AS plain,
                   bool_and(x.collation_ = a.attcollation AND a.atttypid <> 18) AS searched,
                   bool_and(a.attnotnull AND NOT EXISTS (
                       SELECT FROM pg_constraint nn WHERE nn.conrelid = a.attrelid AND nn.contype = 'n'
                                                      AND NOT nn.convalidated AND a.attnum = ANY (nn.conkey)
                   )) AS full,
                   string_agg(concat_ws(' ', quote_ident(a.attname), a.attnum, a.atttypid, a.atttypmod, x.class, (
                       SELECT concat_ws(' ', co.oid, coalesce(co.collversion, (
                           SELECT to_jsonb(d) ->> 'datcollversion' FROM pg_database d
                           WHERE d.datname = current_database() AND co.collprovider = 'd')))
                       FROM pg_collation co WHERE co.oid = x.collation_
                   )), ', ' ORDER BY x.place) AS "order",
                   json_agg((
                       SELECT json_object_agg(CASE m.amopstrategy WHEN 5 THEN 'greater' ELSE 'equal' END,
                                              json_build_array(pn.nspname, p.oprname))
                       FROM pg_amop m JOIN pg_operator p ON p.oid = m.amopopr
                       JOIN pg_namespace pn ON pn.oid = p.oprnamespace
                       WHERE m.amopfamily = o.opcfamily AND m.amoplefttype = o.opcintype
                         AND m.amoprighttype = o.opcintype AND m.amopstrategy IN (3, 5)
                   ) ORDER BY x.place) AS operators
            FROM unnest(i.indkey::int2[], i.indoption::int2[], i.indclass::oid[], i.indcollation::oid[])
                 WITH ORDINALITY AS x (number, option, class, collation_, place)
            JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = x.number
            LEFT JOIN pg_opclass o ON o.oid = x.class
            WHERE x.place <= i.indnkeyatts
        ) AS k
        WHERE i.indrelid = c.oid AND i.indisunique AND i.indpred IS NULL AND i.indexprs IS NULL
          AND (i.indisprimary OR i.indisreplident))
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN LATERAL ({published}) AS p ON true
LEFT JOIN LATERAL ({narrowed}) AS narrowed ON p.publication IS NOT NULL
WHERE n.nspname = %(schema)s AND c.relname = %(table)s AND c.relkind IN ('r', 'p')
"""
TABLE: Final = _DESCRIBED.format(published=_PUBLISHED.format(or_schema=_OR_SCHEMA), narrowed=_NARROWED)
TABLE_14: Final = _DESCRIBED.format(published=_PUBLISHED.format(or_schema=""), narrowed=_NEVER_NARROWED)
LEAVES: Final = """
SELECT c.oid::bigint, n.nspname::pg_catalog.text, c.relname::pg_catalog.text
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'r' AND c.oid IN (SELECT %s::oid UNION SELECT relid FROM pg_partition_tree(%s) WHERE isleaf)
ORDER BY c.oid
"""
