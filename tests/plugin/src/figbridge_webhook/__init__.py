"""An example of a sink: events as JSON lines, by HTTP POST to one URL. See docs/plugins.md."""

import http.client
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from figbridge.config import Section
from figbridge.errors import SinkRefused, SinkUnavailable
from figbridge.event import Event, Rejection
from figbridge.transports import Limits, Sink


def _http(url: str) -> str:
    if not url.startswith(("https://", "http://")):
        raise ValueError("is not a URL; such as https://example.org/events")
    return url


class WebhookSection(Section):
    """The section ``sink`` of the file, where its type is webhook."""

    type: Literal["webhook"]
    url: Annotated[str, AfterValidator(_http)] = Field(description="Where events are posted to.")
    timeout: float = Field(10.0, gt=0, description="Seconds to wait for an answer.")
    lines: int = Field(500, ge=1, description="Most events of a request.")

    def open(self) -> Sink:
        """The sink."""
        return WebhookSink(self)


class WebhookSink:
    """Takes a request as a whole: any answer of 2xx says that all of it is durable."""

    name = "webhook"

    def __init__(self, section: WebhookSection) -> None:
        self._section = section
        self.limits = Limits(entries=section.lines, entry_bytes=1 << 20, batch_bytes=8 << 20, partial=False)

    def size(self, event: Event) -> int:
        """Bytes of its line."""
        return event.body_size() + 1

    def check(self) -> None:
        """A request without events."""
        self._post(b"")

    def publish(self, events: Sequence[Event]) -> Sequence[Rejection]:
        """One request."""
        if events:
            self._post(b"\n".join([*events[0].bodies(events), b""]))
        return ()

    def close(self) -> None:
        """Nothing is held."""

    def _post(self, body: bytes) -> None:
        url = self._section.url
        headers = {"Content-Type": "application/x-ndjson"}
        request = urllib.request.Request(url, body, headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=self._section.timeout) as answer:
                answer.read()
        except urllib.error.HTTPError as error:
            with error:
                what = f"{url} answered {error.code}"
                if error.code in {408, 429} or error.code >= 500:
                    raise SinkUnavailable(what, hint="nothing is lost; the bridge tries again") from error
                raise SinkRefused(what, hint="look into the log of what listens there") from error
        except (OSError, http.client.HTTPException) as error:
            raise SinkUnavailable(f"{url}: {error}", hint="nothing is lost; the bridge tries again") from error
