"""The errors that only `up` meets, as one tree. Pure.

WorkerError
└── UpError                  an endpoint cannot be made, shown or removed
    ├── UpUsage, StateInvalid, VolumeUnknown, ModelsNotReady, FillFailed
    ├── ApiKeyMissing, ApiKeyRefused, ApiKeyLacksRights, NoBalance, WorkerQuota
    ├── NoGpuFree, NoCpuFree, ImageNotFound
    └── RunPodBusy, RunPodFailed, RunPodUnreachable, RunPodRefused
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.errors import WorkerError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_SHOWN = 3


class UpError(WorkerError):
    """An endpoint cannot be created, shown or removed."""

    code = "up_failed"


class UpUsage(UpError):
    """The command line of `up` is wrong."""

    reason: str
    code = "up_usage"
    template = "{reason}"


class StateInvalid(UpError):
    """The file in which `up` records its steps cannot be read or written."""

    path: Path
    reason: str
    code = "up_state_invalid"
    template = "The state file {path} cannot be used ({reason}): correct or remove it; `up` finds what it created by its name."


class VolumeUnknown(UpError):
    """The account that `up` uses has no network volume of this id."""

    volume: str
    code = "volume_unknown"
    template = "The account has no network volume '{volume}': copy its id from RunPod's console (Storage)."


class ModelsNotReady(UpError):
    """A model that the workflow needs cannot be put on a volume. Nothing was created."""

    models: Sequence[str]
    code = "models_not_ready"
    template = (
        "The workflow needs models that cannot be downloaded: {first}; name sources in a models.toml after the workflow, "
        "or set HF_TOKEN for gated ones. Nothing was created."
    )
    details_field = "models"

    @property
    def first(self) -> str:
        more = len(self.models) - _SHOWN
        return ", ".join(self.models[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


class FillFailed(UpError):
    """The models could not be put onto the volume. What arrived is kept."""

    reason: str
    code = "fill_failed"
    retryable = True
    template = "The volume was not filled ({reason}): run the same command again to resume."


class ApiKeyMissing(UpError):
    """RUNPOD_API_KEY is not set."""

    code = "api_key_missing"
    template = "Set RUNPOD_API_KEY to a key of your account: RunPod's console makes one under Settings > API Keys."


class ApiKeyRefused(UpError):
    """RunPod does not know the key (status 401)."""

    code = "api_key_refused"
    template = "RunPod does not accept RUNPOD_API_KEY (status 401): copy it again, or make a new one under Settings > API Keys."


class ApiKeyLacksRights(UpError):
    """RunPod knows the key, but does not allow this (status 403)."""

    operation: str
    code = "api_key_lacks_rights"
    template = (
        "RUNPOD_API_KEY may not do this ({operation}, status 403): give the key read and write rights to RunPod's API "
        "under Settings > API Keys."
    )


class NoBalance(UpError):
    """The account has no money left (status 402)."""

    operation: str
    code = "no_balance"
    template = (
        "The account's balance is too low ({operation}, status 402): add credit under Billing in RunPod's console, then run "
        "the same command again."
    )


class WorkerQuota(UpError):
    """All endpoints of the account together would exceed its number of workers."""

    workers: int
    reason: str
    code = "worker_quota"
    template = (
        "The account may not have {workers} more workers ({reason}): use --max-workers with a smaller number, or lower other "
        "endpoints' max workers; the quota grows with the balance."
    )


class NoGpuFree(UpError):
    """No GPU of the wanted kinds is free where the endpoint would be."""

    pools: Sequence[str]
    place: str
    code = "no_gpu_free"
    retryable = True
    template = (
        "No GPU of {pools:, } is free in {place} now: try again later, name others with --gpu, or another data centre with "
        "--datacenter."
    )


class NoCpuFree(UpError):
    """No machine is free for the Pod that fills the volume."""

    place: str
    reason: str
    code = "no_cpu_free"
    retryable = True
    template = (
        "No CPU Pod is available in {place} to fill the volume ({reason}): try again later, or use --fill s3 with an S3 key, "
        "or --fill job to let the first job download the models."
    )


class ImageNotFound(UpError):
    """RunPod cannot pull the image."""

    image: str
    reason: str
    code = "image_not_found"
    template = (
        "RunPod cannot pull the image {image} ({reason}): check the name and tag, make the package public, or give --registry "
        "ID for a private one."
    )


class RunPodBusy(UpError):
    """RunPod's API asks to wait longer than `up` does (status 429)."""

    waited_s: float
    code = "runpod_busy"
    retryable = True
    template = (
        "RunPod's API refused requests for {waited_s:.0f} s because there were too many: wait a minute, then run the same "
        "command again."
    )


class RunPodFailed(UpError):
    """RunPod's API failed repeatedly."""

    operation: str
    status: int
    code = "runpod_failed"
    retryable = True
    template = "RunPod's API failed ({operation}, status {status}): nothing is lost, run the same command again."


class RunPodUnreachable(UpError):
    """RunPod's API gave no answer."""

    operation: str
    reason: str
    code = "runpod_unreachable"
    retryable = True
    template = (
        "RunPod's API cannot be reached ({operation}: {reason}): check the network, then run the same command again; nothing "
        "is lost."
    )


class RunPodRefused(UpError):
    """RunPod's API refused a request for another reason."""

    operation: str
    status: int
    reason: str
    code = "runpod_refused"
    template = "RunPod refused {operation} (status {status}): {reason}; correct what it names, then run it again."
