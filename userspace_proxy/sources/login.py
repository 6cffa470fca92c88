"""Sends requests to an API server, with the login of a kubeconfig or of the pod's service account.

kubernetes_asyncio provides login and HTTP client; answers are passed on as bytes. Only functions that need a cluster
import it.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import yaml
import yarl

from userspace_proxy.errors import StartError
from userspace_proxy.printable import printable
from userspace_proxy.sources.paths import UNREADABLE, read, run_in_thread
from userspace_proxy.sources.slim_import import without_models
from userspace_proxy.sources.transport import Response
from userspace_proxy.sources.yaml_faults import describe
from userspace_proxy.sources.yaml_values import plain_value

# Keepalive detects a vanished peer after half a minute. The reflector detects a peer that stays silent.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))
_USER_TIMEOUT_MS = 30_000
# No total time-out: the reflector has its own time-outs, and a watch has no end.
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10.0)
_LOGIN_S = 20.0  # to read the kubeconfig and to wait for a credential plugin
_PLUGIN_END_S = 1.0  # from the kill of a plugin to the end of its output
_WRITE_TIMEOUT = aiohttp.ClientTimeout(total=10.0)

# Fields of a kubeconfig that name files.
_FILES = ("certificate-authority", "client-certificate", "client-key", "tokenFile")

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Session:
    """One login: the server's address, an HTTP client with its certificates, and the number of current users."""

    configuration: Any  # a kubernetes_asyncio.client.Configuration
    client: Any  # its RESTClientObject
    users: int = 0
    is_refused: bool = False

    async def authorization(self) -> dict[str, str]:
        """Return the authorization header; a service account's token is read again every minute.

        A user in the server's URL comes before the token, as in client-go; aiohttp refuses to send both.
        """
        if yarl.URL(self.configuration.host).raw_user is not None:
            return {}
        token = await self.configuration.get_api_key_with_prefix("BearerToken")
        return {"Authorization": token.strip()} if token else {}


class StreamedResponse:
    """Adapts an aiohttp response to `Response`."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self._answer = answer
        self.status = answer.status
        self.headers: Mapping[str, str] = answer.headers

    async def chunks(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._answer.content.iter_any():
                yield chunk
        except aiohttp.ClientError as error:
            raise ConnectionError(_reason(error)) from error


class ApiTransport:
    """A `Transport` to the API server of *kubeconfigs*, or without one, of the cluster that runs this pod.

    Several are merged as kubectl does it: the first one that has a current context, or a certain name, counts.
    """

    def __init__(self, *kubeconfigs: Path) -> None:
        self._kubeconfigs = kubeconfigs
        self._session: _Session | None = None
        self._logging_in = asyncio.Lock()

    async def open(self) -> str:
        """Log in; return the server's URL.

        Raises:
            StartError: the kubeconfig is missing or invalid, or this process does not run in a pod.
        """
        where = f"--kubeconfig {_joined(self._kubeconfigs)}" if self._kubeconfigs else "--in-cluster"
        if not all(file.is_file() for file in self._kubeconfigs):
            raise StartError(f"{where}: no such file")
        try:
            session = await self._current_session()
        except OSError as error:
            raise StartError(f"{where}: {error}") from None
        return printable(str(session.configuration.host))

    async def close(self) -> None:
        if self._session is not None:
            await self._session.client.close()
            self._session = None

    @contextlib.asynccontextmanager
    async def get(self, path: str, params: Mapping[str, str]) -> AsyncGenerator[Response]:
        async with self._request("GET", path, _TIMEOUT, query_params=dict(params)) as answer:
            _set_keepalive(answer)
            yield StreamedResponse(answer)

    async def write(self, method: str, path: str, body: Mapping[str, object]) -> int:
        """Send *body*; return the status of the answer.

        Raises:
            OSError: no answer arrived in time.
        """
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        async with self._request(method, path, _WRITE_TIMEOUT, body=dict(body), content_type=kind) as answer:
            return answer.status

    @contextlib.asynccontextmanager
    async def _request(
        self, method: str, path: str, within: aiohttp.ClientTimeout, *, content_type: str = "", **details: object
    ) -> AsyncGenerator[aiohttp.ClientResponse]:
        session = await self._current_session()
        session.users += 1
        try:
            try:
                headers = {"Accept": "application/json", **await session.authorization()}
                if content_type:
                    headers["Content-Type"] = content_type
                answer: aiohttp.ClientResponse = await session.client.request(
                    method,
                    session.configuration.host + path,
                    headers=headers,
                    _preload_content=False,
                    _request_timeout=within,
                    **details,
                )
            except aiohttp.ClientError as error:
                # The certificate authority of the server may have changed.
                session.is_refused = session.is_refused or isinstance(error, aiohttp.ClientSSLError)
                raise ConnectionError(_reason(error)) from error
            session.is_refused = session.is_refused or answer.status == 401
            async with answer:
                yield answer
        finally:
            session.users -= 1
            await self._close_if_unused(session)

    async def _current_session(self) -> _Session:
        """Return the current session, or log in again if the server refused it.

        Raises:
            OSError: the login failed.
        """
        async with self._logging_in:
            before = self._session
            if before is None or before.is_refused:
                try:
                    async with asyncio.timeout(_LOGIN_S):
                        self._session = await self._log_in()
                except TimeoutError:
                    raise ConnectionError(f"no login within {_LOGIN_S:g} s: does a credential plugin hang?") from None
                if before is not None:
                    log.info("credentials were read again")
                    await self._close_if_unused(before)
            assert self._session is not None
            return self._session

    async def _close_if_unused(self, session: _Session) -> None:
        if session is not self._session and not session.users:
            await session.client.close()

    async def _log_in(self) -> _Session:
        with without_models():
            from kubernetes_asyncio.client import Configuration
            from kubernetes_asyncio.client.rest import RESTClientObject
            from kubernetes_asyncio.config import exec_provider, load_incluster_config, load_kube_config
            from kubernetes_asyncio.config.kube_config import _cleanup_temp_files

        configuration = Configuration()
        # Python 3.13 refuses authorities without a key usage or key identifier, which kubectl accepts.
        configuration.disable_strict_ssl_verification = True
        checks = (partial(_check_kubeconfig, file) for file in self._kubeconfigs)
        contexts = [await run_in_thread("read kubeconfig", check) for check in checks]
        context = next(filter(None, contexts), None)  # the library's default is that of the last file
        exec_provider.asyncio = _ASYNCIO_OF_PLUGINS  # type: ignore[assignment,attr-defined]
        plugins: list[_Plugin] = []
        _plugins.set(plugins)
        try:
            if not self._kubeconfigs:
                load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
            else:
                await load_kube_config(
                    _joined(self._kubeconfigs),
                    context=context,
                    client_configuration=configuration,
                    persist_config=False,
                )
            for url in (configuration.host, configuration.proxy):
                _check_url(url)
            return _Session(configuration, RESTClientObject(configuration))
        except Exception as error:
            # Foreign files and plugins raise anything, AssertionError and TypeError among them.
            raise ConnectionError(f"no login: {error or type(error).__name__}") from error
        finally:
            # Files with keys and certificates of the kubeconfig. The HTTP client has read them, and the library would
            # only remove them at a regular exit.
            _cleanup_temp_files()
            for plugin, leads_a_group in plugins:
                await _end(plugin, with_children=leads_a_group)


async def _start_plugin(*command: str, **details: Any) -> asyncio.subprocess.Process:
    apart = not _has_terminal()
    starting = asyncio.create_task(asyncio.create_subprocess_exec(*command, start_new_session=apart, **details))
    try:
        return await asyncio.shield(starting)
    finally:  # also if the login is given up just now
        with contextlib.suppress(Exception):
            _plugins.get().append((await starting, apart))


def _has_terminal() -> bool:
    """Return whether this process has a terminal. A plugin then shares it: it may ask there, and Ctrl-C ends it."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


async def _end(plugin: asyncio.subprocess.Process, *, with_children: bool) -> None:
    """End *plugin*, unless it has exited and its output was read to the end.

    *with_children*: it leads a process group of its own. It may have exited while a child holds its output.
    """
    pipes = (plugin.stdout, plugin.stderr)
    if plugin.returncode is not None and all(pipe is None or pipe.at_eof() for pipe in pipes):
        return
    with contextlib.suppress(OSError):  # it is gone, or another user's (sudo)
        if with_children:
            os.killpg(plugin.pid, signal.SIGKILL)
        else:
            plugin.kill()
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PLUGIN_END_S):
                await plugin.communicate()
    finally:  # Python 3.11 raises CancelledError at the time-out, if this task is cancelled
        # A process that cannot be ended has the pipes. There is no public way to close them.
        with contextlib.suppress(OSError):
            plugin._transport.close()  # type: ignore[attr-defined]  # noqa: SLF001


# The credential plugins of the login under way, and whether each leads a process group. The library leaves one that
# hangs running.
_Plugin = tuple[asyncio.subprocess.Process, bool]
_plugins: ContextVar[list[_Plugin]] = ContextVar("plugins")
_ASYNCIO_OF_PLUGINS = SimpleNamespace(
    create_subprocess_exec=_start_plugin, subprocess=asyncio.subprocess, get_event_loop=asyncio.get_event_loop
)


def _joined(kubeconfigs: Sequence[Path]) -> str:
    return os.pathsep.join(map(str, kubeconfigs))


def _check_kubeconfig(kubeconfig: Path) -> str | None:
    """Return the current context of *kubeconfig*, if it has one.

    Raise ConnectionError if reading it, or a file it names, might not end.
    The login library reads them without a size limit and with a recursive parser.
    """
    try:
        text = read(str(kubeconfig))
        plain, _ = plain_value(text)
    except yaml.YAMLError as error:
        line, readable = describe(text, error)
        raise ConnectionError(f"no login: line {line + 1}: {readable}") from None
    except UNREADABLE as error:
        raise ConnectionError(f"no login: {getattr(error, 'strerror', None) or error}") from None
    for field, path in _named_files(plain):
        if (file := kubeconfig.parent / path).exists() and not file.is_file():
            raise ConnectionError(f"no login: {field} {path!r} is not a regular file")
    context = _get(plain, "current-context")
    return context if isinstance(context, str) else None


def _named_files(kubeconfig: object) -> Iterator[tuple[str, str]]:
    """Yield (field, path) for each file that *kubeconfig* names."""
    for section, entry in (("clusters", "cluster"), ("users", "user")):
        listed = _get(kubeconfig, section)
        for item, field in product(listed if isinstance(listed, list) else (), _FILES):
            if isinstance(path := _get(_get(item, entry), field), str):
                yield field, path


def _get(mapping: object, key: str) -> object:
    return mapping.get(key) if isinstance(mapping, dict) else None


def _check_url(url: str | None) -> None:
    """Raise ConnectionError for an invalid URL; the library's own error would contain its password."""
    try:
        yarl.URL(url or "").port  # noqa: B018 - read only on request
    except ValueError:
        raise ConnectionError("the URL of the server or its proxy cannot be read") from None


def _set_keepalive(answer: aiohttp.ClientResponse) -> None:
    transport = answer.connection.transport if answer.connection is not None else None
    sock = transport.get_extra_info("socket") if transport is not None else None
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)


def _reason(error: aiohttp.ClientError) -> str:
    if isinstance(error, aiohttp.ClientPayloadError):
        return "in the middle of an answer"
    return str(error) or type(error).__name__
