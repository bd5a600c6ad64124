"""Whom a change of a contract breaks; what is silent is safe, by trying."""

from typing import Any

import jsonschema_rs
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from figbridge.contracts.difference import compare

KIND = ("s", "t")


def breaks(old: Any, new: Any) -> set[tuple[str, str]]:
    return {(it.whom, it.path) for it in compare({KIND: old}, {KIND: new}, lambda _: "t")}


def of(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": sorted(properties), "properties": properties}


TEXT, NUMBER = {"type": "string"}, {"type": "number"}


@pytest.mark.parametrize(
    ("old", "new", "whom"),
    [
        (of(a=TEXT), of(a=TEXT), set()),
        (of(a=TEXT), of(a=TEXT) | {"title": "other", "description": "x"}, set()),
        (of(a=TEXT), {**of(a=TEXT), "properties": {"a": TEXT, "b": TEXT}}, set()),
        (of(a=TEXT), of(a=NUMBER), {"consumers", "producers"}),
        (of(a=TEXT), of(a={"type": ["string", "null"]}), {"consumers"}),
        (of(a={"type": ["string", "null"]}), of(a=TEXT), {"producers"}),
        (of(a={"type": "integer"}), of(a=NUMBER), {"consumers"}),
        (of(a=TEXT, b=TEXT), of(a=TEXT), {"consumers"}),
        ({**of(a=TEXT, b=TEXT), "required": ["a"]}, of(a=TEXT), {"consumers"}),
        (of(a=TEXT), of(a=TEXT) | {"required": []}, {"consumers"}),
        (of(a=TEXT) | {"required": []}, of(a=TEXT), {"producers"}),
        (of(a={"enum": ["x"]}), of(a={"enum": ["x", "y"]}), {"consumers"}),
        (of(a={"enum": ["x", "y"]}), of(a={"const": "x"}), {"producers"}),
        (of(a={"maxLength": 3}), of(a={"maxLength": 4}), {"consumers"}),
        (of(a={"minimum": 3}), of(a={"minimum": 4}), {"producers"}),
        (of(a={"minimum": 3}), of(a={}), {"consumers"}),
        (of(a={"items": TEXT}), of(a={"items": NUMBER}), {"consumers", "producers"}),
        (of(a=TEXT) | {"additionalProperties": False}, of(a=TEXT), {"consumers"}),
        (of(a=TEXT), of(a=TEXT) | {"additionalProperties": False}, {"producers"}),
        (of(a={"pattern": "x"}), of(a={"pattern": "y"}), {"consumers", "producers"}),
        ({"anyOf": [of(a=TEXT)]}, {"anyOf": [of(a=NUMBER)]}, {"consumers", "producers"}),
    ],
)
def test_whom_a_change_breaks(old: Any, new: Any, whom: set[str]) -> None:
    assert {it for it, _ in breaks(old, new)} == whom


def test_a_contract_that_is_gone_breaks_and_a_further_one_does_not() -> None:
    assert {it.whom for it in compare({KIND: {}}, {}, str)} == {"consumers", "producers"}
    assert [*compare({}, {KIND: {}}, str)] == []


def test_the_path_leads_to_what_changed() -> None:
    assert breaks(of(a=of(b=TEXT)), of(a=of(b=NUMBER))) == {("consumers", "/detail/a/b"), ("producers", "/detail/a/b")}


_TYPES = st.one_of(
    st.sampled_from(["null", "boolean", "integer", "number", "string"]),
    st.lists(st.sampled_from(["null", "integer", "number", "string"]), min_size=1, max_size=3, unique=True),
)
_LEAVES = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"type": _TYPES}),
    st.fixed_dictionaries({"enum": st.lists(st.sampled_from([None, 0, 1, "a", "abcd"]), min_size=1, unique=True)}),
    st.fixed_dictionaries({"maxLength": st.integers(0, 4)}),
    st.fixed_dictionaries({"minimum": st.integers(-1, 1)}),
    st.fixed_dictionaries({"items": st.fixed_dictionaries({"type": _TYPES})}),
)
_SCHEMAS = st.fixed_dictionaries(
    {"properties": st.dictionaries(st.sampled_from("ab"), _LEAVES)},
    optional={
        "type": st.just("object"),
        "required": st.lists(st.sampled_from("ab"), unique=True),
        "additionalProperties": st.sampled_from([True, False]),
    },
)
_ATOMS = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 2), st.sampled_from([0.5, "", "a", "abcd", [], [1], ["a", None]])
)
_EVENTS = st.dictionaries(st.sampled_from("abc"), _ATOMS)


# most pairs agree on an event; how many of the first ones do not is chance
@settings(suppress_health_check=[HealthCheck.filter_too_much])
@given(_SCHEMAS, _SCHEMAS, _EVENTS)
def test_what_is_said_to_be_safe_is_safe(old: dict[str, Any], new: dict[str, Any], event: dict[str, Any]) -> None:
    whom = {it for it, _ in breaks(old, new)}
    keeps_old, keeps_new = jsonschema_rs.is_valid(old, event), jsonschema_rs.is_valid(new, event)
    assume(keeps_old is not keeps_new)
    assume(set(event) <= set((new if keeps_new else old)["properties"]))  # nobody writes what has no name

    assert ("consumers" if keeps_new else "producers") in whom
