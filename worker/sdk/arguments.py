"""Choose the RunPod SDK's mode by its arguments and variables, before it is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.errors import NothingToServe

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping, Sequence
    from pathlib import Path

    from worker.settings import Settings

LOCAL_API = "--rp_serve_api"
_TEST_INPUT = "--test_input"


def sdk_arguments(settings: Settings, argv: Sequence[str], environ: Mapping[str, str], cwd: Path) -> list[str]:
    """Return the arguments for the SDK. Raises `NothingToServe` if it would boot everything, find no job and exit."""
    arguments = list(argv)
    if settings.serve_api_locally and LOCAL_API not in arguments:
        arguments += [LOCAL_API, "--rp_api_host", "0.0.0.0"]  # noqa: S104 - asked for by SERVE_API_LOCALLY
    has_input = any(argument.split("=")[0] == _TEST_INPUT for argument in arguments)
    on_runpod = "RUNPOD_WEBHOOK_GET_JOB" in environ or "RUNPOD_REALTIME_PORT" in environ
    if not (on_runpod or LOCAL_API in arguments or has_input or (cwd / "test_input.json").is_file()):
        raise NothingToServe
    return arguments


def prepare_environ(environ: MutableMapping[str, str]) -> None:
    """Set the variables that the SDK reads beside its arguments, unless they are set.

    At DEBUG, its default, it prints every result and every signed URL. Its checks of the machine begin when ComfyUI is up and
    run one after another: several starts of nvidia-smi, a CUDA context, a connection to 8.8.8.8, a tenth of the disk free. By
    then ComfyUI has a GPU context, or did not start and says why, so the checks would only cost time.
    """
    environ.setdefault("RUNPOD_LOG_LEVEL", "INFO")
    environ.setdefault("RUNPOD_SKIP_AUTO_SYSTEM_CHECKS", "true")
    environ.setdefault("RUNPOD_SKIP_GPU_CHECK", "true")


def takes_jobs(arguments: Sequence[str], environ: Mapping[str, str]) -> bool:
    """Return whether these arguments have the SDK take jobs from RunPod's queue, not from the local API or a test input."""
    # The SDK looks for a port for realtime jobs first, and serves them through its local API.
    takes = "RUNPOD_WEBHOOK_GET_JOB" in environ and environ.get("RUNPOD_REALTIME_PORT", "0") == "0"
    return takes and not {LOCAL_API, _TEST_INPUT} & {name.split("=")[0] for name in arguments}
