import gc

import pytest

from figbridge import __main__


def test_what_a_process_imports_is_nothing_to_the_collector_and_what_it_makes_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frozen, began = gc.get_freeze_count(), []
    monkeypatch.setattr("figbridge.cli.main", lambda: began.append((gc.isenabled(), gc.get_freeze_count())))
    __main__.main()
    ((collecting, left_alone),) = began
    assert collecting
    assert left_alone > frozen
