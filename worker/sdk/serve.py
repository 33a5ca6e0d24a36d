"""Run the RunPod SDK: choose its mode and work around its defects. Touches the network through the SDK."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worker.errors import NothingToServe

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping, Sequence

    from worker.boot import Worker
    from worker.settings import Settings

_LOCAL_API = "--rp_serve_api"
_TEST_INPUT = "--test_input"


def sdk_arguments(settings: Settings, argv: Sequence[str], environ: Mapping[str, str], cwd: Path) -> list[str]:
    """Return the arguments for the SDK. Raises `NothingToServe` if it would boot everything, find no job and exit."""
    arguments = list(argv)
    if settings.serve_api_locally and _LOCAL_API not in arguments:
        arguments += [_LOCAL_API, "--rp_api_host", "0.0.0.0"]  # noqa: S104 - asked for by SERVE_API_LOCALLY
    has_input = any(argument.split("=")[0] == _TEST_INPUT for argument in arguments)
    on_runpod = "RUNPOD_WEBHOOK_GET_JOB" in environ or "RUNPOD_REALTIME_PORT" in environ
    if not (on_runpod or _LOCAL_API in arguments or has_input or (cwd / "test_input.json").is_file()):
        raise NothingToServe
    return arguments


def prepare_environ(environ: MutableMapping[str, str]) -> None:
    """Before the SDK serves, set its variables, unless they are set.

    At DEBUG, its default, it prints every result and every signed URL. Its checks of the machine begin when ComfyUI is up and
    run one after another: several starts of nvidia-smi, a CUDA context, a connection to 8.8.8.8, a tenth of the disk free. By
    then ComfyUI has a GPU context, or did not start and says why, so the checks would only cost time.
    """
    environ.setdefault("RUNPOD_LOG_LEVEL", "INFO")
    environ.setdefault("RUNPOD_SKIP_AUTO_SYSTEM_CHECKS", "true")
    environ.setdefault("RUNPOD_SKIP_GPU_CHECK", "true")


def takes_jobs(arguments: Sequence[str], environ: Mapping[str, str]) -> bool:
    """Return whether the SDK serves jobs from RunPod's queue, not from the local API or a test input."""
    # The SDK looks for a port for realtime jobs first, and serves them through its local API.
    takes = "RUNPOD_WEBHOOK_GET_JOB" in environ and environ.get("RUNPOD_REALTIME_PORT", "0") == "0"
    return takes and not {_LOCAL_API, _TEST_INPUT} & {name.split("=")[0] for name in arguments}


def import_sdk(arguments: Sequence[str], environ: Mapping[str, str]) -> None:
    """Import what `serve` will need, so that it overlaps with ComfyUI's boot. Raises `SdkUnknown`.

    The SDK asks py-cpuinfo for the processor's name, once, at import, for its debugger. That starts a Python process and takes
    1.3 s of a core on which ComfyUI boots. /proc has the name as well.
    """
    import cpuinfo  # noqa: PLC0415 - imported while ComfyUI boots, not before it is spawned

    slow, cpuinfo.get_cpu_info = cpuinfo.get_cpu_info, lambda: {"brand_raw": _processor_name()}
    try:
        import runpod  # noqa: PLC0415 - as above
    finally:
        cpuinfo.get_cpu_info = slow
    if _LOCAL_API in arguments:
        import runpod.serverless.modules.rp_fastapi  # noqa: F401, PLC0415 - as above
    if takes_jobs(arguments, environ):
        from worker.sdk.parts import check_sdk  # noqa: PLC0415 - as above

        check_sdk()
        from worker.sdk import job_loop, progress_posts  # noqa: F401, PLC0415 - as above


def _processor_name(path: Path = Path("/proc/cpuinfo")) -> str:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def serve(worker: Worker, arguments: Sequence[str], environ: Mapping[str, str]) -> None:
    """Run the SDK: take jobs until it ends.

    On RunPod that is after SIGTERM or a result that asks for another worker. With a test input it is after one job.
    """
    import multiprocessing  # noqa: PLC0415 - not before ComfyUI is spawned

    import runpod  # noqa: PLC0415 - already imported by import_sdk

    sys.argv[1:] = arguments  # the SDK parses sys.argv itself
    print("worker-comfyui - Starting handler...", flush=True)  # noqa: T201 - a line that people's checks look for
    if takes_jobs(arguments, environ):
        runpod.serverless.start(_production_config(worker))
        # The heartbeat is a daemon process, which would end with this one, but only after everything else.
        for child in multiprocessing.active_children():
            child.kill()  # forked beside running threads, it may be stuck and deaf to SIGTERM
    else:
        runpod.serverless.start({"handler": lambda job: worker.loop.run(worker.handler.handle(job))})


def _production_config(worker: Worker) -> dict[str, Any]:
    """Return the SDK's config for jobs and progress on RunPod."""
    import asyncio  # noqa: PLC0415 - not before ComfyUI is spawned

    from worker.sdk.job_loop import JobLoop  # noqa: PLC0415 - already imported by import_sdk
    from worker.sdk.progress_posts import ProgressPosts  # noqa: PLC0415 - as above

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

    config = {"handler": handle}
    loop = JobLoop(config, worker.clock, lambda: worker.failed)
    loop.take_the_place()
    worker.leave = loop.leave_soon
    return config
