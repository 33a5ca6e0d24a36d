"""Post a job's progress to RunPod, through the SDK. Touches the network."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Self

from runpod.serverless.modules.rp_http import send_result

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aiohttp import ClientSession

# How long a job's end waits for a post that is under way.
_POST_S = 5.0
# The limit for a post that is accepted and never answered. The next one has newer progress.
_ATTEMPT_S = 20.0


class ProgressPosts:
    """Posts a job's progress to RunPod: at most one a second, in order, only the latest, and none after the job's end.

    The SDK's own `progress_update` starts a thread for each call. The calls overtake each other, and one that arrives after the
    result leaves the job IN_PROGRESS for ever.
    """

    def __init__(self, job: Mapping[str, Any], session: Callable[[], ClientSession], every_s: float = 1.0) -> None:
        self._job = dict(job)
        self._session = session
        self._every_s = every_s
        self._latest: dict[str, Any] | None = None
        self._news = asyncio.Event()
        self._posting = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self._ended = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Let the current post arrive, and drop newer progress: the result says more."""
        self._ended = True
        if self._task is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_POST_S), self._posting:
                pass
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def tell(self, progress: dict[str, Any]) -> None:
        """Schedule this to be posted soon. May be called from any thread. It never waits and never raises."""
        with contextlib.suppress(RuntimeError):  # the SDK's loop is closing
            self._loop.call_soon_threadsafe(self._take, progress)

    def _take(self, progress: dict[str, Any]) -> None:
        if self._ended:
            return
        self._latest = progress
        self._news.set()
        if self._task is None:
            self._task = asyncio.create_task(self._post(), name="progress")

    async def _post(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            async with self._posting:
                if self._ended:
                    return
                # It logs errors and raises nothing: progress is never worth a job.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_ATTEMPT_S):
                        await send_result(self._session(), {"status": "IN_PROGRESS", "output": self._latest}, self._job)
            await asyncio.sleep(self._every_s)
