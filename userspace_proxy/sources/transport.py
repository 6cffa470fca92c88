"""How the Kubernetes API is asked, whatever client does it: one GET, whose answer comes bit by bit."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Protocol


class Response(Protocol):
    """An answer whose body comes bit by bit."""

    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]: ...

    def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes, in pieces that are not empty.

        Raises:
            OSError: it was cut off.
        """
        ...


class Transport(Protocol):
    """Asks the API server, logged in."""

    def get(self, path: str, params: Mapping[str, str]) -> AbstractAsyncContextManager[Response]:
        """Ask for *path*; after an answer 401, with credentials that were read again.

        Raises:
            OSError: nobody answers, or there are no credentials.
        """
        ...
