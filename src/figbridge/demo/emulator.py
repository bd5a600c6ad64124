"""An AWS on this machine: a moto server that answers EventBridge and SQS over HTTP, as a process of its own.

``python -m figbridge.demo.emulator`` says where it listens (`Report`) and runs until its standard input ends. It
listens on 127.0.0.1 and stores nothing.
"""

import dataclasses
import sys

from figbridge.demo.processes import Orders, say


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """Where it listens: the endpoint URL of all services."""

    endpoint: str


def main() -> None:
    """Serve until told to stop."""
    from moto.server import ThreadedMotoServer  # noqa: PLC0415 (comes with the extra `demo`; `Report` must do without)

    orders = Orders()
    reports, sys.stdout = sys.stdout, sys.stderr  # moto's web server prints a greeting of its own
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    say(Report(f"http://{host}:{port}"), reports)
    orders.gone.wait()
    server.stop()


if __name__ == "__main__":
    main()
