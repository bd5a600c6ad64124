"""Messages that are no envelope, such as what a rule's input transformer made, or a raw record: which event they are.

``reverse.bare`` says by paths over the message what the envelope would have said. The message itself becomes the
``detail``, so a mapping is written as for any other event; of a message of a Custom Event Bus with its metadata, it is
``Data``. https://docs.aws.amazon.com/eventbridge/latest/userguide/eb-transform-target-input.html
"""

from typing import Any

from figbridge.config import BareSection
from figbridge.reverse.message import Malformed
from figbridge.reverse.values import Path


class Bare:
    """See the module; called with the message and its payload."""

    def __init__(self, section: BareSection) -> None:
        self._paths = {
            "id": Path(section.id, "reverse.bare.id"),
            "source": Path(section.source, "reverse.bare.source"),
            "detail-type": Path(section.detail_type, "reverse.bare.detail-type"),
        }

    def __call__(self, message: dict[str, Any], payload: dict[str, Any]) -> dict[str, Any]:
        """The envelope. Raises Malformed."""
        envelope: dict[str, Any] = {}
        for name, path in self._paths.items():
            found = path.get(message)
            if isinstance(found, bool) or not isinstance(found, str | int):
                raise Malformed(path.name, f"yields no {name}", expected="a string or an integer")
            envelope[name] = str(found)
        return {**envelope, "detail": payload}
