"""Check for a network volume. Touches the disk."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_HOST_CACHE = "huggingface-cache"


def is_volume(path: Path) -> bool:
    """Return whether files in the folder outlive the container.

    RunPod mounts the host's cache of models below /runpod-volume even for endpoints without a network volume. The folder above
    it then belongs to the container: files there are lost with the container, and no other worker sees them.
    """
    try:
        with os.scandir(path) as entries:
            names = {entry.name for _, entry in zip(range(2), entries, strict=False)}
    except OSError:
        return False
    return names != {_HOST_CACHE} or os.path.ismount(path)
