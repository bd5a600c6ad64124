"""What libpq reads as a connection string although it cannot be meant: a part of a password taken for something else.

libpq splits a URL at the first ``@`` and ``/``, so where a password holds one of them unescaped, its rest becomes the
host, the port or the database, which logs and messages do show. No fault that is named here repeats a value.
"""

import re
from collections.abc import Iterator, Mapping

_URL = re.compile(r"postgres(?:ql)?://")


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
