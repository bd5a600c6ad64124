"""Contracts: what an event of a kind must look like, as JSON Schemas of its detail; and whether an event does.

A directory holds them, one a file. Which events a file is for, its place says, or better it says so itself:

    contracts/<source>/<detail-type>.json       events of this source and type; %2F and the like are read as in a URL
    contracts/<detail-type>.json                events of this type, of whatever source that has no file of its own
    "x-figbridge": {"source": …, "detail-type": …}    at the top of the schema, wherever the file lies
    contracts/_shared/…, contracts/_money.json  what begins with _ is no contract; others may "$ref" it

INVARIANT. Nothing is fetched: a ``$ref`` leads to a file of the directory or is an error at the start. And no message
repeats a value of an event, which may be personal data: it is shown as ``(a value)``. Names of fields do appear.

The library is jsonschema-rs, for its speed: docs/contracts.md has the figures.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import jsonschema_rs
import orjson

from figbridge.errors import ConfigError, Problem

_SURROGATE: Final = re.compile(rb"(?<!\\)((?:\\\\)*)\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
MOST: Final = 10  # breaches that are told of one event; the first few say what is wrong
_VALUE: Final = "(a value)"
_SHOWN: Final = 60  # characters of a wrong value in a schema
SAYS: Final = "x-figbridge"
# A kind of event: its source, None for any, and its detail-type.
Kind = tuple[str | None, str]


class Breach(NamedTuple):
    """One way in which an event is not as it must be. ``path`` is a JSON Pointer into the event: /detail/widget_id."""

    path: str
    message: str


class Contract:
    """One schema, compiled. ``name`` is its file, as seen from the directory."""

    def __init__(self, name: str, schema: Any, *, retriever: Any = None, base_uri: str | None = None) -> None:
        self.name = name
        self.schema = schema
        # formats are annotations unless a contract is to be strict: PostgreSQL's infinity and years BC are no date-time
        self._validator = jsonschema_rs.validator_for(schema, mask=_VALUE, retriever=retriever, base_uri=base_uri)
        self.holds = self._validator.is_valid

    def breaches(self, detail: bytes) -> Sequence[Breach]:
        """How `detail`, a JSON text, breaks the contract; empty if it does not."""
        try:
            value = _parsed(detail)
            if self.holds(value):
                return ()
            errors = self._validator.iter_errors(value)
            return [Breach(_pointer(it), it.message) for _, it in zip(range(MOST), errors, strict=False)]
        except ValueError:  # deeper than anything reads, or no JSON at all
            return [Breach("/detail", "is not JSON that every reader understands")]


class Contracts:
    """All contracts of one directory, by the kind of events they are for."""

    def __init__(self, contracts: Mapping[Kind, Contract]) -> None:
        self._contracts = dict(contracts)

    def __len__(self) -> int:
        return len(self._contracts)

    @property
    def schemas(self) -> dict[Kind, Any]:
        """The schemas as they were read."""
        return {kind: contract.schema for kind, contract in self._contracts.items()}

    def find(self, source: str, detail_type: str) -> Contract | None:
        """The contract of such events: that of their source first."""
        return self._contracts.get((source, detail_type)) or self._contracts.get((None, detail_type))

    @classmethod
    def load(cls, directory: Path, where: str = "contracts") -> "Contracts":
        """Read `directory`. Raises ConfigError with everything that is wrong in it; `where` is the setting's name."""
        problems: list[Problem] = []
        if not directory.is_dir():
            what = f"{directory} is no directory"
            raise ConfigError("no contracts", [Problem(where, what, "make it; `figbridge schema events` fills it")])
        found: dict[Kind, Contract] = {}
        for path in sorted(directory.rglob("*.json")):
            relative = path.relative_to(directory)
            if any(part.startswith("_") for part in relative.parts):
                continue
            try:
                schema = orjson.loads(path.read_bytes())
                kind = _kind(relative, schema)
                retriever = partial(_retrieve, directory)
                contract = Contract(str(relative), schema, retriever=retriever, base_uri=path.resolve().as_uri())
            except jsonschema_rs.ValidationError as error:
                problems.append(
                    Problem(str(path), f"is no contract: {_flaw(error, schema)}", "mend it, or begin its name with _")
                )
                continue
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                what = str(error).partition("\n")[0]
                problems.append(Problem(str(path), f"is no contract: {what}", "mend it, or begin its name with _"))
                continue
            if (other := found.get(kind)) is not None:
                what = f"is for the same events as {other.name}"
                problems.append(Problem(str(path), what, "keep one of them, or name another detail-type in it"))
                continue
            found[kind] = contract
        if not found and not problems:
            problems.append(Problem(where, f"{directory} holds no contract", "`figbridge schema events` writes some"))
        if problems:
            raise ConfigError("the contracts are not as they must be", problems)
        return cls(found)


def _parsed(detail: bytes) -> Any:
    try:
        return orjson.loads(detail)
    except orjson.JSONDecodeError:
        # half a character, which a json column may hold: to a contract any other character is as good
        return orjson.loads(_SURROGATE.sub(rb"\1\\ufffd", detail))


def write(directory: Path, schemas: Mapping[Kind, Any]) -> list[Path]:
    """Write each schema into its file, over what is there; the files. Raises ConfigError when it cannot be written."""
    written = []
    for kind, schema in schemas.items():
        path = directory / of_file(kind)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(orjson.dumps(schema, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
        except OSError as error:
            problem = Problem(str(path), error.strerror or str(error), "name a directory that can be written to")
            raise ConfigError("the contracts cannot be written", [problem]) from error
        written.append(path)
    return written


def of_file(kind: Kind) -> Path:
    """Where the contract for events of `kind` lies, as seen from the directory."""
    source, detail_type = kind
    name = Path(f"{_quoted(detail_type)}.json")
    return name if source is None else Path(_quoted(source)) / name


def _quoted(text: str) -> str:
    text = text.replace("%", "%25").replace("/", "%2F").replace("\0", "%00")
    return f"%{ord(text[0]):02X}{text[1:]}" if text.startswith((".", "_")) else text


def _kind(relative: Path, schema: Any) -> Kind:
    said = schema.get(SAYS, {}) if isinstance(schema, dict) else {}
    source = said.get("source") if isinstance(said, dict) else said
    if not isinstance(source, str | None) or not isinstance(said.get("detail-type", ""), str):
        raise TypeError(f'"{SAYS}" holds a source and a detail-type, both of them texts')
    if "detail-type" in said:
        return source, said["detail-type"]
    match relative.with_suffix("").parts:
        case (detail_type,):
            return None, unquote(detail_type)
        case (source, detail_type):
            return unquote(source), unquote(detail_type)
    raise ValueError(f'lies too deep to say for which events it is; write "{SAYS}" into it, or <source>/<type>.json')


def _retrieve(directory: Path, uri: str) -> Any:
    parts = urlsplit(uri)
    path = Path(url2pathname(parts.path)).resolve()
    if parts.scheme != "file" or not path.is_relative_to(directory.resolve()):
        raise ValueError(f"$ref leads to {uri}, outside of the directory")
    return orjson.loads(path.read_bytes())


def _flaw(error: jsonschema_rs.ValidationError, schema: Any) -> str:
    """What is wrong in `schema`, with the JSON Pointer, and with the value: a schema is no event."""
    found = json.dumps(error.instance, ensure_ascii=False)
    said = error.message.replace(_VALUE, found if len(found) <= _SHOWN else f"{found[:_SHOWN]}…")
    if not error.instance_path:
        return said
    try:
        ours = reduce(getitem, error.instance_path, schema) == error.instance
    except (LookupError, TypeError):
        ours = False
    return f"{_spelt(error.instance_path)}{'' if ours else ' of a file that it refers to'}: {said}"


def _pointer(error: jsonschema_rs.ValidationError) -> str:
    steps = ["detail", *error.instance_path]
    if isinstance(error.kind, jsonschema_rs.ValidationErrorKind.Required):
        steps.append(error.kind.property)  # the path of what is missing, not of what lacks it
    return _spelt(steps)


def _spelt(steps: Sequence[str | int]) -> str:
    """The JSON Pointer."""
    return "".join(f"/{str(step).replace('~', '~0').replace('/', '~1')}" for step in steps)
