"""Events for the suites: ordinary ones in a row, and odd ones, each odd in one way."""

import json
from datetime import UTC, datetime
from typing import Any

from figbridge.event import Event

WHEN = datetime(2026, 11, 23, 10, 8, 2, 698540, tzinfo=UTC)

# Everything a JSON string or number can hold that a transport might damage.
ODD_DETAILS: dict[str, bytes] = {
    "escapes": rb'{"id":"%b","v":"\"quoted\" back\\slash \n newline \t tab \u0000 nul \ud83c\udf33 pair"}',
    "letters": '{"id":"%b","v":"żółw 中文 🌳 \u2028 \u00a0 ﷽"}'.encode(),
    "markup": b'{"id":"%b","v":"<a href=\'x\'>&amp; %%s %%(x)s {0} ${x}</a>"}',
    "numbers": b'{"id":"%b","v":[0,-0.0,1e-7,9223372036854775807,-9223372036854775808,12.50]}',
    "nothing": b'{"id":"%b","v":[null,true,false,"",{},[]]}',
    "spaces": b'{ "id" : "%b" , "v" : [ 1 , 2 ] }',
}


def event(number: int = 0, *, detail: bytes | None = None, **changes: Any) -> Event:
    """The `number`-th event; `detail` may hold a ``%b`` for the id."""
    name = f"7423-1-{number:016X}-00000000"
    detail = (detail or b'{"id":"%b","n":' + str(number).encode() + b"}") % name.encode()
    return Event(name, "legacy.shop", "orders.updated", "shop.orders/1", WHEN, detail)._replace(**changes)


def number(envelope: bytes) -> int:
    """Which event this is the envelope of."""
    return int(json.loads(envelope)["detail"]["n"])
