"""Run the warm-up workflow, so that its models are on the GPU before the first job."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from worker.errors import WorkerError

if TYPE_CHECKING:
    from concurrent.futures import Future

    from worker.engine.engine import Engine
    from worker.graph.graph import Graph

log = logging.getLogger(__name__)


async def warm_up(engine: Engine, wanted: Future[Graph | None], timeout_s: float) -> str:
    """Run the warm-up workflow. Return a note on how it went, or an empty text if there is none.

    It ends in time or is interrupted. If ComfyUI does not stop it, ComfyUI is replaced.
    """
    try:
        graph = await asyncio.wait_for(asyncio.wrap_future(wanted), timeout_s)
        if graph is None:
            return ""
        await engine.run(graph, timeout_s=timeout_s)
    except TimeoutError:
        log.warning("no warm-up: the volume did not answer within %g s", timeout_s)
        return "given up"
    except WorkerError as exc:
        log.warning("the warm-up workflow failed: %s [%s]", exc, exc.code)
        return "failed"
    return f"{len(graph)} nodes"
