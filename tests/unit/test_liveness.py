"""Two limits of silence: what they are for whom, that they find the dead, and that they never stop the living."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from figbridge.change import Lsn
from figbridge.forward.liveness import SENDER, SILENCE, Liveness


def streaming(start: int = 100, configured: float = 60.0, *, chosen: bool = False) -> Liveness:
    liveness = Liveness()
    liveness.opened(Lsn(start), configured, chosen=chosen)
    liveness.streaming(0.0)
    return liveness


@pytest.mark.parametrize(
    ("configured", "chosen", "wanted", "sender_timeout", "silence"),
    [
        (60.0, False, SENDER, SENDER, SILENCE),
        (0.0, False, SENDER, SENDER, SILENCE),  # a server that never ends a session: we do
        (2.0, False, None, 2.0, SILENCE),  # a server that is stricter than we are
        (SENDER, False, None, SENDER, SILENCE),
        (60.0, True, None, 60.0, 60.0),
        (1.0, True, None, 1.0, 1.0),
        (3600.0, True, None, 3600.0, 3600.0),
        (0.0, True, None, math.inf, SILENCE),
    ],
)
def test_whose_word_counts(
    configured: float, chosen: bool, wanted: float | None, sender_timeout: float, silence: float
) -> None:
    liveness = Liveness()
    assert liveness.opened(Lsn(1), configured, chosen=chosen) == wanted
    assert (liveness.sender_timeout, liveness.silence) == (sender_timeout, silence)


def test_a_silent_server_is_asked_before_it_is_given_up() -> None:
    liveness = streaming()
    listened, asked = 0.0, None
    while not liveness.is_dead(0.5):
        listened += 0.5
        if liveness.asks and asked is None:
            asked = listened
    assert asked == SILENCE / 2
    assert listened + 0.5 == SILENCE
    assert "said nothing for 20.0 s and did not answer" in liveness.ended(SILENCE)


def test_a_word_of_the_server_ends_its_silence() -> None:
    liveness = streaming()
    assert not liveness.is_dead(SILENCE - 1)
    assert liveness.asks
    liveness.heard()
    assert not liveness.asks
    assert not liveness.is_dead(SILENCE - 1)


def test_a_connection_that_ends_for_another_reason_changes_nothing() -> None:
    liveness = streaming()
    for now in range(1, 100):
        liveness.said(float(now))
    assert liveness.ended(99.5) == ""
    assert liveness.opened(Lsn(100), 60.0, chosen=False) == SENDER


@pytest.mark.parametrize("late", [True, False])
def test_our_own_silence_is_known_also_when_a_late_word_was_still_sent(late: bool) -> None:
    """A status update into a socket that the server has closed succeeds; the end is read only after it."""
    liveness = streaming()
    liveness.said(1.0)
    if late:
        liveness.said(7.0)
    assert "this process said nothing for 6.0 s" in liveness.ended(7.0)


def test_a_pause_of_one_connection_is_not_held_against_the_next() -> None:
    liveness = streaming()
    assert liveness.ended(10.0)
    liveness.opened(Lsn(100), 60.0, chosen=False)
    liveness.streaming(20.0)
    assert liveness.ended(21.0) == ""


def test_what_keeps_the_stream_from_moving_has_more_time_and_only_while_it_does() -> None:
    liveness = streaming(100)
    assert liveness.ended(6.0)
    for _ in range(2):  # a slot that is in use is asked for again and again
        assert liveness.opened(Lsn(100), 60.0, chosen=False) == 2 * SENDER
    assert liveness.silence == 2 * SILENCE
    assert liveness.opened(Lsn(101), 60.0, chosen=False) == SENDER
    assert liveness.silence == SILENCE


def test_what_was_chosen_is_not_touched() -> None:
    liveness = streaming(configured=2.0, chosen=True)
    assert liveness.ended(6.0)
    assert liveness.opened(Lsn(100), 2.0, chosen=True) is None
    assert liveness.sender_timeout == 2.0


@given(
    configured=st.sampled_from([0.0, 3.0, 60.0, 7200.0]),
    needed=st.floats(0.1, 800.0),
    place=st.integers(0, 2**63),
    side=st.sampled_from(["server", "process"]),
)
def test_whatever_takes_long_gets_its_time_in_the_end(configured: float, needed: float, place: int, side: str) -> None:
    """Also on a server that is stricter, where only its own limit can stop us."""
    liveness = Liveness()
    spent = 0.0
    for _ in range(12):
        liveness.opened(Lsn(place), configured, chosen=False)
        liveness.streaming(0.0)
        limit = liveness.silence if side == "server" else liveness.sender_timeout
        if needed < limit or (side == "process" and limit == configured):
            assert spent <= 4 * max(needed, SILENCE), "waiting for the right limit cost more than a few times the work"
            return
        if side == "server":
            assert liveness.is_dead(needed)
        assert liveness.ended(needed if side == "process" else 0.0)
        spent += limit
    raise AssertionError("it never got enough time")
