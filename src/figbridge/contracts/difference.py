"""Two versions of contracts compared: whom does the change break?

    consumers   an event that keeps the new contract may not keep the old one, which they were written for
    producers   an event that keeps the old contract may not keep the new one, and would be set aside

A member that a contract does not name is taken not to occur, although an open contract would allow it: so to name a
further one that may be missing breaks nobody.

A comparison of schemas in general is not to be had, so what cannot be told counts as a break: silence means that the
change is safe. What is compared is what contracts are made of: types, required and known members, constants and
enumerations, limits, items; everything else only for being equal.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Literal, NamedTuple

from figbridge.contracts import SAYS, Kind

Whom = Literal["consumers", "producers"]
_WORDLESS: Final = frozenset({"$schema", "$id", "$comment", "title", "description", "examples", "default", SAYS})
_ALL: Final = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})
_UPPER: Final = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")
_LOWER: Final = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
_KNOWN: Final = {"type", "required", "properties", "additionalProperties", "const", "enum", "items", *_UPPER, *_LOWER}


class Break(NamedTuple):
    """What of a contract breaks whom; ``path`` is a JSON Pointer into the event."""

    whom: Whom
    contract: str
    path: str
    what: str

    def __str__(self) -> str:
        return f"breaks {self.whom}: {self.contract} {self.path}: {self.what}"


def compare(old: Mapping[Kind, Any], new: Mapping[Kind, Any], name: Callable[[Kind], str]) -> Iterator[Break]:
    """Every break from `old` to `new`, in the order of the kinds. A further contract breaks nobody."""
    for kind, was in old.items():
        if kind in new:
            yield from (it._replace(contract=name(kind)) for it in _schemas(was, new[kind], "/detail"))
        else:
            yield Break("consumers", name(kind), "/detail", "the contract is gone, so such events are not promised")
            yield Break("producers", name(kind), "/detail", "the contract is gone, so such events may be set aside")


def _schemas(old: Any, new: Any, path: str) -> Iterator[Break]:
    if _said(old) == _said(new):
        return
    if old is False or new is False:
        yield _break("producers" if new is False else "consumers", path, "is not allowed on one side")
        return
    old, new = _dict(old), _dict(new)
    others = {key for key in {*old, *new} - _KNOWN - _WORDLESS if _said(old.get(key)) != _said(new.get(key))}
    for key in sorted(others):
        for whom in _both():
            yield _break(whom, path, f"{key} is not the same, and whether that is safe cannot be told")
    yield from _kinds(old, new, path)
    yield from _values(old, new, path)
    yield from _limits(old, new, path)
    yield from _members(old, new, path)
    if "items" in old or "items" in new:
        yield from _schemas(old.get("items", {}), new.get("items", {}), f"{path}/*")


def _kinds(old: Mapping[str, Any], new: Mapping[str, Any], path: str) -> Iterator[Break]:
    was, now = _types(old), _types(new)
    if more := now - was:
        yield _break("consumers", path, f"may now be {_listed(more)}")
    if fewer := was - now:
        yield _break("producers", path, f"may no longer be {_listed(fewer)}")


def _types(schema: Mapping[str, Any]) -> frozenset[str]:
    said = schema.get("type")
    if said is None:
        return _ALL
    kinds = frozenset([said] if isinstance(said, str) else said)
    return kinds | {"integer"} if "number" in kinds else kinds


def _values(old: Mapping[str, Any], new: Mapping[str, Any], path: str) -> Iterator[Break]:
    was, now = _enumerated(old), _enumerated(new)
    if was == now:
        return
    if was is not None and (now is None or now - was):
        yield _break("consumers", path, f"may be something else than {_listed(was)}")
    if now is not None and (was is None or was - now):
        yield _break("producers", path, f"must be one of {_listed(now)}")


def _enumerated(schema: Mapping[str, Any]) -> frozenset[str] | None:
    if "const" in schema:
        return frozenset([_said(schema["const"])])
    return frozenset(map(_said, schema["enum"])) if "enum" in schema else None


def _limits(old: Mapping[str, Any], new: Mapping[str, Any], path: str) -> Iterator[Break]:
    for keys, sign in ((_UPPER, 1), (_LOWER, -1)):
        for key in keys:
            was, now = old.get(key), new.get(key)
            if was is not None and (now is None or sign * now > sign * was):
                yield _break("consumers", path, f"{key} was {was}, and is {'gone' if now is None else now}")
            if now is not None and (was is None or sign * now < sign * was):
                yield _break("producers", path, f"{key} is {now}, and {'there was none' if was is None else was}")


def _members(old: Mapping[str, Any], new: Mapping[str, Any], path: str) -> Iterator[Break]:
    was, now = _dict(old.get("properties", {})), _dict(new.get("properties", {}))
    always, always_now = set(old.get("required", ())), set(new.get("required", ()))
    for name in sorted(always - always_now):
        yield _break("consumers", _at(path, name), "was always there, and may be missing" if name in now else "is gone")
    for name in sorted(always_now - always):
        yield _break("producers", _at(path, name), "must be there")
    for name in sorted(was.keys() & now.keys()):
        yield from _schemas(was[name], now[name], _at(path, name))
    for name in sorted(was.keys() - now.keys()):
        if name not in always:
            yield _break("consumers", _at(path, name), "is gone")
        if new.get("additionalProperties") is False:
            yield _break("producers", _at(path, name), "is no longer allowed")
    for name in sorted(now.keys() - was.keys()):
        if old.get("additionalProperties") is False:
            yield _break("consumers", _at(path, name), "is there, where nothing else was to be")
    yield from _others(old.get("additionalProperties", True), new.get("additionalProperties", True), path)


def _others(rest: Any, rest_now: Any, path: str) -> Iterator[Break]:
    """Members that have no name in the contract."""
    if _said(rest) != _said(rest_now):
        if rest_now is False or rest is True:
            yield _break("producers", path, "no other members are allowed, or not any")
        if rest is False or rest_now is True:
            yield _break("consumers", path, "may have other members")
        if isinstance(rest, dict) and isinstance(rest_now, dict):
            yield from _schemas(rest, rest_now, f"{path}/*")


def _break(whom: Whom, path: str, what: str) -> Break:
    return Break(whom, "", path, what)


def _both() -> tuple[Whom, Whom]:
    return "consumers", "producers"


def _at(path: str, name: str) -> str:
    return f"{path}/{name.replace('~', '~0').replace('/', '~1')}"


def _dict(schema: Any) -> Mapping[str, Any]:
    return schema if isinstance(schema, dict) else {}


def _said(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _listed(words: frozenset[str]) -> str:
    return ", ".join(sorted(words))
