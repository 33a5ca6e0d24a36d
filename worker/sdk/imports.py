"""Import the RunPod SDK while ComfyUI boots, without its slow look at the processor."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

import cpuinfo

from worker.sdk.arguments import LOCAL_API, takes_jobs
from worker.sdk.parts import check_sdk

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def import_sdk(arguments: Sequence[str], environ: Mapping[str, str]) -> None:
    """Import `serve` and what it will need, so that this overlaps with ComfyUI's boot. Raises `SdkUnknown`.

    The SDK asks py-cpuinfo for the processor's name, once, at import, for its debugger. That starts a Python process and takes
    1.3 s of a core on which ComfyUI boots. /proc has the name as well.
    """
    slow, cpuinfo.get_cpu_info = cpuinfo.get_cpu_info, lambda: {"brand_raw": _processor_name()}
    try:
        importlib.import_module("worker.sdk.serve")
    finally:
        cpuinfo.get_cpu_info = slow
    if LOCAL_API in arguments:
        importlib.import_module("runpod.serverless.modules.rp_fastapi")
    if takes_jobs(arguments, environ):
        check_sdk()
        importlib.import_module("worker.sdk.queue")


def _processor_name(path: Path = Path("/proc/cpuinfo")) -> str:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
