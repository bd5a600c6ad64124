"""Which ends of a configuration are files, and that no two of them are one.

A file sink has its file locked for as long as it is open (`figbridge.transports.file`): whoever else writes there waits
for ever. The dead letters of several parts may be in one file, and an embedded bus has as many ends as one likes.
"""

import os
from collections.abc import Mapping

from figbridge.config.forward import FileDeadLetters
from figbridge.config.transports import FileSinkSection, LocalSinkSection, LocalSourceSection


def require_apart(ends: Mapping[str, object]) -> None:
    """Compare `ends`, each under the name of its setting. Raises ValueError when two cannot have the file they name."""
    taken: dict[str, tuple[str, str]] = {}
    for where, end in ends.items():
        match end:
            case FileSinkSection():
                use = "events"
            case FileDeadLetters():
                use = "letters"
            case LocalSinkSection() | LocalSourceSection():
                use = "bus"
            case _:
                continue
        other, its_use = taken.setdefault(os.path.realpath(end.path), (where, use))
        if other != where and (use != its_use or use == "events"):
            raise ValueError(f"{other} and {where} are one file, and would wait for one another; name two")
