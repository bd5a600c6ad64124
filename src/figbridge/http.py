"""``/metrics``, ``/livez`` and ``/readyz``, for Prometheus and the container platform.

Live means that every loop still runs: a restart helps if not. Ready means that the replication stream is open and the
loop guard is proven: a stand-by replica that waits for the slot is live and not ready, and must not be restarted.
"""

import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import disable_created_metrics, make_wsgi_app

from figbridge.errors import Problem, SetupError
from figbridge.metrics import Metrics

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True  # a scraper that hangs must not keep the process alive


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = 10  # seconds a client may take to send its request

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 (the base class's name)
        """A probe every few seconds is no news."""


class HttpServer:
    """Serves until `close`, in a thread of its own.

    Raises SetupError when the address cannot be bound.
    """

    def __init__(
        self, address: tuple[str, int], metrics: Metrics, *, parts: Sequence[str], alive: Callable[[], bool]
    ) -> None:
        self._metrics = metrics
        self._parts = parts
        self._alive = alive
        # a second series beside each counter and histogram; for the whole process, which is ours where we serve
        disable_created_metrics()  # type: ignore[no-untyped-call]  # it has no types
        self._exposition: WSGIApplication = make_wsgi_app(metrics.registry)
        try:
            self._server = make_server(
                *address, self._answer, server_class=_Server6 if ":" in address[0] else _Server, handler_class=_Handler
            )
        except OSError as error:
            remedy = "choose another http.listen, or end the process that listens there"
            raise SetupError(
                "cannot serve metrics", [Problem("http.listen", f"{address[0]}:{address[1]}: {error}", remedy)]
            ) from error
        threading.Thread(target=self._server.serve_forever, name="http", daemon=True).start()

    @property
    def port(self) -> int:
        """The port that is listened on (useful when 0 was asked for)."""
        return self._server.server_port

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environment: "WSGIEnvironment", respond: "StartResponse") -> Iterable[bytes]:
        match environment.get("PATH_INFO"):
            case "/metrics":
                return self._exposition(environment, respond)
            case "/livez":
                return _plain(
                    respond, ok=self._alive(), text="every loop runs" if self._alive() else "a loop has ended"
                )
            case "/readyz":
                waiting = [part for part in self._parts if not self._is_ready(part)]
                text = f"not ready: {', '.join(waiting)}" if waiting else "ready"
                return _plain(respond, ok=not waiting, text=text)
            case _:
                respond("404 Not Found", [("Content-Type", "text/plain")])
                return [b"there are /metrics, /livez and /readyz\n"]

    def _is_ready(self, part: str) -> bool:
        return self._metrics.registry.get_sample_value("figbridge_ready", {"part": part}) == 1


def _plain(respond: "StartResponse", *, ok: bool, text: str) -> Iterable[bytes]:
    respond("200 OK" if ok else "503 Service Unavailable", [("Content-Type", "text/plain")])
    return [text.encode() + b"\n"]
