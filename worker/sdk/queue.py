"""Join the SDK's queue, the job loop, progress and the worker. Touches the network through the SDK."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

from worker.sdk.job_loop import JobLoop
from worker.sdk.progress_posts import ProgressPosts

if TYPE_CHECKING:
    from worker.boot import Worker


def config(worker: Worker) -> dict[str, Any]:
    """Return the SDK's config for jobs and progress on RunPod."""

    async def handle(job: dict[str, Any]) -> dict[str, Any]:
        async with ProgressPosts(job, lambda: loop.session) as posts:
            engine_free = partial(loop.engine_free, job["id"])
            try:
                result = await worker.loop.run(worker.handler.handle(job, posts.tell, engine_free))
            except asyncio.CancelledError:
                if worker.handler.refreshes:
                    loop.leave()
                raise
        if await loop.is_last(job["id"], asks=result.pop("refresh_worker", False)):
            result["refresh_worker"] = True  # the SDK turns it into `stopPod`
        return result

    made = {"handler": handle}
    loop = JobLoop(made, worker.clock, lambda: worker.failed)
    loop.take_the_place()
    worker.leave = loop.leave_soon
    return made
