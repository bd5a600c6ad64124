"""What libpq reads as a connection string although it cannot be meant, or can never open a connection.

libpq looks at the values of its parameters when it connects; a bridge would take that for a database that is away, and
try for ever. What depends on this machine, such as a service file, is left to that moment.

libpq splits a URL at the first ``@`` and ``/``, so where a password holds one of them unescaped, its rest becomes the
host, the port or the database, which logs and messages do show. No fault that is named here repeats a value.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Final

# https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS
_CHOICES: Final = {
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "sslnegotiation": ("postgres", "direct"),
    "sslcertmode": ("disable", "allow", "require"),
    "gssencmode": ("disable", "prefer", "require"),
    "channel_binding": ("disable", "prefer", "require"),
    "target_session_attrs": ("any", "read-write", "read-only", "primary", "standby", "prefer-standby"),
    "load_balance_hosts": ("disable", "random"),
}
_NUMBERS: Final = (
    "connect_timeout",
    "keepalives",
    "keepalives_idle",
    "keepalives_interval",
    "keepalives_count",
    "tcp_user_timeout",
)
_WHOLE: Final = re.compile(r"[+-]?[0-9]+")
_LISTS: Final = ("host", "hostaddr", "port")
_URL: Final = re.compile(r"postgres(?:ql)?://")


def faults(dsn: str, parts: Mapping[str, object]) -> Iterator[str]:
    """What is wrong with `parts`, as which libpq reads `dsn`."""
    url = _URL.match(dsn)
    given = {name: str(value) for name, value in parts.items() if value is not None}
    hosts = given.get("host", "").split(",")
    # a directory of sockets may have one in its name, and an abstract socket begins with it, which no URL's host does
    if any("@" in host and not host.startswith("/") and (url or not host.startswith("@")) for host in hosts):
        yield "its host holds an @"
    if url and "@" in dsn[url.end() :].partition("?")[0].partition("/")[2]:  # what libpq takes for the database
        yield "its database holds an unescaped @"
    ports = [port.strip() for port in given.get("port", "").split(",")]
    if not all(port == "" or re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 65536 for port in ports):  # noqa: RUF021
        yield "its port is no number from 1 to 65535"
    yield from _counts(given)
    for name, choices in _CHOICES.items():
        if name in given and given[name] not in choices:
            yield f"{name} is none of {' | '.join(choices)}"
    for name in _NUMBERS:
        if name in given and not (_WHOLE.fullmatch(given[name].strip()) and abs(int(given[name])) < 2**31):
            yield f"{name} is no whole number"


def _counts(given: Mapping[str, str]) -> Iterator[str]:
    """Of the lists, as far as they are in the DSN; what is not comes from the environment or a service file."""
    hosts, addresses, ports = (len(given[name].split(",")) if name in given else 0 for name in _LISTS)
    if hosts and addresses and hosts != addresses:
        yield f"it has {hosts} hosts and {addresses} host addresses"
    elif (hosts or addresses) and ports > 1 and ports != (addresses or hosts):
        yield f"it has {ports} ports for {addresses or hosts} hosts"
