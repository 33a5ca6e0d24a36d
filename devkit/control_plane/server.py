"""The HTTP server in a thread of its own, and requests that are held open on its loop. Threads, loopback network."""

from __future__ import annotations

import asyncio
import select
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Final, TypeVar

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

T = TypeVar("T")

_START_TIMEOUT_S: Final = 30.0
_STOP_TIMEOUT_S: Final = 10.0
_LINGER_S: Final = 1.0


def peer_is_gone(request: web.Request) -> bool:
    """Return whether the client has closed its end, which the kernel knows before the loop has read it."""
    if request.transport is None or request.transport.is_closing():
        return True
    poller = select.poll()
    poller.register(request.transport.get_extra_info("socket").fileno(), select.POLLRDHUP)
    return bool(poller.poll(0))


class _Waiter:
    """One who waits on the loop, over many wakings."""

    def __init__(self) -> None:
        self._woken: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """Let it look; nothing if it is about to."""
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    async def wait(self, timeout_s: float) -> None:
        """Return when woken, or when the time is over."""
        loop = asyncio.get_running_loop()
        self._woken = loop.create_future()
        timer = loop.call_later(timeout_s, self.wake)
        try:
            await self._woken
        finally:
            timer.cancel()


class Bell:
    """Wakes all who wait on the loop. May be rung from any thread, before the loop runs and after."""

    def __init__(self) -> None:
        self.closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiters: list[_Waiter] = []

    def attach(self) -> None:
        """Bind it to the running loop."""
        self._loop = asyncio.get_running_loop()

    def ring(self) -> None:
        """Announce a change."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        for waiter in self._waiters:
            waiter.wake()

    async def wait_for(self, attempt: Callable[[], T], timeout_s: float) -> T:
        """Return the result of `attempt()` once it is true, or when the time is over. Try now and at every ring."""
        loop, waiter = asyncio.get_running_loop(), _Waiter()
        end_s = loop.time() + timeout_s
        self._waiters.append(waiter)
        try:
            while not (found := attempt()) and not self.closing and (left_s := end_s - loop.time()) > 0:
                await waiter.wait(left_s)
            return found
        finally:
            self._waiters.remove(waiter)


class Server:
    """Serves `routes` on loopback from construction until `close`."""

    def __init__(self, routes: Iterable[web.RouteDef], bell: Bell, port: int) -> None:
        self._app = web.Application(client_max_size=0)  # sizes are judged by the routes, as RunPod does
        self._app.add_routes(routes)
        self._bell = bell
        self._stop: Callable[[], object] = lambda: None
        started: Future[int] = Future()
        self._thread = threading.Thread(target=self._run, args=(port, started), name="control-plane", daemon=True)
        self._thread.start()
        self.port = started.result(_START_TIMEOUT_S)

    def close(self) -> None:
        """Answer what is held with nothing, end every connection, end the thread."""
        self._bell.closing = True
        self._stop()
        self._thread.join(_STOP_TIMEOUT_S)

    def _run(self, port: int, started: Future[int]) -> None:
        try:
            asyncio.run(self._serve(port, started))
        except OSError as exc:  # the port is taken
            started.set_exception(exc)

    async def _serve(self, port: int, started: Future[int]) -> None:
        self._bell.attach()
        stopped, loop = asyncio.Event(), asyncio.get_running_loop()
        # Without handler_cancellation a poll would go on after its client's death, and take the next job.
        runner = web.AppRunner(self._app, handler_cancellation=True, access_log=None, shutdown_timeout=_LINGER_S)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        self._stop = lambda: loop.call_soon_threadsafe(stopped.set)
        started.set_result(runner.addresses[0][1])
        await stopped.wait()
        self._bell.ring()
        await runner.cleanup()
