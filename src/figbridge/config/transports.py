"""The sections of sinks and sources, one for each file of `figbridge.transports`."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from figbridge.config.fields import FilePath, OneOrMore, Section, TextOrUnset, url_of_queue


class AwsSection(Section):
    """What every AWS transport shares. Credentials come from boto3's usual chain, never from this file."""

    region: TextOrUnset = Field(None, description="AWS region; by default what boto3's chain finds.")
    endpoint_url: TextOrUnset = Field(None, description="Another endpoint: an emulator or a VPC endpoint.")


class EventBridgeSinkSection(AwsSection):
    """Amazon EventBridge, by PutEvents."""

    type: Literal["eventbridge"]
    bus: str = Field(
        min_length=1,
        description="Name or ARN of the event bus. Looked up before it is used: an unknown bus loses "
        "events with a success status.",
    )


class FileSinkSection(Section):
    """JSON lines, one event a line, made durable with fsync."""

    type: Literal["file"]
    path: FilePath = Field(description="The file to append to.")


class StdoutSinkSection(Section):
    """JSON lines on standard output, for a first look. Durable only as far as the reader of the pipe is."""

    type: Literal["stdout"]


class LocalSinkSection(Section):
    """The embedded bus: one SQLite file."""

    type: Literal["local"]
    path: FilePath = Field(description="The bus's file; made when missing.")


SinkSection = Annotated[
    EventBridgeSinkSection | FileSinkSection | StdoutSinkSection | LocalSinkSection, Field(discriminator="type")
]


class LocalSourceSection(Section):
    """A subscriber of the embedded bus."""

    type: Literal["local"]
    path: FilePath = Field(description="The bus's file; made when missing.")
    subscriber: str = Field("figbridge", min_length=1, description="Name under which the bus keeps our position.")
    sources: OneOrMore | None = Field(
        None, description="Only events of these sources; a trailing * matches a prefix. All by default."
    )


class SqsSourceSection(AwsSection):
    """An SQS queue, usually the target of an EventBridge rule."""

    type: Literal["sqs"]
    queue_url: Annotated[str, AfterValidator(url_of_queue)] = Field(description="URL of the queue.")
    visibility_timeout: int = Field(
        60, alias="visibility-timeout", ge=5, le=43200, description="Seconds a received message stays hidden."
    )


SourceSection = Annotated[LocalSourceSection | SqsSourceSection, Field(discriminator="type")]
