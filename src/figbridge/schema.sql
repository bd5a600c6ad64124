-- All tables of figbridge, in one schema of their own. The legacy tables are never altered.
-- Forward capture needs none of this; the reverse path, its loop guard and table dead letters do. Where they are, the
-- forward path keeps its tripwire here too.

CREATE SCHEMA IF NOT EXISTS figbridge;

-- Keys already applied. A row is written by the first statement of each reverse transaction, so it commits with the
-- legacy rows or not at all; and since it is published, it is also the mark by which the forward path knows an echo.
CREATE TABLE IF NOT EXISTS figbridge.inbox (
    source          text        NOT NULL,
    idempotency_key text        NOT NULL,
    payload_hash    bytea       NOT NULL,  -- the same key with another payload is an error, not a duplicate
    event_id        text        NOT NULL,
    applied_at      timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (source, idempotency_key)
);
CREATE INDEX IF NOT EXISTS inbox_applied_at ON figbridge.inbox (applied_at);

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
    id         text        PRIMARY KEY,  -- hash of direction and body: the same letter twice is one letter
    direction  text        NOT NULL CHECK (direction IN ('forward', 'reverse')),
    event_id   text,                     -- null when the body was not even an event
    reason     text        NOT NULL,     -- a code: an AWS error code, a SQLSTATE, or one of ours such as key_reuse
    message    text        NOT NULL,
    attempts   integer     NOT NULL,
    body       bytea       NOT NULL,     -- the event's envelope, or the message as it came
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX IF NOT EXISTS dead_letter_created_at ON figbridge.dead_letter (created_at);

-- The tripwire on a replication slot: nothing beyond `bound` was ever confirmed by the bridge, so a slot that stands
-- further was moved or made anew by somebody else. Never an offset: nothing is read from here on. To accept a slot as
-- it stands, delete its row.
CREATE TABLE IF NOT EXISTS figbridge.slot_guard (
    slot              text        PRIMARY KEY,
    system_identifier text        NOT NULL,
    timeline          bigint      NOT NULL,
    holder            text        NOT NULL,  -- the process that streams, by a name of its own
    acknowledged      pg_lsn      NOT NULL,  -- at least so far, for the message to a human
    bound             pg_lsn      NOT NULL,  -- at most so far
    updated_at        timestamptz NOT NULL DEFAULT now()
);
