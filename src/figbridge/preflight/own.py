"""The tables of our own: what the code stands on in schema.sql, and which of them a configuration needs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from figbridge.config import Config


@dataclass(frozen=True, slots=True)
class OwnTable:
    """What the bridge needs of one of its own tables. `added` are columns that `init` adds to an older one."""

    columns: frozenset[str]
    key: frozenset[str]
    rights: tuple[str, ...]
    added: frozenset[str] = frozenset()


_LETTERS_TOO: Final = frozenset({"statement", "table_name", "position", "key", "old_key", "whole_table", "place"})
# schema.sql, as far as the code stands on it. A table somebody else put there under our name is not ours.
OWN: Final[Mapping[str, OwnTable]] = {
    "inbox": OwnTable(
        frozenset({"source", "idempotency_key", "payload_hash", "event_id", "applied_at"}),
        frozenset({"source", "idempotency_key"}),  # without it nothing is applied exactly once
        ("SELECT", "INSERT", "DELETE"),
    ),
    "canary": OwnTable(
        frozenset({"nonce", "slot", "written_at", "seen_at"}),
        frozenset({"nonce"}),
        ("SELECT", "INSERT", "UPDATE", "DELETE"),
    ),
    "entity_version": OwnTable(
        frozenset({"scope", "identity", "version", "deleted", "updated_at"}),
        frozenset({"scope", "identity"}),
        ("SELECT", "INSERT", "UPDATE"),
    ),
    "parked": OwnTable(
        frozenset(
            {
                "source",
                "idempotency_key",
                "payload_hash",
                "event_id",
                "scope",
                "identity",
                "makes_row",
                "row_missing",
                "awaited_table",
                "awaited_columns",
                "awaited",
                "reason",
                "message",
                "attempts",
                "body",
                "place",
                "parked_at",
                "due_at",
                "message_group",
            }
        ),
        frozenset({"source", "idempotency_key"}),
        ("SELECT", "INSERT", "UPDATE", "DELETE"),
        frozenset({"message_group"}),
    ),
    "stream_shard": OwnTable(
        frozenset({"stream", "subscriber", "shard", "parents", "since", "checkpoint", "checkpoint_at", "ended"})
        | {"holder", "held_until"},
        frozenset({"stream", "subscriber", "shard"}),
        ("SELECT", "INSERT", "UPDATE"),
    ),
    "conflict": OwnTable(
        frozenset(
            {"id", "source", "idempotency_key", "event_id", "scope", "identity", "version", "kind", "decision", "state"}
            | {"resolution", "table_name", "statement", "expected", "before", "proposed", "after", "columns"}
            | {"message", "event", "created_at", "resolved_at"}
        ),
        frozenset({"id"}),
        ("SELECT", "INSERT", "UPDATE", "DELETE"),
    ),
    "dry_run": OwnTable(
        frozenset(
            {"id", "source", "idempotency_key", "event_id", "scope", "identity", "outcome", "reason", "message"}
            | {"differences", "conflicts", "created_at"}
        ),
        frozenset({"id"}),
        ("SELECT", "INSERT", "DELETE"),
    ),
    "dead_letter": OwnTable(
        frozenset({"id", "direction", "event_id", "reason", "message", "attempts", "body", "created_at"})
        | _LETTERS_TOO,
        frozenset({"id"}),
        ("SELECT", "INSERT", "DELETE"),
        _LETTERS_TOO,
    ),
    "slot_guard": OwnTable(
        frozenset({"slot", "system_identifier", "timeline", "holder", "acknowledged", "bound", "updated_at"})
        | {"published"},
        frozenset({"slot"}),
        ("SELECT", "INSERT", "UPDATE", "DELETE"),
        frozenset({"published"}),
    ),
    "table_version": OwnTable(
        frozenset({"slot", "system_identifier", "relation", "commit_lsn", "ordinal", "described"}),
        frozenset({"slot", "system_identifier", "relation", "commit_lsn", "ordinal"}),
        ("SELECT", "INSERT", "DELETE"),
    ),
    "snapshot": OwnTable(
        frozenset(
            {"slot", "system_identifier", "schema_name", "table_name", "run", "state", "condition", "cursor", "rows"}
            | {"estimate", "message", "requested_at", "started_at", "updated_at", "gap", "since"}
        ),
        frozenset({"slot", "system_identifier", "schema_name", "table_name"}),
        ("SELECT", "INSERT", "UPDATE", "DELETE"),
        frozenset({"gap", "since"}),
    ),
    "snapshot_moved": OwnTable(
        frozenset({"slot", "system_identifier", "schema_name", "table_name", "name", "key", "commit_lsn", "ordinal"}),
        frozenset({"slot", "system_identifier", "schema_name", "table_name", "name"}),
        ("SELECT", "INSERT", "UPDATE", "DELETE"),
    ),
}


_FORWARD: Final = frozenset({"slot_guard", "table_version", "snapshot", "snapshot_moved"})


def forward_tables(config: Config) -> tuple[str, ...]:
    """Which of our tables the forward path writes by itself; the canary's, which it only answers, is the other's."""
    letters = config.forward.dead_letters if config.forward else None
    used = _FORWARD | ({"dead_letter"} if letters and letters.type == "table" else set())
    return tuple(name for name in own_tables(config) if name in used)


def own_tables(config: Config) -> tuple[str, ...]:
    """Which of our tables the configuration needs; none for a forward path that stops at an event nobody takes."""
    sections = [section for section in (config.forward, config.relay) if section]
    letters = any(it.dead_letters is not None and it.dead_letters.type == "table" for it in sections)
    needed = {
        "inbox": config.reverse is not None,
        "canary": config.reverse is not None,
        "entity_version": config.reverse is not None,
        "parked": config.reverse is not None,
        "stream_shard": config.reverse is not None and config.reverse.source.type == "kinesis",
        "conflict": config.reverse is not None and any(it.rules for m in config.reverse.mappings for it in m.parts),
        "dry_run": config.reverse is not None and config.reverse.mode == "dry-run",
        "dead_letter": config.reverse is not None or letters,
        "slot_guard": config.guards_slot,
        "table_version": config.keeps_versions,
        "snapshot": config.takes_snapshots,
        "snapshot_moved": config.takes_snapshots,
    }
    return tuple(name for name in OWN if needed[name])
