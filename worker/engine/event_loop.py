"""An event loop in its own thread. Touches threads.

The RunPod SDK needs the main thread and creates its loop late, a different one in each of its modes. The engine needs a loop
from the beginning and for as long as the worker lives. Jobs cross over to it.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")
P = ParamSpec("P")

_SMALL = 5000
_CHARACTERS = 16


class LoopAside:
    """Runs work whose size a request decides without blocking the event loop: in a thread, or in place for a small request.

    A thread costs a tenth of a millisecond each time, and a small request takes less than a tenth of that.
    """

    def __init__(self, value: object) -> None:
        self._large = is_large_json(value)

    async def __call__(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run the function and return its result."""
        return await asyncio.to_thread(function, *args, **kwargs) if self._large else function(*args, **kwargs)


def is_large_json(value: object) -> bool:
    """Return whether JSON is too large to be handled on an event loop: some thousand values. Stops counting there."""
    cost, left = 0, [value]
    while left and cost <= _SMALL:
        item = left.pop()
        if isinstance(item, str):
            cost += len(item) // _CHARACTERS
        elif isinstance(item, (dict, list)):
            cost += len(item)
            if cost <= _SMALL and isinstance(item, dict):
                cost += sum(len(key) // _CHARACTERS for key in item if isinstance(key, str))
                left.extend(item.values())
            elif cost <= _SMALL:
                left.extend(item)
    return cost > _SMALL


class Milestone:
    """A moment that coroutines on any event loop wait for. A thread reaches it, or says why it never will."""

    def __init__(self) -> None:
        self._reached: Future[None] = Future()

    def reach(self) -> None:
        """Have everybody go on. More than once is once."""
        if not self._reached.done():
            self._reached.set_result(None)

    def fail(self, error: BaseException) -> None:
        """Raise this in everybody who waits, or will. After it was reached nothing happens."""
        if not self._reached.done():
            self._reached.set_exception(error)

    async def wait(self) -> None:
        """Return when it is reached. Raises what it failed with."""
        if not self._reached.done():
            await asyncio.shield(asyncio.wrap_future(self._reached))
        self._reached.result()

    def wait_here(self) -> None:
        """Return when it is reached, in a thread. Raises what it failed with."""
        self._reached.result()


class BootMilestones:
    """The moments of the cold start that jobs on an event loop wait for: models are `linked`, ComfyUI is `ready` and warm."""

    def __init__(self) -> None:
        self.linked = Milestone()
        self.ready = Milestone()


class LoopThread:
    """A running event loop that accepts coroutines from any thread."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, coro: Coroutine[Any, Any, T]) -> Future[T]:
        """Start `coro` in the loop. Return a future for threads to wait on."""
        return asyncio.run_coroutine_threadsafe(coro, self._loop)

    async def run(self, coro: Coroutine[Any, Any, T]) -> T:
        """Run `coro` in the loop, and await it here, on the caller's own loop.

        A cancellation here cancels it there, and is raised after it has cleaned up.
        """
        tasks: list[asyncio.Task[T]] = []
        finished: Future[None] = Future()

        def begin() -> None:
            task = self._loop.create_task(coro)
            tasks.append(task)
            task.add_done_callback(lambda _: finished.set_result(None))

        def cancel() -> None:
            tasks[0].cancel()

        self._loop.call_soon_threadsafe(begin)
        waiter = asyncio.wrap_future(finished)
        cancelled = False
        while not waiter.done():
            try:
                await asyncio.shield(waiter)
            except asyncio.CancelledError:
                cancelled = True
                self._loop.call_soon_threadsafe(cancel)
        if cancelled:
            tasks[0].cancelled()  # an exception that lost against the cancellation is not reported as never retrieved
            raise asyncio.CancelledError
        return tasks[0].result()

    def stop(self) -> None:
        """End the loop and its thread, and cancel what still runs on it."""
        asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
