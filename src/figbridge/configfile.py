"""From the text of a configuration file to a tree of plain values, and from what is wrong with it to words.

No text here repeats a value of the file or of the environment: any of them may be a password, in its place or put into
the wrong one. Positions, keys and the names of variables are enough to find the line. (PyYAML's and libpq's own
messages quote what they stopped at, so they are never passed on.)

What a section may hold is `figbridge.config`'s to say; this module knows only YAML, variables and JSON Schema.
"""

import difflib
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import yaml
from pydantic_core import ErrorDetails

from figbridge.errors import Problem


class Unreadable(Exception):
    """The text is not YAML, or not a mapping of sections. Carries the problem; caught by `figbridge.config` alone."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.what)
        self.problem = problem


def read(text: str) -> dict[Any, Any]:
    """The tree of a YAML text. Raises Unreadable, and nothing else, whatever the text is."""
    try:
        tree = yaml.load(text, _UniqueKeys)  # noqa: S506 (a subclass of SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "YAML"
        raise Unreadable(Problem(where, *_syntax(error))) from None
    except yaml.YAMLError:
        raise Unreadable(
            Problem("YAML", "a character that YAML does not allow", "save the file as plain UTF-8 text")
        ) from None
    except RecursionError:
        raise Unreadable(Problem("YAML", "nested too deeply", "flatten it; five levels are enough")) from None
    except (ValueError, LookupError, AttributeError, TypeError):
        # PyYAML lets its converters' errors through: 2026-13-45 looks like a date and is none
        raise Unreadable(
            Problem("YAML", "a value looks like a date or a number and is none", "put such texts in quotes")
        ) from None
    if isinstance(tree, dict):
        return tree
    what = "is empty" if tree is None else f"is a {type(tree).__name__}, not sections with their keys"
    raise Unreadable(Problem("configuration", what, "deploy/examples/bridge.yaml is a start"))


def _syntax(error: yaml.MarkedYAMLError) -> tuple[str, str]:
    match error:
        case yaml.composer.ComposerError() if error.problem and "alias" in error.problem:
            return "an alias (*name) without its anchor (&name)", "put a text that begins with * or & in quotes"
        case _ if error.problem and " tag " in error.problem:
            return "a tag (!name) that is not known here", "put a text that begins with ! in quotes"
        case _:
            return error.problem or error.context or "not YAML", "mend the syntax there"


class _UniqueKeys(yaml.SafeLoader):
    """YAML says that a repeated key is an error; PyYAML lets the last one win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # <<: brings keys on purpose, those of the mapping itself win
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is there twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_VARIABLE = re.compile(
    r"\$(?:\$(?P<escaped>\{)|\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}|(?P<malformed>\{))"
)


def expand(value: Any, environment: Mapping[str, str], problems: list[Problem], where: str = "") -> Any:
    """`value` with the variables of its texts replaced, keys excepted; what cannot be is added to `problems`.

    As in a shell, ``${NAME:-default}`` stands for the default when NAME is unset *or empty*. Raises Unreadable for a
    tree without an end (an alias inside its own anchor).
    """
    try:
        return _expand(value, environment, where, problems)
    except RecursionError:
        raise Unreadable(Problem("YAML", "an alias inside its own anchor", "write the value out")) from None


def _expand(value: Any, environment: Mapping[str, str], where: str, problems: list[Problem]) -> Any:
    match value:
        case str():
            if "\0" in value:  # PostgreSQL, a file system and AWS take none
                problems.append(Problem(where, "holds a NUL character", "remove it"))
                return value.replace("\0", "")

            def replace(match: re.Match[str]) -> str:
                if match["escaped"]:
                    return "${"
                if match["malformed"]:
                    remedy = "write ${NAME} or ${NAME:-default}; for a literal ${ write $${"
                    problems.append(Problem(where, "holds a ${ that begins no variable", remedy))
                    return ""
                found = environment.get(match["name"]) or match["default"]
                if found is None:
                    state = "empty" if match["name"] in environment else "not set"
                    remedy = f"set it, or write ${{{match['name']}:-default}}"
                    problems.append(Problem(where, f"the environment variable {match['name']} is {state}", remedy))
                return found or ""

            return _VARIABLE.sub(replace, value)
        case dict():
            return {
                key: _expand(item, environment, f"{where}.{key}".strip("."), problems) for key, item in value.items()
            }
        case list():
            return [_expand(item, environment, f"{where}.{index}", problems) for index, item in enumerate(value)]
    return value


class _Place(NamedTuple):
    """Where an error is: the field as the file spells it, and the schema nodes that may stand there."""

    field: str
    nodes: Sequence[Mapping[str, Any]]


def describe(detail: ErrorDetails, schema: Mapping[str, Any]) -> Problem:
    """One of pydantic's errors as a problem with its field and remedy, by the JSON Schema of the whole file."""
    location, kind = detail["loc"], detail["type"]
    if kind == "extra_forbidden":
        return _unknown_key(location, schema)
    if kind == "invalid_key" or location[-1:] == ("[key]",):
        return _bad_key(detail, schema)
    field, nodes = _find(location, schema)
    if kind in {"union_tag_not_found", "union_tag_invalid"}:
        return _wrong_type(detail, field, nodes)
    what, remedy = _words(detail)
    meaning = next((str(node["description"]) for node in nodes if "description" in node), "")
    if kind != "value_error" and meaning:  # our own checks say enough
        remedy = f"{remedy or 'it means'}: {meaning}"
    return Problem(field, what, remedy)


_WORDS = {
    "missing": ("is missing", "add it"),
    "string_type": ("is not a text", "put it in quotes"),
    "path_type": ("is not a path", "write the file's path"),
    "tuple_type": ("is not a list", "write [one, two], or one on each line after a dash"),
    "too_short": ("is empty", "name at least one"),
    "string_too_short": ("is empty", "give it a value or remove the line"),
    **dict.fromkeys(
        ("model_type", "model_attributes_type", "dict_type"),
        ("is not a section of keys and values", "write its keys below it, indented"),
    ),
}


def _words(detail: ErrorDetails) -> tuple[str, str]:
    """What is wrong and the imperative part of the remedy."""
    if detail["type"] != "missing" and detail["input"] is None:
        return "is empty", "give it a value or remove the line"
    if detail["type"] in _WORDS:
        return _WORDS[detail["type"]]
    what, _, remedy = detail["msg"].removeprefix("Value error, ").replace("Input should", "should").partition("; ")
    return what, remedy


def _bad_key(detail: ErrorDetails, schema: Mapping[str, Any]) -> Problem:
    location = [part for part in detail["loc"] if part != "[key]"]
    field = _find(location[:-1], schema).field
    if detail["input"] == "":
        return Problem(field, "has an empty key", "name the column")
    remedy = "put it in quotes: YAML 1.1 reads a bare on, off, yes and no as true and false"
    return Problem(field, f"the key {detail['input'] if location else ''} is not a text", remedy)


def _unknown_key(location: Sequence[int | str], schema: Mapping[str, Any]) -> Problem:
    *parents, key = location
    parent, nodes = _find(parents, schema)
    known = sorted({name for node in nodes for name in node.get("properties", {})})
    near = difflib.get_close_matches(str(key), known, n=1)
    remedy = f"did you mean {near[0]!r}?" if near else f"remove it; known here: {', '.join(known)}"
    return Problem(f"{parent}.{key}" if parents else str(key), "unknown key", remedy)


def _wrong_type(detail: ErrorDetails, field: str, nodes: Sequence[Mapping[str, Any]]) -> Problem:
    allowed = [str(node["properties"]["type"]["const"]) for node in nodes if "properties" in node]
    there_are = f"there are: {', '.join(allowed)}"
    if detail["type"] == "union_tag_not_found":
        return Problem(f"{field}.type", "is missing", f"say which, it decides the section's other keys; {there_are}")
    near = difflib.get_close_matches(str(detail.get("ctx", {}).get("tag")), allowed, n=1)
    return Problem(f"{field}.type", "unknown type", f"did you mean {near[0]!r}? {there_are}" if near else there_are)


def _find(location: Sequence[int | str], schema: Mapping[str, Any]) -> _Place:
    """Follow pydantic's path of an error through the schema.

    pydantic puts the chosen member of a tagged union into the path; the file has no such level, so it is left out of
    the field, and it decides whose keys are the known ones.
    """
    parts: list[str] = []
    nodes: list[Mapping[str, Any]] = [schema]
    for step in location:
        options = [option for node in nodes for option in _options(node, schema)]
        chosen = [option for option in options if option.get("properties", {}).get("type", {}).get("const") == step]
        if chosen:
            nodes = chosen
            continue
        parts.append(str(step))
        nodes = [found for option in options if (found := _below(option, step)) is not None]
    ends = [(option, node) for node in nodes for option in _options(node, schema)]
    # a description beside a reference says what the field is for; the one behind it, what the section is
    merged = [{**option, **{key: node[key] for key in ("description",) if key in node}} for option, node in ends]
    return _Place(".".join(parts) or "configuration", merged)


def _below(node: Mapping[str, Any], step: int | str) -> Mapping[str, Any] | None:
    if isinstance(step, int):
        items: Mapping[str, Any] | None = node.get("items")
        return items
    below: Mapping[str, Any] | None = node.get("properties", {}).get(step)
    return below


def _options(node: Mapping[str, Any], schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What may stand at `node`: references followed, unions taken apart."""
    if "$ref" in node:
        return _options(schema["$defs"][node["$ref"].rpartition("/")[2]], schema)
    for union in ("anyOf", "oneOf"):
        if union in node:
            return [found for option in node[union] for found in _options(option, schema)]
    return [node]
