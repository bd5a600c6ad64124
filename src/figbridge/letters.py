"""`figbridge dead-letters`: the letters of both directions and of the relay, wherever the configuration keeps them.

The other composition root beside `figbridge.service`, for a command that a human starts beside the running bridge.
Nothing here keeps more than a batch of letters in memory, however many there are.
"""

import contextlib
import re
import threading
from collections.abc import Generator, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Final

import orjson

from figbridge.config import (
    Config,
    DeadLettersSection,
    Direction,
    ForwardSection,
    RelaySection,
    ReverseSection,
    TableDeadLetters,
)
from figbridge.deadletter import (
    DeadLetter,
    DeadLetterStore,
    Kept,
    Redriven,
    Wanted,
    dump,
    grouped,
)
from figbridge.errors import BridgeError, ConfigError, Problem
from figbridge.formats import KINDS
from figbridge.forward import redrive as forward
from figbridge.metrics import Metrics
from figbridge.relay import redrive as relay
from figbridge.reverse import redrive as reverse
from figbridge.reverse.guard import require_free
from figbridge.reverse.setup import open_consumer
from figbridge.transports import open_dead_letters, open_deposit, open_sink

__all__ = ["Wanted", "discard", "listed", "redrive", "shown", "since"]

_SHORT: Final = 12  # hexadecimal digits of an id that is shown
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def since(text: str) -> datetime:
    """A time, or so long ago: ``90m``, ``24h``, ``7d``. Raises ValueError."""
    try:
        if match := re.fullmatch(r"(\d{1,6})([smhd])", text):
            return datetime.now(UTC) - timedelta(**{_UNITS[match[2]]: int(match[1])})
        time = datetime.fromisoformat(text)
        return time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)
    except OverflowError:
        raise ValueError(f"{text!r} is outside of the years 1 to 9999; such as 24h, 7d or 2026-11-25") from None
    except ValueError:
        raise ValueError(f"{text!r} is no time; such as 24h, 7d or 2026-11-25T10:00:00Z") from None


def listed(config: Config, wanted: Wanted, limit: int, *, as_json: bool) -> Iterator[str]:
    """A line for each letter, without its content; for people with a heading, and a last line if there are more."""
    number = 0
    with contextlib.closing(_found(config, wanted)) as found:
        for letter in found:
            if number == limit:
                if not as_json:
                    yield f"there are more than {limit}: narrow it down, or raise --limit"
                return
            if not as_json and number == 0:
                yield _line("id", "since", "direction", "reason", "attempts", "table", "position", "event")
            number += 1
            yield _json(letter) if as_json else _told(letter)
    if not as_json and number == 0:
        yield "there are none"


def shown(config: Config, wanted: Wanted, *, as_json: bool) -> Iterator[str]:
    """Each letter, whole. Raises BridgeError when there is none."""
    number = 0
    with contextlib.closing(_found(config, wanted)) as found:
        for letter in found:
            number += 1
            yield dump(letter).decode() if as_json else _page(letter)
    if number == 0:
        raise _none()


def _none() -> BridgeError:
    return BridgeError("there is no such letter", hint="`figbridge dead-letters list` shows those that there are")


def discard(config: Config, wanted: Wanted, *, as_json: bool) -> Iterator[str]:
    """Remove letters; a line for each, and their number. Raises BridgeError when ids are given and none is there."""
    number = 0
    with contextlib.ExitStack() as stack:
        for store, directions in _stores(config, stack):
            for kept in grouped(_scanned(store, wanted, directions, stack)):
                store.remove(kept)
                number += len(kept)
                yield from (_json(it.letter) if as_json else _told(it.letter) for it in kept)
    if wanted.ids and number == 0:
        raise _none()
    if not as_json:
        yield f"{number} discarded"


class redrive:  # noqa: N801 (reads as the function that it is, and counts)
    """Try letters again; iterate over it to do so. A line for each, and their number; then `remaining`."""

    def __init__(self, config: Config, wanted: Wanted, *, as_json: bool) -> None:
        self._config, self._wanted, self._as_json = config, wanted, as_json
        self.done = self.remaining = 0

    def __iter__(self) -> Iterator[str]:
        """Raises BridgeError when the sink, the database or the store will take nothing, or there is no such letter."""
        with contextlib.ExitStack() as stack:
            for it in self._results(stack):
                if it.reason is None:
                    self.done += 1
                else:
                    self.remaining += 1
                yield _outcome(it, as_json=self._as_json)
        if self._wanted.ids and not self.done + self.remaining:
            raise _none()
        if not self._as_json:
            still = f", {self.remaining} are dead letters still" if self.remaining else ""
            yield f"{self.done} redriven{still}"

    def _results(self, stack: contextlib.ExitStack) -> Iterator[Redriven]:
        config, stop = self._config, threading.Event()
        for store, directions in _stores(config, stack):
            if config.forward and "forward" in directions:
                letters = _scanned(store, self._wanted, ("forward",), stack)
                yield from _publish(config.forward, letters, store, stop, stack)
            if config.reverse and "reverse" in directions:
                letters = _scanned(store, self._wanted, ("reverse",), stack)
                yield from _apply(config, config.reverse, letters, store)
            if config.relay and "relay" in directions:
                letters = _scanned(store, self._wanted, ("relay",), stack)
                yield from _relay(config.relay, letters, store, stop)


def _publish(
    section: ForwardSection,
    letters: Iterator[Kept],
    store: DeadLetterStore,
    stop: threading.Event,
    stack: contextlib.ExitStack,
) -> Iterator[Redriven]:
    first = next(letters, None)
    if first is None:  # then nobody needs the sink
        return
    sink = open_sink(section.sink)
    stack.callback(sink.close)
    deposit = open_deposit(section.claim_check) if section.claim_check else None
    if deposit:
        stack.callback(deposit.close)
    yield from forward.redrive(
        _with(first, letters), store, sink, deposit, stop, kind=KINDS[section.format], contracts=section.contracts
    )


def _apply(
    config: Config, section: ReverseSection, letters: Iterator[Kept], store: DeadLetterStore
) -> Iterator[Redriven]:
    if section.mode == "dry-run":
        problem = Problem(
            "reverse.mode", "is dry-run, which writes nothing", "redrive with the file of the live bridge"
        )
        raise ConfigError("the letters of the reverse path cannot be tried again", [problem])
    first = next(letters, None)
    if first is None:
        return
    require_free(config)
    kept = section.model_copy(update={"unmapped": "dead-letter"})  # "ignored" would remove the letter for good
    yield from reverse.redrive(
        _with(first, letters),
        store,
        lambda source: open_consumer(config, kept, source, source, Metrics()),
        threading.Event(),
    )


def _relay(
    section: RelaySection, letters: Iterator[Kept], store: DeadLetterStore, stop: threading.Event
) -> Iterator[Redriven]:
    first = next(letters, None)
    if first is None:
        return
    # closed by the relay's outlet
    yield from relay.redrive(_with(first, letters), store, section, open_sink(section.sink), stop)


def _with(first: Kept, rest: Iterator[Kept]) -> Iterator[Kept]:
    yield first
    yield from rest


def _stores(config: Config, stack: contextlib.ExitStack) -> list[tuple[DeadLetterStore, tuple[Direction, ...]]]:
    """Each store once, with the directions whose letters go there. Raises ConfigError when there is none."""
    sections: list[tuple[Direction, DeadLettersSection]] = []
    if config.forward and config.forward.dead_letters:
        sections.append(("forward", config.forward.dead_letters))
    if config.reverse:
        sections.append(("reverse", TableDeadLetters(type="table")))
    if config.relay and config.relay.dead_letters:
        sections.append(("relay", config.relay.dead_letters))
    if not sections:
        where = "forward.dead-letters" if config.forward else "relay.dead-letters"
        default = "by default the bridge stops at an event that nobody takes"
        if config.forward is None:
            default = "events that break their contract are in relay.quarantine"
        problem = Problem(where, "is not there", f"name a store in {where}; {default}")
        raise ConfigError("there are no dead letters", [problem])
    stores = []
    for section in dict.fromkeys(section for _, section in sections):  # sections are values
        store = open_dead_letters(section, config.dsn_for(section))
        stack.callback(store.close)
        stores.append((store, tuple(direction for direction, it in sections if it == section)))
    return stores


def _scanned(
    store: DeadLetterStore, wanted: Wanted, directions: tuple[Direction, ...], stack: contextlib.ExitStack
) -> Iterator[Kept]:
    """The wanted letters of `directions`; given back to the store at the end of `stack`."""
    if wanted.direction is not None:
        directions = (wanted.direction,) if wanted.direction in directions else ()
    if not directions:
        return iter(())
    narrowed = replace(wanted, direction=directions[0]) if len(directions) == 1 else wanted
    return stack.enter_context(contextlib.closing(store.scan(narrowed)))


def _found(config: Config, wanted: Wanted) -> Generator[DeadLetter, None, None]:
    with contextlib.ExitStack() as stack:
        for store, directions in _stores(config, stack):
            yield from (kept.letter for kept in _scanned(store, wanted, directions, stack))


def _json(letter: DeadLetter) -> str:
    """Without the content, and without what may quote it."""
    return orjson.dumps(
        {
            "id": letter.id,
            "event_id": letter.event_id,
            "direction": letter.direction,
            "reason": letter.reason,
            "attempts": letter.attempts,
            "table": letter.table,
            "position": letter.position,
            "created_at": letter.created_at,
        },
        option=orjson.OPT_UTC_Z,
    ).decode()


def _told(letter: DeadLetter) -> str:
    place = letter.position or {}
    position = f"{place.get('commit_lsn') or place.get('lsn')}:{place.get('ordinal', '')}" if place else "-"
    time = letter.created_at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    return _line(
        letter.id[:_SHORT],
        time,
        letter.direction,
        letter.reason,
        str(letter.attempts),
        letter.table or "-",
        position,
        letter.event_id or "-",
    )


def _line(*cells: str) -> str:
    widths = (_SHORT, 20, 9, 22, 8, 24, 18, 0)
    return "  ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()


def _page(letter: DeadLetter) -> str:
    fields = [
        ("id", letter.id),
        ("event", letter.event_id),
        ("direction", letter.direction),
        ("reason", letter.reason),
        ("message", letter.message),
        ("attempts", letter.attempts),
        ("table", letter.table),
        ("position", letter.position),
        ("key", letter.key),
        ("statement", letter.statement),
        ("since", letter.created_at.astimezone(UTC).isoformat()),
    ]
    head = [f"{name + ':':11}{value}" for name, value in fields if value is not None and value != ""]
    return "\n".join([*head, "", letter.body.decode(errors="backslashreplace"), ""])


def _outcome(it: Redriven, *, as_json: bool) -> str:
    if as_json:
        return orjson.dumps(
            {
                "id": it.letter.id,
                "event_id": it.letter.event_id,
                "direction": it.letter.direction,
                "redriven": it.reason is None,
                "reason": it.reason,
                "message": it.message or None,
            }
        ).decode()
    what = "redriven" if it.reason is None else f"still a dead letter: {it.reason}: {it.message}"
    return f"{it.letter.id[:_SHORT]}  {it.letter.event_id or '-'}  {what}"
