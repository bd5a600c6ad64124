-- All tables of figbridge, in one schema of their own. The legacy tables are never altered.
-- Forward capture needs none of this; the reverse path, its loop guard and table dead letters do. Where they are, the
-- forward path keeps its tripwire here too.

CREATE SCHEMA IF NOT EXISTS figbridge;

-- Keys already applied. A row is written by the first statement of each reverse transaction, so it commits with the
-- legacy rows or not at all; and since it is published, it is also the mark by which the forward path knows an echo.
-- Keys are compared byte by byte: quicker, and whatever the operating system thinks of an order, an index stays unique.
-- A table that an older figbridge made keeps its order: to change it would write the index anew under a lock.
CREATE TABLE IF NOT EXISTS figbridge.inbox (
    source          text COLLATE "C" NOT NULL,
    idempotency_key text COLLATE "C" NOT NULL,
    payload_hash    bytea       NOT NULL,  -- the same key with another payload is an error, not a duplicate
    event_id        text        NOT NULL,
    applied_at      timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (source, idempotency_key)
);
-- for purging; a btree would cost each event as much as the key itself
DROP INDEX IF EXISTS figbridge.inbox_applied_at;
CREATE INDEX IF NOT EXISTS inbox_age ON figbridge.inbox USING brin (applied_at) WITH (pages_per_range = 16);

-- The newest version of each entity that an event was applied of, deleted ones too: a late event must not bring a row
-- back, not even when its key was purged. Compared and written by one statement. Never purged.
CREATE TABLE IF NOT EXISTS figbridge.entity_version (
    scope      text COLLATE "C" NOT NULL,  -- the table, or the source where a mapping names none
    identity   text COLLATE "C" NOT NULL,
    version    numeric     NOT NULL,
    deleted    boolean     NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (scope, identity)
) WITH (fillfactor = 80);  -- an update finds room beside its row and touches no index

-- Events that wait for a row: their own or their parent. Acknowledged at the queue, so they must be safe here. Later
-- events of the same entity wait behind them, and of the same message group where reverse.order says so.
CREATE TABLE IF NOT EXISTS figbridge.parked (
    source          text        NOT NULL,
    idempotency_key text        NOT NULL,
    payload_hash    bytea       NOT NULL,
    event_id        text        NOT NULL,
    scope           text        NOT NULL,
    identity        text        NOT NULL,
    makes_row       boolean     NOT NULL,
    row_missing     boolean     NOT NULL,  -- it waits for the row that it is about, and for nothing else
    awaited_table   text[],                -- schema and table of the row it waits for; null: it waits for its turn
    awaited_columns text[],
    awaited         text,                  -- JSON object of those columns
    reason          text        NOT NULL,
    message         text        NOT NULL,
    attempts        integer     NOT NULL,
    body            bytea       NOT NULL,  -- the message as it came
    place           bigint      GENERATED ALWAYS AS IDENTITY,
    parked_at       timestamptz NOT NULL DEFAULT now(),
    due_at          timestamptz NOT NULL DEFAULT now(),
    message_group   text,                  -- queue and group whose order is kept; null: only the entity's
    PRIMARY KEY (source, idempotency_key)
);
ALTER TABLE figbridge.parked ADD COLUMN IF NOT EXISTS message_group text;  -- where an older figbridge made it
CREATE INDEX IF NOT EXISTS parked_entity ON figbridge.parked (scope, identity, place);
CREATE INDEX IF NOT EXISTS parked_group ON figbridge.parked (message_group, place) WHERE message_group IS NOT NULL;

-- What an event expected to find and did not, and who won: written in the transaction of the decision. Open ones wait for
-- `figbridge conflicts resolve` and are kept until then; the others are purged with age. Only where a mapping has rules
-- for conflicts. It holds row values: guard it like the tables.
CREATE TABLE IF NOT EXISTS figbridge.conflict (
    id              bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    source          text        NOT NULL,
    idempotency_key text        NOT NULL,
    event_id        text        NOT NULL,
    scope           text        NOT NULL,
    identity        text        NOT NULL,
    version         numeric,
    kind            text        NOT NULL,
    decision        text        NOT NULL,  -- new, legacy, merged, delta, sql, rejected
    state           text        NOT NULL CHECK (state IN ('open', 'decided', 'resolved', 'dismissed')),
    resolution      text,                  -- who won in the end, where a person said so: new or legacy
    table_name      text        NOT NULL,
    statement       integer     NOT NULL,  -- which row of the mapping's, from 1
    expected        json,                  -- what the new system had seen
    before          json,                  -- the row as it was found: the columns that the mapping names
    proposed        json,                  -- what the event says
    after           json,                  -- what was written; null for nothing, and for a deletion
    columns         json        NOT NULL,  -- column: who won it
    message         text        NOT NULL,
    event           json        NOT NULL,  -- the envelope
    created_at      timestamptz NOT NULL DEFAULT now(),
    resolved_at     timestamptz
);
CREATE INDEX IF NOT EXISTS conflict_open ON figbridge.conflict (id) WHERE state = 'open';
CREATE INDEX IF NOT EXISTS conflict_age ON figbridge.conflict USING brin (created_at);

-- Shards of Kinesis streams: who reads each, and how far. To read a stream from the beginning again, delete its rows.
CREATE TABLE IF NOT EXISTS figbridge.stream_shard (
    stream        text        NOT NULL,  -- its ARN, and when it was made: a new one of that name has other shards
    subscriber    text        NOT NULL,
    shard         text        NOT NULL,
    parents       text[]      NOT NULL,  -- to be read to their end before it
    since         timestamptz,           -- where it begins without a checkpoint; null: with its oldest record
    checkpoint    text,                  -- sequence number; all records up to it are done
    checkpoint_at timestamptz,
    ended         boolean     NOT NULL DEFAULT false,
    holder        text,
    held_until    timestamptz,
    PRIMARY KEY (stream, subscriber, shard)
);

-- What events of a dry run would have changed; only there. It holds row values: guard it like the tables.
CREATE TABLE IF NOT EXISTS figbridge.dry_run (
    id              bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    source          text,                  -- null when the message was not even an event
    idempotency_key text,
    event_id        text,
    scope           text,
    identity        text,
    outcome         text        NOT NULL,  -- applied, ignored, retried, dead_letter: what it would have been
    reason          text        NOT NULL,
    message         text        NOT NULL,
    differences     json        NOT NULL,  -- [{statement, table, columns, before, after}]
    conflicts       json        NOT NULL,  -- [{kind, decision}]
    created_at      timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX IF NOT EXISTS dry_run_age ON figbridge.dry_run USING brin (created_at);

-- The proof, at each start, that an echo is recognised: written by the reverse path like any reverse transaction,
-- answered (seen_at) by the forward path when it has dropped the echo.
CREATE TABLE IF NOT EXISTS figbridge.canary (
    nonce      text        PRIMARY KEY,
    slot       text        NOT NULL,
    written_at timestamptz NOT NULL DEFAULT now(),
    seen_at    timestamptz
);

-- Events that could not be delivered or applied, with everything needed to try them again.
CREATE TABLE IF NOT EXISTS figbridge.dead_letter (
    id          text        PRIMARY KEY,  -- hash of direction and body: the same letter twice is one letter
    direction   text        NOT NULL,     -- forward, reverse or relay
    event_id    text,                     -- null when the body was not even an event
    reason      text        NOT NULL,     -- a code: an AWS error code, a SQLSTATE, or one of ours such as key_reuse
    message     text        NOT NULL,
    attempts    integer     NOT NULL,
    body        bytea       NOT NULL,     -- the event's envelope, or the message as it came
    statement   text,                     -- the SQL that failed, without its values
    created_at  timestamptz NOT NULL DEFAULT now(),
    table_name  text,                     -- schema.table that it is about, or was for
    position    json,                     -- where in the legacy history it was; not jsonb: shown as it was
    key         text,                     -- what order is kept by when it is published again, with the next two
    old_key     text,
    whole_table boolean     NOT NULL DEFAULT false,
    place       bigint      GENERATED ALWAYS AS IDENTITY  -- the order of arrival
);
ALTER TABLE figbridge.dead_letter  -- where an older figbridge made it
    DROP CONSTRAINT IF EXISTS dead_letter_direction_check,
    ADD COLUMN IF NOT EXISTS statement text, ADD COLUMN IF NOT EXISTS table_name text,
    ADD COLUMN IF NOT EXISTS position json, ADD COLUMN IF NOT EXISTS key text, ADD COLUMN IF NOT EXISTS old_key text,
    ADD COLUMN IF NOT EXISTS whole_table boolean NOT NULL DEFAULT false,
    ADD COLUMN IF NOT EXISTS place bigint GENERATED ALWAYS AS IDENTITY;
CREATE INDEX IF NOT EXISTS dead_letter_place ON figbridge.dead_letter (place);
CREATE INDEX IF NOT EXISTS dead_letter_created_at ON figbridge.dead_letter (created_at);

-- The tripwire on a replication slot: nothing beyond `bound` was ever confirmed by the bridge, so a slot that stands
-- further was moved or made anew by somebody else. Never an offset: nothing is read from here on. To accept a slot as
-- it stands, delete its row; to accept its publications as they are, set `published` to null.
CREATE TABLE IF NOT EXISTS figbridge.slot_guard (
    slot              text        PRIMARY KEY,
    system_identifier text        NOT NULL,
    timeline          bigint      NOT NULL,
    holder            text        NOT NULL,  -- the process that streams, by a name of its own
    acknowledged      pg_lsn      NOT NULL,  -- at least so far, for the message to a human
    bound             pg_lsn      NOT NULL,  -- at most so far
    updated_at        timestamptz NOT NULL DEFAULT now(),
    published         text                   -- JSON: what the publications held when the bridge looked last
);
ALTER TABLE figbridge.slot_guard ADD COLUMN IF NOT EXISTS published text;  -- where an older figbridge made it

-- What a published table looked like, from which row on: so that a change of its schema is announced once, in its place,
-- also when it was changed while no bridge ran. A row is written when a schema has changed, and hardly ever else.
CREATE TABLE IF NOT EXISTS figbridge.table_version (
    slot              text   NOT NULL,
    system_identifier text   NOT NULL,
    relation          bigint NOT NULL,  -- the OID
    commit_lsn        pg_lsn NOT NULL,
    ordinal           bigint NOT NULL,
    described         json   NOT NULL,  -- not jsonb, which would order the keys anew: an event repeats its bytes
    PRIMARY KEY (slot, system_identifier, relation, commit_lsn, ordinal)
);

-- Snapshots: which tables, how far. A row is a request, a progress report and the place to go on from, in one.
CREATE TABLE IF NOT EXISTS figbridge.snapshot (
    slot              text        NOT NULL,
    system_identifier text        NOT NULL,
    schema_name       text        NOT NULL,
    table_name        text        NOT NULL,
    run               bigint      NOT NULL,  -- part of the ids of its events
    state             text        NOT NULL CHECK (state IN ('waiting', 'running', 'paused', 'done', 'cancelled', 'failed')),
    condition         text,                  -- SQL, of rows that are wanted; null for all
    cursor            json,                  -- behind what is durable; null at the beginning
    rows              bigint      NOT NULL DEFAULT 0,
    estimate          bigint,
    message           text,                  -- why it failed
    requested_at      timestamptz NOT NULL DEFAULT now(),
    started_at        timestamptz,
    updated_at        timestamptz NOT NULL DEFAULT now(),
    gap               text,                  -- why changes are in no event; null where none are missing
    since             pg_lsn,                -- what is there was told behind this place, once the state is done
    PRIMARY KEY (slot, system_identifier, schema_name, table_name)
);
ALTER TABLE figbridge.snapshot ADD COLUMN IF NOT EXISTS gap text;  -- where an older figbridge made it
ALTER TABLE figbridge.snapshot ADD COLUMN IF NOT EXISTS since pg_lsn;

-- Keys to which rows moved while their table was read, where an update did not tell all of the row: they are read by
-- these keys at the end. A row is written for such an update, and is gone when its snapshot has ended.
CREATE TABLE IF NOT EXISTS figbridge.snapshot_moved (
    slot              text   NOT NULL,
    system_identifier text   NOT NULL,
    schema_name       text   NOT NULL,
    table_name        text   NOT NULL,
    name              text   NOT NULL,  -- a hash of the key, which may be too long for an index
    key               json   NOT NULL,  -- column: text
    commit_lsn        pg_lsn NOT NULL,  -- of the last such update
    ordinal           bigint NOT NULL,
    PRIMARY KEY (slot, system_identifier, schema_name, table_name, name)
);
