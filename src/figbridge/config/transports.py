"""The sections of sinks and sources, one for each file of `figbridge.transports`."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from figbridge.config.fields import (
    FilePath,
    OneOrMore,
    Section,
    TextOrUnset,
    arn_of_bus,
    arn_of_topic,
    client_is_installed,
    name_of_delivery_stream,
    name_of_stream,
    template,
    url_of_endpoint,
    url_of_queue,
)
from figbridge.config.plugin import SINKS, SOURCES, OrPlugin, PluginSection

TraceHeader = Annotated[str, AfterValidator(template("trace", "id"))] | None
_TRACE_HEADER: Any = Field(
    None,
    alias="trace-header",
    max_length=200,
    description="Template of X-Ray's trace header (X-Amzn-Trace-Id) of each event, such as Root={trace};Sampled=1; "
    "{trace} is a trace id that all events of a transaction share, {id} the event's id.",
)


class AwsSection(Section):
    """What every AWS transport shares. Credentials come from boto3's usual chain, never from this file."""

    region: TextOrUnset = Field(None, description="AWS region; by default what boto3's chain finds.")
    endpoint_url: Annotated[TextOrUnset, AfterValidator(url_of_endpoint)] = Field(
        None, description="Another endpoint: an emulator or a VPC endpoint."
    )


class AwsSinkSection(AwsSection):
    """What every AWS sink shares."""

    in_flight: int = Field(
        16,
        alias="in-flight",
        ge=1,
        le=64,
        description="Most requests that wait for AWS's answer at once. Throttling lowers it by itself for a while.",
    )


class JsonSinkSection(AwsSinkSection):
    """What the sinks of JSON services share."""

    client: Annotated[Literal["boto3", "crt"], AfterValidator(client_is_installed)] = Field(
        "boto3",
        description="crt: requests are signed by the AWS Common Runtime and sent without botocore, for less "
        "than half of the CPU. It needs pip install 'figbridge[crt]', and goes through no proxy.",
    )


class EventBridgeSinkSection(JsonSinkSection):
    """Amazon EventBridge (the bus that AWS calls Classic), by PutEvents."""

    type: Literal["eventbridge"]
    bus: str = Field(
        min_length=1,
        description="Name or ARN of the event bus. Looked up before it is used: an unknown bus loses "
        "events with a success status.",
    )
    trace_header: TraceHeader = _TRACE_HEADER


class EventBridgeV2SinkSection(AwsSinkSection):
    """An EventBridge Custom Event Bus, by PutEvents of eventbridgev2: ordered by key, repetitions dropped."""

    type: Literal["eventbridge_v2"]
    bus: Annotated[str, AfterValidator(arn_of_bus)] = Field(description="ARN of the bus (event-busv2).")


class KinesisSinkSection(JsonSinkSection):
    """A Kinesis data stream, by PutRecords; the key of the row is the partition key."""

    type: Literal["kinesis"]
    stream: Annotated[str, AfterValidator(name_of_stream)] = Field(description="Name or ARN of the stream.")


class FirehoseSinkSection(JsonSinkSection):
    """A Firehose stream, by PutRecordBatch: JSON lines in S3 or another store. It keeps no order."""

    type: Literal["firehose"]
    stream: Annotated[str, AfterValidator(name_of_delivery_stream)] = Field(
        description="Name of the Firehose stream; one that applications put records into (Direct PUT)."
    )


class SqsSinkSection(JsonSinkSection):
    """An SQS queue, standard or FIFO, by SendMessageBatch."""

    type: Literal["sqs"]
    queue_url: Annotated[str, AfterValidator(url_of_queue)] = Field(
        description="URL of the queue. A FIFO queue keeps the order of each row and drops repetitions for 5 minutes."
    )
    trace_header: TraceHeader = _TRACE_HEADER


class SnsSinkSection(AwsSinkSection):
    """An SNS topic, standard or FIFO, by PublishBatch."""

    type: Literal["sns"]
    topic: Annotated[str, AfterValidator(arn_of_topic)] = Field(
        description="ARN of the topic. A FIFO topic keeps the order of each row and drops repetitions for 5 minutes."
    )


class ClaimCheckSection(AwsSection):
    """S3 for events that are too large for the sink."""

    bucket: str = Field(min_length=3, description="Name of the bucket. The bridge never deletes from it.")
    prefix: str = Field("figbridge/", description="What the objects' names begin with; the event's id follows.")


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


_OwnSink = Annotated[
    EventBridgeSinkSection
    | EventBridgeV2SinkSection
    | KinesisSinkSection
    | FirehoseSinkSection
    | SqsSinkSection
    | SnsSinkSection
    | FileSinkSection
    | StdoutSinkSection
    | LocalSinkSection,
    Field(discriminator="type"),
]
SinkSection = Annotated[
    EventBridgeSinkSection
    | EventBridgeV2SinkSection
    | KinesisSinkSection
    | FirehoseSinkSection
    | SqsSinkSection
    | SnsSinkSection
    | FileSinkSection
    | StdoutSinkSection
    | LocalSinkSection
    | PluginSection,
    OrPlugin(SINKS, _OwnSink),
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


class KinesisSourceSection(AwsSection):
    """A Kinesis data stream. Its place is kept in figbridge.stream_shard; replicas share the shards."""

    type: Literal["kinesis"]
    stream: Annotated[str, AfterValidator(name_of_stream)] = Field(description="Name or ARN of the stream.")
    subscriber: str = Field("figbridge", min_length=1, description="Name under which our place is kept.")
    start: Literal["trim_horizon", "latest"] = Field(
        "trim_horizon",
        description="Where to begin when the stream was never read: with the oldest record, or with what comes now.",
    )
    lease_seconds: float = Field(
        30.0,
        alias="lease-seconds",
        ge=1,
        le=3600,
        description="Seconds after which another replica takes over the shards of one that is silent.",
    )


_OwnSource = Annotated[LocalSourceSection | SqsSourceSection, Field(discriminator="type")]
SourceSection = Annotated[LocalSourceSection | SqsSourceSection | PluginSection, OrPlugin(SOURCES, _OwnSource)]
# a stream's place needs a database, which a relay has not
_OwnReverseSource = Annotated[LocalSourceSection | SqsSourceSection | KinesisSourceSection, Field(discriminator="type")]
ReverseSourceSection = Annotated[
    LocalSourceSection | SqsSourceSection | KinesisSourceSection | PluginSection, OrPlugin(SOURCES, _OwnReverseSource)
]
