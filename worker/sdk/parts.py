"""The parts of the RunPod SDK that the job loop is built on. Imports the SDK."""

from __future__ import annotations

import importlib
import inspect
from functools import reduce
from typing import Any, Final

from worker.errors import SdkUnknown

_MODULES: Final = "runpod.serverless.modules"
_PARTS: Final = (
    ("runpod.http_client", "get_auth_header", None),
    # Makes the loop and runs it: `rp_scale.JobScaler(config).start()`.
    ("runpod.serverless.worker", "rp_scale.JobScaler", ("config",)),
    ("runpod.serverless.worker", "run_worker", ("config",)),
    (f"{_MODULES}.rp_scale", "JobScaler.start", ("self",)),
    (f"{_MODULES}.rp_scale", "JobScaler.run", ("self",)),
    (f"{_MODULES}.rp_scale", "JobScaler.get_jobs", ("self", "session")),
    (f"{_MODULES}.rp_scale", "JobScaler.run_jobs", ("self", "session")),
    (f"{_MODULES}.rp_scale", "JobScaler.monitor_stop_signals", ("self", "session")),
    (f"{_MODULES}.rp_scale", "JobScaler.handle_job", ("self", "session", "job")),
    (f"{_MODULES}.rp_scale", "JobScaler.kill_worker", ("self",)),
    (f"{_MODULES}.rp_scale", "JobScaler.is_alive", ("self",)),
    (f"{_MODULES}.rp_job", "handle_job", ("session", "config", "job")),
    (f"{_MODULES}.rp_job", "get_stop_signals", ("session",)),
    (f"{_MODULES}.rp_job", "_job_get_url", ("batch_size",)),
    (f"{_MODULES}.rp_http", "send_result", ("session", "job_data", "job", "is_stream")),
)
_ATTRIBUTES: Final = (
    *("jobs_queue", "jobs_tasks", "job_progress"),
    *("jobs_handler", "stop_signals_fetcher", "stop_signals_fetcher_timeout"),
)


def check_sdk() -> None:
    """Raise `SdkUnknown` where the SDK lacks a part that the job loop is built on, or has another in its place."""
    odd = [f"{module}.{name}" for module, name, parameters in _PARTS if not _sdk_has(module, name, parameters)]
    if not odd:
        loop = importlib.import_module(f"{_MODULES}.rp_scale").JobScaler({})
        odd = [f"JobScaler().{name}" for name in _ATTRIBUTES if not hasattr(loop, name)]
    if odd:
        raise SdkUnknown(importlib.import_module("runpod.version").__version__, odd)


def _sdk_has(module: str, name: str, parameters: tuple[str, ...] | None) -> bool:
    try:
        part: Any = reduce(getattr, name.split("."), importlib.import_module(module))
        return parameters is None or tuple(inspect.signature(part).parameters) == parameters
    except (ImportError, AttributeError, TypeError, ValueError):
        return False
