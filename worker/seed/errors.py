"""The errors that only the seeder meets, as one tree. Pure.

WorkerError
└── SeedError                a volume cannot be filled ahead of the workers
    ├── SeedUsage, WhatUnknown, ModelUnavailable, DatacenterUnknown, S3KeysMissing
    └── S3KeysRefused, S3VolumeNotFound, S3VolumeFull, S3FileDiffers, S3Unreachable, S3Failed
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.base.text import size_text
from worker.errors import WorkerError

if TYPE_CHECKING:
    from collections.abc import Sequence


class SeedError(WorkerError):
    """Filling a volume ahead of the workers failed."""

    code = "seed_failed"


class SeedUsage(SeedError):
    """The seeder cannot do what its command line says."""

    reason: str
    code = "usage"
    template = "{reason}"


class WhatUnknown(SeedError):
    """The seeder's WHAT is no file, no address and no template's name."""

    what: str
    near: Sequence[str] = ()
    saved: Sequence[str] = ()
    code = "what_unknown"
    template = (
        "'{what}' is no manifest or workflow on this machine or the volume, no hf:// or https:// address, "
        "and no official template; {alike}."
    )

    @property
    def alike(self) -> str:
        near = f"templates like it are {', '.join(self.near)}" if self.near else "--help says what can be named"
        return f"{near}, and the volume's workflows are {', '.join(self.saved[:20])}" if self.saved else near


class ModelUnavailable(SeedError):
    """A wanted model is unavailable, which was known before anything was sent. `cause` is that error's code."""

    reason: str
    cause: str | None = None
    code = "model_unavailable"
    template = "{reason}"


class DatacenterUnknown(SeedError):
    """RunPod has no S3-compatible API there."""

    name: str
    known: Sequence[str]
    code = "datacenter_unknown"
    template = "There is no S3 API in the data centre '{name}'; it is one of {known:, }."


class S3KeysMissing(SeedError):
    """The keys of RunPod's S3 API are not set."""

    variables: Sequence[str]
    code = "s3_keys_missing"
    template = (
        "Set {variables: and } to an S3 API key of RunPod (console: Settings > S3 API Keys; "
        "it begins with user_ and its secret with rps_, and is not the RunPod API key)."
    )


class S3KeysRefused(SeedError):
    """The keys are wrong, or not allowed to use this volume."""

    volume: str
    status: int
    code = "s3_keys_refused"
    template = (
        "The keys were refused for the volume {volume} (status {status}): check RUNPOD_S3_ACCESS_KEY_ID, "
        "RUNPOD_S3_SECRET_ACCESS_KEY and that the volume is of the same account."
    )


class S3VolumeNotFound(SeedError):
    """No volume of this id is in this data centre."""

    volume: str
    place: str
    code = "s3_volume_not_found"
    template = "There is no volume '{volume}' in {place}: copy its id and data centre from RunPod's console."


class S3VolumeFull(SeedError):
    """The volume has no room (status 507). The sent part of the file was removed."""

    volume: str
    needed_bytes: int
    code = "s3_volume_full"
    template = (
        "The volume {volume} has no room for {needed} more: enlarge it or remove models (--list, --prune), then run this again."
    )

    @property
    def needed(self) -> str:
        return size_text(self.needed_bytes)


class S3FileDiffers(SeedError):
    """A file that was put on the volume by hand differs from the wanted one. It was left unchanged."""

    key: str
    what: str
    expected: str
    actual: str
    code = "s3_file_differs"
    template = (
        "{key} on the volume has the {what} {actual}, not {expected}; the file was left unchanged: "
        "remove it to upload the right one."
    )


class S3Unreachable(SeedError):
    """The volume's S3 API gave no useful answer for too long."""

    volume: str
    reason: str
    code = "s3_unreachable"
    retryable = True
    template = "The volume {volume} could not be reached ({reason}); nothing is lost, run this again to resume."


class S3Failed(SeedError):
    """The volume's S3 API refused a request for another reason."""

    volume: str
    operation: str
    reason: str
    code = "s3_failed"
    retryable = True
    template = "{operation} failed on the volume {volume}: {reason}; run this again to resume."
