"""Import the RunPod SDK while ComfyUI boots, without what it never uses in a worker."""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import cpuinfo

from worker.sdk.arguments import LOCAL_API, takes_jobs
from worker.sdk.parts import check_sdk

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


def import_sdk(arguments: Sequence[str], environ: Mapping[str, str]) -> None:
    """Import `serve` and what it will need, so that this overlaps with ComfyUI's boot. Raises `SdkUnknown`.

    The SDK's package also imports its command line, and with it paramiko, the client for SSH: 16 MB, and 0.25 s of a core on
    which ComfyUI boots.
    """
    with _processor_from_proc():
        try:
            with _without("paramiko"):
                importlib.import_module("worker.sdk.serve")
        except (AttributeError, ImportError):  # an SDK whose command line uses it while it is imported
            importlib.import_module("worker.sdk.serve")
    if LOCAL_API in arguments:
        importlib.import_module("runpod.serverless.modules.rp_fastapi")
    if takes_jobs(arguments, environ):
        check_sdk()
        importlib.import_module("worker.sdk.job_loop")


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
    """Let imports of this module in the body find an empty one. Leave it alone if it was imported before."""
    empty = ModuleType(name)
    found = sys.modules.setdefault(name, empty)
    try:
        yield
    finally:
        if found is empty:
            del sys.modules[name]


@contextlib.contextmanager
def _processor_from_proc() -> Iterator[None]:
    """While the SDK is imported, have py-cpuinfo give the processor's name from /proc.

    The SDK asks for it once, at import, for its debugger. That starts a Python process and takes 1.3 s of a core.
    """
    slow, cpuinfo.get_cpu_info = cpuinfo.get_cpu_info, lambda: {"brand_raw": _processor_name()}
    try:
        yield
    finally:
        cpuinfo.get_cpu_info = slow


def _processor_name(path: Path = Path("/proc/cpuinfo")) -> str:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
