"""The text of the configuration file: variables, YAML, garbage, and never a secret in a message."""

import json
import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from figbridge.config import Config, EventBridgeSinkSection, FileSinkSection
from figbridge.errors import ConfigError, Problem
from fixtures.configured import ENVIRONMENT, EXAMPLE, LEGACY, MAPPING, mapping, parse, problems, reverse, tree

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


def test_a_character_that_nobody_takes_is_an_error_in_its_place() -> None:
    content = tree(legacy=LEGACY | {"publication": "a\0b", "tables": ['shop."a\0b"']})
    found = problems(content | {"forward": {"sink": {"type": "file", "path": "a\0b"}}})
    assert found.keys() == {"legacy.publication", "legacy.tables.0", "forward.sink.path"}
    assert {it.what for it in found.values()} == {"holds a NUL character"}


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
    for before, after in (("", "@tail"), ("head@", ""), ("", "/tail"), ("1/", ""), ("a/b@", "@c")):
        leaking = f"postgresql://bridge:{before}{SECRET}{after}@db:5432/shop"
        yield f"unescaped {before}…{after}", yaml.safe_dump(from_variable), {"LEGACY_DSN": leaking}
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
