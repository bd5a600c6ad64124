import contextlib
import http.client
import socket
from collections.abc import Iterator

import pytest

from figbridge.errors import SetupError
from figbridge.http import HttpServer
from figbridge.metrics import Metrics
from figbridge.reverse.apply import Outcome


def _has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


class Served:
    def __init__(self, host: str = "127.0.0.1") -> None:
        self.metrics, self.alive, self.host = Metrics(), True, host
        self.server = HttpServer((host, 0), self.metrics, parts=["forward", "reverse"], alive=lambda: self.alive)

    def get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection(self.host, self.server.port, timeout=5)
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read().decode()
        connection.close()
        return response.status, body


@pytest.fixture
def served() -> Iterator[Served]:
    it = Served()
    yield it
    it.server.close()


def test_ready_is_every_part_and_says_which_is_not(served: Served) -> None:
    served.metrics.ready.labels("forward").set(1)
    assert served.get("/readyz") == (503, "not ready: reverse\n")
    served.metrics.ready.labels("reverse").set(1)
    assert served.get("/readyz") == (200, "ready\n")


def test_a_counter_is_one_series(served: Served) -> None:
    _, page = served.get("/metrics")
    assert "figbridge_reverse_apply_seconds_count" in page
    assert "_created" not in page


def test_live_is_every_loop(served: Served) -> None:
    assert served.get("/livez")[0] == 200
    served.alive = False
    assert served.get("/livez")[0] == 503


def test_metrics_and_nothing_else(served: Served) -> None:
    served.metrics.published.labels("file").inc(3)
    status, body = served.get("/metrics")
    assert status == 200
    assert 'figbridge_forward_published_total{sink="file"} 3.0' in body
    assert served.get("/")[0] == 404


def test_every_outcome_is_counted_from_zero_so_that_the_first_one_is_an_increase() -> None:
    samples = [sample for metric in Metrics().registry.collect() for sample in metric.samples]
    counted = {it.labels["outcome"]: it.value for it in samples if it.name == "figbridge_reverse_events_total"}

    assert counted == dict.fromkeys(Outcome, 0)


@pytest.mark.skipif(not _has_ipv6(), reason="no IPv6 on this machine's loopback")
def test_an_ipv6_address_is_served_too() -> None:
    served = Served("::1")

    assert served.get("/livez")[0] == 200
    served.server.close()


def test_an_address_in_use_is_a_setup_error_with_a_remedy(served: Served) -> None:
    with pytest.raises(SetupError, match=r"http\.listen") as caught:
        HttpServer(("127.0.0.1", served.server.port), Metrics(), parts=[], alive=lambda: True)
    assert caught.value.exit_status == 2
