"""A transport for httpx2 on asyncio's own streams. Touches the network.

httpx2's default uses anyio and sends a request's head and body separately, which is a third of the processor time of a small
POST. This transport also lets a subclass decide where a connection goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from typing import TYPE_CHECKING, Any

import httpcore2
import httpx2

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_LITTLE_BYTES = 1 << 16


class AsyncioBackend(httpcore2.AsyncNetworkBackend):
    """Opens connections of asyncio's streams for the transport's connection pool (httpcore2)."""

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore2's interface
        local_address: str | None = None,  # noqa: ARG002 - as above
        socket_options: Iterable[Any] | None = None,  # noqa: ARG002 - as above
    ) -> httpcore2.AsyncNetworkStream:
        """Connect to a host. Raises `ConnectTimeout` and `ConnectError` of httpcore2."""
        with _as_httpcore_errors(httpcore2.ConnectTimeout, httpcore2.ConnectError):
            async with asyncio.timeout(timeout):
                return AsyncioStream(*await asyncio.open_connection(host, port))


class AsyncioStream(httpcore2.AsyncNetworkStream):
    """One connection of the transport on asyncio's streams."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._unsent = bytearray()

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 - httpcore2's interface
        """Send the buffered bytes, and return received ones. b"" at the end."""
        with _as_httpcore_errors(httpcore2.ReadTimeout, httpcore2.ReadError):
            if self._unsent:
                self._writer.write(self._unsent)
                self._unsent = bytearray()
            if timeout is None:
                return await self._reader.read(max_bytes)
            async with asyncio.timeout(timeout):
                return await self._reader.read(max_bytes)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109 - httpcore2's interface
        """Buffer a little and send it with the next read; send more at once."""
        self._unsent += buffer
        if len(self._unsent) < _LITTLE_BYTES:
            return
        with _as_httpcore_errors(httpcore2.WriteTimeout, httpcore2.WriteError):
            self._writer.write(self._unsent)
            self._unsent = bytearray()
            async with asyncio.timeout(timeout):
                await self._writer.drain()

    async def aclose(self) -> None:
        """Close the connection. What was written is still sent."""
        self._writer.close()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore2's interface
    ) -> httpcore2.AsyncNetworkStream:
        """Continue under TLS. Raises `ssl.SSLError` unchanged: an invalid certificate is no broken connection."""
        with _as_httpcore_errors(httpcore2.ConnectTimeout, httpcore2.ConnectError):
            async with asyncio.timeout(timeout):
                await self._writer.start_tls(ssl_context, server_hostname=server_hostname)
        return self

    def get_extra_info(self, info: str) -> Any:  # noqa: ANN401 - httpcore2's interface
        """Return what the pool asks: whether the other end has closed (`is_readable`), the TLS object, the socket."""
        if info == "is_readable":
            return self._reader.at_eof() or self._reader.exception() is not None
        return self._writer.get_extra_info(info)


class AsyncioTransport(httpx2.AsyncHTTPTransport):
    """A connection pool for httpx2 with a network backend of ours, for which httpx2 has no parameter."""

    def __init__(
        self, backend: httpcore2.AsyncNetworkBackend, *, tls: ssl.SSLContext | None = None, keepalive_s: float | None = None
    ) -> None:
        # At DEBUG they print headers, including whole addresses with their signatures.
        logging.getLogger("httpcore2").setLevel(logging.INFO)
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=tls,
            max_connections=None,
            keepalive_expiry=keepalive_s,
            network_backend=backend,
        )


@contextlib.contextmanager
def _as_httpcore_errors(late: type[Exception], broken: type[Exception]) -> Iterator[None]:
    """Raise errors of the transport's streams as those of httpcore2, and TLS errors unchanged."""
    try:
        yield
    except TimeoutError as exc:
        raise late(str(exc)) from exc
    except OSError as exc:
        if isinstance(exc, ssl.SSLError):
            raise
        raise broken(str(exc)) from exc
