"""The configuration file: what may stand where, and every problem at once, each with its field and remedy."""

from typing import Any

import jsonschema  # type: ignore[import-untyped]  # it has no type information, and one call needs no stubs
import pytest
import yaml

from figbridge.config import (
    Config,
    EventBridgeSinkSection,
    HttpSection,
    LocalSourceSection,
    SqsSourceSection,
    TableDeadLetters,
)
from figbridge.errors import ConfigError
from fixtures.configured import ENVIRONMENT, EXAMPLE, LEGACY, MAPPING, mapping, parse, problems, reverse, tree

# --- the example, and what may stand where


def test_the_example_loads_and_says_what_it_seems_to_say() -> None:
    config = Config.load(EXAMPLE, ENVIRONMENT)

    assert config.legacy.dsn.get_secret_value() == ENVIRONMENT["LEGACY_DSN"]
    assert config.legacy.tables == ("shop.orders", "shop.widgets")
    assert config.legacy.inbox_publication == "figbridge_inbox"
    assert config.forward is not None
    assert config.reverse is not None
    sink, source = config.forward.sink, config.reverse.source
    assert isinstance(sink, EventBridgeSinkSection)
    assert (sink.bus, sink.region, sink.endpoint_url) == ("orders", "eu-west-1", None)
    assert isinstance(config.forward.dead_letters, TableDeadLetters)
    assert isinstance(source, SqsSourceSection)
    assert source.queue_url == ENVIRONMENT["REVERSE_QUEUE"]
    assert [each.action for each in config.reverse.mappings] == ["insert", "update"]
    assert config.http.address == ("127.0.0.1", 9464)


def test_the_json_schema_accepts_the_example_and_refuses_what_the_loader_refuses() -> None:
    schema = Config.model_json_schema(by_alias=True)
    validator = jsonschema.Draft202012Validator(schema)
    example = yaml.safe_load(EXAMPLE.read_text())

    assert list(validator.iter_errors(example)) == []
    assert list(validator.iter_errors(example | {"forwards": {}}))
    assert list(validator.iter_errors(example | {"forward": {"sink": {"type": "kafka"}}}))


def test_the_defaults_of_the_smallest_file() -> None:
    config = parse(tree())

    assert (config.legacy.slot, config.legacy.publication) == ("figbridge", "figbridge")
    assert config.reverse is None
    assert config.forward is not None
    assert (config.forward.source, config.forward.detail_type) == ("legacy.{database}", "{table}.{operation}")
    assert config.forward.dead_letters is None
    assert config.http == HttpSection()


def test_one_name_stands_for_a_list_of_one() -> None:
    section = LocalSourceSection.model_validate({"type": "local", "path": "bus", "sources": "shop.next"})

    assert section.sources == ("shop.next",)
    config = parse(reverse(mapping(match={"source": ["a", "b"], "detail-type": "c"})))
    assert config.reverse is not None
    assert config.reverse.mappings[0].match.source == ("a", "b")


# --- all problems at once


def test_every_problem_is_reported_with_its_field_and_a_remedy() -> None:
    found = problems(
        {
            "legacy": {"dns": "x", "slot": "Big-Slot", "tables": ["orders", "shop.orders", 7]},
            "forward": {"sink": {"type": "file"}, "numbers": "some", "source": "aws.shop", "buffer-bytes": 1},
            "reverse": {
                "source": {"type": "sqs", "queue_url": "reverse-queue"},
                "mappings": [mapping(action="merge", into="orders"), mapping(set={"id": "a..b"}), mapping(set=None)],
                "lock-timeout": 0,
            },
            "http": {"listen": "nowhere"},
            "extra": 1,
        }
    )

    assert found.keys() == {
        "legacy.dsn",
        "legacy.dns",
        "legacy.slot",
        "legacy.tables.0",
        "legacy.tables.2",
        "forward.sink.path",
        "forward.numbers",
        "forward.source",
        "forward.buffer-bytes",
        "reverse.source.queue_url",
        "reverse.mappings.0.action",
        "reverse.mappings.0.into",
        "reverse.mappings.1.set.id",
        "reverse.mappings.2",
        "reverse.lock-timeout",
        "http.listen",
        "extra",
    }
    assert [problem.where for problem in found.values() if not problem.remedy] == []


def test_the_error_prints_every_problem_and_ends_the_process_with_status_2() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(tree(legacy={"tables": []}))

    assert caught.value.exit_status == 2
    assert str(caught.value) == (
        "configuration is not a valid configuration"
        "\n  - legacy.dsn: is missing"
        "\n      remedy: add it: Connection string of a role with REPLICATION, SELECT on the tables and, for the "
        "reverse path, the rights its mappings need. Several hosts may be named (libpq's multi-host form)."
        "\n  - legacy.tables: is empty"
        "\n      remedy: name at least one: The tables to publish, as schema.table. Never all tables of a database."
    )


# --- unknown keys


@pytest.mark.parametrize(
    ("content", "field", "meant"),
    [
        (tree(forwards={}), "forwards", "forward"),
        (tree(legacy=LEGACY | {"slots": "x"}), "legacy.slots", "slot"),
        (tree(forward={"sink": {"type": "stdout"}, "detail_type": "x"}), "forward.detail_type", "detail-type"),
        (tree(forward={"sink": {"type": "eventbridge", "bus": "b", "regoin": "x"}}), "forward.sink.regoin", "region"),
        (
            tree(forward={"sink": {"type": "stdout"}, "dead-letters": {"type": "file", "path": "x", "paht": "y"}}),
            "forward.dead-letters.paht",
            "path",
        ),
        (reverse(MAPPING, park_timeout=3), "reverse.park_timeout", "park-timeout"),
        (reverse(mapping(idempotency_keys="id")), "reverse.mappings.0.idempotency_keys", "idempotency_key"),
        (
            reverse(mapping(match={"source": "a", "detail-type": "b", "sources": "c"})),
            "reverse.mappings.0.match.sources",
            "source",
        ),
        (tree(http={"lisen": "x"}), "http.lisen", "listen"),
    ],
)
def test_a_misspelt_key_gets_the_nearest_known_one(content: dict[str, Any], field: str, meant: str) -> None:
    found = problems(content)

    assert found[field].what == "unknown key"
    assert found[field].remedy == f"did you mean {meant!r}?"


def test_the_keys_of_another_kind_of_sink_are_not_suggested() -> None:
    found = problems(tree(forward={"sink": {"type": "eventbridge", "bus": "b", "path": "events.jsonl"}}))

    assert (
        found["forward.sink.path"].remedy
        == "remove it; known here: bus, client, endpoint_url, in-flight, region, trace-header, type"
    )


@pytest.mark.parametrize(
    ("sink", "field", "remedy"),
    [
        ({"type": "kinesis", "stream": "a b"}, "stream", "its ARN"),
        ({"type": "kinesis", "stream": "arn:aws:sqs:eu-west-1:123456789012:orders"}, "stream", "its ARN"),
        ({"type": "kinesis"}, "stream", "add it"),
        ({"type": "firehose", "stream": "arn:aws:firehose:x:123456789012:deliverystream/a"}, "stream", "not its ARN"),
        ({"type": "sqs", "queue_url": "orders"}, "queue_url", "get-queue-url"),
        ({"type": "sns", "topic": "orders"}, "topic", "arn:aws:sns:"),
        ({"type": "eventbridge_v2", "bus": "orders"}, "bus", "event-busv2/name/id"),
        (
            {"type": "eventbridge_v2", "bus": "arn:aws:events:eu-west-1:123456789012:event-bus/orders"},
            "bus",
            "the sink type eventbridge",
        ),
        ({"type": "eventbridge", "bus": "b", "in-flight": 0}, "in-flight", "Most requests"),
    ],
)
def test_a_destination_is_named_as_its_service_names_it(sink: dict[str, Any], field: str, remedy: str) -> None:
    found = problems(tree(forward={"sink": sink}))

    assert found.keys() == {f"forward.sink.{field}"}
    assert remedy in str(found[f"forward.sink.{field}"])


@pytest.mark.parametrize(
    "sink",
    [
        {"type": "kinesis", "stream": "orders"},
        {"type": "kinesis", "stream": "arn:aws-us-gov:kinesis:us-gov-west-1:123456789012:stream/orders"},
        {"type": "firehose", "stream": "orders"},
        {"type": "sqs", "queue_url": "https://sqs.eu-west-1.amazonaws.com/123456789012/orders.fifo"},
        {"type": "sns", "topic": "arn:aws:sns:eu-west-1:123456789012:orders.fifo"},
        {"type": "eventbridge_v2", "bus": f"arn:aws:events:eu-west-1:123456789012:event-busv2/orders/{'a1' * 12}b"},
    ],
)
def test_every_kind_of_sink_is_a_configuration(sink: dict[str, Any]) -> None:
    config = Config.model_validate(tree(forward={"sink": sink}))

    assert config.forward
    assert config.forward.sink.type == sink["type"]


def test_the_pythonic_spelling_is_no_second_spelling_of_the_file() -> None:
    assert problems(tree(forward={"sink": {"type": "stdout"}, "buffer_bytes": 4096})).keys() == {"forward.buffer_bytes"}


def test_a_key_is_known_for_longer_than_a_queue_keeps_its_message() -> None:
    queue = {"type": "sqs", "queue_url": "https://sqs.eu-west-1.amazonaws.com/123456789012/orders"}
    assert parse(reverse(mapping(), source=queue)).reverse.inbox_retention == 30  # type: ignore[union-attr]
    parse(reverse(mapping(), source=queue, **{"inbox-retention": 15}))
    found = problems(reverse(mapping(), source=queue, **{"inbox-retention": 14}))
    assert "14 days that SQS may keep a message" in found["reverse"].what
    parse(reverse(mapping(), **{"inbox-retention": 1}))


def test_the_order_of_groups_needs_a_source_that_has_them() -> None:
    queue = {"type": "sqs", "queue_url": "https://sqs.eu-west-1.amazonaws.com/123456789012/orders"}
    fifo = {**queue, "queue_url": f"{queue['queue_url']}.fifo"}
    assert parse(reverse(mapping(), source=fifo)).reverse.order == "entity"  # type: ignore[union-attr]
    assert parse(reverse(mapping(), source=fifo, order="group")).reverse.order == "group"  # type: ignore[union-attr]
    standard = problems(reverse(mapping(), source=queue, order="group"))["reverse"]
    assert "does not end in .fifo" in standard.what
    assert standard.remedy == "make a FIFO queue, or set order to entity"
    others: list[dict[str, Any]] = [{"type": "local", "path": "bus"}, {"type": "kinesis", "stream": "orders"}]
    for source in others:
        found = problems(reverse(mapping(), source=source, order="group"))["reverse"]
        assert (f"type {source['type']}" in found.what, found.remedy) == (True, "set order to entity")


# --- the kind of sink and source

SINKS = "eventbridge, eventbridge_v2, kinesis, firehose, sqs, sns, file, stdout, local"


@pytest.mark.parametrize(
    ("content", "field", "remedy"),
    [
        (
            tree(forward={"sink": {"type": "eventbrige"}}),
            "forward.sink.type",
            f"did you mean 'eventbridge'? there are: {SINKS}",
        ),
        (
            tree(forward={"sink": {"path": "x"}}),
            "forward.sink.type",
            f"say which, it decides the section's other keys; there are: {SINKS}",
        ),
        (
            tree(reverse={"source": {"type": "kafka"}, "mappings": [MAPPING]}),
            "reverse.source.type",
            "there are: local, sqs, kinesis",
        ),
        (
            tree(forward={"sink": {"type": "stdout"}, "dead-letters": {"type": "tabel"}}),
            "forward.dead-letters.type",
            "did you mean 'table'? there are: file, table, s3, sqs",
        ),
    ],
)
def test_an_unknown_kind_lists_the_kinds(content: dict[str, Any], field: str, remedy: str) -> None:
    assert problems(content)[field].remedy == remedy
