"""What the catalogue of the legacy database says, as values: tables, publications, slots.

Read only, without locks, and with no opinion: the other modules of this package judge.
Catalogues: https://www.postgresql.org/docs/current/catalogs.html
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

import psycopg
from psycopg import sql
from psycopg.rows import class_row

from figbridge.change import Lsn

Name = tuple[str, str]  # (schema, table), as the catalogue spells them

_PLAIN: Final = re.compile(r"[a-z_][a-z0-9_$]*")
_MADE_AT: Final = re.compile(r"figbridge: made at ([0-9A-F]+/[0-9A-F]+)")


def spell(*name: str) -> str:
    """The name as a person writes it: quotes only where SQL needs them for its letters."""
    return ".".join(part if _PLAIN.fullmatch(part) else quote(part) for part in name)


def quote(*name: str) -> str:
    """The name as SQL that cannot be misread."""
    return sql.Identifier(*name).as_string(None)


def literal(text: str) -> str:
    """The text as an SQL literal, for where a statement takes no parameters."""
    return sql.Literal(text).as_string(None).strip()


@dataclass(frozen=True, slots=True)
class Table:
    """A row of pg_class, of any kind.

    kind           relkind: r table, p partitioned, v view, m materialized view, f foreign, S sequence, i index …
    persistence    relpersistence: p permanent, u unlogged, t temporary
    identity       relreplident: d default (primary key), i index, f full, n nothing
    has_identity   an UPDATE of a published row finds what to call the row; for a partitioned table, its template
    owned          the role is the owner, or a member of it, or superuser
    readable       the role may SELECT
    policed        row-level security may hide rows from the role
    generated      generated columns, which no publication of ours carries
    identity_generated   the replica identity contains one of them
    identity_columns   those of the index that is the replica identity; none where the identity is full or nothing
    """

    oid: int
    schema: str
    name: str
    kind: str
    persistence: str
    identity: str
    has_identity: bool
    is_partition: bool
    owned: bool
    readable: bool
    policed: bool
    generated: list[str]
    identity_generated: bool
    identity_columns: list[str]

    def __str__(self) -> str:
        return spell(self.schema, self.name)

    @property
    def quoted(self) -> str:
        """The name for a statement."""
        return quote(self.schema, self.name)


# A deferrable primary key is no replica identity: the server skips indexes that are not immediate
# (RelationGetIndexList), and then refuses the UPDATE.
_TABLES: Final = """
    SELECT c.oid::bigint AS oid, n.nspname AS schema, c.relname AS name, c.relkind::text AS kind,
           c.relpersistence::text AS persistence, c.relreplident::text AS identity,
           c.relreplident = 'f' OR identity.columns IS NOT NULL AS has_identity,
           c.relispartition AS is_partition,
           pg_has_role(c.relowner, 'USAGE') AS owned,
           has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT') AS readable,
           row_security_active(c.oid) AS policed,
           generated.names AS generated,
           CASE WHEN c.relreplident = 'f' THEN cardinality(generated.names) > 0
                ELSE coalesce(generated.numbers && identity.columns, false) END AS identity_generated,
           ARRAY(SELECT a.attname::text FROM pg_attribute a
                 WHERE a.attrelid = c.oid AND a.attnum = ANY (identity.columns) ORDER BY 1) AS identity_columns
    FROM pg_class c
    JOIN pg_namespace n ON n.oid = c.relnamespace
    LEFT JOIN LATERAL (
        SELECT (i.indkey::int2[])[0:i.indnkeyatts - 1]::int[] AS columns
        FROM pg_index i
        WHERE i.indrelid = c.oid AND i.indisvalid AND i.indisunique AND i.indimmediate
          AND CASE c.relreplident WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident ELSE false END
    ) AS identity ON true
    CROSS JOIN LATERAL (
        SELECT coalesce(array_agg(a.attname::text ORDER BY a.attnum), '{}') AS names,
               coalesce(array_agg(a.attnum::int), '{}') AS numbers
        FROM pg_attribute a
        WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated <> ''
    ) AS generated
    WHERE (n.nspname::text, c.relname::text) IN (SELECT * FROM unnest(%(schemas)s::text[], %(names)s::text[]))
       OR c.oid IN (SELECT relid FROM pg_partition_tree(%(root)s) WHERE isleaf)
"""


def tables(connection: psycopg.Connection, names: Iterable[Name]) -> dict[Name, Table]:
    """What stands under each of `names`; a name that is not there is not in the answer."""
    wanted = list(dict.fromkeys(names))
    found = _fetch(connection, [schema for schema, _ in wanted], [name for _, name in wanted], None)
    return {(table.schema, table.name): table for table in found}


def leaves(connection: psycopg.Connection, root: Table) -> list[Table]:
    """The partitions of a partitioned table that hold rows."""
    return _fetch(connection, [], [], root.oid)


def ancestors(connection: psycopg.Connection, partition: Table) -> list[Name]:
    """The partitioned tables above a partition."""
    return connection.execute(
        "SELECT n.nspname::text, c.relname::text FROM pg_partition_ancestors(%s) AS a (relid) "
        "JOIN pg_class c ON c.oid = a.relid JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid <> %s",
        [partition.oid, partition.oid],
    ).fetchall()


def children(connection: psycopg.Connection, parent: Table) -> list[Name]:
    """The tables that inherit from a plain one (INHERITS, not partitions)."""
    return connection.execute(
        "SELECT n.nspname::text, c.relname::text FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid "
        "JOIN pg_namespace n ON n.oid = c.relnamespace WHERE i.inhparent = %s ORDER BY 1, 2",
        [parent.oid],
    ).fetchall()


def _fetch(connection: psycopg.Connection, schemas: list[str], names: list[str], root: int | None) -> list[Table]:
    with connection.cursor(row_factory=class_row(Table)) as cursor:
        return cursor.execute(_TABLES, {"schemas": schemas, "names": names, "root": root}).fetchall()


def suggestion(connection: psycopg.Connection, name: Name) -> str:
    """The existing table whose name looks most like `name`, spelled; empty when none does."""
    rows = connection.execute(
        "SELECT n.nspname::text, c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
        "WHERE c.relkind IN ('r', 'p') AND n.nspname NOT LIKE 'pg\\_%' AND n.nspname <> 'information_schema'"
    ).fetchall()
    near = difflib.get_close_matches(spell(*name), [spell(*row) for row in rows], n=1)
    return near[0] if near else ""


class Member(NamedTuple):
    """A table in a publication, by OIDs: its own, and that of the row of pg_publication_rel that puts it there."""

    relation: int
    row: int


@dataclass(frozen=True, slots=True)
class Publication:
    """A row of pg_publication with what it publishes.

    `version` is the xmin of that row. `narrowed` are the tables with a row filter or a column list. `made_at` is where
    in the WAL figbridge made it, None when somebody else did.
    """

    oid: int
    version: str
    all_tables: bool
    schemas: tuple[str, ...]
    tables: frozenset[Name]
    members: dict[Name, Member]
    narrowed: tuple[Name, ...]
    operations: frozenset[str]
    via_root: bool
    owned: bool
    made_at: Lsn | None


def publication(connection: psycopg.Connection, name: str) -> Publication | None:
    """The publication of that name in this database, if there is one."""
    row = connection.execute(
        """
        SELECT p.oid::bigint, p.xmin::text, p.puballtables, p.pubinsert, p.pubupdate, p.pubdelete, p.pubtruncate,
               p.pubviaroot, pg_has_role(p.pubowner, 'USAGE'), obj_description(p.oid, 'pg_publication')
        FROM pg_publication p WHERE p.pubname = %s
        """,
        [name],
    ).fetchone()
    if row is None:
        return None
    oid, version, all_tables, *operations, via_root, owned, comment = row
    # to_jsonb, because prqual and prattrs came with 15
    members = connection.execute(
        """
        SELECT n.nspname::text, c.relname::text, c.oid::bigint, r.oid::bigint,
               coalesce(to_jsonb(r) ->> 'prqual', to_jsonb(r) ->> 'prattrs') IS NOT NULL
        FROM pg_publication_rel r JOIN pg_class c ON c.oid = r.prrelid JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE r.prpubid = %s ORDER BY 1, 2
        """,
        [oid],
    ).fetchall()
    schemas: list[tuple[str]] = []
    if connection.info.server_version >= 150000:
        schemas = connection.execute(
            "SELECT n.nspname::text FROM pg_publication_namespace s JOIN pg_namespace n ON n.oid = s.pnnspid "
            "WHERE s.pnpubid = %s ORDER BY 1",
            [oid],
        ).fetchall()
    made_at = _MADE_AT.match(comment or "")
    return Publication(
        oid=oid,
        version=version,
        all_tables=all_tables,
        schemas=tuple(schema for (schema,) in schemas),
        tables=frozenset((schema, table) for schema, table, *_ in members),
        members={(schema, table): Member(relation, row) for schema, table, relation, row, _ in members},
        narrowed=tuple((schema, table) for schema, table, _, _, narrowed in members if narrowed),
        operations=frozenset(
            word for word, on in zip(("insert", "update", "delete", "truncate"), operations, strict=True) if on
        ),
        via_root=via_root,
        owned=owned,
        made_at=Lsn.parse(made_at[1]) if made_at else None,
    )


@dataclass(frozen=True, slots=True)
class Slot:
    """A row of pg_replication_slots; names are cluster-wide, so it may belong to another database.

    `holder` says who reads it now, None when nobody does. `retained` is the WAL kept for it, `safe` what may still be
    written before it can be lost (None: without limit), both in bytes. `failover` and `synced` are None before 17.
    """

    name: str
    kind: str
    plugin: str | None
    database: str | None
    here: bool
    temporary: bool
    holder: str | None
    wal_status: str | None
    invalidation: str | None
    restart: Lsn | None
    confirmed: Lsn | None
    retained: int | None
    safe: int | None
    failover: bool | None
    synced: bool | None


def slot(connection: psycopg.Connection, name: str) -> Slot | None:
    """The replication slot of that name in this cluster, if there is one."""
    row = connection.execute(
        """
        SELECT s.slot_type, s.plugin, s.database, s.database IS NOT DISTINCT FROM current_database(), s.temporary,
               CASE WHEN s.active_pid IS NOT NULL THEN concat_ws(
                   ', ', 'pid ' || s.active_pid, nullif(a.application_name, ''), a.usename, host(a.client_addr)) END,
               -- the reason came with 17; conflicting (16) is also true for a slot whose WAL was removed
               s.wal_status, to_jsonb(s) ->> 'invalidation_reason', s.restart_lsn::text, s.confirmed_flush_lsn::text,
               CASE WHEN NOT pg_is_in_recovery() THEN pg_wal_lsn_diff(pg_current_wal_lsn(), s.restart_lsn) END::bigint,
               s.safe_wal_size, (to_jsonb(s) ->> 'failover')::bool, (to_jsonb(s) ->> 'synced')::bool
        FROM pg_replication_slots s LEFT JOIN pg_stat_activity a ON a.pid = s.active_pid
        WHERE s.slot_name = %s
        """,
        [name],
    ).fetchone()
    if row is None:
        return None
    kind, plugin, database, here, temporary, holder, wal_status, invalidation, restart, confirmed, *sizes = row
    retained, safe, failover, synced = sizes
    return Slot(
        name=name,
        kind=kind,
        plugin=plugin,
        database=database,
        here=here,
        temporary=temporary,
        holder=holder,
        wal_status=wal_status,
        invalidation=invalidation,
        restart=Lsn.parse(restart) if restart else None,
        confirmed=Lsn.parse(confirmed) if confirmed else None,
        retained=retained,
        safe=safe,
        failover=failover,
        synced=synced,
    )


def has_origin(connection: psycopg.Connection, name: str) -> bool:
    """Whether there is a replication origin of that name; they are cluster-wide."""
    return connection.execute("SELECT true FROM pg_replication_origin WHERE roname = %s", [name]).fetchone() is not None


def sender_timeout(connection: psycopg.Connection) -> tuple[float, bool]:
    """This session's wal_sender_timeout in seconds, 0 when it is off, and whether somebody chose it for us.

    That is: for the role, for the database, or in the DSN; not for the whole server. On a replication connection too.
    https://www.postgresql.org/docs/current/view-pg-settings.html
    """
    row = connection.execute(
        "SELECT setting::int, source NOT IN ('default', 'configuration file', 'command line', 'environment variable', "
        "'global') FROM pg_settings WHERE name = 'wal_sender_timeout'"
    ).fetchone()
    return (row[0] / 1000, row[1]) if row else (0.0, False)


def holder(connection: psycopg.Connection, slot: str) -> tuple[int, str] | None:
    """(pid, who it is, as far as our role may see) of the process that reads the slot; None while nobody does."""
    row = connection.execute(
        "SELECT s.active_pid, concat_ws(', ', 'pid ' || s.active_pid, nullif(a.application_name, ''), "
        "'from ' || host(a.client_addr), 'since ' || a.backend_start::timestamptz(0)) "
        "FROM pg_replication_slots s LEFT JOIN pg_stat_activity a ON a.pid = s.active_pid "
        "WHERE s.slot_name = %s AND s.active_pid IS NOT NULL",
        [slot],
    ).fetchone()
    return (row[0], row[1]) if row else None
