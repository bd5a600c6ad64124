"""The parts of a detail that are the same for all rows of a table with one operation: made once, then only joined.

    start id between key before OLD after NEW end [lsn sequence lsn] position ordinal tail
      └────────────── `Parts`, of a table ──────┘      └── `Stamp`, of a transaction ──┘

`figbridge.forward.shape` says what the native detail holds, `figbridge.forward.debezium` what Debezium's envelope does;
both are this row of parts, so either costs the same.
"""

from typing import Final, Literal, NamedTuple

from figbridge.change import Operation

Form = Literal["native", "debezium"]  # of the detail; what is around it is `figbridge.formats`' business

_START: Final = b'{"id":"'
_BEFORE: Final = b',"before":'
_AFTER: Final = b',"after":'
_END: Final = b',"unchanged":[]'


class Named(NamedTuple):
    """How the events of a table are named, filled in for one operation."""

    source: str
    detail_type: str
    resources: tuple[str, ...]


class Parts(NamedTuple):
    """See the module. ``end`` stands after a row of which every value was sent."""

    source: str
    detail_type: str
    resources: tuple[str, ...]
    start: bytes
    between: bytes
    before: bytes
    after: bytes
    end: bytes


def native(named: Named, operation: Operation, where: bytes, version: str) -> Parts:
    """`where` has the table, as ``"schema":…,"table":…``; `version` is its schema version."""
    between = b'","op":"%b",%b,"schema_version":"%b","key":' % (operation.encode(), where, version.encode())
    return Parts(*named, _START, between, _BEFORE, _AFTER, _END)
