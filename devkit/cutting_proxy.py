"""A TCP proxy whose connections can be cut, paused and refused on demand: the faults a living engine never shows by itself.

Touches the loopback network. Everything goes through unchanged until a test says otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Self

_CHUNK_BYTES = 1 << 16


class CuttingProxy:
    """Forwards connections to `target` ("host:port"). An async context manager; `address` is where to connect."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.partition(":")
        self._port = int(port)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self.refusing = False
        self.address = ""
        self.connections = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None  # noqa: S101 - set on entry
        self._server.close()
        self.release()
        self.cut()

    def cut(self) -> None:
        """Drop every open connection at once, without goodbye."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    def hold_websockets(self) -> None:
        """Let nothing through websockets until `release`; they stay open, and other connections go on."""
        self._flowing.clear()

    def release(self) -> None:
        """End `hold_websockets`; what was held back goes on."""
        self._flowing.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refusing:
            writer.transport.abort()
            return
        self.connections += 1
        try:
            there_reader, there_writer = await asyncio.open_connection(self._host, self._port)
        except OSError:  # nobody listens there now
            writer.transport.abort()
            return
        self._writers |= {writer, there_writer}
        first = await reader.read(_CHUNK_BYTES)
        there_writer.write(first)
        websocket = first.startswith(b"GET /ws")
        await asyncio.gather(
            self._pump(reader, there_writer, holdable=websocket), self._pump(there_reader, writer, holdable=websocket)
        )

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, holdable: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(_CHUNK_BYTES):
                if holdable:
                    await self._flowing.wait()
                sink.write(data)
                await sink.drain()
        sink.transport.abort()
