"""Run the RunPod SDK on its queue, its local API or a test input. Touches the network through the SDK."""

from __future__ import annotations

import multiprocessing
import sys
from typing import TYPE_CHECKING

import runpod

from worker.sdk.arguments import takes_jobs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from worker.boot import Worker


def serve(worker: Worker, arguments: Sequence[str], environ: Mapping[str, str]) -> None:
    """Take jobs until the SDK ends.

    On RunPod that is after SIGTERM or a result that asks for another worker. With a test input it is after one job.
    """
    sys.argv[1:] = arguments  # the SDK parses sys.argv itself
    print("worker-comfyui - Starting handler...", flush=True)  # noqa: T201 - a line that people's checks look for
    if takes_jobs(arguments, environ):
        from worker.sdk.job_loop import job_config  # noqa: PLC0415 - imported by import_sdk, after it looked at the SDK's parts

        runpod.serverless.start(job_config(worker))
        # The heartbeat is a daemon process, which would end with this one, but only after everything else.
        for child in multiprocessing.active_children():
            child.kill()  # forked beside running threads, it may be stuck and deaf to SIGTERM
    else:
        runpod.serverless.start({"handler": lambda job: worker.loop.run(worker.handler.handle(job))})
