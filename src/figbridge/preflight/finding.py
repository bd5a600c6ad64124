"""What a probe found: a value, with its remedy."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "error"]
# init: may the set-up begin. run: is everything there that the bridge needs.
Stage = Literal["init", "run"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    An error stops `figbridge init` and `figbridge run`; a warning stops nothing. ``remedy`` is in the imperative,
    with the statement to run where there is one; empty for what is ok.
    """

    level: Level
    where: str
    what: str
    remedy: str = ""


def ok(where: str, what: str) -> Finding:
    """Looked at, as it should be."""
    return Finding("ok", where, what)


def warning(where: str, what: str, remedy: str) -> Finding:
    """It works, and the operator should know."""
    return Finding("warning", where, what, remedy)


def error(where: str, what: str, remedy: str) -> Finding:
    """It would not work, or would do harm."""
    return Finding("error", where, what, remedy)
