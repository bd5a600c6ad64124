"""How long the bridge waits after a stream that broke off, and when it calls itself stuck."""

from figbridge.change import Lsn
from figbridge.errors import SourceDisconnected
from figbridge.forward.interruption import Interruptions

LOST = SourceDisconnected("the connection was cut")
BROKEN = SourceDisconnected("the server cannot send the stream")
BROKEN.urgent = True


def broken_off(interruptions: Interruptions, times: int, error: SourceDisconnected, lasting: float = 1.0) -> float:
    """The longest wait of `times` streams that began at 10 and came nowhere."""
    longest = 0.0
    for _ in range(times):
        interruptions.opened(Lsn(10), 0.0)
        longest = max(longest, interruptions.seconds(error, Lsn(10), lasting))
    return longest


def test_the_first_time_there_is_no_reason_to_wait() -> None:
    interruptions = Interruptions()
    assert broken_off(interruptions, 1, LOST) <= 0.2
    assert not interruptions.stuck


def test_streams_that_move_are_begun_again_at_once() -> None:
    interruptions = Interruptions()
    for place in range(10, 30):
        interruptions.opened(Lsn(place), 0.0)
        assert interruptions.seconds(BROKEN, Lsn(place + 1), 1.0) <= 0.2
        assert not interruptions.stuck


def test_what_the_server_can_never_send_is_tried_every_half_minute_at_most() -> None:
    interruptions = Interruptions()
    assert 2 < broken_off(interruptions, 200, BROKEN) <= 30
    assert broken_off(interruptions, 200, BROKEN, lasting=600.0) > 2, "it takes the server long to get there"
    assert interruptions.stuck
    interruptions.opened(Lsn(10), 0.0)
    assert not interruptions.moved(Lsn(10))
    assert interruptions.moved(Lsn(11))
    assert not interruptions.stuck
    assert not interruptions.moved(Lsn(12)), "it is told once"


def test_a_connection_that_is_cut_comes_back_within_two_seconds() -> None:
    interruptions = Interruptions()
    assert broken_off(interruptions, 200, LOST) <= 2
    assert broken_off(interruptions, 1, LOST, lasting=31.0) <= 0.2, "it was in order, and quiet"
