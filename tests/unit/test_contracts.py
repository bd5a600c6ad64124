"""Contracts: which file is for which events, what is told of a breach, and what is no contract."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from figbridge.contracts import Contracts, of_file
from figbridge.errors import ConfigError, Problem

WIDGET = {
    "type": "object",
    "required": ["widget_id"],
    "properties": {"widget_id": {"type": "string"}, "price": {"type": "number", "minimum": 0}},
}


def written(directory: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


def problems(directory: Path) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        Contracts.load(directory)
    return list(caught.value.problems)


def test_a_file_is_for_what_its_place_says_or_itself_says(tmp_path: Path) -> None:
    contracts = Contracts.load(
        written(
            tmp_path,
            {
                "cwi.servicea/NEW_WIDGET.json": WIDGET,
                "NEW_WIDGET.json": {"type": "object"},
                "a%2Fb/Object Created.json": {},
                "deep/down/here.json": {"x-figbridge": {"source": "s", "detail-type": "t"}},
                "any.json": {"x-figbridge": {"detail-type": "of whatever source"}},
                "_shared/money.json": {"type": "nonsense"},
            },
        )
    )

    def name(source: str, detail_type: str) -> str | None:
        found = contracts.find(source, detail_type)
        return found.name if found else None

    assert len(contracts) == 5
    assert name("cwi.servicea", "NEW_WIDGET") == "cwi.servicea/NEW_WIDGET.json"
    assert name("cwi.serviceb", "NEW_WIDGET") == "NEW_WIDGET.json"
    assert name("a/b", "Object Created") == "a%2Fb/Object Created.json"
    assert name("s", "t") == "deep/down/here.json"
    assert name("x", "of whatever source") == "any.json"
    assert name("cwi.servicea", "OLD_WIDGET") is None


@given(st.one_of(st.none(), st.text(min_size=1)), st.text(min_size=1))
def test_every_kind_of_event_has_a_file_that_is_read_back_as_for_it(source: str | None, detail_type: str) -> None:
    from figbridge.contracts import _kind

    try:
        f"{source}{detail_type}".encode()
    except UnicodeEncodeError:
        return
    path = of_file((source, detail_type))
    assert len(path.parts) <= 2
    assert ".." not in path.parts
    assert not any(part.startswith("_") for part in path.parts)
    assert _kind(path, {}) == (source, detail_type)


def test_a_breach_names_the_path_and_no_value(tmp_path: Path) -> None:
    contract = Contracts.load(written(tmp_path, {"t.json": WIDGET | {"additionalProperties": False}})).find("s", "t")
    assert contract

    assert contract.breaches(b'{"widget_id":"abc123","price":12.50}') == ()
    assert contract.breaches(b"{}") == [("/detail/widget_id", '"widget_id" is a required property')]
    told = contract.breaches(b'{"widget_id":[666],"price":-666,"a/b~c":666}')
    assert {it.path for it in told} == {"/detail/widget_id", "/detail/price", "/detail"}
    assert "666" not in str(told)
    assert contract.breaches(rb'{"widget_id":"\ud800 \\ud800 \\\udfff \ud83d\ude00"}') == ()
    assert [it.path for it in contract.breaches(b"{")] == ["/detail"]
    assert [it.path for it in contract.breaches(b"[" * 5000)] == ["/detail"]


def test_at_most_ten_breaches_are_told(tmp_path: Path) -> None:
    contract = Contracts.load(written(tmp_path, {"t.json": {"additionalProperties": {"type": "null"}}})).find("s", "t")
    assert contract

    assert len(contract.breaches(json.dumps(dict.fromkeys(map(str, range(50)), 1)).encode())) == 10


def test_a_reference_leads_to_another_file_of_the_directory_and_nowhere_else(tmp_path: Path) -> None:
    inside = written(
        tmp_path / "contracts",
        {
            "s/t.json": {"properties": {"price": {"$ref": "../_shared/money.json#/$defs/amount"}}},
            "_shared/money.json": {"$defs": {"amount": {"type": "integer"}}},
        },
    )
    contract = Contracts.load(inside).find("s", "t")
    assert contract
    assert contract.breaches(b'{"price":1}') == ()
    assert contract.breaches(b'{"price":"1"}')

    written(tmp_path, {"secret.json": {}})
    for reference in ("https://example.com/money.json", "../../secret.json", "_shared/nowhere.json"):
        written(inside, {"s/t.json": {"properties": {"price": {"$ref": reference}}}})
        (problem,) = problems(inside)
        assert problem.where.endswith("s/t.json")


def test_everything_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    directory = written(
        tmp_path,
        {
            "good.json": {},
            "broken.json": "{",
            "unknown-type.json": {"type": "text"},
            "list.json": "[]",
            "a/b/c.json": {},
            "twice.json": {"x-figbridge": {"detail-type": "good"}},
            "several.json": {"x-figbridge": {"detail-type": ["a", "b"]}},
            "number.json": {"x-figbridge": {"detail-type": 5}},
            "source.json": {"x-figbridge": {"source": ["a"], "detail-type": "a"}},
            "nothing.json": {"x-figbridge": None},
        },
    )

    assert {Path(it.where).name for it in problems(directory)} == {
        "broken.json",
        "unknown-type.json",
        "list.json",
        "c.json",
        "twice.json",
        "several.json",
        "number.json",
        "source.json",
        "nothing.json",
    }


@pytest.mark.parametrize(
    ("contract", "says"),
    [
        ({"properties": {"after": {"properties": {"a/b": {"type": "objekt"}}}}},
         '/properties/after/properties/a~1b/type: "objekt" is not valid'),
        ({"anyOf": [{}, {"pattern": "(["}]}, '/anyOf/1/pattern: "([" is not a "regex"'),
        ({"required": {"x" * 70: 1}}, '/required: {"xxxx'),
        ("[]", "is no contract: [] is not of types"),
        ({"$ref": "_other.json"}, "/properties/q/type of a file that it refers to: "),
        ({"properties": {"q": {"$ref": "_other.json"}}}, "/properties/q/type of a file that it refers to: "),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_schema_is_told_with_its_place(tmp_path: Path, contract: Any, says: str) -> None:
    other = {"properties": {"q": {"type": "objekt"}}}
    (problem,) = problems(written(tmp_path, {"t.json": contract, "_other.json": other}))
    assert says in problem.what
    assert len(problem.what) < 200


def test_no_directory_and_no_contract_are_errors(tmp_path: Path) -> None:
    assert "no directory" in problems(tmp_path / "nowhere")[0].what
    assert "no contract" in problems(written(tmp_path, {"_only.json": {}}))[0].what
