from hypothesis import given
from hypothesis import strategies as st

from figbridge.change import Lsn
from figbridge.forward.checkpoint import Checkpoint, Ticket

# each step: track the next LSN, say that there is nothing up to the next LSN, or resolve one of the open tickets
STEPS = st.lists(st.tuples(st.sampled_from(["track", "advance", "resolve"]), st.integers(0, 1000)), max_size=60)


@given(STEPS)
def test_flushed_is_what_the_model_says_after_every_step(steps: list[tuple[str, int]]) -> None:
    checkpoint, lsn, before = Checkpoint(), 0, 0
    open_tickets: list[Ticket] = []
    log: list[tuple[int, Ticket | None]] = []  # the model: all that was announced, in order
    for action, choice in steps:
        lsn += 1 + choice % 3
        if action == "track":
            ticket = checkpoint.track(Lsn(lsn))
            open_tickets.append(ticket)
            log.append((lsn, ticket))
        elif action == "advance":
            checkpoint.advance(Lsn(lsn))
            log.append((lsn, None))
        elif open_tickets:
            checkpoint.resolve(open_tickets.pop(choice % len(open_tickets)))
        unresolved = [index for index, (_, ticket) in enumerate(log) if ticket in open_tickets and ticket is not None]
        delivered = log[: unresolved[0]] if unresolved else log
        assert checkpoint.flushed == max((at for at, _ in delivered), default=0)
        assert checkpoint.flushed >= before
        assert checkpoint.tracked == max((at for at, _ in log), default=0)
        before = checkpoint.flushed
    for ticket in open_tickets:
        checkpoint.resolve(ticket)
    assert checkpoint.pending == 0
    assert checkpoint.flushed == checkpoint.tracked


def test_keepalives_while_the_sink_is_down_do_not_pile_up() -> None:
    checkpoint = Checkpoint()
    ticket = checkpoint.track(Lsn(10))
    for lsn in range(11, 10_000):
        checkpoint.advance(Lsn(lsn))
    assert checkpoint.pending == 2
    assert checkpoint.flushed == 0
    checkpoint.resolve(ticket)
    assert checkpoint.flushed == 9_999
