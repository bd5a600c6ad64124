"""The configuration file: every problem at once, each with its field and remedy, and never a secret in a message."""

import json
import os
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # it has no type information, and one call needs no stubs
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from figbridge.config import (
    Config,
    EventBridgeSinkSection,
    FileSinkSection,
    HttpSection,
    LocalSourceSection,
    MappingSection,
    SqsSourceSection,
    TableDeadLetters,
    split_table,
)
from figbridge.errors import ConfigError, Problem

EXAMPLE = Path(__file__).parents[2] / "deploy" / "examples" / "bridge.yaml"
ENVIRONMENT = {"LEGACY_DSN": "postgresql://bridge:pw@db/shop", "REVERSE_QUEUE": "https://sqs.test/1/reverse"}

LEGACY: dict[str, Any] = {"dsn": "postgresql://bridge@db/shop", "tables": ["shop.orders"]}
MAPPING: dict[str, Any] = {
    "match": {"source": "shop.next", "detail-type": "order.placed"},
    "into": "shop.orders",
    "action": "insert",
    "set": {"id": "detail.id"},
}


def tree(**sections: Any) -> dict[str, Any]:
    """The smallest file that is valid, with some sections replaced."""
    return {"legacy": LEGACY, "forward": {"sink": {"type": "stdout"}}} | sections


def parse(content: Mapping[str, Any] | str, **environment: str) -> Config:
    text = content if isinstance(content, str) else yaml.safe_dump(dict(content))
    return Config.parse(text, environment)


def problems(content: Mapping[str, Any] | str, **environment: str) -> dict[str, Problem]:
    """What is wrong with the file, by field; a field that is reported twice is itself a failure."""
    with pytest.raises(ConfigError) as caught:
        parse(content, **environment)
    found = {problem.where: problem for problem in caught.value.problems}
    assert len(found) == len(caught.value.problems), "a field was reported twice"
    return found


def reverse(*mappings: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    return tree(reverse={"source": {"type": "local", "path": "bus"}, "mappings": list(mappings), **settings})


def mapping(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in (MAPPING | changes).items() if value is not None}


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


# --- the environment


def test_a_variable_that_is_not_set_is_named_with_its_field_and_reported_once() -> None:
    found = problems(
        tree(
            legacy=LEGACY | {"dsn": "${LEGACY_DSN}"},
            reverse={"source": {"type": "sqs", "queue_url": "${QUEUE}"}, "mappings": [MAPPING]},
        ),
        QUEUE="",
    )

    assert found == {
        "legacy.dsn": Problem(
            "legacy.dsn",
            "the environment variable LEGACY_DSN is not set",
            "set it, or write ${LEGACY_DSN:-default}",
        ),
        "reverse.source.queue_url": Problem(
            "reverse.source.queue_url",
            "the environment variable QUEUE is empty",
            "set it, or write ${QUEUE:-default}",
        ),
    }


@pytest.mark.parametrize(
    ("written", "environment", "meant"),
    [
        ("${NAME}", {"NAME": "a"}, "a"),
        ("x-${NAME}-${OTHER}-y", {"NAME": "a", "OTHER": "b"}, "x-a-b-y"),
        ("${NAME:-default}", {}, "default"),
        ("${NAME:-default}", {"NAME": ""}, "default"),
        ("${NAME:-default}", {"NAME": "a"}, "a"),
        ("$${NAME}", {"NAME": "a"}, "${NAME}"),
        ("$NAME and $$", {"NAME": "a"}, "$NAME and $$"),
        ("${NAME}", {"NAME": "${OTHER}", "OTHER": "b"}, "${OTHER}"),
        ("${NAME}", {"NAME": "a: {b: 'c', \"d\": #"}, "a: {b: 'c', \"d\": #"),
    ],
)
def test_variables(written: str, environment: dict[str, str], meant: str) -> None:
    config = parse(tree(forward={"sink": {"type": "file", "path": written}}), **environment)

    assert config.forward is not None
    assert isinstance(config.forward.sink, FileSinkSection)
    assert str(config.forward.sink.path) == meant


def test_an_optional_text_that_is_empty_is_not_there() -> None:
    sink = {"type": "eventbridge", "bus": "b", "region": "${REGION:-}", "endpoint_url": "${ENDPOINT:-}"}
    config = parse(tree(forward={"sink": sink}))

    assert config.forward is not None
    assert config.forward.sink == EventBridgeSinkSection(type="eventbridge", bus="b", region=None, endpoint_url=None)


@pytest.mark.parametrize("written", ["${LEGACY-DSN}", "${1ST}", "${NAME:?why}", "${NAME", "${}"])
def test_what_only_looks_like_a_variable_is_an_error_and_not_a_text(written: str) -> None:
    found = problems(tree(forward={"sink": {"type": "file", "path": written}}), NAME="a")

    assert found["forward.sink.path"].what == "holds a ${ that begins no variable"


def test_the_process_environment_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIGBRIDGE_TEST_DSN", "host=db user=bridge")
    path = tmp_path / "bridge.yaml"
    path.write_text(yaml.safe_dump(tree(legacy=LEGACY | {"dsn": "${FIGBRIDGE_TEST_DSN}"})))

    assert Config.load(path).legacy.dsn.get_secret_value() == "host=db user=bridge"


# --- secrets

SECRET = "hunter2-kl5vq"


def everything(error: BaseException) -> str:
    """All that a log could show of it: the text, the fields, the traceback with its causes."""
    return "".join([str(error), repr(error), repr(vars(error)), *traceback.format_exception(error)])


def _leaks() -> Iterator[tuple[str, str, dict[str, str]]]:
    valid = yaml.safe_dump(tree())
    dsn = f"postgresql://bridge:{SECRET}@db/shop"
    environment = {"LEGACY_DSN": dsn}
    from_variable = tree(legacy=LEGACY | {"dsn": "${LEGACY_DSN}"})
    yield "another field is wrong", yaml.safe_dump(from_variable | {"http": {"listen": 1}}), environment
    yield "libpq cannot read it", yaml.safe_dump(from_variable), {"LEGACY_DSN": f"{dsn}?{SECRET}=%zz"}
    yield "no key=value", yaml.safe_dump(from_variable), {"LEGACY_DSN": f"host=db {SECRET}"}
    yield "a stray %", yaml.safe_dump(from_variable), {"LEGACY_DSN": f"postgresql://bridge:%{SECRET}@db/shop"}
    yield "it is a list", valid.replace("postgresql://bridge@db/shop", f"[{SECRET}]"), {}
    yield "an open quote on its line", valid.replace("postgresql://bridge@db/shop", f'"{dsn}'), {}
    yield "a tab on its line", valid.replace("postgresql://bridge@db/shop", f"{dsn}: \t{SECRET}: x"), {}
    for mark in "*&!%@`|>":
        yield f"it begins with {mark}", valid.replace("postgresql://bridge@db/shop", f"{mark}{SECRET}: x"), {}
    yield "an unknown tag handle", valid.replace("postgresql://bridge@db/shop", f"!{SECRET}!x y"), {}
    yield "a wrong variable in tables", yaml.safe_dump(tree(legacy=LEGACY | {"tables": ["${LEGACY_DSN}"]})), environment
    for section in ({"listen": "${LEGACY_DSN}"}, {"listen": "${LEGACY_DSN}:x"}):
        yield f"a wrong variable in http {section}", yaml.safe_dump(tree(http=section)), environment
    for field in ("source", "detail-type", "numbers"):
        wrong = tree(forward={"sink": {"type": "stdout"}, field: "${LEGACY_DSN}{"})
        yield f"a wrong variable in {field}", yaml.safe_dump(wrong), environment
    yield "as the kind of sink", yaml.safe_dump(tree(forward={"sink": {"type": "${LEGACY_DSN}"}})), environment
    wrong = tree(reverse={"source": {"type": "sqs", "queue_url": "${LEGACY_DSN}"}, "mappings": [MAPPING]})
    yield "as the queue", yaml.safe_dump(wrong), environment
    yield "as a path of a mapping", yaml.safe_dump(reverse(mapping(set={"id": "${LEGACY_DSN}"}))), environment


LEAKS = list(_leaks())


@pytest.mark.parametrize(("text", "environment"), [case[1:] for case in LEAKS], ids=[case[0] for case in LEAKS])
def test_no_message_and_no_traceback_shows_a_secret(text: str, environment: dict[str, str]) -> None:
    assert SECRET in text + "".join(environment.values())

    with pytest.raises(ConfigError) as caught:
        Config.parse(text, environment)

    assert SECRET not in everything(caught.value)


def test_a_loaded_configuration_does_not_show_the_secret() -> None:
    config = parse(tree(legacy=LEGACY | {"dsn": "${LEGACY_DSN}"}), LEGACY_DSN=f"postgresql://bridge:{SECRET}@db/shop")

    for shown in (
        repr(config),
        str(config),
        config.model_dump_json(),
        str(config.model_dump()),
        f"{config.legacy.dsn}",
    ):
        assert SECRET not in shown
    assert SECRET in config.legacy.dsn.get_secret_value()


# --- the text of the file


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("", "configuration", "is empty"),
        ("# nothing but a comment\n", "configuration", "is empty"),
        ("- a\n- b\n", "configuration", "is a list, not sections with their keys"),
        ("just words", "configuration", "is a str, not sections with their keys"),
        ("legacy: {dsn: x", "line 1, column 16", "expected ',' or '}', but got '<stream end>'"),
        ("a: b\n c: d\n", "line 2, column 3", "mapping values are not allowed here"),
        ("legacy:\n  slot: a\n  dsn: b\n  slot: c\n", "line 4, column 3", "the key 'slot' is there twice"),
        ("? [a]\n: b\n", "line 1, column 3", "a key must be a text"),
        ("a: 2026-13-45", "YAML", "a value looks like a date or a number and is none"),
        ("a: &x [*x]", "YAML", "an alias inside its own anchor"),
        ("[" * 5000, "YAML", "nested too deeply"),
        ("a: \x00", "YAML", "a character that YAML does not allow"),
        ("--- {}\n--- {}\n", "line 2, column 1", "but found another document"),
    ],
)
def test_text_that_is_no_configuration(text: str, where: str, what: str) -> None:
    (problem,) = problems(text).values()

    assert (problem.where, problem.what) == (where, what)
    assert problem.remedy


def test_anchors_and_merges_are_yaml_too() -> None:
    text = """
    legacy: {dsn: "host=db", tables: [shop.orders]}
    reverse:
      source: {type: local, path: bus}
      mappings:
        - &update
          match: {source: a, detail-type: b}
          into: shop.orders
          action: update
          key: {id: detail.id}
          set: {status: detail.status}
        - <<: *update
          into: shop.widgets
    """
    config = parse(text)

    assert config.reverse is not None
    assert [each.into for each in config.reverse.mappings] == ["shop.orders", "shop.widgets"]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("legacy: übel".encode("latin-1"))

    for path, what in (
        (tmp_path / "nowhere.yaml", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (latin, "is not UTF-8 text"),
    ):
        with pytest.raises(ConfigError) as caught:
            Config.load(path, {})
        assert [(problem.where, problem.what) for problem in caught.value.problems] == [(str(path), what)]
        assert caught.value.problems[0].remedy


def test_a_file_that_may_not_be_read_names_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:  # root, whom CI may run as, is refused nothing
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)

    with pytest.raises(ConfigError, match=rf"bridge\.yaml: permission denied\n.*uid {os.geteuid()}"):
        Config.load(Path("bridge.yaml"), {})


def test_a_section_whose_lines_are_commented_out_does_not_drop_a_direction_in_silence() -> None:
    assert problems("forward:\n" + yaml.safe_dump({k: v for k, v in reverse(MAPPING).items() if k != "forward"})) == {
        "forward": Problem("forward", "is empty", "give it its keys, or remove the line")
    }


def test_without_a_direction_there_is_nothing_to_run() -> None:
    (problem,) = problems({"legacy": LEGACY}).values()

    assert problem == Problem(
        "configuration",
        "neither forward nor reverse nor relay is there, so there is nothing to run",
        "add at least one",
    )


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("http:\n", "is empty"),
        ("http: 3\n", "is not a section of keys and values"),
        ("http: {listen: }\n", "is empty"),
        ("http: {listen: 9464}\n", "is not a text"),
    ],
)
def test_a_value_of_another_kind(text: str, what: str) -> None:
    (problem,) = problems(yaml.safe_dump(tree()) + text).values()

    assert (problem.where.split(".")[0], problem.what) == ("http", what)


def test_a_bare_on_is_explained() -> None:
    (problem,) = problems(yaml.safe_dump(reverse(mapping(set={True: "detail.on"})))).values()

    assert (problem.where, problem.what) == ("reverse.mappings.0.set", "the key True is not a text")
    assert "quotes" in problem.remedy


# --- the fields' own rules


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("shop.orders", ("shop", "orders")),
        ("Shop.Orders", ("shop", "orders")),
        ('"Shop"."Order Items"', ("Shop", "Order Items")),
        ('shop."a.b"', ("shop", "a.b")),
        ('"say ""hi"""._t$1', ('say "hi"', "_t$1")),
    ],
)
def test_a_table_is_read_as_sql_reads_it(text: str, names: tuple[str, str]) -> None:
    assert split_table(text) == names


@pytest.mark.parametrize(
    "text", ["orders", "a.b.c", "shop.", ".orders", 'shop."orders', "1a.b", "a b.c", "a.b\n", '"".a']
)
def test_what_is_no_table_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"schema\.table"):
        split_table(text)
    assert problems(tree(legacy=LEGACY | {"tables": [text]})).keys() == {"legacy.tables.0"}


@pytest.mark.parametrize("text", ["figbridge.inbox", '"figbridge".orders', "FIGBRIDGE.canary"])
def test_our_own_tables_are_neither_published_nor_mapped_into(text: str) -> None:
    content = reverse(mapping(into=text)) | {"legacy": LEGACY | {"tables": [text]}}

    assert problems(content).keys() == {"legacy.tables.0", "reverse.mappings.0.into"}


def test_a_table_twice_is_an_error_however_it_is_spelt() -> None:
    found = problems(tree(legacy=LEGACY | {"tables": ["shop.orders", 'SHOP."orders"']}))

    assert found["legacy.tables"].what == "'SHOP.\"orders\"' is the same table as 'shop.orders'"
    assert problems(tree(legacy=LEGACY | {"tables": ["a.b", "a.b"]}))["legacy.tables"].what == "'a.b' is there twice"
    assert parse(tree(legacy=LEGACY | {"tables": ["a.b", 'a."B"']})).legacy.tables == ("a.b", 'a."B"')


@pytest.mark.parametrize("text", ["Figbridge", "fig-bridge", "", "x" * 64, "slot\n"])
def test_a_slot_that_the_server_would_refuse(text: str) -> None:
    assert problems(tree(legacy=LEGACY | {"slot": text})).keys() == {"legacy.slot"}


@pytest.mark.parametrize(
    ("dsn", "what"),
    [
        ("", "is empty"),
        ("not a dsn", "libpq cannot read it as a connection string"),
        ("postgresql://u:p%@h/d", "libpq cannot read it as a connection string"),
        ("host=db replication=database", "has the parameter replication"),
    ],
)
def test_a_dsn_is_checked_before_anything_connects(dsn: str, what: str) -> None:
    assert problems(tree(legacy=LEGACY | {"dsn": dsn}))["legacy.dsn"].what == what


@pytest.mark.parametrize(
    "dsn", ["host=a,b port=5432,5433 target_session_attrs=read-write", "service=legacy", "postgresql:///shop"]
)
def test_every_form_of_libpq_is_a_dsn(dsn: str) -> None:
    assert parse(tree(legacy=LEGACY | {"dsn": dsn})).legacy.dsn.get_secret_value() == dsn


@pytest.mark.parametrize(
    ("field", "template", "accepted"),
    [
        ("source", "legacy", True),
        ("source", "{database}.{schema}.{table}", True),
        ("source", "{{literal}}", True),
        ("source", "{operation}", False),
        ("detail-type", "{operation}", True),
        ("detail-type", "{tabel}", False),
        ("detail-type", "{}", False),
        ("detail-type", "{0}", False),
        ("detail-type", "{table", False),
        ("detail-type", "table}", False),
        ("detail-type", "{table.__class__}", False),
        ("detail-type", "{table[0]}", False),
        ("detail-type", "{table!r}", False),
        ("detail-type", "{table:>20}", False),
        ("detail-type", " ", False),
        ("source", "", False),
        ("source", "aws.shop", False),
    ],
)
def test_templates(field: str, template: str, accepted: bool) -> None:
    content = tree(forward={"sink": {"type": "stdout"}, field: template})

    if accepted:
        parse(content)
    else:
        assert problems(content).keys() == {f"forward.{field}"}


def test_an_unknown_placeholder_names_the_known_ones() -> None:
    found = problems(tree(forward={"sink": {"type": "stdout"}, "detail-type": "{tabel}.{operation}"}))

    assert found["forward.detail-type"].what == "has the placeholder {tabel}"
    assert "{database}, {schema}, {table}, {operation}" in found["forward.detail-type"].remedy


def test_paths_of_a_mapping_are_checked_with_their_column() -> None:
    found = problems(
        reverse(
            mapping(action="upsert", key={"id": "detail."}, set={"status": "detail[", "ok": "detail.ok"}),
            mapping(idempotency_key="a b"),
        )
    )

    assert found.keys() == {
        "reverse.mappings.0.key.id",
        "reverse.mappings.0.set.status",
        "reverse.mappings.1.idempotency_key",
    }
    assert all(problem.what.startswith("not a JMESPath expression (") for problem in found.values())
    assert all("\n" not in problem.what for problem in found.values())


@pytest.mark.parametrize(
    ("action", "has_key", "has_set", "what"),
    [
        ("insert", False, True, None),
        ("insert", True, True, "action insert takes no key"),
        ("insert", False, False, "action insert needs set"),
        ("update", True, True, None),
        ("update", False, True, "action update needs key"),
        ("update", True, False, "action update needs set"),
        ("upsert", True, True, None),
        ("upsert", True, False, None),
        ("upsert", False, True, "action upsert needs key"),
        ("delete", True, False, None),
        ("delete", True, True, "action delete takes no set"),
        ("delete", False, False, "action delete needs key"),
    ],
)
def test_what_each_action_needs(action: str, has_key: bool, has_set: bool, what: str | None) -> None:
    content = reverse(
        mapping(action=action, key={"id": "detail.id"} if has_key else None, set={"a": "detail.a"} if has_set else None)
    )

    if what is None:
        parse(content)
    else:
        assert problems(content)["reverse.mappings.0"].what == what


def test_a_column_is_either_found_by_or_written() -> None:
    content = reverse(mapping(action="update", key={"id": "detail.id"}, set={"id": "detail.id", "a": "detail.a"}))

    assert problems(content)["reverse.mappings.0"].what == "columns both in key and in set: id"


def test_a_column_has_a_name() -> None:
    assert problems(reverse(mapping(set={"": "detail.id"})))["reverse.mappings.0.set"].what == "has an empty key"


def test_a_reverse_path_without_mappings_is_an_error() -> None:
    assert problems(reverse())["reverse.mappings"].what == "is empty"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("park-timeout", 0),
        ("statement-timeout", 0),
        ("statement-timeout", float("inf")),
        ("lock-timeout", float("nan")),
    ],
)
def test_settings_out_of_their_range(field: str, value: float) -> None:
    assert problems(reverse(MAPPING, **{field: value})).keys() == {f"reverse.{field}"}


@pytest.mark.parametrize(
    ("listen", "address"),
    [
        ("127.0.0.1:9464", ("127.0.0.1", 9464)),
        ("[::1]:9464", ("::1", 9464)),
        ("[::]:0", ("::", 0)),
        ("localhost:65535", ("localhost", 65535)),
    ],
)
def test_addresses(listen: str, address: tuple[str, int]) -> None:
    assert parse(tree(http={"listen": listen})).http.address == address


@pytest.mark.parametrize(
    "listen", ["", "9464", ":9464", "[]:9464", "::1:9464", "[::1:9464", "host:", "host:http", "host:65536", "host:²"]
)
def test_what_is_no_address(listen: str) -> None:
    assert problems(tree(http={"listen": listen})).keys() == {"http.listen"}


def test_sections_cannot_be_changed_after_they_were_checked() -> None:
    section = MappingSection.model_validate(MAPPING)

    with pytest.raises(ValueError, match="frozen"):
        section.into = "shop.widgets"  # type: ignore[misc]  # that it is refused is the test


# --- conflicts

UPDATE: dict[str, Any] = MAPPING | {"action": "update", "key": {"id": "detail.id"}, "set": {"a": "a", "b": "b"}}
RULES: dict[str, tuple[dict[str, Any], str]] = {
    "delta without before": ({"conflicts": {"policy": "delta"}}, "name its value under conflicts.before"),
    "merge without before": ({"conflicts": {"policy": "merge_columns"}}, "by who changed them"),
    "no version": ({"conflicts": {"policy": "version_wins"}}, "no version to compare"),
    "a strange column": (
        {"conflicts": {"policy": "reject", "groups": [{"columns": "c", "policy": "new_wins"}]}}, "groups c",
    ),
    "two groups": (
        {"conflicts": {"policy": "reject", "groups": [{"columns": "a"}, {"columns": ["a", "b"]}]}}, "in two groups",
    ),
    "before of an insert": (
        {"action": "insert", "key": {}, "conflicts": {"policy": "reject", "before": {"a": "a"}}}, "an insert has not",
    ),
    "merged deletion": (
        {"action": "delete", "set": {}, "conflicts": {"policy": "merge_columns", "before": {"a": "a"}}},
        "a delete has none",
    ),
    "of SQL": (
        {"into": None, "action": None, "key": {}, "set": {}, "sql": "SELECT 1", "owner": "legacy"},
        "takes no owner or conflicts",
    ),
    "beside statements": (
        {"into": None, "action": None, "key": {}, "set": {}, "owner": "legacy", "statements": [
            {"into": "a.b", "action": "delete", "key": {"id": "id"}}]},
        "has owner beside statements",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RULES)
def test_rules_that_contradict_their_statement(case: str) -> None:
    change, said = RULES[case]
    found = problems(reverse(UPDATE | change))
    assert any(said in f"{it.what}; {it.remedy}" for it in found.values()), found


@pytest.mark.parametrize(
    "group",
    [
        {"columns": ["a", "b"], "sql": "1"},
        {"columns": "a", "sql": "1", "policy": "delta"},
        {"columns": "a", "owner": "legacy", "policy": "new_wins"},
        {"columns": []},
    ],
)
def test_groups_that_contradict_themselves(group: dict[str, Any]) -> None:
    assert problems(reverse(UPDATE | {"conflicts": {"policy": "reject", "groups": [group]}}))


def test_what_belongs_to_the_legacy_system_has_rules() -> None:
    section = MappingSection.model_validate(UPDATE | {"owner": "legacy"})
    assert section.rules is not None
    assert section.rules.policy == "legacy_wins"
    assert MappingSection.model_validate(UPDATE).rules is None


# --- anything at all

_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates() | st.sampled_from(["${X}", "{x}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3),
    max_leaves=8,
)
_words = st.sampled_from(
    [
        *"{}[]:,-&*!|>'\"%@`#?\n\t ",
        "\n  ",
        ": ",
        "- ",
        "<<",
        "$",
        "${",
        "}",
        "legacy",
        "sink",
        "type",
        "0x_",
        "1:2",
        "~",
    ]
)


@settings(deadline=None)  # a busy machine is no failure
@given(st.text() | st.lists(_words).map("".join))
def test_garbage_is_a_config_error_and_nothing_else(text: str) -> None:
    with pytest.raises(ConfigError):
        Config.parse(text, {})


@settings(deadline=None)  # a busy machine is no failure
@given(st.data())
def test_a_wrong_value_anywhere_is_a_config_error_or_fits(data: st.DataObject) -> None:
    content = yaml.safe_load(EXAMPLE.read_text())
    node: Any = content
    while True:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if not (isinstance(node[key], dict | list) and node[key] and data.draw(st.booleans())):
            break
        node = node[key]
    node[key] = data.draw(_values)

    try:
        config = Config.parse(yaml.safe_dump(content), ENVIRONMENT)
    except ConfigError:
        return
    assert json.loads(config.model_dump_json())
