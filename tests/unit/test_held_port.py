"""The port of a server that is ended and started again: nobody may get it meanwhile."""

import socket
import struct
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from figbridge.demo.port import HeldPort

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a port be held for a server")
_IP_LOCAL_PORT_RANGE = 51  # of linux/in.h; the module socket does not know it in Python 3.11


def test_nobody_who_wants_a_port_of_his_own_gets_one_that_is_held() -> None:
    with HeldPort() as port, socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port.number))


def test_the_server_that_it_is_held_for_may_listen_there_again_and_again() -> None:
    with HeldPort() as port:
        for _ in range(3):
            with HTTPServer(("127.0.0.1", port.number), BaseHTTPRequestHandler):
                socket.create_connection(("127.0.0.1", port.number), timeout=5).close()


def test_no_connection_gets_it_as_the_port_of_its_own_end() -> None:
    with HeldPort() as port, socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
        only = struct.pack("=I", port.number << 16 | port.number)  # the highest and the lowest
        try:
            client.setsockopt(socket.IPPROTO_IP, _IP_LOCAL_PORT_RANGE, only)
        except OSError:
            pytest.skip("a kernel before 6.3 cannot be told which port to choose")
        with pytest.raises(OSError, match="assign"):
            client.connect(server.getsockname())


def test_everybody_may_have_it_once_it_is_closed() -> None:
    port = HeldPort()
    port.close()
    with socket.socket() as other:
        other.bind(("127.0.0.1", port.number))
