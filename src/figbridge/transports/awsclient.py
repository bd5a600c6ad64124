"""The client of a transport for as long as that lives: where credentials expire, it is made anew from renewed ones.

A boto3 client keeps the credentials that it was made with if they came from the environment or a file; a role's renew
themselves. So at each try with expired ones they are read again, and a client is made only if there are others: it
takes megabytes, and nobody may renew them for hours.
"""

import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import boto3

from figbridge.config import AwsSection
from figbridge.errors import BridgeError
from figbridge.transports import aws

E = TypeVar("E", bound=BridgeError)


class Client:
    """For any number of threads. `boto` is boto3's client, which may be another one at each look.

    `service`, `validate` and `connections` are those of `aws.client`, as is what is raised. `made` is called with each
    new client and its credentials before anybody uses it.
    """

    def __init__(
        self,
        service: str,
        section: AwsSection,
        *,
        validate: bool = True,
        connections: int = 10,
        made: Callable[[Any, Any], None] | None = None,
    ) -> None:
        self._service, self._section = service, section
        self._validate, self._connections, self._made = validate, connections, made
        self._lock = threading.Lock()
        self.boto: Any = None
        self._credentials: Any = None
        self._make(aws.session(section))

    def expired(self, error: E) -> E:
        """`error`, which is because credentials have expired, with the remedy; they are read again."""
        # somebody may be writing them at this moment. The old client is not closed: other threads may be waiting for
        # its answers
        with self._lock, contextlib.suppress(BridgeError, *aws.ERRORS):
            session = aws.session(self._section)
            if (found := session.get_credentials()) and self._are_others(found):
                self._make(session)
        error.hint = "renew the credentials: the file they are in is read again at each try; a role renews itself"
        error.urgent = True
        return error

    def close(self) -> None:
        """Close the connections."""
        self.boto.close()

    def _make(self, session: boto3.Session) -> None:
        boto = aws.client(self._service, self._section, session, validate=self._validate, connections=self._connections)
        credentials = session.get_credentials()
        if self._made:
            self._made(boto, credentials)
        self.boto, self._credentials = boto, credentials

    def _are_others(self, found: Any) -> bool:
        others = found.get_frozen_credentials()
        try:
            return bool(others != self._credentials.get_frozen_credentials())
        except aws.ERRORS:  # of a role whose own way to renew them is expired
            return True
