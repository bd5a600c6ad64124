"""The section `reverse`: which events become which rows."""

from typing import Final, Literal, Self

from pydantic import Field, model_validator

from figbridge.config.fields import JmesPath, Section
from figbridge.config.mapping import MappingSection
from figbridge.config.plugin import PluginSection
from figbridge.config.transports import ReverseSourceSection, SqsSourceSection

_LONGEST_QUEUE: Final = 14  # days: the most that SQS keeps a message


class BareSection(Section):
    """What the envelope would say, as JMESPath over a message that has none; the message becomes the detail."""

    id: JmesPath = Field(description="Path of what tells the event from every other one, such as change_id.")
    source: JmesPath = Field(description="Path of its source; a constant is quoted: \"'shop.next'\".")
    detail_type: JmesPath = Field(alias="detail-type", description="Path of its detail-type, or a constant.")


class ReverseSection(Section):
    """The reverse path: the new system's events become rows of the legacy tables."""

    source: ReverseSourceSection = Field(description="Where events come from.")
    mappings: tuple[MappingSection, ...] = Field(min_length=1, description="What each kind of event does.")
    mode: Literal["live", "dry-run"] = Field(
        "live",
        description="dry-run: each event is applied and rolled back, and what it would have changed is kept in "
        "figbridge.dry_run. It acknowledges its events, so give it a queue of its own. See docs/dry-run.md.",
    )
    dry_run_retention: float = Field(
        7.0,
        alias="dry-run-retention",
        gt=0,
        le=36500,
        description="Days for which it is kept what a dry run would have changed.",
    )
    bare: BareSection | None = Field(
        None,
        description="Take messages without an envelope, too: what an input transformer made, or raw records. By "
        "default they are dead letters.",
    )
    unmapped: Literal["ignore", "dead-letter"] = Field(
        "ignore",
        description="What becomes of an event that no mapping is for: it is counted and ignored, as on a bus that "
        "others use too, or a dead letter.",
    )
    park_timeout: float = Field(
        86400.0,
        alias="park-timeout",
        gt=0,
        le=31536000,
        description="Seconds an event waits for the row it needs (its own or its parent) before it becomes a dead "
        "letter.",
    )
    inbox_retention: float = Field(
        30.0,
        alias="inbox-retention",
        ge=1,
        le=36500,
        description="Days for which an applied idempotency key is known. It must exceed the longest time that the "
        "queue keeps an event; what is older is stopped by its version.",
    )
    conflict_retention: float = Field(
        90.0,
        alias="conflict-retention",
        ge=1,
        le=36500,
        description="Days for which a conflict is kept that is decided or resolved. Open ones are kept until then.",
    )
    batch_size: int = Field(
        500, alias="batch-size", ge=1, le=10000, description="Most events that are applied in one transaction."
    )
    order: Literal["entity", "group"] = Field(
        "entity",
        description="What an event that has to wait holds up: later events of its entity alone, or with group, of a "
        "FIFO queue, also all later ones of its message group, which then is applied in the queue's order.",
    )
    max_hops: int = Field(
        8,
        alias="max-hops",
        ge=0,
        le=1000,
        description="Most bridges that an event may have passed (detail.hops, which a producer copies from the event "
        "it answers, so that a loop ends). One with more becomes a dead letter (ping_pong).",
    )
    statement_timeout: float = Field(
        10.0, alias="statement-timeout", gt=0, le=86400, description="Seconds a legacy statement of ours may take."
    )
    lock_timeout: float = Field(
        2.0, alias="lock-timeout", gt=0, le=86400, description="Seconds we wait for a lock of the legacy application."
    )

    @model_validator(mode="after")
    def _has_groups(self) -> Self:
        if self.order == "entity" or isinstance(self.source, PluginSection):
            return self
        url = self.source.queue_url if isinstance(self.source, SqsSourceSection) else None
        if url is None:
            raise ValueError(
                f"order: group is for a FIFO queue, and a source of type {self.source.type} has no message groups; set "
                "order to entity"
            )
        if not url.rstrip("/").endswith(".fifo"):  # as the name of every FIFO queue does
            raise ValueError(
                "order: group needs a FIFO queue, and the queue's name does not end in .fifo: a standard queue keeps "
                "no order, not even where its messages have a group; make a FIFO queue, or set order to entity"
            )
        return self

    @model_validator(mode="after")
    def _outlives_queue(self) -> Self:
        if isinstance(self.source, SqsSourceSection) and self.inbox_retention <= _LONGEST_QUEUE:
            raise ValueError(
                f"inbox-retention is within the {_LONGEST_QUEUE} days that SQS may keep a message, so a repetition "
                "could be applied twice; give more days"
            )
        return self
