"""The section `relay`: events that any service published, held against contracts and published anew."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from figbridge.config.fields import FilePath, JmesPath, Section, not_aws
from figbridge.config.forward import DeadLettersSection
from figbridge.config.transports import FileSinkSection, LocalSinkSection, SinkSection, SourceSection, StdoutSinkSection

_ONE_WRITER = FileSinkSection | LocalSinkSection | StdoutSinkSection


class RelaySection(Section):
    """The relay: what keeps its contract goes on as ``valid.<source>``, what breaks it is set aside with reasons."""

    source: SourceSection | None = Field(
        None, description="Where events come from, usually the queue of a rule. The AWS Lambda function needs none."
    )
    sink: SinkSection = Field(description="Where valid events go, usually the bus that they came from.")
    contracts: FilePath = Field(
        description="Directory of the contracts: <source>/<detail-type>.json. See docs/relay.md."
    )
    unknown: Literal["quarantine", "forward"] = Field(
        "quarantine", description="What happens to an event for which there is no contract."
    )
    quarantine: SinkSection | None = Field(
        None, description="Where invalid events go, with the reasons: a queue, another bus. Or set dead-letters."
    )
    dead_letters: DeadLettersSection | None = Field(
        None,
        alias="dead-letters",
        description="Where invalid events go without a quarantine, and what the quarantine does not take.",
    )
    prefix: Annotated[str, Field(min_length=1), AfterValidator(not_aws)] = Field(
        "valid.",
        description="What the source of a valid event begins with. What has it already is dropped and counted.",
    )
    quarantine_prefix: Annotated[str, Field(min_length=1), AfterValidator(not_aws)] = Field(
        "invalid.",
        alias="quarantine-prefix",
        description="The same of what is set aside, so that it never comes back as an event to validate.",
    )
    max_hops: int = Field(
        1,
        alias="max-hops",
        ge=1,
        le=100,
        description="How often an event may be forwarded; one that was so often is dropped and counted.",
    )
    event_id: JmesPath | None = Field(
        None,
        alias="event-id",
        description="JMESPath of what tells a repetition; by default the id in the detail of figbridge's own events, "
        "and the envelope's id of all others.",
    )
    key: JmesPath | None = Field(
        None,
        description="JMESPath of what order is kept by, where source and sink keep any; by default the row of "
        "figbridge's own events, and none of others.",
    )
    remember: int = Field(
        100_000, ge=0, description="Ids of forwarded events that are remembered, to drop what the queue delivers again."
    )
    parallel: int = Field(
        1,
        ge=1,
        le=32,
        description="Loops that receive, validate and publish at the same time, each with ends of its own.",
    )

    @model_validator(mode="after")
    def _somewhere_to_go(self) -> Self:
        if self.quarantine is None and self.dead_letters is None:
            raise ValueError(
                "neither quarantine nor dead-letters is there, and the first invalid event would stop the relay; "
                "say where they go"
            )
        return self

    @model_validator(mode="after")
    def _marks_differ(self) -> Self:
        one, other = self.prefix, self.quarantine_prefix
        if one.startswith(other) or other.startswith(one):
            raise ValueError("prefix and quarantine-prefix begin alike, so an event could be both; choose others")
        return self

    @model_validator(mode="after")
    def _many_writers(self) -> Self:
        one = isinstance(self.sink, _ONE_WRITER) or isinstance(self.quarantine, _ONE_WRITER)
        if self.parallel > 1 and (one or (self.source is not None and self.source.type != "sqs")):
            raise ValueError("parallel is for ends in AWS, and a file has one reader and one writer; set it to 1")
        return self
