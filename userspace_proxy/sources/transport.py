"""Interface to the Kubernetes API, independent of the client: a GET request with a streamed answer."""

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Protocol


class Response(Protocol):
    """An HTTP answer with a streamed body."""

    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]: ...

    def chunks(self) -> AsyncIterator[bytes]:
        """Yield the non-empty chunks of the body as they arrive.

        Raises:
            OSError: the connection broke.
        """
        ...


class Transport(Protocol):
    """Sends authenticated requests to the API server."""

    def get(self, path: str, params: Mapping[str, str]) -> AbstractAsyncContextManager[Response]:
        """Send a GET request for *path*. After an answer 401, the next request reads the credentials again.

        Raises:
            OSError: no answer arrived, or there are no credentials.
        """
        ...
