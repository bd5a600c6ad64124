"""A source of another package; sinks are in tests/acceptance/test_plugin.py."""

import importlib
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from figbridge.config import SourceSection
from figbridge.transports import open_source

MODULE = """
from typing import Literal
from figbridge.config import Section

class Opened:
    name = "nowhere"

class NowhereSection(Section):
    type: Literal["nowhere"]
    topic: str

    def open(self):
        return Opened()
"""


def test_a_source_is_opened_by_its_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = tmp_path / "nowhere-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: nowhere\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[figbridge.sources]\nnowhere = nowhere_source:NowhereSection\n")
    (tmp_path / "nowhere_source.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    adapter: TypeAdapter[SourceSection] = TypeAdapter(SourceSection)

    section = adapter.validate_python({"type": "nowhere", "topic": "orders"})

    assert open_source(section).name == "nowhere"
    with pytest.raises(ValueError, match="topic"):
        adapter.validate_python({"type": "nowhere"})
