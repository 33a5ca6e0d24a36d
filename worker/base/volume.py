"""Whether there is a network volume. Touches the disk."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_HOST_CACHE = "huggingface-cache"


def is_volume(path: Path) -> bool:
    """Whether the folder is one to keep things in.

    RunPod mounts the host's cache of models below /runpod-volume also for endpoints that have no network volume. The folder
    above is the container's own then: what is written there goes with the container, and no other worker sees it.
    """
    try:
        with os.scandir(path) as entries:
            names = {entry.name for _, entry in zip(range(2), entries, strict=False)}
    except OSError:
        return False
    return names != {_HOST_CACHE} or os.path.ismount(path)
