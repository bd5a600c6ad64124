"""What every store of dead letters does, whatever is behind it: subclass `DeadLetterSuite` and give it a `place`.

What stores legitimately differ in is data (`StoreFeatures`), so that a test says what it expects of each.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Protocol

import pytest

from conformance.events import ODD_DETAILS, WHEN, event
from figbridge.deadletter import DeadLetter, DeadLetterStore, Wanted
from figbridge.errors import BridgeError, SinkRefused
from figbridge.event import Rejection


@dataclass(frozen=True, slots=True)
class StoreFeatures:
    """What stores differ in.

    ordered  letters are scanned in the order in which they came, or in which their events happened
    unique   a letter that is added twice is scanned once
    updated  a letter says how its last try ended; elsewhere how its first one did
    """

    ordered: bool
    unique: bool
    updated: bool


class StorePlace(Protocol):
    """A place to keep letters in."""

    @property
    def features(self) -> StoreFeatures:
        """What to expect."""

    def open(self) -> DeadLetterStore:
        """A store, on the same place each time."""

    def open_missing(self) -> DeadLetterStore:
        """A store whose place is not there."""


def letter(number: int, **changes: object) -> DeadLetter:
    """The `number`-th event's, a second later than the one before."""
    refused = event(number, time=WHEN + timedelta(seconds=number), old_key="shop.orders/0" if number % 2 else None)
    made = DeadLetter.of(Rejection(refused, "EntryTooLarge", f"number {number}", retryable=False), attempts=number)
    return replace(made, **changes)  # type: ignore[arg-type]  # names of its fields


def ids(store: DeadLetterStore, wanted: Wanted | None = None) -> list[str | None]:
    with contextlib.closing(store.scan(wanted or Wanted())) as found:
        return [it.letter.event_id for it in found]


class DeadLetterSuite:
    """The tests."""

    @pytest.fixture
    def place(self) -> StorePlace:
        raise NotImplementedError

    @pytest.fixture
    def store(self, place: StorePlace) -> Iterator[DeadLetterStore]:
        store = place.open()
        store.check()
        yield store
        store.close()

    def test_an_empty_store_has_no_letters(self, store: DeadLetterStore) -> None:
        assert ids(store) == []

    def test_a_letter_is_kept_whole(self, store: DeadLetterStore) -> None:
        sent = letter(3, statement="UPDATE t", table="shop.orders", whole_table=True, message='NUL \0, "żółw" \ud800')
        store.add([sent])

        ((got, _),) = store.scan(Wanted())

        assert got.message.startswith("NUL")
        assert replace(got, message="") == replace(sent, message="")
        assert got.id == sent.id
        assert got.position == {"commit_lsn": "0/3", "ordinal": 0}
        assert (got.key, got.old_key) == ("shop.orders/1", "shop.orders/0")
        assert got.event() == sent.event() == event(3, time=got.event().time, old_key="shop.orders/0", whole_table=True)

    @pytest.mark.parametrize("detail", ODD_DETAILS.values(), ids=ODD_DETAILS)
    def test_an_event_comes_back_to_the_byte(self, store: DeadLetterStore, detail: bytes) -> None:
        refused = event(
            7, detail=detail, source='legacy.żółw"\\\n,"detail":', detail_type="orders.🌳", resources=("arn:a",)
        )
        store.add([DeadLetter.of(Rejection(refused, "c", "m", retryable=False), 1)])

        ((got, _),) = store.scan(Wanted())

        assert got.body == refused.envelope()
        assert got.event() == refused

    @pytest.mark.parametrize("body", [b"", b"\0\xff\xfe", b"{", "\ufffe\uffff".encode(), b'{"detail":1}'])
    def test_what_is_no_event_is_kept_as_it_came(self, store: DeadLetterStore, body: bytes) -> None:
        store.add([DeadLetter("reverse", None, "malformed", "m", 2, body)])

        ((got, _),) = store.scan(Wanted())

        assert (got.body, got.event_id, got.direction, got.attempts) == (body, None, "reverse", 2)

    def test_a_repeated_letter_is_the_same_letter(self, place: StorePlace, store: DeadLetterStore) -> None:
        store.add([letter(1), letter(2)])
        again = place.open()  # after a crash
        again.add([letter(1, created_at=datetime.now(UTC), attempts=9)])
        again.close()

        kept = list(store.scan(Wanted()))

        assert {it.letter.id for it in kept} == {letter(1).id, letter(2).id}
        if place.features.unique:
            assert len(kept) == 2

    def test_letters_come_in_order(self, place: StorePlace, store: DeadLetterStore) -> None:
        store.add([letter(n) for n in range(5)])
        store.add([letter(n) for n in range(5, 23)])

        found = ids(store)

        expected = [event(n).id for n in range(23)]
        assert found == expected if place.features.ordered else sorted(map(str, found)) == expected

    def test_what_is_removed_is_gone_and_the_rest_is_there(self, place: StorePlace, store: DeadLetterStore) -> None:
        store.add([letter(n) for n in range(25)])
        kept = list(store.scan(Wanted()))
        gone = [it for it in kept if int(it.letter.message.split()[1]) % 3 == 0]

        store.remove(gone)
        with contextlib.suppress(BridgeError):  # a receipt of yesterday
            store.remove(gone)

        other = place.open()
        assert sorted(map(str, ids(other))) == [event(n).id for n in range(25) if n % 3]
        other.close()

    def test_a_letter_says_at_its_place_how_another_try_ended(self, place: StorePlace, store: DeadLetterStore) -> None:
        store.add([letter(n, created_at=WHEN) for n in range(3)])
        with contextlib.closing(store.scan(Wanted(ids=(event(1).id,)))) as found:
            (kept,) = found
            again = kept.letter.again("23514", "NUL \0", "UPDATE t")
            store.update([kept._replace(letter=again)])
            store.update([kept._replace(letter=again)])  # after a crash

        assert sorted(map(str, ids(store))) == [event(n).id for n in range(3)]
        if place.features.ordered:
            assert ids(store) == [event(n).id for n in range(3)]
        ((got, _),) = store.scan(Wanted(ids=(event(1).id,)))
        assert replace(got, message="") == replace(again if place.features.updated else kept.letter, message="")
        assert (got.attempts, got.created_at) == (2 if place.features.updated else 1, WHEN)

    def test_letters_are_removed_while_they_are_scanned(self, store: DeadLetterStore) -> None:
        store.add([letter(n) for n in range(25)])
        seen = []
        with contextlib.closing(store.scan(Wanted())) as found:
            for it in found:
                seen.append(it.letter.event_id)
                store.remove([it])

        assert sorted(map(str, seen)) == [event(n).id for n in range(25)]
        assert ids(store) == []

    def test_looking_leaves_everything_as_it_is(self, store: DeadLetterStore) -> None:
        store.add([letter(n) for n in range(25)])
        with contextlib.closing(store.scan(Wanted())) as found:
            next(found)

        assert len(ids(store)) == 25
        assert len(ids(store)) == 25

    def test_filters_hold_together(self, store: DeadLetterStore) -> None:
        old = datetime(2020, 1, 1, tzinfo=UTC)
        store.add(
            [
                letter(1, reason="A", table="shop.orders"),
                letter(2, reason="A", table="shop.widgets"),
                letter(3, reason="B", table="shop.orders"),
                DeadLetter("reverse", "r", "A", "m", 1, b"{}", table="shop.orders", created_at=old),
            ]
        )
        one, two, three = (event(n).id for n in (1, 2, 3))

        def found(wanted: Wanted) -> set[str | None]:
            return set(ids(store, wanted))

        assert found(Wanted()) == {one, two, three, "r"}
        assert found(Wanted(direction="reverse")) == {"r"}
        assert found(Wanted(reason="A")) == {one, two, "r"}
        assert found(Wanted(table="shop.orders")) == {one, three, "r"}
        assert found(Wanted(reason="A", table="shop.orders", direction="forward")) == {one}
        assert found(Wanted(ids=(letter(3).id,))) == {three}
        assert found(Wanted(ids=(letter(3).id[:10], one))) >= {three}
        assert found(Wanted(ids=(one,))) == {one}
        assert found(Wanted(ids=("nobody",))) == set()

    def test_since_is_when_it_became_a_letter(self, store: DeadLetterStore) -> None:
        now = datetime.now(UTC)
        store.add([letter(1, created_at=now)])

        assert ids(store, Wanted(since=now - timedelta(hours=1))) == [event(1).id]
        assert ids(store, Wanted(since=now + timedelta(hours=1))) == []

    def test_a_place_that_is_not_there_is_refused_with_a_remedy(self, place: StorePlace) -> None:
        store = place.open_missing()
        for call in (store.check, lambda: store.add([letter(1)])):
            with pytest.raises(BridgeError) as caught:
                call()
            assert caught.value.hint
            assert not caught.value.retryable or not isinstance(caught.value, SinkRefused)
        store.close()
