"""The slot's guard against a model of servers, processes and everything that may be killed: never a false alarm.

The model holds what PostgreSQL guarantees and nothing more: a committed row survives a crash of its server, a confirmed
position may be forgotten by one, a standby has a prefix of the WAL, the row as that prefix has it, and a slot as it
once was that does not reach beyond it.
"""

import random
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import structlog

from figbridge.change import Lsn
from figbridge.errors import SlotLost, SourceError
from figbridge.forward.bound import LEAST, MOST, Bound
from figbridge.forward.incarnation import Incarnation, Note
from figbridge.forward.source import Identity


@dataclass
class Process:
    """A bridge: `streams` is what it believes."""

    table: bool
    incarnation: Incarnation = field(init=False)
    bound: Bound = field(default_factory=Bound)
    streams: bool = False
    read: Lsn = field(default=Lsn(0))

    def __post_init__(self) -> None:
        self.incarnation = Incarnation("s", table=self.table)


class World:
    """One primary, its possible standbys, and two replicas of the bridge. Each step is one thing that may happen."""

    WEIGHTS: ClassVar[dict[str, int]] = {
        "the_application_writes": 8,
        "time_passes": 3,
        "connect": 8,
        "publish_and_acknowledge": 10,
        "raise_the_bound": 8,
        "kill": 2,
        "stop_softly": 1,
        "cut": 2,
        "the_slot_is_saved": 2,
        "the_server_crashes": 1,
        "a_standby_is_promoted": 1,
        "somebody_else_moves_it": 2,
    }

    def __init__(self, seed: int, *, table: bool) -> None:
        self.random = random.Random(seed)
        self.table = table
        self.identity = Identity("1", 1, ())
        self.wal = 1000
        self.now = 1.0
        self.confirmed = self.saved = 1000
        self.note: Note | None = None
        # what a standby may be promoted with: rows by the WAL that holds them, and places where the slot once stood
        self.notes: list[tuple[int, Note]] = []
        self.places = [1000]
        self.processes = [Process(table), Process(table)]
        self.holder: Process | None = None
        self.noticed = 0

    def walk(self, steps: int) -> None:
        taken = []
        for name in self.random.choices(list(self.WEIGHTS), list(self.WEIGHTS.values()), k=steps):
            taken.append(name)
            try:
                getattr(self, name)()
                assert self.confirmed <= self.wal, "confirmed what was never written"
                if self.table and self.note and self.note.timeline == self.identity.timeline:
                    assert self.confirmed <= self.note.bound, "confirmed beyond what was promised"
            except BaseException as error:
                error.add_note(f"after {' '.join(taken[-25:])}")
                raise

    def size(self) -> int:
        return self.random.randrange(self.random.choice([300, 2 * LEAST, 8 * LEAST, 2 * MOST]))

    def some(self) -> int:
        return self.random.randrange(2)

    def commit(self, process: Process, bound: Lsn, *, taking: bool = False) -> bool:
        """What `SlotGuard._write` does to the row."""
        known = process.incarnation.identity
        assert known
        if known != self.identity:  # a zombie's connection leads nowhere else than to the server it streams from
            return False
        if self.note and self.note.holder != process.incarnation.holder and not taking:
            return False
        if self.table:
            self.wal += 200
            holder, acknowledged = process.incarnation.holder, process.bound.acknowledged
            self.note = Note(known.system_identifier, known.timeline, holder, acknowledged, bound)
            self.notes.append((self.wal, self.note))
        return True

    def judged(self, process: Process) -> None:
        process.incarnation.judge(
            self.identity,
            end=Lsn(self.wal),
            confirmed=Lsn(self.confirmed),
            note=self.note,
            start=process.read,
            acknowledged=process.bound.acknowledged,
        )

    def the_application_writes(self) -> None:
        self.wal += self.size()

    def time_passes(self) -> None:
        self.now += self.random.choice([0.1, 1, 60])

    def connect(self) -> None:
        number = self.some()
        process, other = self.processes[number], self.processes[1 - number]
        if self.holder not in (None, process):
            process.streams, process.incarnation.others = False, True
            return
        known = process.incarnation.identity
        reached = max(process.read, process.bound.acknowledged)
        if known and known.timeline != self.identity.timeline and reached > dict(self.identity.ended)[known.timeline]:
            with pytest.raises(SourceError, match="we have read up to"):
                self.judged(process)
            self.processes[number] = Process(self.table)  # its supervisor starts it again
            return
        self.judged(process)  # any alarm is a false one
        process.bound.freeze(Lsn(self.confirmed))
        process.incarnation.identity, process.incarnation.others = self.identity, False
        target = process.bound.target(self.now)
        assert self.commit(process, target, taking=True)
        process.bound.lift(target)
        process.streams, self.holder = True, process
        if not self.table:
            other.incarnation.others = True  # without a table the other one must have seen it

    def publish_and_acknowledge(self) -> None:
        process = self.processes[self.some()]
        if not process.streams:
            return
        holds = self.holder is process
        if holds:
            process.read = max(process.read, Lsn(self.random.randint(self.confirmed, self.wal)))
        permitted = process.bound.permit(process.read)
        if holds and permitted > self.confirmed:
            self.confirmed = int(permitted)
            self.places.append(self.confirmed)

    def raise_the_bound(self) -> None:
        number = self.some()
        process, killed = self.processes[number], self.random.random()
        if process.streams:
            target = process.bound.target(self.now)
            if killed < 0.05:
                self.end(number)
            elif self.commit(process, target):
                if killed < 0.1:
                    self.end(number)
                process.bound.lift(target)

    def kill(self) -> None:
        self.end(self.some())

    def end(self, number: int) -> None:
        if self.holder is self.processes[number]:
            self.holder = None
        self.processes[number] = Process(self.table)

    def stop_softly(self) -> None:
        number = self.some()
        if (process := self.processes[number]).streams:
            self.commit(process, process.bound.exact())
        self.end(number)

    def cut(self) -> None:
        process = self.processes[self.some()]
        if self.holder is process:
            self.holder = None
        if self.random.random() < 0.5:  # otherwise it does not know yet, and goes on talking to nobody
            process.streams = False

    def the_slot_is_saved(self) -> None:
        self.saved = self.confirmed

    def the_server_crashes(self) -> None:
        self.confirmed = self.saved
        self.holder = None

    def a_standby_is_promoted(self) -> None:
        end = max([1000, *(end for _, end in self.identity.ended), self.wal - self.random.choice([0, self.size()])])
        ended = (*self.identity.ended, (self.identity.timeline, Lsn(end)))
        self.identity = Identity("1", self.identity.timeline + 1, ended)
        self.wal = end
        self.notes = [(place, note) for place, note in self.notes if place <= end]
        self.note = self.notes[-1][1] if self.notes else None
        self.places = [place for place in self.places if place <= end]
        self.confirmed = self.saved = self.random.choice(self.places[-5:])
        self.holder = None

    def somebody_else_moves_it(self) -> None:
        """While nobody streams. A new process notices what lies beyond the bound, and takes the rest."""
        if self.note is None or self.holder:
            return
        before = self.confirmed, self.wal
        self.wal += self.size()
        self.confirmed = self.random.choice([self.wal, min(self.wal, self.confirmed + self.size())])
        allowed = self.note.bound
        if self.note.timeline != self.identity.timeline:
            allowed = self.identity.ended[-1][1]
        if self.confirmed > allowed:
            self.noticed += 1
            with pytest.raises(SlotLost, match="somebody else moved it"):
                self.judged(Process(self.table))
        else:
            self.judged(Process(self.table))
        self.confirmed, self.wal = before


@pytest.mark.parametrize("table", [True, False])
def test_whatever_happens_there_is_no_false_alarm(table: bool) -> None:
    noticed = 0
    with structlog.testing.capture_logs():
        for seed in range(1000):
            world = World(seed, table=table)
            try:
                world.walk(150)
            except BaseException as error:
                error.add_note(f"seed {seed}")
                raise
            noticed += world.noticed
    assert noticed > 100 or not table
