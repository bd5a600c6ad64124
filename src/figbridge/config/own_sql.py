"""What the user's own SQL may not be: it runs within a transaction of the bridge, beside other events.

Such a statement would be done without an error, and events would be acknowledged that nobody kept; or it would set the
session of the bridge, perhaps as another role, for all events to come. So it is refused before it is sent. Words in
strings, quoted names, dollar quotes and comments are none of its words.
https://www.postgresql.org/docs/current/sql-syntax-lexical.html
"""

import functools
import itertools
import re
from collections.abc import Iterator
from typing import Final

# Whatever is not closed goes on to the end: the server will say so.
_TOKEN: Final = re.compile(
    r"""
      --[^\r\n]*
    | (?P<comment> /\*)
    | [eE]' (?: [^'\\] | '' | \\. )* (?: '|\Z)
    | ' (?: [^'] | '' )* (?: '|\Z)
    | " (?: [^"] | "" )* (?: "|\Z)
    | (?P<dollars> \$ (?: [^\W\d]\w* )? \$ ) .*? (?: (?P=dollars) | \Z )
    | %\( [^)]* \)s
    | (?P<word> [^\W\d][\w$]* )
    | (?P<end> ; )
    """,
    re.VERBOSE | re.DOTALL,
)
_NESTED: Final = re.compile(r"/\*|\*/")
_TRANSACTION: Final = frozenset({"ABORT", "BEGIN", "COMMIT", "END", "RELEASE", "ROLLBACK", "SAVEPOINT", "START"})
# of one transaction: SET LOCAL …, SET CONSTRAINTS …
_PASSING: Final = frozenset({"LOCAL", "CONSTRAINTS"})
_SETTING: Final = frozenset({"SET", "RESET", "DO"})
_CLIENT: Final = frozenset({(way, end) for way in ("FROM", "TO") for end in ("STDIN", "STDOUT")})


@functools.lru_cache(maxsize=1024)
def refused(query: str) -> tuple[str, str] | None:
    """What is wrong with SQL of a mapping, and what may stand there instead; None when nothing is."""
    for words in _statements(query):
        first = words[0]
        if first in _TRANSACTION or words[:2] == ["PREPARE", "TRANSACTION"]:
            what = f"contains {first}, but the transaction is the bridge's and may hold other events"
            return what, "statements without it"
        if first == "SET" and words[1:2] == ["TRANSACTION"]:  # READ ONLY: no claim of an event could be kept
            return "contains SET TRANSACTION, but the transaction is the bridge's", "statements without it"
        if (first == "SET" and _PASSING.isdisjoint(words[1:2])) or ("SET_CONFIG", "FALSE") in itertools.pairwise(words):
            return "sets the session, which goes on with other events", "SET LOCAL, or set_config(…, true)"
        if first == "COPY" and not _CLIENT.isdisjoint(itertools.pairwise(words)):
            return "contains a COPY from or to the client, but the bridge has no data for it and wants none", "INSERT"
    return None


@functools.lru_cache(maxsize=1024)
def sets(query: str) -> bool:
    """Whether SQL of a mapping may set what lasts until the transaction ends, and so is to have one of its own.

    It is not told by what a function does, and of a DO block nothing is known.
    """
    return any(words[0] in _SETTING or "SET_CONFIG" in words for words in _statements(query))


def _statements(query: str) -> Iterator[list[str]]:
    """The words of each statement, in capitals, where it has any."""
    words: list[str] = []
    place = 0
    while found := _TOKEN.search(query, place):
        place = found.end()
        if found["comment"]:
            place = _behind_comment(query, place)
        elif word := found["word"]:
            words.append(word.upper())
        elif found["end"] and words:
            yield words
            words = []
    if words:
        yield words


def _behind_comment(query: str, place: int) -> int:
    """Where a comment ends that has begun before `place`; comments nest."""
    depth = 1
    while depth:
        found = _NESTED.search(query, place)
        if found is None:
            return len(query)
        depth += 1 if found[0] == "/*" else -1
        place = found.end()
    return place
