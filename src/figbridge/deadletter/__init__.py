"""Where an event goes that cannot be delivered or applied: kept whole, with the reason, never skipped.

    forward  what the sink never takes           ──▶ table · file · S3 · SQS, by choice
    reverse  what can never be applied           ──▶ table, in the database that it was for
    relay    what breaks its contract            ──▶ as forward, where it has no quarantine

Adding a letter twice leaves one letter, because a crash between the letter and the acknowledgement repeats both: a
letter's id is made from its direction and body, and whoever removes or tries a letter twice does no harm.

INVARIANT. A letter is removed by a human's `discard`, or when its event is durable elsewhere. Reading never removes.

`letter.py` has the values, the protocols and the form on the wire; `table.py` and `file.py` are stores without AWS; the
others are `figbridge.transports.s3_letters` and `sqs_letters`, since only transports know boto3. `figbridge.letters` is
the command.
"""

from figbridge.deadletter.file import FileDeadLetterStore
from figbridge.deadletter.letter import (
    DeadLetter,
    DeadLetters,
    DeadLetterStore,
    Kept,
    Redriven,
    Unreadable,
    Wanted,
    dump,
    grouped,
    parse,
    position_of,
    writable,
)
from figbridge.deadletter.table import TableDeadLetterStore, insert_letters

__all__ = [
    "DeadLetter",
    "DeadLetterStore",
    "DeadLetters",
    "FileDeadLetterStore",
    "Kept",
    "Redriven",
    "TableDeadLetterStore",
    "Unreadable",
    "Wanted",
    "dump",
    "grouped",
    "insert_letters",
    "parse",
    "position_of",
    "writable",
]
